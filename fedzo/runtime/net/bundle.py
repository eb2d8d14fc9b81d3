"""The bundle that ``flwr run`` ships: a project file and two shims, nothing of the library.

A site runs the fedzo that it installed itself. The shims are what Flower's stock processes would load, and they too
import the installed fedzo. ``clients/app.py`` and ``server/app.py`` of the repository hold the same text.
"""

from __future__ import annotations

from pathlib import Path

import fedzo
from fedzo.run.apps import CONFIG_KEY

CLIENT_SHIM = '''"""Flower ClientApp entry point."""

from fedzo.run.apps import make_client_app

app = make_client_app()
'''
SERVER_SHIM = '''"""Flower ServerApp entry point."""

from fedzo.run.apps import make_server_app

app = make_server_app()
'''
FILES = {
    "clients/__init__.py": '"""What Flower loads on a client site."""\n',
    "clients/app.py": CLIENT_SHIM,
    "server/__init__.py": '"""What Flower loads on the server."""\n',
    "server/app.py": SERVER_SHIM,
}


def write_bundle(folder: Path) -> None:
    """Write the bundle's source tree into a new folder, ready for ``flwr run``."""
    project = (
        f'[project]\nname = "fedzo"\nversion = "{fedzo.__version__}"\n'
        'description = "Entry points of fedzo for Flower"\nlicense = "Apache-2.0"\ndependencies = []\n\n'
        '[tool.flwr.app]\npublisher = "fedzo"\n\n'
        '[tool.flwr.app.components]\nserverapp = "server.app:app"\nclientapp = "clients.app:app"\n\n'
        f'[tool.flwr.app.config]\n{CONFIG_KEY} = ""\n'  # Flower takes only declared keys
    )
    for name, text in {**FILES, "pyproject.toml": project}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
