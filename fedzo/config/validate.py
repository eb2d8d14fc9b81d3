"""The rules that types cannot say. Every broken rule is reported, never only the first."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

from fedzo.config.aggregation import aggregation_problems
from fedzo.config.compiling import compile_problems
from fedzo.config.plugins import plugin_classes, plugin_name
from fedzo.config.problem import Problem, at_least, not_negative, positive, problem, unsigned_64
from fedzo.config.schema import RunConfig
from fedzo.config.step_policy import step_policy_problems
from fedzo.config.training import estimator_problems, server_optimizer_problems, trainer_problems
from fedzo.data.config import (
    DirichletConfig,
    DirichletEqualConfig,
    Loss,
    NaturalConfig,
    OwnConfig,
    ShardsConfig,
    TaskConfig,
    TaskKind,
)
from fedzo.fl.config import FaultsConfig, FlConfig, Seeds
from fedzo.fl.server.step_policy.config import OracleConfig
from fedzo.models.config import DType, Quantization
from fedzo.records.fields import MOST_OWNERS, MOST_ROUNDS, MOST_STEPS
from fedzo.runtime.config import InlineConfig, LocalConfig, RayConfig
from fedzo.trainers.config import Calibration, MeerkatConfig, MezoConfig
from fedzo.zo.config import FedDynConfig, ScaffoldConfig

EMBEDDED_TASKS = ("rotten_tomatoes",)
"""Tasks whose rows come with fedzo, so that they need no ``data.path``."""


def problems(config: RunConfig) -> list[Problem]:
    """Every broken rule that shows in the settings alone, on any machine."""
    sections = (
        _run,
        _model,
        compile_problems,
        _task,
        _data,
        _partition,
        trainer_problems,
        estimator_problems,
        server_optimizer_problems,
        _fl,
        _strategy,
        step_policy_problems,
        aggregation_problems,
        _evaluation,
        _runtime,
    )
    return [broken for section in sections for broken in section(config)]


def missing_files(config: RunConfig) -> list[Problem]:
    """Files that the settings name and this machine does not have."""
    own = isinstance(config.partition, OwnConfig) and config.data.path is not None
    paths = own_paths(config.data.path or "", config.fl.num_clients) if own else [config.data.path]
    named = [("data.path", path, "Give the folder or file with the rows.") for path in paths]
    if config.model.name.startswith(("/", "./", "../", "~")):
        named.append(("model.name", config.model.name, "Give a model folder, or a hub name."))
    if isinstance(config.trainer, MeerkatConfig):
        named.append(("trainer.mask_path", config.trainer.mask_path, "Make one with `fedzo mask --out FILE`."))
        named.append(("trainer.calibration_path", config.trainer.calibration_path, "Give the calibration text."))
    return [
        problem(key, "name something that exists", path, remedy)
        for key, path, remedy in named
        if path is not None and not Path(path).expanduser().exists()
    ]


def own_paths(path: str, num_clients: int) -> list[str]:
    """Where each client's own rows lie; one path where all have the same."""
    clients = range(num_clients) if "{client}" in path else range(1)
    return [path.replace("{client}", str(client)) for client in clients]


def _run(config: RunConfig) -> Iterator[Problem]:
    for group, options in plugin_classes().items():
        chosen = getattr(config, group)
        if plugin_name(group, chosen) is None:
            names = ", ".join(sorted(options))
            yield problem(group, f"be one of {names}", type(chosen).__name__, f"Write {group}=<option>.")
    yield from unsigned_64("seed", config.seed)
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?|mps", config.device):
        yield problem(
            "device", "be auto, cpu, cuda, cuda:<index> or mps", config.device, "auto chooses the best device."
        )
    yield from at_least("threads", config.threads, 0, "0 means OMP_NUM_THREADS, or all CPUs.")


def _model(config: RunConfig) -> Iterator[Problem]:
    model = config.model
    if not model.name.strip():
        yield problem("model.name", "be a hub name or a local folder", model.name, "Write model=<name or folder>.")
    yield from at_least("model.max_length", model.max_length, 1, "It counts tokens.")
    if model.tokens_per_batch < model.max_length:
        yield problem(
            "model.tokens_per_batch",
            f"be >= model.max_length ({model.max_length}), so that one sequence fits",
            model.tokens_per_batch,
            "Raise it, or lower model.max_length.",
        )
    if model.dtype is DType.auto and isinstance(config.trainer, MezoConfig):
        rule = "be float32, bfloat16 or float16 for trainer=mezo, whose trained values have this dtype on all peers"
        yield problem("model.dtype", rule, "auto", "Write model.dtype=float32 if in doubt.")
    if model.quantization is not Quantization.none:
        if isinstance(config.trainer, MezoConfig | MeerkatConfig):
            rule = "be none where the model's own weights are trained"
            yield problem("model.quantization", rule, model.quantization, "Train an adapter, as trainer=lora does.")
        if model.gguf_file is not None:
            rule = "be none with model.gguf_file, whose weights are packed in their own way and unpacked when read"
            yield problem("model.quantization", rule, model.quantization, "Name a folder of safetensors.")


def _task(config: RunConfig) -> Iterator[Problem]:
    task = config.task
    if not task.template:
        yield problem("task.template", "not be empty", task.template, "Choose a task=<option>, or write a template.")
    if task.kind is TaskKind.candidates:
        yield from _candidates(task)
    else:
        if not task.answer:
            remedy = "Name the answer's column, as in task.answer='{answer}'."
            yield problem("task.answer", f"not be empty for task.kind={task.kind}", task.answer, remedy)
        if task.loss is Loss.candidates:
            remedy = "Write task.loss=lm."
            yield problem(
                "task.loss", f"be lm for task.kind={task.kind}, which has no candidates", "candidates", remedy
            )
    yield from at_least("task.max_new_tokens", task.max_new_tokens, 1, "It counts generated tokens.")


def _candidates(task: TaskConfig) -> Iterator[Problem]:
    if len(task.candidates) < 2:
        rule = "hold at least 2 answers for task.kind=candidates"
        yield problem("task.candidates", rule, task.candidates, "List the answers in the order of the labels.")
    if task.labels and len(task.labels) != len(task.candidates):
        rule = f"hold one value per candidate ({len(task.candidates)})"
        yield problem("task.labels", rule, task.labels, "Or leave it empty when the column holds indices.")
    if not task.label:
        yield problem(
            "task.label", "name the column of the right answer", task.label, "Set it to a column of the rows."
        )


def _data(config: RunConfig) -> Iterator[Problem]:
    data = config.data
    if data.path is None and config.task.name not in EMBEDDED_TASKS:
        rule = f"be given for the task {config.task.name!r} (only {', '.join(EMBEDDED_TASKS)} is embedded)"
        yield problem("data.path", rule, None, "Write data.path=<folder or file with the rows>.")
    yield from at_least("data.num_train", data.num_train, 0, "0 means all rows.")
    yield from at_least("data.num_dev", data.num_dev, 0, "It counts rows.")
    yield from at_least("data.num_test", data.num_test, 0, "It counts rows.")
    yield from unsigned_64("data.split_seed", data.split_seed)


def _partition(config: RunConfig) -> Iterator[Problem]:
    partition = config.partition
    yield from at_least("partition.min_rows", partition.min_rows, 1, "Every client needs a row.")
    if not 0 <= partition.holdout < 1:
        remedy = "The share of rows that are not trained on. 0 keeps none."
        yield problem("partition.holdout", "be >= 0 and < 1", partition.holdout, remedy)
    num_extreme = getattr(partition, "num_extreme", 0)
    if not 0 <= num_extreme <= config.fl.num_clients:
        rule = f"be between 0 and fl.num_clients ({config.fl.num_clients})"
        yield problem("partition.num_extreme", rule, num_extreme, "Lower it or add clients.")
    match partition:
        case OwnConfig():
            yield from _own_rows(config)
        case DirichletConfig() | DirichletEqualConfig():
            yield from positive("partition.alpha", partition.alpha, "Smaller makes clients less alike. 0.5 is usual.")
        case ShardsConfig():
            yield from at_least("partition.shards_per_client", partition.shards_per_client, 1, "2 is usual.")
        case NaturalConfig() if not partition.column:
            remedy = "Write partition.column=<column>."
            yield problem("partition.column", "name the column that tells clients apart", partition.column, remedy)


def _own_rows(config: RunConfig) -> Iterator[Problem]:
    """What a server without rows cannot do."""
    if config.data.path is None:
        remedy = "Write data.path=<file or folder>, in which {client} stands for the client's index."
        yield problem("data.path", "be given for partition=own", None, remedy)
    if isinstance(config.trainer, MeerkatConfig) and config.trainer.calibration is Calibration.train:
        rule = "be imdb or file for partition=own, where the server has no training rows"
        yield problem("trainer.calibration", rule, "train", "Choose another text, or give trainer.mask_path.")
    if isinstance(config.step_policy, OracleConfig) and not config.fl.label_counts:
        rule = "be true for step_policy=oracle with partition=own, where the server does not know the labels"
        yield problem("fl.label_counts", rule, False, "Or choose another step policy.")
    if config.evaluation.central:
        rule = "be false for partition=own, where the server has no dev and test rows"
        yield problem("evaluation.central", rule, True, "The clients score their held-out rows.")


def _fl(config: RunConfig) -> Iterator[Problem]:
    fl = config.fl
    yield from at_least("fl.num_clients", fl.num_clients, 1, "A federation needs a client.")
    yield from at_least("fl.rounds", fl.rounds, 1, "A run needs a round.")
    yield from at_least("fl.local_steps", fl.local_steps, 1, "1 synchronises after every step.")
    for key, count, most in (
        ("fl.rounds", fl.rounds, MOST_ROUNDS),
        ("fl.local_steps", fl.local_steps, MOST_STEPS),
        ("estimator.num_probes", config.estimator.num_probes, MOST_STEPS),
    ):
        if count > most:
            yield problem(key, f"be at most {most}, the maximum of a record of the log", count, "Lower it.")
    own_columns = fl.seeds is not Seeds.shared or isinstance(config.server_optimizer, ScaffoldConfig | FedDynConfig)
    if own_columns and fl.num_clients > MOST_OWNERS:
        rule = f"be at most {MOST_OWNERS} where the log keeps each client's own scalars"
        yield problem("fl.num_clients", rule, fl.num_clients, "Write fl.seeds=shared and server_optimizer=sgd.")
    yield from at_least("fl.batch_size", fl.batch_size, 1, "The key counts the rows of a client in a step.")
    if not 2 <= fl.pool_size < 2**31:
        yield problem("fl.pool_size", "be between 2 and 2**31 - 1", fl.pool_size, "4096 is FedKSeed's.")
    yield from at_least("fl.hash_every", fl.hash_every, 1, "1 compares the full hash every round.")
    yield from _faults(config.faults, fl)


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


def _strategy(config: RunConfig) -> Iterator[Problem]:
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
    yield from positive("strategy.deadline_s", strategy.deadline_s, "It counts seconds.")
    yield from positive("strategy.startup_s", strategy.startup_s, "It counts seconds.")
    yield from positive("strategy.max_abs_g", strategy.max_abs_g, "Choose a large number to refuse nothing.")
    if strategy.clip_factor != 0 and not (math.isfinite(strategy.clip_factor) and strategy.clip_factor >= 1):
        remedy = "Below 1 the bound would shrink from round to round."
        yield problem("strategy.clip_factor", "be 0 (off) or >= 1 and finite", strategy.clip_factor, remedy)
    yield from at_least("strategy.clip_rounds", strategy.clip_rounds, 1, "10 is usual.")


def _evaluation(config: RunConfig) -> Iterator[Problem]:
    evaluation = config.evaluation
    yield from at_least("evaluation.every_rounds", evaluation.every_rounds, 0, "0 scores only at the end.")
    every = evaluation.federated_every_rounds
    yield from at_least("evaluation.federated_every_rounds", every, -1, "0 scores only at the end, -1 never.")
    yield from at_least(
        "evaluation.federated_max_rows", evaluation.federated_max_rows, 1, "It counts rows of a client."
    )


def _runtime(config: RunConfig) -> Iterator[Problem]:
    match config.runtime:
        case InlineConfig(batch_clients=True) if config.fl.seeds is not Seeds.shared:
            remedy = "Clients with directions of their own cannot share a forward."
            yield problem("runtime.batch_clients", f"be false for fl.seeds={config.fl.seeds}", True, remedy)
        case RayConfig() as ray:
            yield from positive("runtime.num_cpus_per_client", ray.num_cpus_per_client, "1 is usual.")
            yield from not_negative("runtime.num_gpus_per_client", ray.num_gpus_per_client, "0 reserves no GPU.")
            yield from at_least("runtime.num_actors", ray.num_actors, 1, "It counts processes.")
        case LocalConfig() as local:
            yield from positive("runtime.startup_s", local.startup_s, "It counts seconds.")
            yield from positive("runtime.step_limit_s", local.step_limit_s, "It counts seconds.")
