"""The learning rate of a round: a pure function of the settings and the round."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from fedzo.zo.server_optimizer.base import ServerOptimizerConfig


class Schedule(StrEnum):
    """Course of the learning rate after its warm-up."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"


def learning_rate(config: ServerOptimizerConfig, *, round: int, rounds: int) -> float:
    """The learning rate of a round, evaluated in float64 and rounded to float32 once.

    Round ``warmup_rounds`` is the first with the full lr; the last round has ``final_lr_share`` of it where the
    schedule is not constant. Only the server evaluates this: the request and the log's record carry the result.

    Args:
        config: Settings of the server optimizer.
        round: From 0.
        rounds: Rounds of the run.

    Returns:
        A float32 value.

    Example:
        >>> from fedzo.zo.server_optimizer import ServerOptimizerConfig
        >>> config = ServerOptimizerConfig(lr=1.0, schedule=Schedule.linear, final_lr_share=0.0, warmup_rounds=1)
        >>> [learning_rate(config, round=r, rounds=6) for r in range(6)]
        [0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if round < config.warmup_rounds:
        share = (round + 1) / (config.warmup_rounds + 1)
    elif config.schedule is Schedule.constant:
        share = 1.0
    else:
        progress = (round - config.warmup_rounds) / max(1, rounds - 1 - config.warmup_rounds)
        falling = 1 - progress if config.schedule is Schedule.linear else (1 + math.cos(math.pi * progress)) / 2
        share = config.final_lr_share + (1 - config.final_lr_share) * falling
    return float(np.float32(config.base_lr * share))
