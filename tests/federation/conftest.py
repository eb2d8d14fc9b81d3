"""A tiny real model and a small real federation, in one process."""

from __future__ import annotations

import functools
import gc
import json
import multiprocessing
import resource
import shutil
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.config_store import ConfigStore

from fedzo.config import compose
from fedzo.config.plugins import plugin_classes
from fedzo.testing.tiny_models import save_tiny_model, save_tiny_sketch
from fedzo.trainers import calibration

FORKED = """
import os, sys
for stream in (1, 2):
    os.dup2(os.open({said!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
sys.path[:0] = {path!r}
os.chdir({cwd!r})
sys.argv = {argv!r}
"""
WORDS = {0: ["bad", "dull", "poor", "weak"], 1: ["good", "bright", "rich", "strong"]}


def rows(count: int, *, offset: int = 0) -> list[dict[str, Any]]:
    """Rows whose label can be read off one word; no two alike."""
    made = []
    for i in range(offset, offset + count):
        label = i % 2
        made.append({"text": f"item {i} is {WORDS[label][i // 2 % 4]}", "label": label, "site": f"site{i % 4}"})
    return made


@pytest.fixture(scope="session", autouse=True)
def _calibration_text_is_read_once() -> Iterator[None]:
    """Reading 34 MB of reviews for four windows takes as long as all else of a run of a tiny model."""
    read_once = functools.cache(calibration.imdb_texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "imdb_texts", lambda: list(read_once()))
        yield


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny_model(folder, "llama")
    return folder


@pytest.fixture(scope="session")
def tiny_sketch_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_sketch(tmp_path_factory.mktemp("models") / "sketch", "llama")


@pytest.fixture
def no_room() -> Callable[[], AbstractContextManager[None]]:
    """Within its context the kernel refuses to write a file as long as a tiny model's weights ("File too large")."""

    @contextmanager
    def limited() -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))  # a tiny model's other files are shorter
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


@pytest.fixture
def save_model_for() -> Callable[..., Path]:
    """Write a tiny model that a trainer can train: a sketch, where it cannot train a dense one."""

    def save(trainer: str, folder: Path, family: str = "llama") -> Path:
        return (save_tiny_sketch if needs_sketch(trainer) else save_tiny_model)(folder, family)

    return save


def needs_sketch(trainer: str) -> bool:
    known = plugin_classes()["trainer"]  # another process may know more
    return trainer in known and bool(known[trainer]().traits.cannot_train_dense)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, part in (("train", rows(64)), ("dev", rows(8, offset=100)), ("test", rows(16, offset=200))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


@pytest.fixture
def overrides(tiny_model_dir: Path, tiny_sketch_dir: Path, data_dir: Path) -> Callable[..., list[str]]:
    def make(*extra: str) -> list[str]:
        trainer = next((each[8:] for each in reversed(extra) if each.startswith("trainer=")), "meerkat")
        unread = {"trainer.selector=random", "trainer.selector=magnitude", "trainer.gradient=false"} & {*extra}
        calibrated = ["trainer.calibration=train", "trainer.calibration_docs=4", "trainer.calibration_tokens=16"]
        calibrated = [] if unread else calibrated
        own = {"meerkat": ["trainer.density=0.05", *calibrated], "tables": calibrated}
        unscored = {"evaluation.central=false", "split.num_dev=0", "evaluators=[]"} & {*extra}
        return [
            f"model={tiny_sketch_dir if needs_sketch(trainer) else tiny_model_dir}",
            "task=custom",
            "task.template='Text: {text}\\nVerdict:'",
            "task.candidates=[' bad',' good']",
            f"data.path={data_dir}",
            "partition=iid",
            *own.get(trainer, []),
            "fl.num_clients=4",
            "fl.rounds=3",
            "fl.batch_size=2",
            *([] if unscored else ["evaluation.every_rounds=2"]),
            "threads=1",
            "device=cpu",
            "report=none",
            *extra,
        ]

    return make


@pytest.fixture
def run(tmp_path: Path, overrides: Callable[..., list[str]]) -> Callable[..., Path]:
    """Run a federation and return its folder."""
    from fedzo.commands.train import start_run
    from fedzo.config.load import load

    count = iter(range(100))

    def start(*extra: str) -> Path:
        folder = tmp_path / f"run{next(count)}"
        start_run(load(overrides(*extra)), folder, overrides=list(extra))
        return folder

    return start


@pytest.fixture(scope="session")
def run_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    from fedzo.commands.train import start_run
    from fedzo.config.load import load

    @functools.cache
    def start(*words: str) -> Path:
        folder = tmp_path_factory.mktemp("runs") / "run"
        start_run(load(list(words)), folder, overrides=list(words))
        return folder

    return start


@pytest.fixture
def finished(run_once: Callable[..., Path], overrides: Callable[..., list[str]], tmp_path: Path) -> Callable[..., Path]:
    """As ``run``, for tests of what is done with a run's folder: equal runs are made once, and each gets a copy."""
    count = iter(range(100))
    return lambda *extra: shutil.copytree(run_once(*overrides(*extra)), tmp_path / f"finished{next(count)}")


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Register a plugin of a third party for one test."""
    stored: list[tuple[str, str]] = []

    def add(group: str, name: str, registry: Any, config_class: type, factory: Callable[..., Any]) -> None:
        monkeypatch.setattr(registry, "_configs", dict(registry._configs))
        monkeypatch.setattr(registry, "_factories", dict(registry._factories))
        registry.register(name, config_class)(factory)
        stored.append((group, name))

    yield add
    for group, name in stored:
        for file in (name, f"{name}_schema"):
            ConfigStore.instance().repo[group].pop(f"{file}.yaml", None)
    compose._stored.clear()  # what was stored, by which the next test with these plugins would not store them


@pytest.fixture
def weights_at_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """At each reading of a model, how many weights of those before are there; memory is short, no cycle is sought."""
    from fedzo.models.load import _read

    weights: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def read(*of: Any, **options: Any) -> Any:
        alive.append(sum(each() is not None for each in weights))
        model = _read(*of, **options)
        weights.extend(weakref.ref(each) for each in model.parameters())
        return model

    monkeypatch.setattr("fedzo.models.load._read", read)
    monkeypatch.setattr("fedzo.models.available.available_memory_bytes", lambda device: 1)
    gc.disable()
    yield alive
    gc.enable()
    assert weights


@pytest.fixture
def flower_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Flower asks for before it makes a message."""
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def read_lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.fixture
def lines() -> Callable[[Path, str], list[dict[str, Any]]]:
    return read_lines


@pytest.fixture
def greedy_answer() -> Callable[[Any, str, int], str]:
    """What a model answers, by a forward over the whole text for each token: no cache, no batch, no padding."""

    def answer(loaded: Any, prompt: str, max_new_tokens: int) -> str:
        ids = list(loaded.tokenizer(prompt)["input_ids"])
        start = len(ids)
        for _ in range(max_new_tokens):
            with torch.inference_mode():
                ids.append(int(loaded.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == loaded.tokenizer.eos_token_id:
                break
        text: str = loaded.tokenizer.decode(ids[start:], skip_special_tokens=True)
        return text.strip()

    return answer


@pytest.fixture(scope="session")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[int, str]]:
    """Run a program, as ``python -c`` does, in a process of its own; returns its exit status and what it said.

    It is forked off a process that has imported fedzo and done nothing else, so that it need not import all of that.
    In ``path`` it finds packages first, and ``cwd`` is its working folder.
    """
    context, count = multiprocessing.get_context("forkserver"), iter(range(1000))
    late = ["flwr_datasets", "transformers.models.llama"]  # fedzo imports them when it first needs them
    context.set_forkserver_preload(["fedzo.cli.train", "fedzo.commands.resume", "fedzo.runtime.inline", *late])

    def run(
        program: str, *arguments: str, path: Path | None = None, cwd: Path | None = None, timeout_s: float = 300.0
    ) -> tuple[int, str]:
        said = tmp_path_factory.getbasetemp() / f"forked-{next(count)}.txt"
        path_first = [str(path)] if path else []
        before = FORKED.format(said=str(said), argv=["-c", *arguments], path=path_first, cwd=str(cwd or "."))
        child = context.Process(target=exec, args=(before + program, {}))
        child.start()
        child.join(timeout_s)
        code = child.exitcode
        child.kill()  # does nothing to one that has ended
        assert code is not None, f"it did not end within {timeout_s:g} s: {said.read_text()}"
        return code, said.read_text()

    return run


@pytest.fixture(scope="session")
def forked_fedzo(forked: Callable[..., tuple[int, str]]) -> Callable[..., tuple[int, str]]:
    """Run a command of fedzo in such a process."""
    return functools.partial(forked, "import sys; from fedzo.cli import main; sys.exit(main(sys.argv[1:]))")
