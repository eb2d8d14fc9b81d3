"""What must be so before the server of a run with sites is started: its folder, its SuperLink, and its clients."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedzo.cli import main
from fedzo.errors import ConfigError, RunFolderError
from fedzo.runtime.config import RemoteConfig
from fedzo.runtime.net import server_process
from fedzo.runtime.net.credentials import make_key
from fedzo.runtime.net.server_folder import Listening, ServerFolder
from fedzo.runtime.remote import run_remote

SERVES = [sys.executable, "-S", "-c", "print('the run is served')"]
Run = Callable[[Path], None]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerFolder]:
    """A server's folder with clients 0 and 1, and somebody who listens as its SuperLink."""
    with socket.create_server(("127.0.0.1", 0)) as superlink:
        control = f"127.0.0.1:{superlink.getsockname()[1]}"
        listening = Listening(address="h:1", listen="127.0.0.1:1", control=control)
        folder = ServerFolder.make(tmp_path / "server", listening, names=["h"], days=30)
        for index in range(2):
            folder.registry.add(f"site-{index}", index=index, key=make_key(tmp_path / f"key-{index}"))
        yield folder


@pytest.fixture
def run(server: ServerFolder, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Start, or go on with, a run of two clients in this folder."""
    monkeypatch.setattr(server_process, "SERVE", SERVES)
    return lambda folder: run_remote(num_clients=2, run_dir=folder, config=RemoteConfig(server=str(server.path)))


@pytest.fixture
def new(tmp_path: Path) -> Path:
    """The folder of a run that has not begun."""
    (tmp_path / "new").mkdir()
    return tmp_path / "new"


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """The folder of a run that has begun."""
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "metrics.jsonl").write_text("{}\n")
    return tmp_path / "begun"


def test_a_run_begins_with_all_its_clients_and_goes_on_without_one_whose_key_was_revoked(
    server: ServerFolder,
    run: Run,
    new: Path,
    begun: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    run(new)
    assert "the run is served" in capsys.readouterr().out

    server.registry.remove("site-1")

    with pytest.raises(ConfigError, match=r"clients 0 to 1 must be registered in .*, but \[1\] are not.*or lower fl\."):
        run(new)
    run(begun)
    assert "the run is served" in capsys.readouterr().out
    assert caplog.messages == [f"clients [1] are not registered in {server.path}: the run goes on without them"]


def test_a_command_that_is_deaf_to_the_end_of_its_terminal_stays_until_the_run_ends(
    run: Run, new: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by ``nohup``; here the run's server tells the command that the terminal closed."""
    hang_up = "import os, signal; os.kill(os.getppid(), signal.SIGHUP); print('the run is served')"
    monkeypatch.setattr(server_process, "SERVE", [sys.executable, "-S", "-c", hang_up])
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run(new)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)

    assert "the run is served" in capsys.readouterr().out


def test_what_a_server_says_is_read_through_no_link(run: Run, new: Path, tmp_path: Path) -> None:
    (new / "logs").mkdir()
    (new / "logs" / "server.log").symlink_to(tmp_path / "outside")

    with pytest.raises(RunFolderError, match=r"server\.log: it must lie in its folder itself, got a link to"):
        run(new)

    assert not (tmp_path / "outside").exists()


def test_a_run_that_has_no_client_any_more_does_not_go_on(server: ServerFolder, run: Run, begun: Path) -> None:
    for index in range(2):
        server.registry.remove(f"site-{index}")

    with pytest.raises(ConfigError, match=r"\[0, 1\] are not\. Register them with `fedzo server add-client`\.$"):
        run(begun)


def test_a_new_run_without_one_of_its_clients_names_the_command_that_moves_another_to_its_index(
    server: ServerFolder, run: Run, new: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last one, so that those between keep theirs."""
    for index in (2, 3):
        server.registry.add(f"site-{index}", index=index, key=make_key(tmp_path / f"key-{index}"))
    key = server.registry.clients[-1].key
    server.registry.remove("site-0")

    with pytest.raises(
        ConfigError, match=r"but \[0\] are not\. .* Client site-3 has index 3\. To give it 0: `"
    ) as told:
        run(new)

    command = re.findall(r"To give it 0: `fedzo (.*)`\.$", str(told.value))[0]
    assert main(shlex.split(command)) == 0
    assert [(client.index, client.key) for client in server.registry.clients if client.name == "site-3"] == [(0, key)]
    run(new)
    assert "the run is served" in capsys.readouterr().out


def test_a_run_whose_server_was_moved_says_so_and_asks_for_no_other_authority(
    server: ServerFolder, run: Run, new: Path, begun: Path
) -> None:
    shutil.move(server.path, server.path.with_name("moved"))

    with pytest.raises(ConfigError, match=r"the run began with the server's folder .*, but there is none") as refused:
        run(begun)
    assert "server init" not in str(refused.value)
    assert f"write where it is now as runtime.server into {begun / 'config.json'}" in str(refused.value)
    with pytest.raises(ConfigError, match="it must hold what `fedzo server init` writes"):
        run(new)


def test_a_run_needs_a_superlink_that_is_up_and_serves_no_other(server: ServerFolder, run: Run, new: Path) -> None:
    with server.serving("/runs/other"), pytest.raises(ConfigError, match="one run at a time, and serves /runs/other"):
        run(new)
    file = server.file("server.json")
    file.write_text(file.read_text().replace(server.listening.control, "127.0.0.1:9"))

    with pytest.raises(ConfigError, match=r"nobody listens at 127\.0\.0\.1:9\. Start it: `fedzo server up"):
        run(new)
