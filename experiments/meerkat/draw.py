"""The figures of the study; each is drawn where it has something to show."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from collect import PANELS, Row
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from pieces import BUDGETS, METHODS, SEEDS, TASKS
from verdicts import Results, best_rate

from fedzo.report.format import bytes_text, interval
from fedzo.report.local_steps import draw_local_steps, local_traces
from fedzo.report.run_data import load_run
from fedzo.report.style import (
    AMBER,
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PAPER,
    PURPLE,
    house_style,
    new_axes,
    percent_axis,
)

HERE = Path(__file__).parent
COLOURS = dict(zip(METHODS, (BLUE, ORANGE, GREEN, PURPLE, AMBER), strict=True))
MARKERS = dict(zip(BUDGETS, "osDv", strict=True))


def main(pieces: Mapping[str, Sequence[Row]]) -> None:
    """Draw every figure that the rows allow."""
    results = Results(pieces)
    tasks = _tasks_of(pieces["core"])
    with house_style():
        if tasks:
            _save(_panels(tasks, results, _accuracy, legend=_methods()), "accuracy")
            ways = [Line2D([], [], color=MUTED, marker=m, linestyle="none") for m in list(MARKERS.values())[:2]]
            kinds = [
                Line2D([], [], color=MUTED, marker="o", markerfacecolor=face, linestyle="none")
                for face in (MUTED, PAPER)
            ]
            names = ("T = 1", "T = 10", "scalars", "values")
            legend = [*_methods(), *zip([*ways, *kinds], names, strict=True)]
            _save(_panels(tasks, results, _bytes, legend=legend), "bytes")
        if any(pieces["step_policy"]):
            scores = [Line2D([], [], color=colour, marker="o", linestyle="none") for colour in (BLUE, ORANGE)]
            legend = list(zip(scores, ("test accuracy", "worst client, own held-out rows"), strict=True))
            _save(_panels(_tasks_of(pieces["step_policy"]), results, _step_policy, legend=legend), "step_policy")
        if any(pieces["masks"]):
            _save(_panels(_tasks_of(pieces["masks"]), results, _masks, legend=[]), "masks")
        for folder in sorted(PANELS.glob("*")):
            run = load_run(folder)
            if picture := draw_local_steps(run, local_traces(run)):
                _save(picture.figure, f"gradip-{folder.name}")


def _tasks_of(rows: Sequence[Row]) -> list[str]:
    return [task for task in TASKS if any(row["task"] == task for row in rows)]


def _panels(
    tasks: Sequence[str],
    results: Results,
    draw: Callable[[Axes, Results, str], None],
    *,
    legend: Sequence[tuple[Line2D, str]],
) -> Figure:
    """One panel a task, side by side, and one legend above."""
    figure, first = new_axes(3.8 * max(len(tasks), 1.5), 3.3)
    first.remove()
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        draw(axes, results, task)
        axes.set_title(TASKS[task])
    if legend:
        handles, names = zip(*legend, strict=True)
        figure.legend(handles, names, loc="outside upper left", ncols=7 if len(tasks) > 1 else 5, fontsize=7)
    return figure


def _methods() -> list[tuple[Line2D, str]]:
    return [
        (Line2D([], [], color=COLOURS[method], marker="o", linestyle="none"), title)
        for method, title in METHODS.items()
    ]


def _accuracy(axes: Axes, results: Results, task: str) -> None:
    """Test accuracy against T: a dot a run, the mean with its 95 % interval over seeds."""
    for place, method in enumerate(METHODS):
        for at, budget in enumerate(BUDGETS):
            rows = results.grid(task, method, budget)
            _with_interval(axes, at + 0.14 * (place - 2), [row["after"]["value"] for row in rows], COLOURS[method])
    _before(axes, results, task, at=0.5)
    budgets = [budget for budget in BUDGETS if results.grid(task, "meerkat", budget)]
    axes.set_xticks(range(len(budgets)), [f"T = {BUDGETS[budget]}" for budget in budgets])
    axes.set_xlim(-0.5, len(budgets) - 0.5)
    axes.set_ylabel("test accuracy")
    percent_axis(axes, "accuracy")


def _bytes(axes: Axes, results: Results, task: str) -> None:
    """Mean test accuracy against what a client sends and receives: filled as scalars, open as float32 values."""
    for method in METHODS:
        for budget in ("T1", "T10"):
            rows = results.grid(task, method, budget)
            if not rows:
                continue
            row = rows[0]
            scalars = (row["payload_up_bytes"] + row["payload_down_bytes"]) / row["num_clients"]
            values = 2 * 4 * row["space_size"] * row["rounds"]
            mean, _ = interval([row["after"]["value"] for row in rows])
            aside = 1.06 ** (list(METHODS).index(method) - 2)  # those of one size would hide each other
            for size, face in ((scalars, COLOURS[method]), (values, PAPER)):
                axes.plot(
                    aside * (size + row["setup_down_bytes"]),
                    mean,
                    MARKERS[budget],
                    color=COLOURS[method],
                    markerfacecolor=face,
                    markersize=5,
                    alpha=0.85,
                )
    _before(axes, results, task, at=0.44)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(10, numticks=20))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _decade(value)))
    axes.set_xlabel("bytes of a client in a run, both ways")
    axes.set_ylabel("test accuracy")
    percent_axis(axes, "accuracy")


def _step_policy(axes: Axes, results: Results, task: str) -> None:
    """VPCS beside no step policy, as many stopped by lot, and the oracle; T = 10."""
    vpcs, oracle = (results.rows("step_policy", task, step_policy=name) for name in ("vpcs", "oracle"))
    ways = {"none": results.grid(task), "by lot": results.by_lot(task), "VPCS": vpcs, "oracle": oracle}
    ways = {name: rows for name, rows in ways.items() if rows}
    for at, rows in enumerate(ways.values()):
        _with_interval(axes, at - 0.12, [row["after"]["value"] for row in rows], BLUE)
        _with_interval(axes, at + 0.12, [row["federated"]["worst_client"] for row in rows if row["federated"]], ORANGE)
    axes.set_xticks(range(len(ways)), list(ways))
    axes.set_xlim(-0.5, len(ways) - 0.5)
    axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))
    axes.set_ylabel("accuracy")
    percent_axis(axes, "accuracy")


def _masks(axes: Axes, results: Results, task: str) -> None:
    """Meerkat at T = 1 by density (windows of C4), and by what 60 windows of the mask's corpus are from."""
    ways = {"1e-4": ("masks", "c4-1e-4"), "1e-3": ("core", ""), "1e-2": ("masks", "c4-1e-2")}
    ways |= {"C4": ("masks", "mask-c4-60"), "WikiText": ("masks", "wikitext2-60"), "task": ("masks", f"{task}-60")}
    for at, (piece, mask) in enumerate(ways.values()):
        changed = {"inputs__artifact": f"{mask}.safetensors"} if mask else {}
        rows = best_rate(results.rows(piece, task, budget="T1", **changed))
        _with_interval(axes, at, [row["after"]["value"] for row in rows], BLUE)
    axes.axvline(2.5, color=MUTED, linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(ways)), list(ways))
    axes.set_xlabel("density (of C4)                         corpus (1e-3)   ")
    axes.set_ylabel("test accuracy")
    percent_axis(axes, "accuracy")


def _with_interval(axes: Axes, x: float, values: Sequence[float], colour: str) -> None:
    axes.plot([x] * len(values), values, "o", color=colour, markersize=4.5, alpha=0.8, markeredgewidth=0)
    if values:
        mean, half = interval([*values])
        error = None if len(values) < len(SEEDS) else half  # one of two seeds would be all there is to see
        axes.errorbar(x, mean, yerr=error, color=colour, marker="_", markersize=10, markeredgewidth=2, elinewidth=0.8)


def _before(axes: Axes, results: Results, task: str, *, at: float) -> None:
    """The base model's accuracy as a line, named at a share of the width that is free."""
    rows = results.grid(task, "meerkat", "T1") or results.grid(task, "full", "T1")
    for name, title, style in (("value", "base", ":"), ("best_threshold_accuracy", "base, best threshold", "-.")):
        for value in [row["before"][name] for row in rows[:1] if row["before"][name] is not None]:
            axes.axhline(value, color=INK, linewidth=0.8, linestyle=style, zorder=0)
            axes.annotate(
                title,
                (at, value),
                xycoords=("axes fraction", "data"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                color=MUTED,
                fontsize=7,
            )


def _decade(value: float) -> str:
    """Every second power of ten has room for its name."""
    return bytes_text(value).replace(".0 ", " ") if round(math.log10(value)) % 2 else ""


def _save(figure: Figure, name: str) -> None:
    figure.savefig(HERE / f"{name}.png", dpi=144, facecolor=PAPER, metadata={"Software": None})
