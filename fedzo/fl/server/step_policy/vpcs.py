"""VPCS: virtual-path client selection, a calibration round and a test of each client's path (Meerkat-vp, 2506.03337).

From the paper: a calibration, the ratio of the initial and the later phase's means, the share of quiet steps, one step
a round for clients that are taken for extreme. Ours, since neither its text nor its code was found: every threshold and
length; that both tests must speak against a client; absolute values; that the calibration's steps are given up and its
decision stands; |g| in the place of GradIP, which with one probe a step is g times a number that depends on the seed
alone, so that it adds noise and nothing of the client; the level test; and ``max_share``, above which nobody is stopped
early and all take fewer steps.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np

from fedzo.errors import ConfigError, Problem, positive, problem
from fedzo.fl.config import FlConfig
from fedzo.fl.server.step_policy.plan import (
    STEP_POLICIES,
    EarlyStop,
    EarlyStopConfig,
    Plan,
    StepPolicyTraits,
    Verdict,
)
from fedzo.fl.server.step_policy.statistics import (
    FEWEST,
    Numbers,
    Statistic,
    level,
    magnitudes,
    mean,
    quiet_share,
    ratio,
)
from fedzo.records.fields import MAX_STEPS
from fedzo.records.log import ScalarAuditLine

if TYPE_CHECKING:
    from fedzo.config.schema import RunSettings


log = logging.getLogger(__name__)


def _remedy() -> str:
    from fedzo.trainers import named_with  # which imports transformers, for no more than these words

    able = named_with(lambda traits: traits.gradient)
    use = [
        f"{name} with {traits.gradient_setting}" if traits.gradient_setting else name for name, traits in able.items()
    ]
    return f"Use {', '.join([*use, 'or step_policy.statistic=abs_g'])}."


def _no_gradient() -> ConfigError:
    return ConfigError(
        "step_policy.statistic=gradip must find a gradient at the server to compare with, but the trainer made none. "
        + _remedy()
    )


class VpcsTest(StrEnum):
    """What speaks for a client being extreme."""

    ratio = "ratio"
    """The mean of the initial phase over that of the later phase is above ``ratio_threshold``."""
    quiet = "quiet"
    """The share of the later phase's steps below sigma is above ``quiet_threshold``."""
    level = "level"
    """The others' median of the later phase over the client's own mean is above ``level_threshold``."""


class Combine(StrEnum):
    """How ratio and quiet are combined; level, where it is chosen, flags alone."""

    both = "both"
    """Both tests must flag the client. A test that is not in ``tests`` is ignored."""
    either = "either"


@dataclass(kw_only=True, slots=True)
class VpcsConfig(EarlyStopConfig):
    """VPCS: round 0 finds extreme clients and does not move the model (Meerkat-vp, arXiv 2506.03337)."""

    calibration_steps: int = 100
    """Local steps of every client in round 0, at ``server_optimizer.lr``."""
    initial_steps: int = 20
    """Length of the initial phase."""
    later_steps: int = 20
    """Length of the later phase, at the end."""
    statistic: Statistic = Statistic.abs_g
    tests: list[VpcsTest] = field(default_factory=lambda: list(VpcsTest))
    """Which tests are made; flagged = (ratio ``combine`` quiet) or level."""
    combine: Combine = Combine.both
    ratio_threshold: float = 3.0
    """``ratio`` flags a client if its initial mean / its later mean exceeds this."""
    quiet_threshold: float = 0.5
    """``quiet`` flags a client if its share of steps below sigma exceeds this."""
    sigma_share: float = 0.1
    """sigma is this share of the median over clients of the initial phase's mean."""
    level_threshold: float = 2.0
    """``level`` flags a client if the others' median / its own mean exceeds this."""
    graded: bool = False
    """Set the steps by the strength of the finding: T/2 from the threshold on, T/4 from twice the threshold on, and
    so on. The minimum is ``early_steps``."""

    @property
    def traits(self) -> StepPolicyTraits:
        return StepPolicyTraits(compares_abs_g=True)

    def problems(self, run: RunSettings) -> Iterator[Problem]:
        for key in ("initial_steps", "later_steps"):
            if getattr(self, key) < 1:
                yield problem(f"step_policy.{key}", "be >= 1", getattr(self, key), "20 is the default.")
        least = max(self.initial_steps, 1) + max(self.later_steps, 1)
        if not least <= self.calibration_steps <= MAX_STEPS:
            rule = f"be between initial_steps + later_steps ({least}) and {MAX_STEPS}"
            yield problem("step_policy.calibration_steps", rule, self.calibration_steps, "100 is the default.")
        for key in ("ratio_threshold", "quiet_threshold", "sigma_share", "level_threshold"):
            yield from positive(f"step_policy.{key}", getattr(self, key), "Leave it out for the default.")
        if self.quiet_threshold >= 1:
            remedy = "A client is flagged above this share of steps."
            yield problem("step_policy.quiet_threshold", "be below 1", self.quiet_threshold, remedy)
        if not self.tests:
            yield problem("step_policy.tests", "name a test", [], "Choose among ratio, quiet and level.")
        if set(self.tests) == {VpcsTest.level} and run.fl.num_clients < FEWEST:
            rule = f"be at least {FEWEST} for step_policy.tests=[level], which compares each client with the others"
            yield problem("fl.num_clients", rule, run.fl.num_clients, "Add clients, or another test.")
        if self.statistic is Statistic.gradip and not run.trainer.traits.gradient:
            rule = "be abs_g for a trainer that has no gradient to compare with"
            yield problem("step_policy.statistic", rule, self.statistic, _remedy())
        if run.server_optimizer.warmup_rounds == 1:
            rule = "not be 1 for step_policy=vpcs, whose calibration takes the place of such a warm-up"
            yield problem("server_optimizer.warmup_rounds", rule, 1, "Write 2 to warm up in round 1, or 0.")

    def max_steps(self, fl: FlConfig) -> int:
        return max(fl.local_steps, self.calibration_steps)

    def check_start(self, fl: FlConfig, *, has_gradient: bool) -> None:
        EarlyStopConfig.check_start(self, fl, has_gradient=has_gradient)
        if self.statistic is Statistic.gradip and not has_gradient:
            raise _no_gradient()
        if fl.rounds == 1:
            log.warning(
                "fl.rounds is 1, and the first round is the calibration: the model will not move. Raise fl.rounds."
            )


@dataclass(slots=True)
class Vpcs:
    """Round 0 measures; what it finds holds for the rest of the run, and is kept with the log that it was read off."""

    config: VpcsConfig
    stop: EarlyStop
    _found: tuple[Sequence[ScalarAuditLine], Plan] | None = None

    def plan(self, audit: Sequence[ScalarAuditLine], label_counts: Mapping[int, Mapping[str, int]]) -> Plan:
        config = self.config
        if not audit:
            return Plan(dict.fromkeys(range(self.stop.num_clients), config.calibration_steps), calibration=True)
        if self._found is None or self._found[0] is not audit:
            self._found = audit, self._decide(audit[0])
        return self._found[1]

    def _decide(self, calibration: ScalarAuditLine) -> Plan:
        config = self.config
        if config.statistic is Statistic.gradip and calibration.xi is None:
            raise _no_gradient()
        ends = config.calibration_steps
        windows = {"initial": (0, config.initial_steps), "later": (ends - config.later_steps, ends)}
        verdicts = judge(magnitudes(calibration, config.statistic), config)
        self._warn_of_unjudged(verdicts)
        return self.stop(verdicts, windows=windows)

    def _warn_of_unjudged(self, verdicts: Mapping[int, Verdict]) -> None:
        """A client that nothing is known of takes all its steps, which would look like a finding."""
        for test in self.config.tests:
            made = {client for client, found in verdicts.items() if not np.isnan(found.statistics[test])}
            if missing := sorted({*range(self.stop.num_clients)} - made):
                log.warning(
                    "step_policy=vpcs: the test %s could not judge %s: the calibration round has too few values, of "
                    "the client or of those that it is compared with. A test without a result flags no client.",
                    test,
                    "any client" if not made else "client " + ", ".join(map(str, missing)),
                )


def judge(paths: Mapping[int, Numbers], config: VpcsConfig) -> dict[int, Verdict]:
    """The verdict on each client of a calibration, from the sizes of its local steps, float64 [T]; all T alike."""
    clients = sorted(paths)
    steps = np.array([paths[client] for client in clients])
    initial = mean(steps[:, : config.initial_steps])
    measured = initial[np.isfinite(initial)]
    sigma = config.sigma_share * float(np.median(measured)) if measured.size else float("nan")
    found = {
        VpcsTest.ratio: ratio(steps, initial=config.initial_steps, later=config.later_steps),
        VpcsTest.quiet: quiet_share(steps, sigma, later=config.later_steps),
        VpcsTest.level: level(steps, later=config.later_steps),
    }
    verdicts = {}
    for row, client in enumerate(clients):
        statistics = {str(test): float(values[row]) for test, values in found.items()}
        strength = evidence(statistics, config)
        verdicts[client] = Verdict(flagged=strength > 1, strength=strength, statistics=statistics)
    return verdicts


def evidence(statistics: Mapping[str, float], config: VpcsConfig) -> float:
    """How strongly the chosen tests speak against a client: above 1 it is flagged.

    Each statistic counts in units of its threshold; "both" is the smaller and "either" the larger of two. So the number
    orders clients as thresholds moved by a common factor would. A statistic that could not be measured counts 0.
    """
    thresholds = {
        VpcsTest.ratio: config.ratio_threshold,
        VpcsTest.quiet: config.quiet_threshold,
        VpcsTest.level: config.level_threshold,
    }
    shares = {test: 0.0 if np.isnan(statistics[test]) else statistics[test] / thresholds[test] for test in config.tests}
    decay = [shares[test] for test in (VpcsTest.ratio, VpcsTest.quiet) if test in shares]
    combined = (min if config.combine is Combine.both else max)(decay, default=0.0)
    return max(combined, shares.get(VpcsTest.level, 0.0))


@STEP_POLICIES.register("vpcs", VpcsConfig)
def vpcs(config: VpcsConfig, *, num_clients: int, local_steps: int, run_seed: int) -> Vpcs:
    """Build VPCS."""
    return Vpcs(config, EarlyStop(config, num_clients, local_steps, graded=config.graded))
