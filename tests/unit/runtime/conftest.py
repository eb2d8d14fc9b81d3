from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def toy() -> Iterator[ModuleType]:
    """The toy federation as an importable module."""
    folder = str(Path(__file__).parent)
    sys.path.insert(0, folder)
    import toy_federation

    yield toy_federation
    sys.path.remove(folder)
