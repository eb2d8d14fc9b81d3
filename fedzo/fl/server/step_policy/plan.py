"""What a step policy decides, and the part that all step policies share: what happens to those that are flagged."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from fedzo.errors import PluginError, Problem, problem
from fedzo.fl.config import Aggregation, FlConfig
from fedzo.records.log import ScalarAuditLine
from fedzo.records.metrics import ClientVerdict, StepDecision
from fedzo.records.scores import known
from fedzo.registry import PluginConfig, Registry, returned

if TYPE_CHECKING:
    from fedzo.config.schema import RunSettings

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a step policy holds against a client.

    Attributes:
        flagged: Whether the client is taken for extreme.
        strength: How far beyond the threshold, 1 = at it; what a graded stop goes by.
        statistics: The numbers that the verdict rests on; nan where nothing could be measured.
    """

    flagged: bool
    strength: float = 1.0
    statistics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Plan:
    """One round's work.

    Attributes:
        steps: T_k of every client of the run.
        calibration: Whether the round only measures: every client takes part, and the model does not move.
        verdicts: By client; empty where nothing has been decided.
        windows: First and last step (exclusive) of the phases that were compared, where there are phases.
        fallback: Whether too many are flagged, so that all clients take fewer steps instead.
    """

    steps: Mapping[int, int]
    calibration: bool = False
    verdicts: Mapping[int, Verdict] = field(default_factory=dict)
    windows: Mapping[str, tuple[int, int]] | None = None
    fallback: bool = False

    @property
    def flagged(self) -> list[int]:
        """The clients that are taken for extreme, ascending."""
        return [client for client, verdict in sorted(self.verdicts.items()) if verdict.flagged]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPolicyTraits:
    """What the rules on other parts of a run must know of a step policy.

    Attributes:
        stops_clients: Whether some clients may take fewer steps than others.
        compares_abs_g: Whether it compares |g| of steps and clients.
        needs_labels: Whether it reads how many rows of each label a client declared.
    """

    stops_clients: bool = True
    compares_abs_g: bool = False
    needs_labels: bool = False


@dataclass(kw_only=True, slots=True)
class StepPolicyConfig(PluginConfig):
    """Which clients stop early in every round."""

    @property
    def traits(self) -> StepPolicyTraits:
        """What other parts of a run must know of this step policy."""
        return StepPolicyTraits()

    @property
    def normalises(self) -> bool:
        """Whether the mean of a round makes up for unequal steps."""
        return False

    def max_steps(self, fl: FlConfig) -> int:
        """The most local steps that a client takes in one round."""
        return fl.local_steps

    def check_start(self, fl: FlConfig, *, has_gradient: bool) -> None:
        """Look at what shows only once the trainer is prepared.

        Args:
            fl: The federation's settings.
            has_gradient: Whether the server has a gradient of the trained values.

        Raises:
            ConfigError: The policy cannot work with that.
        """


class StepPolicy(Protocol):
    """Decides before every round how many local steps each client takes."""

    def plan(self, audit: Sequence[ScalarAuditLine], label_counts: Mapping[int, Mapping[str, int]]) -> Plan:
        """The plan of round ``len(audit)``: a function of its arguments alone, so a resumed run decides the same.

        Args:
            audit: Audit lines of all committed rounds; the same object in all rounds of a run. A line is read from
                the disk each time that it is asked for, since they do not fit in memory together: take the new ones by
                their numbers.
            label_counts: Rows by label of each client, as declared at registration.
        """
        ...


STEP_POLICIES: Registry[StepPolicy] = Registry("step_policy", base=StepPolicyConfig)
"""Factories ``(config, *, num_clients, local_steps, run_seed) -> StepPolicy``."""


@dataclass(kw_only=True, slots=True)
class EarlyStopConfig(StepPolicyConfig):
    """What happens to flagged clients."""

    early_steps: int = 1
    """Local steps per round of a flagged client. Its next round goes on with its next rows."""
    max_share: float = 0.5
    """Largest share of flagged clients. Above it, no client is stopped early and all clients take
    ``fallback_steps``."""
    normalise: bool = False
    """Whether a client's steps are weighted by the round's mean number of steps / its own number (FedNova). A client
    that stops early then counts in the mean as much as the others do."""
    fallback_steps: int = 0
    """Local steps a round of all clients above ``max_share``. 0 = half of ``fl.local_steps``."""

    @property
    def normalises(self) -> bool:
        return self.normalise

    def problems(self, run: RunSettings) -> Iterator[Problem]:
        if self.normalise and run.strategy.aggregation is not Aggregation.mean:
            rule = "be false unless strategy.aggregation=mean, since others use no weights"
            yield problem("step_policy.normalise", rule, True, "Leave it out, or write strategy.aggregation=mean.")
        most = max(run.fl.local_steps, 1)
        if not 1 <= self.early_steps <= most:
            rule = f"be between 1 and fl.local_steps ({run.fl.local_steps})"
            yield problem("step_policy.early_steps", rule, self.early_steps, "1 is the paper's.")
        if not 0 <= self.fallback_steps <= most:
            rule = f"be between 0 (half) and fl.local_steps ({run.fl.local_steps})"
            remedy = "Lower it, or raise fl.local_steps."
            yield problem("step_policy.fallback_steps", rule, self.fallback_steps, remedy)
        if not 0 <= self.max_share <= 1:
            remedy = "The largest share of flagged clients. 1 sets no limit."
            yield problem("step_policy.max_share", "be between 0 and 1", self.max_share, remedy)

    def check_start(self, fl: FlConfig, *, has_gradient: bool) -> None:
        if fl.local_steps == 1:
            log.warning(
                "fl.local_steps is 1, so no client can stop earlier. The step policy only reports its findings. "
                "Raise fl.local_steps to let it act."
            )


@dataclass(frozen=True, slots=True)
class EarlyStop:
    """From verdicts to steps.

    Attributes:
        config: ``early_steps``, ``max_share`` and ``fallback_steps``.
        num_clients: K.
        local_steps: T of a client that is not stopped early.
        graded: Whether the strength of a verdict counts.
    """

    config: EarlyStopConfig
    num_clients: int
    local_steps: int
    graded: bool = False

    def __call__(
        self, verdicts: Mapping[int, Verdict], *, windows: Mapping[str, tuple[int, int]] | None = None
    ) -> Plan:
        """The plan for these verdicts; a client without one is not stopped."""
        count = sum(verdict.flagged for verdict in verdicts.values())
        fallback = count > round(self.config.max_share * self.num_clients, 9)  # 0.29 * 100 is a little below 29
        steps = dict.fromkeys(range(self.num_clients), self.local_steps)
        if fallback:
            fewer = self.config.fallback_steps or max(1, self.local_steps // 2)
            steps = dict.fromkeys(steps, min(fewer, self.local_steps))
        else:
            steps.update({client: self._steps(verdict) for client, verdict in verdicts.items() if verdict.flagged})
        return Plan(steps, verdicts=verdicts, windows=windows, fallback=fallback)

    def _steps(self, verdict: Verdict) -> int:
        early = min(self.config.early_steps, self.local_steps)
        if not self.graded:
            return early
        halvings = 1 + int(math.log2(min(max(verdict.strength, 1.0), 2.0**30)))
        return max(early, self.local_steps >> halvings)


def news(
    plan: Plan, before: StepDecision | None, *, round: int, last: bool, seconds: float, local_steps: int
) -> StepDecision | None:
    """The plan as a metrics record, if it decides otherwise than the one before, which is also logged.

    In the last round it is also told if only its statistics differ.

    Args:
        plan: Of the coming round.
        before: The last such record; None before the first.
        round: Number of the coming round.
        last: Whether no other round comes.
        seconds: Since the run started.
        local_steps: T of a client that is not stopped early.
    """
    if not plan.verdicts:
        return None
    flagged = set(plan.flagged)
    record = StepDecision(
        seconds=seconds,
        round=round,
        windows=None if plan.windows is None else dict(plan.windows),
        clients=tuple(
            ClientVerdict(
                client=client,
                flagged=client in flagged,
                steps=steps,
                statistics=_plain(plan.verdicts[client].statistics) if client in plan.verdicts else {},
            )
            for client, steps in sorted(plan.steps.items())
        ),
        fallback=plan.fallback,
    )
    if before is None or _decision(record) != _decision(before):
        # a decision against nobody at the start is no news: most step policies begin so
        if flagged or before is not None or plan.windows is not None:
            log.warning("from round %d on: %s", round, describe(plan, local_steps=local_steps))
        return record
    return record if last and record.clients != before.clients else None


def describe(plan: Plan, *, local_steps: int) -> str:
    """The decision in words; ``local_steps`` is T of a client that is not stopped early."""
    if not plan.flagged:
        return "no client is flagged"
    flagged = "flagged: " + ", ".join(map(str, plan.flagged))
    if plan.fallback:
        most = max(plan.steps.values())
        fewer = f"all clients take {most} of {local_steps} steps" if most < local_steps else "nobody takes fewer steps"
        return f"{flagged}; this is more than step_policy.max_share, so {fewer}"
    if all(plan.steps[client] == local_steps for client in plan.flagged):
        return f"{flagged}; they take as many steps as the others"
    return "stopped early: " + ", ".join(
        f"client {client} after step {plan.steps[client]}{_reasons(plan.verdicts[client])}" for client in plan.flagged
    )


def _reasons(verdict: Verdict) -> str:
    known = [f"{name} {value:.3g}" for name, value in verdict.statistics.items() if math.isfinite(value)]
    return f" ({', '.join(known)})" if known else ""


def _plain(statistics: Mapping[str, float]) -> dict[str, float | None]:
    return {name: known(value) for name, value in statistics.items()}


def _decision(record: StepDecision) -> object:
    return record.fallback, [(row.client, row.flagged, row.steps) for row in record.clients]


def checked_plan(
    policy: StepPolicy,
    audit: Sequence[ScalarAuditLine],
    label_counts: Mapping[int, Mapping[str, int]],
    *,
    num_clients: int,
    max_steps: int,
) -> Plan:
    """A step policy's plan, with steps of every client that its clients will take.

    Args:
        policy: The step policy.
        audit: As ``StepPolicy.plan``.
        label_counts: As ``StepPolicy.plan``.
        num_clients: K.
        max_steps: Most local steps of a client in one round; clients refuse more.

    Raises:
        PluginError: It is no plan, or one of other clients or steps.
    """
    plan = returned(policy.plan(audit, label_counts), Plan, by=policy, method="plan")
    steps: Any = plan.steps
    if not isinstance(steps, Mapping) or {*steps} != {*range(num_clients)}:
        raise _broken(policy, f"steps of each of the clients 0 to {num_clients - 1}", steps)
    for number in steps.values():
        if not isinstance(number, int | np.integer) or not 1 <= number <= max_steps:
            raise _broken(policy, f"whole numbers of steps from 1 to {max_steps}", steps)
    return replace(plan, steps={client: int(steps[client]) for client in range(num_clients)})


def _broken(policy: StepPolicy, rule: str, steps: object) -> PluginError:
    name = f"{type(policy).__module__}.{type(policy).__qualname__}"
    return PluginError(f"{name}.plan must give {rule}, got {steps!r:.100}. Correct the step policy.")
