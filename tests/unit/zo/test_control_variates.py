"""Rules that correct drift against their papers' algorithms in float64, on quadratics that clients do not agree on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from fedzo.testing.vector_space import VectorSpace
from fedzo.zo.directions import SHARED, direction, stream_key
from fedzo.zo.log import ScalarRecord, unpack
from fedzo.zo.server_optimizer import (
    SERVER_OPTIMIZERS,
    AdamConfig,
    ControlVariates,
    FedDynConfig,
    MomentumConfig,
    ScaffoldConfig,
    Schedule,
    ServerOptimizer,
    ServerOptimizerConfig,
    SgdConfig,
    learning_rate,
)
from fedzo.zo.server_optimizer.control_variates import end_models
from fedzo.zo.spaces.base import Values
from fedzo.zo.steps import local_step

SEED = 5
Batch = np.ndarray


class Quadratics:
    """Client k's loss is (theta - b_k)' A_k (theta - b_k) / 2, A_k diagonal."""

    def __init__(self, n: int, num_clients: int) -> None:
        rng = np.random.default_rng(3)
        self.a = rng.uniform(0.2, 2.0, (num_clients, n))
        self.b = rng.normal(size=(num_clients, n)) * 2
        self.theta0 = np.ones(n, np.float32)
        self.optimum = (self.a * self.b).sum(axis=0) / self.a.sum(axis=0)

    def slope(self, client: int, theta: np.ndarray, z: np.ndarray) -> float:
        """What a central difference measures, exactly: the derivative along z."""
        return float((self.a[client] * (theta.astype(np.float64) - self.b[client])) @ z.astype(np.float64))


def zs(n: int, round: int, step: int, probes: int) -> list[np.ndarray]:
    return [direction(stream_key(SEED, round=round, step=step, probe=p), n) for p in range(probes)]


def federate(
    problem: Quadratics, config: ServerOptimizerConfig, attendance: Sequence[Sequence[int]], *, steps: int, probes: int
) -> tuple[VectorSpace, np.ndarray, list[ScalarRecord]]:
    """Clients as fedzo's: local steps from the round's model, scalars up, one record a round."""
    rule: ServerOptimizer = SERVER_OPTIMIZERS.build(config, local_steps=steps)
    n, num_clients = len(problem.theta0), len(problem.a)
    space = VectorSpace(problem.theta0)
    moments = np.zeros((rule.num_moments(num_clients), n), np.float32)
    log = []
    lr = float(np.float32(config.lr))
    for r, clients in enumerate(attendance):
        start = space.values()
        c = np.zeros((steps, probes, len(clients)), np.float32)
        for column, client in enumerate(clients):
            space.load(start)
            drift = rule.drift(start, moments, client, lr=lr) if isinstance(rule, ControlVariates) else None
            for t in range(steps):
                keys = [stream_key(SEED, round=r, step=t, probe=p) for p in range(probes)]
                g = [problem.slope(client, space.theta, z) for z in zs(n, r, t, probes)]
                c[t, :, column] = np.array(g) / probes
                local_step(space, lr=lr, c=c[t, :, column], keys=keys, drift=drift)
        space.load(start)
        if isinstance(rule, ControlVariates):
            record = ScalarRecord(round=r, lr=lr, owners=tuple(clients), coefficients=c, directions=SHARED)
        else:
            record = ScalarRecord(round=r, lr=lr, owners=(SHARED,), coefficients=c.mean(axis=2, keepdims=True))
        log.append(record)
        rule.apply(space, moments, record, run_seed=SEED)
    return space, moments, log


def scaffold_on_paper(
    problem: Quadratics, lr: float, attendance: Sequence[Sequence[int]], *, steps: int, probes: int
) -> np.ndarray:
    """Algorithm 1 of arXiv 1910.06378 with option II and a server step of 1."""
    num_clients, n = problem.a.shape
    x, c = problem.theta0.astype(np.float64), np.zeros(n)
    c_k = np.zeros((num_clients, n))
    for r, clients in enumerate(attendance):
        delta_y, delta_c = np.zeros(n), np.zeros(n)
        for k in clients:
            y = x.copy()
            for t in range(steps):
                gradient = sum(problem.slope(k, y, z) * z.astype(float) for z in zs(n, r, t, probes)) / probes
                y = y - lr * (gradient - c_k[k] + c)
            c_plus = c_k[k] - c + (x - y) / (steps * lr)
            delta_y += y - x
            delta_c += c_plus - c_k[k]
            c_k[k] = c_plus
        x = x + delta_y / len(clients)
        c = c + delta_c / num_clients
    return x


def feddyn_on_paper(
    problem: Quadratics, lr: float, alpha: float, attendance: Sequence[Sequence[int]], *, steps: int, probes: int
) -> np.ndarray:
    """Algorithm 1 of arXiv 2111.04263; each local problem is followed for some steps of gradient descent."""
    num_clients, n = problem.a.shape
    theta, h = problem.theta0.astype(np.float64), np.zeros(n)
    local_gradient = np.zeros((num_clients, n))
    for r, clients in enumerate(attendance):
        ends = []
        for k in clients:
            y = theta.copy()
            for t in range(steps):
                gradient = sum(problem.slope(k, y, z) * z.astype(float) for z in zs(n, r, t, probes)) / probes
                # of L_k(y) - <grad L_k(theta_k of before), y> + alpha / 2 |y - theta|^2
                y = y - lr * (gradient - local_gradient[k] + alpha * (y - theta))
            local_gradient[k] -= alpha * (y - theta)
            ends.append(y)
        h = h - alpha / num_clients * sum(end - theta for end in ends)
        theta = sum(ends) / len(ends) - h / alpha
    return theta


ATTENDANCE = {
    "all": [[0, 1, 2, 3]] * 5,
    "some": [[0, 3], [1, 2], [3], [0, 1, 2, 3], [1, 3]],
}


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("who", list(ATTENDANCE))
def test_scaffold_is_the_paper_s_algorithm(who: str, steps: int) -> None:
    problem = Quadratics(6, 4)

    space, moments, _ = federate(problem, ScaffoldConfig(lr=0.05), ATTENDANCE[who], steps=steps, probes=2)

    expected = scaffold_on_paper(problem, 0.05, ATTENDANCE[who], steps=steps, probes=2)
    assert space.theta == pytest.approx(expected, rel=2e-5, abs=2e-5)
    assert np.abs(expected - problem.theta0).max() > 0.1
    assert moments[0] == pytest.approx(moments[1:].mean(axis=0), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("who", list(ATTENDANCE))
def test_feddyn_is_the_paper_s_algorithm(who: str, steps: int) -> None:
    problem = Quadratics(6, 4)

    config = FedDynConfig(lr=0.05, alpha=2.0)
    space, _, _ = federate(problem, config, ATTENDANCE[who], steps=steps, probes=2)

    expected = feddyn_on_paper(problem, 0.05, 2.0, ATTENDANCE[who], steps=steps, probes=2)
    assert space.theta == pytest.approx(expected, rel=2e-5, abs=2e-5)
    assert np.abs(expected - problem.theta0).max() > 0.1


def test_one_round_of_scaffold_by_hand() -> None:
    """Two clients, one step: c_k becomes the client's own estimate, and the second round steps along the mean."""
    z0, z1 = (direction(stream_key(SEED, round=r), 3).astype(float) for r in (0, 1))
    rule = SERVER_OPTIMIZERS.build(ScaffoldConfig(), local_steps=1)
    space, moments = VectorSpace(np.zeros(3, np.float32)), np.zeros((3, 3), np.float32)

    def play(round: int, g: list[float], owners: tuple[int, ...]) -> None:
        c = np.array([[g]], np.float32)
        record = ScalarRecord(round=round, lr=0.5, owners=owners, coefficients=c, directions=SHARED)
        rule.apply(space, moments, record, run_seed=SEED)

    play(0, [2.0, 6.0], (0, 1))
    assert space.theta == pytest.approx(-0.5 * 4 * z0, rel=1e-6)
    assert moments == pytest.approx(np.stack([4 * z0, 2 * z0, 6 * z0]), rel=1e-5)

    play(1, [1.0], (1,))
    assert space.theta == pytest.approx(-0.5 * 4 * z0 - 0.5 * (z1 - 6 * z0 + 4 * z0), rel=1e-5)
    assert moments[2] == pytest.approx(z1, rel=1e-4, abs=1e-5)
    assert moments[1] == pytest.approx(2 * z0, rel=1e-5)


@pytest.mark.parametrize(
    "config", [ScaffoldConfig(lr=0.02), FedDynConfig(lr=0.02, alpha=0.7)], ids=["scaffold", "feddyn"]
)
def test_many_local_steps_lead_averaging_astray_and_corrected_ones_to_the_optimum(
    config: ServerOptimizerConfig,
) -> None:
    problem = Quadratics(3, 3)
    rounds = [[0, 1, 2]] * 20

    averaged, _, _ = federate(problem, SgdConfig(lr=0.02), rounds, steps=40, probes=4)
    corrected, _, _ = federate(problem, config, rounds, steps=40, probes=4)

    astray, close = (float(np.linalg.norm(each.theta - problem.optimum)) for each in (averaged, corrected))
    assert astray > 0.2
    assert close < 0.25 * astray


@pytest.mark.parametrize(
    "config", [ScaffoldConfig(lr=0.05), FedDynConfig(lr=0.05, alpha=2.0)], ids=["scaffold", "feddyn"]
)
def test_replay_and_every_client_s_end_have_the_bits_of_the_live_run(config: ServerOptimizerConfig) -> None:
    problem = Quadratics(6, 4)
    live, kept, log = federate(problem, config, ATTENDANCE["some"], steps=3, probes=2)
    rule = SERVER_OPTIMIZERS.build(config, local_steps=3)
    space, moments = VectorSpace(problem.theta0), np.zeros_like(kept)

    for record in log:
        (again,) = unpack(record.to_bytes())
        before = space.values()
        ends = dict(end_models(rule, VectorSpace(before), moments, again, run_seed=SEED))
        assert list(ends) == list(record.owners)
        rule.apply(space, moments, again, run_seed=SEED)

    assert space.theta.tobytes() == live.theta.tobytes()
    assert moments.tobytes() == kept.tobytes()


class Still(VectorSpace):
    """Is read, and not moved."""

    def step(self, s: float, key: int) -> None:
        raise AssertionError("the model was moved")

    def load(self, values: Values) -> None:
        raise AssertionError("the model was moved")


@pytest.mark.parametrize("config", [ScaffoldConfig(), FedDynConfig(alpha=2.0)], ids=["scaffold", "feddyn"])
def test_the_clients_paths_are_walked_beside_the_model(config: ServerOptimizerConfig) -> None:
    rule = SERVER_OPTIMIZERS.build(config, local_steps=2)
    assert isinstance(rule, ControlVariates)
    c = np.array([[[1.0, -1.0]], [[0.5, 2.0]]], np.float32)
    record = ScalarRecord(round=0, lr=0.25, owners=(0, 1), coefficients=c, directions=SHARED)

    ends = dict(end_models(rule, Still(np.ones(6)), np.zeros((3, 6), np.float32), record, run_seed=SEED))

    assert not np.array_equal(ends[0], ends[1])


@pytest.mark.parametrize("config", [ScaffoldConfig(), FedDynConfig(lr=1e-4)], ids=["scaffold", "feddyn"])
def test_a_round_without_a_learning_rate_moves_nothing(config: ServerOptimizerConfig) -> None:
    rule = SERVER_OPTIMIZERS.build(config, local_steps=1)
    space = VectorSpace(np.ones(4, np.float32))
    moments = np.arange(12, dtype=np.float32).reshape(3, 4)
    c = np.ones((2, 1, 2), np.float32)

    rule.apply(
        space, moments, ScalarRecord(round=0, lr=0.0, owners=(0, 1), coefficients=c, directions=SHARED), run_seed=1
    )

    assert space.theta.tolist() == [1] * 4
    assert moments.ravel().tolist() == list(range(12))


def test_momentum_is_fedavgm_on_the_clients_mean_displacement() -> None:
    """FedAvgM (arXiv 1909.06335): v <- beta v + mean_k (x - y_k), x <- x - v, with each client's y_k walked apart."""
    problem, lr, beta, steps = Quadratics(6, 4), 0.05, 0.8, 4
    x, v = problem.theta0.astype(np.float64), np.zeros(6)
    for r in range(6):
        ends = []
        for k in range(4):
            y = x.copy()
            for t in range(steps):
                y = y - lr * sum(problem.slope(k, y, z) * z.astype(float) for z in zs(6, r, t, 2)) / 2
            ends.append(y)
        v = beta * v + (x - np.mean(ends, axis=0))
        x = x - v

    space, _, _ = federate(problem, MomentumConfig(lr=lr, momentum=beta), [[0, 1, 2, 3]] * 6, steps=steps, probes=2)

    assert space.theta == pytest.approx(x, rel=2e-5, abs=2e-5)


@pytest.mark.parametrize("config", [ScaffoldConfig(), FedDynConfig(alpha=2.0)], ids=["scaffold", "feddyn"])
def test_a_step_without_any_scalar_moves_nothing(config: ServerOptimizerConfig) -> None:
    rule = SERVER_OPTIMIZERS.build(config, local_steps=1)
    assert isinstance(rule, ControlVariates)
    space, start = VectorSpace(np.ones(4, np.float32)), np.zeros(4, np.float32)
    drift = rule.drift(start, np.arange(12, dtype=np.float32).reshape(3, 4), 1, lr=0.5)

    local_step(space, lr=0.5, c=np.zeros(2, np.float32), keys=[1, 2], drift=drift)

    assert space.theta.tolist() == [1] * 4


def test_scaffold_remembers_the_mean_of_the_steps_that_were_taken() -> None:
    """Client 0 loses all probes but those of its first step; client 1 loses all of them and remembers what it did."""
    rule, lr = SERVER_OPTIMIZERS.build(ScaffoldConfig(), local_steps=1), 0.25
    space, moments = VectorSpace(np.zeros(6, np.float32)), np.zeros((3, 6), np.float32)
    moments[2] = 7
    moments[0] = 3.5
    c = np.zeros((4, 1, 2), np.float32)
    c[0, 0, 0] = 2.0

    record = ScalarRecord(round=0, lr=lr, owners=(0, 1), coefficients=c, directions=SHARED)
    rule.apply(space, moments, record, run_seed=SEED)

    estimate = 2.0 * zs(6, 0, 0, 1)[0]
    assert moments[1] == pytest.approx(estimate, rel=1e-5)
    assert moments[2].tolist() == [7] * 6
    assert space.theta == pytest.approx(-lr * (estimate + 3.5) / 2, rel=1e-5)  # client 1 did not move


LR, STEPS, GRADIENT = 2.0**-6, 5, 3.0


@pytest.mark.parametrize(
    ("config", "length"),
    [
        (SgdConfig(), LR * STEPS * GRADIENT),
        (ScaffoldConfig(), LR * STEPS * GRADIENT),
        (MomentumConfig(), 10 * LR * STEPS * GRADIENT),
        (MomentumConfig(momentum=0.75), LR * STEPS * GRADIENT / (1 - 0.75)),
        (MomentumConfig(momentum=0.75, nesterov=True), LR * STEPS * GRADIENT / (1 - 0.75)),
        (AdamConfig(), LR),
        (FedDynConfig(alpha=2.0), GRADIENT / 2),
        (FedDynConfig(), 2 * LR * STEPS * GRADIENT),
    ],
)
def test_settled_steps_are_as_long_as_the_docs_say(config: ServerOptimizerConfig, length: float) -> None:
    """Of a gradient that never changes. With a single value, c = gradient / z makes every estimate exact."""
    rule = SERVER_OPTIMIZERS.build(config, local_steps=STEPS)
    space, moments = VectorSpace(np.zeros(1, np.float32)), np.zeros((rule.num_moments(1), 1), np.float32)
    owner = 0 if isinstance(rule, ControlVariates) else SHARED
    for r in range(100):
        before = space.values()
        c = np.array([[[GRADIENT / zs(1, r, t, 1)[0][0]]] for t in range(STEPS)], np.float32)
        record = ScalarRecord(round=r, lr=LR, owners=(owner,), coefficients=c, directions=SHARED)
        rule.apply(space, moments, record, run_seed=SEED)

    assert float(before[0] - space.theta[0]) == pytest.approx(length, rel=1e-3)


@pytest.mark.parametrize("schedule", list(Schedule))
def test_feddyn_of_alpha_0_takes_twice_the_step_of_the_mean(schedule: Schedule) -> None:
    """Of a gradient that never changes, once its memory has settled; both rules see the same directions and rates."""
    n, steps, rounds = 4, 10, 80
    slope = np.array([1.0, -2.0, 0.5, 3.0])

    def travelled(config: ServerOptimizerConfig) -> np.ndarray:
        rule = SERVER_OPTIMIZERS.build(config, local_steps=steps)
        space, moments = VectorSpace(np.zeros(n, np.float32)), np.zeros((rule.num_moments(1), n), np.float32)
        places = []
        for r in range(rounds):
            c = np.array([[[slope @ z / 8] for z in zs(n, r, t, 8)] for t in range(steps)], np.float32)
            owner = 0 if isinstance(rule, ControlVariates) else SHARED
            lr = learning_rate(config, round=r, rounds=rounds)
            record = ScalarRecord(round=r, lr=lr, owners=(owner,), coefficients=c, directions=SHARED)
            rule.apply(space, moments, record, run_seed=SEED)
            places.append(space.values())
        return np.array(places[-1] - places[rounds // 2])

    ours, plain = (travelled(each(lr=0.01, schedule=schedule)) for each in (FedDynConfig, SgdConfig))

    assert float(ours @ slope) / float(plain @ slope) == pytest.approx(2.0, abs=0.1)
