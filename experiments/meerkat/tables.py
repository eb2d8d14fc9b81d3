"""The tables and claims of the study from ``results/*.json``; ``draw`` makes the figures."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path

import draw
from collect import Row, best_dev_loss, known
from pieces import BUDGETS, CORE_TASKS, METHODS, PIECES, SEEDS, TASKS
from verdicts import Results, best_rate, gains, interval, judge, tested

from fedzo.bench.claims import Claims

HERE = Path(__file__).parent
COMMAND = "python experiments/meerkat/run.py --data DIR"
SHOWN_KEYS = {"trainer.mask_path": "mask", "strategy.aggregation": "aggregation", "partition.alpha": "alpha"}
SELECTED_BY = ("selection.num_flagged", "selection.label_share", "fl.rounds", "evaluation.every_rounds", "trainer.lr")
"""Keys that follow from others, or that are told in a column of their own."""


def main() -> None:
    pieces = {piece: known(piece) for piece in PIECES}
    core, results = pieces["core"], Results(pieces)
    tasks = [task for task in TASKS if task in CORE_TASKS or any(row["task"] == task for row in core)]
    made = {
        "state": state(core),
        "tuning": tuning(known("tune")),
        "accuracy": accuracy(core),
        "others": others(pieces),
        "verdicts": verdicts(results, tasks),
    }
    (HERE / "tables.json").write_text(json.dumps(made, indent=1) + "\n")
    if core:
        claims(core).write(HERE / "claims.json")
    draw.main(pieces)


def state(core: Sequence[Row]) -> list[str]:
    """How much of the core grid is there, and what it has taken."""
    lines = ["| task | runs of the core grid | hours of one core |", "|---|---|---|"]
    whole = len(METHODS) * 2 * len(SEEDS)
    for task in CORE_TASKS:
        hours = sum(row["seconds"] for row in core if row["task"] == task) / 3600
        lines.append(f"| {TASKS[task]} | {sum(row['task'] == task for row in core)} of {whole} | {hours:.1f} |")
    return lines


def cells(rows: Iterable[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """Runs by (task, method, budget), in the order of the tables."""
    found: dict[tuple[str, str, str], list[Row]] = {key: [] for key in product(TASKS, METHODS, BUDGETS)}
    for row in rows:
        found[row["task"], row["method"], row["budget"]].append(row)
    return {key: sorted(found[key], key=lambda row: row["seed"]) for key in found if found[key]}


def tuning(tried: Sequence[Row]) -> list[str]:
    """The whole grid of learning rates: best dev loss of seed 0 at each, the chosen one in bold."""
    lines = ["| task | method | dev loss by learning rate |", "|---|---|---|"]
    for (task, method, _), rows in cells(tried).items():
        losses = {row["lr"]: best_dev_loss(row) for row in rows}
        best = min(losses, key=losses.__getitem__)
        shown = [
            f"**{lr:g}: {loss:.3f}**" if lr == best else f"{lr:g}: {loss:.3f}" for lr, loss in sorted(losses.items())
        ]
        lines.append(f"| {TASKS[task]} | {METHODS[method]} | {', '.join(shown)} |")
    return lines


def accuracy(core: Sequence[Row]) -> list[str]:
    """One line a method of each task: mean accuracy, its 95 % interval over seeds, and the worst client's."""
    lines = [
        "| task | method | T | lr | test accuracy, mean +- 95 % | seeds | worst client | best round | minutes a run |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for task in dict.fromkeys(row["task"] for row in core):
        before = statistics.fmean(row["before"]["value"] for row in core if row["task"] == task)
        lines.append(f"| {TASKS[task]} | before training | | | {100 * before:.1f} | | | | |")
        for (_, method, budget), rows in ((key, rows) for key, rows in cells(core).items() if key[0] == task):
            rates = "/".join(dict.fromkeys(f"{row['lr']:g}" for row in rows))
            rounds = "/".join(str(row["best_round"]) for row in rows)
            minutes = statistics.median(row["seconds"] for row in rows) / 60
            head = f"| {TASKS[task]} | {METHODS[method]} | {BUDGETS[budget]} | {rates} | {_mean(rows)} | {len(rows)} "
            lines.append(f"{head}| {_worst(rows)} | {rounds} | {minutes:.1f} |")
    return lines


def others(pieces: dict[str, list[Row]]) -> list[str]:
    """One line a variation of the pieces beyond the core, beside the core's runs of the same seeds."""
    lines = [
        "| task | method | T | changed | lr | accuracy, mean +- 95 % | seeds | beside core | worst client | stopped |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    results, groups = Results(pieces), {}
    for piece in [piece for piece in PIECES if piece != "core"]:
        for row in pieces[piece]:
            groups.setdefault((piece, row["task"], row["method"], row["budget"], _changed(piece, row)), []).append(row)
    for (_, task, method, budget, changed), tried in groups.items():
        rows = best_rate(tried)
        paired = gains(tested(rows), tested(results.rows("core", task, method, budget)))
        head = f"| {TASKS[task]} | {METHODS[method]} | {BUDGETS[budget]} | {changed} | {rows[0]['lr']:g} "
        stopped = ", ".join("all: T/2" if row["fallback"] else str(len(row["flagged"])) for row in rows)
        stopped = stopped if any(key.startswith("selection") for key in rows[0]["changed"]) else ""
        lines.append(f"{head}| {_mean(rows)} | {len(rows)} | {_points(paired)} | {_worst(rows)} | {stopped} |")
    return lines


def verdicts(results: Results, tasks: Sequence[str]) -> list[str]:
    """One line a claim, one column a task."""
    lines = [f"| claim | {' | '.join(TASKS[task] for task in tasks)} |", "|---|" + "---|" * len(tasks)]
    for verdict in zip(*(judge(results, task) for task in tasks), strict=True):
        seen = [f"**{each.verdict}**" + (f" ({each.seen})" if each.seen else "") for each in verdict]
        lines.append(
            "| "
            + " | ".join([verdict[0].claim, *seen]).replace("|g|", "\\|g\\|").replace("|GradIP|", "\\|GradIP\\|")
            + " |"
        )
    return lines


def claims(core: Sequence[Row]) -> Claims:
    """The accuracies, with the commits that the runs were made with."""
    commits = sorted({row["git_commit"] for row in core})
    made = Claims(
        command=COMMAND, seeds=list(SEEDS), environment={"git_commits": commits, "threads": 1, "device": "cpu"}
    )
    for (task, method, budget), rows in cells(core).items():
        if len(rows) == len(SEEDS):
            value, half = interval([row["after"]["value"] for row in rows])
            what = f"{TASKS[task]}, {METHODS[method]}, T = {BUDGETS[budget]}: test accuracy"
            made.add(f"{what} (mean of {len(rows)} seeds)", value, "share")
            made.add(f"{what}, half width of its 95 % interval", half, "share")
    return made


def _mean(rows: Sequence[Row]) -> str:
    mean, half = interval([row["after"]["value"] for row in rows])
    return f"{100 * mean:.1f}" + ("" if math.isnan(half) else f" +- {100 * half:.1f}")


def _points(paired: Sequence[float]) -> str:
    if not paired:
        return ""
    mean, half = interval(paired)
    return f"{100 * mean:+.1f}" + ("" if math.isnan(half) else f" +- {100 * half:.1f}")


def _worst(rows: Sequence[Row]) -> str:
    values = [row["federated"]["worst_client"] for row in rows if row["federated"]]
    return f"{100 * statistics.fmean(values):.0f}" if values else ""


def _changed(piece: str, row: Row) -> str:
    changed = {key: value for key, value in row["changed"].items() if key not in SELECTED_BY}
    changed = {key: Path(value).stem if key == "trainer.mask_path" else value for key, value in changed.items()}
    shown = [f"{SHOWN_KEYS.get(key, key)}={value}" for key, value in sorted(changed.items())]
    steps = "1,000 steps" if piece == "long" else ""
    return ", ".join(filter(None, [steps, *shown]))
