"""The rules that types cannot say. Every broken rule is reported, never only the first.

A plugin's rules are in its config class, and what its traits allow is in ``fedzo.config.trait_rules``. Here are those
of the parts that are no plugins.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

from fedzo.config import trait_rules
from fedzo.config.plugins import LISTS, list_classes, option_of, plugin_classes, plugin_name
from fedzo.config.schema import LaunchConfig, RunConfig, RunSettings, SiteConfig, SiteFile
from fedzo.config.task_rules import task_problems
from fedzo.data.config import SplitConfig
from fedzo.data.sources import EMBEDDED
from fedzo.errors import Problem, at_least, positive, problem, unsigned_64
from fedzo.evaluate.base import LABEL_COUNTS, LOSS, NONE, PER_CLASS, STAGE_FIGURES, metric_names
from fedzo.fl.config import Aggregation, Directions, FaultsConfig, FlConfig, SiteLimitsConfig, Weighting, keeps_columns
from fedzo.fl.server.shares import num_trimmed
from fedzo.records.fields import HASH, MAX_CLIENTS, MAX_OWNERS, MAX_ROUNDS, MAX_STEPS
from fedzo.registry import broken_rules, problems_of
from fedzo.system import MAX_THREADS

MAX_ROWS, MAX_SCALARS = 1 << 16, 1 << 20
"""Rows of a step, and scalars of a client in a round: what a configuration from elsewhere may ask memory for."""


def launch_problems(config: LaunchConfig, *, trains: bool = True) -> list[Problem]:
    """Every broken rule that shows in a command line alone, on any machine; without ``trains``, of a model's use."""
    return [
        *site_problems(config, config, trains=trains),
        *([] if config.runtime.traits.has_sites else rows_problems(config, config)),
        *([] if config.runtime.traits.has_sites else stage_problems(config, config)),
        *run_problems(config),
        *problems_of(config.trainer.input_problems(config.inputs, config), by=config.trainer, method="input_problems"),
        *broken_rules(config.runtime, config),
        *trait_rules.runtime_problems(config),
    ]


def site_problems(site: SiteConfig, run: RunSettings, *, trains: bool = True) -> Iterator[Problem]:
    """Broken rules on how one machine takes part in a run; ``trains``: and on what it can train of its model."""
    yield from _machine(site)
    yield from _model(site, run)
    yield from broken_rules(site.rewriter, run)
    if trains:
        yield from trait_rules.dtype_problems(site, run)
        yield from trait_rules.quantization_problems(site, run)
        yield from trait_rules.compile_problems(site, run)


def site_file_problems(site: SiteFile) -> Iterator[Problem]:
    """Every broken rule that shows in a site's file alone, whatever the run."""
    yield from _machine(site)
    yield from _limits(site.limits)


def rows_problems(site: SiteConfig, run: RunSettings) -> Iterator[Problem]:
    """Broken rules on where a machine that plays clients has their rows from."""
    if site.data.path is not None:
        return
    if run.partition.traits.own_rows:
        remedy = "Write data.path=<file or folder>, in which {client} stands for the client's index."
        yield problem("data.path", f"be given for {option_of(run, 'partition')}", None, remedy)
    elif run.task.name not in EMBEDDED:
        rule = f"be given for the task {run.task.name!r} (only {', '.join(EMBEDDED)} is embedded)"
        yield problem("data.path", rule, None, "Write data.path=<folder or file with the rows>.")


def stage_problems(site: SiteConfig, run: RunSettings) -> Iterator[Problem]:
    """What a machine that plays clients lacks for the run's stages."""
    for stage in run.preprocess.values():
        yield from problems_of(stage.site_problems(site.rewriter), by=stage, method="site_problems")


def run_problems(config: RunSettings) -> Iterator[Problem]:
    """Broken rules on what all peers of a run agree on."""
    yield from _groups(config)
    yield from unsigned_64("seed", config.seed)
    yield from task_problems(config)
    yield from _split(config.split)
    yield from broken_rules(config.partition, config)
    yield from trait_rules.partition_problems(config)
    yield from broken_rules(config.trainer, config)
    for group in LISTS:
        for plugin in getattr(config, group, {}).values():  # trackers are of the launch alone
            yield from broken_rules(plugin, config)
    yield from broken_rules(config.estimator, config)
    yield from trait_rules.gradient_problems(config)
    yield from trait_rules.score_problems(config)
    yield from broken_rules(config.server_optimizer, config)
    yield from trait_rules.server_optimizer_problems(config)
    yield from _fl(config)
    yield from _faults(config.faults, config.fl)
    yield from _strategy(config)
    yield from broken_rules(config.step_policy, config)
    yield from trait_rules.step_policy_problems(config)
    yield from _aggregation(config)
    yield from _evaluation(config)
    if isinstance(config, RunConfig):
        yield from _digests(config)


def missing_here(config: LaunchConfig) -> list[Problem]:
    """Files that a command line names and this machine does not have, and what its plugins lack here."""
    own = config.partition.traits.own_rows and config.data.path is not None
    paths = own_paths(config.data.path or "", config.fl.num_clients) if own else [config.data.path]
    named = [("data.path", path, "Give the folder or file with the rows.") for path in paths]
    if config.model.name.startswith(("/", "./", "../", "~")):
        named.append(("model.name", config.model.name, "Give a model folder, or a hub name."))
    named.append(("inputs.artifact", config.inputs.artifact, "Make a mask with `fedzo mask --out FILE`."))
    named.append(("inputs.calibration", config.inputs.calibration, "Give the calibration text."))
    found = [
        problem(key, "name something that exists", path, remedy)
        for key, path, remedy in named
        if path is not None and not Path(path).expanduser().exists()
    ]
    found += problems_of(config.rewriter.missing(), by=config.rewriter, method="missing")
    return [*found, *problems_of(config.runtime.missing(), by=config.runtime, method="missing")]


def own_paths(path: str, num_clients: int) -> list[str]:
    """Where each client's own rows lie; one path where all have the same."""
    clients = range(num_clients) if "{client}" in path else range(1)
    return [path.replace("{client}", str(client)) for client in clients]


# --- of the site


def _machine(config: SiteConfig) -> Iterator[Problem]:
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?|mps", config.device):
        yield problem(
            "device", "be auto, cpu, cuda, cuda:<index> or mps", config.device, "auto chooses the best device."
        )
    if not 0 <= config.threads <= MAX_THREADS:
        remedy = "0 means OMP_NUM_THREADS, or all CPUs."
        yield problem("threads", f"be between 0 and {MAX_THREADS}", config.threads, remedy)
    yield from at_least("artifact_max_bytes", config.artifact_max_bytes, 1, "2147483648 (2 GiB) is usual.")


def _limits(limits: SiteLimitsConfig) -> Iterator[Problem]:
    metrics, all_told = metric_names()
    numbers = [NONE, LOSS, *metrics, PER_CLASS, LABEL_COUNTS, STAGE_FIGURES]
    for key, known in (
        ("trainers", sorted(plugin_classes()["trainer"])),
        ("estimators", sorted(plugin_classes()["estimator"])),
        ("stages", sorted(list_classes()["preprocess"])),
        ("answers", numbers if all_told else [*numbers, *limits.answers]),  # a name may be of who did not tell
    ):
        for name in getattr(limits, key):
            if name not in known:
                remedy = "Correct the name, or install the plugin that has it."
                yield problem(f"limits.{key}", f"hold names of {', '.join(known)} only", name, remedy)
    if NONE in limits.answers and len(limits.answers) > 1:
        yield problem("limits.answers", f"hold {NONE} alone", limits.answers, f"Leave {NONE} out, or all others.")
    if limits.base_digest and not HASH.fullmatch(limits.base_digest):
        remedy = "Copy base.weights_digest of the run, or leave it empty."
        yield problem("limits.base_digest", "be a SHA-256 of 64 hexadecimal digits", limits.base_digest, remedy)
    for key in ("max_steps", "max_rows", "max_probes", "min_rows"):
        yield from at_least(f"limits.{key}", getattr(limits, key), 0, "0 means no limit.")
    yield from positive("limits.step_limit_s", limits.step_limit_s, "Write seconds.")


def _model(site: SiteConfig, run: RunSettings) -> Iterator[Problem]:
    model, longest = site.model, run.task.max_length
    if not model.name.strip():
        yield problem("model.name", "be a hub name or a local folder", model.name, "Write model=<name or folder>.")
    if 0 != model.tokens_per_batch < longest:
        rule = f"be >= task.max_length ({longest}), so that one sequence fits"
        remedy = "Raise it, write 0 for as many as suit the device, or lower task.max_length."
        yield problem("model.tokens_per_batch", rule, model.tokens_per_batch, remedy)
    yield from at_least("model.lower_layers_cache_mb", model.lower_layers_cache_mb, 0, "0 keeps no rows.")
    if model.lower_layers_cache_mb and not model.reuse_lower_layers:
        rule = "be true where rows are kept (model.lower_layers_cache_mb > 0)"
        yield problem("model.reuse_lower_layers", rule, False, "Write model.lower_layers_cache_mb=0, or true here.")


# --- of the run


def _digests(config: RunConfig) -> Iterator[Problem]:
    digests = {
        "base.weights_digest": config.base.weights_digest,
        "base.tokenizer_digest": config.base.tokenizer_digest,
        "base.architecture_digest": config.base.architecture_digest,
        "artifact": config.artifact,
    }
    for key, digest in digests.items():
        if not HASH.fullmatch(digest):
            yield problem(key, "be a SHA-256 of 64 hexadecimal digits", digest, "Only fedzo writes it.")


def _groups(config: RunSettings) -> Iterator[Problem]:
    for group, options in plugin_classes().items():
        if not hasattr(config, group):
            continue  # of the launch alone
        chosen = getattr(config, group)
        if plugin_name(group, chosen) is None:
            names = ", ".join(sorted(options))
            yield problem(group, f"be one of {names}", type(chosen).__name__, f"Write {group}=<option>.")


def _split(split: SplitConfig) -> Iterator[Problem]:
    yield from at_least("split.num_train", split.num_train, 0, "0 means all rows.")
    yield from at_least("split.num_dev", split.num_dev, 0, "0 means none.")
    yield from at_least("split.num_test", split.num_test, 0, "0 means none.")
    yield from unsigned_64("split.seed", split.seed)


def _fl(config: RunSettings) -> Iterator[Problem]:
    fl = config.fl
    yield from at_least("fl.num_clients", fl.num_clients, 1, "A federation needs a client.")
    yield from at_least("fl.rounds", fl.rounds, 1, "A run needs a round.")
    yield from at_least("fl.local_steps", fl.local_steps, 1, "1 synchronises after every step.")
    for key, count, most in (
        ("fl.rounds", fl.rounds, MAX_ROUNDS),
        ("fl.local_steps", fl.local_steps, MAX_STEPS),
    ):
        if count > most:
            yield problem(key, f"be at most {most}, the maximum of a record of the log", count, "Lower it.")
    if keeps_columns(config) and fl.num_clients > MAX_OWNERS:
        rule = f"be at most {MAX_OWNERS} where the log keeps each client's own scalars"
        yield problem("fl.num_clients", rule, fl.num_clients, "Write fl.directions=shared and server_optimizer=sgd.")
    yield from at_least("fl.batch_size", fl.batch_size, 1, "Write a client's number of rows per step.")
    for key, count, most in (
        ("fl.num_clients", fl.num_clients, MAX_CLIENTS),
        ("fl.batch_size", fl.batch_size, MAX_ROWS),
    ):
        if count > most:
            yield problem(key, f"be at most {most}", count, "Lower it.")
    numbers = max(1, config.estimator.probes_per_step)  # of a step: its scalars, or the loss beside a vector
    if (scalars := config.step_policy.max_steps(fl) * numbers) > MAX_SCALARS:
        rule = f"make at most {MAX_SCALARS} scalars of a client in a round"
        yield problem("fl.local_steps", rule, scalars, "Lower it.")
    if not 2 <= fl.pool_size < 2**31:
        yield problem("fl.pool_size", "be between 2 and 2**31 - 1", fl.pool_size, "4096 is FedKSeed's.")
    yield from at_least("fl.hash_every", fl.hash_every, 1, "1 compares the full hash every round.")


def _faults(faults: FaultsConfig, fl: FlConfig) -> Iterator[Problem]:
    for entry in faults.absent:
        match = re.fullmatch(r"(\d{1,9})@(\d{1,9})", entry)
        if match is None:
            yield problem(
                "faults.absent", "hold entries '<client>@<round>'", entry, "For example faults.absent=['3@1']."
            )
        elif int(match[1]) >= fl.num_clients or int(match[2]) >= fl.rounds:
            rule = f"name a client below fl.num_clients ({fl.num_clients}) and a round below fl.rounds ({fl.rounds})"
            yield problem("faults.absent", rule, entry, "Both count from 0.")


def _strategy(config: RunSettings) -> Iterator[Problem]:
    strategy, num_clients = config.strategy, config.fl.num_clients
    if not 0 <= strategy.clients_per_round <= num_clients:
        rule = f"be between 0 (all) and fl.num_clients ({num_clients})"
        yield problem(
            "strategy.clients_per_round", rule, strategy.clients_per_round, "Lower it or raise fl.num_clients."
        )
    sampled = strategy.clients_per_round or num_clients
    if not 1 <= strategy.min_replies <= max(sampled, 1):
        rule = f"be between 1 and the clients of a round ({sampled})"
        yield problem("strategy.min_replies", rule, strategy.min_replies, "Lower it, or sample more clients.")
    if strategy.size_cap != 0 and not (math.isfinite(strategy.size_cap) and strategy.size_cap >= 1):
        remedy = "Below 1, most clients would have equal weight. Write strategy.weighting=uniform for that."
        yield problem("strategy.size_cap", "be 0 (no cap) or >= 1 and finite", strategy.size_cap, remedy)
    yield from positive("strategy.deadline_s", strategy.deadline_s, "Write seconds.")
    yield from positive("strategy.startup_s", strategy.startup_s, "Write seconds.")
    yield from positive("strategy.max_abs_g", strategy.max_abs_g, "Choose a large number to refuse nothing.")
    if strategy.clip_factor != 0 and not (math.isfinite(strategy.clip_factor) and strategy.clip_factor > 1):
        remedy = "At 1 or less the bound would shrink from round to round, as clients clip to it. 100 is usual."
        yield problem("strategy.clip_factor", "be 0 (off) or > 1 and finite", strategy.clip_factor, remedy)
    yield from at_least("strategy.clip_rounds", strategy.clip_rounds, 1, "10 is usual.")


def _aggregation(config: RunSettings) -> Iterator[Problem]:
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
    if config.fl.directions is not Directions.shared:
        rule = f"be shared for {chosen}, which compares scalars along the same direction"
        remedy = "Write fl.directions=shared, or strategy.aggregation=mean."
        yield problem("fl.directions", rule, config.fl.directions, remedy)
    if strategy.weighting is not Weighting.uniform:
        rule = f"be uniform for {chosen}, which gives every client equal weight"
        remedy = "Write strategy.weighting=uniform, or strategy.aggregation=mean."
        yield problem("strategy.weighting", rule, strategy.weighting, remedy)


def _evaluation(config: RunSettings) -> Iterator[Problem]:
    evaluation = config.evaluation
    yield from at_least("evaluation.every_rounds", evaluation.every_rounds, 0, "0 scores only at the end.")
    every = evaluation.federated_every_rounds
    yield from at_least("evaluation.federated_every_rounds", every, -1, "0 scores only at the end, -1 never.")
    yield from at_least(
        "evaluation.federated_max_rows", evaluation.federated_max_rows, 1, "It counts rows of a client."
    )
