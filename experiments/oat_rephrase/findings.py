"""What the cells say: printed as far as they are there, claimed only where a comparison has all of its cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from analysis import crossed_effect, relative_gain
from arms import TrainSet, changed
from cells import METHODS, SEEDS, Cell, Cells, gradient_name, num_batches, run_name, tuned, tuning_name

from fedzo.bench.claims import Claims

PLAIN = {"oat": "prompt2", "model-oat": "model-plain"}
"""The arm without the optimiser's wishes, which says whether they do anything."""
COMMAND = "python experiments/oat_rephrase/effect.py --data DATA --rewrites REWRITES"


def report(cells: Cells, sets: Mapping[str, Sequence[TrainSet]], path: Path) -> None:
    """Print every comparison, and write the claims of those that are whole."""
    known, claims = cells.all(), Claims(command=COMMAND)
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
    names = [*_runs(task, method, of_arm), *_runs(task, method, [other])]
    if _whole(known, [*names, *_tries(task, method, of_arm[0]), *_tries(task, method, other)], what):
        losses = np.array([known[name]["test"] for name in names])
        _effect(claims, what, losses[: len(names) // 2] - losses[len(names) // 2 :])


def _learned(known: Mapping[str, Cell], claims: Claims, task: str, method: str, original: TrainSet) -> None:
    what = f"SmolLM2-135M, {task}, {method}: loss on test rows after training on the original less untrained"
    names = _runs(task, method, [original])
    if _whole(known, [*names, *_tries(task, method, original), f"untrained/{task}"], what):
        base = np.array(known[f"untrained/{task}"]["test"])
        _effect(claims, what, np.array([known[name]["test"] for name in names]) - base)


def _facts(known: Mapping[str, Cell], claims: Claims, task: str, method: str, of_arm: Sequence[TrainSet]) -> None:
    """The learning rate that an arm was given, and its accuracy, of which nothing is concluded."""
    what, names = f"SmolLM2-135M, {task}, {method}, {of_arm[0].arm}", _runs(task, method, of_arm)
    if _whole(known, [*names, *_tries(task, method, of_arm[0])], what):
        claims.add(f"{what}: learning rate by dev loss", tuned(known, task, method, of_arm[0]), "")
        rows = len(known[names[0]]["test"])
        right = float(np.mean([known[name]["right"] for name in names])) / rows
        claims.add(f"{what}: accuracy on {rows} test rows", right, "")


def _runs(task: str, method: str, of_arm: Sequence[TrainSet]) -> list[str]:
    return [run_name(task, method, of_arm[seed % len(of_arm)], seed) for seed in SEEDS[task]]


def _tries(task: str, method: str, each: TrainSet) -> list[str]:
    return [tuning_name(task, method, each, lr) for lr in METHODS[method]]


def _effect(claims: Claims, what: str, differences: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> None:
    effect = crossed_effect(differences)
    claims.add(what, effect.mean, "nats")
    claims.add(f"{what}, lower end of its 95 % interval", effect.low, "nats")
    claims.add(f"{what}, upper end", effect.high, "nats")
    claims.add(f"{what}, smallest effect that four such studies in five would find", effect.smallest, "nats")


def _whole(known: Mapping[str, Cell], names: Sequence[str], what: str) -> bool:
    there = len({*names} & known.keys())
    if there < len({*names}):
        print(f"{what}: {there} of {len({*names})} cells", flush=True)
    return there == len({*names})
