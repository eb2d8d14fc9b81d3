"""A config as text: exact round trips, nothing run from the text, a hash of what peers must share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fedzo.config.load import load
from fedzo.config.plugins import plugin_classes
from fedzo.config.schema import LaunchConfig, RunConfig, SiteConfig, SiteFile, filled
from fedzo.config.travel import config_hash, from_json, is_same_run, load_site, to_json, to_yaml
from fedzo.data.config import DataConfig, TaskConfig
from fedzo.data.partition import PartitionConfig
from fedzo.data.partition.plain import NaturalConfig, OwnConfig
from fedzo.errors import ConfigError
from fedzo.fl.config import Directions, SiteLimitsConfig
from fedzo.models.config import BaseConfig, DType, ModelConfig
from fedzo.runtime.config import LocalConfig, RemoteConfig
from fedzo.trainers.base import InputsConfig
from fedzo.trainers.meerkat import MeerkatConfig
from fedzo.trainers.mezo import MezoConfig

texts = st.text(st.characters(codec="utf-8"), max_size=20)
plain = texts.map(lambda text: text.replace("{", "").replace("}", ""))  # a brace opens a column
positive = st.floats(min_value=1e-300, max_value=1e300)


DIGEST = "ab" * 32


def agreed(launch: LaunchConfig) -> RunConfig:
    """What peers would agree on for a model and an artifact of some digest."""
    base = BaseConfig(label="opt", weights_digest=DIGEST, tokenizer_digest=DIGEST, architecture_digest=DIGEST)
    return launch.run(base, artifact=DIGEST)


def sound() -> LaunchConfig:
    task = TaskConfig(name="rotten_tomatoes", template="{text}", candidates=[" bad", " good"])
    return filled(LaunchConfig(task=task))


@st.composite
def configs(draw: st.DrawFn) -> LaunchConfig:
    config = sound()
    config.seed = draw(st.integers(0, 2**64 - 1))
    config.task.template = "{text}" + draw(plain)
    config.task.candidates = draw(st.lists(plain, min_size=2, max_size=4, unique=True))
    config.data.path = draw(st.none() | texts)
    config.fl.directions = draw(st.sampled_from(Directions))
    config.evaluation.central = draw(st.booleans())
    config.trainer = draw(st.builds(MezoConfig, lr=positive, eps=positive) | st.builds(MeerkatConfig, eps=positive))
    dtypes = [dtype for dtype in DType if dtype is not DType.auto or isinstance(config.trainer, MeerkatConfig)]
    config.model.dtype = draw(st.sampled_from(dtypes))
    classes = plugin_classes()
    config.partition = draw(
        st.sampled_from([cls for name, cls in classes["partition"].items() if name not in ("natural", "own")])
    )()
    config.runtime = draw(st.sampled_from(list(classes["runtime"].values())))()
    if isinstance(config.runtime, RemoteConfig):  # sites have rows of their own
        config.runtime.server, config.partition, config.evaluation.central = "server", OwnConfig(), False
    return config


@given(configs())
def test_json_gives_an_equal_config_back(config: LaunchConfig) -> None:
    assert from_json(to_json(config), LaunchConfig) == config


@given(configs())
def test_yaml_holds_what_json_holds(tmp_path_factory: pytest.TempPathFactory, config: LaunchConfig) -> None:
    path = tmp_path_factory.mktemp("run") / "config.yaml"

    path.write_text(to_yaml(config), encoding="utf-8")

    assert yaml.safe_load(path.read_text(encoding="utf-8")) == json.loads(to_json(config))


def test_a_loaded_experiment_travels() -> None:
    config = load(["experiment=quickstart", "partition=natural", "partition.column=site"])

    assert from_json(to_json(config), LaunchConfig) == config
    assert config.partition == NaturalConfig(column="site")


def test_plugins_are_named_by_their_option() -> None:
    config = replace(sound(), runtime=LocalConfig(), trainer=MezoConfig())

    plain = json.loads(to_json(config))

    assert plain["trainer"] == {"plugin": "mezo", "lr": 1e-6, "eps": 1e-3, "first_layer": 0, "rounding": "nearest"}
    assert plain["runtime"]["plugin"] == "local"
    assert "_target_" not in to_json(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda plain: plain.update(x=1),
            r"configuration must hold exactly the keys of LaunchConfig, got unknown \['x'\]",
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
            lambda plain: plain["fl"].update(directions="mine"),
            r"fl\.directions must be one of shared, per_client, pool, got 'mine'",
        ),
        (lambda plain: plain["report"].update(html=1), r"report\.html must be bool, got 1"),
        (lambda plain: plain["trainer"].update(lr="1"), r"trainer\.lr must be float, got '1'"),
        (lambda plain: plain["trainer"].update(lr=10**400), r"trainer\.lr must be float, got 1000"),
        (lambda plain: plain["task"].update(candidates="ab"), r"task\.candidates must be list\[str\], got 'ab'"),
        (lambda plain: plain["task"].update(candidates=["a", 1]), r"task\.candidates\[1\] must be str, got 1"),
        (lambda plain: plain["data"].update(path=3), r"data\.path must be str, got 3"),
        (lambda plain: plain["fl"].update(rounds=0), r"fl\.rounds must be >= 1, got 0"),
        (
            lambda plain: plain.pop("version"),
            r"configuration must be of version 2, got none, so that",
        ),
        (lambda plain: plain.update(version=3), r"configuration must be of version 2, got 3"),
    ],
)
def test_a_changed_text_is_refused(change: Callable[[dict[str, Any]], object], message: str) -> None:
    plain = json.loads(to_json(sound()))

    change(plain)

    with pytest.raises(ConfigError, match=message):
        from_json(json.dumps(plain), LaunchConfig)


def test_several_broken_rules_of_a_text_are_told_in_the_form_of_a_command_line() -> None:
    plain = json.loads(to_json(sound()))
    plain["fl"].update(rounds=0, batch_size=0)

    with pytest.raises(ConfigError) as refused:
        from_json(json.dumps(plain), LaunchConfig)

    assert str(refused.value).splitlines() == [
        "2 problems in the configuration:",
        "  - fl.rounds must be >= 1, got 0. A run needs a round.",
        "  - fl.batch_size must be >= 1, got 0. Write a client's number of rows per step.",
    ]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "NaN", "[" * 100_000, "1" * 5000])
def test_text_that_is_no_config_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^configuration(: must be JSON, got| must be a mapping for)"):
        from_json(text, LaunchConfig)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_refused(number: str) -> None:
    text = to_json(sound()).replace('"eps": 0.001', f'"eps": {number}', 1)

    with pytest.raises(ConfigError, match=r"must be JSON, got (NaN|Infinity)|must be float, got inf"):
        from_json(text, LaunchConfig)


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

    assert from_json(to_json(config), LaunchConfig).task.template == "${oc.env:HOME} {text}"


def test_hash_is_of_the_canonical_text() -> None:
    config = agreed(sound())

    canonical = json.dumps(json.loads(to_json(config)), sort_keys=True, separators=(",", ":"))

    assert config_hash(config) == hashlib.sha256(canonical.encode()).hexdigest()


def test_what_travels_names_no_place_of_the_machine_that_launched_it() -> None:
    launch = sound()
    launch.device, launch.threads = "cuda:77", 77
    launch.model = ModelConfig(name="/secret/opt", revision="secret", gguf_file="secret", tokens_per_batch=7777)
    launch.data.path = "/secret"
    launch.inputs = InputsConfig(artifact="/secret", calibration="/secret")

    text = to_json(agreed(launch))

    assert "secret" not in text
    assert "77" not in text.replace(DIGEST, "")
    assert from_json(text, RunConfig) == agreed(launch)


@pytest.mark.parametrize("key", [field.name for field in fields(SiteConfig)])
def test_a_key_of_a_machine_is_refused_where_a_run_travels(key: str) -> None:
    plain = json.loads(to_json(agreed(sound())))
    plain[key] = json.loads(to_json(SiteConfig()))[key]

    with pytest.raises(ConfigError, match=rf"exactly the keys of RunConfig, got unknown \['{key}'\]"):
        from_json(json.dumps(plain), RunConfig)


@pytest.mark.parametrize(
    "change",
    [
        lambda plain: plain.update(artifact="../../etc/passwd"),
        lambda plain: plain["base"].update(weights_digest="ab"),
        lambda plain: plain["base"].update(tokenizer_digest="Z" * 64),
        lambda plain: plain["base"].update(architecture_digest=""),
    ],
)
def test_a_digest_that_is_none_is_refused(change: Callable[[dict[str, Any]], object]) -> None:
    plain = json.loads(to_json(agreed(sound())))

    change(plain)

    with pytest.raises(ConfigError, match="must be a SHA-256 of 64 hexadecimal digits"):
        from_json(json.dumps(plain), RunConfig)


LOCAL = [
    ["model.tokens_per_batch=8192"],
    ["model.revision=v2"],
    ["artifact_max_bytes=1000"],
    ["device=cpu"],
    ["threads=3"],
    ["model.dtype=bfloat16"],
    ["model.compile=true"],
    ["model.cuda_graphs=true"],
    ["data.path=."],
    ["runtime=local"],
    ["runtime=ray", "runtime.num_actors=3"],
    ["report=none"],
]
SHARED = [
    ["seed=1"],
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
    ["split.num_dev=3"],
    ["evaluation.every_rounds=5"],
    ["faults.absent=['1@1']"],
]


@pytest.mark.parametrize("overrides", LOCAL, ids=" ".join)
def test_hash_ignores_what_is_local_to_a_site(overrides: list[str]) -> None:
    assert config_hash(agreed(load(overrides))) == config_hash(agreed(load([])))


def test_hash_ignores_where_a_text_lies() -> None:
    here, there = (load(["trainer.calibration=file", f"inputs.calibration={place}"]) for place in (".", ".."))

    assert config_hash(agreed(here)) == config_hash(agreed(there))


@pytest.mark.parametrize("overrides", SHARED, ids=" ".join)
def test_hash_depends_on_what_peers_must_share(overrides: list[str]) -> None:
    assert config_hash(agreed(load(overrides))) != config_hash(agreed(load([])))


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

    assert config_hash(agreed(one)) == config_hash(agreed(other))
    assert not is_same_run(one, other)


def test_another_base_or_artifact_makes_another_run() -> None:
    run, other = agreed(sound()), "0" * 64

    for change in (replace(run, artifact=other), replace(run, base=replace(run.base, weights_digest=other))):
        assert config_hash(change) != config_hash(run)


def test_a_site_file_gives_the_keys_that_differ_from_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("device: cpu\nmodel: {name: ./opt, dtype: bfloat16}\ndata: {path: ./rows}\n")

    site = load_site(tmp_path / "site.yaml")

    model = ModelConfig(name=str(tmp_path / "opt"), dtype=DType.bfloat16)
    assert site == SiteFile(device="cpu", model=model, data=DataConfig(path=str(tmp_path / "rows")))


def test_a_site_in_full_is_read_back(tmp_path: Path) -> None:
    limits = SiteLimitsConfig(trainers=["mezo"], answers=["loss"], min_rows=5)
    site = SiteFile(device="cpu", threads=3, artifact_max_bytes=5, data=DataConfig(path="/rows"), limits=limits)
    (tmp_path / "site.json").write_text(to_json(site))

    assert load_site(tmp_path / "site.json") == site


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("device: [", "must be a readable YAML file"),
        ("- device", "must be a mapping for SiteFile"),
        ("[]", "must be a mapping for SiteFile"),
        ("false", "must be a mapping for SiteFile"),
        ("seed: 1", r"must hold keys of SiteFile only, got unknown \['seed'\]"),
        ("model: {dtype: int3}", "model.dtype must be one of float32"),
        ("model: {max_length: 3}", r"unknown \['max_length'\]"),
        ("device: !!python/object/apply:os.getcwd []", "must be a readable YAML file"),
    ],
)
def test_another_text_is_no_site(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text(text)

    with pytest.raises(ConfigError, match=rf"site configuration .*site\.yaml: .*{message}"):
        load_site(tmp_path / "site.yaml")
