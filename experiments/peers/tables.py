"""Claims and a figure of the comparison, from what has been run."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean, median
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from methods import METHODS

from fedzo.bench.claims import Claims

HERE = Path(__file__).parent
COMMAND = "python experiments/peers/run.py"
TITLES = {"rotten_tomatoes": "Rotten Tomatoes", "sst2": "SST-2"}
FORWARDS = 10_000
"""Of single rows, after which methods are compared."""
ACCURACIES = (0.70, 0.75, 0.80)
Entry = dict[str, Any]


def write(results: dict[str, Entry]) -> None:
    """Write claims.json and peers.png, if there are runs."""
    runs = [entry for key, entry in results.items() if key.startswith("run ")]
    if not runs:
        return
    claims = Claims(command=COMMAND, seeds=sorted({entry["seed"] for entry in runs}), environment=environment_of(runs))
    for task, title in TITLES.items():
        mine = [entry for entry in runs if entry["task"] == task]
        if mine:
            base = mine[0]["before"]
            claims.add(f"{title}, the threshold alone: test accuracy", base["best_threshold_accuracy"], "share")
            claims.add(f"{title}, the threshold alone: test AUC", base["auc"], "area")
        for name, method in METHODS.items():
            if of_method := [entry for entry in mine if entry["method"] == name]:
                add(claims, f"{title}, {method.title}", of_method)
    claims.write(HERE / "claims.json")
    draw(runs)
    print("`python docs/tables.py` puts them into the pages")


def environment_of(runs: list[Entry]) -> Entry:
    return {key: value for key, value in runs[-1]["environment"].items() if key != "command"}


def add(claims: Claims, case: str, runs: list[Entry]) -> None:
    """The figures of one method on one task, over the seeds that were run."""
    claims.add(f"{case}: seeds", len(runs), "")
    claims.add(f"{case}: test accuracy", fmean(run["after"]["value"] for run in runs), "share")
    claims.add(f"{case}: test AUC", fmean(run["after"]["auc"] for run in runs), "area")
    equal = [last(run, "forwards", FORWARDS) for run in runs]
    claims.add(f"{case}: dev accuracy after {FORWARDS:,} forwards", fmean(score["value"] for score in equal), "share")
    for accuracy in ACCURACIES:
        reached = [first(run, accuracy) for run in runs]
        if all(reached):
            claims.add(f"{case}: s to {accuracy:.2f}", median(score["seconds"] for score in reached if score), "")
            claims.add(
                f"{case}: bytes to {accuracy:.2f}", median(score["bytes"] for score in reached if score), "bytes"
            )
    claims.add(f"{case}: memory", runs[0]["peak_bytes"] / 2**20, "MiB")


def last(run: Entry, key: str, most: float) -> Entry:
    """The last dev score within so much of something."""
    return [score for score in run["dev"] if score[key] <= most][-1]


def first(run: Entry, accuracy: float) -> Entry | None:
    """The first dev score with at least this accuracy."""
    return next((score for score in run["dev"] if score["value"] >= accuracy), None)


def draw(runs: list[Entry]) -> None:
    """Dev accuracy of seed 0 against training seconds, and against one client's bytes: a row of panels a task."""
    tasks = [task for task in TITLES if any(run["task"] == task and run["seed"] == 0 for run in runs)]
    if not tasks:
        return
    figure = Figure(figsize=(9, 3.4 * len(tasks)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(tasks), 2, squeeze=False, sharey="row")
    for row, task in zip(panels, tasks, strict=True):
        for axes, (key, label) in zip(
            row, (("seconds", "seconds of training"), ("bytes", "bytes of a client")), strict=True
        ):
            for number, (name, method) in enumerate(METHODS.items()):
                for run in runs:
                    if (run["task"], run["method"], run["seed"]) == (task, name, 0):
                        points = [(score[key], score["value"]) for score in run["dev"] if score["round"]]
                        axes.plot(*zip(*points, strict=True), color=f"C{number}", linewidth=1.3, label=method.title)
            axes.set_xlabel(label)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        row[1].set_xscale("log")
        row[0].set_ylabel(f"{TITLES[task]}: dev accuracy")
    panels[0][1].legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(HERE / "peers.png", dpi=130)
