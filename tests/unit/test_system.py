"""What a process may use of its machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from fedzo import system
from fedzo.runtime.local import share_of_cpus
from fedzo.system import (
    _commit_of,
    _git_commit,
    code_version,
    default_threads,
    environment,
    on_device,
    usable_cpus,
)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system pins no process to CPUs")
def test_only_the_cpus_that_a_process_may_run_on_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(system, "OWN_CGROUP", tmp_path / "none")
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cpus() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert usable_cpus() == len(before)


def test_a_quota_of_cpu_time_counts_as_the_cpus_that_it_is_worth(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A container's (``docker run --cpus``) or a unit's (``CPUQuota=``): its processes may run on any CPU."""
    run = tmp_path / "cgroup" / "site" / "run"
    run.mkdir(parents=True)
    (tmp_path / "own").write_text("4:cpu:/other\n0::/site/run\n")
    monkeypatch.setattr(system, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(system, "OWN_CGROUP", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {*range(64)}, raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert usable_cpus() == 64

    (run / "cpu.max").write_text("max 100000\n")
    assert usable_cpus() == 64
    (run.parent / "cpu.max").write_text("150000 100000\n")
    assert (usable_cpus(), default_threads(), share_of_cpus(1)["OMP_NUM_THREADS"]) == (2, 2, "2")
    (run.parents[1] / "cpu.max").write_text("20000 50000\n")  # a container sees its own group at the root
    assert usable_cpus() == 1
    (run.parents[1] / "cpu.max").write_text("max 50000\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3})
    assert usable_cpus() == 1


@pytest.mark.parametrize(("said", "threads"), [("3", 3), ("4,2", 4), ("0", None), ("many", None), ("", None)])
def test_threads_are_what_openmp_is_told_or_all_cpus(
    said: str, threads: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", said)

    assert default_threads() == (threads or usable_cpus())


def test_local_clients_share_the_cpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cpus = usable_cpus()

    assert [share_of_cpus(n)["OMP_NUM_THREADS"] for n in (1, cpus, 4 * cpus)] == [
        str(cpus),
        "1",
        "1",
    ]

    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert share_of_cpus(4 * cpus)["OMP_NUM_THREADS"] == "5"


IMPORTS = """
import datasets, peft, transformers
from transformers import TorchAoConfig
import fedzo.models.source
"""
LISTENING = """
import logging, sys
from fedzo.system import quiet_libraries
logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(name)s %(levelname)s")
quiet_libraries()
{imports}
libraries = ("torchao.x", "transformers.x", "datasets.x", "tensorboard", "torch.utils._pytree")
for name in (*libraries, "plugin", "fedzo.x", "flwr"):
    logging.getLogger(name).warning("w")
    logging.getLogger(name).error("e")
"""


def said_by(imports: str, **environment: str) -> list[str]:
    """Lines that a fresh process writes to its error output."""
    inherited = {name: value for name, value in os.environ.items() if not name.endswith("_VERBOSITY")}
    done = subprocess.run(
        [sys.executable, "-c", LISTENING.format(imports=imports)],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stderr.splitlines()


def test_of_libraries_errors_alone_are_heard_and_of_all_others_warnings_too() -> None:
    said = said_by(IMPORTS)

    assert [line for line in said if "WARNING" in line] == ["plugin WARNING", "fedzo.x WARNING", "flwr WARNING"]
    assert {"torchao.x ERROR", "datasets.x ERROR", "plugin ERROR", "fedzo.x ERROR"} <= set(said)
    assert not [line for line in said if "pytree.py" in line or "Failed to load" in line or "triton" in line]


def test_a_librarys_own_variable_brings_its_warnings_back() -> None:
    said = said_by("import datasets", DATASETS_VERBOSITY="warning")

    assert "datasets.x WARNING" in said
    assert "torchao.x WARNING" not in said


@pytest.mark.parametrize("before", [{}, {"no_proxy": "example.org"}, {"NO_PROXY": "example.org, localhost"}])
def test_what_is_on_this_machine_is_asked_without_a_proxy(before: dict[str, str]) -> None:
    """The proxies are dead; a server listens here."""
    code = (
        "import http.server, os, threading, httpx\n"
        "from fedzo.system import keep_loopback_direct\n"
        "server = http.server.HTTPServer(('127.0.0.1', 0), http.server.SimpleHTTPRequestHandler)\n"
        "threading.Thread(target=server.handle_request, daemon=True).start()\n"
        "keep_loopback_direct(os.environ)\n"
        "keep_loopback_direct(os.environ)\n"
        "print(httpx.Client(timeout=5).get(f'http://127.0.0.1:{server.server_port}/').status_code)\n"
        "print(os.environ['no_proxy'])"
    )
    dead = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9")
    inherited = {name: value for name, value in os.environ.items() if name.lower() != "no_proxy"}

    done = subprocess.run(
        [sys.executable, "-c", code], env={**inherited, **dead, **before}, capture_output=True, text=True, check=True
    )

    status, hosts = done.stdout.split()
    assert status == "200"
    assert sorted(hosts.split(",")) == sorted({"127.0.0.1", "localhost", "::1", *(["example.org"] if before else [])})


def test_an_installed_fedzo_has_no_commit_whatever_its_environment_lies_in(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    who = ["-c", "user.name=n", "-c", "user.email=e@x"]
    for words in (["init", "-q"], [*who, "commit", "-q", "--allow-empty", "-m", "theirs"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    place = tmp_path / ".venv" / "lib" / "site-packages" / "fedzo"
    place.mkdir(parents=True)
    monkeypatch.setattr("fedzo.system.__file__", str(place / "system.py"))

    assert _git_commit() is None
    (place.parent / "pyproject.toml").touch()
    assert (_git_commit() or "").endswith("-dirty")  # a source tree, whose pyproject.toml is new


@pytest.fixture
def source_tree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A repository with one commit, of which this fedzo takes itself to be."""
    who = ["-c", "user.name=n", "-c", "user.email=e@x"]
    for name in ("pyproject.toml", "fedzo/a.py", "experiments/peers/run.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "ours"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    monkeypatch.setattr("fedzo.system.__file__", str(tmp_path / "fedzo" / "system.py"))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "marks"),
    [
        ("pyproject.toml", True),  # changed
        ("experiments/peers/run.py", True),
        ("fedzo/b.py", True),  # new
        ("conf/trainer/x.yaml", True),
        ("experiments/new/run.py", True),
        ("experiments/peers/results.json", False),  # a study writes these
        ("notes.txt", False),
    ],
)
def test_changed_and_new_code_marks_the_commit_and_other_files_do_not(
    source_tree: Path, name: str, marks: bool
) -> None:
    clean = _git_commit()
    (source_tree / name).parent.mkdir(parents=True, exist_ok=True)
    (source_tree / name).write_text("x = 1\n")
    asked_again = _git_commit()
    _commit_of.cache_clear()

    assert len(clean or "") == 40
    assert asked_again == clean  # once a process, whose code does not change
    assert _git_commit() == (f"{clean}-dirty" if marks else clean)


def test_a_source_tree_without_its_repository_is_told_its_commit(
    source_tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDZO_GIT_COMMIT", "c" * 40)
    own = _git_commit()
    shutil.rmtree(source_tree / ".git")
    _commit_of.cache_clear()

    assert own != "c" * 40  # a repository knows better
    assert _git_commit() == "c" * 40
    monkeypatch.delenv("FEDZO_GIT_COMMIT")
    assert _git_commit() is None


def test_the_environment_tells_what_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: f"GPU {device.index}")

    told = environment(torch.device("cpu"))

    assert told["fedzo"] == code_version()  # by the number alone, wheels of two checkouts are alike
    assert told["device"] == "cpu"
    assert told["threads"] == torch.get_num_threads()
    assert told["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert environment(torch.device("cuda", 1))["device"] == "cuda:1, GPU 1"
    assert "device" not in environment()


def test_problems_of_packages_are_those_outside_of_the_ranges_that_fedzo_asks_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = ["a>=5.17,<6", "b>=2", "c>=1", "d<2", "e>=3; extra == 'ray'", "f"]
    there = {"a": "5.5.0", "b": "2.13.0+cpu", "d": "2.0", "f": "0.1"}
    monkeypatch.setattr(system, "requires", lambda name: asked if name == "fedzo" else None)
    monkeypatch.setattr(system, "package_version", there.get)

    assert system.package_problems() == {
        "a": "it must be <6,>=5.17, got 5.5.0. Run: pip install 'a<6,>=5.17'",
        "c": "it must be >=1, got none. Run: pip install 'c>=1'",
        "d": "it must be <2, got 2.0. Run: pip install 'd<2'",
    }


def test_a_source_tree_that_nobody_installed_has_no_problems_of_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(system, "requires", requires)

    assert system.package_problems() == {}


class Card(TorchFunctionMode):
    """Stands for a card: does on the CPU what copies numbers there, and keeps what it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[Any, ...]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.__name__ not in ("pin_memory", "to"):
            return func(*args, **kwargs)
        self.asked.append((func.__name__, *args[1:], kwargs))
        return args[0].clone()


def test_a_copy_to_a_card_comes_from_page_locked_memory_and_is_not_waited_for() -> None:
    numbers, card = np.arange(6).reshape(2, 3), torch.device("cuda", 1)

    with Card() as asked:
        made = on_device(numbers.T, card)
    with Card() as on_host:
        on_device(numbers, torch.device("cpu"))

    assert made.tolist() == [[0, 3], [1, 4], [2, 5]]
    assert asked.asked == [("pin_memory", {}), ("to", card, {"non_blocking": True})]
    assert on_host.asked == [("to", torch.device("cpu"), {})]


@pytest.mark.gpu
def test_numbers_reach_a_busy_card_as_they_were_when_they_were_handed_over() -> None:
    card, numbers = torch.device("cuda"), np.zeros(1000, np.int64)
    locked = [on_device(numbers, card), *(torch.from_numpy(numbers).pin_memory() for _ in range(8))]
    del locked  # torch keeps the memory: to lock more of it may wait
    torch.cuda.synchronize()

    torch.cuda._sleep(1 << 30)
    made = []
    for number in range(8):
        numbers[:] = number
        made.append(on_device(numbers, card))
    is_busy = not torch.cuda.current_stream().query()

    assert is_busy
    assert [each.unique().tolist() for each in made] == [[number] for number in range(8)]
