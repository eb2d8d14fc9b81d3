"""What the cells say: printed as far as they are there, claimed only where a comparison has all of its cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from analysis import crossed_effect, relative_gain
from arms import TrainSet, changed
from cells import METHODS, SEEDS, Cell, Cells, gradient_name, num_batches, run_name, tuned, tuning_name

from fedzo.bench.claims import Claims, measured_in

PLAIN = {"oat": "prompt2", "model-oat": "model-plain"}
"""The arm without the optimiser's wishes, which says whether they do anything."""
COMMAND = "python experiments/oat_rephrase/effect.py --data DATA --rewrites REWRITES"


def report(cells: Cells, sets: Mapping[str, Sequence[TrainSet]], path: Path) -> None:
    """Print every comparison, and write the claims of those that are whole."""
    known = cells.all()
    claims = Claims(command=COMMAND, environment=measured_in(known.values()))
    for task, of_task in sets.items():
        claims.seeds = list(SEEDS[task])
        arms = {each.arm: [other for other in of_task if other.arm == each.arm] for each in of_task}
        pairs = [("original", arm) for arm in arms if arm != "original"]
        pairs += [(plain, arm) for arm, plain in PLAIN.items() if {arm, plain} <= arms.keys()]
        for base, arm in pairs:
            _gradients(known, claims, task, arms[base][0], arms[arm])
        for method in METHODS:
            _learned(known, claims, task, method, arms["original"][0])
            for arm in arms:
                _facts(known, claims, task, method, arms[arm])
            for base, arm in pairs:
                _training(known, claims, task, method, arms[base][0], arms[arm])
    claims.show()
    if claims.rows:
        claims.write(path)


def _gradients(
    known: Mapping[str, Cell], claims: Claims, task: str, other: TrainSet, of_arm: Sequence[TrainSet]
) -> None:
    names = [[gradient_name(task, each, at) for at in range(num_batches(each))] for each in (other, *of_arm)]
    what = f"SmolLM2-135M, {task}, base weights: gain of a zeroth-order step on {of_arm[0].arm} over {other.arm}"
    if not _whole(known, [name for of_set in names for name in of_set], what):
        return
    base, *others = (
        (np.array([known[name]["along"] for name in of_set]), np.array([known[name]["squared"] for name in of_set]))
        for of_set in names
    )
    value, low, high = relative_gain(others, base)
    claims.add(what, value, "")
    claims.add(f"{what}, lower end of its 95 % interval", low, "")
    claims.add(f"{what}, upper end", high, "")
    if other.arm == "original":
        counts = [changed(other.rows, each.rows) for each in of_arm]
        rows, sets = len(other.rows), f", mean over {len(counts)} sets" if len(counts) > 1 else ""
        claims.add(f"{task}, {of_arm[0].arm}: rows of {rows} with other text{sets}", float(np.mean(counts)), "rows")


def _training(
    known: Mapping[str, Cell], claims: Claims, task: str, method: str, other: TrainSet, of_arm: Sequence[TrainSet]
) -> None:
    what = f"SmolLM2-135M, {task}, {method}: loss on test rows after training on {of_arm[0].arm} less on {other.arm}"
    ours, theirs = (_runs(known, task, method, sets, what) for sets in (of_arm, [other]))
    if ours and theirs and _whole(known, [f"untrained/{task}"], what):
        losses = [np.array([known[name]["test"] for name in names]) for names in (ours, theirs)]
        _effect(claims, what, losses[0] - losses[1], _doubts(known, task, method, [of_arm[0], other]))


def _learned(known: Mapping[str, Cell], claims: Claims, task: str, method: str, original: TrainSet) -> None:
    what = f"SmolLM2-135M, {task}, {method}: loss on test rows after training on the original less untrained"
    names = _runs(known, task, method, [original], what)
    if names and _whole(known, [f"untrained/{task}"], what):
        differences = np.array([known[name]["test"] for name in names]) - np.array(known[f"untrained/{task}"]["test"])
        _effect(claims, what, differences, _doubts(known, task, method, [original]))


def _facts(known: Mapping[str, Cell], claims: Claims, task: str, method: str, of_arm: Sequence[TrainSet]) -> None:
    """The learning rate that an arm was given, and its accuracy, of which nothing is concluded."""
    what = f"SmolLM2-135M, {task}, {method}, {of_arm[0].arm}"
    if names := _runs(known, task, method, of_arm, what):
        claims.add(f"{what}: learning rate by dev loss", tuned(known, task, method, of_arm[0]), "")
        rows = len(known[names[0]]["test"])
        right = float(np.mean([known[name]["right"] for name in names])) / rows
        claims.add(f"{what}: accuracy on {rows} test rows", right, "")


def _runs(known: Mapping[str, Cell], task: str, method: str, of_arm: Sequence[TrainSet], what: str) -> list[str]:
    """Cells of an arm's runs at its rate; none where one of them, or of those that choose the rate, is missing."""
    if not _whole(known, [tuning_name(task, method, of_arm[0], lr) for lr in METHODS[method]], what):
        return []
    lr = tuned(known, task, method, of_arm[0])
    names = [run_name(task, method, of_arm[seed % len(of_arm)], lr, seed) for seed in SEEDS[task]]
    return names if _whole(known, names, what) else []


def _doubts(known: Mapping[str, Cell], task: str, method: str, tuned_on: Sequence[TrainSet]) -> list[str]:
    """Why nothing follows from runs at the rates that were tuned on these sets, one of each arm.

    Beyond the edge of the grid there may be a better rate. Where dev rows gain nothing, runs may agree because none of
    them has learnt.
    """
    untrained = float(np.mean(known[f"untrained/{task}"]["dev"]))
    at_edge, no_gain = [], []
    for each in tuned_on:
        lr = tuned(known, task, method, each)
        if lr in (min(METHODS[method]), max(METHODS[method])):
            at_edge.append(each.arm)
        if float(np.mean(known[tuning_name(task, method, each, lr)]["dev"])) >= untrained:
            no_gain.append(each.arm)
    doubts = [f"best rate of {' and '.join(at_edge)} at the edge of the grid"] if at_edge else []
    return [*doubts, f"dev loss of {' and '.join(no_gain)} not below untrained"] if no_gain else doubts


def _effect(
    claims: Claims, what: str, differences: np.ndarray[tuple[int, ...], np.dtype[np.float64]], doubts: Sequence[str]
) -> None:
    """An effect as it was measured; what there is against it is a part of the claim."""
    effect = crossed_effect(differences)
    what = "; ".join([what, *doubts])
    claims.add(what, effect.mean, "nats")
    claims.add(f"{what}, lower end of its 95 % interval", effect.low, "nats")
    claims.add(f"{what}, upper end", effect.high, "nats")
    if not doubts:  # runs that have learnt nothing agree closely, which is no power to see an effect
        claims.add(f"{what}, smallest effect that four such studies in five would find", effect.smallest, "nats")


def _whole(known: Mapping[str, Cell], names: Sequence[str], what: str) -> bool:
    there = len({*names} & known.keys())
    if there < len({*names}):
        print(f"{what}: {there} of {len({*names})} cells", flush=True)
    return there == len({*names})
