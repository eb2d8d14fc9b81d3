"""A config as text: exact round trips, nothing run from the text, a hash of what peers must share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fedzo.config.load import load
from fedzo.config.plugins import plugin_classes
from fedzo.config.schema import RunConfig, filled
from fedzo.config.travel import config_hash, from_json, is_same_run, save_yaml, to_json
from fedzo.data.config import TaskConfig
from fedzo.data.partition import PartitionConfig
from fedzo.data.partition.plain import NaturalConfig
from fedzo.errors import ConfigError
from fedzo.fl.config import Seeds
from fedzo.models.config import DType
from fedzo.runtime.config import LocalConfig
from fedzo.trainers.meerkat import MeerkatConfig
from fedzo.trainers.mezo import MezoConfig

texts = st.text(st.characters(codec="utf-8"), max_size=20)
positive = st.floats(min_value=1e-300, max_value=1e300)


def sound() -> RunConfig:
    task = TaskConfig(name="rotten_tomatoes", template="{text}", candidates=[" bad", " good"])
    return filled(RunConfig(task=task))


@st.composite
def configs(draw: st.DrawFn) -> RunConfig:
    config = sound()
    config.seed = draw(st.integers(0, 2**64 - 1))
    config.task.template = "{text}" + draw(texts)
    config.task.candidates = draw(st.lists(texts, min_size=2, max_size=4))
    config.data.path = draw(st.none() | texts)
    config.fl.seeds = draw(st.sampled_from(Seeds))
    config.evaluation.central = draw(st.booleans())
    config.trainer = draw(st.builds(MezoConfig, lr=positive, eps=positive) | st.builds(MeerkatConfig, eps=positive))
    dtypes = [dtype for dtype in DType if dtype is not DType.auto or isinstance(config.trainer, MeerkatConfig)]
    config.model.dtype = draw(st.sampled_from(dtypes))
    classes = plugin_classes()
    config.partition = draw(
        st.sampled_from([cls for name, cls in classes["partition"].items() if name not in ("natural", "own")])
    )()
    config.runtime = draw(st.sampled_from(list(classes["runtime"].values())))()
    return config


@given(configs())
def test_json_gives_an_equal_config_back(config: RunConfig) -> None:
    assert from_json(to_json(config)) == config


@given(configs())
def test_yaml_holds_what_json_holds(tmp_path_factory: pytest.TempPathFactory, config: RunConfig) -> None:
    path = tmp_path_factory.mktemp("run") / "config.yaml"

    save_yaml(config, path)

    assert yaml.safe_load(path.read_text(encoding="utf-8")) == json.loads(to_json(config))


def test_a_loaded_experiment_travels() -> None:
    config = load(["experiment=quickstart", "partition=natural", "partition.column=site"])

    assert from_json(to_json(config)) == config
    assert config.partition == NaturalConfig(column="site")


def test_plugins_are_named_by_their_option() -> None:
    config = replace(sound(), runtime=LocalConfig(), trainer=MezoConfig())

    plain = json.loads(to_json(config))

    assert plain["trainer"] == {"plugin": "mezo", "lr": 1e-6, "eps": 1e-3, "rounding": "nearest"}
    assert plain["runtime"]["plugin"] == "local"
    assert "_target_" not in to_json(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda plain: plain.update(x=1),
            r"configuration must hold exactly the keys of RunConfig, got unknown \['x'\]",
        ),
        (
            lambda plain: plain["fl"].pop("rounds"),
            r"fl must hold exactly the keys of FlConfig, .* missing \['rounds'\]",
        ),
        (lambda plain: plain["trainer"].update(_target_="os.system"), r"trainer must hold .* unknown \['_target_'\]"),
        (
            lambda plain: plain["trainer"].update(plugin="os.system"),
            r"trainer\.plugin must be one of .*, got 'os\.system'",
        ),
        (lambda plain: plain["trainer"].update(plugin=["mezo"]), r"trainer\.plugin must be one of .*meerkat, mezo"),
        (lambda plain: plain["trainer"].pop("plugin"), r"trainer\.plugin must be one of .*, got None"),
        (lambda plain: plain.update(trainer=None), r"trainer\.plugin must be one of"),
        (lambda plain: plain.update(fl=[1]), r"fl must be a mapping for FlConfig, got \[1\]"),
        (lambda plain: plain["fl"].update(rounds=True), r"fl\.rounds must be int, got True"),
        (lambda plain: plain["fl"].update(rounds="3"), r"fl\.rounds must be int, got '3'"),
        (lambda plain: plain["fl"].update(rounds=3.0), r"fl\.rounds must be int, got 3\.0"),
        (
            lambda plain: plain["fl"].update(seeds="mine"),
            r"fl\.seeds must be one of shared, per_client, pool, got 'mine'",
        ),
        (lambda plain: plain["report"].update(html=1), r"report\.html must be bool, got 1"),
        (lambda plain: plain["trainer"].update(lr="1"), r"trainer\.lr must be float, got '1'"),
        (lambda plain: plain["trainer"].update(lr=10**400), r"trainer\.lr must be float, got 1000"),
        (lambda plain: plain["task"].update(candidates="ab"), r"task\.candidates must be list\[str\], got 'ab'"),
        (lambda plain: plain["task"].update(candidates=["a", 1]), r"task\.candidates\[1\] must be str, got 1"),
        (lambda plain: plain["data"].update(path=3), r"data\.path must be str, got 3"),
        (lambda plain: plain["fl"].update(rounds=0), r"fl\.rounds must be >= 1, got 0"),
        (lambda plain: plain.pop("version"), r"configuration must be of version 2, got none, as fedzo 0\.1 wrote it"),
        (lambda plain: plain.update(version=3), r"configuration must be of version 2, got 3"),
    ],
)
def test_a_changed_text_is_refused(change: Callable[[dict[str, Any]], object], message: str) -> None:
    plain = json.loads(to_json(sound()))

    change(plain)

    with pytest.raises(ConfigError, match=message):
        from_json(json.dumps(plain))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "NaN", "[" * 100_000, "1" * 5000])
def test_text_that_is_no_config_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"configuration must be"):
        from_json(text)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_refused(number: str) -> None:
    text = to_json(sound()).replace('"eps": 0.001', f'"eps": {number}', 1)

    with pytest.raises(ConfigError, match=r"not a finite number|must be float, got inf"):
        from_json(text)


def test_what_cannot_travel_is_refused_before_it_does() -> None:
    config = sound()
    config.trainer.lr = float("nan")

    with pytest.raises(ConfigError, match="The configuration must hold finite numbers to travel"):
        to_json(config)
    with pytest.raises(ConfigError, match=r"partition must be one of .*, got PartitionConfig"):
        to_json(replace(sound(), partition=PartitionConfig()))


def test_interpolations_in_a_text_stay_text() -> None:
    config = sound()
    config.task.template = "${oc.env:HOME} {text}"

    assert from_json(to_json(config)).task.template == "${oc.env:HOME} {text}"


def test_hash_is_of_the_canonical_text_without_what_is_local_to_a_site() -> None:
    config = sound()
    plain = json.loads(to_json(config))
    for key in ("device", "threads", "runtime", "report"):
        del plain[key]
    del plain["model"]["dtype"], plain["model"]["compile"], plain["model"]["quantization"], plain["data"]["path"]
    del plain["trainer"]["mask_path"], plain["trainer"]["calibration_path"]

    canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"))

    assert config_hash(config) == hashlib.sha256(canonical.encode()).hexdigest()


LOCAL = [
    ["device=cpu"],
    ["threads=3"],
    ["model.dtype=bfloat16"],
    ["model.compile=true"],
    ["data.path=."],
    ["runtime=local"],
    ["runtime=ray", "runtime.num_actors=3"],
    ["report=none"],
    ["trainer.mask_path=."],
    ["trainer.calibration_path=."],
]
SHARED = [
    ["seed=1"],
    ["model=gpt2"],
    ["model.tokens_per_batch=8192"],
    ["model.revision=v2"],
    ["trainer=mezo"],
    ["trainer.density=0.01"],
    ["partition=iid"],
    ["estimator.num_probes=2"],
    ["estimator=one_sided", "estimator.num_probes=1"],
    ["server_optimizer.lr=0.5"],
    ["server_optimizer=momentum"],
    ["strategy.clip_factor=3"],
    ["fl.rounds=3"],
    ["strategy=size"],
    ["task.candidates=[' no',' yes']"],
    ["data.num_dev=3"],
    ["evaluation.every_rounds=5"],
    ["faults.absent=['1@1']"],
]


@pytest.mark.parametrize("overrides", LOCAL, ids=" ".join)
def test_hash_ignores_what_is_local_to_a_site(overrides: list[str]) -> None:
    assert config_hash(load(overrides)) == config_hash(load([]))


@pytest.mark.parametrize("overrides", SHARED, ids=" ".join)
def test_hash_depends_on_what_peers_must_share(overrides: list[str]) -> None:
    assert config_hash(load(overrides)) != config_hash(load([]))


@pytest.mark.parametrize(
    ("overrides", "same"),
    [
        (["threads=3"], True),
        (["device=cpu"], True),
        (["runtime=local"], True),
        (["report=none"], True),
        (["model.dtype=bfloat16"], False),  # a peer's own choice, but another result
        (["trainer.calibration_tokens=64"], False),
        (["seed=1"], False),
    ],
    ids=str,
)
def test_a_sweep_takes_a_finished_run_for_its_own_only_where_files_and_numbers_are_the_same(
    overrides: list[str], same: bool
) -> None:
    assert is_same_run(load(overrides), load([])) is same


def test_another_file_makes_another_run_of_a_sweep() -> None:
    one, other = load([]), load([])
    other.data.path = "/elsewhere"

    assert config_hash(one) == config_hash(other)
    assert not is_same_run(one, other)


@pytest.mark.parametrize(
    "name", ["facebook/opt-125m", "/models/opt-125m", "./opt-125m/", "C:\\models\\opt-125m", "opt-125m"]
)
def test_hash_takes_the_last_component_of_the_models_name(name: str) -> None:
    config, other = sound(), sound()
    config.model.name, other.model.name = name, "opt-125m"

    assert config_hash(config) == config_hash(other)
