"""Aggregation: written-out means, and the identities that wrong aggregation breaks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedzo.config.schema import RunSettings
from fedzo.errors import ProtocolError
from fedzo.fl.config import Aggregation, Directions, FlConfig, StrategyConfig
from fedzo.fl.messages import ScalarReply, TrainRequest, scalars_to_bytes, signs_from_bytes, signs_to_bytes
from fedzo.fl.server.scalar_aggregator import aggregate, check_reply, unmoved
from fedzo.fl.server.step_policy.baselines import OracleConfig
from fedzo.testing.vector_space import VectorSpace
from fedzo.zo.directions import SHARED, direction
from fedzo.zo.keys import OWN, step_key
from fedzo.zo.log import Scalars
from fedzo.zo.server_optimizer import (
    SERVER_OPTIMIZERS,
    AdamConfig,
    MomentumConfig,
    ScaffoldConfig,
    ServerOptimizerConfig,
    SgdConfig,
)
from fedzo.zo.steps import apply_record


def scalars(g: object) -> Scalars:
    return np.asarray(g, np.float32)


def mean_of(
    results: dict[int, Scalars], weights: dict[int, float], *, normalise: bool = False, **strategy: Any
) -> Scalars:
    config = RunSettings(strategy=StrategyConfig(**strategy), step_policy=OracleConfig(normalise=normalise))
    return aggregate(results, weights, config, round=0, lr=0.5).coefficients


def test_the_weighted_mean_is_the_one_on_paper() -> None:
    results = {0: scalars([[1.0], [2.0]]), 3: scalars([[4.0], [-2.0]])}

    c = mean_of(results, {0: 1.0, 3: 3.0})

    assert c[:, 0, 0].tolist() == [0.25 * 1 + 0.75 * 4, 0.25 * 2 - 0.75 * 2]


def test_normalised_shares_are_those_on_paper_and_nothing_where_steps_are_equal() -> None:
    results = {0: scalars([[1.0], [2.0], [3.0], [4.0]]), 3: scalars([[8.0]])}
    mean = 0.25 * 4 + 0.75 * 1  # steps of a client, weighted

    c = mean_of(results, {0: 1.0, 3: 3.0}, normalise=True)

    assert c[0, 0, 0] == np.float32(0.25 * mean / 4 * 1 + 0.75 * mean / 1 * 8)
    assert c[1:, 0, 0].tolist() == [0.25 * mean / 4 * g for g in (2, 3, 4)]
    even, weights = {0: scalars([[1.1], [2.2]]), 3: scalars([[4.3], [-2.4]])}, {0: 1.7, 3: 3.1}
    assert np.array_equal(mean_of(even, weights, normalise=True), mean_of(even, weights))


def test_normalised_shares_lead_to_the_weighted_optimum_where_some_take_one_step() -> None:
    """FedNova's promise, on quadratics (x - a)^2 / 2 with exact slopes; else the optimum moves to who steps more."""
    optima, steps, weights, lr = {0: 0.0, 1: 4.0}, {0: 10, 1: 1}, {0: 1.0, 1: 3.0}, 1e-3

    def fixed_point(normalise: bool) -> float:
        x = 7.0
        for _ in range(3000):
            results = {}
            for client, optimum in optima.items():
                at, slopes = x, []
                for _ in range(steps[client]):
                    slopes.append([at - optimum])
                    at -= lr * slopes[-1][0]
                results[client] = scalars(slopes)
            x -= lr * float(mean_of(results, weights, normalise=normalise).sum())
        return x

    assert fixed_point(True) == pytest.approx(3.0, abs=0.02)
    assert fixed_point(False) == pytest.approx(12 / 13, abs=0.02)


def test_identical_clients_equal_one_client_bit_for_bit() -> None:
    values = np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32) * 17

    one = mean_of({0: scalars(values)}, {0: 1.0})

    for count in (2, 3, 7, 10, 30):
        many = mean_of({k: scalars(values) for k in range(count)}, dict.fromkeys(range(count), 1.0))
        assert np.array_equal(many, one), count


def test_p_copies_of_one_probe_equal_one_probe() -> None:
    single = mean_of({0: scalars([[3.0]])}, {0: 1.0})
    fourfold = mean_of({0: scalars([[3.0] * 4])}, {0: 1.0})

    assert fourfold.sum() == single.sum()


def test_the_order_of_arrival_changes_nothing() -> None:
    rng = np.random.default_rng(1)
    results = {k: scalars(rng.normal(size=(20, 1)) * 10.0**k) for k in range(8)}
    weights = {k: float(k + 1) for k in results}

    forwards = mean_of(results, weights)
    backwards = mean_of(dict(reversed(results.items())), weights)

    assert np.array_equal(forwards, backwards)


def test_weights_are_renormalised_over_the_responders() -> None:
    c = mean_of({2: scalars([[6.0]])}, {0: 5.0, 1: 1.0, 2: 0.1})

    assert c.item() == 6.0


def test_a_client_with_fewer_steps_counts_as_zero_afterwards() -> None:
    results = {0: scalars([[2.0], [4.0]]), 1: scalars([[6.0]])}

    record = aggregate(results, {0: 1.0, 1: 1.0}, RunSettings(), round=0, lr=1.0)

    assert record.coefficients[:, 0, 0].tolist() == [4.0, 2.0]


def test_per_client_directions_keep_a_column_for_each_client() -> None:
    results, weights = {5: scalars([[8.0]]), 1: scalars([[2.0]])}, {1: 1.0, 5: 1.0}
    config = RunSettings(fl=FlConfig(directions=Directions.per_client))

    record = aggregate(results, weights, config, round=0, lr=1.0)

    assert record.owners == (1, 5)
    assert record.coefficients[0, 0].tolist() == [1.0, 4.0]
    shared = aggregate({0: scalars([[1.0]])}, {0: 1.0}, RunSettings(), round=0, lr=1.0)
    assert shared.owners == (SHARED,)


def test_an_optimizer_that_walks_clients_gets_the_scalars_of_each_along_shared_directions() -> None:
    results, weights = {5: scalars([[8.0, 2.0]]), 1: scalars([[2.0, 4.0]])}, {1: 1.0, 5: 3.0}

    record = aggregate(results, weights, RunSettings(server_optimizer=ScaffoldConfig()), round=0, lr=1.0)

    assert (record.owners, record.directions) == ((1, 5), SHARED)
    assert record.coefficients[0].tolist() == [[1.0, 4.0], [2.0, 1.0]]  # g / P, whatever the weights


@pytest.mark.parametrize(
    ("directions", "number"), [(Directions.shared, SHARED), (Directions.per_client, OWN), (Directions.pool, 3)]
)
def test_the_aggregate_is_the_mean_of_the_clients_own_end_models_when_they_take_unequal_steps(
    directions: Directions, number: int
) -> None:
    """The collapse identity against models that are walked and averaged in float64."""
    rng = np.random.default_rng(5)
    n, lr, probes, taken = 300, 0.25, 2, {0: 5, 1: 1, 4: 3, 6: 5}
    weights = {0: 1.0, 1: 2.5, 4: 0.5, 6: 1.0}
    results = {client: scalars(rng.normal(size=(steps, probes))) for client, steps in taken.items()}
    base = rng.normal(size=n).astype(np.float32)
    mean = np.zeros(n)
    for client, steps in taken.items():
        theta = base.astype(np.float64)
        for t in range(steps):
            for p in range(probes):
                key = step_key(9, round=3, step=t, probe=p, owner=client, directions=number)
                z = direction(key, n).astype(np.float64)
                theta -= lr * results[client][t, p] / probes * z
        mean += weights[client] / sum(weights.values()) * theta

    config = RunSettings(fl=FlConfig(directions=directions, pool_size=3))
    record = aggregate(results, weights, config, round=3, lr=lr)
    space = VectorSpace(base)
    apply_record(space, record, run_seed=9)

    np.testing.assert_allclose(space.theta, mean, rtol=0, atol=2e-6)
    assert np.abs(mean - base).max() > 0.3


@pytest.mark.parametrize(
    "server_optimizer",
    [
        SgdConfig(lr=0.5, weight_decay=0.1),
        MomentumConfig(lr=0.5, weight_decay=0.1),
        MomentumConfig(lr=0.5, nesterov=True),
        AdamConfig(lr=0.5, weight_decay=0.1),
    ],
    ids=["sgd", "momentum", "nesterov", "adam"],
)
def test_no_rule_moves_anything_by_the_record_of_a_first_round_that_only_measured(
    server_optimizer: ServerOptimizerConfig,
) -> None:
    results = {0: scalars([[3.0], [-4.0]])}
    measured = aggregate(results, {0: 1.0}, RunSettings(), round=0, lr=0.5)
    theta = np.array([0.0, -0.0, 1e-45, -1e-45, 3.5, np.inf], np.float32)
    space, rule = VectorSpace(theta), SERVER_OPTIMIZERS.build(server_optimizer, local_steps=1)
    moments = np.zeros((rule.num_moments(1), theta.size), np.float32)

    rule.apply(space, moments, unmoved(measured), run_seed=1)

    assert space.theta.tobytes() == theta.tobytes()
    assert not moments.view(np.uint32).any()
    rule.apply(space, moments, measured, run_seed=1)
    assert space.theta.tobytes() != theta.tobytes()


TWO_STEPS = TrainRequest(client=0, steps=2)


def reply(**changes: object) -> ScalarReply:
    fields = {
        "g": scalars_to_bytes(np.array([[1.0], [0.0]], np.float32)),
        "loss": scalars_to_bytes(np.array([[0.5], [np.nan]], np.float32)),
        "dropped": bytes([0, 1]),
        **changes,
    }
    return ScalarReply(**fields)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"g": b"123"}, r"g must hold 8 bytes \(float32 \[2, 1\]\), got 3"),
        ({"loss": b""}, "loss must hold 8 bytes"),
        ({"dropped": b"\0"}, "dropped must hold 2 flags, got 1"),
        ({"g": scalars_to_bytes(np.array([[np.nan], [0]], np.float32))}, "g must be finite"),
        ({"g": scalars_to_bytes(np.array([[-1e7], [0]], np.float32))}, r"\|g\| must be at most .* 1e\+06, got 1e\+07"),
        ({"dropped": bytes([1, 1])}, "a dropped probe must carry g = 0"),
    ],
)
def test_a_reply_that_cannot_be_used_is_refused_with_the_reason(changes: dict[str, object], match: str) -> None:
    good = check_reply(reply(), TWO_STEPS, probes=1, strategy=StrategyConfig())
    assert good.g.tolist() == [[1.0], [0.0]]

    with pytest.raises(ProtocolError, match=match):
        check_reply(reply(**changes), TWO_STEPS, probes=1, strategy=StrategyConfig())


# --- robust means and signs -------------------------------------------------------------------------------------------


def drawn(num_clients: int, *, steps: int = 5, probes: int = 2) -> np.ndarray:
    """Scalars of unlike sizes with ties among them, [K, T, P]."""
    rng = np.random.default_rng(num_clients)
    return np.round(rng.standard_t(2, size=(num_clients, steps, probes)) * 4).astype(np.float32) / 4


def trimmed(g: np.ndarray, share: float) -> np.ndarray:
    """Cell by cell: the extremes are taken out of a list, a pair after another, one at least where three are there."""
    out = np.empty(g.shape[1:])
    for at in np.ndindex(*out.shape):
        left = [float(value) for value in g[(slice(None), *at)]]
        for _ in range(max(int(share * len(g)), int(len(g) > 2))):
            left.remove(min(left))
            left.remove(max(left))
        out[at] = sum(left) / len(left)
    return out


@pytest.mark.parametrize("num_clients", [1, 2, 3, 4, 7, 10])
@pytest.mark.parametrize(
    ("aggregation", "trim_share", "oracle"),
    [
        (Aggregation.median, 0.0, lambda g: np.median(g, axis=0)),
        (Aggregation.trimmed_mean, 0.1, lambda g: trimmed(g, 0.1)),
        (Aggregation.trimmed_mean, 0.3, lambda g: trimmed(g, 0.3)),
        (Aggregation.trimmed_mean, 0.49, lambda g: trimmed(g, 0.49)),
        (
            Aggregation.majority_sign,
            0.0,
            lambda g: np.where((g > 0).sum(0) > (g < 0).sum(0), 1, 0) - np.where((g < 0).sum(0) > (g > 0).sum(0), 1, 0),
        ),
    ],
)
def test_a_robust_mean_is_its_slow_twin(
    aggregation: Aggregation, trim_share: float, oracle: Callable[[np.ndarray], np.ndarray], num_clients: int
) -> None:
    g = drawn(num_clients)
    results = {3 * k: scalars(g[k]) for k in reversed(range(num_clients))}

    c = mean_of(results, {}, aggregation=aggregation, trim_share=trim_share)

    assert c[:, :, 0] == pytest.approx(oracle(g.astype(np.float64)) / 2, rel=1e-6, abs=1e-7)


@given(
    honest=st.lists(st.floats(-1e3, 1e3, width=32), min_size=4, max_size=9),
    hostile=st.floats(-1e6, 1e6, width=32),
    aggregation=st.sampled_from([Aggregation.median, Aggregation.trimmed_mean]),
)
def test_one_hostile_client_cannot_leave_the_range_of_the_honest(
    honest: list[float], hostile: float, aggregation: Aggregation
) -> None:
    values = [*honest, hostile]
    results = {k: scalars([[value]]) for k, value in enumerate(values)}

    c = mean_of(results, {}, aggregation=aggregation, trim_share=0.2).item()  # one of 5 to 9, at least, is left out

    assert np.float32(min(honest)) <= c <= np.float32(max(honest))


def test_the_mean_breaks_where_the_median_holds() -> None:
    results = {k: scalars([[g]]) for k, g in enumerate([1.0, 2.0, 3.0, 1e6])}
    even = dict.fromkeys(range(4), 1.0)

    assert mean_of(results, even).item() > 1e5
    assert mean_of(results, even, aggregation=Aggregation.median).item() == 2.5
    assert mean_of(results, even, aggregation=Aggregation.majority_sign).item() == 1


@pytest.mark.parametrize("aggregation", [Aggregation.median, Aggregation.trimmed_mean])
def test_clients_that_stopped_early_do_not_hold_a_robust_mean_at_zero(aggregation: Aggregation) -> None:
    """Three of six stop after their first step: later steps are those of the three others, half as long."""
    results = {k: scalars([[float(k)], [10.0 + k]] if k < 3 else [[float(k)]]) for k in range(6)}

    c = mean_of(results, {}, aggregation=aggregation, trim_share=0.2)

    assert c[0].item() == 2.5  # of 0 to 5
    assert c[1].item() == 11 / 2  # of 10, 11 and 12


def test_a_trimmed_mean_cuts_as_many_of_those_that_took_a_step_as_of_a_whole_round() -> None:
    """One of ten is hostile and three honest ones stop early: a tenth of the seven left would be nobody."""
    results = {k: scalars([[1.0], [1.0]] if k < 7 else [[1.0]]) for k in range(10)}
    results[0] = scalars([[1e6], [1e6]])

    c = mean_of(results, {}, aggregation=Aggregation.trimmed_mean, trim_share=0.1)

    assert c.ravel().tolist() == pytest.approx([1.0, 0.7])


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [(Aggregation.median, [4.0, 2.0]), (Aggregation.trimmed_mean, [4.0, 2.0]), (Aggregation.majority_sign, [1.0, 0.5])],
)
def test_with_one_of_two_left_every_aggregation_moves_half_as_far(
    aggregation: Aggregation, expected: list[float]
) -> None:
    results = {0: scalars([[2.0], [4.0]]), 1: scalars([[6.0]])}

    c = mean_of(results, {}, aggregation=aggregation, trim_share=0.0)

    assert c.ravel().tolist() == expected


def test_where_clients_are_absent_the_trimmed_mean_still_cuts_one() -> None:
    """A fifth of five is one; one of them is away, and a fifth of four is nobody."""
    results = {0: scalars([[1e6]]), 1: scalars([[1.0]]), 2: scalars([[2.0]]), 3: scalars([[3.0]])}

    assert mean_of(results, {}, aggregation=Aggregation.trimmed_mean, trim_share=0.2).item() == 2.5


def test_a_tie_of_signs_and_their_absence_move_nothing() -> None:
    signs = {0: scalars([[1.0], [1.0], [0.0]]), 1: scalars([[-1.0], [0.0], [0.0]])}  # 0: a probe without a sign

    c = mean_of(signs, {}, aggregation=Aggregation.majority_sign)

    assert c.ravel().tolist() == [0.0, 1.0, 0.0]


@given(shape=st.tuples(st.integers(1, 5), st.integers(1, 5)), seed=st.integers(0, 99))
def test_signs_travel_as_one_bit_each(shape: tuple[int, int], seed: int) -> None:
    g = np.random.default_rng(seed).normal(size=shape).astype(np.float32)

    data = signs_to_bytes(g)

    assert len(data) == -(-g.size // 8)
    assert [int(b) for b in "".join(f"{byte:08b}" for byte in data)[: g.size]] == [int(x > 0) for x in g.ravel()]
    assert np.array_equal(signs_from_bytes(data, shape=shape, what="g"), np.sign(g))


def test_a_reply_without_any_loss_is_refused_where_it_would_be_remembered() -> None:
    lost = reply(g=bytes(8), dropped=b"\1\1")

    assert check_reply(lost, TWO_STEPS, probes=1, strategy=StrategyConfig()).dropped.all()
    with pytest.raises(ProtocolError, match="no probe had a finite loss"):
        check_reply(lost, TWO_STEPS, probes=1, strategy=StrategyConfig(), all_may_drop=False)


def test_a_reply_of_signs_is_checked_and_its_dropped_probes_count_as_zero() -> None:
    signs = StrategyConfig(aggregation=Aggregation.majority_sign, max_abs_g=0.5)  # to which a sign is not compared

    checked = check_reply(reply(g=bytes([0b11000000])), TWO_STEPS, probes=1, strategy=signs)

    assert checked.g.tolist() == [[1.0], [0.0]]
    assert checked.payload_bytes == 1
    with pytest.raises(ProtocolError, match=r"g must hold 1 bytes \(a bit each for \[2, 1\]\), got 8"):
        check_reply(reply(), TWO_STEPS, probes=1, strategy=signs)
    with pytest.raises(ProtocolError, match="g must be filled up with bits of 0 after the first 2"):
        check_reply(reply(g=b"\xff"), TWO_STEPS, probes=1, strategy=signs)
