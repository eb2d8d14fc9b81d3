"""Child processes that are watched while they live, and that never outlive their parent."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from fedzo.errors import ProtocolError
from fedzo.records.folder import make_folder, open_file

log = logging.getLogger(__name__)
GRACE_S = 8.0
"""Between SIGTERM and SIGKILL; Flower forces its own exit after 5 s."""
POLL_S = 0.05
TAIL_LINES = 15
COLOURS = re.compile("\x1b\\[[0-9;]*m")


LONGEST_PAUSE_S = 30.0
STEADY_S = 60.0
"""Whoever lived so long is started again at once, and with all its restarts."""


@dataclass(slots=True)
class _Child:
    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    restarts: int | None
    ends_last: bool
    process: subprocess.Popen[bytes]
    started: float
    failures: int = 0
    due: float | None = None


class Processes:
    """A set of child processes; leaving its ``with`` block ends them all, by their pids.

    Each writes to ``<name>.log`` in the log folder, and what it wrote at its last start is then ``<name>.log.1``. They
    get a session of their own, so that Ctrl-C in the terminal reaches the parent alone and they end in order.
    """

    def __init__(self, log_dir: Path, *, environment: Mapping[str, str]) -> None:
        self._log_dir = log_dir
        self._environment = dict(environment)
        self._children: list[_Child] = []
        if not log_dir.exists():
            make_folder(log_dir)

    def start(
        self,
        name: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        restarts: int | None = 0,
        ends_last: bool = False,
    ) -> None:
        """Start a process.

        Args:
            name: Of its log file and in messages.
            command: Program and arguments.
            environment: Variables of its own.
            restarts: How often in a row ``check`` may start it again when it has ended soon; None for ever.
            ends_last: End it only when the others are gone.
        """
        with contextlib.suppress(FileNotFoundError):
            self.log_path(name).replace(self._log_dir / f"{name}.log.1")
        own = {**self._environment, **(environment or {})}
        process = self._spawn(name, command, own)
        self._children.append(_Child(name, command, own, restarts, ends_last, process, time.monotonic()))

    def check(self) -> None:
        """Start again what has ended: the first time at once, then after 1, 2, 4, ... s.

        Raises:
            ProtocolError: A process has ended once too often; the end of its log is in the message.
        """
        now = time.monotonic()
        for child in self._children:
            code = child.process.poll()
            if code is None:
                continue
            if child.due is None:
                if now - child.started > STEADY_S:
                    child.failures = 0
                if child.restarts is not None and child.failures >= child.restarts:
                    raise ProtocolError(
                        f"{child.name}: it must run as long as the federation, but ended with status "
                        f"{told_status(code)}. The end of {self.log_path(child.name)}:\n{self.tail(child.name)}"
                    )
                pause = min(LONGEST_PAUSE_S, 2.0 ** (child.failures - 1)) if child.failures else 0.0
                child.due, child.failures = now + pause, child.failures + 1
                told = f" in {pause:g} s" if pause else ""
                said = f"{child.name} ended with status {told_status(code)}: starting it again{told}"
                log.warning("%s. Its log: %s", said, self.log_path(child.name))
            if now >= child.due:
                child.due, child.started = None, now
                child.process = self._spawn(child.name, child.command, child.environment)

    def wait_until(
        self, ready: Callable[[], bool], *, what: str, timeout_s: float, log_of: str, setting: str = ""
    ) -> None:
        """Poll until ``ready()``.

        Args:
            ready: Asked again and again.
            what: Is waited for.
            timeout_s: At most so long.
            log_of: Whose log says more.
            setting: The key of ``timeout_s``, where a user can raise it.

        Raises:
            ProtocolError: It was not within ``timeout_s``, or a process ended once too often meanwhile.
        """
        ends = time.monotonic() + timeout_s
        while not ready():
            self.check()
            if time.monotonic() > ends:
                see = "Raise it, or see" if setting else "See"
                raise ProtocolError(
                    f"{setting or 'start'}: {what} must be done in {timeout_s:g} s, but was not. {see} "
                    f"{self._log_dir}. The end of {self.log_path(log_of)}:\n{self.tail(log_of)}"
                )
            time.sleep(POLL_S)

    def log_path(self, name: str) -> Path:
        """Where a process's output goes."""
        return self._log_dir / f"{name}.log"

    def tail(self, name: str) -> str:
        """The last lines that a process wrote."""
        try:
            text = self.log_path(name).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return "(no log)"
        return "\n".join(COLOURS.sub("", text).splitlines()[-TAIL_LINES:])

    @property
    def pids(self) -> dict[str, int]:
        """Process id by name."""
        return {child.name: child.process.pid for child in self._children}

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for last in (False, True):
            batch = [child.process for child in self._children if child.ends_last is last]
            for process in batch:
                process.terminate()
            ends = time.monotonic() + GRACE_S
            for process in batch:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, ends - time.monotonic()))
            for process in batch:
                process.kill()  # does nothing to one that has been waited for
                process.wait()

    def _spawn(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        opened = open_file(self._log_dir, self.log_path(name).name, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        with os.fdopen(opened, "ab") as output:
            return subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )


class Tail:
    """The lines that are added to a log file, from now on."""

    def __init__(self, file: Path) -> None:
        self._file = file
        found = file.stat() if file.exists() else None
        self._inode, self._read = (found.st_ino, found.st_size) if found else (0, 0)

    def new(self) -> list[str]:
        """Those since the last call."""
        try:
            with self._file.open("rb") as text:
                inode = os.fstat(text.fileno()).st_ino
                # it was renamed, or cut, as logrotate does
                if inode != self._inode or text.seek(0, os.SEEK_END) < self._read:
                    self._inode, self._read = inode, 0
                text.seek(self._read)
                said = text.read(1 << 20)
        except FileNotFoundError:
            return []
        whole = said[: said.rfind(b"\n") + 1]
        self._read += len(whole)
        return COLOURS.sub("", whole.decode("utf-8", "replace")).splitlines()


def told_status(code: int) -> str:
    """A status, and what most often is behind it where the process could not say a word."""
    killed = code == -signal.SIGKILL
    return f"{code} (killed: most often by the kernel, which is out of memory; see `dmesg`)" if killed else str(code)


def watch_parent(parent_pid: int) -> None:
    """End this process soon after its parent has: by SIGTERM, and without asking if that does not help."""

    def watch() -> None:
        while os.getppid() == parent_pid:
            time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_S)
        os._exit(1)

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()


def python(module: str) -> list[str]:
    """The command that runs a module of fedzo; of the folder that the user happens to be in nothing is imported."""
    return [sys.executable, "-P", "-m", module]
