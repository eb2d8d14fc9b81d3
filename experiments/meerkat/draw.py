"""Figures, claims and verdicts of the study from ``results/*.json``."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path

from collect import Row, best_dev_loss

from fedzo.bench.claims import Claims
from fedzo.report.style import AMBER, BLUE, GREEN, ORANGE, PAPER, PURPLE, SKY, house_style, new_axes, percent_axis

HERE = Path(__file__).parent
COMMAND = "python experiments/meerkat/run.py --data DIR"
TASKS = {"sst2": "SST-2", "ag_news": "AG News"}
METHODS = {
    "meerkat": ("Meerkat", BLUE),
    "full": ("Full-FedZO", ORANGE),
    "lora": ("LoRA-FedZO", GREEN),
    "magnitude": ("Weight magnitude", PURPLE),
    "random": ("Random mask", AMBER),
    "before": ("before training", SKY),
}
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571)  # 97.5 % points of Student's t by degrees of freedom, from 1
OTHERS = ("selection", "masks", "servers", "protocols", "long")
BUDGETS = {"T1": 1, "T10": 10, "T50": 50}


def main() -> None:
    core = results("core")
    claims = Claims(command=COMMAND, seeds=sorted({row["seed"] for row in core}))
    for (task, method, budget), rows in cells(core).items():
        value, half = interval([row["after"]["value"] for row in rows])
        what = f"{TASKS[task]}, {METHODS[method][0]}, T = {BUDGETS[budget]}: test accuracy"
        claims.add(f"{what} (mean of {len(rows)} seeds)", value, "share")
        claims.add(f"{what}, half width of its 95 % interval", half, "share")
    if core:
        claims.write(HERE / "claims.json")
    tables = {
        "accuracy": accuracy(core),
        "tuning": tuning(results("tune")),
        "verdicts": verdicts(core),
        "others": others(),
    }
    (HERE / "tables.json").write_text(json.dumps(tables, indent=1) + "\n")
    if core:
        with house_style():
            draw_accuracy(core)
            draw_bytes(core)


def results(piece: str) -> list[Row]:
    path = HERE / "results" / f"{piece}.json"
    return json.loads(path.read_text()) if path.exists() else []


def cells(rows: Iterable[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """Runs by (task, method, budget), in the order of the tables."""
    found: dict[tuple[str, str, str], list[Row]] = {key: [] for key in product(TASKS, METHODS, BUDGETS)}
    for row in rows:
        found[row["task"], row["method"], row["budget"]].append(row)
    return {key: sorted(found[key], key=lambda row: row["seed"]) for key in found if found[key]}


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval by Student's t over seeds; nan for one seed."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    error = statistics.stdev(values) / math.sqrt(len(values))
    return mean, STUDENT[len(values) - 2] * error


def accuracy(core: list[Row]) -> list[str]:
    """One line a method of each task: mean accuracy, its 95 % interval over seeds, and the worst client's."""
    lines = [
        "| task | method | T | lr | test accuracy, mean +- 95 % | seeds | worst client | minutes a run |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (task, method, budget), rows in cells(core).items():
        mean, half = interval([row["after"]["value"] for row in rows])
        spread = "" if math.isnan(half) else f" +- {100 * half:.1f}"
        worst = statistics.fmean(row["federated"]["worst_client"] for row in rows)
        minutes = statistics.median(row["seconds"] for row in rows) / 60
        head = f"| {TASKS[task]} | {METHODS[method][0]} | {BUDGETS[budget]} | {rows[0]['lr']:g} "
        lines.append(f"{head}| {100 * mean:.1f}{spread} | {len(rows)} | {100 * worst:.0f} | {minutes:.1f} |")
    return lines


def others() -> list[str]:
    """One line a variation of the pieces beyond the core."""
    lines = ["| task | method | T | changed | test accuracy, mean +- 95 % | seeds |", "|---|---|---|---|---|---|"]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in (row for piece in OTHERS for row in results(piece)):
        changed = ", ".join(f"{key}={Path(value).name}" for key, value in sorted(row["changed"].items()))
        groups.setdefault((row["task"], row["method"], row["budget"], changed), []).append(row)
    for (task, method, budget, changed), rows in groups.items():
        mean, half = interval([row["after"]["value"] for row in rows])
        spread = "" if math.isnan(half) else f" +- {100 * half:.1f}"
        head = f"| {TASKS[task]} | {METHODS[method][0]} | {BUDGETS[budget]} | {changed} "
        lines.append(f"{head}| {100 * mean:.1f}{spread} | {len(rows)} |")
    return lines


def tuning(tried: list[Row]) -> list[str]:
    """The whole grid of learning rates: best dev loss of seed 0 at each, the chosen one in bold."""
    lines = ["| task | method | dev loss by learning rate |", "|---|---|---|"]
    for (task, method, _), rows in cells(tried).items():
        losses = {row["lr"]: best_dev_loss(row) for row in rows}
        best = min(losses, key=losses.__getitem__)
        shown = [
            f"**{lr:g}: {loss:.3f}**" if lr == best else f"{lr:g}: {loss:.3f}" for lr, loss in sorted(losses.items())
        ]
        lines.append(f"| {TASKS[task]} | {METHODS[method][0]} | {', '.join(shown)} |")
    return lines


def verdicts(core: list[Row]) -> list[str]:
    """What the paper says of Meerkat against each other method, judged by the differences of paired seeds."""
    found = cells(core)
    lines = ["| the paper: Meerkat is ahead of | task | T | seen, points | verdict |", "|---|---|---|---|---|"]
    for (task, method, budget), rows in found.items():
        ours = {row["seed"]: row["after"]["value"] for row in found.get((task, "meerkat", budget), [])}
        gains = [ours[row["seed"]] - row["after"]["value"] for row in rows if row["seed"] in ours]
        if method == "meerkat" or not gains:
            continue
        mean, half = interval(gains)
        verdict = "cannot judge" if not abs(mean) > half else "confirmed" if mean > 0 else "not confirmed"
        seen = f"{100 * mean:+.1f}" + ("" if math.isnan(half) else f" +- {100 * half:.1f}") + f" ({len(gains)} seeds)"
        lines.append(f"| {METHODS[method][0]} | {TASKS[task]} | {BUDGETS[budget]} | {seen} | {verdict} |")
    return lines


def draw_accuracy(core: list[Row]) -> None:
    """Accuracy of each method against T: one panel a task, a point a run, a bar for the mean."""
    found = cells(core)
    tasks = [task for task in TASKS if any(key[0] == task for key in found)]
    figure, first = new_axes(7.2, 2.9 * len(tasks))
    first.remove()
    for axes, task in zip(figure.subplots(len(tasks), 1, squeeze=False)[:, 0], tasks, strict=True):
        budgets = [budget for budget in BUDGETS if any(key[0] == task and key[2] == budget for key in found)]
        for at, budget in enumerate(budgets):
            for place, method in enumerate(METHODS):
                rows = found.get((task, method, budget), [])
                x, colour = at + (place - 2) * 0.15, METHODS[method][1]
                values = [row["after"]["value"] for row in rows]
                axes.plot([x] * len(values), values, "o", color=colour, markersize=4)
                if values:
                    axes.hlines(statistics.fmean(values), x - 0.06, x + 0.06, color=colour, linewidth=2.5)
        before = next(row["before"]["value"] for row in core if row["task"] == task)
        axes.axhline(before, color=METHODS["before"][1], linewidth=1, linestyle=":")
        axes.set_xticks(range(len(budgets)), [f"T = {BUDGETS[budget]}" for budget in budgets])
        percent_axis(axes, "accuracy")
        axes.set_title(f"{TASKS[task]}: test accuracy after 200 steps of joint batch 16 (dotted: before)")
        handles = [axes.plot([], [], "o", color=colour)[0] for _, colour in list(METHODS.values())[:-1]]
        axes.legend(handles, [name for name, _ in list(METHODS.values())[:-1]], ncols=5, fontsize=7)
    save(figure, "accuracy")


def draw_bytes(core: list[Row]) -> None:
    """Accuracy against what a client sends and receives in the run: as scalars, and as values each round."""
    figure, axes = new_axes()
    ways: list[tuple[str, str, Callable[[Row], float]]] = [
        ("scalars and set-up", "o", lambda row: _scalars(row) + row["setup_down_bytes"]),
        ("values each round", "s", lambda row: 8 * row["space_size"] * row["rounds"] + row["setup_down_bytes"]),
    ]
    for (task, method, _), rows in cells(core).items():
        for _, marker, size in ways:
            value = statistics.fmean(row["after"]["value"] for row in rows)
            face = METHODS[method][1] if task == "sst2" else "none"
            axes.plot(size(rows[0]), value, marker, color=METHODS[method][1], markerfacecolor=face, markersize=6)
    axes.set_xscale("log")
    axes.set_xlabel("bytes of a client in the whole run, both ways (circles: scalars; squares: values; open: AG News)")
    percent_axis(axes, "accuracy")
    axes.set_title("Test accuracy against payload")
    handles = [axes.plot([], [], "o", color=colour)[0] for _, colour in list(METHODS.values())[:-1]]
    axes.legend(handles, [name for name, _ in list(METHODS.values())[:-1]], fontsize=7)
    save(figure, "bytes")


def _scalars(row: Row) -> float:
    return (row["payload_up_bytes"] + row["payload_down_bytes"]) / row["num_clients"]


def save(figure: object, name: str) -> None:
    figure.savefig(HERE / f"{name}.png", dpi=144, facecolor=PAPER, metadata={"Software": None})  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
