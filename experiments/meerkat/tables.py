"""The tables and claims of the study from ``results/*.json``; ``draw`` makes the figures."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path

import draw
from collect import Row, best_dev_loss, known
from costs import hours, state
from pieces import BUDGETS, CORE_TASKS, METHODS, OWN_RATES, PIECES, SEEDS, TASKS
from sequential import sequential
from verdicts import (
    ACCURACY,
    Measure,
    Results,
    Verdict,
    after_holm,
    best_rate,
    diverged,
    gains,
    judge,
    measures_of,
    tested,
)

from fedzo.bench.claims import Claims, check_alike
from fedzo.report.format import interval

HERE = Path(__file__).parent
COMMAND = "python experiments/meerkat/run.py --data DIR"
SHOWN_KEYS = {"inputs.artifact": "mask", "strategy.aggregation": "aggregation", "partition.alpha": "alpha"}
SELECTED_BY = (
    "step_policy.num_flagged",
    "step_policy.label_share",
    "fl.rounds",
    "evaluation.every_rounds",
    "trainer.lr",
    "runtime",
)
"""Keys that follow from others, or that are told in a column of their own."""


def main() -> None:
    pieces = {piece: known(piece) for piece in PIECES}
    (HERE / "tables.json").write_text(json.dumps(made(), indent=1) + "\n")
    if pieces["core"]:
        claims(pieces).write(HERE / "claims.json")
    draw.main(pieces)


def made() -> dict[str, list[str]]:
    """Every table, as lines."""
    pieces = {piece: known(piece) for piece in PIECES}
    core, results = pieces["core"], Results(pieces)
    tasks = [task for task in TASKS if task in CORE_TASKS or any(row["task"] == task for row in core)]
    return {
        "state": state(core),
        "tuning": tuning(known("tune"), [row for piece in OWN_RATES for row in known(f"tune_{piece}")]),
        "accuracy": accuracy(core),
        "others": others(pieces),
        "hours": hours(core, known("tune")),
        "sequential": sequential(core),
        "verdicts": verdicts(results, tasks),
        "holm": holm(results, tasks),
    }


def cells(rows: Iterable[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """Runs by (task, method, budget), in the order of the tables."""
    found: dict[tuple[str, str, str], list[Row]] = {key: [] for key in product(TASKS, METHODS, BUDGETS)}
    for row in rows:
        found[row["task"], row["method"], row["budget"]].append(row)
    return {key: sorted(found[key], key=lambda row: row["seed"]) for key in found if found[key]}


def tuning(tried: Sequence[Row], own: Sequence[Row] = ()) -> list[str]:
    """The whole grid of learning rates: best dev loss of seed 0 at each, the chosen one in bold.

    Args:
        tried: Of the methods, at T = 1.
        own: Of runs of 1,000 steps, which have rates of their own.
    """
    lines = ["| task | method | dev loss by learning rate |", "|---|---|---|"]
    at_t = [(f", T = {BUDGETS[key[2]]}, 1,000 steps", key, rows) for key, rows in cells(own).items()]
    for title, (task, method, _), rows in [*(("", key, rows) for key, rows in cells(tried).items()), *at_t]:
        losses = {row["lr"]: best_dev_loss(row) for row in rows}
        best = min(losses, key=losses.__getitem__)
        shown = [
            f"**{lr:g}: {loss:.3f}**" if lr == best else f"{lr:g}: {loss:.3f}" for lr, loss in sorted(losses.items())
        ]
        lines.append(f"| {TASKS[task]} | {METHODS[method]}{title} | {', '.join(shown)} |")
    return lines


def accuracy(core: Sequence[Row]) -> list[str]:
    """One line a method of each task: what the tested model reaches, with 95 % intervals over seeds."""
    lines = [
        "| task | method | T | lr | accuracy, % | at the best threshold, % | AUC | loss | worst class, % "
        "| best step of each seed | diverged | minutes a run |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for task in dict.fromkeys(row["task"] for row in core):
        base = next(row["before"] for row in core if row["task"] == task)
        lines.append(f"| {TASKS[task]} | before training | | | {' | '.join(_reached([base]))} | | | |")
        for (_, method, budget), rows in ((key, rows) for key, rows in cells(core).items() if key[0] == task):
            rates = "/".join(dict.fromkeys(f"{row['lr']:g}" for row in rows))
            steps = "/".join(str(row["best_round"] * BUDGETS[budget]) for row in rows)
            minutes = statistics.median(row["seconds"] for row in rows) / 60
            shown = " | ".join(_reached([row["after"] for row in rows]))
            head = f"| {TASKS[task]} | {METHODS[method]} | {BUDGETS[budget]} | {rates} | {shown} "
            lines.append(f"{head}| {steps} | {sum(map(diverged, rows)) or ''} | {minutes:.1f} |")
    return lines


def _reached(scores: Sequence[Row]) -> list[str]:
    """Accuracy, that at the best threshold, AUC, loss, and the accuracy on the class that is met worst."""
    shown = []
    for name, scale, digits in (("value", 100, 1), ("best_threshold_accuracy", 100, 1), ("auc", 1, 3), ("loss", 1, 3)):
        values = [score[name] for score in scores]
        shown.append("" if None in values else _with_half([scale * value for value in values], digits))
    worst = [min(right / total for right, total in score["per_class"].values()) for score in scores]
    return [*shown, _with_half([100 * share for share in worst], 0)]


def _with_half(values: Sequence[float], digits: int) -> str:
    mean, half = interval(values)
    return f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" +- {half:.{digits}f}")


def others(pieces: dict[str, list[Row]]) -> list[str]:
    """One line a variation of the pieces beyond the core, beside the core's runs of the same seeds."""
    lines = [
        "| task | method | T | changed | lr | accuracy, mean +- 95 % | seeds | beside core | worst client | stopped |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (task, method, budget, changed), rows, paired in variations(pieces):
        head = f"| {TASKS[task]} | {METHODS[method]} | {BUDGETS[budget]} | {changed} | {rows[0]['lr']:g} "
        stopped = ", ".join("all: T/2" if row["fallback"] else str(len(row["flagged"])) for row in rows)
        stopped = stopped if any(key.startswith("step_policy") for key in rows[0]["changed"]) else ""
        lines.append(f"{head}| {_mean(rows)} | {len(rows)} | {_points(paired)} | {_worst(rows)} | {stopped} |")
    return lines


def variations(pieces: dict[str, list[Row]]) -> Iterator[tuple[tuple[str, str, str, str], list[Row], list[float]]]:
    """What was run beyond the core, at its best rate, and its gains in accuracy over the core's of the same seeds."""
    results, groups = Results(pieces), {}
    for piece in [piece for piece in PIECES if piece != "core"]:
        for row in pieces[piece]:
            groups.setdefault((piece, row["task"], row["method"], row["budget"], _changed(piece, row)), []).append(row)
    for (_, task, method, budget, changed), tried in groups.items():
        rows = best_rate(tried)
        core = results.rows("core", task, method, budget)
        yield (task, method, budget, changed), rows, gains(tested(rows, ACCURACY), tested(core, ACCURACY))


def _judged(results: Results, tasks: Sequence[str]) -> dict[tuple[str, Measure], list[Verdict]]:
    """Verdicts by task and measure."""
    return {
        (task, measure): judge(results, task, measure)
        for task in tasks
        for measure in measures_of(results.grid(task, budget="T1"))
    }


def verdicts(results: Results, tasks: Sequence[str]) -> list[str]:
    """One line a claim, two columns a task."""
    columns = _judged(results, tasks)
    heads = [f"{TASKS[task]}, {measure.name}" for task, measure in columns]
    lines = [f"| claim | {' | '.join(heads)} |", "|---|" + "---|" * len(columns)]
    told = [{verdict.claim: verdict for verdict in column} for column in columns.values()]
    for claim in dict.fromkeys(claim for column in told for claim in column):
        lines.append(_row([claim, *(_seen(column.get(claim)) for column in told)]))
    return lines


def _seen(verdict: Verdict | None) -> str:
    if verdict is None:
        return ""
    return f"**{verdict.verdict}**" + (f" ({verdict.seen})" if verdict.seen else "")


def holm(results: Results, tasks: Sequence[str]) -> list[str]:
    """What is left when all lines of the table are corrected for their number: its columns judge the same claims."""
    told = [
        verdict._replace(claim=f"{TASKS[task]}, {measure.name}: {verdict.claim}")
        for (task, measure), column in _judged(results, tasks).items()
        for verdict in column
    ]
    number = sum(verdict.p is not None for verdict in told)
    left = "; ".join(f"{each.claim} ({each.verdict})" for each in after_holm(told)) or "none"
    return ["| lines with a p | left after Holm's correction at 5 % |", "|---|---|", _row([str(number), left])]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def claims(pieces: dict[str, list[Row]]) -> Claims:
    """The accuracies, with the commits that the runs were made with."""
    core = pieces["core"]
    for rows in (*cells(core).values(), *(rows for _, rows, _ in variations(pieces))):
        check_alike({"environment": row} for row in rows)
    commits = sorted({row["git_commit"] for rows in pieces.values() for row in rows})
    made = Claims(command=COMMAND, seeds=list(SEEDS), environment={"git_commits": commits, "threads": 1})
    for (task, method, budget), rows in cells(core).items():
        if len(rows) == len(SEEDS):
            value, half = interval([row["after"]["value"] for row in rows])
            what = f"{TASKS[task]}, {METHODS[method]}, T = {BUDGETS[budget]}: test accuracy"
            made.add(f"{what} (mean of {len(rows)} seeds)", value, "share")
            made.add(f"{what}, half width of its 95 % interval", half, "share")
    for (task, method, budget, changed), rows, paired in variations(pieces):
        if len(paired) == len(SEEDS):
            value, half = interval(paired)
            what = f"{TASKS[task]}, {METHODS[method]}, T = {BUDGETS[budget]}, {changed}: test accuracy"
            made.add(
                f"{what} (mean of {len(rows)} seeds)", statistics.fmean(r["after"]["value"] for r in rows), "share"
            )
            made.add(f"{what} less that of the core's", 100 * value, "points")
            made.add(f"{what} less that of the core's, half width of its 95 % interval", 100 * half, "points")
    for task in dict.fromkeys(row["task"] for row in core):
        full, ours = ([row for row in core if (row["task"], row["method"]) == (task, m)] for m in ("full", "meerkat"))
        if full and ours:
            ratio = full[0]["space_size"] / ours[0]["space_size"]
            made.add(f"{TASKS[task]}: trained values, Full-FedZO / Meerkat", ratio, "x")
            more = _bytes(ours) / _bytes(full)
            made.add(f"{TASKS[task]}: bytes of a client in a run, Meerkat / Full-FedZO", more, "x")
    return made


def _bytes(rows: Sequence[Row]) -> float:
    """Payload of one client, both ways, and its set-up."""
    row = rows[0]
    return (row["payload_up_bytes"] + row["payload_down_bytes"]) / row["num_clients"] + row["setup_down_bytes"]


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
    changed = {key: Path(value).stem if key == "inputs.artifact" else value for key, value in changed.items()}
    shown = [f"{SHOWN_KEYS.get(key, key)}={value}" for key, value in sorted(changed.items())]
    title = "1,000 steps, a rate of its own" if piece in OWN_RATES else "1,000 steps" if piece == "long" else ""
    return ", ".join(filter(None, [title, *shown]))
