"""What Flower ships to a site: against the files of the repository, and what a hostile server could send instead."""

from __future__ import annotations

import io
import re
import shutil
import struct
import time
import tomllib
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest

import fedzo
from fedzo.errors import OtherVersionError
from fedzo.runtime.net.bundle import FILES, MAX_BUNDLE_BYTES, PROJECT, build_bundle, bundle_files, check_bundle
from fedzo.system import code_version

ROOT = Path(__file__).resolve().parents[4]
OURS = re.escape(code_version())


def test_bundle_holds_the_project_file_and_the_shims_and_nothing_of_the_library() -> None:
    with zipfile.ZipFile(io.BytesIO(build_bundle())) as archive:
        assert set(archive.namelist()) == {"pyproject.toml", ".info/CONTENT", *FILES}
        assert sum(entry.file_size for entry in archive.infolist()) < 3000


def test_bundle_declares_the_same_app_as_the_project_file_of_the_repository() -> None:
    bundle, project = (tomllib.loads(text) for text in (bundle_files()[PROJECT], (ROOT / PROJECT).read_text()))
    for key in ("publisher", "components", "config"):
        assert bundle["tool"]["flwr"]["app"][key] == project["tool"]["flwr"]["app"][key]
    assert bundle["project"]["name"] == project["project"]["name"]
    assert bundle["project"]["version"].partition("+")[0] == project["project"]["version"]
    assert bundle["project"]["dependencies"] == []  # Flower must have nothing to install on a site


def test_a_site_takes_its_own_bundle_however_it_is_packed() -> None:
    check_bundle(build_bundle())
    check_bundle(packed(bundle_files(), zipfile.ZIP_STORED))


@pytest.mark.parametrize("name", ["clients/app.py", "extra.py"])
def test_another_bundle_is_refused(name: str) -> None:
    with pytest.raises(OtherVersionError, match=rf"that of fedzo {OURS}, which .* got that of fedzo"):
        check_bundle(packed({**bundle_files(), name: "import os"}))


def test_the_bundle_of_another_version_is_refused_with_both_versions_named() -> None:
    other = bundle_files()[PROJECT].replace(f'"{code_version()}"', '"9.9.9"')

    with pytest.raises(OtherVersionError, match=rf"fedzo {OURS}, .* got that of fedzo 9\.9\.9\. Install"):
        check_bundle(packed({**bundle_files(), PROJECT: other}))


def test_other_code_of_the_same_version_is_refused_and_other_ends_of_lines_are_the_same_code(tmp_path: Path) -> None:
    """Two checkouts of one version differ; a wheel and a checkout of one commit do not, whoever wrote the files."""
    package, without = Path(fedzo.__file__).parent, shutil.ignore_patterns("__pycache__")
    same, other = (shutil.copytree(package, tmp_path / name, ignore=without) for name in ("same", "other"))
    for file in same.rglob("*.py"):
        file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    changed = other / "fl" / "replica.py"
    changed.write_bytes(changed.read_bytes() + b"#")

    assert code_version(same) == code_version()
    theirs = code_version(other)
    project = bundle_files()[PROJECT].replace(code_version(), theirs)
    with pytest.raises(OtherVersionError, match=rf"fedzo {OURS}, .* got that of fedzo {re.escape(theirs)}\. Install"):
        check_bundle(packed({**bundle_files(), PROJECT: project}))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no archive",
        build_bundle()[:-40],
        bytes(MAX_BUNDLE_BYTES + 1),
        lambda: packed({PROJECT: "no toml ="}),
        lambda: packed({"x": "0" * 50_000_000}),  # a bomb: 50 kB packed
    ],
)
def test_what_is_no_bundle_is_refused_without_unpacking_it(data: Any) -> None:
    with pytest.raises(OtherVersionError, match="got another"):
        check_bundle(data() if callable(data) else data)


@pytest.mark.parametrize("how", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_bundle_that_lies_about_its_size_fills_no_memory(how: int) -> None:
    size = 8 << 20
    bomb = packed({PROJECT: "0" * size}, how).replace(struct.pack("<I", size), struct.pack("<I", 9))
    assert len(bomb) < MAX_BUNDLE_BYTES
    tracemalloc.start()
    try:
        with pytest.raises(OtherVersionError, match="got another"):
            check_bundle(bomb)
        assert tracemalloc.get_traced_memory()[1] < size / 8
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("text", ["[" * 9000, "a." * 9000 + "a=1", "a={" * 5000, "a=" + "[" * 9000, "[a]\n" * 4000])
def test_a_project_file_without_end_is_refused_soon(text: str) -> None:
    begun = time.process_time()
    with pytest.raises(OtherVersionError, match="got another"):
        check_bundle(packed({PROJECT: text}))
    assert time.process_time() - begun < 2


def packed(files: dict[str, str], how: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", how) as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return out.getvalue()


@pytest.mark.parametrize("name", sorted(FILES))
def test_shim_is_the_text_of_the_repository(name: str) -> None:
    assert (ROOT / name).read_text(encoding="utf-8") == FILES[name]
