"""The bundle that Flower ships with a run: two shims, nothing of the library.

A site runs the fedzo that it installed itself. It compares the bundle of each run with the one that its own fedzo makes
and refuses any other, so that it is told when the server has another version of fedzo, or other code of the same
version. What is in it is never imported.
"""

from __future__ import annotations

import io
import tomllib
import zipfile
from collections.abc import Mapping

from fedzo.errors import OtherVersionError, printable
from fedzo.run.apps import CONFIG_KEY
from fedzo.runtime.net._flower_control import build_fab_from_files
from fedzo.system import code_version

MAX_BUNDLE_BYTES = 20_000
PROJECT, CHECKSUMS = "pyproject.toml", ".info/CONTENT"
FILES = {
    "clients/__init__.py": '"""What Flower loads on a client site."""\n',
    "clients/app.py": '''"""Flower ClientApp entry point."""

from fedzo.run.apps import make_client_app

app = make_client_app()
''',
    "server/__init__.py": '"""What Flower loads on the server."""\n',
    "server/app.py": '''"""Flower ServerApp entry point."""

from fedzo.run.apps import make_server_app

app = make_server_app()
''',
}
"""``clients`` and ``server`` of the repository hold the same text."""


def bundle_files() -> dict[str, str]:
    """The bundle's source tree: text by path."""
    project = (
        f'[project]\nname = "fedzo"\nversion = "{code_version()}"\n'
        'description = "Entry points of fedzo for Flower"\nlicense = "Apache-2.0"\ndependencies = []\n\n'
        '[tool.flwr.app]\npublisher = "fedzo"\n\n'
        '[tool.flwr.app.components]\nserverapp = "server.app:app"\nclientapp = "clients.app:app"\n\n'
        f'[tool.flwr.app.config]\n{CONFIG_KEY} = ""\n'  # Flower takes only declared keys
    )
    return {**FILES, PROJECT: project}


def build_bundle() -> bytes:
    """The bundle as Flower packs it."""
    packed, _ = build_fab_from_files({name: text.encode() for name, text in bundle_files().items()})
    return packed


def check_bundle(packed: bytes) -> None:
    """Refuse a bundle that this fedzo would not have made. Packing may differ between machines, files may not.

    Raises:
        OtherVersionError: It is another; names both versions where it says its own.
    """
    theirs, ours = _contents(packed), _contents(build_bundle())
    if theirs != ours:
        version = _version(theirs)
        raise OtherVersionError(
            f"bundle: it must be that of fedzo {code_version()}, which is installed here, got "
            f"{'that of fedzo ' + version if version else 'another'}. Install the same fedzo at server and sites."
        )


def _contents(packed: bytes) -> Mapping[str, object]:
    """Files by name; the project file as values, since its writing may differ, and no list of checksums."""
    if len(packed) > MAX_BUNDLE_BYTES:
        return {}
    try:
        with zipfile.ZipFile(io.BytesIO(packed)) as archive:
            entries = archive.infolist()
            if sum(entry.file_size for entry in entries) > MAX_BUNDLE_BYTES:
                return {}
            if any(entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for entry in entries):
                return {}  # the others are not unpacked piece by piece
            files = {entry.filename: _unpacked(archive, entry) for entry in entries if entry.filename != CHECKSUMS}
        return {**files, PROJECT: tomllib.loads(files[PROJECT].decode())}
    except Exception:  # whatever zipfile, zlib and tomllib raise, it is no bundle
        return {}


def _unpacked(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    """No more than a bundle may have, whatever the entry says of its size."""
    with archive.open(entry) as file:
        return file.read(MAX_BUNDLE_BYTES)


def _version(contents: Mapping[str, object]) -> str:
    project = contents.get(PROJECT)
    told = project.get("project", {}) if isinstance(project, dict) else {}
    return printable(str(told.get("version", "")), most=40) if isinstance(told, dict) else ""
