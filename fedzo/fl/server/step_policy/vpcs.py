"""VPCS: virtual-path client step policy, a calibration round and a test of each client's path (Meerkat-vp, 2506.03337).

From the paper: a calibration, the ratio of the initial and the later phase's means, the share of quiet steps, one step
a round for clients that are taken for extreme. Ours, since neither its text nor its code was found: every threshold and
length; that both tests must speak against a client; |g| in the place of GradIP, which with one probe a step is g times
a number that depends on the seed alone, so that it adds noise and nothing of the client; and the level test.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedzo.errors import ConfigError
from fedzo.fl.server.step_policy.config import Combine, Statistic, VpcsConfig, VpcsTest
from fedzo.fl.server.step_policy.plan import STEP_POLICIES, EarlyStop, Plan, Verdict
from fedzo.fl.server.step_policy.statistics import Numbers, level, magnitudes, mean, quiet_share, ratio
from fedzo.records.log import AuditLine

log = logging.getLogger(__name__)
NO_GRADIENT = (
    "step_policy.statistic=gradip must find a gradient at the server to compare with, but the trainer made none. Use "
    "trainer=meerkat with a mask of trainer.selector=sensitivity, or step_policy.statistic=abs_g."
)


@dataclass(slots=True)
class Vpcs:
    """Round 0 measures; what it finds holds for the rest of the run, and is kept with the line that it was read off."""

    config: VpcsConfig
    stop: EarlyStop
    _found: tuple[AuditLine, Plan] | None = None

    def plan(self, audit: Sequence[AuditLine], label_counts: Mapping[int, Mapping[str, int]]) -> Plan:
        config = self.config
        if not audit:
            return Plan(dict.fromkeys(range(self.stop.num_clients), config.calibration_steps), calibration=True)
        if self._found is None or self._found[0] is not audit[0]:
            self._found = audit[0], self._decide(audit[0])
        return self._found[1]

    def _decide(self, calibration: AuditLine) -> Plan:
        config = self.config
        if config.statistic is Statistic.gradip and calibration.xi is None:
            raise ConfigError(NO_GRADIENT)
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
                    "step_policy=vpcs: the test %s could not be made of %s: the calibration has too few values, of "
                    "the client or of the clients that it is compared with. A test that was not made flags no client.",
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
