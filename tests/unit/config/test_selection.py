"""Rules on the selection of clients: each is broken once."""

from __future__ import annotations

import pytest

from fedzo.config.load import load
from fedzo.config.travel import from_json, to_json
from fedzo.config.validate import problems
from fedzo.errors import ConfigError
from fedzo.fl.selection.config import Combine, Statistic, VpcsConfig, VpcsTest


def complaint(*overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load(["fl.local_steps=10", *overrides])
    return str(error.value)


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["vpcs", "early_steps=0"], "selection.early_steps must be between 1 and fl.local_steps (10), got 0."),
        (["random", "early_steps=11"], "selection.early_steps must be between 1 and fl.local_steps (10), got 11."),
        (["cusum", "fallback_steps=11"], "selection.fallback_steps must be between 0 (half) and fl.local_steps (10)"),
        (["oracle", "max_share=1.1"], "selection.max_share must be between 0 and 1, got 1.1."),
        (["vpcs", "initial_steps=0"], "selection.initial_steps must be >= 1, got 0."),
        (["vpcs", "later_steps=-1"], "selection.later_steps must be >= 1, got -1."),
        (["vpcs", "calibration_steps=39"], "must be between initial_steps + later_steps (40) and 65535, got 39."),
        (["vpcs", "calibration_steps=65536"], "must be between initial_steps + later_steps (40) and 65535"),
        (["vpcs", "ratio_threshold=0"], "selection.ratio_threshold must be > 0 and finite, got 0.0."),
        (["vpcs", "level_threshold=inf"], "selection.level_threshold must be > 0 and finite, got inf."),
        (["vpcs", "sigma_share=-1"], "selection.sigma_share must be > 0 and finite, got -1.0."),
        (["vpcs", "quiet_threshold=1"], "selection.quiet_threshold must be below 1, got 1.0. It is a share"),
        (["vpcs", "tests=[]"], "selection.tests must name a test, got []."),
        (["cusum", "drift=-0.1"], "selection.drift must be >= 0 and finite, got -0.1."),
        (["cusum", "threshold=0"], "selection.threshold must be > 0 and finite, got 0.0."),
        (["random", "num_flagged=9"], "selection.num_flagged must be between 1 and fl.num_clients (8), got 9."),
        (["random", "num_flagged=0"], "selection.num_flagged must be between 1 and fl.num_clients (8), got 0."),
        (["oracle", "label_share=0"], "selection.label_share must be > 0 and <= 1, got 0.0."),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, list) else "",
)
def test_broken_rules_are_named(overrides: list[str], text: str) -> None:
    option, *keys = overrides

    assert text in complaint(f"selection={option}", *(f"selection.{key}" for key in keys))


@pytest.mark.parametrize("trainer", ["mezo", "lora", "ia3", "prefix", "prompt", "meerkat"])
def test_gradip_asks_for_a_trainer_that_can_have_a_gradient(trainer: str) -> None:
    chosen = [f"trainer={trainer}", *(["trainer.selector=random"] if trainer == "meerkat" else [])]

    text = complaint("selection=vpcs", "selection.statistic=gradip", *chosen)

    assert "selection.statistic must be abs_g for a trainer that has no gradient to compare with, got 'gradip'." in text
    assert "trainer.selector=sensitivity" in text
    load(["selection=vpcs", *chosen])


def test_gradip_is_left_to_the_start_where_a_mask_is_given(tmp_path: object) -> None:
    load(["selection=vpcs", "selection.statistic=gradip"])
    load(["selection=vpcs", "selection.statistic=gradip", "trainer.selector=random", f"trainer.mask_path={tmp_path}"])


@pytest.mark.parametrize("selection", ["vpcs", "cusum"])
def test_a_selection_by_the_size_of_g_refuses_an_estimator_that_divides_it_away(selection: str) -> None:
    text = complaint(f"selection={selection}", "estimator=fzoo")

    assert "estimator must be two_point or one_sided for a selection by |g|: fzoo divides |g|" in text
    load(["selection=random", "estimator=fzoo"])


def test_a_comparison_with_the_others_needs_others() -> None:
    assert "must give at least 3 clients a round for selection=cusum" in complaint(
        "selection=cusum", "fl.num_clients=2"
    )
    assert "got 2." in complaint("selection=cusum", "strategy.clients_per_round=2")
    assert "fl.num_clients must be at least 3 for selection.tests=[level], which compares" in complaint(
        "selection=vpcs", "selection.tests=[level]", "fl.num_clients=2"
    )
    load(["selection=vpcs", "fl.num_clients=2"])
    load(["selection=vpcs", "selection.tests=[level]", "fl.num_clients=3"])


def test_an_oracle_needs_labels() -> None:
    task = ["task=squad", "data.path=."]

    assert "selection must not be oracle for a task without labels" in complaint("selection=oracle", *task)


def test_one_local_step_is_no_error() -> None:
    for option in ("vpcs", "cusum", "random", "oracle"):
        assert problems(load([f"selection={option}", "fl.local_steps=1"])) == []


def test_lists_and_choices_travel() -> None:
    config = load(
        ["selection=vpcs", "selection.tests=[level,ratio]", "selection.combine=either", "selection.statistic=gradip"]
    )

    assert config.selection == VpcsConfig(
        tests=[VpcsTest.level, VpcsTest.ratio], combine=Combine.either, statistic=Statistic.gradip
    )
    assert from_json(to_json(config)) == config


@pytest.mark.parametrize("selection", ["vpcs", "cusum"])
def test_signs_have_no_size_to_select_by(selection: str) -> None:
    text = complaint(f"selection={selection}", "strategy.aggregation=majority_sign")

    assert "strategy.aggregation must be another than majority_sign for a selection by |g|" in text


@pytest.mark.parametrize("optimizer", ["scaffold", "feddyn"])
def test_rules_that_walk_every_client_know_of_no_early_stop(optimizer: str) -> None:
    text = complaint("selection=random", "selection.num_flagged=1", f"optimizer={optimizer}")

    assert f"selection must be none for optimizer={optimizer}, which walks every client's path" in text
    assert "got 'random'" in text
