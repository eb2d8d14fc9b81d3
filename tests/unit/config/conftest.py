"""Hydra's state is global: every test here must leave it as it found it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig


@pytest.fixture(autouse=True)
def hydra_is_left_clear() -> Iterator[None]:
    GlobalHydra.instance().clear()

    yield

    assert not GlobalHydra.instance().is_initialized()
    assert HydraConfig.instance().cfg is None
