"""Stages that may change a client's training rows, at the client, after its held-out rows are set apart."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol, Self

from fedzo.data.config import TaskConfig
from fedzo.data.files import Row
from fedzo.data.preprocess.backend import RewriterConfig
from fedzo.errors import ConfigError, Problem, printable
from fedzo.registry import PluginConfig, Registry, returned
from fedzo.system import OnProgress, no_progress


@dataclass(kw_only=True, slots=True)
class StageConfig(PluginConfig):
    """A stage that may change one column of a client's training rows."""

    def site_problems(self, rewriter: RewriterConfig) -> Iterator[Problem]:
        """What a machine that plays clients lacks for this stage; asked there alone, before any work.

        Args:
            rewriter: Who rewrites text at that site.
        """
        return iter(())

    def filled(self, task: TaskConfig) -> Self:
        """This config with what was left to the code, as all peers must have it alike; filled twice it is the same."""
        return self


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


class Progress(NamedTuple):
    """How far a client's rows are; each row counts once a stage.

    Attributes:
        done: Rows that are done.
        total: All rows.
    """

    done: int
    total: int


class Stage(Protocol):
    """One stage that training rows go through."""

    @property
    def column(self) -> str | None:
        """The only column whose values the stage may change; None where it changes nothing."""
        ...

    def apply(self, rows: list[Row], *, client: int, on_progress: OnProgress) -> list[Row]:
        """As many rows in the same order; the given ones are left as they are.

        It may take hours, in a thread of its own. What it made it keeps (``StageContext.folder``), so that a client
        that is started again goes on with it.

        Args:
            rows: A client's training rows, after the holdout and the stages before this one.
            client: Its index in the run.
            on_progress: To be called with the rows done and ``len(rows)`` now and then. What it raises must pass: it
                stops the stage.
        """
        ...

    def summary(self, client: int) -> Mapping[str, float]:
        """What the server may know of the last ``apply`` for a client: at most 64 finite numbers by name.

        A whole number counts rows (``limits.min_rows`` of the site's file holds for it), a float is another figure. No
        name stands for a row or a label. Names are of at most 60 lower-case letters, digits, spaces and ``_ . -``.
        """
        ...


STAGES: Registry[Stage] = Registry("preprocess", base=StageConfig)
"""Factories ``(config, context: StageContext) -> Stage``."""


FIGURE = re.compile("[a-z0-9_. -]{1,60}")
MAX_FIGURES = 64


def preprocess(
    rows: list[Row], stages: Mapping[str, Stage], *, client: int, on_progress: OnProgress = no_progress
) -> list[Row]:
    """A client's training rows after all stages, in their order.

    Args:
        rows: The training rows, without the held-out ones.
        stages: By name; each gets what the one before made.
        client: Index of the client.
        on_progress: Told of rows done and in all, each row once a stage.

    Raises:
        ConfigError: A stage gave more or fewer rows than it got, or changed another column than its own.
        PluginError: A stage gave no list.
    """
    if total := len(rows) * len(stages):
        on_progress(0, total)
    for number, (name, stage) in enumerate(stages.items()):
        told = partial(_told_of_all, on_progress, number * len(rows), total)
        made = stage.apply([dict(row) for row in rows], client=client, on_progress=told)
        rows = checked(name, stage, rows, made)
    return rows


def summaries(stages: Mapping[str, Stage], *, client: int) -> dict[str, float]:
    """What the stages tell of a client's rows, each name with its stage's before it.

    Raises:
        ConfigError: A stage tells something else than a few finite numbers by simple names.
    """
    told: dict[str, float] = {}
    for name, stage in stages.items():
        for figure, value in stage.summary(client).items():
            if not FIGURE.fullmatch(figure) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ConfigError(
                    f"preprocess.{name}: a summary must hold finite numbers by names of at most 60 of [a-z0-9_. -], "
                    f"got {figure!r:.80}: {value!r:.40}. Correct the stage."
                )
            told[f"{name}.{figure}"] = value
    if len(told) > MAX_FIGURES:
        raise ConfigError(
            f"preprocess: the summaries of all stages must hold at most {MAX_FIGURES} numbers, got {len(told)}. "
            "Correct the stages, or choose fewer."
        )
    return told


def _told_of_all(on_progress: OnProgress, before: int, total: int, done: int, of_stage: int) -> None:
    on_progress(before + done, total)


def checked(name: str, stage: Stage, rows: list[Row], given: object) -> list[Row]:
    """The rows that ``apply`` of a stage gave for these.

    Raises:
        ConfigError: They are more or fewer, in another order, or changed in another column than the stage's.
        PluginError: They are no list.
    """
    made, column = returned(given, list, by=stage, method="apply"), stage.column
    if len(made) != len(rows):
        raise ConfigError(
            f"preprocess.{name}: a stage must give as many rows as it got ({len(rows)}), got {len(made)}. "
            "Correct the stage: a row that it cannot change stays as it is."
        )
    for number, (before, after) in enumerate(zip(rows, made, strict=True)):
        if changed := sorted(
            str(key)
            for key in {*before, *after} - {column}
            if key not in before or key not in after or [before[key]] != [after[key]]  # a NaN equals itself in a list
        ):
            raise ConfigError(
                f"preprocess.{name}: a stage must keep the order of the rows and all columns but {column!r}, got "
                f"another {printable(', '.join(changed))} in row {number}. Correct the stage."
            )
    return made


@dataclass(kw_only=True, slots=True)
class IdentityConfig(StageConfig):
    """Changes nothing: an example of a stage."""


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
