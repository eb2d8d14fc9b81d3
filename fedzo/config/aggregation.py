"""Rules on how a round's scalars become one, and on what goes with it."""

from __future__ import annotations

from collections.abc import Iterator

from fedzo.config.problem import Problem, problem
from fedzo.config.schema import RunConfig
from fedzo.fl.config import Aggregation, Seeds, Weighting


def aggregation_problems(config: RunConfig) -> Iterator[Problem]:
    """Broken rules on ``strategy.aggregation``."""
    strategy = config.strategy
    if not 0 <= strategy.trim_share < 0.5:
        yield problem("strategy.trim_share", "be >= 0 and < 0.5", strategy.trim_share, "It is cut off at both ends.")
    if strategy.aggregation is Aggregation.mean:
        return
    chosen = f"strategy.aggregation={strategy.aggregation}"
    if config.fl.seeds is not Seeds.shared:
        rule = f"be shared for {chosen}, which compares scalars along the same direction"
        yield problem("fl.seeds", rule, config.fl.seeds, "Write fl.seeds=shared, or strategy.aggregation=mean.")
    if strategy.weighting is not Weighting.uniform:
        rule = f"be uniform for {chosen}, where every client has one voice"
        remedy = "Write strategy.weighting=uniform, or strategy.aggregation=mean."
        yield problem("strategy.weighting", rule, strategy.weighting, remedy)
    if strategy.aggregation is Aggregation.majority_sign and strategy.clip_factor != 0:
        rule = f"be 0 for {chosen}, whose signs leave nothing to clip"
        yield problem("strategy.clip_factor", rule, strategy.clip_factor, "Write strategy.clip_factor=0.")
