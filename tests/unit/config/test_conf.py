"""Every file under ``conf`` composes, and the keys of the configuration change only on purpose."""

from __future__ import annotations

import copy
import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from fedzo.config import plugins as paths
from fedzo.config.compose import compose_run, register_schemas, session, to_config
from fedzo.config.load import load
from fedzo.config.plugins import list_groups, plugin_classes, plugin_name
from fedzo.config.rules import launch_problems
from fedzo.config.schema import LaunchConfig
from fedzo.config.travel import from_json, to_json
from fedzo.data.partition.by_label import DirichletEqualConfig
from fedzo.data.sources import EMBEDDED
from fedzo.errors import ConfigError
from fedzo.runtime.config import LocalConfig
from fedzo.trainers.adapters import LoraTrainerConfig
from fedzo.trainers.base import TrainerConfig
from fedzo.trainers.meerkat import MeerkatConfig
from fedzo.trainers.mezo import MezoConfig
from fedzo.trainers.tables import TablesConfig
from fedzo.zo.estimator import TwoPointConfig
from fedzo.zo.server_optimizer import SgdConfig

CONF = paths.conf_dir()
FILES = sorted(path.relative_to(CONF) for path in CONF.glob("*/*.yaml"))
OPTIONS = [(group, option) for group, options in list_groups().items() for option in options]
NEEDS = {
    "data=files": ["data.path=."],
    "partition=natural": ["partition.column=site"],
    "partition=own": ["data.path=.", "evaluation.central=false"],
    "experiment=sites": ["data.path=."],
    "runtime=remote": ["runtime.server=.", "partition=own", "evaluation.central=false"],
    "model=hf": ["model.name=gpt2"],
    "preprocess=oat_rephrase": ["rewriter=transformers", "rewriter.model=smollm2-135m"],
    "rewriter=openai_compatible": ["rewriter.base_url=https://example.org/v1", "rewriter.model=m"],
    "rewriter=transformers": ["rewriter.model=smollm2-135m"],
}
"""What a user must add to an option that cannot stand alone."""
WRITTEN = {"alpaca", "chat", "instruct", "squad"}
"""Tasks without labels, by which the default partition would deal."""
CUSTOM = ["task.template='{text}'", "task.candidates=[' no',' yes']", "data.path=."]


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_to_a_sound_run(group: str, option: str) -> None:
    more = NEEDS.get(f"{group}={option}", [])
    if group == "task" and option not in EMBEDDED:
        more = CUSTOM if option == "custom" else ["data.path=."]
        if option in WRITTEN:
            more = [*more, "partition=iid"]

    config = load([f"{group}={option}", *more])

    assert launch_problems(config) == []


def test_a_plugin_with_nothing_but_the_codes_defaults_has_no_file() -> None:
    plugins = {file for file in FILES if file.parent.name in plugin_classes()}

    assert plugins == {Path("runtime/inline_batched.yaml"), Path("trainer/last_norm.yaml")}


def test_every_option_has_its_schema_and_a_summary() -> None:
    for file in FILES:
        lines = (CONF / file).read_text(encoding="utf-8")
        assert "_target_" not in lines
        if file.parent.name != "experiment":
            first = yaml.safe_load(lines)["defaults"][0]
            options = plugin_classes().get(file.parent.name) or {file.parent.name: None}
            assert first in {f"{name}_schema" for name in options}, file
            assert first == f"{file.stem}_schema" or file.stem not in options, file

    summaries = {f"{group}={name}": text for group, options in list_groups().items() for name, text in options.items()}

    assert [name for name, text in summaries.items() if not text] == []
    assert {"preprocess=identity", "partition=own", "trainer=meerkat"} <= set(summaries)


def test_every_registered_plugin_can_be_chosen() -> None:
    for group, options in plugin_classes().items():
        for name, config_class in options.items():
            with session():
                config = to_config(compose_run([f"{group}={name}"]))

            assert type(getattr(config, group)) is config_class
            assert plugin_name(group, getattr(config, group)) == name


def test_set_of_keys_is_pinned() -> None:
    golden = Path(__file__).with_name("keys.txt")

    found = "\n".join(_keys(LaunchConfig, "")) + "\n"

    assert found == golden.read_text(encoding="utf-8"), f"a key was added or renamed on purpose? Then edit {golden}"


def _keys(config_class: type, prefix: str) -> list[str]:
    hints = get_type_hints(config_class)
    plugins = plugin_classes() if config_class is LaunchConfig else {}
    found = []
    for field in fields(config_class):
        if field.name in plugins:
            for name, plugin in plugins[field.name].items():
                found += _keys(plugin, f"{field.name}({name}).") or [f"{field.name}({name})"]
        elif is_dataclass(hints[field.name]):
            found += _keys(hints[field.name], f"{prefix}{field.name}.")
        else:
            found.append(f"{prefix}{field.name}")
    return found


def test_defaults_are_the_embedded_meerkat_run() -> None:
    config = load([])

    assert (config.model.name, config.task.name, config.data.path) == ("smollm2-135m", "rotten_tomatoes", None)
    assert config.trainer == MeerkatConfig()


@pytest.mark.parametrize(
    ("trainer", "expected"),
    [
        ("meerkat", MeerkatConfig()),
        ("mezo", MezoConfig()),
        ("lora", LoraTrainerConfig(lr=5e-5, eps=1e-2)),  # MeZO's
        ("tables", TablesConfig(lr=1e-4, eps=1e-3)),
    ],
)
def test_trainer_brings_its_step_sizes(trainer: str, expected: TrainerConfig) -> None:
    config = load([f"trainer={trainer}"])

    assert config.server_optimizer == SgdConfig(lr=expected.lr)
    assert config.estimator == TwoPointConfig(eps=expected.eps)


@pytest.mark.parametrize("server_optimizer", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("estimator", ["two_point", "one_sided", "fzoo"])
def test_every_estimator_and_rule_takes_the_trainers_step_sizes(estimator: str, server_optimizer: str) -> None:
    config = load(
        ["trainer.eps=0.25", "trainer.lr=0.5", f"estimator={estimator}", f"server_optimizer={server_optimizer}"]
    )

    assert (config.estimator.eps, config.server_optimizer.lr) == (0.25, 0.5)


def test_null_takes_the_trainers_step_sizes_and_what_travels_holds_numbers() -> None:
    config = load(["trainer.eps=0.25", "trainer.lr=0.5", "estimator.eps=null", "server_optimizer.lr=null"])

    assert (config.estimator.eps, config.server_optimizer.lr) == (0.25, 0.5)
    by_hand = json.loads(to_json(LaunchConfig(trainer=MezoConfig(lr=0.125, eps=0.5), task=config.task)))
    assert (by_hand["estimator"]["eps"], by_hand["server_optimizer"]["lr"]) == (0.5, 0.125)
    by_hand["estimator"]["eps"] = None
    assert from_json(json.dumps(by_hand), LaunchConfig).estimator.eps == 0.5


def test_a_wrong_step_size_of_the_trainer_is_told_once() -> None:
    with pytest.raises(ConfigError, match=r"^trainer\.eps must be > 0 and finite, got 0\.0\. 1e-3 is usual\.$"):
        load(["trainer.eps=0"])
    with pytest.raises(ConfigError, match=r"^estimator\.eps must be > 0 and finite in float32, got 1e-60\."):
        load(["trainer.eps=1e-60"])
    with pytest.raises(ConfigError, match=r"^server_optimizer\.lr must be >= 0 and finite in float32, got 1e\+39\."):
        load(["trainer.lr=1e39"])


def test_the_default_partition_gives_the_default_mean_clients_of_equal_size() -> None:
    config = load([])

    assert type(config.partition) is type(LaunchConfig().partition) is DirichletEqualConfig
    assert (config.strategy.weighting, config.strategy.aggregation) == ("uniform", "mean")


def test_step_sizes_can_be_set_apart_from_the_trainer() -> None:
    config = load(["trainer=mezo", "estimator.eps=0.5", "server_optimizer.lr=0"])

    assert config.trainer == MezoConfig()
    assert (config.estimator, config.server_optimizer) == (TwoPointConfig(eps=0.5), SgdConfig(lr=0.0))


def test_choosing_a_plugin_leaves_no_key_of_the_default_behind() -> None:
    config = load(["trainer=mezo", "runtime=local"])

    assert config.trainer == MezoConfig()
    assert config.runtime == LocalConfig()


@pytest.mark.parametrize(("experiment", "rows"), [("quickstart", 512), ("meerkat", 16)])
def test_first_experiments_are_eight_non_iid_clients_of_equal_size(experiment: str, rows: int) -> None:
    config = load([f"experiment={experiment}"])

    assert config.fl.num_clients * config.fl.batch_size == rows
    assert (plugin_name("partition", config.partition), plugin_name("runtime", config.runtime)) == (
        "dirichlet_equal",
        "inline",
    )
    assert config.fl.local_steps == 1


@pytest.mark.parametrize("experiment", [file.stem for file in FILES if file.parent.name == "experiment"])
def test_an_experiment_can_be_run_with_another_trainer_and_partition(experiment: str) -> None:
    config = load([f"experiment={experiment}", "trainer=mezo", "partition=natural", "partition.column=site"])

    assert config.trainer == MezoConfig()


def test_run_folders_and_job_folders_are_named_by_hydra() -> None:
    with session():
        node = OmegaConf.to_container(compose_run([], hydra=True).hydra)

    assert isinstance(node, dict)
    assert node["job"]["chdir"] is False
    assert "%f" in node["run"]["dir"]  # microseconds: two runs of one second get two folders
    assert node["sweep"]["subdir"].startswith("${fedzo_job_folder:")


def test_packaged_conf_is_preferred_to_the_source_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "fedzo"
    for folder in (tmp_path / "conf", package / "_conf"):
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text("", encoding="utf-8")
    monkeypatch.setattr(paths, "_PACKAGE", package)

    assert paths.conf_dir() == package / "_conf"
    (package / "_conf" / "config.yaml").unlink()
    assert paths.conf_dir() == tmp_path / "conf"
    (tmp_path / "conf" / "config.yaml").unlink()
    with pytest.raises(
        ConfigError, match=r"conf must hold config.yaml, found none in .*_conf or .*conf. Reinstall fedzo"
    ):
        paths.conf_dir()


def test_hydra_copies_a_schema_that_it_loads_and_not_the_store_of_all() -> None:
    register_schemas()
    store = ConfigStore.instance()

    assert copy.deepcopy(store) is store
    assert store.load("schema.yaml").node is not store.load("schema.yaml").node


def test_sites_are_scored_on_the_way() -> None:
    """The server has no rows, so that scores are those of the clients."""
    evaluation = load(["experiment=sites", "data.path=."]).evaluation

    assert (evaluation.central, evaluation.federated_every_rounds) == (False, 10)
