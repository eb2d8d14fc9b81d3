"""Child processes that end, hang, die or write without end: with small programs that do so."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from fedzo.errors import ProtocolError
from fedzo.runtime.net import processes as module
from fedzo.runtime.net.processes import Processes, Tail

SLEEP = [sys.executable, "-S", "-c", "import time; print('up', flush=True); time.sleep(60)"]
STUBBORN = [
    sys.executable, "-S", "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)",
]  # fmt: skip
DIES = [sys.executable, "-S", "-c", "import os; os.kill(os.getpid(), 9)"]
FAILS = [sys.executable, "-S", "-c", "print('\\x1b[91mthe reason\\x1b[0m'); raise SystemExit(3)"]


def wait_for_log(children: Processes, name: str, text: str) -> None:
    ends = time.monotonic() + 5
    while text not in children.tail(name):
        assert time.monotonic() < ends
        time.sleep(0.01)


def test_leaving_the_block_ends_every_process_also_after_an_error(tmp_path: Path) -> None:
    pids: list[int] = []

    def fail_among_children() -> None:
        with Processes(tmp_path, environment=os.environ) as children:
            children.start("first", SLEEP, ends_last=True)
            children.start("second", SLEEP)
            pids.extend(children.pids.values())
            assert all(psutil.pid_exists(pid) for pid in pids)
            raise KeyError

    with pytest.raises(KeyError):
        fail_among_children()

    assert len(pids) == 2
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_process_that_does_not_heed_sigterm_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GRACE_S", 0.1)

    with Processes(tmp_path, environment=os.environ) as children:
        children.start("stubborn", STUBBORN)
        wait_for_log(children, "stubborn", "up")
        pid = children.pids["stubborn"]

    assert not psutil.pid_exists(pid)


def test_process_that_ended_is_named_with_status_and_the_end_of_its_log_in_plain_text(tmp_path: Path) -> None:
    with Processes(tmp_path, environment=os.environ) as children:
        children.start("worker", FAILS)

        with pytest.raises(ProtocolError, match=r"(?s)worker: it must run .* status 3.*worker\.log:\nthe reason$"):
            children.wait_until(lambda: False, what="nothing", timeout_s=5, log_of="worker")


@pytest.mark.parametrize("restarts", [0, 1])
def test_of_a_process_that_was_killed_the_likely_cause_is_told(
    restarts: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Processes(tmp_path, environment=os.environ) as children:
        children.start("worker", DIES, restarts=restarts)

        with pytest.raises(
            ProtocolError, match=r"status -9 \(killed: most often by the kernel, which is out of memory"
        ):
            children.wait_until(lambda: False, what="nothing", timeout_s=5, log_of="worker")

    assert caplog.text.count("status -9 (killed: most often by the kernel") == restarts
    assert caplog.text.count(f"starting it again. Its log: {tmp_path / 'worker.log'}") == restarts


def test_process_is_started_again_as_often_as_allowed(tmp_path: Path) -> None:
    with Processes(tmp_path, environment=os.environ) as children:
        children.start("worker", FAILS, restarts=2)

        with pytest.raises(ProtocolError, match="worker"):
            children.wait_until(lambda: False, what="nothing", timeout_s=5, log_of="worker")

        assert children.log_path("worker").read_text().count("the reason") == 3


def test_waiting_too_long_says_for_what_and_what_to_raise(tmp_path: Path) -> None:
    with Processes(tmp_path, environment=os.environ) as children:
        children.start("worker", SLEEP)

        with pytest.raises(ProtocolError, match=r"runtime\.startup_s: the opening must be done in 0\.1 s, but was not"):
            children.wait_until(
                lambda: False, what="the opening", timeout_s=0.1, log_of="worker", setting="runtime.startup_s"
            )


def test_log_of_the_last_start_is_kept_and_of_no_earlier_one(tmp_path: Path) -> None:
    (tmp_path / "worker.log").write_text("of the last start")
    (tmp_path / "worker.log.1").write_text("of an earlier one")

    with Processes(tmp_path, environment=os.environ) as children:
        children.start("worker", SLEEP)
        wait_for_log(children, "worker", "up")

    assert (tmp_path / "worker.log").read_text() == "up\n"
    assert (tmp_path / "worker.log.1").read_text() == "of the last start"
    assert len([*tmp_path.iterdir()]) == 2


def test_what_processes_of_root_log_in_another_users_folder_is_that_users(
    tmp_path: Path, given_by_root: Callable[[], set[Path]]
) -> None:
    with Processes(tmp_path / "logs", environment=os.environ) as children:
        children.start("worker", SLEEP)

    assert given_by_root() == {*tmp_path.rglob("*")} == {tmp_path / "logs", tmp_path / "logs" / "worker.log"}


def test_a_log_that_is_cut_while_it_grows_is_read_from_its_new_beginning(tmp_path: Path) -> None:
    """As by logrotate's copytruncate; whoever writes appends, and so begins anew."""
    log = tmp_path / "site.log"
    log.write_text("of an earlier start\n")
    tail = Tail(log)
    with log.open("a") as writer:
        for line in ("the first\n", "the second\n"):
            writer.write(line)
            writer.flush()
        assert tail.new() == ["the first", "the second"]

        os.truncate(log, 0)
        assert tail.new() == []
        writer.write("the third\n")
        writer.flush()
        assert tail.new() == ["the third"]
        assert tail.new() == []


def test_a_log_that_is_renamed_is_read_on_in_the_new_file(tmp_path: Path) -> None:
    """As by logrotate, if nothing else is asked of it."""
    log = tmp_path / "site.log"
    log.touch()
    tail = Tail(log)
    log.write_text("the first\n")
    assert tail.new() == ["the first"]

    log.rename(tmp_path / "site.log.1")
    assert tail.new() == []
    log.write_text("the second, and longer\n")

    assert tail.new() == ["the second, and longer"]
    assert tail.new() == []

    log.rename(tmp_path / "site.log.2")  # and nobody looks before the new file is there
    log.write_text("the third, which is longer than what was read before\n")
    assert tail.new() == ["the third, which is longer than what was read before"]


@pytest.mark.slow
def test_watching_process_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    child = (
        "import os, sys, time; from fedzo.runtime.net.processes import watch_parent; watch_parent(int(sys.argv[1])); "
        "open(sys.argv[2], 'w').write(str(os.getpid())); time.sleep(60)"
    )
    parent = (
        "import os, subprocess, sys, time; "
        "subprocess.Popen([sys.executable, '-c', sys.argv[1], str(os.getpid()), sys.argv[2]]); time.sleep(60)"
    )
    note = tmp_path / "pid"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", parent, child, str(note)], env=environment) as process:
        ends = time.monotonic() + 60
        while not (note.exists() and note.read_text()):
            assert time.monotonic() < ends
            time.sleep(0.01)

        process.kill()

    pid, ends = int(note.read_text()), time.monotonic() + 60
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < ends
        time.sleep(0.05)
