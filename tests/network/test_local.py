"""The toy federation over a real SuperLink and SuperNodes on the loopback interface."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

from fedzo.errors import ProtocolError
from fedzo.runtime.config import LocalConfig
from fedzo.runtime.local import run_local
from fedzo.runtime.net import launch, server_process
from fedzo.runtime.net.daemons import CONNECTED, STARTED

Play = Callable[..., dict[str, Any]]
Wait = Callable[..., None]
HERE = Path(__file__).parent
pytestmark = [pytest.mark.net, pytest.mark.timeout(240)]


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy apps are served and answer."""
    monkeypatch.setattr(server_process, "SERVE", [sys.executable, str(HERE / "toy_serve.py")])
    monkeypatch.setattr(launch, "EXECUTOR", [sys.executable, str(HERE / "toy_executor.py")])


@pytest.fixture
def play_local(toy: ModuleType, tmp_path: Path, programs: None) -> Play:
    def play(*, config: LocalConfig | None = None, **changes: Any) -> dict[str, Any]:
        (tmp_path / "toy.json").write_text(toy.config_json(**changes))
        run_local(num_clients=2, run_dir=tmp_path, config=config or LocalConfig())
        return json.loads((tmp_path / "result.json").read_text())

    return play


def test_local_gives_the_values_of_inline_with_warm_clients_and_leaves_no_process(
    play_local: Play, play_inline: Play, wait_for: Wait, tmp_path: Path
) -> None:
    """Also where the SuperLink is killed before the last round: it is started again, and no answer is lost."""
    local = play_local(rounds=4, kills="daemons superlink", kills_in=3)
    descendants = _descendants(tmp_path)

    inline = play_inline(rounds=4)
    assert local["values"] == inline["values"]
    assert local["text"] == inline["text"]
    assert local["answers"] == [2, 2, 2, 2]
    assert len(descendants) == 6  # server, SuperLink, and SuperNode and executor of each client
    assert local["server_pid"] != os.getpid()
    assert [[answer["used"] for answer in answers] for answers in local["by"]] == [[1, 1], [2, 2], [3, 3], [4, 4]]
    assert len({answer["pid"] for answers in local["by"] for answer in answers}) == 2
    assert min(local["seconds"]) < 6.0  # stock Flower: 12 s
    _assert_gone(descendants, wait_for)
    assert {path.name for path in (tmp_path / "logs").iterdir()} == {
        "superlink.log", "supernode-0.log", "supernode-1.log", "executor-0.log", "executor-1.log",
    }  # fmt: skip
    assert not (tmp_path / "network").exists()  # keys and secrets of the run


def test_what_fails_costs_its_answer_and_no_more_until_the_server_fails(
    play_local: Play, wait_for: Wait, tmp_path: Path
) -> None:
    """A client that fails and one that hangs; both again; a killed SuperNode; then the server's own error."""
    with pytest.raises(ProtocolError, match="the server fails on purpose"):
        play_local(
            rounds=4,
            fails=0,
            fails_in=[0],
            hangs=1,
            hung=str(tmp_path / "hung"),
            kills="client-1/key",
            kills_in=2,
            deadlines_s={2: 5.0},
            server_fails_in=3,
            config=LocalConfig(step_limit_s=2.0),
        )

    result = json.loads((tmp_path / "result.json").read_text())
    nodes = (tmp_path / "logs" / "supernode-1.log").read_text()
    assert nodes.count(STARTED) >= 2  # by which `fedzo status` sees that the first has ended
    assert nodes.index(STARTED) < nodes.index(CONNECTED) < nodes.rindex(STARTED)
    assert "refusal 31, the client failed to do what was asked" in result["errors"][0][0]
    assert "client 0 fails on purpose" in (tmp_path / "logs" / "executor-0.log").read_text()
    assert "refusal 34, a step took longer than its site allows" in result["errors"][0][1]
    assert result["answers"] == [0, 2, 1]
    assert [answer["used"] for answer in result["by"][1]] == [1, 1]  # the second in a new process
    assert [answer["used"] for answer in result["by"][2]] == [2]  # of client 0
    _assert_gone(_descendants(tmp_path), wait_for)


def test_superlink_whose_database_is_locked_costs_time_and_nothing_else(
    play_local: Play, wait_for: Wait, tmp_path: Path
) -> None:
    """SQLite gives up after 5 s; a backup, a slow disk or hundreds of nodes keep it for longer."""

    def lock() -> None:
        wait_for((tmp_path / "descendants.json").exists, seconds=90)
        with closing(sqlite3.connect(tmp_path / "network" / "server" / "superlink.db", timeout=30.0)) as database:
            database.execute("BEGIN IMMEDIATE")
            time.sleep(9.0)
            database.rollback()

    locker = threading.Thread(target=lock)
    locker.start()
    try:
        result = play_local(rounds=2, waits_s=2.0)
    finally:
        locker.join()

    assert result["answers"] == [2, 2]
    assert "database is locked" in (tmp_path / "logs" / "superlink.log").read_text()
    for index in range(2):
        assert (tmp_path / "logs" / f"supernode-{index}.log").read_text().count("connected as node") == 1
    _assert_gone(_descendants(tmp_path), wait_for)


@pytest.mark.usefixtures("programs")
def test_executor_that_cannot_start_ends_the_run_with_the_end_of_its_log(
    toy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "EXECUTOR", [sys.executable, "-c", "raise SystemExit('no model here')"])
    (tmp_path / "toy.json").write_text(toy.config_json(clients=1))

    with pytest.raises(ProtocolError, match=r"(?s)executor-0: it must run .*no model here"):
        run_local(num_clients=1, run_dir=tmp_path, config=LocalConfig())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_nothing_outlives_a_run_that_is_stopped(
    toy: ModuleType, wait_for: Wait, tmp_path: Path, number: signal.Signals
) -> None:
    (tmp_path / "toy.json").write_text(toy.config_json(waits_s=100.0))
    command = [sys.executable, str(HERE / "toy_run.py"), str(tmp_path), "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    listens = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs are deaf to it
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, preexec_fn=listens) as run:
        wait_for(lambda: (tmp_path / "descendants.json").exists() and bool(_descendants(tmp_path)), seconds=90)
        descendants = _descendants(tmp_path)
        assert len(descendants) == 6

        run.send_signal(number)
        run.wait(120)  # two graces for processes that do not listen, and Flower's own; the clients would wait for 100 s

    _assert_gone(descendants, wait_for)


def _descendants(run_dir: Path) -> set[int]:
    text = (run_dir / "descendants.json").read_text()
    return {int(pid) for pid in json.loads(text or "{}")}


def _assert_gone(pids: set[int], wait_for: Wait) -> None:
    assert pids
    wait_for(lambda: not any(map(_runs, pids)), seconds=60)


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
