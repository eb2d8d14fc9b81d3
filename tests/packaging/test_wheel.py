"""What pip installs: the wheel holds the library, its YAML and its table, and nothing else."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source archive of the checkout, and the wheel that is made of that archive."""
    folder = tmp_path_factory.mktemp("built")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    return next(built.glob("*.whl"))


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_top_level_is_the_package_and_its_metadata_only(names: set[str]) -> None:
    version = PROJECT["project"]["version"]

    assert {name.split("/")[0] for name in names} == {"fedzo", f"fedzo-{version}.dist-info"}


def test_source_archive_holds_what_the_wheel_is_made_of_and_nothing_that_needs_the_checkout(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.split("/")[1] for name in archive.getnames()}

    files = {"README.md", "CHANGELOG.md", "LICENSE", "constraints.txt", "pyproject.toml", "PKG-INFO", ".gitignore"}
    assert names == {"fedzo", "conf", "clients", "server", *files}


def test_wheel_holds_every_file_of_the_package(names: set[str]) -> None:
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fedzo").rglob("*") if path.is_file()}

    assert {name for name in files if "__pycache__" not in name} <= names
    assert "fedzo/py.typed" in names


def test_wheel_holds_every_yaml_of_conf(names: set[str]) -> None:
    conf = ROOT / "conf"
    expected = {f"fedzo/_conf/{path.relative_to(conf).as_posix()}" for path in conf.rglob("*.yaml")}

    assert expected
    assert expected == {name for name in names if name.startswith("fedzo/_conf/")}


def test_wheel_holds_the_gaussian_table_of_the_specification(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        table = archive.read("fedzo/zo/gaussian_u16.f32")

    assert hashlib.sha256(table).hexdigest() == "8babbcaf96568f10165a1eab530c0e5c92d04de96761b6dbb3dadfa94baba37f"


def test_wheel_holds_the_html_templates_of_the_report(names: set[str]) -> None:
    assert [name for name in names if name.startswith("fedzo/report/") and name.endswith(".html.j2")]


def test_wheel_alone_composes_the_quickstart(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    program = (
        "import fedzo, fedzo.config.plugins as paths; from fedzo.config.load import load\n"
        "print(fedzo.__file__); print(paths.conf_dir()); load(['experiment=quickstart'])"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    package, conf = done.stdout.splitlines()[:2]
    assert Path(package).is_relative_to(tmp_path)
    assert Path(conf) == tmp_path / "site" / "fedzo" / "_conf"


def test_version_is_the_same_for_python_and_for_flower() -> None:
    import fedzo

    assert fedzo.__version__ == PROJECT["project"]["version"]


def test_wheel_and_checkout_of_one_commit_are_the_same_version_to_each_other(wheel: Path, tmp_path: Path) -> None:
    """A server refuses no site whose fedzo is installed in another way."""
    from fedzo.system import code_version

    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)

    assert code_version(tmp_path / "fedzo") == code_version(ROOT / "fedzo")


@pytest.mark.skipif("FEDZO_TEST_INSTALLED" not in os.environ, reason="only where .ci/run installed the wheel")
def test_these_tests_run_against_the_installed_wheel() -> None:
    import fedzo

    assert not Path(fedzo.__file__).is_relative_to(ROOT)
