"""Users' YAML files, broken in the ways in which editors and YAML itself break them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from hydra._internal.core_plugins import file_config_source

from fedzo.config import plugins
from fedzo.config.compose import session
from fedzo.config.diagnose import parse_overrides, respelled
from fedzo.config.load import load
from fedzo.config.travel import load_site, to_json
from fedzo.config.yaml_files import checked_text
from fedzo.errors import ConfigError
from fedzo.evaluate import EVALUATORS, EvaluatorConfig

TASK = b'defaults:\n  - task_schema\n  - _self_\nname: mine\ntemplate: "{text} ="\ncandidates: [" a", " b"]\n'


def loaded(folder: Path, data: bytes, *overrides: str) -> object:
    (folder / "task").mkdir(exist_ok=True)
    (folder / "task" / "mine.yaml").write_bytes(data)
    return load([f"hydra.searchpath=['file://{folder}']", "task=mine", "data.path=.", *overrides])


@pytest.mark.parametrize("change", [lambda data: data, lambda data: b"\xef\xbb\xbf" + data])
def test_a_byte_order_mark_changes_nothing(change: object, tmp_path: Path) -> None:
    task = loaded(tmp_path, change(TASK)).task  # type: ignore[operator, attr-defined]

    assert (task.name, task.candidates) == ("mine", [" a", " b"])


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_package_line_counts_after_a_byte_order_mark(mark: bytes, end: bytes, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    text = mark + end.join([b"# @package _global_", b"fl:", b"  rounds: 7", b""])
    (tmp_path / "experiment" / "mine.yaml").write_bytes(text)

    config = load([f"hydra.searchpath=['file://{tmp_path}']", "experiment=mine"])

    assert config.fl.rounds == 7


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            TASK.replace(b"  - task", b"\t- task"),
            r"mine.yaml:2: not valid YAML .*Indent with spaces: YAML takes no tab",
        ),
        (TASK + b"answer: it\x92s\n", r"mine.yaml:7: text must be UTF-8, got 0x92 at byte 104, perhaps Windows-1252"),
        (TASK.decode().encode("utf-16"), r"mine.yaml:1: text must be UTF-8, got 0xff at byte 0, as in UTF-16"),
        (TASK + b"answer: \x07\n", r"mine.yaml:7: not valid YAML \(the character U\+0007\)"),
        (TASK + b"answer: a: b\n", r"mine.yaml:7: not valid YAML \(mapping values are not allowed here\). Quote texts"),
        (TASK + b"label: x\nlabel: y\n", r"mine.yaml:8: a key must stand once, got 'label' twice. Remove one"),
        (TASK.replace(b'" a", " b"', b"no, yes"), r"mine.yaml:6: candidates .* reads no as False. Quote it: \"no\""),
        (TASK + b"labels: [on, off]\n", r"mine.yaml:7: labels must be text, but YAML reads on as True"),
        (TASK + b"labels:\n- 'x'\n- 1e3\n", r"mine.yaml:9: labels must be text, but YAML reads 1e3 as 1000.0"),
        (TASK + b"labels: [01, 2]\n", r"mine.yaml:7: labels must be text, but YAML reads 01 as 1. Quote it"),
        (TASK + b"label: yes\n", r"mine.yaml:7: label must be text, but YAML reads yes as True"),
        (TASK + b"x: " + b"[" * 5000, r"mine.yaml: not valid YAML \(too many brackets"),
    ],
)
def test_a_broken_file_is_named_with_its_line(data: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        loaded(tmp_path, data)
    assert "\n" not in str(caught.value)


def test_a_text_that_yaml_does_not_change_needs_no_quotes(tmp_path: Path) -> None:
    task = loaded(tmp_path, TASK + b"labels: [0, 1]\n").task  # type: ignore[attr-defined]

    assert task.labels == ["0", "1"]


def test_a_broken_file_that_nothing_names_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "other.yaml").write_bytes(b"\xff\t")

    loaded(tmp_path, TASK)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "task.candidates=[true,maybe]",
            r"task.candidates must be text, but .* is read as True. Put the text in quotes",
        ),
        ("task.labels=[1e3,x]", r"task.labels must be text, but .* is read as 1000.0"),
        ("task.label=true", r"task.label must be text, but .* is read as True"),
        ("model.revision=2024_01_15", r"model.revision must be text, but .* is read as 20240115"),
        ("model.revision=1234e56", r"model.revision must be text, but .* is read as 1.234e\+59"),
        ("partition=natural partition.column=true", r"partition.column must be text, but .* is read as True"),
        ("inputs.artifact=1e5", r"inputs.artifact must be text, but .* is read as 100000.0"),
    ],
)
def test_a_text_on_the_command_line_stays_what_was_written(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(override.split())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"device: cpu\ndevice: cuda\n", r"site.yaml:2: a key must stand once, got 'device' twice"),
        (b"data:\n  path: a\n  path: b\n", r"site.yaml:3: a key must stand once, got 'path' twice"),
        (b"data:\n\tpath: a\n", r"site.yaml:2: not valid YAML .*Indent with spaces"),
        (b"data:\n  path: caf\xe9\n", r"site.yaml:2: text must be UTF-8, got 0xe9 at byte 17"),
    ],
)
def test_the_file_of_a_site_is_read_as_strictly(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_bytes(data)

    with pytest.raises(ConfigError, match=rf"site configuration .*{message}"):
        load_site(tmp_path / "site.yaml")


@pytest.mark.parametrize("name", ["1e5", "2024_01", "007"])
def test_a_model_may_be_named_like_a_number(name: str) -> None:
    assert load([f"model={name}"]).model.name == name


def test_a_site_file_has_the_numbers_of_all_other_files(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("limits: {step_limit_s: 3.6e3}\nmodel: {name: m, revision: 2024-01-01}\n")

    site = load_site(tmp_path / "site.yaml")

    assert (site.limits.step_limit_s, site.model.revision) == (3600.0, "2024-01-01")


def test_a_small_number_reaches_the_site_file_of_a_run_and_comes_back(tmp_path: Path) -> None:
    (tmp_path / "site.json").write_text(to_json(load(["model.name=m"]).site()).replace("3600.0", "5e-05"))

    assert load_site(tmp_path / "site.json").limits.step_limit_s == 5e-05


@dataclass(kw_only=True, slots=True)
class TheirConfig(EvaluatorConfig):
    """A plugin of somebody else."""

    verdict: str | None = None


def test_a_text_of_an_installed_plugin_stays_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").write_text("verdict: no\n")

    with session():
        monkeypatch.setitem(EVALUATORS._configs, "theirs", TheirConfig)  # only now, so that Hydra keeps no schema
        (problem,) = respelled(parse_overrides(["evaluators.theirs.verdict=true"])[0])

    assert problem.text.startswith("evaluators.theirs.verdict must be text, but ")
    with pytest.raises(ConfigError, match=r"mine.yaml:1: verdict must be text, but YAML reads no as False"):
        checked_text(tmp_path / "mine.yaml")


def test_a_file_of_fedzos_own_is_parsed_once_and_again_where_it_was_edited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a checkout, below a process that lives on."""
    shutil.copytree(plugins.conf_dir(), tmp_path / "conf")
    monkeypatch.setattr(plugins, "_PACKAGE", tmp_path / "fedzo")
    file = tmp_path / "conf" / "experiment" / "meerkat.yaml"
    first = load(["experiment=meerkat"])

    with monkeypatch.context() as patch:
        patch.setattr(file_config_source.FileConfigSource, "load_config", lambda source, path: pytest.fail(path))
        second = load(["experiment=meerkat"])
    file.write_text(file.read_text(encoding="utf-8").replace("rounds: 160", "rounds: 7"), encoding="utf-8")

    assert first == second
    assert (first.fl.rounds, load(["experiment=meerkat"]).fl.rounds) == (160, 7)
