"""What a user can say about the stages that prepare training rows."""

from __future__ import annotations

from dataclasses import dataclass

from fedzo.registry import PluginConfig


@dataclass(kw_only=True, slots=True)
class StageConfig(PluginConfig):
    """A stage that may change one column of a client's training rows."""


@dataclass(kw_only=True, slots=True)
class IdentityConfig(StageConfig):
    """Changes nothing: shows where a stage works."""
