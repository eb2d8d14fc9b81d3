"""How a run is handed to each runtime, and what it goes on with: by what a runtime that starts nothing was given."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import fedzo.runtime.inline
from fedzo.commands.run_folder import keep_environment
from fedzo.commands.train import launch, serve_run, start_run, with_absolute_paths
from fedzo.config.schema import LaunchConfig, RunConfig
from fedzo.config.travel import to_json
from fedzo.errors import ConfigError, RunFolderError
from fedzo.fl.config import FlConfig
from fedzo.models.config import BaseConfig, TransformersConfig
from fedzo.records.folder import LOCK
from fedzo.run.apps import client_app, look_ahead, server_app
from fedzo.runtime.config import RUNTIMES, InlineConfig, LocalConfig, RemoteConfig, RuntimeConfig


def test_every_runtime_of_the_configuration_can_be_launched() -> None:
    from fedzo.config.plugins import plugin_classes

    assert dict(RUNTIMES) == plugin_classes()["runtime"]


@pytest.mark.parametrize("batch_clients", [False, True])
def test_inline_runs_the_installed_apps_with_text_and_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, batch_clients: bool
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(fedzo.runtime.inline, "run_inline", lambda *args, **kwargs: calls.append((args, kwargs)))

    config = LaunchConfig(fl=FlConfig(num_clients=5), runtime=InlineConfig(batch_clients=batch_clients))
    launch(config, opened(config), tmp_path)

    run_config = {"config": to_json(agreed(config)), "run-dir": str(tmp_path)}
    ahead = look_ahead if batch_clients else None
    assert calls == [((server_app, client_app), {"num_clients": 5, "run_config": run_config, "look_ahead": ahead})]


@pytest.mark.parametrize(("name", "config"), [("local", LocalConfig()), ("remote", RemoteConfig(server="server"))])
def test_a_server_in_a_process_of_its_own_is_told_the_folder_alone(
    name: str, config: RuntimeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(f"fedzo.runtime.{name}.run_{name}", lambda **given: calls.append(given))

    RUNTIMES.build(config, num_clients=5, run_dir=tmp_path)

    assert calls == [{"num_clients": 5, "run_dir": tmp_path, "config": config}]


@pytest.mark.parametrize(("runtime", "startup_s"), [(LocalConfig(startup_s=600.0), 600.0), (RemoteConfig(), 120.0)])
def test_a_server_waits_for_its_superlink_as_long_as_the_runtime_says(
    runtime: RuntimeConfig, startup_s: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr("fedzo.commands.train.read_launch", lambda run_dir: LaunchConfig(runtime=runtime))
    monkeypatch.setattr("fedzo.commands.train._opened", lambda config, store: nullcontext(opened(config)))
    monkeypatch.setattr("fedzo.runtime.net.serve.serve", lambda app, **given: calls.append(given))
    for name in ("run", "server"):
        (tmp_path / name).mkdir()

    serve_run(tmp_path / "run", tmp_path / "server")

    assert [given["startup_s"] for given in calls] == [startup_s]


def test_processes_that_start_meanwhile_find_the_site(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found: list[str | None] = []
    monkeypatch.setattr(
        fedzo.runtime.inline, "run_inline", lambda *args, **kwargs: found.append(os.environ.get("FEDZO_SITE"))
    )
    monkeypatch.delenv("FEDZO_SITE", raising=False)

    launch(LaunchConfig(), opened(LaunchConfig()), tmp_path)

    assert [*found, os.environ.get("FEDZO_SITE")] == [str(tmp_path / "site.json"), None]


@dataclass(kw_only=True, slots=True)
class HostedConfig(RuntimeConfig):
    """A runtime of somebody else, whose server is an address."""

    server: str = ""


def test_only_a_key_that_a_runtime_names_as_a_path_becomes_absolute() -> None:
    hosted = with_absolute_paths(LaunchConfig(runtime=HostedConfig(server="host:9092")))
    remote = with_absolute_paths(LaunchConfig(runtime=RemoteConfig(server="server")))

    assert hosted.runtime == HostedConfig(server="host:9092")
    assert remote.runtime == RemoteConfig(server=str(Path("server").resolve()))


def test_a_rewriters_model_becomes_absolute_where_it_is_a_folder_and_keeps_its_name_where_it_is_embedded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "judge").mkdir()
    given = TransformersConfig(model="smollm2-135m", judge_model="judge", store="answers")

    made = with_absolute_paths(LaunchConfig(rewriter=given)).rewriter

    folder = tmp_path.resolve()
    assert (made.model, made.judge_model) == ("smollm2-135m", str(folder / "judge"))
    assert made.store == str(folder / "answers")
    assert isinstance(made, TransformersConfig)
    assert [*made.missing()] == []


def test_unknown_runtime_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    config = LaunchConfig(runtime=RuntimeConfig())

    with pytest.raises(ConfigError, match=r"runtime: .* Registered: inline, local, ray"):
        launch(config, opened(config), tmp_path)


@pytest.mark.parametrize("name", ["config.json", "config.yaml", "run.json", "environment.json"])
def test_a_run_leaves_a_folder_with_files_that_no_run_made(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")

    with pytest.raises(RunFolderError, match="holds files that no run made"):
        start_run(LaunchConfig(), tmp_path, overrides=[])

    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_a_run_folder_that_cannot_be_had_alone_is_told_of_as_one_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / LOCK).mkdir()

    with pytest.raises(RunFolderError, match=r"it must be writable, got .Is a directory.*or choose another"):
        start_run(LaunchConfig(), tmp_path, overrides=[])


def test_what_a_run_goes_on_with_is_compared_with_what_it_had_last(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def keep(threads: int, *, round: int) -> None:
        keep_environment(tmp_path, {"fedzo": "a", "threads": threads, "packages": {"torch": "2"}}, round=round)

    for round, threads in enumerate([1, 2, 2, 1]):
        keep(threads, round=round)

    kept = json.loads((tmp_path / "environment.json").read_text())
    assert kept.pop("later") == [{"round": 1, "threads": 2}, {"round": 3, "threads": 1}]
    assert kept == {"fedzo": "a", "threads": 1, "packages": {"torch": "2"}}
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2


def agreed(config: LaunchConfig) -> RunConfig:
    digest = "0" * 64
    base = BaseConfig(label="tiny", weights_digest=digest, tokenizer_digest=digest, architecture_digest=digest)
    return config.run(base, artifact=digest)


def opened(config: LaunchConfig) -> Any:
    """A process as far as launching looks at it."""
    return SimpleNamespace(peer=SimpleNamespace(config=agreed(config)), stop=lambda: None)
