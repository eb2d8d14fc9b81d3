"""Server optimizers against pencil and torch's optimizers; ``tests/unit/testing`` has them in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
import torch

from fedzo.errors import ConfigError
from fedzo.registry import Registry
from fedzo.testing import check_server_optimizer
from fedzo.testing.vector_space import VectorSpace
from fedzo.zo.directions import SHARED, direction, stream_key
from fedzo.zo.log import ScalarRecord
from fedzo.zo.server_optimizer import (
    SERVER_OPTIMIZERS,
    Adam,
    AdamConfig,
    ControlVariates,
    Momentum,
    MomentumConfig,
    ServerOptimizer,
    ServerOptimizerConfig,
    ServerOptimizerTraits,
    Sgd,
    build_server_optimizer,
    end_models,
    norm,
    round_direction,
)
from fedzo.zo.server_optimizer.adam import _power
from fedzo.zo.spaces.base import Space, Values
from fedzo.zo.steps import Drift, apply_record

SEED, N = 11, 5
THETA = np.array([1.0, -2.0, 0.5, 3.0, -0.25], np.float32)


def record(round: int, c: object, *, lr: float = 0.125, owners: tuple[int, ...] = (SHARED,)) -> ScalarRecord:
    return ScalarRecord(round=round, lr=float(np.float32(lr)), owners=owners, coefficients=np.asarray(c, np.float32))


LOG = [
    record(0, [[[0.5], [-1.0]], [[2.0], [0.25]]]),
    record(1, [[[1.5, -0.5]]], owners=(2, 5), lr=0.25),
    record(2, [[[0.0]]]),  # every probe was dropped
    record(3, [[[-0.75]]], lr=0.5),
    record(4, [[[3.0]]]),
]


def play(rule: ServerOptimizer, log: list[ScalarRecord]) -> VectorSpace:
    space = VectorSpace(THETA)
    moments = np.zeros((rule.num_moments(1), N), np.float32)
    for each in log:
        rule.apply(space, moments, each, run_seed=SEED)
    return space


def us(log: list[ScalarRecord]) -> list[list[float]]:
    """U of each round, summed in float64 by a loop."""
    made = []
    for each in log:
        total = [0.0] * N
        steps, probes, _ = each.coefficients.shape
        for t in range(steps):
            for p in range(probes):
                for o, owner in enumerate(each.owners):
                    key = stream_key(SEED, round=each.round, step=t, probe=p, owner=owner)
                    z = direction(key, N)
                    total = [total[i] + float(each.coefficients[t, p, o]) * float(z[i]) for i in range(N)]
        made.append(total)
    return made


def test_two_rounds_of_the_heavy_ball_by_hand() -> None:
    z0, z1 = (direction(stream_key(SEED, round=r), N).astype(float) for r in (0, 1))
    log = [record(0, [[[2.0]]], lr=0.5), record(1, [[[4.0]]], lr=0.25)]

    plain = play(Momentum(momentum=0.5, nesterov=False), log)
    nesterov = play(Momentum(momentum=0.5, nesterov=True), log)

    # m: 2 z0, then z0 + 4 z1; Nesterov steps along 3 z0, then 4 z1 + (z0 + 4 z1) / 2
    assert plain.theta == pytest.approx(THETA - z0 - 0.25 * (z0 + 4 * z1), rel=1e-6)
    assert nesterov.theta == pytest.approx(THETA - 1.5 * z0 - 0.25 * (0.5 * z0 + 6 * z1), rel=1e-6)


def test_two_rounds_of_adam_by_hand() -> None:
    z0, z1 = (direction(stream_key(SEED, round=r), N).astype(float) for r in (0, 1))
    log = [record(0, [[[2.0]]], lr=0.5), record(1, [[[4.0]]], lr=0.25)]

    space = play(Adam(beta1=0.5, beta2=0.75, eps=0.0), log)

    # the first step is the sign; then m = z0 / 2 + 2 z1 over 3/4, v = 3/4 z0^2 + 4 z1^2 over 7/16
    second = (z0 / 2 + 2 * z1) / 0.75 / np.sqrt((0.75 * z0**2 + 4 * z1**2) / 0.4375)
    assert space.theta == pytest.approx(THETA - 0.5 * np.sign(z0) - 0.25 * second, rel=2e-6)


@pytest.mark.parametrize(
    ("config", "make"),
    [
        (MomentumConfig(momentum=0.9), lambda p: torch.optim.SGD([p], momentum=0.9)),
        (MomentumConfig(momentum=0.9, nesterov=True), lambda p: torch.optim.SGD([p], momentum=0.9, nesterov=True)),
        (AdamConfig(), lambda p: torch.optim.Adam([p])),
        (AdamConfig(beta1=0.8, beta2=0.9, eps=1e-3), lambda p: torch.optim.Adam([p], betas=(0.8, 0.9), eps=1e-3)),
        (AdamConfig(weight_decay=0.5), lambda p: torch.optim.AdamW([p], weight_decay=0.5)),
    ],
)
def test_a_rule_is_torch_s_optimizer_with_u_for_the_gradient(config: ServerOptimizerConfig, make: object) -> None:
    log = [record(r, [[[math.sin(7 * r) * 2]]], lr=0.05 * (1 + r % 3)) for r in range(30)]
    parameter = torch.nn.Parameter(torch.from_numpy(THETA.copy()))
    reference = make(parameter)  # type: ignore[operator]
    for each, u in zip(log, us(log), strict=True):
        reference.param_groups[0]["lr"] = each.lr
        parameter.grad = torch.tensor(u, dtype=torch.float32)
        reference.step()

    space = play(SERVER_OPTIMIZERS.build(config, local_steps=1), log)

    assert space.theta == pytest.approx(parameter.detach().numpy(), rel=1e-5, abs=1e-5)


def test_decay_is_one_float32_product_before_the_step() -> None:
    log = [record(0, [[[2.0]]], lr=0.1)]
    factor = np.float32(1 - float(np.float32(0.1)) * 0.3)
    shrunk = VectorSpace(THETA * factor)
    apply_record(shrunk, log[0], run_seed=SEED)

    assert play(Sgd(weight_decay=0.3), log).theta.tobytes() == shrunk.theta.tobytes()


def test_u_is_summed_in_float32_one_product_and_one_sum_a_scalar_in_the_logs_order() -> None:
    each = record(0, np.linspace(-3, 3, 12).reshape(2, 3, 2), owners=(1, 4))
    expected = np.zeros(N, np.float32)
    for t in range(2):
        for p in range(3):
            for o, owner in enumerate((1, 4)):
                z = direction(stream_key(SEED, round=0, step=t, probe=p, owner=owner), N)
                expected = expected + each.coefficients[t, p, o] * z

    u = round_direction(VectorSpace(THETA), each, run_seed=SEED)

    assert u.tobytes() == expected.tobytes()


def test_the_elementwise_arithmetic_rounds_after_every_operation() -> None:
    """The same formula with every operation rounded by hand from exact fractions."""

    def rounded(value: Fraction) -> Fraction:
        return Fraction(float(np.float32(float(value)))) if value else value

    log = [record(r, [[[0.7 - 0.3 * r]]], lr=0.3) for r in range(4)]
    lr, mu = Fraction(float(np.float32(0.3))), Fraction(float(np.float32(0.9)))
    theta, m = [Fraction(float(x)) for x in THETA], [Fraction(0)] * N
    for each in log:
        z = direction(stream_key(SEED, round=each.round), N)
        for i in range(N):
            u = rounded(Fraction(float(each.coefficients[0, 0, 0])) * Fraction(float(z[i])))
            m[i] = rounded(rounded(mu * m[i]) + u)
            along = rounded(u + rounded(mu * m[i]))
            theta[i] = rounded(theta[i] - rounded(lr * along))

    space = play(Momentum(momentum=0.9, nesterov=True), log)

    assert space.theta.astype(float).tolist() == [float(x) for x in theta]


def test_powers_are_right_and_made_of_products_only() -> None:
    for base in (0.9, 0.999, 0.5, 0.0):
        for exponent in (1, 2, 3, 17, 1000):
            assert _power(base, exponent) == pytest.approx(base**exponent, rel=1e-14)


@pytest.mark.parametrize(("name", "config_class"), list(SERVER_OPTIMIZERS))
def test_traits_tell_what_the_rule_is(name: str, config_class: type[ServerOptimizerConfig]) -> None:
    config = config_class(lr=0.1)
    rule = SERVER_OPTIMIZERS.build(config, local_steps=1)

    assert config.traits.keeps_moments == (rule.num_moments(3) > 0), name
    assert config.traits.walks_clients == isinstance(rule, ControlVariates), name


@dataclass(kw_only=True, slots=True)
class OddConfig(ServerOptimizerConfig):
    """Traits that are not those of its rule."""

    walks: bool = False
    vectors: bool = True
    moments: bool = False
    remembers: bool = False  # whether its rule keeps moments

    @property
    def traits(self) -> ServerOptimizerTraits:
        return ServerOptimizerTraits(keeps_moments=self.moments, walks_clients=self.walks, takes_vectors=self.vectors)


def test_a_rule_that_is_not_what_its_traits_say_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The traits decide what a run may combine, the methods decide what it does."""
    odd: Registry[ServerOptimizer] = Registry("server_optimizer", base=ServerOptimizerConfig)
    odd.register("odd", OddConfig)(
        lambda config, *, local_steps: Momentum(momentum=0.9, nesterov=False) if config.remembers else Sgd()
    )
    monkeypatch.setattr("fedzo.zo.server_optimizer.base.SERVER_OPTIMIZERS", odd)

    assert isinstance(build_server_optimizer(OddConfig(), local_steps=1), Sgd)
    with pytest.raises(
        ConfigError, match=r"OddConfig\.traits\.takes_vectors must be True, as its optimizer is one of Vector"
    ):
        build_server_optimizer(OddConfig(vectors=False), local_steps=1)
    with pytest.raises(ConfigError, match=r"traits\.walks_clients must be False, as its optimizer is none of ControlV"):
        build_server_optimizer(OddConfig(walks=True), local_steps=1)
    with pytest.raises(ConfigError, match=r"traits\.keeps_moments must be False, as .*num_moments\(1\) is 0, got T"):
        build_server_optimizer(OddConfig(moments=True), local_steps=1)
    with pytest.raises(ConfigError, match=r"traits\.keeps_moments must be True, as .*num_moments\(1\) is 1, got F"):
        build_server_optimizer(OddConfig(vectors=False, remembers=True), local_steps=1)


def test_a_norm_has_the_same_bits_in_every_order() -> None:
    """As a machine may add; a sum that is rounded after each term is another in another order."""
    rng = np.random.default_rng(5)
    vector = (rng.standard_normal(100_000) * 10.0 ** rng.integers(-6, 6, 100_000)).astype(np.float32)
    orders = [vector, vector[::-1], np.sort(vector), *(rng.permutation(vector) for _ in range(3))]

    assert len({norm(each) for each in orders}) == 1
    assert len({float(np.cumsum(each * each)[-1]) for each in orders}) > 1


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_a_norm_is_the_root_of_the_exact_sum_of_squares(scale: float) -> None:
    vector = (direction(3, 300) * np.float32(scale)).astype(np.float32)

    exact = sum(Fraction(float(x)) ** 2 for x in vector)

    assert norm(vector) == math.sqrt(float(exact)) > 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_norm_of_what_is_not_finite_is_not_finite(bad: float) -> None:
    assert not math.isfinite(norm(np.array([1, bad, 2], np.float32)))


class FedProx:
    """FedProx (arXiv 1812.06127) as the guide for authors tells it: a pull to the round's start, and the mean end."""

    def num_moments(self, num_clients: int) -> int:
        return 0

    def drift(self, start: Values, moments: Values, client: int, *, lr: float) -> Drift:
        return Drift(np.zeros_like(start), start=start, pull=0.5)

    def apply(self, space: Space, moments: Values, record: ScalarRecord, *, run_seed: int) -> None:
        total = np.zeros(space.size)
        for _, end in end_models(self, space, moments, record, run_seed=run_seed):
            total += end
        space.load((total / len(record.owners)).astype(np.float32))


def test_what_walks_clients_can_be_written_by_their_drift_and_their_ends() -> None:
    start, c = THETA.astype(np.float64), np.array([[1.0, -2.0], [0.5, 1.5], [-1.0, 0.25]])
    ends = []
    for client in range(2):
        y = start
        for t in range(3):
            z = direction(stream_key(SEED, round=0, step=t), N).astype(np.float64)
            y = y - 0.25 * (c[t, client] * z + 0.5 * (y - start))
        ends.append(y)
    space, scalars = VectorSpace(THETA), c.reshape(3, 1, 2).astype(np.float32)
    told = ScalarRecord(round=0, lr=0.25, owners=(0, 1), coefficients=scalars, directions=SHARED)

    FedProx().apply(space, np.zeros((0, N), np.float32), told, run_seed=SEED)

    assert space.theta == pytest.approx(np.mean(ends, axis=0), rel=1e-5, abs=1e-5)
    check_server_optimizer(FedProx)
