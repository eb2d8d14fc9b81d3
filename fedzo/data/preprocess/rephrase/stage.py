"""The preprocess stage ``oat_rephrase``: a client's training rows, rewritten before it trains."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from fedzo.data.files import Row
from fedzo.data.preprocess.rephrase.config import OatRephraseConfig
from fedzo.data.preprocess.rephrase.course import counts
from fedzo.data.preprocess.rephrase.rephraser import Rephraser
from fedzo.data.preprocess.rephrase.results import apply_outcomes
from fedzo.data.preprocess.stage import STAGES, StageContext
from fedzo.system import OnProgress

log = logging.getLogger(__name__)


@dataclass(slots=True)
class OatRephrase:
    """Finds the rewritten text of a client's rows, or has it made."""

    rephraser: Rephraser
    _summaries: dict[int, Mapping[str, float]] = field(default_factory=dict)

    @property
    def column(self) -> str:
        """The rewritten column."""
        return self.rephraser.prompts.column

    def apply(self, rows: list[Row], *, client: int, on_progress: OnProgress) -> list[Row]:
        """The rows with rewritten text where there is any.

        Raises:
            ConfigError: The rows or the prompts do not fit.
            EndpointError: The rewriter cannot be used. What it has answered so far is kept.
        """
        if not self._summaries and (said := self.rephraser.kept_of_others(rows)):  # once a run: clients share the store
            log.warning(said)
        outcomes = self.rephraser.outcomes(rows, on_progress) if rows else []
        figures: dict[str, float] = dict(counts(outcomes))
        if (test := self.rephraser.judge_test(outcomes)) is not None:
            figures["judge sensitivity"] = test.sensitivity.share
            figures["judge specificity"] = test.specificity.share
            figures["judge order points"] = test.order_points
        self._summaries[client] = figures
        return apply_outcomes(rows, outcomes)

    def summary(self, client: int) -> Mapping[str, float]:
        """Rows by what became of them, and how the judge did in its test."""
        return self._summaries.get(client, {})


@STAGES.register("oat_rephrase", OatRephraseConfig)
def _oat_rephrase(config: OatRephraseConfig, context: StageContext) -> OatRephrase:
    return OatRephrase(Rephraser(config, context.task, context.rewriter, context.folder))
