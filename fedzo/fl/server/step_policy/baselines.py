"""What a step policy is compared with: nobody stops early, clients drawn at random, and one who knows the labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedzo.fl.server.step_policy.config import NoStepPolicyConfig, OracleConfig, RandomConfig
from fedzo.fl.server.step_policy.plan import STEP_POLICIES, EarlyStop, Plan, Verdict
from fedzo.records.log import AuditLine
from fedzo.zo.directions import PURPOSE_SELECTION, permutation, stream_key


@dataclass(frozen=True, slots=True)
class Everyone:
    """All clients take all local steps."""

    num_clients: int
    local_steps: int

    def plan(self, audit: Sequence[AuditLine], label_counts: Mapping[int, Mapping[str, int]]) -> Plan:
        return Plan(dict.fromkeys(range(self.num_clients), self.local_steps))


@dataclass(frozen=True, slots=True)
class Random:
    """The first of a permutation of the clients that the run seed gives."""

    chosen: frozenset[int]
    stop: EarlyStop

    def plan(self, audit: Sequence[AuditLine], label_counts: Mapping[int, Mapping[str, int]]) -> Plan:
        return self.stop({client: Verdict(client in self.chosen) for client in range(self.stop.num_clients)})


@dataclass(frozen=True, slots=True)
class Oracle:
    """By the label counts that clients declared; no real federation should have to know them."""

    config: OracleConfig
    stop: EarlyStop

    def plan(self, audit: Sequence[AuditLine], label_counts: Mapping[int, Mapping[str, int]]) -> Plan:
        verdicts = {}
        for client, counts in sorted(label_counts.items()):
            share = max(counts.values(), default=0) / max(sum(counts.values()), 1)
            verdicts[client] = Verdict(share >= self.config.label_share, statistics={"label_share": share})
        return self.stop(verdicts)


@STEP_POLICIES.register("none", NoStepPolicyConfig)
def everyone(config: NoStepPolicyConfig, *, num_clients: int, local_steps: int, run_seed: int) -> Everyone:
    """Build the absence of a step_policy."""
    return Everyone(num_clients, local_steps)


@STEP_POLICIES.register("random", RandomConfig)
def random(config: RandomConfig, *, num_clients: int, local_steps: int, run_seed: int) -> Random:
    """Draw the clients."""
    order = permutation(stream_key(run_seed, round=0), num_clients, purpose=PURPOSE_SELECTION)
    chosen = frozenset(order[: config.num_flagged].tolist())
    return Random(chosen, EarlyStop(config, num_clients, local_steps))


@STEP_POLICIES.register("oracle", OracleConfig)
def oracle(config: OracleConfig, *, num_clients: int, local_steps: int, run_seed: int) -> Oracle:
    """Build the one who knows the labels."""
    return Oracle(config, EarlyStop(config, num_clients, local_steps))
