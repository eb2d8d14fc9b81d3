"""What Flower ships to a site: the project file and two shims, never the library."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``flwr build`` of a copy of the checkout, with a run folder and an environment lying about in it."""
    folder = tmp_path_factory.mktemp("bundle") / "fedzo"
    skip = shutil.ignore_patterns(
        ".git", ".venv", "__pycache__", ".*_cache", ".hypothesis", "runs", "multirun", "*.fab"
    )
    shutil.copytree(ROOT, folder, ignore=skip)
    for stray in ("runs/a/config.yaml", ".venv/lib/x.py", "multirun/0/config.yaml"):
        (folder / stray).parent.mkdir(parents=True)
        (folder / stray).write_text("")
    flwr = Path(sys.executable).parent / "flwr"
    command = [str(flwr) if flwr.exists() else shutil.which("flwr") or "flwr", "build"]
    environment = {**os.environ, "FLWR_HOME": str(folder.parent / "home")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.fab"))


def test_bundle_holds_the_project_file_and_the_two_shims_only(bundle: Path) -> None:
    with zipfile.ZipFile(bundle) as archive:
        names = set(archive.namelist())

    assert names == {
        "pyproject.toml",
        "clients/__init__.py",
        "clients/app.py",
        "server/__init__.py",
        "server/app.py",
        ".info/CONTENT",
    }


def test_the_only_key_that_travels_is_what_all_peers_agree_on() -> None:
    from fedzo.run import apps

    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["flwr"]["app"]["config"]

    assert declared == {apps.CONFIG_KEY: ""}


@pytest.mark.parametrize("side", ["clients", "server"])
def test_shim_is_a_docstring_one_import_and_one_plain_assignment_of_app(side: str) -> None:
    tree = ast.parse((ROOT / side / "app.py").read_text(encoding="utf-8"))

    # Flower's build reads the AST: a re-export or an annotated assignment of `app` is not found.
    docstring, imported, assigned = tree.body
    assert ast.get_docstring(tree)
    assert isinstance(docstring, ast.Expr)
    assert isinstance(imported, ast.ImportFrom)
    assert imported.module == "fedzo.run.apps"
    assert isinstance(assigned, ast.Assign)
    assert [ast.unparse(target) for target in assigned.targets] == ["app"]
    assert re.fullmatch(r"make_(client|server)_app\(\)", ast.unparse(assigned.value))


@pytest.mark.parametrize("side", ["clients", "server"])
def test_shim_folder_is_a_regular_package_so_that_no_stranger_on_the_path_wins(side: str) -> None:
    assert (ROOT / side / "__init__.py").is_file()


def test_shims_of_the_checkout_are_those_that_travel_with_a_run() -> None:
    from fedzo.runtime.net.bundle import FILES

    assert {name: (ROOT / name).read_text(encoding="utf-8") for name in FILES} == FILES
