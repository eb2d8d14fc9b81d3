"""Loading: strict, and every problem in one message before any work."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser

from fedzo import trainers
from fedzo.config.compose import compose_run, job_folder, option_names, session
from fedzo.config.load import load
from fedzo.config.overrides import quoted, rewrite_model, with_config_dir
from fedzo.config.plugins import LISTS, conf_dir
from fedzo.config.sweep import plan_sweep
from fedzo.errors import ConfigError
from fedzo.report.trackers import TRACKERS
from fedzo.report.trackers.base import TrackerConfig
from fedzo.trainers.base import TrainerConfig


@pytest.mark.parametrize(
    "text",
    ["a b", "si\\b", "end\\", "end\\\\", "it's", "a\\'b", "\\\\'", "a,b", "{k}", "[1", "x=y", "\u00e9", "", "null"],
)
def test_a_quoted_text_is_that_text_to_hydra(text: str) -> None:
    assert OverridesParser.create().parse_override(f"key={quoted(text)}").value() == text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer=meerkt", r"^trainer must be one of .*meerkat, mezo.*, got 'meerkt'\. Did you mean meerkat\?$"),
        ("trainer=null", r"^trainer must be one of .*meerkat, mezo.*, got None\.$"),
        ("~trainer", r"^trainer must be one of .*meerkat, mezo.*, got 'TrainerConfig'\. Write trainer=<option>\.$"),
        ("+trainer=mezo", r"trainer already has a choice\. Leave out the \+\."),
        ("trainr=mezo", r"trainr is not a setting\. Did you mean trainer\?"),
        ("trainer=meerkat,mezo", r"one run must have one value per key, got several\. Add -m"),
        ("experiment=quick", r"experiment must be one of .*quickstart.*, got 'quick'\. Did you mean quickstart\?"),
        ("hydra/launcher=none", r"hydra/launcher must be one of basic.*, got 'none'"),
        ("fl.num_client=3", r"fl\.num_client is not a setting\. Did you mean fl\.num_clients\?"),
        ("num_clients=3", r"num_clients is not a setting\. Did you mean fl\.num_clients\?"),
        (
            "server_optimizer.local_steps=3",
            r"server_optimizer\.local_steps is not a setting\. Did you mean fl\.local_steps",
        ),
        ("+fl.bogus=3", r"fl\.bogus is not a setting\. Known there: batch_size, .*transport\."),
        ("+bogus=3", r"bogus is not a setting\. Known there: artifact_max_bytes, data, device, "),
        ("++fl.bogus=3", r"fl\.bogus is not a setting"),
        ("+trainer._target_=os.system", r"trainer\._target_ is not a setting"),
        ("trainer._target_=os.system", r"trainer\._target_ is not a setting"),
        ("+_target_=os.system", r"_target_ is not a setting"),
        ("~fl.rounds", r"~fl\.rounds: FlConfig \(DictConfig\) does not support deletion"),
        ("fl.rounds=abc", r"^fl\.rounds=abc: Value 'abc' of type 'str' could not be converted to Integer\.$"),
        ("fl.rounds=1.5", r"Value '1.5' of type 'float' could not be converted to Integer"),
        ("fl={rounds:3,bogus:1}", r"Key 'bogus' not in 'FlConfig'"),
        ("task.candidates=yes", r"task\.candidates=yes: Invalid value assigned.* Write task\.candidates=\[yes\]\.$"),
        ("step_policy.tests=ratio", r"Write step_policy\.tests=\[ratio\]\.$"),
        ("task.labels=none", r"^task\.labels=none: .* Write task\.labels=\[\] for an empty list\.$"),
        ("trackers=null", r"^trackers must be one of mlflow, none, tensorboard, wandb, got None\."),
        (
            "fl=foo",
            r"^fl=foo: fl holds settings and has no value of its own\. "
            r"Set one of fl\.batch_size, fl\.directions, .*fl\.rounds, ",
        ),
        ("estimator.distribution=gauss", r"Invalid value 'gauss', expected one of \[gaussian, rademacher\]"),
        ("trainer.selector=best", r"Invalid value 'best', expected one of \[sensitivity, magnitude, random\]"),
        ("trainer.granularity=row", r"Invalid value 'row', expected one of \[per_tensor, everywhere\]"),
        ("server_optimizer.lr=${trainer.foo}", r"Interpolation key 'trainer\.foo' not found"),
        ("fl.rounds=[1", r"'fl\.rounds=\[1' must be an override key=value"),
        ("fl.rounds", r"'fl\.rounds' must be an override key=value"),
        ("task.template={text} It was", r"quotes of its own: write \"task\.template='\{text\} It was'\"$"),
        ("model=hf", r"model\.name must be a hub name or a local folder, got ''\. Write model=<name or folder>\."),
        ("hydra.searchpath=3", r"hydra\.searchpath must be a list of folders"),
    ],
)
def test_a_bad_override_is_named_with_its_remedy(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load([*(["step_policy=vpcs"] if override.startswith("step_policy.") else []), override])


def test_a_key_of_another_plugin_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.density is not a setting\. It belongs to trainer=meerkat, and an"):
        load(["trainer.density=0.1", "trainer=mezo"])
    owners = r"step_policy=cusum or step_policy=vpcs"
    with pytest.raises(
        ConfigError, match=rf"step_policy\.graded is not a setting\. It belongs to {owners}, and another"
    ):
        load(["step_policy.graded=true"])


def test_all_problems_come_in_one_message() -> None:
    overrides = [
        "trainer=meerkt",
        "fl.num_client=3",
        "fl.rounds=abc",
        "partition.alpha=-1",
        "fl.batch_size=0",
        "seed=[1",
    ]

    with pytest.raises(ConfigError) as caught:
        load(overrides)

    lines = str(caught.value).splitlines()
    assert lines[0] == "6 problems in the configuration:"
    keys = [
        "'seed=[1'",
        "trainer must",
        "fl.num_client=3",
        "fl.rounds=abc",
        "partition.alpha must",
        "fl.batch_size must",
    ]
    assert [line.removeprefix("  - ")[: len(key)] for line, key in zip(lines[1:], keys, strict=True)] == keys


def test_a_few_wrong_words_among_many_are_found_by_few_compositions(monkeypatch: pytest.MonkeyPatch) -> None:
    composed: list[object] = []

    def counted(*arguments: Any, **options: Any) -> Any:
        composed.append(arguments)
        return compose_run(*arguments, **options)

    monkeypatch.setattr("fedzo.config.diagnose.compose_run", counted)
    words = [f"seed={number}" for number in range(30)]

    with pytest.raises(ConfigError) as caught:
        load([*words[:5], "fl.num_client=3", *words[5:20], "fl.rounds=abc", *words[20:]])

    head, *lines = str(caught.value).splitlines()
    assert head == "2 problems in the configuration:"
    assert [line.split(": ")[0] for line in lines] == ["  - fl.num_client=3", "  - fl.rounds=abc"]
    assert len(composed) < 20


def test_a_rule_that_reads_a_refused_key_is_not_judged_by_its_default() -> None:
    with pytest.raises(ConfigError) as caught:
        load(["fl.num_clients=abc", "strategy.clients_per_round=20"])  # 20 > 8 is no news: 8 is not what was meant

    assert "clients_per_round" not in str(caught.value)


def test_a_wrong_yaml_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "trainer").mkdir()
    typo = "defaults: [meerkat_schema, _self_]\ndensty: 0.1\n"
    (tmp_path / "trainer" / "mine.yaml").write_text(typo, encoding="utf-8")
    (tmp_path / "trainer" / "broken.yaml").write_text("a: [1", encoding="utf-8")

    expected = r"the file trainer/mine\.yaml must hold keys of its schema only, got 'densty'\. Did you mean density"
    with pytest.raises(ConfigError, match=f"trainer=mine: {expected}"):
        load(with_config_dir(["trainer=mine"], str(tmp_path)))
    with pytest.raises(ConfigError, match=r"trainer=broken: .*broken\.yaml:1: not valid YAML \(expected"):
        load(with_config_dir(["trainer=broken"], str(tmp_path)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fl: {rounds: 3}", r".*mine\.yaml:1: an experiment must begin with the line `# @package _global_`"),
        (
            "# @package _global_\nfl: {ronds: 3}",
            r"experiment/mine\.yaml: fl\.ronds is not a setting\. Did you mean fl\.rounds",
        ),
        ("# @package _global_\nfl: {rounds: many}", r"experiment/mine\.yaml: fl\.rounds: Value 'many'"),
        (
            "# @package _global_\ndefaults: [override /trainer: lroa]",
            r"experiment/mine\.yaml: trainer must be one of ia3, .*, got 'lroa'\. Did you mean lora",
        ),
        (
            "# @package _global_\nevaluators: [nats]",
            r"experiment/mine\.yaml: a list of plugins must be chosen under defaults, as in `- override /evaluators: ",
        ),
    ],
    ids=["no package", "stray key", "wrong type", "unknown choice", "list of plugins"],
)
def test_what_is_wrong_in_an_experiment_is_told_with_file_and_key(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(text + "\n", encoding="utf-8")

    with pytest.raises(ConfigError, match=f"^experiment=mine: {expected}"):
        load(with_config_dir(["experiment=mine"], str(tmp_path)))


@pytest.mark.parametrize(
    ("group", "name", "extra"),
    [
        ("launcher", "joblib", "sweep"),
        ("launcher", "submitit_local", "slurm"),
        ("launcher", "submitit_slurm", "slurm"),
        ("sweeper", "optuna", "optuna"),
    ],
)
def test_a_choice_of_hydras_that_is_not_installed_names_the_extra_that_brings_it(
    group: str, name: str, extra: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with session():
        option_names(f"hydra/{group}")  # finds the plugins
    monkeypatch.delitem(ConfigStore.instance().repo["hydra"][group], f"{name}.yaml", raising=False)
    (tmp_path / "experiment").mkdir()
    text = f"# @package _global_\ndefaults: [override /hydra/{group}: {name}]\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text, encoding="utf-8")
    told = rf"hydra/{group} must be one of .*, got '{name}'\. Install it with: pip install 'fedzo\[{extra}\]'$"

    for words in ([f"hydra/{group}={name}"], with_config_dir(["experiment=mine"], str(tmp_path))):
        with pytest.raises(ConfigError, match=told):
            load(words)
        with pytest.raises(ConfigError, match=told):
            plan_sweep([*words, "seed=1,2"])


def test_a_users_file_that_one_of_fedzos_would_hide_is_refused(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    mine = tmp_path / "experiment" / "meerkat.yaml"
    own = (conf_dir() / "experiment" / "meerkat.yaml").read_text(encoding="utf-8")

    mine.write_text(own, encoding="utf-8")  # says the same
    assert load(with_config_dir(["experiment=meerkat"], str(tmp_path))).fl.rounds == 160
    mine.write_text(own.replace("rounds: 160", "rounds: 7"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"meerkat\.yaml: .*Rename yours, and write experiment=my_meerkat\."):
        with_config_dir(["experiment=meerkat"], str(tmp_path))
    mine.rename(mine.with_stem("my_meerkat"))
    assert load(with_config_dir(["experiment=my_meerkat"], str(tmp_path))).fl.rounds == 7


def test_a_users_config_yaml_that_would_not_be_read_is_refused(tmp_path: Path) -> None:
    """A copy of fedzo's whole folder may hold one that says the same."""
    mine, own = tmp_path / "config.yaml", (conf_dir() / "config.yaml").read_text(encoding="utf-8")

    mine.write_text(own, encoding="utf-8")
    assert load(with_config_dir([], str(tmp_path))) == load([])
    mine.write_text(own + "fl:\n  rounds: 7\n", encoding="utf-8")
    told = r"config\.yaml: a folder of --config-dir must not hold config\.yaml, .*write experiment=mine\.$"
    with pytest.raises(ConfigError, match=told):
        with_config_dir([], str(tmp_path))

    (tmp_path / "experiment").mkdir()
    mine.rename(tmp_path / "experiment" / "mine.yaml")
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nfl:\n  rounds: 7\n", encoding="utf-8")
    assert load(with_config_dir(["experiment=mine"], str(tmp_path))).fl.rounds == 7
    (tmp_path / "hydra" / "job_logging").mkdir(parents=True)
    (tmp_path / "hydra" / "job_logging" / "fedzo.yaml").write_text("version: 1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"write hydra/job_logging=my_fedzo\.$"):
        with_config_dir([], str(tmp_path))


@pytest.mark.parametrize("group", sorted(LISTS))
def test_none_is_an_empty_list_of_plugins(group: str) -> None:
    assert getattr(load([f"{group}=none"]), group) == getattr(load([f"{group}=[]"]), group) == {}
    assert load(["report=none", f"{group}=none"]).report.html is False
    option = {"evaluators": "answers", "preprocess": "identity", "trackers": "tensorboard"}[group]
    sweep = plan_sweep([f"{group}=none,{option}"])
    assert [[*getattr(config, group)] for config in sweep.configs] == [[], [option]]


@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("task.labels=bad,good", r"run them all\. Or, for one list, write task\.labels=\[bad,good\]"),
        ("task.labels='bad,good'", r"Write task\.labels=\[bad,good\]\."),
        ("task.labels=good", r"Write task\.labels=\[good\]\."),
        ("trainer.lr=1e-3,1e-2", r"run them all\.$"),
        ("task.template=a,b", r"run them all\. .*: write \"task\.template='a,b'\"$"),
    ],
)
def test_several_values_are_a_sweep_or_a_list(override: str, remedy: str) -> None:
    """And never a text, where only a number or a list can be."""
    with pytest.raises(ConfigError, match=remedy):
        load([override])


def test_a_users_own_yaml_is_found_in_config_dir(tmp_path: Path) -> None:
    (tmp_path / "task").mkdir()
    text = "defaults: [task_schema, _self_]\nname: mine\ntemplate: '{text} ='\ncandidates: [' a', ' b']\n"
    (tmp_path / "task" / "mine.yaml").write_text(text, encoding="utf-8")

    config = load(with_config_dir(["task=mine", f"data.path={tmp_path}"], str(tmp_path)))

    assert (config.task.name, config.task.template, config.task.candidates) == ("mine", "{text} =", [" a", " b"])


def test_config_dir_must_exist() -> None:
    with pytest.raises(ConfigError, match=r"--config-dir must name a folder of YAML files, got '/no/where'"):
        with_config_dir([], "/no/where")


def test_a_third_partys_trainer_is_an_option_without_a_yaml_file(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass(kw_only=True, slots=True)
    class TheirConfig(TrainerConfig):
        """Theirs."""

        blocks: int = 3

    monkeypatch.setattr(trainers.TRAINERS, "_configs", dict(trainers.TRAINERS._configs))
    monkeypatch.setattr(trainers.TRAINERS, "_factories", dict(trainers.TRAINERS._factories))
    trainers.TRAINERS.register("theirs", TheirConfig)(lambda config: None)  # type: ignore[arg-type, return-value]
    try:
        config = load(["trainer=theirs", "trainer.blocks=5"])
    finally:
        for name in ("theirs", "theirs_schema"):
            ConfigStore.instance().repo["trainer"].pop(f"{name}.yaml", None)

    assert config.trainer == TheirConfig(blocks=5)


def test_a_plugin_with_the_name_of_a_preset_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The preset would be taken for it."""

    @dataclasses.dataclass(kw_only=True, slots=True)
    class TheirConfig(TrainerConfig):
        """Theirs."""

    monkeypatch.setattr(trainers.TRAINERS, "_configs", {**trainers.TRAINERS._configs, "last_norm": TheirConfig})

    with pytest.raises(ConfigError, match=r"trainer .last_norm. of .*test_load: a plugin must have another name than"):
        load(["trainer=last_norm"])


def test_a_plugin_with_the_name_of_the_empty_list_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass(kw_only=True, slots=True)
    class TheirConfig(TrackerConfig):
        """Theirs."""

    monkeypatch.setattr(TRACKERS, "_configs", {**TRACKERS._configs, "none": TheirConfig})

    with pytest.raises(ConfigError, match=r"trackers 'none' of .*test_load: .* another name than the empty list, got"):
        load(["trackers=none"])


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("model=smollm2", ["model=smollm2"]),
        ("model=hf", ["model=hf"]),
        ("model=gpt2", ["model=hf", "model.name='gpt2'"]),
        ("model=facebook/opt-125m", ["model=hf", "model.name='facebook/opt-125m'"]),
        ("model='my folder'", ["model=hf", "model.name='my folder'"]),
        ("model=my folder (1)", ["model=hf", "model.name='my folder (1)'"]),
        ("model=~/it's", ["model=hf", r"model.name='~/it\'s'"]),
        ("model=gpt2,org/opt", ["model=hf", "model.name='gpt2','org/opt'"]),
        ("model=smollm2,hf", ["model=smollm2,hf"]),
        ("model=glob(*)", ["model=glob(*)"]),
        ("model.name=gpt2", ["model.name=gpt2"]),
        ("model=null", ["model=null"]),
    ],
)
def test_model_takes_a_hub_name_or_folder(typed: str, expected: list[str]) -> None:
    with session():
        options = option_names("model")

    assert rewrite_model([typed, "seed=1"], options) == [*expected, "seed=1"]


def test_model_name_arrives_unchanged(tmp_path: Path) -> None:
    folder = tmp_path / "it's a folder, (1)"
    folder.mkdir()

    assert load([f"model='{folder}'".replace("it's", r"it\'s")]).model.name == str(folder)
    assert [config.model.name for config in plan_sweep(["model=gpt2,org/opt"]).configs] == ["gpt2", "org/opt"]


def test_a_sweep_over_options_and_names_together_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"model=smollm2,gpt2: a sweep over models must hold either options .* or names"
    ):
        rewrite_model(["model=smollm2,gpt2"], ["hf", "smollm2"])


def test_a_sweep_has_every_combination_in_hydras_order() -> None:
    sweep = plan_sweep(["trainer=meerkat,mezo", "fl.local_steps=1,10", "hydra.sweep.dir=some/where"])

    found = [(type(config.trainer).__name__, config.fl.local_steps) for config in sweep.configs]
    assert found == [("MeerkatConfig", 1), ("MeerkatConfig", 10), ("MezoConfig", 1), ("MezoConfig", 10)]
    assert sweep.folder == Path("some/where")
    assert sweep.overrides[-1] == "hydra.sweep.dir='some/where'"


def test_a_sweep_names_the_jobs_that_are_wrong() -> None:
    with pytest.raises(ConfigError) as caught:
        plan_sweep(["fl.rounds=1,0,0", "fl.batch_size=1,0"])

    assert str(caught.value).splitlines()[1:] == [
        "  - job 1 (fl.rounds=1 fl.batch_size=0) and 2 more: fl.batch_size must be >= 1, got 0. "
        "Write a client's number of rows per step.",
        "  - job 2 (fl.rounds=0 fl.batch_size=1) and 3 more: fl.rounds must be >= 1, got 0. A run needs a round.",
    ]


def test_a_sweep_names_a_problem_of_all_jobs_once_beside_those_of_one() -> None:
    with pytest.raises(ConfigError) as caught:
        plan_sweep(["fl.rounds=0", "trainer=mezo,nope", "hydra.nope=1", "seed=[1"])

    starts = [
        "'seed=[1' must be",
        "hydra.nope=1: hydra.nope is not",
        "fl.rounds must be >= 1",
        "job 1 (trainer=nope): trainer must",
    ]
    lines = str(caught.value).splitlines()
    assert lines[0] == "4 problems in the configuration:"
    assert [line[4 : 4 + len(start)] for line, start in zip(lines[1:], starts, strict=True)] == starts


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seed=interval(0,1)"], "The sweep is not valid: .*INTERVAL_SWEEP"),
        (["hydra.sweep.dir=${nope}"], "The sweep is not valid: .*nope"),
        (["hydra.sweep.dir=x,y"], "hydra.sweep.dir=x,y: a setting of Hydra itself must have one value"),
        (["experiment=x", "seed=1,2"], "^experiment must be one of"),
    ],
)
def test_a_sweep_that_cannot_be_made_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_sweep(overrides)


def test_job_folders_are_the_same_each_time_short_and_safe() -> None:
    long = "task.template=" + "x" * 300

    assert job_folder("trainer=mezo,fl.local_steps=10") == "trainer-mezo_fl.local_steps-10"
    assert job_folder("model.name='gpt2',+budget=T1") == "model.name-gpt2_+budget-T1"
    assert job_folder("") == "job"
    other = job_folder("data.path=../../etc/'x',model.name=a\\b $(ls)")
    assert re.fullmatch(r"data\.path-\.\.-\.\.-etc-x_model\.name-a-b-ls_[0-9a-f]{8}", other)
    assert job_folder(long) == job_folder(long) != job_folder("task.template=y" + "x" * 300)
    assert len(job_folder(long)) < 100
    most = ",".join(f"section.key{number}={'long' * 9}" for number in range(90))
    assert len(job_folder(most)) < 240  # a file system takes 255
    assert "_key89-longlong" in job_folder(most)


@pytest.mark.parametrize("fixed", ["data.path=/mnt/me/data/sst2", "data.path='/mnt/me, and you/data/sst2/'"])
def test_in_a_long_name_every_setting_can_be_read(fixed: str) -> None:
    words = [fixed, "fl.num_clients=32", "model.name='HuggingFaceTB/SmolLM2-135M'", "model=hf", "task=sst2"]

    def name(rate: str) -> str:  # as Hydra sorts them
        return job_folder(",".join([*words, f"trainer.lr={rate}", "trainer=mezo"]))

    for rate in ("3.2e-05", "0.000128", "-2.2250738585072014e-308"):  # no number is longer than the last
        shown = f"path-sst2_num_clients-32_name-SmolLM2-135M_model-hf_task-sst2_lr-{rate}_trainer-mezo"
        assert re.fullmatch(rf"{re.escape(shown)}_[0-9a-f]{{8}}", name(rate)), name(rate)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("data.path=a/b", "data.path=a-b"),
        ("task.template={a}?", "task.template={a}!"),
        ("task.label='a,b'", "task.label=a_b"),
        ("task.label=a_", "task.label=a"),
    ],
)
def test_jobs_whose_settings_differ_in_signs_alone_have_two_folders(one: str, other: str) -> None:
    assert job_folder(one) != job_folder(other)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("data.num_train=8", "split.num_train=8"),
        ("optimizer=adam", "server_optimizer=adam"),
        ("optimizer.lr=0.1", "server_optimizer.lr=0.1"),
        ("fl.seeds=pool", "fl.directions=pool"),
        ("task.prepare=copa", "task.derive=copa"),
        ("trainer.mask_path=m.safetensors", "inputs.artifact=m.safetensors"),
    ],
)
def test_an_old_name_gets_an_error_that_names_the_new_one(old: str, new: str) -> None:
    with pytest.raises(ConfigError, match=f"has the new name .* Write {new}"):
        load([old])


@pytest.mark.parametrize(
    "path",
    [
        "/a=b",
        "/a(b)",
        "/a#b",
        "#",
        "/it's",
        '/a"b',
        "/a,b",
        "/a {client}",
        "~/b",
        "/\u00e9 x",
        "/$(ls)=`ls`",
        '/it\'s "x"=',
        "/a!=",
    ],
)
def test_what_an_error_says_to_write_is_what_was_meant(path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load([f"data.path={path}"])
    shell = str(caught.value).rpartition("write ")[2]
    given = subprocess.run(["sh", "-c", f"printf %s {shell}"], capture_output=True, text=True, check=True).stdout

    assert OverridesParser.create().parse_override(given).value() == path
    with pytest.raises(ConfigError, match=r"data.path must name something that exists, got "):
        load([given])
