"""The folder of a tiny model, and a copy of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fedzo.testing.tiny_models import save_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a Llama, for all tests of a module: none may change it."""
    return save_tiny_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """The same for one test, which may."""
    return Path(shutil.copytree(folder, tmp_path / "model"))
