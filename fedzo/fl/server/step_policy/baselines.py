"""What a step policy is compared with: nobody stops early, clients drawn at random, and one who knows the labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedzo.errors import Problem, problem
from fedzo.fl.server.step_policy.plan import (
    STEP_POLICIES,
    EarlyStop,
    EarlyStopConfig,
    Plan,
    StepPolicyConfig,
    StepPolicyTraits,
    Verdict,
)
from fedzo.records.log import ScalarAuditLine
from fedzo.zo.directions import PURPOSE_SELECTION, permutation, stream_key

if TYPE_CHECKING:
    from fedzo.config.schema import RunSettings


@dataclass(kw_only=True, slots=True)
class NoStepPolicyConfig(StepPolicyConfig):
    """All clients take all local steps."""

    @property
    def traits(self) -> StepPolicyTraits:
        return StepPolicyTraits(stops_clients=False)


@dataclass(frozen=True, slots=True)
class Everyone:
    """All clients take all local steps."""

    num_clients: int
    local_steps: int

    def plan(self, audit: Sequence[ScalarAuditLine], label_counts: Mapping[int, Mapping[str, int]]) -> Plan:
        return Plan(dict.fromkeys(range(self.num_clients), self.local_steps))


@dataclass(kw_only=True, slots=True)
class RandomConfig(EarlyStopConfig):
    """A baseline that flags clients drawn at random once."""

    num_flagged: int = 1
    """Number of flagged clients, for example as many as another step policy flagged."""

    def problems(self, run: RunSettings) -> Iterator[Problem]:
        if not 1 <= self.num_flagged <= run.fl.num_clients:
            rule = f"be between 1 and fl.num_clients ({run.fl.num_clients})"
            yield problem("step_policy.num_flagged", rule, self.num_flagged, "Lower it or add clients.")


@dataclass(frozen=True, slots=True)
class Random:
    """The first of a permutation of the clients that the run seed gives."""

    chosen: frozenset[int]
    stop: EarlyStop

    def plan(self, audit: Sequence[ScalarAuditLine], label_counts: Mapping[int, Mapping[str, int]]) -> Plan:
        return self.stop({client: Verdict(client in self.chosen) for client in range(self.stop.num_clients)})


@dataclass(kw_only=True, slots=True)
class OracleConfig(EarlyStopConfig):
    """A baseline that flags clients with (nearly) one label, by the label counts that they declared."""

    label_share: float = 0.9
    """A client is flagged if its most frequent label has at least this share of its rows."""

    @property
    def traits(self) -> StepPolicyTraits:
        return StepPolicyTraits(needs_labels=True)

    def problems(self, run: RunSettings) -> Iterator[Problem]:
        if not 0 < self.label_share <= 1:
            remedy = "1 flags clients with a single label only."
            yield problem("step_policy.label_share", "be > 0 and <= 1", self.label_share, remedy)


@dataclass(frozen=True, slots=True)
class Oracle:
    """By the label counts that clients declared; no real federation should have to know them."""

    config: OracleConfig
    stop: EarlyStop

    def plan(self, audit: Sequence[ScalarAuditLine], label_counts: Mapping[int, Mapping[str, int]]) -> Plan:
        verdicts = {}
        for client, counts in sorted(label_counts.items()):
            share = max(counts.values(), default=0) / max(sum(counts.values()), 1)
            verdicts[client] = Verdict(share >= self.config.label_share, statistics={"label_share": share})
        return self.stop(verdicts)


@STEP_POLICIES.register("none", NoStepPolicyConfig)
def everyone(config: NoStepPolicyConfig, *, num_clients: int, local_steps: int, run_seed: int) -> Everyone:
    """Every client takes every step."""
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
