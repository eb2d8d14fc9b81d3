from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fedzo.runtime.inline
from fedzo.config.schema import RunConfig
from fedzo.errors import ConfigError
from fedzo.fl.config import FlConfig
from fedzo.run.apps import client_app, look_ahead, server_app
from fedzo.runtime.config import InlineConfig, RuntimeConfig
from fedzo.runtime.launch import RUNTIMES, launch


def test_every_runtime_of_the_configuration_can_be_launched() -> None:
    from fedzo.config.plugins import plugin_classes

    assert dict(RUNTIMES) == plugin_classes()["runtime"]


@pytest.mark.parametrize("batch_clients", [False, True])
def test_inline_runs_the_installed_apps_with_text_and_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, batch_clients: bool
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(fedzo.runtime.inline, "run_inline", lambda *args, **kwargs: calls.append((args, kwargs)))

    config = RunConfig(fl=FlConfig(num_clients=5), runtime=InlineConfig(batch_clients=batch_clients))
    launch(config, tmp_path, config_json='{"seed": 1}')

    run_config = {"config": '{"seed": 1}', "run-dir": str(tmp_path)}
    ahead = look_ahead if batch_clients else None
    assert calls == [((server_app, client_app), {"num_clients": 5, "run_config": run_config, "look_ahead": ahead})]


def test_unknown_runtime_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"runtime: .* Registered: inline, local, ray"):
        launch(RunConfig(runtime=RuntimeConfig()), tmp_path, config_json="{}")
