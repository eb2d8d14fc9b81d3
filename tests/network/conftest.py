"""A real server and real sites on this machine, which tests freeze, kill, cut off and bring back."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedzo.runtime.net.addresses import free_ports
from fedzo.runtime.net.client_folder import ClientFolder, Invitation
from fedzo.runtime.net.launch import (
    Site,
    environment,
    register_clients,
    start_executor,
    start_superlink,
    start_supernode,
    wait_for_superlink,
)
from fedzo.runtime.net.processes import Processes
from fedzo.runtime.net.server_folder import Listening, ServerFolder
from fedzo.testing.tiny_models import save_tiny_model

FEDZO = [sys.executable, "-m", "fedzo"]
SETTINGS = [
    "experiment=[tiny,sites]", "runtime=remote", "task=custom", "task.template='Text: {text} Verdict:'",
    "task.candidates=[' bad',' good']", "fl.batch_size=2", "trainer.calibration_docs=4",
    "trainer.calibration_tokens=16", "trainer.density=0.05", "report=none", "evaluation.central=false",
    "evaluation.federated_every_rounds=-1", "fl.hash_every=1",
]  # fmt: skip


def wait_for(ready: Callable[[], object], *, seconds: float = 180.0, what: Callable[[], str] = str) -> None:
    """Poll until it is so."""
    ends = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < ends, what()
        time.sleep(0.05)


def importing(path: str) -> dict[str, str]:
    """The environment of processes that look for packages in this folder first, if there is one."""
    given = environment()
    return given | {"PYTHONPATH": os.pathsep.join(filter(None, [path, given["PYTHONPATH"]]))}


class RealSite:
    """One site: its processes, which can be ended, frozen and started again."""

    def __init__(self, folder: ClientFolder, room: Path, *, prefix: Sequence[str] = (), path: str = "") -> None:
        self.folder = folder
        self._room = room
        self._prefix = list(prefix)
        self._path = path
        self._stack = contextlib.ExitStack()
        self._processes: Processes | None = None
        self._lock = threading.Lock()  # of ``check``, which would start again what is just ended

    def start(self, *, answers: bool = True) -> None:
        """Start its SuperNode, and its executor where it ``answers``."""
        processes = self._stack.enter_context(_Prefixed(self._room / "logs", self._prefix, self._path))
        site = Site(
            folder=self.folder,
            site_file=self._room / "site.yaml",
            log_file=self._room / "logs" / "site.log",
            step_limit_s=60.0,
        )
        if answers:
            start_executor(processes, site)
        start_supernode(processes, site)
        self._processes = processes

    def end(self) -> None:
        """End its processes, as `fedzo client up` does."""
        with self._lock:
            self._processes = None
        self._stack.close()

    def check(self) -> None:
        """Start again what has ended, as `fedzo client up` does."""
        with self._lock:
            if self._processes is not None:
                self._processes.check()

    def signal(self, number: int, *kinds: str) -> None:
        """Send a signal to its SuperNode and executor, or one of them."""
        assert self._processes is not None
        for kind in kinds or ("executor", "supernode"):
            os.kill(self._processes.pids[kind], number)

    @property
    def pids(self) -> dict[str, int]:
        """Its processes by kind."""
        assert self._processes is not None
        return self._processes.pids

    def freeze(self) -> None:
        """Stop all of it, as a machine does that sleeps."""
        self.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        self.signal(signal.SIGCONT)

    def said(self, name: str = "site") -> str:
        """What one of its logs says."""
        file = self._room / "logs" / f"{name}.log"
        return file.read_text(errors="replace") if file.exists() else ""


class _Prefixed(Processes):
    """Starts everything by way of another program, such as ``ip netns exec``."""

    def __init__(self, log_dir: Path, prefix: list[str], path: str) -> None:
        super().__init__(log_dir, environment=importing(path) | {"FLWR_HOME": str(log_dir / "flower")})
        self._prefix = prefix

    def start(self, name: str, command: Sequence[str], **options: Any) -> None:
        super().start(name, [*self._prefix, *command], **options)


class Federation:
    """A server, as `fedzo server up` keeps it, and sites.

    Args:
        folder: For all their files.
        num_clients: Sites that are registered; none of them is started.
        host: Address at which sites reach the server.
        prefix: What the sites' processes are started by, by client.
        gateway: Port at which sites reach it, if it is not the SuperLink's own.
        server_path: Folder in which the server's processes look for packages first.
        site_path: Folder in which the sites' processes do.
    """

    def __init__(
        self,
        folder: Path,
        num_clients: int,
        *,
        host: str = "127.0.0.1",
        prefix: dict[int, list[str]] | None = None,
        gateway: int | None = None,
        server_path: str = "",
        site_path: str = "",
    ) -> None:
        self.folder = folder
        self._environment = importing(server_path)
        public, control = free_ports(2)
        address = f"{host}:{gateway or public}"
        listening = Listening(address=address, listen=f"0.0.0.0:{public}", control=f"127.0.0.1:{control}")
        self.server = ServerFolder.make(folder / "server", listening, names=[host, "localhost", "127.0.0.1"], days=30)
        save_tiny_model(folder / "model", "llama")
        self.sites = [self._site(index, (prefix or {}).get(index, []), site_path) for index in range(num_clients)]
        home = {"FLWR_HOME": str(folder / "flower")}
        self.processes = Processes(folder / "logs", environment=self._environment | home)
        self.commands: dict[str, subprocess.Popen[bytes]] = {}
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._keep, daemon=True)

    def __enter__(self) -> Federation:
        self.processes.__enter__()
        start_superlink(self.processes, self.server, restarts=None)
        wait_for_superlink(self.processes, self.server, timeout_s=60.0)
        register_clients(self.server)
        self._watch.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._watch.join()
        for command in self.commands.values():
            command.kill()
            command.wait()
        with ThreadPoolExecutor() as together:  # each waits for its own processes
            list(together.map(RealSite.end, self.sites))
        self.processes.__exit__(None, None, None)

    wait_for = staticmethod(wait_for)

    def train(self, name: str, *settings: str) -> subprocess.Popen[bytes]:
        """Start a run of all sites in a folder of this name."""
        given = [*SETTINGS, f"runtime.server={self.server.path}", f"model={self.folder / 'model'}"]
        return self.fedzo("train", *given, *settings, f"hydra.run.dir={self.folder / name}", output=name)

    def fedzo(self, *command: str, output: str) -> subprocess.Popen[bytes]:
        """Start a command, whose words go to a file of this name."""
        with (self.folder / f"{output}.txt").open("ab") as out:
            started = subprocess.Popen(
                [*FEDZO, *command], cwd=self.folder, env=self._environment, stdout=out, stderr=subprocess.STDOUT
            )
        self.commands[output] = started
        return started

    def said(self, name: str) -> str:
        """What a command said."""
        return (self.folder / f"{name}.txt").read_text(errors="replace")

    def rounds(self, name: str) -> list[dict[str, Any]]:
        """The public log of a run so far."""
        log = self.folder / name / "public.jsonl"
        text = log.read_text() if log.exists() else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def wait_for_round(self, name: str, count: int, *, seconds: float = 180.0) -> list[dict[str, Any]]:
        """Wait until a run has so many rounds."""
        self._wait(name, lambda: len(self.rounds(name)) >= count, f"{count} rounds", seconds)
        return self.rounds(name)

    def wait_for_attendance(self, name: str, attendance: list[int], *, seconds: float = 180.0) -> int:
        """Wait for a round with these clients, from the present one on; its number."""
        present = max(0, len(self.rounds(name)) - 1)

        def found() -> list[int]:
            return [
                number
                for number, line in enumerate(self.rounds(name))
                if number >= present and line["attendance"] == attendance
            ]

        self._wait(name, lambda: bool(found()), f"a round of {attendance}", seconds)
        return found()[0]

    def round_seconds(self, name: str) -> list[float]:
        """How long each round of a run took."""
        lines = map(json.loads, (self.folder / name / "metrics.jsonl").read_text().splitlines())
        return [line["round_seconds"] for line in lines if line["kind"] == "round"]

    def reason(self, name: str, client: int, number: int) -> str:
        """Why a client is not in a round of a run."""
        lines = map(json.loads, (self.folder / name / "metrics.jsonl").read_text().splitlines())
        (line,) = [line for line in lines if line["kind"] == "round" and line["round"] == number]
        return str(line["reasons"][str(client)])

    def server_pid(self, *, seconds: float = 180.0) -> int:
        """The process that serves the run, as soon as there is one."""
        found: list[int] = []

        def serves() -> bool:
            found[:] = [
                process.pid
                for process in psutil.process_iter(["cmdline"])
                if "fedzo.cli.serve" in (words := process.info["cmdline"] or []) and str(self.server.path) in words
            ]
            return bool(found)

        wait_for(serves, seconds=seconds, what=lambda: "a process that serves the run")
        return found[0]

    def _wait(self, name: str, ready: Callable[[], bool], what: str, seconds: float) -> None:
        """Until it is so, or the command that wrote the file of that name has ended."""

        def told() -> str:
            attended = [line["attendance"] for line in self.rounds(name)]
            return f"{what} must come within {seconds:g} s, but the rounds are {attended}; {self.said(name)}"

        started = self.commands[name]
        wait_for(lambda: ready() or started.poll() is not None, seconds=seconds, what=told)
        assert ready(), told()

    def _site(self, index: int, prefix: list[str], path: str) -> RealSite:
        room = self.folder / f"site-{index}"
        invitation = Invitation(address=self.server.listening.address, authority=self.server.file("ca.crt").read_text())
        folder = ClientFolder.make(room, address=self.server.listening.address, site="", invitation=invitation)
        self.server.registry.add(f"site-{index}", index=index, key=folder.public_key)
        rows = [{"text": f"site {index} item {i} is {['bad', 'good'][i % 2]}", "label": i % 2} for i in range(9)]
        (room / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = {"device": "cpu", "threads": 1, "model": {"name": "../model"}, "data": {"path": "./rows.jsonl"}}
        (room / "site.yaml").write_text(json.dumps(settings))
        return RealSite(folder, room, prefix=prefix, path=path)

    def _keep(self) -> None:
        while not self._over.wait(0.1):
            self.processes.check()
            for site in self.sites:
                site.check()


@pytest.fixture(name="wait_for")
def given_wait_for() -> Callable[..., None]:
    """``wait_for`` for tests, which cannot import it from here."""
    return wait_for


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Callable[..., Federation]]:
    """Starts a server with registered sites, none of them up; all of it ends with the test."""
    with contextlib.ExitStack() as stack:
        yield lambda num_clients, **options: stack.enter_context(Federation(tmp_path, num_clients, **options))
