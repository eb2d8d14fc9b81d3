"""Which keys a SuperLink lets in: those of the registry, as far as it takes them; and what an executor is told."""

from __future__ import annotations

import socket
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from fedzo.errors import ProtocolError
from fedzo.runtime.net import launch
from fedzo.runtime.net.client_folder import ClientFolder
from fedzo.runtime.net.credentials import make_key, pem_of
from fedzo.runtime.net.launch import Node, Site, register_clients, start_executor
from fedzo.runtime.net.server_folder import Listening, ServerFolder
from fedzo.system import SITE_ARTIFACTS_ENV


class SuperLink:
    """As much of one as knows keys: those of connected nodes, and for ever those that it has revoked."""

    def __init__(self) -> None:
        self.keys: dict[bytes, int] = {}
        self.revoked: set[bytes] = set()

    def nodes(self) -> list[Node]:
        return [Node(node, key, online=True, online_until=0.0) for key, node in self.keys.items()]

    def register(self, public_key: bytes, name: str) -> None:
        if public_key in self.revoked:
            raise ProtocolError(f"client {name}: the SuperLink must register its key, but says: already in use.")
        self.keys[public_key] = len(self.keys) + 1

    def unregister(self, node_id: int) -> None:
        (key,) = [key for key, node in self.keys.items() if node == node_id]
        del self.keys[key]
        self.revoked.add(key)


def test_a_key_that_was_revoked_is_not_counted_and_what_to_do_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    listening = Listening(address="h:1", listen="127.0.0.1:1", control="127.0.0.1:2")
    folder, superlink = ServerFolder.make(tmp_path / "s", listening, names=["h"], days=30), SuperLink()
    monkeypatch.setattr(launch, "control", lambda server: nullcontext(superlink))
    first, second = (make_key(tmp_path / name) for name in ("first", "second"))
    folder.registry.add("a", index=0, key=first)
    folder.registry.add("b", index=1, key=second)
    assert register_clients(folder) == 2
    folder.registry.remove("a")
    assert register_clients(folder) == 1
    caplog.clear()

    folder.registry.add("renamed", index=2, key=first)

    assert register_clients(folder) == 1
    assert set(superlink.keys) == {pem_of(second)}
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.startswith("client renamed: the SuperLink must register its key, but says: already in use.")
    assert said.endswith("restart `fedzo server up` while no run is served.")


def test_an_executor_keeps_the_artifact_of_its_run_in_the_folder_of_its_site(tmp_path: Path) -> None:
    """Each in its own, also where sites of one machine have one file, as with ``runtime=local``."""
    started: list[dict[str, str]] = []
    processes: Any = SimpleNamespace(start=lambda name, command, *, environment, restarts: started.append(environment))

    for name in ("a", "b"):
        folder, file, log = ClientFolder(tmp_path / name), tmp_path / "site.json", tmp_path / "clients.log"
        start_executor(processes, Site(folder=folder, site_file=file, log_file=log, step_limit_s=1.0))

    assert [variables[SITE_ARTIFACTS_ENV] for variables in started] == [
        str((tmp_path / name / "artifacts").resolve()) for name in ("a", "b")
    ]


def test_a_socks_proxy_in_the_environment_is_passed_by_within_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is looked at whenever a client is made, whomever the client asks then."""
    for name, value in (("ALL_PROXY", "socks5://127.0.0.1:1"), ("NO_PROXY", "127.0.0.1")):
        monkeypatch.setenv(name, value)
        monkeypatch.setenv(name.lower(), value)
    asked = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as superlink:

        def hang_up() -> None:
            superlink.accept()[0].close()
            asked.set()

        listening = Listening(address="h:1", listen="127.0.0.1:1", control=f"127.0.0.1:{superlink.getsockname()[1]}")
        folder = ServerFolder.make(tmp_path / "s", listening, names=["h"], days=30)
        threading.Thread(target=hang_up, daemon=True).start()
        with launch.control(folder.endpoint) as flower, pytest.raises(httpx.TransportError):
            flower.nodes()

        assert asked.wait(10.0)
