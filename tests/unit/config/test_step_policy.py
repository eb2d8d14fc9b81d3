"""Rules on the step policy of clients: each is broken once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fedzo.config.load import load
from fedzo.config.rules import launch_problems
from fedzo.config.schema import LaunchConfig
from fedzo.config.trait_rules import format_problems
from fedzo.config.travel import from_json, to_json
from fedzo.errors import ConfigError
from fedzo.fl.server.step_policy.statistics import Statistic
from fedzo.fl.server.step_policy.vpcs import Combine, VpcsConfig, VpcsTest
from fedzo.masks.mask import Mask
from fedzo.masks.mask_file import save_mask
from fedzo.trainers import TRAINERS, TrainerConfig, TrainerTraits, named_with


def complaint(*overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load(["fl.local_steps=10", *overrides])
    return str(error.value)


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["vpcs", "early_steps=0"], "step_policy.early_steps must be between 1 and fl.local_steps (10), got 0."),
        (["random", "early_steps=11"], "step_policy.early_steps must be between 1 and fl.local_steps (10), got 11."),
        (["cusum", "fallback_steps=11"], "step_policy.fallback_steps must be between 0 (half) and fl.local_steps (10)"),
        (["oracle", "max_share=1.1"], "step_policy.max_share must be between 0 and 1, got 1.1."),
        (["vpcs", "initial_steps=0"], "step_policy.initial_steps must be >= 1, got 0."),
        (["vpcs", "later_steps=-1"], "step_policy.later_steps must be >= 1, got -1."),
        (["vpcs", "calibration_steps=39"], "must be between initial_steps + later_steps (40) and 65535, got 39."),
        (["vpcs", "calibration_steps=65536"], "must be between initial_steps + later_steps (40) and 65535"),
        (["vpcs", "ratio_threshold=0"], "step_policy.ratio_threshold must be > 0 and finite, got 0.0."),
        (["vpcs", "level_threshold=inf"], "step_policy.level_threshold must be > 0 and finite, got inf."),
        (["vpcs", "sigma_share=-1"], "step_policy.sigma_share must be > 0 and finite, got -1.0."),
        (
            ["vpcs", "quiet_threshold=1"],
            "step_policy.quiet_threshold must be below 1, got 1.0. A client is flagged above this share",
        ),
        (["vpcs", "tests=[]"], "step_policy.tests must name a test, got []."),
        (["cusum", "drift=-0.1"], "step_policy.drift must be >= 0 and finite, got -0.1."),
        (["cusum", "threshold=0"], "step_policy.threshold must be > 0 and finite, got 0.0."),
        (["random", "num_flagged=9"], "step_policy.num_flagged must be between 1 and fl.num_clients (8), got 9."),
        (["random", "num_flagged=0"], "step_policy.num_flagged must be between 1 and fl.num_clients (8), got 0."),
        (["oracle", "label_share=0"], "step_policy.label_share must be > 0 and <= 1, got 0.0."),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, list) else "",
)
def test_broken_rules_are_named(overrides: list[str], text: str) -> None:
    option, *keys = overrides

    assert text in complaint(f"step_policy={option}", *(f"step_policy.{key}" for key in keys))


def test_shares_are_made_even_for_a_mean_alone() -> None:
    text = complaint("step_policy=oracle", "step_policy.normalise=true", "strategy=median")

    assert "step_policy.normalise must be false unless strategy.aggregation=mean, since others use no weights" in text


@pytest.mark.parametrize("trainer", ["mezo", "lora", "ia3", "prefix", "prompt", "meerkat", "tables"])
def test_gradip_asks_for_a_trainer_that_can_have_a_gradient(trainer: str) -> None:
    without = {"meerkat": ["trainer.selector=random"], "tables": ["trainer.gradient=false"]}
    chosen = [f"trainer={trainer}", *without.get(trainer, [])]

    text = complaint("step_policy=vpcs", "step_policy.statistic=gradip", *chosen)

    assert (
        "step_policy.statistic must be abs_g for a trainer that has no gradient to compare with, got 'gradip'." in text
    )
    remedy = "Use trainer=meerkat with trainer.selector=sensitivity, trainer=tables with trainer.gradient=true, or step"
    assert remedy in text
    load(["step_policy=vpcs", *chosen])


@dataclass(kw_only=True, slots=True)
class OtherConfig(TrainerConfig):
    @property
    def traits(self) -> TrainerTraits:
        return TrainerTraits(gradient=True, cannot_train_dense="it has no tables")


def test_messages_name_a_plugins_trainer_by_its_traits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRAINERS._configs, "other", OtherConfig)

    text = complaint("step_policy=vpcs", "step_policy.statistic=gradip", "trainer=lora")
    (refused,) = format_problems(load(["trainer=lora"]), is_sketch=True, packed_as=None, name="sk")

    assert "trainer=other, trainer=tables with trainer.gradient=true, or step_policy.statistic=abs_g." in text
    assert refused.text.endswith("Write trainer=other, trainer=tables, or name the dense model.")


@dataclass(kw_only=True, slots=True)
class NeedyConfig(TrainerConfig):
    recipe: str


def test_messages_leave_a_trainer_out_that_has_no_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRAINERS._configs, "needy", NeedyConfig)

    assert "trainer=needy" not in named_with(lambda traits: True)


@pytest.mark.parametrize("selector", ["sensitivity", "random"])
def test_gradip_goes_by_the_recipe_of_a_mask_that_is_given(selector: str, tmp_path: Path) -> None:
    mask = Mask({"w": torch.tensor([0, 2])}, {"w": (2, 2)}, gradient=None, manifest={"selector": selector})
    save_mask(mask, tmp_path / "mask.safetensors")
    given = ["step_policy=vpcs", "step_policy.statistic=gradip", f"inputs.artifact={tmp_path / 'mask.safetensors'}"]

    if selector == "sensitivity":
        load(given)
    else:
        assert "step_policy.statistic must be abs_g for a trainer that has no gradient" in complaint(*given)


@pytest.mark.parametrize("step_policy", ["vpcs", "cusum"])
def test_a_selection_by_the_size_of_g_refuses_an_estimator_that_divides_it_away(step_policy: str) -> None:
    text = complaint(f"step_policy={step_policy}", "estimator=fzoo")

    assert "estimator must not be fzoo for a step policy that reads |g|: fzoo divides |g| by the spread" in text
    load(["step_policy=random", "estimator=fzoo"])


def test_a_comparison_with_the_others_needs_others() -> None:
    assert "must give at least 3 clients a round for step_policy=cusum" in complaint(
        "step_policy=cusum", "fl.num_clients=2"
    )
    assert "got 2." in complaint("step_policy=cusum", "strategy.clients_per_round=2")
    assert "fl.num_clients must be at least 3 for step_policy.tests=[level], which compares" in complaint(
        "step_policy=vpcs", "step_policy.tests=[level]", "fl.num_clients=2"
    )
    load(["step_policy=vpcs", "fl.num_clients=2"])
    load(["step_policy=vpcs", "step_policy.tests=[level]", "fl.num_clients=3"])


def test_a_warm_up_of_the_calibration_alone_is_refused() -> None:
    text = complaint("step_policy=vpcs", "server_optimizer.warmup_rounds=1")

    assert "server_optimizer.warmup_rounds must not be 1 for step_policy=vpcs, whose calibration takes" in text
    load(["step_policy=vpcs", "server_optimizer.warmup_rounds=2"])
    load(["step_policy=cusum", "server_optimizer.warmup_rounds=1"])


def test_an_oracle_needs_labels() -> None:
    written = ["task=squad", "data.path=."]
    listed = ["task=custom", "task.template='{q}'", "task.candidates=[' {c}']", "data.path=.", "partition=iid"]

    for task in (written, listed):
        assert "step_policy must not be oracle for a task without labels" in complaint("step_policy=oracle", *task)


def test_one_local_step_is_no_error() -> None:
    for option in ("vpcs", "cusum", "random", "oracle"):
        assert launch_problems(load([f"step_policy={option}", "fl.local_steps=1"])) == []


def test_lists_and_choices_travel() -> None:
    config = load(
        [
            "step_policy=vpcs",
            "step_policy.tests=[level,ratio]",
            "step_policy.combine=either",
            "step_policy.statistic=gradip",
        ]
    )

    assert config.step_policy == VpcsConfig(
        tests=[VpcsTest.level, VpcsTest.ratio], combine=Combine.either, statistic=Statistic.gradip
    )
    assert from_json(to_json(config), LaunchConfig) == config


@pytest.mark.parametrize("step_policy", ["vpcs", "cusum"])
def test_signs_have_no_size_to_select_by(step_policy: str) -> None:
    text = complaint(f"step_policy={step_policy}", "strategy.aggregation=majority_sign")

    assert "strategy.aggregation must not be majority_sign for a step policy that reads |g|" in text


@pytest.mark.parametrize("server_optimizer", ["scaffold", "feddyn"])
def test_rules_that_walk_every_client_know_of_no_early_stop(server_optimizer: str) -> None:
    text = complaint("step_policy=random", "step_policy.num_flagged=1", f"server_optimizer={server_optimizer}")

    assert (
        f"step_policy must be none for server_optimizer={server_optimizer}, which needs all local steps of every client"
        in text
    )
    assert "got 'random'" in text
