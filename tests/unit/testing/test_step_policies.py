"""The check of step policies: ours keep their contract, and broken ones are refused by the rule that they break."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from fedzo.fl.config import FlConfig
from fedzo.fl.server.step_policy import STEP_POLICIES, Plan, StepPolicyConfig
from fedzo.fl.server.step_policy.baselines import NoStepPolicyConfig, OracleConfig, RandomConfig
from fedzo.fl.server.step_policy.cusum import CusumConfig
from fedzo.fl.server.step_policy.plan import Verdict
from fedzo.fl.server.step_policy.vpcs import VpcsConfig
from fedzo.records.log import ScalarAuditLine
from fedzo.testing import check_step_policy
from fedzo.testing.logs import audit_line

CLIENTS, STEPS = range(4), 8
LABEL_COUNTS = {0: {"0": 9}, 1: {"0": 4, "1": 5}, 2: {"1": 8}, 3: {"0": 5, "1": 5}}
OURS: dict[str, StepPolicyConfig] = {
    "none": NoStepPolicyConfig(),
    "random": RandomConfig(num_flagged=2),
    "oracle": OracleConfig(),
    "cusum": CusumConfig(drift=0.1, threshold=0.8),
    "vpcs": VpcsConfig(calibration_steps=STEPS, initial_steps=2, later_steps=2),
}


def scalars(client: int, round: int) -> np.ndarray:
    """Client 0 becomes quiet."""
    g = 1.5 + np.sin(np.arange(2.0 * STEPS) + 3 * client + 7 * round)
    return (g / (1 + (client == 0) * 20 * round)).reshape(STEPS, 2)


LINES = [
    audit_line(
        {client: scalars(client, round) for client in CLIENTS},
        dropped={1: np.ones((STEPS, 2))} if round == 2 else None,
        round=round,
    )
    for round in range(4)
]


@pytest.mark.parametrize("name", OURS)
def test_our_own_decide_by_the_log_alone(name: str) -> None:
    config = OURS[name]

    check_step_policy(
        lambda: STEP_POLICIES.build(config, num_clients=len(CLIENTS), local_steps=STEPS, run_seed=3),
        LINES,
        label_counts=LABEL_COUNTS,
        num_clients=len(CLIENTS),
        max_steps=config.max_steps(FlConfig(num_clients=len(CLIENTS), local_steps=STEPS)),
    )


def test_every_policy_is_checked() -> None:
    assert set(OURS) == {name for name, _ in STEP_POLICIES}


class Faulty:
    """Stops client 0 once its last |g| is small; a fault gets hold of it."""

    def __init__(self) -> None:
        self.calls = 0
        self.most = 0.0

    def plan(self, audit: Sequence[ScalarAuditLine], label_counts: Mapping[int, Mapping[str, int]]) -> Plan:
        size = float(np.abs(audit[-1].clients[0].g).mean()) if audit else math.nan
        return self.stopped(early=size < 0.5, size=size)

    def stopped(self, *, early: bool, size: float = math.nan) -> Plan:
        steps = dict.fromkeys(CLIENTS, STEPS) | ({0: 1} if early else {})
        return Plan(steps, verdicts={0: Verdict(early, statistics={"size": size})})


class CountsItsCalls(Faulty):
    def plan(self, audit: Sequence[ScalarAuditLine], label_counts: Mapping[int, Mapping[str, int]]) -> Plan:
        self.calls += 1
        return self.stopped(early=self.calls > 1)


class CountsRounds(Faulty):
    """As the last one, with two calls a round."""

    def plan(self, audit: Sequence[ScalarAuditLine], label_counts: Mapping[int, Mapping[str, int]]) -> Plan:
        self.calls += 1
        return self.stopped(early=self.calls > 4)


class RemembersTheLargest(Faulty):
    """What a new one has not seen."""

    def plan(self, audit: Sequence[ScalarAuditLine], label_counts: Mapping[int, Mapping[str, int]]) -> Plan:
        size = float(np.abs(audit[-1].clients[0].g).mean()) if audit else 0.0
        self.most = max(self.most, size)
        return self.stopped(early=size < self.most / 2)


class DrawsFromNumpy(Faulty):
    def plan(self, audit: Sequence[ScalarAuditLine], label_counts: Mapping[int, Mapping[str, int]]) -> Plan:
        return self.stopped(early=np.random.random() < 0.5)


class ForgetsClients(Faulty):
    def plan(self, audit: Sequence[ScalarAuditLine], label_counts: Mapping[int, Mapping[str, int]]) -> Plan:
        return Plan({0: 1})


class AsksTooMuch(Faulty):
    def plan(self, audit: Sequence[ScalarAuditLine], label_counts: Mapping[int, Mapping[str, int]]) -> Plan:
        return Plan(dict.fromkeys(CLIENTS, STEPS + len(audit)))


def check(make: type[Faulty]) -> None:
    check_step_policy(make, LINES, label_counts={}, num_clients=len(CLIENTS), max_steps=STEPS)


def test_without_a_fault_it_passes_also_where_a_statistic_is_nan() -> None:
    plans = [Faulty().plan(LINES[:length], {}).steps[0] for length in range(len(LINES) + 1)]

    check(Faulty)

    assert plans == [8, 8, 1, 1, 1]


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (CountsItsCalls, r"asked twice after 0 rounds plan must give the same, got"),
        (CountsRounds, r"the plan after 2 rounds must follow from the log alone, .* a new one"),
        (RemembersTheLargest, r"the plan after 2 rounds must follow from the log alone, .* a new one"),
        (DrawsFromNumpy, r"global generators must be left alone, but numpy's was used"),
        (ForgetsClients, r"plan must give steps of each of the clients 0 to 3, got \{0: 1\}"),
        (AsksTooMuch, r"plan must give whole numbers of steps from 1 to 8, got"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_broken_policies(make: type[Faulty], rule: str) -> None:
    with pytest.raises(AssertionError, match=rule):
        check(make)
