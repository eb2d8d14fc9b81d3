"""What the cells say: printed as far as they are there, claimed only where a comparison has all of its cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from analysis import crossed_effect, relative_gain
from arms import TrainSet
from cells import METHODS, SEEDS, Cell, Cells, gradient_name, num_batches, run_name, tuned, tuning_name

from fedzo.bench.claims import Claims

COMMAND = "python experiments/oat_rephrase/effect.py --data DATA --rewrites REWRITES"


def report(cells: Cells, sets: Mapping[str, Sequence[TrainSet]], path: Path) -> None:
    """Print every comparison, and write the claims of those that are whole."""
    known, claims = cells.all(), Claims(command=COMMAND, seeds=list(SEEDS["copa"]))
    for task, of_task in sets.items():
        arms = list(dict.fromkeys(each.arm for each in of_task))
        for arm in arms[1:]:
            of_arm = [each for each in of_task if each.arm == arm]
            _gradients(known, claims, task, of_task[0], of_arm)
            for method in METHODS:
                _training(known, claims, task, method, of_task[0], of_arm)
        for method in METHODS:
            _learned(known, claims, task, method, of_task[0])
    claims.show()
    if claims.rows:
        claims.write(path)


def _gradients(
    known: Mapping[str, Cell], claims: Claims, task: str, original: TrainSet, of_arm: Sequence[TrainSet]
) -> None:
    names = [[gradient_name(task, each, at) for at in range(num_batches(each))] for each in (original, *of_arm)]
    what = (
        f"SmolLM2-135M, {task}, base weights: gain of a zeroth-order step on {of_arm[0].arm} over that on the original"
    )
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


def _training(
    known: Mapping[str, Cell],
    claims: Claims,
    task: str,
    method: str,
    original: TrainSet,
    of_arm: Sequence[TrainSet],
) -> None:
    what = f"SmolLM2-135M, {task}, {method}: loss on test rows after training on {of_arm[0].arm} less on the original"
    pairs = [
        (run_name(task, method, of_arm[seed % len(of_arm)], seed), run_name(task, method, original, seed))
        for seed in SEEDS[task]
    ]
    rates = [tuning_name(task, method, each, lr) for each in (of_arm[0], original) for lr in METHODS[method]]
    if not _whole(known, [*(name for pair in pairs for name in pair), *rates], what):
        return
    losses = np.array([[known[name]["test"] for name in pair] for pair in pairs])
    _effect(claims, what, losses[:, 0] - losses[:, 1])
    _facts(known, claims, task, method, of_arm[0], [name for name, _ in pairs])


def _learned(known: Mapping[str, Cell], claims: Claims, task: str, method: str, original: TrainSet) -> None:
    what = f"SmolLM2-135M, {task}, {method}: loss on test rows after training on the original less untrained"
    names = [run_name(task, method, original, seed) for seed in SEEDS[task]]
    rates = [tuning_name(task, method, original, lr) for lr in METHODS[method]]
    if _whole(known, [*names, *rates, f"untrained/{task}"], what):
        base = np.array(known[f"untrained/{task}"]["test"])
        _effect(claims, what, np.array([known[name]["test"] for name in names]) - base)
        _facts(known, claims, task, method, original, names)


def _facts(
    known: Mapping[str, Cell], claims: Claims, task: str, method: str, of_arm: TrainSet, names: Sequence[str]
) -> None:
    """The learning rate that an arm was given, and its accuracy, of which nothing is concluded."""
    what = f"SmolLM2-135M, {task}, {method}, {of_arm.arm}"
    claims.add(f"{what}: learning rate by dev loss", tuned(known, task, method, of_arm), "")
    rows = len(known[names[0]]["test"])
    right = float(np.mean([known[name]["right"] for name in names])) / rows
    claims.add(f"{what}: accuracy on {rows} test rows", right, "")


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
