"""CUSUM: a sequential test of every client, decided anew before each round; it also works at one local step a round.

The CUSUM (Page, Biometrika 41, 1954) sums how far log |g| lies below the others' median, less a drift, and never
falls below 0. The reference is the others and not the client's own first steps, since |g| of all clients falls while
the model learns, which would flag them all in the end; a common factor cancels here. Choices:

- A step counts where at least three clients measured it, and for at most 2: log |g| of an unlucky direction has no
  lower bound.
- A stationary client's shortfall is 0.13 on average among twelve, 0.05 among four (log |g| is skewed), with a spread of
  about 1. The drift of 1 forgives that, and that of a client that stays half as loud as the others, about 0.7: shorter
  texts are no fault.
- A client that has once been above the threshold stays flagged: its few steps say too little to acquit it.

Where the model is common to all at every step (T = 1), a client with one label is not quiet because it has learnt: only
its own path decays. What is found then is the client whose label the common model leans to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from fedzo.errors import Problem, not_negative, positive, problem
from fedzo.fl.server.step_policy.plan import (
    STEP_POLICIES,
    EarlyStop,
    EarlyStopConfig,
    Plan,
    StepPolicyTraits,
    Verdict,
)
from fedzo.fl.server.step_policy.statistics import FEWEST, Numbers, Statistic, cusum, magnitudes, shortfall
from fedzo.records.log import ScalarAuditLine

if TYPE_CHECKING:
    from fedzo.config.schema import RunSettings


@dataclass(kw_only=True, slots=True)
class CusumConfig(EarlyStopConfig):
    """A sequential test before every round: a CUSUM of how far log |g| lies below the others' median."""

    drift: float = 1.0
    """Difference in natural logarithms that is subtracted at every step."""
    threshold: float = 8.0
    """A client whose CUSUM once exceeds this is flagged for the rest of the run."""
    graded: bool = False
    """Set the steps by the strength of the finding: T/2 from the threshold on, T/4 from twice the threshold on, and
    so on. The minimum is ``early_steps``."""

    @property
    def traits(self) -> StepPolicyTraits:
        return StepPolicyTraits(compares_abs_g=True)

    def problems(self, run: RunSettings) -> Iterator[Problem]:
        yield from not_negative("step_policy.drift", self.drift, "1 is the default.")
        yield from positive("step_policy.threshold", self.threshold, "8 is the default.")
        asked = run.strategy.clients_per_round or run.fl.num_clients
        if asked < FEWEST:
            rule = f"give at least {FEWEST} clients a round for step_policy=cusum, which compares each with the others"
            yield problem("fl.num_clients", rule, asked, "Add clients, or choose another step_policy.")


@dataclass(slots=True)
class Cusum:
    """The sums over a log are kept with it, since a log only grows; another log starts them anew."""

    config: CusumConfig
    stop: EarlyStop
    _log: Sequence[ScalarAuditLine] = ()
    _seen: int = 0
    _sums: Numbers = field(default_factory=lambda: np.zeros(0))
    _peaks: Numbers = field(default_factory=lambda: np.zeros(0))

    def plan(self, audit: Sequence[ScalarAuditLine], label_counts: Mapping[int, Mapping[str, int]]) -> Plan:
        if audit is not self._log or len(audit) < self._seen:
            self._log, self._seen = audit, 0
            self._sums, self._peaks = np.zeros(self.stop.num_clients), np.zeros(self.stop.num_clients)
        for number in range(self._seen, len(audit)):
            self._add(audit[number])
        self._seen = len(audit)
        return self.stop(
            {
                client: Verdict(
                    flagged=peak > self.config.threshold,
                    strength=peak / self.config.threshold,
                    statistics={"cusum": peak},
                )
                for client, peak in enumerate(self._peaks.tolist())
            }
        )

    def _add(self, line: ScalarAuditLine) -> None:
        """One round: step by step, those clients that took the step."""
        paths = magnitudes(line, Statistic.abs_g)
        steps = np.full((max(map(len, paths.values()), default=0), self.stop.num_clients), np.nan)
        for client, path in paths.items():
            steps[: len(path), client] = path
        for step in steps:
            self._sums = cusum(self._sums, shortfall(step), drift=self.config.drift)
            self._peaks = np.maximum(self._peaks, self._sums)


@STEP_POLICIES.register("cusum", CusumConfig)
def build_cusum(config: CusumConfig, *, num_clients: int, local_steps: int, run_seed: int) -> Cusum:
    """Build the sequential test."""
    return Cusum(config, EarlyStop(config, num_clients, local_steps, graded=config.graded))
