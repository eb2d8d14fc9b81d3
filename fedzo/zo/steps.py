"""Steps along directions: of a client within a round, and of a round of the log."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fedzo.zo.keys import step_key
from fedzo.zo.log import ScalarRecord, Scalars
from fedzo.zo.spaces.base import MasterSpace, Space, Values


def take_steps(space: Space, steps: Sequence[tuple[float, int]]) -> None:
    """``space.step`` for each (s, key), one after another; what they lead to enters the model once, where it can."""
    if isinstance(space, MasterSpace) and type(space).step is MasterSpace.step:  # else its steps are others
        space.steps(steps)
        return
    for s, key in steps:
        space.step(s, key)


def apply_steps(space: Space, scalars: Iterable[tuple[np.float32, int]], *, lr: float) -> None:
    """theta <- theta - (lr * c) * z(key) for each (c, key), one after another: plain SGD's one update.

    lr * c is rounded to float32 once. A zero (a dropped probe, lr = 0) moves nothing and is skipped, so that even a
    negative zero keeps its bits.
    """
    scaled = ((np.float32(lr) * np.float32(c), key) for c, key in scalars)
    take_steps(space, [(float(s), key) for s, key in scaled if s != 0])


@dataclass(frozen=True, slots=True)
class Drift:
    """What a server optimizer adds to the estimate of each local step of a client: ``along + pull * (theta - start)``.

    Attributes:
        along: float32 [n], the same in all steps of a round.
        start: theta at the round's start, float32 [n]; needed for the pull alone.
        pull: Strength of the pull back to the start.
    """

    along: Values
    start: Values | None = None
    pull: float = 0.0


def probe_shares(g: Scalars) -> Scalars:
    """g / P of a step's probes, float32 [P]: the quotient is taken in float64 and rounded to float32 once."""
    return (g.astype(np.float64) / len(g)).astype(np.float32)


def local_step(space: Space, *, lr: float, c: Scalars, keys: Sequence[int], drift: Drift | None = None) -> None:
    """One step of a client within a round, for the client itself and for whoever walks its path again.

    theta <- theta - lr * (along + pull * (theta - start)), where there is a drift, then plain SGD along each probe's
    direction; every operation is rounded to float32 once. The scalars were measured at theta too, so this is one step
    of gradient descent on the corrected loss. Without any scalar nothing was measured, and nothing moves.

    Args:
        space: At the model before the step.
        lr: Learning rate of the round, a float32 value.
        c: g / P of each probe, float32 [P].
        keys: Keys of the probes' directions.
        drift: The server optimizer's correction, if it has one.
    """
    if drift is not None and np.any(c):
        theta, along = space.values(), drift.along
        with np.errstate(all="ignore"):
            if drift.start is not None:
                along = along + np.float32(drift.pull) * (theta - drift.start)
            space.load(theta - np.float32(lr) * along)
    apply_steps(space, zip(c, keys, strict=True), lr=lr)


def scalars_and_keys(record: ScalarRecord, *, run_seed: int) -> Iterator[tuple[np.float32, int]]:
    """A round's scalars c with the keys of their directions, in the log's order: (step, probe, owner)."""
    for (t, p, column), c in np.ndenumerate(record.coefficients):
        owner = record.owners[column]
        yield c, step_key(run_seed, round=record.round, step=t, probe=p, owner=owner, directions=record.directions)


def apply_record(space: Space, record: ScalarRecord, *, run_seed: int) -> None:
    """Apply a round's steps by plain SGD, one after another in the log's order."""
    apply_steps(space, scalars_and_keys(record, run_seed=run_seed), lr=record.lr)
