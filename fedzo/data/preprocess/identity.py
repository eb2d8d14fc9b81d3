"""The stage that changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedzo.data.files import Row
from fedzo.data.preprocess.stage import STAGES, OnProgress, StageConfig, StageContext


@dataclass(kw_only=True, slots=True)
class IdentityConfig(StageConfig):
    """Changes nothing: shows where a stage works."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Every row as it is."""

    column: str | None = None

    def apply(self, rows: list[Row], *, client: int, on_progress: OnProgress) -> list[Row]:
        """The rows."""
        return rows

    def summary(self, client: int) -> Mapping[str, float]:
        """Nothing."""
        return {}


@STAGES.register("identity", IdentityConfig)
def _identity(config: IdentityConfig, context: StageContext) -> Identity:
    return Identity()
