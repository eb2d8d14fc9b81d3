"""Settings that nothing reads beside the others are refused where a command line names them, and only there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedzo.config.load import load
from fedzo.config.overrides import with_config_dir
from fedzo.config.sweep import plan_sweep
from fedzo.errors import ConfigError

OWN = ["data.path=.", "evaluation.central=false"]
WRITTEN = ["task=squad", "data.path=.", "partition=iid"]
LISTED = ["task=custom", "task.template='{q}'", "task.candidates=[' {c}']", "data.path=.", "partition=iid"]
FILE = "for partition=own, where each client has a file of its own, and all rows of it"
SITES = ["experiment=sites", "runtime=remote", "runtime.server=."]


@pytest.mark.parametrize(
    ("words", "message", "accepted"),
    [
        *(
            ([*OWN, "partition=own", word], f"{key} must be left out {FILE}, got {value}. Give", [*OWN, word])
            for word in ("split.num_train=64", "split.num_dev=0", "split.num_test=9", "split.seed=1")
            for key, value in [word.split("=")]
        ),
        (
            [*OWN, "partition=own", "partition.min_rows=2"],
            f"partition.min_rows must be left out {FILE}, got 2. Give each file the rows that its client is to have.",
            [*OWN, "partition=own", "partition.holdout=0.2"],
        ),
        (
            [*SITES, "data.path=."],
            "data.path must be left out for runtime=remote, where each site's own file names its rows, got ",
            SITES,
        ),
        (
            ["trainer.lr=0.5", "server_optimizer.lr=0.25"],
            "trainer.lr must be left out beside server_optimizer.lr, which is used in its place, got 0.5. Write one of",
            ["trainer.lr=0.5", "server_optimizer.lr=null"],
        ),
        (
            ["trainer.lr=0.5", "server_optimizer.lr=0.5"],
            "trainer.lr must be left out beside server_optimizer.lr, which is used in its place, got 0.5. Write one of",
            ["server_optimizer.lr=0.5"],
        ),
        (
            ["trainer.eps=0.5", "estimator.eps=0.25"],
            "trainer.eps must be left out beside estimator.eps, which is used in its place, got 0.5. Write one of",
            ["estimator.eps=0.25"],
        ),
        (
            ["estimator=backprop", "trainer.eps=0.5"],
            "trainer.eps must be left out for estimator=backprop, which has no probes, got 0.5.",
            ["estimator=fzoo", "trainer.eps=0.5"],
        ),
        (
            [*WRITTEN, "fl.label_counts=true"],
            "fl.label_counts must be left out for task.kind=generation, whose rows have no labels, got true.",
            [*WRITTEN, "fl.label_counts=false"],
        ),
        (
            [*LISTED, "fl.label_counts=true"],
            "fl.label_counts must be left out for rows that list their own candidates, which have no labels, got true.",
            [*LISTED, "fl.label_counts=false"],
        ),
        (
            ["evaluation.central=false", "evaluation.every_rounds=5"],
            "evaluation.every_rounds must be left out for evaluation.central=false, with which no dev row is scored, "
            "got 5. For scores of clients, write evaluation.federated_every_rounds.",
            ["evaluation.central=false", "evaluation.every_rounds=0"],
        ),
        (
            ["split.num_dev=0", "evaluation.best_by=value"],
            "evaluation.best_by must be left out for split.num_dev=0, with which no dev row is scored, got value.",
            ["split.num_dev=1", "evaluation.best_by=value"],
        ),
        (
            ["evaluators=none", "evaluation.every_rounds=5"],
            "evaluation.every_rounds must be left out for evaluators=[], with which no dev row is scored, got 5.",
            ["evaluators=answers", "evaluation.every_rounds=5"],
        ),
        (
            ["partition.holdout=0", "evaluation.federated_every_rounds=5"],
            "evaluation.federated_every_rounds must be left out for partition.holdout=0, with which no client scores ",
            ["partition.holdout=0", "evaluation.federated_every_rounds=-1"],
        ),
        (
            ["evaluation.federated_every_rounds=-1", "evaluation.federated_max_rows=8"],
            "evaluation.federated_max_rows must be left out for evaluation.federated_every_rounds=-1, with which no ",
            ["evaluation.federated_every_rounds=0", "evaluation.federated_max_rows=8"],
        ),
        *(
            (
                [*chosen, f"trainer.{key}={value}"],
                f"trainer.{key} must be left out without {word}, since no text is read, got {value}. Write {word}, or ",
                [*others, f"trainer.{key}={value}"],
            )
            for key, value in (("calibration", "train"), ("calibration_docs", 9), ("calibration_tokens", 9))
            for chosen, word, others in (
                (["trainer.selector=random"], "trainer.selector=sensitivity", ["trainer.selector=sensitivity"]),
                (["trainer.selector=magnitude"], "trainer.selector=sensitivity", []),
                (["trainer=tables", "trainer.gradient=false"], "trainer.gradient=true", ["trainer=tables"]),
            )
        ),
        (
            ["strategy.deadline_s=5"],
            "strategy.deadline_s must be left out for runtime=inline, where clients run one after another, without a ",
            ["runtime=local", "strategy.deadline_s=5"],
        ),
        (
            ["model.compile=true", "model.cuda_graphs=true"],
            "model.cuda_graphs must be left out for model.compile=true, with which it is not used, got true.",
            ["model.compile=false", "model.cuda_graphs=true"],
        ),
        (
            ["estimator.freeze_routing=true", "model.lower_layers_cache_mb=8"],
            "model.lower_layers_cache_mb must be left out for estimator.freeze_routing=true, with which it is not ",
            ["estimator.freeze_routing=true", "model.lower_layers_cache_mb=0"],
        ),
        (
            ["task.loss=score", "model.lower_layers_cache_mb=8"],
            "model.lower_layers_cache_mb must be left out for task.loss=score, with which it is not used, got 8.",
            ["task.loss=score", "model.cuda_graphs=true"],
        ),
        (
            ["task.loss=score", "evaluation.best_by=loss"],
            "evaluation.best_by must be left out for task.loss=score, with which the value chooses, got loss. Leave it",
            ["task.loss=score", "evaluation.best_by=value"],
        ),
    ],
)
def test_a_word_without_effect_is_refused(words: list[str], message: str, accepted: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(words)

    assert str(caught.value).startswith(message)  # and no other problem, which a first line would count
    load(accepted)


@pytest.mark.parametrize("key", ["trainer.lr", "server_optimizer.lr"])
def test_the_rate_that_is_used_is_the_server_optimizers(key: str) -> None:
    assert load([f"{key}=0.125"]).server_optimizer.lr == 0.125


@pytest.mark.parametrize(("loss", "best_by"), [("candidates", "loss"), ("lm", "loss"), ("score", "value")])
def test_where_a_value_is_trained_it_chooses_the_best_round(loss: str, best_by: str) -> None:
    assert load([f"task.loss={loss}"]).evaluation.best_by == best_by


def test_what_a_preset_holds_for_runs_of_other_kinds_is_no_fault() -> None:
    tiny = load(["experiment=tiny", "partition=own", *OWN, "evaluation.federated_every_rounds=-1"])
    assert (tiny.split.num_train, tiny.evaluation.every_rounds, tiny.evaluation.federated_max_rows) == (32, 1, 4)

    assert load(["trainer=last_norm", "server_optimizer.lr=0.5"]).server_optimizer.lr == 0.5
    assert load(["experiment=quickstart", "estimator.freeze_routing=true"]).model.lower_layers_cache_mb == 16


@pytest.mark.parametrize(
    ("word", "others"),
    [
        ("fl.pool_size=8", []),
        ("strategy.size_cap=2", []),
        ("strategy.trim_share=0.1", []),
        ("strategy.max_abs_g=9", ["strategy.aggregation=majority_sign"]),
        ("strategy.clip_rounds=5", ["strategy.clip_factor=0"]),
        ("server_optimizer.final_lr_share=0.5", ["server_optimizer.schedule=constant"]),
        ("trainer.rounding=stochastic", ["trainer=mezo"]),
    ],
)
def test_a_users_preset_may_hold_what_another_choice_leaves_without_effect(
    word: str, others: list[str], tmp_path: Path
) -> None:
    key, _, value = word.partition("=")
    section, _, name = key.partition(".")
    (tmp_path / "experiment").mkdir()
    text = f"# @package _global_\n{section}:\n  {name}: {value}\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text, encoding="utf-8")

    config = load(with_config_dir(["experiment=mine", *others], str(tmp_path)))

    assert str(getattr(getattr(config, section), name)) in {value, f"{value}.0"}
    with pytest.raises(ConfigError, match=rf"^{re.escape(key)} must be left out .*, got {re.escape(value)}\. "):
        load([*others, word])


def test_a_text_is_needed_by_some_jobs_of_a_sweep_alone(tmp_path: Path) -> None:
    (tmp_path / "text.txt").touch()
    text = ["trainer.calibration=file", f"inputs.calibration={tmp_path / 'text.txt'}"]

    sweep = plan_sweep(["trainer.selector=random,sensitivity", *text])

    assert len(sweep.configs) == 2
    with pytest.raises(ConfigError, match=r"^trainer\.calibration must be left out without trainer\.selector="):
        plan_sweep(["trainer.selector=random,magnitude", *text])


def test_jobs_of_a_sweep_may_have_words_that_others_need() -> None:
    sweep = plan_sweep(["trainer.lr=0.5", "server_optimizer.lr=null,0.25"])

    assert [config.server_optimizer.lr for config in sweep.configs] == [0.5, 0.25]


@pytest.mark.parametrize("search", [[], ["hydra/sweeper=optuna"]])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["trainer.lr=1e-4,1e-3,2e-3", "server_optimizer.lr=1e-3"],  # the middle one is that of all jobs
            "trainer.lr must be left out beside server_optimizer.lr, which is used in its place, got 1e-4,1e-3,2e-3. ",
        ),
        (
            ["strategy.aggregation=mean,median", "strategy.trim_share=0.1,0.2"],
            "strategy.trim_share must be left out without strategy.aggregation=trimmed_mean, got 0.1,0.2. ",
        ),
        (
            [*OWN, "partition=own", "split.num_train=100", "seed=0,1"],
            "split.num_train must be left out for partition=own, where each client has a file of its own, ",
        ),
    ],
)
def test_a_word_without_effect_in_all_jobs_of_a_sweep_is_refused(
    words: list[str], message: str, search: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_sweep([*search, *words])

    assert str(caught.value).startswith(message)


def test_a_word_that_each_job_of_a_grid_has_another_reason_not_to_read_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"strategy\.clip_rounds must be left out for strategy\.clip_factor=0"):
        plan_sweep(["strategy.clip_factor=0,100", "strategy.aggregation=majority_sign", "strategy.clip_rounds=5,6"])


def test_a_word_that_some_pair_of_a_searchs_choices_needs_is_no_fault() -> None:
    """Neither of the two jobs that are looked at uses it: one does not clip, the other has signs."""
    pairs = ["strategy.clip_factor=0,100", "strategy.aggregation=mean,majority_sign"]

    sweep = plan_sweep(["hydra/sweeper=optuna", *pairs, "strategy.clip_rounds=5"])

    found = [(config.strategy.clip_factor, config.strategy.aggregation.value) for config in sweep.configs]
    assert found == [(0, "mean"), (100, "majority_sign")]
