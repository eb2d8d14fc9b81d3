"""Aggregation: written-out means, and the identities that wrong aggregation breaks."""

from __future__ import annotations

import numpy as np
import pytest

from fedzo.errors import ProtocolError
from fedzo.fl.aggregate import ClientResult, aggregate, check_reply, sample_clients, unmoved
from fedzo.fl.config import Seeds
from fedzo.fl.wire import TrainReply, scalars_to_bytes
from fedzo.testing.vector_space import VectorSpace
from fedzo.zo.config import AdamConfig, MomentumConfig, OptimizerConfig, SgdConfig
from fedzo.zo.directions import SHARED, direction, stream_key
from fedzo.zo.path import apply_record
from fedzo.zo.update_rule import UPDATE_RULES


def result(g: object) -> ClientResult:
    scalars = np.asarray(g, np.float32)
    return ClientResult(
        g=scalars, loss=np.ones_like(scalars), dropped=np.zeros(scalars.shape, bool), num_examples=1, end_check=0
    )


def mean_of(results: dict[int, ClientResult], weights: dict[int, float], **kwargs: object) -> np.ndarray:
    steps, probes = next(iter(results.values())).g.shape
    options = {"round": 0, "lr": 0.5, "steps": steps, "probes": probes, "seeds": Seeds.shared, **kwargs}
    return aggregate(results, weights, **options).coefficients


def test_the_weighted_mean_is_the_one_on_paper() -> None:
    results = {0: result([[1.0], [2.0]]), 3: result([[4.0], [-2.0]])}

    c = mean_of(results, {0: 1.0, 3: 3.0})

    assert c[:, 0, 0].tolist() == [0.25 * 1 + 0.75 * 4, 0.25 * 2 - 0.75 * 2]


def test_identical_clients_equal_one_client_bit_for_bit() -> None:
    values = np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32) * 17

    one = mean_of({0: result(values)}, {0: 1.0})

    for count in (2, 3, 7, 10, 30):
        many = mean_of({k: result(values) for k in range(count)}, dict.fromkeys(range(count), 1.0))
        assert np.array_equal(many, one), count


def test_p_copies_of_one_probe_equal_one_probe() -> None:
    single = mean_of({0: result([[3.0]])}, {0: 1.0})
    fourfold = mean_of({0: result([[3.0] * 4])}, {0: 1.0})

    assert fourfold.sum() == single.sum()


def test_the_order_of_arrival_changes_nothing() -> None:
    rng = np.random.default_rng(1)
    results = {k: result(rng.normal(size=(20, 1)) * 10.0**k) for k in range(8)}
    weights = {k: float(k + 1) for k in results}

    forwards = mean_of(results, weights)
    backwards = mean_of(dict(reversed(results.items())), weights)

    assert np.array_equal(forwards, backwards)


def test_weights_are_renormalised_over_the_responders() -> None:
    c = mean_of({2: result([[6.0]])}, {0: 5.0, 1: 1.0, 2: 0.1})

    assert c.item() == 6.0


def test_a_client_with_fewer_steps_counts_as_zero_afterwards() -> None:
    record = aggregate(
        {0: result([[2.0], [4.0]]), 1: result([[6.0]])},
        {0: 1.0, 1: 1.0},
        round=0,
        lr=1.0,
        steps=2,
        probes=1,
        seeds=Seeds.shared,
    )

    assert record.coefficients[:, 0, 0].tolist() == [4.0, 2.0]


def test_per_client_seeds_keep_a_column_for_each_client() -> None:
    record = aggregate(
        {5: result([[8.0]]), 1: result([[2.0]])},
        {1: 1.0, 5: 1.0},
        round=0,
        lr=1.0,
        steps=1,
        probes=1,
        seeds=Seeds.per_client,
    )

    assert record.owners == (1, 5)
    assert record.coefficients[0, 0].tolist() == [1.0, 4.0]
    shared = aggregate({0: result([[1.0]])}, {0: 1.0}, round=0, lr=1.0, steps=1, probes=1, seeds=Seeds.shared)
    assert shared.owners == (SHARED,)


@pytest.mark.parametrize("seeds", list(Seeds))
def test_the_aggregate_is_the_mean_of_the_clients_own_end_models_when_they_take_unequal_steps(seeds: Seeds) -> None:
    """The collapse identity against models that are walked and averaged in float64."""
    rng = np.random.default_rng(5)
    n, lr, probes, taken = 300, 0.25, 2, {0: 5, 1: 1, 4: 3, 6: 5}
    weights = {0: 1.0, 1: 2.5, 4: 0.5, 6: 1.0}
    results = {client: result(rng.normal(size=(steps, probes))) for client, steps in taken.items()}
    base = rng.normal(size=n).astype(np.float32)
    mean = np.zeros(n)
    for client, steps in taken.items():
        theta = base.astype(np.float64)
        owner = SHARED if seeds is Seeds.shared else client
        for t in range(steps):
            for p in range(probes):
                z = direction(stream_key(9, round=3, step=t, probe=p, owner=owner), n).astype(np.float64)
                theta -= lr * results[client].g[t, p] / probes * z
        mean += weights[client] / sum(weights.values()) * theta

    record = aggregate(results, weights, round=3, lr=lr, steps=5, probes=probes, seeds=seeds)
    space = VectorSpace(base)
    apply_record(space, record, run_seed=9)

    np.testing.assert_allclose(space.theta, mean, rtol=0, atol=2e-6)
    assert np.abs(mean - base).max() > 0.3


@pytest.mark.parametrize(
    "optimizer",
    [
        SgdConfig(lr=0.5, weight_decay=0.1),
        MomentumConfig(lr=0.5, weight_decay=0.1),
        MomentumConfig(lr=0.5, nesterov=True),
        AdamConfig(lr=0.5, weight_decay=0.1),
    ],
    ids=["sgd", "momentum", "nesterov", "adam"],
)
def test_no_rule_moves_anything_by_the_record_of_a_first_round_that_only_measured(optimizer: OptimizerConfig) -> None:
    measured = aggregate({0: result([[3.0], [-4.0]])}, {0: 1.0}, round=0, lr=0.5, steps=2, probes=1, seeds=Seeds.shared)
    theta = np.array([0.0, -0.0, 1e-45, -1e-45, 3.5, np.inf], np.float32)
    space, rule = VectorSpace(theta), UPDATE_RULES.build(optimizer)
    moments = np.zeros((rule.num_moments, theta.size), np.float32)

    rule.apply(space, moments, unmoved(measured), run_seed=1)

    assert space.theta.tobytes() == theta.tobytes()
    assert not moments.view(np.uint32).any()
    rule.apply(space, moments, measured, run_seed=1)
    assert space.theta.tobytes() != theta.tobytes()


def reply(**changes: object) -> TrainReply:
    fields = {
        "g": scalars_to_bytes(np.array([[1.0], [0.0]], np.float32)),
        "loss": scalars_to_bytes(np.array([[0.5], [np.nan]], np.float32)),
        "dropped": bytes([0, 1]),
        **changes,
    }
    return TrainReply(**fields)


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
    good = check_reply(reply(), steps=2, probes=1, max_abs_g=1e6)
    assert good.g.tolist() == [[1.0], [0.0]]

    with pytest.raises(ProtocolError, match=match):
        check_reply(reply(**changes), steps=2, probes=1, max_abs_g=1e6)


def test_sampling_is_seeded_fair_and_without_repeats() -> None:
    rounds = [sample_clients(run_seed=4, round=r, num_clients=10, clients_per_round=3) for r in range(1000)]

    assert rounds == [sample_clients(run_seed=4, round=r, num_clients=10, clients_per_round=3) for r in range(1000)]
    assert all(picked == sorted(set(picked)) and len(picked) == 3 for picked in rounds)
    counts = np.bincount(np.concatenate(rounds), minlength=10)
    standard_error = np.sqrt(1000 * 0.3 * 0.7)
    assert (np.abs(counts - 300) < 5 * standard_error).all()
    assert sample_clients(run_seed=4, round=0, num_clients=5, clients_per_round=0) == [0, 1, 2, 3, 4]
