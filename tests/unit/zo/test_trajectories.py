"""Golden trajectories: five rounds of every estimator with every rule, bit for bit; a numeric change is noticed.

A change that is meant rewrites the file and is named under *Numerics* in the changelog:

    PYTHONPATH=. python tests/unit/zo/test_trajectories.py
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from fedzo.testing.vector_space import VectorSpace
from fedzo.zo.directions import SHARED, stream_key
from fedzo.zo.estimator import (
    ESTIMATORS,
    Baseline,
    FzooConfig,
    OneSidedConfig,
    TwoPointConfig,
    ZerothOrderConfig,
    build_estimator,
)
from fedzo.zo.log import ScalarRecord
from fedzo.zo.server_optimizer import (
    SERVER_OPTIMIZERS,
    AdamConfig,
    ControlVariates,
    FedDynConfig,
    MomentumConfig,
    ScaffoldConfig,
    Schedule,
    ServerOptimizerConfig,
    SgdConfig,
    learning_rate,
)
from fedzo.zo.steps import local_step

GOLDEN = Path(__file__).with_name("trajectories_golden.json")
SEED, ROUNDS, PROBES = 5, 5, 3
TARGET = (0.5, -1.25, 2.0, 0.0)
CURVATURE = (1.0, 0.25, 2.0, 0.5)

CONFIGS: dict[str, ZerothOrderConfig] = {
    "two_point": TwoPointConfig(eps=0.01),
    "center": OneSidedConfig(eps=0.01),
    "mean": OneSidedConfig(eps=0.01, baseline=Baseline.mean),
    "leave_one_out": OneSidedConfig(eps=0.01, baseline=Baseline.leave_one_out),
    "fzoo": FzooConfig(eps=0.01),
}
RULES: dict[str, ServerOptimizerConfig] = {
    "sgd": SgdConfig(lr=0.05),
    "sgd_decay_cosine": SgdConfig(lr=0.05, weight_decay=0.5, schedule=Schedule.cosine, warmup_rounds=1),
    "momentum": MomentumConfig(lr=0.05),
    "nesterov_decay": MomentumConfig(lr=0.05, nesterov=True, weight_decay=0.5),
    "adam": AdamConfig(lr=0.05),
    "adam_decay_linear": AdamConfig(lr=0.05, weight_decay=0.5, schedule=Schedule.linear),
}
WALKED: dict[str, ServerOptimizerConfig] = {
    "scaffold": ScaffoldConfig(lr=0.05),
    "feddyn_linear": FedDynConfig(lr=0.05, alpha=2.0, schedule=Schedule.linear),
}
"""Rules that walk every client's steps: two clients of two steps, the second sees -theta / 2."""


def loss(theta: np.ndarray, side: float = 1.0) -> float:
    """A quartic bowl by products and one exact sum: no library's rounding is in it."""
    parts = []
    for x, target, curvature in zip((np.float32(side) * theta).tolist(), TARGET, CURVATURE, strict=True):
        square = (x - target) * (x - target)
        parts += [curvature * square, 0.125 * square * square]
    return math.fsum(parts)


def trajectory(estimator_config: ZerothOrderConfig, rule_config: ServerOptimizerConfig) -> list[str]:
    """theta after each round, as the hexadecimal of its float32 bits, most significant byte first."""
    estimator, rule = build_estimator(estimator_config), SERVER_OPTIMIZERS.build(rule_config, local_steps=1)
    space = VectorSpace(np.zeros(4), distribution=estimator_config.distribution)
    moments = np.zeros((rule.num_moments(1), 4), np.float32)
    rounds = []
    for number in range(ROUNDS):
        keys = [stream_key(SEED, round=number, probe=p) for p in range(PROBES)]
        projections = estimator.estimate(space, lambda: loss(space.theta), keys)
        c = np.array([[[float(projection.g) / PROBES] for projection in projections]], np.float32)
        lr = learning_rate(rule_config, round=number, rounds=ROUNDS)
        record = ScalarRecord(round=number, lr=lr, owners=(SHARED,), coefficients=c)
        rule.apply(space, moments, record, run_seed=SEED)
        rounds.append(space.theta.astype(">f4").tobytes().hex(" ", 4))
    return rounds


def walked_trajectory(rule_config: ServerOptimizerConfig) -> list[str]:
    """As ``trajectory``, with the two-point estimator."""
    estimator, rule = build_estimator(CONFIGS["two_point"]), SERVER_OPTIMIZERS.build(rule_config, local_steps=1)
    assert isinstance(rule, ControlVariates)
    space, moments = VectorSpace(np.zeros(4)), np.zeros((rule.num_moments(2), 4), np.float32)
    rounds = []
    for number in range(ROUNDS):
        lr = learning_rate(rule_config, round=number, rounds=ROUNDS)
        c, start = np.zeros((2, PROBES, 2), np.float32), space.values()
        for client, side in enumerate((1.0, -0.5)):
            space.load(start)
            drift = rule.drift(start, moments, client, lr=lr)
            for t in range(2):
                keys = [stream_key(SEED, round=number, step=t, probe=p) for p in range(PROBES)]
                probes = estimator.estimate(space, lambda side=side: loss(space.theta, side), keys)  # type: ignore[misc]
                c[t, :, client] = [float(projection.g) / PROBES for projection in probes]
                local_step(space, lr=lr, c=c[t, :, client], keys=keys, drift=drift)
        space.load(start)
        record = ScalarRecord(round=number, lr=lr, owners=(0, 1), coefficients=c, directions=SHARED)
        rule.apply(space, moments, record, run_seed=SEED)
        rounds.append(space.theta.astype(">f4").tobytes().hex(" ", 4))
    return rounds


@pytest.mark.parametrize("rule", WALKED)
def test_a_walked_trajectory_is_the_golden_one(rule: str) -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))

    assert walked_trajectory(WALKED[rule]) == golden[f"two_point {rule}"]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("estimator", CONFIGS)
def test_a_trajectory_is_the_golden_one(estimator: str, rule: str) -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))

    assert trajectory(CONFIGS[estimator], RULES[rule]) == golden[f"{estimator} {rule}"]


def test_the_golden_trajectories_are_all_there_and_all_different() -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))

    plain = [f"{estimator} {rule}" for estimator in CONFIGS for rule in RULES]
    assert sorted(golden) == sorted(plain + [f"two_point {rule}" for rule in WALKED])
    assert len({rounds[-1] for rounds in golden.values()}) == len(golden)


def test_every_plugin_has_a_golden_trajectory() -> None:
    scalars = {config_class for _, config_class in ESTIMATORS if issubclass(config_class, ZerothOrderConfig)}
    assert {type(config) for config in CONFIGS.values()} == scalars
    assert {type(config) for config in (*RULES.values(), *WALKED.values())} == {
        config_class for _, config_class in SERVER_OPTIMIZERS
    }


if __name__ == "__main__":
    made = {f"{e} {r}": trajectory(CONFIGS[e], RULES[r]) for e in CONFIGS for r in RULES}
    made |= {f"two_point {r}": walked_trajectory(WALKED[r]) for r in WALKED}
    GOLDEN.write_text(json.dumps(made, indent=0) + "\n", encoding="utf-8")
