"""Each rule is broken once, and its message must name key, rule, value and remedy."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedzo.config.load import load
from fedzo.config.plugins import plugin_classes
from fedzo.config.rules import launch_problems, missing_here, site_problems
from fedzo.config.schema import LaunchConfig, SiteFile
from fedzo.config.unused import unused_problems
from fedzo.data.config import Loss, TaskConfig, TaskKind
from fedzo.data.partition import PartitionConfig
from fedzo.data.partition.by_label import DirichletConfig, DirichletEqualConfig, ExtremeConfig, ShardsConfig
from fedzo.data.partition.plain import NaturalConfig
from fedzo.data.preprocess.rephrase.openai_compatible import OpenAICompatibleConfig
from fedzo.errors import ConfigError
from fedzo.fl.config import Aggregation, Directions, Weighting
from fedzo.masks.select import Selector
from fedzo.models.available import TORCH_DTYPES
from fedzo.models.config import DType, TransformersConfig
from fedzo.runtime.config import LocalConfig, RayConfig
from fedzo.trainers.adapters import Ia3TrainerConfig, LoraTrainerConfig, PrefixTrainerConfig, PromptTrainerConfig
from fedzo.trainers.base import InputsConfig, TrainerConfig
from fedzo.trainers.meerkat import CalibrationSource, MeerkatConfig
from fedzo.trainers.mezo import MezoConfig
from fedzo.trainers.tables import TablesConfig
from fedzo.zo.config import Rounding
from fedzo.zo.estimator import (
    BackpropConfig,
    Baseline,
    EstimatorConfig,
    FzooConfig,
    LocalOptimizer,
    OneSidedConfig,
    TwoPointConfig,
)
from fedzo.zo.server_optimizer import (
    AdamConfig,
    MomentumConfig,
    Schedule,
    ServerOptimizerConfig,
    SgdConfig,
    learning_rate,
)


def sound() -> LaunchConfig:
    task = TaskConfig(name="rotten_tomatoes", template="{text}", candidates=[" bad", " good"])
    return LaunchConfig(task=task)


def set_key(config: LaunchConfig, key: str, value: Any) -> None:
    *sections, leaf = key.split(".")
    node: Any = config
    for section in sections:
        node = getattr(node, section)
    setattr(node, leaf, value)


def test_a_sound_config_has_no_problem() -> None:
    assert launch_problems(sound()) == []
    assert missing_here(sound()) == []


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("seed", -1, "be an unsigned 64-bit integer (0 to 2**64 - 1), got -1."),
        ("seed", 2**64, "be an unsigned 64-bit integer"),
        ("split.seed", -1, "be an unsigned 64-bit integer"),
        ("device", "gpu", "be auto, cpu, cuda, cuda:<index> or mps, got 'gpu'."),
        ("device", "cuda:x", "be auto, cpu"),
        ("threads", -1, "be between 0 and 1024, got -1. 0 means OMP_NUM_THREADS, or all CPUs."),
        ("threads", 10**5, "be between 0 and 1024, got 100000"),
        ("fl.batch_size", 10**6, "be at most 65536, got 1000000. Lower it."),
        ("model.name", " ", "be a hub name or a local folder, got ' '."),
        ("task.max_length", 0, "be >= 1, got 0."),
        ("model.tokens_per_batch", 511, "be >= task.max_length (512), so that one sequence fits, got 511. Raise it"),
        ("model.tokens_per_batch", -1, "be >= task.max_length (512), so that one sequence fits, got -1. Raise it"),
        ("task.template", "", "not be empty, got ''. Choose a task=<option>"),
        ("task.template", "It was", "hold a {column} of the rows, or every row has the same text, got 'It was'."),
        ("task.template", "{text It was", "close the brace of '{text It was' right after the column's name"),
        ("task.candidates", [" a", " {b"], "close the brace of '{b' right after the column's name, as in {b}"),
        ("task.candidates", [" a", " a"], "differ from one another, got [' a', ' a']."),
        ("task.labels", ["a", "a"], "differ from one another, got ['a', 'a']."),
        ("task.labels", [" a", "a"], "differ from one another, got ['a', 'a']."),
        ("task.candidates", [" one"], "hold at least 2 answers for task.kind=candidates, got [' one']."),
        ("task.labels", ["neg"], "hold one value per candidate (2), got ['neg']."),
        ("task.label", "", "name the column of the right answer, got ''."),
        ("task.max_new_tokens", 0, "be >= 1, got 0."),
        ("split.num_train", -1, "be >= 0, got -1. 0 means all rows."),
        ("split.num_dev", -1, "be >= 0"),
        ("split.num_test", -1, "be >= 0"),
        ("partition.min_rows", 0, "be >= 1, got 0."),
        ("partition.holdout", 1.0, "be >= 0 and < 1, got 1.0."),
        ("partition.holdout", -0.1, "be >= 0 and < 1"),
        ("partition.holdout", float("nan"), "be >= 0 and < 1"),
        ("trainer.lr", -1e-4, "be >= 0 and finite, got -0.0001. 0 trains nothing."),
        ("trainer.lr", float("inf"), "be >= 0 and finite, got inf."),
        ("trainer.eps", 0.0, "be > 0 and finite, got 0.0. 1e-3 is usual."),
        ("trainer.eps", float("nan"), "be > 0 and finite, got nan."),
        ("trainer.density", 0.0, "be > 0 and <= 1, got 0.0. 0.001 trains one weight in a thousand."),
        ("trainer.density", 1.01, "be > 0 and <= 1"),
        ("trainer.density", float("nan"), "be > 0 and <= 1"),
        ("trainer.calibration_docs", 0, "be >= 1"),
        ("trainer.calibration_tokens", 1, "be >= 2, got 1. The loss is of the next token."),
        ("estimator.eps", 0.0, "be > 0 and finite"),
        ("estimator.num_probes", 0, "be >= 1, got 0. A step needs a direction."),
        ("estimator.eps", 1e-60, "be > 0 and finite in float32, got 1e-60. 1e-3 is usual."),
        ("server_optimizer.lr", -1.0, "be >= 0 and finite in float32, got -1.0. 0 trains nothing."),
        ("server_optimizer.lr", 1e39, "be >= 0 and finite in float32, got 1e+39."),
        ("server_optimizer.lr", float("nan"), "be >= 0 and finite in float32, got nan."),
        ("fl.rounds", 2**32, "be at most 4294967295, the maximum of a record of the log, got 4294967296."),
        ("server_optimizer.final_lr_share", 1.1, "be between 0 and 1, got 1.1."),
        ("server_optimizer.final_lr_share", float("nan"), "be between 0 and 1"),
        ("server_optimizer.warmup_rounds", 75, "be >= 0 and below fl.rounds (75), got 75. Lower it, or train longer."),
        ("server_optimizer.warmup_rounds", -1, "be >= 0 and below fl.rounds"),
        ("server_optimizer.weight_decay", -0.1, "be >= 0 and finite, got -0.1. 0 switches it off."),
        (
            "server_optimizer.weight_decay",
            1e-5,
            "make lr * weight_decay 0, or at least 1e-6 up to the last round, whose lr is 0.0002: float32 holds",
        ),
        ("server_optimizer.weight_decay", 1e4, "make server_optimizer.lr * weight_decay less than 1, got 10000.0."),
        ("fl.num_clients", 0, "be >= 1, got 0. A federation needs a client."),
        ("fl.rounds", 0, "be >= 1, got 0. A run needs a round."),
        ("fl.local_steps", 0, "be >= 1, got 0."),
        ("fl.local_steps", 65536, "be at most 65535, the maximum of a record of the log, got 65536. Lower it."),
        ("estimator.num_probes", 65536, "be at most 65535, the maximum of a record of the log, got 65536."),
        ("fl.batch_size", 0, "be >= 1, got 0."),
        ("fl.hash_every", 0, "be >= 1, got 0."),
        ("strategy.clients_per_round", 9, "be between 0 (all) and fl.num_clients (8), got 9. Lower it"),
        ("strategy.clients_per_round", -1, "be between 0 (all)"),
        ("strategy.min_replies", 9, "be between 1 and the clients of a round (8), got 9. Lower it"),
        ("strategy.min_replies", 0, "be between 1"),
        ("strategy.deadline_s", 0.0, "be > 0 and finite"),
        ("strategy.startup_s", -1.0, "be > 0 and finite"),
        ("strategy.max_abs_g", float("inf"), "be > 0 and finite"),
        ("strategy.clip_factor", 1.0, "be 0 (off) or > 1 and finite, got 1.0. At 1 or less the bound would"),
        ("strategy.clip_factor", 0.5, "be 0 (off) or > 1"),
        ("strategy.clip_factor", -1.0, "be 0 (off) or > 1"),
        ("strategy.size_cap", 0.5, "be 0 (no cap) or >= 1 and finite, got 0.5. Below 1, most clients would have"),
        ("strategy.size_cap", float("nan"), "be 0 (no cap) or >= 1"),
        ("strategy.clip_factor", float("inf"), "be 0 (off) or > 1"),
        ("strategy.clip_rounds", 0, "be >= 1, got 0."),
        ("strategy.trim_share", 0.5, "be >= 0 and < 0.5, got 0.5. It is cut off at both ends."),
        ("strategy.trim_share", -0.1, "be >= 0 and < 0.5"),
        ("evaluation.every_rounds", -1, "be >= 0"),
        ("evaluation.federated_every_rounds", -2, "be >= -1, got -2. 0 scores only at the end, -1 never."),
        ("evaluation.federated_max_rows", 0, "be >= 1"),
        (
            "faults.absent",
            ["one@2"],
            "hold entries '<client>@<round>', got 'one@2'. For example faults.absent=['3@1'].",
        ),
        (
            "faults.absent",
            ["1@2", "8@0"],
            "name a client below fl.num_clients (8) and a round below fl.rounds (75), got '8@0'.",
        ),
        ("faults.absent", ["0@75"], "name a client below"),
    ],
)
def test_a_broken_rule_is_named(key: str, value: object, rule: str) -> None:
    config = sound()

    set_key(config, key, value)

    assert [(problem.key, problem.text.startswith(f"{key} must {rule}")) for problem in launch_problems(config)] == [
        (key, True)
    ]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 2**64 - 1),
        ("device", "cuda:1"),
        ("device", "mps"),
        ("server_optimizer.lr", 0.0),
        ("trainer.density", 1.0),
        ("partition.holdout", 0.0),
        ("strategy.clients_per_round", 8),
        ("strategy.min_replies", 8),
        ("model.tokens_per_batch", 512),
        ("model.tokens_per_batch", 0),
        ("faults.absent", ["0@0", "7@74"]),
        ("evaluation.federated_every_rounds", -1),
        ("fl.directions", Directions.per_client),
        ("task.labels", ["neg", "pos"]),
        ("estimator.eps", 0.5),  # may differ from trainer.eps
        ("server_optimizer.final_lr_share", 0.0),
        ("server_optimizer.final_lr_share", 1.0),
        ("server_optimizer.warmup_rounds", 74),
        ("server_optimizer.weight_decay", 4.8e-3),  # lr is the trainer's, 2e-4: 9.6e-7, a little above 2**-20
        ("strategy.clip_factor", 1.01),
        ("strategy.size_cap", 0.0),
        ("strategy.size_cap", 1.0),
    ],
)
def test_a_value_on_the_edge_is_allowed(key: str, value: object) -> None:
    config = sound()

    set_key(config, key, value)

    assert launch_problems(config) == []


@pytest.mark.parametrize(
    ("settings", "key", "why", "used_with"),
    [
        (
            {},
            "server_optimizer.final_lr_share",
            "for server_optimizer.schedule=constant, which does not use it, got 0.5. Write "
            "server_optimizer.schedule=linear or cosine, or leave it out.",
            {"server_optimizer.schedule": Schedule.linear},
        ),
        (
            {},
            "strategy.size_cap",
            "for strategy.weighting=uniform, which does not use it, got 0.5. Write strategy.weighting=size, or leave "
            "it out.",
            {"strategy.weighting": Weighting.size},
        ),
        *(
            (
                {"strategy.aggregation": other},
                "strategy.trim_share",
                "without strategy.aggregation=trimmed_mean, got 0.5. Write strategy.aggregation=trimmed_mean, or leave "
                "it out.",
                {"strategy.aggregation": Aggregation.trimmed_mean},
            )
            for other in (Aggregation.mean, Aggregation.median)
        ),
        (
            {"strategy.clip_factor": 0.0},
            "strategy.clip_rounds",
            "for strategy.clip_factor=0, which does not use it, got 0.5. Write strategy.clip_factor=100, or leave it "
            "out.",
            {"strategy.clip_factor": 100.0},
        ),
        *(
            (
                {"strategy.aggregation": Aggregation.majority_sign},
                key,
                "for strategy.aggregation=majority_sign, since a sign has no size, got 0.5. Leave it out.",
                {"strategy.aggregation": Aggregation.median},
            )
            for key in ("strategy.max_abs_g", "strategy.clip_rounds")
        ),
        (
            {"estimator": BackpropConfig()},
            "strategy.clip_rounds",
            "for estimator=backprop, whose vectors are compared with those of their round alone, got 0.5. Leave it "
            "out.",
            {"estimator": TwoPointConfig()},
        ),
        *(
            (
                {"fl.directions": other},
                "fl.pool_size",
                "without fl.directions=pool, got 0.5. Write fl.directions=pool, or leave it out.",
                {"fl.directions": Directions.pool},
            )
            for other in (Directions.shared, Directions.per_client)
        ),
        (
            {"trainer": MezoConfig(rounding=Rounding.stochastic)},
            "trainer.rounding",
            "for model.dtype=float32, whose values it does not change, got 0.5. Write model.dtype=bfloat16 or float16, "
            "or leave it out.",
            {"model.dtype": DType.bfloat16},
        ),
    ],
)
def test_a_setting_without_effect_is_refused_where_it_is_typed(
    settings: dict[str, Any], key: str, why: str, used_with: dict[str, Any]
) -> None:
    config, typed = sound(), {key: "0.5"}
    for each, value in settings.items():
        set_key(config, each, value)

    assert [each.text for each in unused_problems([config], typed)] == [f"{key} must be left out {why}"]
    assert [*unused_problems([config], {}), *launch_problems(config)] == []  # presets and run folders may have it
    used = copy.deepcopy(config)
    for each, value in used_with.items():
        set_key(used, each, value)
    assert [*unused_problems([used], typed), *launch_problems(used)] == []
    assert [*unused_problems([config, used], typed), *unused_problems([used, config], typed)] == []  # one job needs it
    assert len([*unused_problems([config, config], typed)]) == 1


def test_settings_without_effect_are_told_beside_broken_rules() -> None:
    with pytest.raises(ConfigError, match=r"(?s)3 problems.*fl\.rounds must be.*fl\.pool_size.*strategy\.trim_share"):
        load(["fl.rounds=0", "fl.pool_size=8", "strategy.trim_share=0.3"])


@pytest.mark.parametrize(
    ("partition", "message"),
    [
        (DirichletConfig(alpha=0.0), "partition.alpha must be > 0 and finite, got 0.0."),
        (DirichletConfig(alpha=float("nan")), "partition.alpha must be > 0 and finite, got nan."),
        (DirichletEqualConfig(alpha=-1.0), "partition.alpha must be > 0 and finite, got -1.0."),
        (ShardsConfig(shards_per_client=0), "partition.shards_per_client must be >= 1, got 0."),
        (ExtremeConfig(num_extreme=9), "partition.num_extreme must be between 0 and fl.num_clients (8), got 9."),
        (DirichletEqualConfig(num_extreme=-1), "partition.num_extreme must be between 0 and fl.num_clients (8), got"),
        (
            NaturalConfig(),
            "partition.column must name the column that tells clients apart, got ''. Write partition.column",
        ),
        (
            PartitionConfig(),
            "partition must be one of dirichlet, dirichlet_equal, extreme, iid, natural, own, shards, "
            "got 'PartitionConfig'.",
        ),
    ],
)
def test_partition_rules(partition: PartitionConfig, message: str) -> None:
    config = sound()
    config.partition = partition

    (problem,) = launch_problems(config)

    assert problem.text.startswith(message)


@pytest.mark.parametrize(
    ("estimator", "messages"),
    [
        (OneSidedConfig(), []),
        (OneSidedConfig(num_probes=0), ["estimator.num_probes must be >= 1, got 0. A step needs a direction."]),
        (OneSidedConfig(baseline=Baseline.mean, num_probes=2), []),
        *(
            (
                OneSidedConfig(baseline=baseline),
                [
                    "estimator.num_probes must be >= 2, got 1. One loss has no other loss for comparison. Or write "
                    "estimator.baseline=center."
                ],
            )
            for baseline in (Baseline.mean, Baseline.leave_one_out)
        ),
        (FzooConfig(), []),
        (FzooConfig(num_probes=1), ["estimator.num_probes must be >= 2, got 1. One loss has no standard deviation."]),
    ],
    ids=str,
)
def test_estimator_rules(estimator: EstimatorConfig, messages: list[str]) -> None:
    config = sound()
    config.estimator = estimator

    assert [problem.text for problem in launch_problems(config)] == messages


@pytest.mark.parametrize(
    ("server_optimizer", "messages"),
    [
        (MomentumConfig(momentum=0.0), []),
        (MomentumConfig(momentum=1.0), ["server_optimizer.momentum must be >= 0 and < 1, got 1.0."]),
        (AdamConfig(beta1=0.0, beta2=0.0), []),
        (
            AdamConfig(beta1=-0.1, beta2=1.0, eps=0.0),
            [
                "server_optimizer.beta1 must be >= 0 and < 1, got -0.1.",
                "server_optimizer.beta2 must be >= 0 and < 1, got 1.0.",
                "server_optimizer.eps must be > 0 and finite in float32, got 0.0.",
            ],
        ),
    ],
    ids=str,
)
def test_update_rule_rules(server_optimizer: ServerOptimizerConfig, messages: list[str]) -> None:
    config = sound()
    config.server_optimizer = server_optimizer

    found = [problem.text for problem in launch_problems(config)]

    assert [text.startswith(message) for text, message in zip(found, messages, strict=True)] == [True] * len(messages)


@pytest.mark.parametrize("server_optimizer", [MomentumConfig(), AdamConfig()], ids=str)
def test_rules_that_remember_are_refused_where_every_weight_is_trained(server_optimizer: ServerOptimizerConfig) -> None:
    config = sound()
    config.trainer, config.server_optimizer = MezoConfig(), server_optimizer

    (problem,) = launch_problems(config)

    assert problem.key == "server_optimizer"
    assert problem.text.startswith(
        "server_optimizer must be sgd for trainer=mezo: the others keep float32 numbers for every"
    )
    config.server_optimizer = SgdConfig(weight_decay=1.0)
    assert launch_problems(config) == []


@pytest.mark.parametrize(
    ("runtime", "keys"),
    [
        (
            RayConfig(num_cpus_per_client=0, num_gpus_per_client=-1, num_actors=0),
            ["runtime.num_cpus_per_client", "runtime.num_gpus_per_client", "runtime.num_actors"],
        ),
        (LocalConfig(startup_s=0, step_limit_s=0), ["runtime.startup_s", "runtime.step_limit_s"]),
        (RayConfig(), []),
        (LocalConfig(), []),
    ],
)
def test_runtime_rules(runtime: RayConfig | LocalConfig, keys: list[str]) -> None:
    config = sound()
    config.runtime = runtime

    assert [problem.key for problem in launch_problems(config)] == keys


@pytest.mark.parametrize("aggregation", [each for each in Aggregation if each is not Aggregation.mean])
def test_an_aggregation_that_compares_scalars_wants_equal_clients_along_the_same_directions(
    aggregation: Aggregation,
) -> None:
    config = sound()
    config.strategy.aggregation = aggregation

    assert launch_problems(config) == []
    config.fl.directions, config.strategy.weighting = Directions.per_client, Weighting.size
    texts = [problem.text for problem in launch_problems(config)]

    assert texts[0] == (
        f"fl.directions must be shared for strategy.aggregation={aggregation}, which compares scalars along the same "
        "direction, got 'per_client'. Write fl.directions=shared, or strategy.aggregation=mean."
    )
    assert texts[1].startswith(f"strategy.weighting must be uniform for strategy.aggregation={aggregation}")


def test_as_many_clients_as_a_record_has_columns() -> None:
    config = sound()
    config.fl.num_clients = 32768

    assert launch_problems(config) == []
    config.fl.directions = Directions.per_client
    (problem,) = launch_problems(config)
    assert problem.text.startswith("fl.num_clients must be at most 32767 where the log keeps each client's own scalars")


@pytest.mark.parametrize(
    ("asked", "share", "remedy"),
    [(8, 0.12, "0.125 cuts one."), (3, 0.3, "0.334 cuts one."), (2, 0.4, "Ask at least 3 clients.")],
)
def test_a_trimmed_mean_trims(asked: int, share: float, remedy: str) -> None:
    config = sound()
    config.strategy.aggregation, config.strategy.trim_share = Aggregation.trimmed_mean, share
    config.strategy.clients_per_round = asked

    (problem,) = launch_problems(config)

    assert problem.text == (
        f"strategy.trim_share must cut at least one of the {asked} clients of a round off at each end, "
        f"so that values are trimmed, got {share}. {remedy}"
    )
    if asked > 2:
        config.strategy.trim_share = float(remedy.split()[0])
        assert launch_problems(config) == []


def test_min_replies_is_compared_with_the_sampled_clients() -> None:
    config = sound()
    config.strategy.clients_per_round, config.strategy.min_replies = 2, 3

    (problem,) = launch_problems(config)

    assert re.match(r"strategy\.min_replies must be between 1 and the clients of a round \(2\), got 3", problem.text)


@pytest.mark.parametrize("kind", [TaskKind.generation, TaskKind.instruction])
def test_written_answers_need_an_answer_template_and_the_lm_loss(kind: TaskKind) -> None:
    config = sound()
    config.task.kind, config.partition = kind, plugin_classes()["partition"]["iid"]()

    assert [problem.text.split(",")[0] for problem in launch_problems(config)] == [
        f"task.answer must not be empty for task.kind={kind}",
        f"task.loss must be lm or score for task.kind={kind}",
    ]
    blank = " " if kind is TaskKind.generation else ""
    assert f"as in task.answer='{blank}{{answer}}'." in launch_problems(config)[0].text
    config.task.answer = "{answer}"
    for loss in (Loss.lm, Loss.score):
        config.task.loss = loss
        assert launch_problems(config) == []


@pytest.mark.parametrize(
    ("end", "kind", "is_refused"),
    [
        (" ", TaskKind.generation, True),
        ("\t", TaskKind.generation, True),
        ("\n", TaskKind.generation, False),
        ("", TaskKind.generation, False),
        (" ", TaskKind.instruction, False),
    ],
)
def test_a_prompt_that_is_written_behind_ends_without_a_blank(end: str, kind: TaskKind, is_refused: bool) -> None:
    config = sound()
    config.partition = plugin_classes()["partition"]["iid"]()
    config.task = TaskConfig(name="rotten_tomatoes", kind=kind, template=f"{{text}}:{end}", answer="{a}", loss=Loss.lm)

    expected = (
        f"task.template must not end in a space for task.kind=generation, got {config.task.template!r}. Begin "
        "task.answer with it: most tokenizers join a space to the word after it."
    )
    assert [problem.text for problem in launch_problems(config)] == ([expected] if is_refused else [])


def chats(**keys: Any) -> LaunchConfig:
    """Instructions, of which ``keys`` say the rest."""
    config = sound()
    config.partition = plugin_classes()["partition"]["iid"]()
    config.task = TaskConfig(name="rotten_tomatoes", kind=TaskKind.instruction, loss=Loss.lm, **keys)
    return config


def test_whole_conversations_need_no_template_and_a_question_may_have_a_system_message() -> None:
    assert launch_problems(chats(messages="messages")) == []
    for system in ("Be brief.", "You are at {ward}.", "Write {} for a set."):
        assert launch_problems(chats(template="{q}", answer="{a}", system=system)) == []


def test_what_conversations_hold_themselves_is_no_setting_beside_them() -> None:
    config = chats(messages="m", template="{q}", answer="{a}", derive="alpaca", system="Be brief.")

    rule = "be left out beside task.messages, whose rows have both prompt and answer, got"
    remedy = "Choose task=chat, or leave task.messages out."
    assert [problem.text for problem in launch_problems(config)] == [
        f"task.template must {rule} '{{q}}'. {remedy}",
        f"task.answer must {rule} '{{a}}'. {remedy}",
        f"task.derive must {rule} 'alpaca'. {remedy}",
        "task.system must be left out beside task.messages, whose rows have system messages of their own, got "
        "'Be brief.'. Write it into the rows, as the first message of each.",
    ]


@pytest.mark.parametrize("kind", [TaskKind.candidates, TaskKind.generation])
@pytest.mark.parametrize("key", ["messages", "system"])
def test_a_chat_needs_the_kind_that_uses_a_chat_template(key: str, kind: TaskKind) -> None:
    asked: dict[str, Any] = {"template": "{q}", "answer": "{a}", "candidates": [" no", " yes"]}
    config = chats(**(asked if key == "system" else {}), **{key: "said"})
    config.task.kind = kind

    assert [problem.text for problem in launch_problems(config)] == [
        f"task.{key} must be empty for task.kind={kind}, which uses no chat template, got 'said'. Leave it out, or "
        "write task.kind=instruction."
    ]


def test_a_brace_of_a_system_message_that_is_not_closed_is_refused() -> None:
    (problem,) = launch_problems(chats(template="{q}", answer="{a}", system="You are at {ward"))

    assert problem.text.startswith("task.system must close the brace of '{ward' right after the column's name")


def test_conversations_have_neither_labels_nor_candidates() -> None:
    config = chats(messages="messages")
    config.task.loss, config.partition = Loss.candidates, DirichletConfig()

    assert [problem.text.split(",")[0] for problem in launch_problems(config)] == [
        "task.loss must be lm or score for task.kind=instruction",
        "partition must not depend on labels for task.kind=instruction",
    ]


@pytest.mark.parametrize(
    ("factor", "loss", "batch_size", "rule"),
    [
        (0.3, Loss.candidates, 2, None),
        (1.0, Loss.candidates, 1, None),
        (0.0, Loss.candidates, 2, "be > 0 and <= 1"),
        (1.5, Loss.candidates, 2, "be > 0 and <= 1"),
        (math.nan, Loss.candidates, 2, "be > 0 and <= 1"),
        (0.3, Loss.lm, 2, "be 1 for task.loss=lm"),
        (0.3, Loss.score, 2, "be 1 for task.loss=score"),
        (0.3, Loss.candidates, 1, "be 1 with fl.batch_size=1"),
    ],
)
def test_a_common_shift_needs_answers_and_other_rows(
    factor: float, loss: Loss, batch_size: int, rule: str | None
) -> None:
    config = sound()
    config.task.common_shift, config.task.loss, config.fl.batch_size = factor, loss, batch_size

    told = [problem.text for problem in launch_problems(config)]

    assert len(told) == (rule is not None)
    assert all(text.startswith(f"task.common_shift must {rule}") for text in told)


def test_a_value_is_trained_by_scalars_of_texts_that_a_probe_may_change() -> None:
    config = sound()
    config.task.loss = Loss.score
    assert launch_problems(config) == []
    assert list(site_problems(SiteFile(), config)) == []

    config.evaluators, config.model.dtype, config.estimator.freeze_routing = {}, DType.auto, True

    assert [problem.text for problem in launch_problems(config)] == [
        "model.dtype must be float32, bfloat16 or float16 for task.loss=score: scores tell little of how exact a dtype "
        "is, got 'auto'. Write model.dtype=float32 if in doubt.",
        "evaluators must name one for task.loss=score, which trains on the value of the first, got []. Write "
        "evaluators=[answers], or another task.loss.",
        "estimator.freeze_routing must be false for task.loss=score: held choices (argmax) are also those by which a "
        "text is written, got True. Leave it out, or choose another task.loss.",
    ]


def test_a_value_has_no_gradient() -> None:
    config = sound()
    config.task.loss, config.estimator = Loss.score, BackpropConfig()

    assert [problem.text for problem in launch_problems(config)] == [
        "task.loss must be candidates or lm for estimator=backprop, since the value of a score has no gradient, got "
        "'score'. Choose another estimator, such as two_point, or another loss."
    ]


def test_a_partition_by_labels_needs_labels() -> None:
    config = sound()
    config.task = TaskConfig(name="rotten_tomatoes", kind=TaskKind.generation, template="{text}", answer="{a}")
    config.task.loss = Loss.lm
    for name, option in plugin_classes()["partition"].items():
        if name == "own":
            continue  # whose rows are nobody's to split
        config.partition = NaturalConfig(column="site") if name == "natural" else option()

        found = [problem.text for problem in launch_problems(config)]

        text = f"partition must not depend on labels for task.kind=generation, which has none, got '{name}'."
        assert found == ([] if name in {"iid", "natural"} else [f"{text} Use partition=iid or natural."])


def test_candidates_that_rows_list_need_what_does_without_labels() -> None:
    config = sound()
    config.task.candidates, config.task.labels = [" {choices}"], ["A", "B", "C", "D", "E"]
    config.partition = plugin_classes()["partition"]["iid"]()
    assert launch_problems(config) == []

    config.partition = DirichletConfig()
    config.task.common_shift = 0.3

    assert sorted(problem.text for problem in launch_problems(config)) == [
        "partition must not depend on labels for rows that list their own candidates, which have none, got "
        "'dirichlet'. Use partition=iid or natural.",
        "task.common_shift must be 1 for rows that list their own candidates, whose scores have nothing in common, "
        "got 0.3. Leave it out.",
    ]


def test_only_an_embedded_task_goes_without_a_path() -> None:
    config = sound()
    config.task.name = "sst2"

    (problem,) = launch_problems(config)

    assert problem.text.startswith(
        "data.path must be given for the task 'sst2' (only rotten_tomatoes is embedded), got None."
    )


@pytest.mark.parametrize("trainer", [MeerkatConfig, TablesConfig])
def test_calibration_by_file_needs_the_file(trainer: type) -> None:
    config = sound()
    config.trainer = trainer(calibration=CalibrationSource.file)

    (problem,) = launch_problems(config)

    assert problem.text.startswith("inputs.calibration must be given for trainer.calibration=file, got None.")
    config.inputs.calibration = "text.txt"
    assert launch_problems(config) == []
    config.trainer, config.inputs.calibration = MezoConfig(), None
    assert launch_problems(config) == []


@pytest.mark.parametrize("trainer", [MeerkatConfig, TablesConfig])
def test_a_file_of_text_that_nothing_would_read_is_refused(trainer: type) -> None:
    config = sound()
    config.trainer, config.inputs.calibration = trainer(), "text.txt"
    rule = "inputs.calibration must be null for trainer.calibration=imdb, which reads no file, got 'text.txt'."

    (problem,) = launch_problems(config)

    assert problem.text == f"{rule} Write trainer.calibration=file, or leave it out."


@pytest.mark.parametrize("selector", [Selector.random, Selector.magnitude])
def test_a_mask_that_no_gradient_chooses_needs_no_text(selector: Selector) -> None:
    config = MeerkatConfig(selector=selector, calibration=CalibrationSource.file)

    assert list(config.input_problems(InputsConfig(), sound())) == []
    config.calibration = CalibrationSource.imdb
    (problem,) = config.input_problems(InputsConfig(calibration="text.txt"), sound())
    assert problem.text.startswith("inputs.calibration must be null for trainer.calibration=imdb, which reads no file")


def test_a_mask_that_is_given_needs_no_text() -> None:
    config = MeerkatConfig(calibration=CalibrationSource.file)
    inputs = InputsConfig(artifact="mask.safetensors", calibration="text.txt")

    (problem,) = config.input_problems(inputs, sound())

    assert problem.key == "inputs.calibration"
    assert list(config.input_problems(InputsConfig(artifact="mask.safetensors"), sound())) == []


@pytest.mark.parametrize(
    ("schedule", "share", "decay", "holds"),
    [
        (Schedule.constant, 0.1, 1e-2, True),
        (Schedule.cosine, 0.1, 1e-2, False),
        (Schedule.linear, 0.1, 1e-2, False),
        (Schedule.cosine, 0.1, 5e-2, True),
        (Schedule.cosine, 0.0, 1e-2, True),  # the decay is to end, too
    ],
)
def test_a_decay_that_ends_before_the_schedule_does_is_refused(
    schedule: Schedule, share: float, decay: float, holds: bool
) -> None:
    """A decay of 2e-6 a round ends at 2e-7, which float32 makes 1.8e-7."""
    config = sound()
    config.server_optimizer = SgdConfig(lr=2e-4, schedule=schedule, final_lr_share=share, weight_decay=decay)

    problems = launch_problems(config)

    assert [problem.key for problem in problems] == ([] if holds else ["server_optimizer.weight_decay"])
    assert holds or problems[0].text.endswith("got 0.01. Write 0, or at least 0.05.")


@pytest.mark.parametrize(
    ("lr", "decay", "schedule", "holds"),
    [
        (1e-5, 1e-3, Schedule.constant, False),
        (2e-5, 1e-2, Schedule.constant, False),
        (2e-5, 5e-2, Schedule.constant, True),
        (2e-4, 5e-2, Schedule.cosine, True),
        (2e-5, 5e-2, Schedule.cosine, False),
    ],
)
def test_a_decay_of_local_steps_that_float32_would_round_away_is_refused(
    lr: float, decay: float, schedule: Schedule, holds: bool
) -> None:
    """AdamW at the rate of the last round, without a gradient, says how much of the decay is left."""
    config = sound()
    config.server_optimizer = SgdConfig(lr=lr, schedule=schedule)
    config.estimator = BackpropConfig(local_optimizer=LocalOptimizer.adamw, weight_decay=decay)
    last = learning_rate(config.server_optimizer, round=config.fl.rounds - 1, rounds=config.fl.rounds)
    theta = torch.nn.Parameter(torch.ones(4))
    theta.grad = torch.zeros(4)
    optimizer = torch.optim.AdamW([theta], lr=last, weight_decay=decay)
    for _ in range(200):
        optimizer.step()

    problems = launch_problems(config)

    kept = (1 - float(theta.detach()[0])) / (1 - (1 - last * decay) ** 200)
    assert (abs(kept - 1) < 0.04) is holds
    assert [problem.key for problem in problems] == ([] if holds else ["estimator.weight_decay"])
    assert holds or "estimator.weight_decay must make lr * weight_decay 0, or at least 1e-6" in problems[0].text


@pytest.mark.parametrize(
    ("dtype", "decay", "holds"),
    [
        (DType.bfloat16, 2.0**-9, False),
        (DType.bfloat16, 2.0**-8, True),
        (DType.float16, 2.0**-12, False),
        (DType.float16, 2.0**-11, True),
        (DType.float32, 2.0**-12, True),
        (DType.bfloat16, 0.0, True),
    ],
)
def test_a_decay_that_rounding_would_undo_is_refused(dtype: DType, decay: float, holds: bool) -> None:
    """A weight whose bits are all 1 is the hardest to move downwards; one step of the server optimizer tells."""
    config = sound()
    config.trainer, config.model.dtype = MezoConfig(rounding=Rounding.stochastic), dtype
    config.server_optimizer = SgdConfig(lr=1.0, weight_decay=decay)
    weights = torch.linspace(1, 2, 1024)[:-1].to(TORCH_DTYPES[dtype])

    moved = (weights.float() * (1 - decay)).to(weights.dtype) != weights

    assert [problem.key for problem in launch_problems(config)] == ([] if holds else ["server_optimizer.weight_decay"])
    assert bool(moved.all()) is (holds and decay > 0)


@pytest.mark.parametrize(("share", "holds"), [(1.0, True), (0.5, False), (0.0, True)])
def test_a_decay_that_rounding_would_undo_in_the_last_round_is_refused(share: float, holds: bool) -> None:
    """At the peak it moves every bfloat16 weight. A schedule that ends at 0 is to end the decay, too."""
    config = sound()
    config.trainer, config.model.dtype = MezoConfig(rounding=Rounding.stochastic), DType.bfloat16
    falling = SgdConfig(lr=1.0, weight_decay=2.0**-8, schedule=Schedule.linear, final_lr_share=share)
    config.server_optimizer = falling
    weights = torch.linspace(1, 2, 1024)[:-1].to(torch.bfloat16)
    last = learning_rate(falling, round=config.fl.rounds - 1, rounds=config.fl.rounds)

    moved = (weights.float() * (1 - last * falling.weight_decay)).to(weights.dtype) != weights

    assert [problem.key for problem in launch_problems(config)] == ([] if holds else ["server_optimizer.weight_decay"])
    assert bool(moved.all()) is (holds and share > 0)


def test_a_dtype_that_peers_choose_for_themselves_is_refused_where_values_are_held_in_it() -> None:
    config = sound()
    config.model.dtype = DType.auto
    assert launch_problems(config) == []

    config.trainer = MezoConfig()
    (problem,) = launch_problems(config)

    assert problem.text.startswith("model.dtype must be float32, bfloat16 or float16 for trainer=mezo")
    assert problem.text.endswith("got 'auto'. Write model.dtype=float32 if in doubt.")


@pytest.mark.parametrize(
    "trainer",
    [MeerkatConfig, LoraTrainerConfig, Ia3TrainerConfig, PrefixTrainerConfig, PromptTrainerConfig, TablesConfig],
)
def test_compiled_forwards_serve_every_trainer_that_writes_its_values(trainer: type) -> None:
    config = sound()
    config.model.compile = True
    config.trainer = trainer()

    assert launch_problems(config) == []


def test_compiled_forwards_are_refused_where_probes_cannot_be_traced_or_kept() -> None:
    config = sound()
    config.trainer = MezoConfig()
    config.estimator.freeze_routing = True
    assert launch_problems(config) == []

    config.model.compile = True
    perturbed, frozen = [problem.text for problem in launch_problems(config)]

    assert perturbed.startswith("model.compile must be false for trainer=mezo: its probes hand each operation")
    assert frozen.startswith("model.compile must be false with estimator.freeze_routing: the choices of one")


@pytest.mark.parametrize("key", ["data.path", "inputs.artifact", "inputs.calibration", "model.name"])
def test_a_file_that_is_not_there_is_named(key: str, tmp_path: Path) -> None:
    config = sound()
    set_key(config, key, str(tmp_path / "no"))

    (problem,) = missing_here(config)

    assert problem.text.startswith(f"{key} must name something that exists, got '{tmp_path}/no'.")
    set_key(config, key, str(tmp_path))
    assert missing_here(config) == []


def test_a_hub_name_is_no_file() -> None:
    config = sound()
    config.model.name = "facebook/opt-125m"

    assert missing_here(config) == []


def test_all_broken_rules_are_reported() -> None:
    config = sound()
    broken: list[Callable[[], None]] = [
        lambda: set_key(config, "fl.rounds", 0),
        lambda: set_key(config, "seed", -1),
        lambda: set_key(config, "trainer.density", 2.0),
    ]
    for break_it in broken:
        break_it()

    assert [problem.key for problem in launch_problems(config)] == ["seed", "trainer.density", "fl.rounds"]


def test_a_sites_rewriter_is_asked_for_the_rules_of_all_its_classes() -> None:
    """Here alone, whether the site is a file's or a command line's: who builds the rewriter asks no more."""
    run, url = sound(), "http://example.org/v1"
    site = SiteFile(rewriter=OpenAICompatibleConfig(base_url=url, model="m", concurrency=0, budget_calls=-1))

    broken = ["rewriter.budget_calls", "rewriter.base_url", "rewriter.concurrency"]
    assert [each.key for each in site_problems(site, run)] == broken
    run.rewriter = site.rewriter
    assert [each.key for each in launch_problems(run)] == broken
    run.rewriter = TransformersConfig(max_tokens=0, batch_size=0)
    assert [each.key for each in launch_problems(run)] == ["rewriter.max_tokens", "rewriter.batch_size"]


@pytest.mark.parametrize(
    ("trainer", "rules"),
    [
        (
            LoraTrainerConfig(rank=0, alpha=0),
            ["trainer.rank must be >= 1, got 0.", "trainer.alpha must be >= 1, got 0."],
        ),
        (PrefixTrainerConfig(num_virtual_tokens=0), ["trainer.num_virtual_tokens must be >= 1, got 0."]),
        (PromptTrainerConfig(init_std=-1.0), ["trainer.init_std must be >= 0 and finite, got -1.0."]),
        (LoraTrainerConfig(rank=1, alpha=1), []),
        (PromptTrainerConfig(num_virtual_tokens=1, init_std=0.0), []),
    ],
)
def test_rules_of_adapters(trainer: TrainerConfig, rules: list[str]) -> None:
    config = sound()
    config.trainer = trainer

    found = [problem.text for problem in launch_problems(config)]

    assert len(found) == len(rules)
    assert all(text.startswith(rule) for text, rule in zip(found, rules, strict=True))


@pytest.mark.parametrize(
    ("trainer", "key"),
    [
        (MezoConfig(), "artifact"),
        (TablesConfig(), "artifact"),
        (TablesConfig(gradient=False, calibration=CalibrationSource.file), "calibration"),
    ],
    ids=["mezo", "tables", "tables without a gradient"],
)
def test_a_file_that_the_trainer_does_not_take_is_refused(trainer: TrainerConfig, key: str) -> None:
    config = sound()
    config.trainer = trainer
    setattr(config.inputs, key, "some.file")

    (found,) = launch_problems(config)

    assert found.text == (
        f"inputs.{key} must be null for this trainer, which takes no such file, got 'some.file'. Leave it out."
    )
