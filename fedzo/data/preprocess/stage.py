"""Stages that may change a client's training rows, at the client, after its held-out rows are set apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fedzo.data.config import TaskConfig
from fedzo.data.files import Row
from fedzo.data.preprocess.rephrase.backend import RewriterConfig
from fedzo.errors import ConfigError
from fedzo.registry import PluginConfig, Registry


@dataclass(kw_only=True, slots=True)
class StageConfig(PluginConfig):
    """A stage that may change one column of a client's training rows."""


@dataclass(frozen=True, slots=True)
class StageContext:
    """What a stage may know of the run and of the site beside its own config.

    Attributes:
        task: What the rows are for.
        rewriter: Who rewrites text at this site.
        folder: Where the site keeps what a stage made, from one start to the next.
    """

    task: TaskConfig
    rewriter: RewriterConfig
    folder: Path


class Stage(Protocol):
    """One stage of the preparation of training rows."""

    @property
    def column(self) -> str | None:
        """The only column whose values the stage may change; None where it changes nothing."""
        ...

    def apply(self, rows: list[Row], *, client: int) -> list[Row]:
        """As many rows in the same order; the given ones are left as they are.

        Args:
            rows: A client's training rows, after the holdout and the stages before this one.
            client: Its index in the run.
        """
        ...


STAGES: Registry[Stage] = Registry("preprocess", base=StageConfig)
"""Factories ``(config, context: StageContext) -> Stage``."""


def preprocess(rows: list[Row], stages: Mapping[str, Stage], *, client: int) -> list[Row]:
    """A client's training rows after all stages, in their order.

    Args:
        rows: The training rows, without the held-out ones.
        stages: By name; each gets what the one before made.
        client: Index of the client.

    Raises:
        ConfigError: A stage gave more or fewer rows than it got, or changed another column than its own.
    """
    for name, stage in stages.items():
        made = stage.apply([dict(row) for row in rows], client=client)
        if len(made) != len(rows):
            raise ConfigError(
                f"preprocess.{name}: a stage must give as many rows as it got ({len(rows)}), got {len(made)}. "
                "Correct the stage: a row that it cannot change stays as it is."
            )
        for number, (before, after) in enumerate(zip(rows, made, strict=True)):
            if changed := sorted(
                str(column)
                for column in {*before, *after} - {stage.column}
                if column not in before or column not in after or before[column] != after[column]
            ):
                raise ConfigError(
                    f"preprocess.{name}: a stage must leave all columns but {stage.column!r} as they are, got another "
                    f"{', '.join(changed)} in row {number}. Correct the stage."
                )
        rows = made
    return rows
