"""The page on a real network, read and walked through: its commands are typed, and its answers must come."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedzo.config.load import load
from fedzo.config.schema import LaunchConfig
from fedzo.config.travel import load_site
from fedzo.data.embedded import PACKAGES
from fedzo.runtime.net.addresses import free_ports
from fedzo.testing.tiny_models import save_tiny_model

PAGE = Path(__file__).parents[2] / "docs" / "tutorial-real-network.md"
STAY = (["server", "up"], ["client", "up"], ["train"], ["resume"])
"""Commands that stay until they are ended."""
TINY = [
    "experiment=[tiny,sites]", "model=../model", "task=custom", "task.template='Text: {text} Verdict:'",
    "task.candidates=[' bad',' good']", "fl.batch_size=2", "trainer.calibration_docs=4", "trainer.density=0.05",
    "trainer.calibration_tokens=16", "evaluation.federated_every_rounds=1000", "fl.rounds=100000",
]  # fmt: skip
"""What a test adds to the command of the run, so that a round takes no time."""


def steps() -> list[tuple[str, list[str], list[str]]]:
    """Machine, words and answer of each command in the page's first three sections."""
    text = PAGE.read_text().partition("## 4.")[0]
    found = []
    for block in re.findall(r"```text\n(.*?)```", text, re.DOTALL):
        for step in re.split(r"\n\n|(?=^\w+\$ )", block.strip(), flags=re.MULTILINE):
            if step.strip():
                command, *answer = step.strip().splitlines()
                machine, _, words = command.partition("$ fedzo ")
                found.append((machine, shlex.split(words), answer))
    return found


def run_of_the_page() -> LaunchConfig:
    """The run that the page starts."""
    (words,) = [words for machine, words, _ in steps() if machine == "server" and words[0] == "train"]
    return load(words[1:])


def site_file() -> str:
    """What the page writes into the file of each site."""
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return str(block)


FREE = {r"\.\.\.": ".*", r"[0-9]+ [MG]B": "[0-9.]+ .?B", r"[0-9]+\.[0-9] s": "[0-9.]+ s", "[0-9]+": "[0-9]+"}
"""What may differ between the page and what is said: what is left out, sizes, numbers and dates."""


def pattern(line: str) -> str:
    """The answers that a line of the page stands for."""
    parts = re.split(f"({'|'.join(FREE)})", re.sub(r"\s+", " ", line))
    free = [next(free for page, free in FREE.items() if re.fullmatch(page, part)) for part in parts[1::2]]
    return "".join(text for pair in zip(map(re.escape, parts[::2]), [*free, ""], strict=True) for text in pair)


class Walk:
    """The machines of the page as folders of this one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ports = dict(zip(("8443", "8444"), map(str, free_ports(2)), strict=True))
        self._running: list[tuple[str, subprocess.Popen[bytes]]] = []

    def here(self, text: str) -> str:
        """What is said of the page's host, said of this machine."""
        text = text.replace("fed.example.org, localhost", "localhost").replace("fed.example.org", "localhost")
        return re.sub("8443|8444", lambda port: self._ports[port[0]], text)

    def type(self, machine: str, words: list[str]) -> Callable[[], str]:
        """Type a command; gives what has been said until now."""
        room = self.folder / machine
        out = room / f"{'-'.join(re.sub(r'[^a-z]+', '', word) for word in words[:2])}.txt"
        command = [sys.executable, "-m", "fedzo", *map(self.here, words)]
        if words[:2] == ["server", "init"]:
            command += ["--port", self._ports["8443"], "--control-port", self._ports["8444"]]
        if words[0] == "train":
            command = [word for word in command if not word.startswith("experiment=")] + TINY
        with out.open("wb") as said:
            process = subprocess.Popen(command, cwd=room, stdout=said, stderr=subprocess.STDOUT)
        if words[: 1 + (words[0] in ("server", "client"))] in STAY:
            self._running.append((words[0], process))
        else:
            assert process.wait(120) == 0, out.read_text()
        return out.read_text

    def end(self) -> None:
        """End what stays, the last first; the sites together."""
        for _, alike in groupby(reversed(self._running), key=lambda running: running[0]):
            processes = [process for _, process in alike]
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait(120)


@pytest.fixture
def walk(tmp_path: Path) -> Iterator[Walk]:
    with _ended(Walk(tmp_path)) as walk:
        yield walk


@contextmanager
def _ended(walk: Walk) -> Iterator[Walk]:
    try:
        yield walk
    finally:
        walk.end()


def test_the_page_has_the_rounds_of_its_run() -> None:
    assert {*re.findall(r"of (\d+) rounds", PAGE.read_text())} == {str(run_of_the_page().fl.rounds)}


def test_the_page_installs_and_names_the_model_of_its_run(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text(site_file())

    site = load_site(tmp_path / "site.yaml")

    assert site.model.name == run_of_the_page().model.name
    assert Path(site.data.path or "").parent == tmp_path.resolve()  # as the page says, beside the file
    assert {*re.findall(r"pip install --no-deps (\S+)", PAGE.read_text())} == {*PACKAGES.values()}


def test_the_page_installs_the_versions_that_the_tests_pass_with() -> None:
    (words,) = re.findall(r"`pip install ([^`]*fedzo-[^`]*)`", PAGE.read_text())

    assert words == "--constraint constraints.txt fedzo-*.whl"


@pytest.mark.net
@pytest.mark.timeout(900)
def test_the_page_says_what_happens(walk: Walk, wait_for: Callable[..., None], tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model", "llama")
    for machine in ("hospital", "clinic", "server"):
        (tmp_path / machine).mkdir()
    handed_over = {
        ("hospital", "client init"): ("server/server/invitations/hospital.json", "hospital/hospital.json"),
        ("clinic", "client init"): ("server/server/ca.crt", "clinic/ca.crt"),
        ("server", "server add-client clinic"): ("clinic/site/key.pub", "server/clinic.pub"),
    }
    log = tmp_path / "server" / "runs" / "first" / "public.jsonl"

    said: Callable[[], str] = str
    told = steps()
    assert {words[0] for _, words, _ in told} == {"server", "client", "doctor", "status", "train", "stop", "resume"}
    for machine, words, answer in told:
        for (where, begins), (source, target) in handed_over.items():
            if machine == where and " ".join(words).startswith(begins):
                shutil.copyfile(tmp_path / source, tmp_path / target)
        if words == ["status", "runs/first"] or words[0] == "stop":
            wait_for(lambda: log.exists() and log.read_text().count("\n") > 2, what=said)
        said = walk.type(machine, words)
        for line in map(walk.here, answer):
            _until_said(line, said, wait_for)
        if words[:2] == ["client", "init"]:
            _edit_site(tmp_path / machine / "site", name=machine)
    stopped = log.read_text().count("\n")
    wait_for(lambda: log.read_text().count("\n") > stopped + 1, what=said)  # the last command resumed the run


def _edit_site(folder: Path, *, name: str) -> None:
    """Write the page's site file, with a tiny model in the place of the page's, and rows where the file says."""
    told: dict[str, Any] = yaml.safe_load(site_file())
    rows = [{"text": f"{name} item {i} is {['bad', 'good'][i % 2]}", "label": i % 2} for i in range(12)]
    (folder / told["data"]["path"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny = {"device": "cpu", "threads": 1, "model": {"name": "../../model"}}
    (folder / "site.yaml").write_text(json.dumps(told | tiny))


def _until_said(line: str, said: Callable[[], str], wait_for: Callable[..., None]) -> None:
    wanted = re.compile(pattern(line))

    def is_there() -> bool:
        return any(wanted.fullmatch(re.sub(r"\s+", " ", each).strip()) for each in said().splitlines())

    wait_for(is_there, what=lambda: f"{line}\n--- is not in:\n{said()}")
