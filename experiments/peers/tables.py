"""Claims and a figure of the comparison, from what has been run."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from methods import METHODS, Method

from fedzo.bench.claims import Claims, measured_in, with_range

HERE = Path(__file__).parent
COMMAND = "python experiments/peers/run.py"
TITLES = {"rotten_tomatoes": "Rotten Tomatoes", "sst2": "SST-2"}
REFERENCE = "meerkat"
"""Whose runs of the same seeds the others' are compared with."""
ACCURACIES = (0.70, 0.75, 0.80)
Entry = dict[str, Any]


def write(results: dict[str, Entry]) -> None:
    """Write claims.json and peers.png, if there are runs."""
    alike = [chosen(results, task, method) for task in TITLES for method in METHODS]
    runs = [run for each in alike for run in each]
    if not runs:
        return
    claims = Claims(command=COMMAND, seeds=sorted({entry["seed"] for entry in runs}), environment=measured_in(*alike))
    for task, title in TITLES.items():
        mine = [entry for entry in runs if entry["task"] == task]
        if mine:
            base, most = results[f"base {task}"], equal_forwards(mine)
            claims.add(f"{title}, the base model: test accuracy", 100 * base["value"], "%")
            claims.add(f"{title}, the threshold alone: test accuracy", 100 * base["best_threshold_accuracy"], "%")
            claims.add(f"{title}, the threshold alone: test AUC", base["auc"], "")
        for name, method in METHODS.items():
            if of_method := [entry for entry in mine if entry["method"] == name]:
                add(claims, f"{title}, {method.title}", method, of_method, most)
                compare(claims, f"{title}, {method.title}", of_method, mine)
    claims.write(HERE / "claims.json")
    draw(runs)
    print("`python docs/tables.py` puts them into the pages")


def ladder(results: dict[str, Entry], task: str, method: str) -> dict[float, float]:
    """The lowest dev loss of seed 0 at each learning rate that was tried; infinite where the run diverged."""
    tried = [entry for key, entry in results.items() if key.startswith(f"run {task} {method} ") and not entry["seed"]]
    losses = {entry["lr"]: [score["loss"] for score in entry["dev"] if score["round"]] for entry in tried}
    return {lr: min((loss for loss in each if loss is not None), default=float("inf")) for lr, each in losses.items()}


def chosen(results: dict[str, Entry], task: str, method: str) -> list[Entry]:
    """The runs at the best learning rate, once it lies inside the ladder, that have a test score."""
    losses = ladder(results, task, method)
    best = min(losses, key=losses.__getitem__, default=0.0)
    if not min(losses, default=0) < best < max(losses, default=0):
        return []
    at_best = [entry for key, entry in results.items() if key.startswith(f"run {task} {method} {best:g} ")]
    return [entry for entry in at_best if "test" in entry]


def equal_forwards(runs: list[Entry]) -> float:
    """What every method has taken at the end of its runs, where a step does take forwards."""
    ends = {run["method"]: run["dev"][-1]["forwards"] for run in runs}
    return min(end for name, end in ends.items() if METHODS[name].run_once < 1 or len(ends) == 1)


def add(claims: Claims, case: str, method: Method, runs: list[Entry], most: float) -> None:
    """The figures of one method on one task, over the seeds that were run; ``most``: forwards that are equal."""
    claims.add(f"{case}: seeds", len(runs), "")
    claims.add(f"{case}: learning rate", runs[0]["lr"], "")
    claims.add_mean(f"{case}: test accuracy", [100 * run["test"]["value"] for run in runs], "%")
    at_best = [100 * run["test"]["best_threshold_accuracy"] for run in runs]
    claims.add_mean(f"{case}: test accuracy at the best threshold", at_best, "%")
    claims.add_mean(f"{case}: test AUC", [run["test"]["auc"] for run in runs], "")
    equal = [last(run, "forwards", most) for run in runs]
    claims.add_mean(f"{case}: dev accuracy, equal forwards", [100 * score["value"] for score in equal], "%")
    claims.add_mean(f"{case}: dev AUC, equal forwards", [score["auc"] for score in equal], "")
    add_median(claims, f"{case}: forwards of these", [score["forwards"] for score in equal], "")
    for accuracy in ACCURACIES:
        reached = [score for run in runs if (score := first(run, accuracy))]
        if len(reached) == len(runs):
            add_median(claims, f"{case}: s to {accuracy:.2f}", [score["seconds"] for score in reached], "")
            if method.is_federated:
                add_median(claims, f"{case}: bytes to {accuracy:.2f}", [score["bytes"] for score in reached], "bytes")
    add_median(claims, f"{case}: training time", [run["train_s"] for run in runs], "s")
    claims.add(f"{case}: memory", runs[0]["peak_bytes"] / 2**20, "MiB")


def add_median(claims: Claims, claim: str, values: list[float], unit: str) -> None:
    """Add the median over seeds; its unit tells the least and the most of them."""
    claims.add(claim, median(values), with_range(unit, values))


def compare(claims: Claims, case: str, runs: list[Entry], all_runs: list[Entry]) -> None:
    """What a method reaches beyond the reference, seed by seed."""
    others = {run["seed"]: run["test"] for run in all_runs if run["method"] == REFERENCE}
    pairs = [(run["test"], others[run["seed"]]) for run in runs if run["seed"] in others]
    if len(pairs) > 1 and runs[0]["method"] != REFERENCE:
        title = METHODS[REFERENCE].title
        gains = [100 * (mine["value"] - theirs["value"]) for mine, theirs in pairs]
        claims.add_mean(f"{case}: test accuracy less that of {title}", gains, "points")
        areas = [mine["auc"] - theirs["auc"] for mine, theirs in pairs]
        claims.add_mean(f"{case}: test AUC less that of {title}", areas, "")


def last(run: Entry, key: str, most: float) -> Entry:
    """The last dev score within so much of something."""
    return [score for score in run["dev"] if score[key] <= most][-1]


def first(run: Entry, accuracy: float) -> Entry | None:
    """The first dev score with at least this accuracy."""
    return next((score for score in run["dev"] if score["value"] >= accuracy), None)


def draw(runs: list[Entry]) -> None:
    """Dev accuracy of seed 0 against training seconds, and against one client's bytes: a row of panels a task.

    A task with one method compares nothing, and is left out.
    """
    tasks = [task for task in TITLES if len([run for run in runs if (run["task"], run["seed"]) == (task, 0)]) > 1]
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
                    if key == "bytes" and not method.is_federated:
                        continue
                    if (run["task"], run["method"], run["seed"]) == (task, name, 0):
                        points = [(score[key], score["value"]) for score in run["dev"] if score["round"]]
                        style = {"color": f"C{number % 10}", "linestyle": "--" if number >= 10 else "-"}
                        axes.plot(*zip(*points, strict=True), linewidth=1.3, label=method.title, **style)
            axes.set_xlabel(label)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        row[1].set_xscale("log")
        row[0].set_ylabel(f"{TITLES[task]}: dev accuracy")
    handles, titles = panels[0][0].get_legend_handles_labels()  # of the left panel, which has all methods
    panels[0][1].legend(handles, titles, frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(HERE / "peers.png", dpi=130)
