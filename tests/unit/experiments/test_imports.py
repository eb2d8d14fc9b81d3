"""Each script of the experiments takes from fedzo what fedzo has, though most of them are run once in a while only."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[3] / "experiments"
SCRIPTS = sorted(FOLDER.glob("**/*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(FOLDER)))
def test_what_a_script_imports_of_fedzo_is_there(script: Path) -> None:
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "fedzo":
            module = importlib.import_module(str(node.module))
            for name in (alias.name for alias in node.names):
                assert hasattr(module, name) or importlib.util.find_spec(f"{node.module}.{name}"), (node.module, name)


def test_there_are_scripts() -> None:
    assert len(SCRIPTS) > 20
