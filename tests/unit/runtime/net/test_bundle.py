from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from fedzo.runtime.local import FILES, write_bundle

ROOT = Path(__file__).resolve().parents[4]


def test_bundle_holds_the_project_file_and_the_shims_and_nothing_of_the_library(tmp_path: Path) -> None:
    write_bundle(tmp_path)

    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"pyproject.toml", *FILES}
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 2000


def test_bundle_declares_the_same_app_as_the_project_file_of_the_repository(tmp_path: Path) -> None:
    write_bundle(tmp_path)

    bundle, project = (tomllib.loads((folder / "pyproject.toml").read_text()) for folder in (tmp_path, ROOT))
    for key in ("publisher", "components", "config"):
        assert bundle["tool"]["flwr"]["app"][key] == project["tool"]["flwr"]["app"][key]
    assert bundle["project"]["name"] == project["project"]["name"]
    assert bundle["project"]["version"] == project["project"]["version"]
    assert bundle["project"]["dependencies"] == []  # Flower must have nothing to install on a site


@pytest.mark.parametrize("name", sorted(FILES))
def test_shim_is_the_text_of_the_repository(name: str) -> None:
    assert (ROOT / name).read_text(encoding="utf-8") == FILES[name]
