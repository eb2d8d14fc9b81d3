"""What has been run of the study, and what its pieces take."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from collect import Row
from pieces import BUDGETS, CORE_TASKS, METHODS, PIECES, SEEDS, TASKS, jobs_of


def state(core: Sequence[Row]) -> list[str]:
    """How much of the core grid is there, and what it has taken."""
    lines = ["| task | runs of the core grid | hours of one core |", "|---|---|---|"]
    whole = len(METHODS) * 2 * len(SEEDS)
    for task in CORE_TASKS:
        hours = sum(row["seconds"] for row in core if row["task"] == task) / 3600
        lines.append(f"| {TASKS[task]} | {sum(row['task'] == task for row in core)} of {whole} | {hours:.1f} |")
    return lines


def hours(core: Sequence[Row], tune: Sequence[Row]) -> list[str]:
    """What each piece takes on two cores, by the minutes that a local step of the core grid took on one.

    Tuning is as long as the ladders were that it climbed, so its row has what its runs took.
    """
    lines = ["| piece |", "|---|"]
    for task in CORE_TASKS:
        lines = [f"{lines[0]} {TASKS[task]}: runs | hours |", f"{lines[1]}---|---|"]
    tuned = [[row["seconds"] for row in tune if row["task"] == task] for task in CORE_TASKS]
    lines.append(f"| `tune` |{''.join(f' {len(taken)} | {sum(taken) / 2 / 3600:.1f} |' for taken in tuned)}")
    for piece in PIECES:
        row = f"| `{piece}` |"
        for task in CORE_TASKS:
            jobs = [(method, job) for method in METHODS for job in jobs_of(piece, f"{task}-{method}", lr=1.0)]
            if piece == "random_step_policy":
                row += f" up to {len(SEEDS)} | {_hours([('meerkat', ['+budget=T10'])] * len(SEEDS), core, task)} |"
            else:
                row += f" {len(jobs)} | {'' if piece == 'first_order' else _hours(jobs, core, task)} |"
        lines.append(row)
    return lines


def _hours(jobs: Sequence[tuple[str, list[str]]], core: Sequence[Row], task: str) -> str:
    """Of two runs at a time."""
    total = 0.0
    for method, job in jobs:
        taken = [row["seconds"] for row in core if (row["task"], row["method"]) == (task, method)]
        if not taken:
            return ""
        total += statistics.median(taken) * steps_of(job) / 200
    return f"{total / 2 / 3600:.1f}"


def steps_of(job: Sequence[str]) -> int:
    """Local steps of one run of a client, its calibration among them."""
    words = dict(word.split("=", 1) for word in job)
    if "fl.rounds" not in words:
        return 200
    rounds, steps = int(words["fl.rounds"]), BUDGETS[words["+budget"]]
    return (rounds - 1) * steps + 100 if words.get("step_policy") == "vpcs" else rounds * steps
