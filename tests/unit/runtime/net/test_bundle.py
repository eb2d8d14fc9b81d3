from __future__ import annotations

import io
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fedzo
from fedzo.errors import OtherVersionError
from fedzo.runtime.net.bundle import FILES, MAX_BUNDLE_BYTES, PROJECT, build_bundle, bundle_files, check_bundle

ROOT = Path(__file__).resolve().parents[4]


def test_bundle_holds_the_project_file_and_the_shims_and_nothing_of_the_library() -> None:
    with zipfile.ZipFile(io.BytesIO(build_bundle())) as archive:
        assert set(archive.namelist()) == {"pyproject.toml", ".info/CONTENT", *FILES}
        assert sum(entry.file_size for entry in archive.infolist()) < 3000


def test_bundle_declares_the_same_app_as_the_project_file_of_the_repository() -> None:
    bundle, project = (tomllib.loads(text) for text in (bundle_files()[PROJECT], (ROOT / PROJECT).read_text()))
    for key in ("publisher", "components", "config"):
        assert bundle["tool"]["flwr"]["app"][key] == project["tool"]["flwr"]["app"][key]
    assert bundle["project"]["name"] == project["project"]["name"]
    assert bundle["project"]["version"] == project["project"]["version"]
    assert bundle["project"]["dependencies"] == []  # Flower must have nothing to install on a site


def test_a_site_takes_its_own_bundle_however_it_is_packed() -> None:
    check_bundle(build_bundle())
    check_bundle(packed(bundle_files(), zipfile.ZIP_STORED))


@pytest.mark.parametrize("name", ["clients/app.py", "extra.py"])
def test_another_bundle_is_refused(name: str) -> None:
    with pytest.raises(OtherVersionError, match=rf"that of fedzo {fedzo.__version__}, which .* got that of fedzo"):
        check_bundle(packed({**bundle_files(), name: "import os"}))


def test_the_bundle_of_another_version_is_refused_with_both_versions_named() -> None:
    other = bundle_files()[PROJECT].replace(f'"{fedzo.__version__}"', '"9.9.9"')

    with pytest.raises(OtherVersionError, match=rf"fedzo {fedzo.__version__}, .* got that of fedzo 9\.9\.9\. Install"):
        check_bundle(packed({**bundle_files(), PROJECT: other}))


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


@given(st.binary(max_size=400), st.integers(0, 2000))
def test_no_bytes_end_a_site(noise: bytes, place: int) -> None:
    bundle = build_bundle()
    spoiled = bundle[:place] + noise + bundle[place + len(noise) :]
    try:
        check_bundle(spoiled)
    except OtherVersionError:
        return
    assert _same_files(spoiled)


def _same_files(data: bytes) -> bool:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return all(archive.read(name).decode() == text for name, text in FILES.items())


def packed(files: dict[str, str], how: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", how) as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return out.getvalue()


@pytest.mark.parametrize("name", sorted(FILES))
def test_shim_is_the_text_of_the_repository(name: str) -> None:
    assert (ROOT / name).read_text(encoding="utf-8") == FILES[name]
