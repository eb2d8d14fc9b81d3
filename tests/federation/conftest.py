"""A tiny real model and a small real federation, in one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedzo.testing.tiny_models import save_tiny_model

WORDS = {0: ["bad", "dull", "poor", "weak"], 1: ["good", "bright", "rich", "strong"]}


def rows(count: int, *, offset: int = 0) -> list[dict[str, Any]]:
    """Rows whose label can be read off one word; no two alike."""
    made = []
    for i in range(offset, offset + count):
        label = i % 2
        made.append({"text": f"item {i} is {WORDS[label][i // 2 % 4]}", "label": label, "site": f"site{i % 4}"})
    return made


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny_model(folder, "llama")
    return folder


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, part in (("train", rows(64)), ("dev", rows(8, offset=100)), ("test", rows(16, offset=200))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


@pytest.fixture
def overrides(tiny_model_dir: Path, data_dir: Path) -> Callable[..., list[str]]:
    def make(*extra: str) -> list[str]:
        masked = [
            "trainer.density=0.05",
            "trainer.calibration=train",
            "trainer.calibration_docs=4",
            "trainer.calibration_tokens=16",
        ]
        return [
            f"model={tiny_model_dir}",
            "task=custom",
            "task.template='Text: {text}\\nVerdict:'",
            "task.candidates=[' bad',' good']",
            f"data.path={data_dir}",
            "partition=iid",
            *([] if any(each.startswith("trainer=") and each != "trainer=meerkat" for each in extra) else masked),
            "fl.num_clients=4",
            "fl.rounds=3",
            "fl.batch_size=2",
            "evaluation.every_rounds=2",
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


def read_lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.fixture
def lines() -> Callable[[Path, str], list[dict[str, Any]]]:
    return read_lines
