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
from fedzo.zo.config import (
    AdamConfig,
    Baseline,
    EstimatorConfig,
    FzooConfig,
    MomentumConfig,
    OneSidedConfig,
    OptimizerConfig,
    Schedule,
    SgdConfig,
    TwoPointConfig,
)
from fedzo.zo.directions import SHARED, stream_key
from fedzo.zo.estimator import ESTIMATORS
from fedzo.zo.path import RoundRecord
from fedzo.zo.schedule import learning_rate
from fedzo.zo.update_rule import UPDATE_RULES

GOLDEN = Path(__file__).with_name("trajectories_golden.json")
SEED, ROUNDS, PROBES = 5, 5, 3
TARGET = (0.5, -1.25, 2.0, 0.0)
CURVATURE = (1.0, 0.25, 2.0, 0.5)

CONFIGS: dict[str, EstimatorConfig] = {
    "two_point": TwoPointConfig(eps=0.01),
    "center": OneSidedConfig(eps=0.01),
    "mean": OneSidedConfig(eps=0.01, baseline=Baseline.mean),
    "leave_one_out": OneSidedConfig(eps=0.01, baseline=Baseline.leave_one_out),
    "fzoo": FzooConfig(eps=0.01),
}
RULES: dict[str, OptimizerConfig] = {
    "sgd": SgdConfig(lr=0.05),
    "sgd_decay_cosine": SgdConfig(lr=0.05, weight_decay=0.5, schedule=Schedule.cosine, warmup_rounds=1),
    "momentum": MomentumConfig(lr=0.05),
    "nesterov_decay": MomentumConfig(lr=0.05, nesterov=True, weight_decay=0.5),
    "adam": AdamConfig(lr=0.05),
    "adam_decay_linear": AdamConfig(lr=0.05, weight_decay=0.5, schedule=Schedule.linear),
}


def loss(theta: np.ndarray) -> float:
    """A quartic bowl by products and one exact sum: no library's rounding is in it."""
    parts = []
    for x, target, curvature in zip(theta.tolist(), TARGET, CURVATURE, strict=True):
        square = (x - target) * (x - target)
        parts += [curvature * square, 0.125 * square * square]
    return math.fsum(parts)


def trajectory(estimator_config: EstimatorConfig, rule_config: OptimizerConfig) -> list[str]:
    """theta after each round, as the hexadecimal of its float32 bits, most significant byte first."""
    estimator, rule = ESTIMATORS.build(estimator_config), UPDATE_RULES.build(rule_config)
    space = VectorSpace(np.zeros(4), distribution=estimator_config.distribution)
    moments = np.zeros((rule.num_moments, 4), np.float32)
    rounds = []
    for number in range(ROUNDS):
        keys = [stream_key(SEED, round=number, probe=p) for p in range(PROBES)]
        projections = estimator.estimate(space, lambda: loss(space.theta), keys)
        c = np.array([[[float(projection.g) / PROBES] for projection in projections]], np.float32)
        lr = learning_rate(rule_config, round=number, rounds=ROUNDS)
        record = RoundRecord(round=number, lr=lr, owners=(SHARED,), coefficients=c)
        rule.apply(space, moments, record, run_seed=SEED)
        rounds.append(space.theta.astype(">f4").tobytes().hex(" ", 4))
    return rounds


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("estimator", CONFIGS)
def test_a_trajectory_is_the_golden_one(estimator: str, rule: str) -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))

    assert trajectory(CONFIGS[estimator], RULES[rule]) == golden[f"{estimator} {rule}"]


def test_the_golden_trajectories_are_all_there_and_all_different() -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))

    assert sorted(golden) == sorted(f"{estimator} {rule}" for estimator in CONFIGS for rule in RULES)
    assert len({rounds[-1] for rounds in golden.values()}) == len(golden)


def test_every_plugin_has_a_golden_trajectory() -> None:
    assert {type(config) for config in CONFIGS.values()} == {config_class for _, config_class in ESTIMATORS}
    assert {type(config) for config in RULES.values()} == {config_class for _, config_class in UPDATE_RULES}


if __name__ == "__main__":
    made = {f"{e} {r}": trajectory(CONFIGS[e], RULES[r]) for e in CONFIGS for r in RULES}
    GOLDEN.write_text(json.dumps(made, indent=0) + "\n", encoding="utf-8")
