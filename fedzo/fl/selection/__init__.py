"""Which clients stop early in a round, decided from what they measured (``docs/how-to-non-iid.md``)."""

from __future__ import annotations

import logging

from fedzo.errors import ConfigError
from fedzo.fl.config import FlConfig
from fedzo.fl.selection import baselines, cusum, vpcs
from fedzo.fl.selection.config import EarlyStopConfig, SelectionConfig, Statistic, VpcsConfig
from fedzo.fl.selection.plan import SELECTIONS, Plan, Selection
from fedzo.fl.selection.vpcs import NO_GRADIENT

__all__ = ["SELECTIONS", "Plan", "Selection", "baselines", "cusum", "vpcs"]
log = logging.getLogger(__name__)


def most_steps(selection: SelectionConfig, fl: FlConfig) -> int:
    """The most local steps that a client takes in one round."""
    return max(fl.local_steps, selection.calibration_steps) if isinstance(selection, VpcsConfig) else fl.local_steps


def check_selection(selection: SelectionConfig, fl: FlConfig, *, has_gradient: bool) -> None:
    """What shows only once the trainer is prepared.

    Raises:
        ConfigError: GradIP is asked for, and there is no gradient.
    """
    if isinstance(selection, VpcsConfig) and selection.statistic is Statistic.gradip and not has_gradient:
        raise ConfigError(NO_GRADIENT)
    if isinstance(selection, VpcsConfig) and fl.rounds == 1:
        log.warning("fl.rounds is 1, and the first round is the calibration: the model will not move. Raise fl.rounds.")
    if isinstance(selection, EarlyStopConfig) and fl.local_steps == 1:
        log.warning(
            "fl.local_steps is 1, so nobody can stop earlier: the selection reports what it finds and changes nothing. "
            "Raise fl.local_steps to let it act."
        )
