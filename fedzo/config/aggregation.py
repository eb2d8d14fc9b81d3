"""Rules on how a round's scalars become one model, and on what goes with that."""

from __future__ import annotations

import math
from collections.abc import Iterator

from fedzo.config.plugins import plugin_name
from fedzo.config.problem import Problem, problem
from fedzo.config.schema import RunConfig
from fedzo.fl.config import Aggregation, Seeds, Weighting
from fedzo.fl.server.aggregate import num_trimmed
from fedzo.fl.server.step_policy.config import NoStepPolicyConfig
from fedzo.zo.config import FedDynConfig, ScaffoldConfig


def aggregation_problems(config: RunConfig) -> Iterator[Problem]:
    """Broken rules on ``strategy.aggregation``."""
    strategy, asked = config.strategy, config.strategy.clients_per_round or config.fl.num_clients
    if not 0 <= strategy.trim_share < 0.5:
        yield problem("strategy.trim_share", "be >= 0 and < 0.5", strategy.trim_share, "It is cut off at both ends.")
    elif strategy.aggregation is Aggregation.trimmed_mean and num_trimmed(strategy.trim_share, asked) == 0:
        rule = f"cut at least one of the {asked} clients of a round off at each end, so that values are trimmed"
        remedy = "Ask at least 3 clients." if asked < 3 else f"{math.ceil(1000 / asked) / 1000:g} cuts one."
        yield problem("strategy.trim_share", rule, strategy.trim_share, remedy)
    if strategy.aggregation is Aggregation.mean:
        return
    chosen = f"strategy.aggregation={strategy.aggregation}"
    if config.fl.seeds is not Seeds.shared:
        rule = f"be shared for {chosen}, which compares scalars along the same direction"
        yield problem("fl.seeds", rule, config.fl.seeds, "Write fl.seeds=shared, or strategy.aggregation=mean.")
    if strategy.weighting is not Weighting.uniform:
        rule = f"be uniform for {chosen}, which gives every client equal weight"
        remedy = "Write strategy.weighting=uniform, or strategy.aggregation=mean."
        yield problem("strategy.weighting", rule, strategy.weighting, remedy)
    if strategy.aggregation is Aggregation.majority_sign and strategy.clip_factor != 0:
        rule = f"be 0 for {chosen}, which sends only signs"
        yield problem("strategy.clip_factor", rule, strategy.clip_factor, "Write strategy.clip_factor=0.")


def drift_problems(config: RunConfig, server_optimizer: ScaffoldConfig | FedDynConfig) -> Iterator[Problem]:
    """Broken rules on the server optimizers that correct local steps."""
    chosen = "server_optimizer=scaffold" if isinstance(server_optimizer, ScaffoldConfig) else "server_optimizer=feddyn"
    if config.fl.seeds is not Seeds.shared:
        rule = f"be shared for {chosen}, whose log keeps each client's own scalars along shared directions"
        yield problem("fl.seeds", rule, config.fl.seeds, "Write fl.seeds=shared, or another server_optimizer.")
    if config.strategy.weighting is not Weighting.uniform:
        rule = f"be uniform for {chosen}, whose state is an unweighted mean over the clients"
        remedy = "Write strategy.weighting=uniform, or another server_optimizer."
        yield problem("strategy.weighting", rule, config.strategy.weighting, remedy)
    if config.strategy.aggregation is not Aggregation.mean:
        rule = f"be mean for {chosen}, which averages the clients' models and not their scalars"
        remedy = "Write strategy.aggregation=mean, or another server_optimizer."
        yield problem("strategy.aggregation", rule, config.strategy.aggregation, remedy)
    if not isinstance(config.step_policy, NoStepPolicyConfig):
        rule = f"be none for {chosen}, which needs all local steps of every client"
        got = plugin_name("step_policy", config.step_policy)
        yield problem("step_policy", rule, got, "Write step_policy=none, or another server_optimizer.")
    if server_optimizer.weight_decay != 0:
        rule = f"be 0 for {chosen}, whose corrections do not include decay"
        yield problem(
            "server_optimizer.weight_decay",
            rule,
            server_optimizer.weight_decay,
            "Write server_optimizer.weight_decay=0.",
        )
    if isinstance(server_optimizer, FedDynConfig) and not (
        server_optimizer.pull >= 2.0**-126 and server_optimizer.lr * server_optimizer.pull < 1
    ):
        rule = "be >= 0 and make server_optimizer.lr * alpha less than 1, or a step overshoots the round's start"
        yield problem(
            "server_optimizer.alpha", rule, server_optimizer.alpha, "Write 0, which chooses 0.5 / (lr * local steps)."
        )
