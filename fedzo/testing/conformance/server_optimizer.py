"""What every server optimizer must do: be a pure function of theta, its moments and the record, downhill and finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import numpy.typing as npt

from fedzo.testing.conformance.bits import global_generators, must, must_be_same_values
from fedzo.testing.vector_space import VectorSpace
from fedzo.zo.config import Distribution
from fedzo.zo.directions import SHARED, direction, stream_key
from fedzo.zo.keys import OWN
from fedzo.zo.log import ScalarRecord, VectorRecord, pack, unpack
from fedzo.zo.server_optimizer import ControlVariates, ServerOptimizer, VectorOptimizer
from fedzo.zo.spaces.base import Values

Numbers = npt.NDArray[np.float64]
Round = tuple[float, Numbers]
"""Learning rate of a round, and u: the sum of its c z, float64 [n]."""

_SEED, _N, _CLIENTS = 11, 5, 3
_THETA = np.array([1.0, -2.0, 0.5, 3.0, -0.25], np.float32)


def check_server_optimizer(
    make: Callable[[], ServerOptimizer],
    *,
    formula: Callable[[Numbers, Sequence[Round]], Numbers] | None = None,
    rests_at_zero: bool = True,
) -> None:
    """Check that a rule keeps the contract of ``fedzo.zo.server_optimizer.ServerOptimizer``, for both laws of z.

    A rule with ``drift`` is given records of each client's own scalars, any other one records of their sum.

    - Theta and moments after a log depend on the log, as it travels, alone: replayed in one go, round by round, or
      from a snapshot at any round with a new rule, they are the same bits. The record is not changed.
    - The moments are float32 [num_moments, n] and changed in place; theta, and what a space is moved by, is float32.
    - The first step leads downhill, along -u. A round with lr = 0 leaves theta.
    - A rule with ``displace`` leads against the vector of a record, leaves it as it is, and keeps no state to itself.
    - Large and small finite scalars do not lead to nan or infinity.
    - The global random generators are neither used nor needed.

    Args:
        make: Makes the rule, for example ``lambda: build_server_optimizer(SgdConfig(), local_steps=1)``.
        formula: The same rule in plain float64: theta after some rounds, from theta before and the rounds. The results
            must agree within 3e-6. Not for rules with ``drift``, which no sum of scalars determines.
        rests_at_zero: A first round whose scalars are all 0 moves neither theta nor the moments. False where there is
            weight decay.

    Raises:
        AssertionError: The first rule that does not hold, with what was seen.
    """
    log = _log_of_clients() if isinstance(make(), ControlVariates) else _log()
    for law in Distribution:
        with global_generators(1):
            whole = _play(make(), log, law=law)
            _check_purity(make, log, whole, law)
        with global_generators(2):
            _must_agree(_play(make(), log, law=law), whole, "with other seeds of the global generators")
        _check_first_step(make, log[0], law)
        if formula is not None:
            _check_formula(formula, log, whole[0], law)
    _check_vectors(make)
    _check_zeros(make, log, rests_at_zero)
    _check_range(make, log)


def _record(round: int, c: object, *, lr: float = 0.125, owners: Sequence[int] = (SHARED,)) -> ScalarRecord:
    directions = OWN if len(owners) == 2 else SHARED
    return ScalarRecord(round, float(np.float32(lr)), tuple(owners), np.asarray(c, np.float32), directions)


def _log() -> list[ScalarRecord]:
    """Several steps and probes, clients with directions of their own, a round without any scalar."""
    return [
        _record(0, [[[0.5], [-1.0]], [[2.0], [0.25]]]),
        _record(1, [[[1.5, -0.5]]], owners=(0, 2), lr=0.25),
        _record(2, [[[0.0]]]),
        _record(3, [[[-0.75]]], lr=0.5),
        _record(4, [[[3.0]]]),
    ]


def _log_of_clients() -> list[ScalarRecord]:
    """Each client's own scalars along shared directions: absent clients, an early stop, a round without any scalar."""
    scalars = [
        ((0, 1, 2), [[[0.5, -1.0, 0.25]], [[2.0, 0.25, 1.0]]]),
        ((0, 2), [[[1.5, -0.5]], [[0.0, 1.0]]]),
        ((0, 1), [[[0.0, 0.0]], [[0.0, 0.0]]]),
        ((1,), [[[-0.75]], [[0.5]]]),
        ((0, 1, 2), [[[3.0, 1.0, -2.0]], [[1.0, 1.0, 1.0]]]),
    ]
    return [ScalarRecord(r, 0.125, owners, np.asarray(c, np.float32), SHARED) for r, (owners, c) in enumerate(scalars)]


class _Float32Space(VectorSpace):
    """Refuses what is not float32."""

    def step(self, s: float, key: int) -> None:
        _must_be_float32(s, "step(s, key)")
        super().step(s, key)

    def scale_by(self, factor: float) -> None:
        _must_be_float32(factor, "scale_by(factor)")
        super().scale_by(factor)

    def load(self, values: Values) -> None:
        must(
            values.dtype == np.float32 and values.shape == (_N,),
            f"a rule must load float32 [{_N}], got {values.dtype} {list(values.shape)}",
        )
        super().load(values)


def _must_be_float32(number: float, where: str) -> None:
    with np.errstate(over="ignore"):
        must(
            not math.isfinite(number) or float(np.float32(number)) == number,
            f"{where} must get a float32 number, got {number!r}",
        )


def _moments(rule: ServerOptimizer) -> Values:
    count = rule.num_moments(_CLIENTS)
    must(isinstance(count, int) and count >= 0, f"num_moments({_CLIENTS}) must be an integer >= 0, got {count!r}")
    return np.zeros((count, _N), np.float32)


def _apply(rule: ServerOptimizer, space: VectorSpace, moments: Values, record: ScalarRecord) -> None:
    wire = record.to_bytes()
    try:
        with np.errstate(all="ignore"):  # what is not finite is seen afterwards
            rule.apply(space, moments, record, run_seed=_SEED)
    except (IndexError, ValueError) as error:
        raise AssertionError(
            f"apply must do with the num_moments({_CLIENTS}) = {len(moments)} rows of moments that it asks for, "
            f"in round {record.round} it raised {error!r}"
        ) from error
    must(record.to_bytes() == wire, f"apply must not change the record; it changed that of round {record.round}")


def _play(
    rule: ServerOptimizer,
    log: Sequence[ScalarRecord],
    *,
    law: Distribution = Distribution.gaussian,
    theta: Values = _THETA,
    moments: Values | None = None,
) -> tuple[Values, Values]:
    """Theta and moments after a log, as it comes over the wire."""
    space = _Float32Space(theta, distribution=law)
    kept = _moments(rule) if moments is None else moments.copy()
    for record in unpack(pack(log)):
        _apply(rule, space, kept, cast(ScalarRecord, record))
    return space.values(), kept


def _must_agree(found: tuple[Values, Values], expected: tuple[Values, Values], when: str) -> None:
    for name, mine, wanted in zip(("theta", "the moments"), found, expected, strict=True):
        must_be_same_values(mine.reshape(-1), wanted.reshape(-1), f"{name} must be a function of the log, but {when}")


def _check_purity(
    make: Callable[[], ServerOptimizer], log: list[ScalarRecord], whole: tuple[Values, Values], law: Distribution
) -> None:
    rule = make()
    for _ in range(2):  # one that has played before
        _must_agree(_play(rule, log, law=law), whole, "replayed by a rule that has played before")
    theta, moments = _THETA, _moments(rule)
    for position, record in enumerate(log):
        rest = _play(make(), log[position:], law=law, theta=theta, moments=moments)
        _must_agree(rest, whole, f"continued from theta and moments before round {position}, by a new rule")
        if isinstance(rule, ControlVariates):
            _check_drift(rule, theta, moments, lr=record.lr)
        theta, moments = _play(make(), [record], law=law, theta=theta, moments=moments)
    _must_agree((theta, moments), whole, "replayed round by round, by a new rule each")


def _check_drift(rule: ControlVariates, theta: Values, moments: Values, *, lr: float) -> None:
    before = theta.tobytes(), moments.tobytes()
    first = [rule.drift(theta, moments, client, lr=lr) for client in range(_CLIENTS)]
    later = [rule.drift(theta, moments, client, lr=lr) for client in reversed(range(_CLIENTS))][::-1]
    must((theta.tobytes(), moments.tobytes()) == before, "drift must change neither theta nor the moments")
    for client, (one, other) in enumerate(zip(first, later, strict=True)):
        must(
            one.along.dtype == np.float32 and one.along.shape == (_N,),
            f"drift must give along as float32 [{_N}], got {one.along.dtype} {list(one.along.shape)}",
        )
        must_be_same_values(other.along, one.along, f"drift of client {client} must not depend on who was asked before")
        must(one.pull == other.pull, f"drift's pull must not depend on who was asked before: {one.pull}, {other.pull}")


def _check_first_step(make: Callable[[], ServerOptimizer], like: ScalarRecord, law: Distribution) -> None:
    """From theta = 0, where a decay does nothing, along one direction that all scalars share."""
    z = direction(stream_key(_SEED, round=0), _N, distribution=law).astype(np.float64)
    for c in (1.0, -1.0):
        scalars = np.full((1, 1, len(like.owners)), c, np.float32)
        record = ScalarRecord(0, 0.125, like.owners, scalars, like.directions)
        after, _ = _play(make(), [record], law=law, theta=np.zeros(_N, np.float32))
        slope = float(after.astype(np.float64) @ (c * z))
        must(slope < 0, f"the first step must lead against u = {c} z, its product with u must be < 0, got {slope}")


def _check_vectors(make: Callable[[], ServerOptimizer]) -> None:
    """Of a rule that is also moved by vectors: from theta = 0 against the first, and by the records alone."""
    if not isinstance(make(), VectorOptimizer):
        return
    changes = [np.array(change, np.float32) for change in ([0.5, -1.0, 0.25, 2.0, -0.75], [1.0, 1.0, -0.5, 0.0, 0.25])]

    def displaced(rules: Sequence[ServerOptimizer]) -> list[Values]:
        space, moments, seen = _Float32Space(np.zeros(_N, np.float32)), _moments(rules[0]), []
        for round, (rule, change) in enumerate(zip(rules, changes, strict=True)):
            sent = change.copy()
            cast(VectorOptimizer, rule).displace(space, moments, VectorRecord.of(sent, round=round, lr=0.125))
            must_be_same_values(sent, change, "displace must not change the vector of the record")
            seen.append(space.values().copy())
        return seen

    rule = make()
    whole = displaced([rule, rule])
    slope = float(whole[0].astype(np.float64) @ changes[0])
    must(slope < 0, f"displace must lead against the vector, its product with it must be < 0, got {slope}")
    anew = displaced([make(), make()])
    must_be_same_values(anew[1], whole[1], "displace by a new rule each round must lead to the same theta")


def _check_zeros(make: Callable[[], ServerOptimizer], log: list[ScalarRecord], rests_at_zero: bool) -> None:
    theta, moments = _play(make(), log[:2])
    last = ScalarRecord(2, 0.0, log[0].owners, log[0].coefficients, log[0].directions)
    after, _ = _play(make(), [last], theta=theta, moments=moments)
    must_be_same_values(after, theta, "a round with lr = 0 must leave theta")
    if rests_at_zero:
        first = ScalarRecord(0, 0.125, log[0].owners, np.zeros_like(log[0].coefficients), log[0].directions)
        found, remembered = _play(make(), [first])
        must_be_same_values(found, _THETA, "a first round whose scalars are all 0 must leave theta")
        must(not remembered.any(), f"a first round whose scalars are all 0 must leave the moments, got {remembered}")


def _check_range(make: Callable[[], ServerOptimizer], log: list[ScalarRecord]) -> None:
    for size in (1e-30, 1e10):
        scaled = [ScalarRecord(r.round, r.lr, r.owners, r.coefficients * np.float32(size), r.directions) for r in log]
        theta, moments = _play(make(), scaled)
        must(
            bool(np.isfinite(theta).all() and np.isfinite(moments).all()),
            f"scalars of about {size} must not lead to nan or infinity, got theta {theta} and moments {moments}",
        )


def _check_formula(
    formula: Callable[[Numbers, Sequence[Round]], Numbers],
    log: Sequence[ScalarRecord],
    theta: Values,
    law: Distribution,
) -> None:
    must(not any(len(record.owners) > 2 for record in log), "a formula is for rules without drift")
    rounds = []
    for record in log:
        u = np.zeros(_N)
        for (step, probe, column), c in np.ndenumerate(record.coefficients):
            key = stream_key(_SEED, round=record.round, step=step, probe=probe, owner=record.owners[column])
            u += float(c) * direction(key, _N, distribution=law).astype(np.float64)
        rounds.append((record.lr, u))
    wanted = formula(_THETA.astype(np.float64), rounds)
    must(
        bool(np.allclose(theta, wanted, rtol=3e-6, atol=3e-6)),
        f"theta after the log must be the formula's {wanted.tolist()} within 3e-6, got {theta.tolist()}",
    )
