"""A recipe at a site: its prompts, its judge's test, and the results that are there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from fedzo.data.config import TaskConfig
from fedzo.data.files import Row
from fedzo.data.preprocess.rephrase.backend import REWRITERS, RewriterConfig
from fedzo.data.preprocess.rephrase.caller import Caller, Totals
from fedzo.data.preprocess.rephrase.config import OatRephraseConfig
from fedzo.data.preprocess.rephrase.course import Attempt, Course
from fedzo.data.preprocess.rephrase.examples import read_examples
from fedzo.data.preprocess.rephrase.gate import calibrate, check_gate, find, judge_digest
from fedzo.data.preprocess.rephrase.prompts import Prompts
from fedzo.data.preprocess.rephrase.results import Results, recipe_digest
from fedzo.data.preprocess.rephrase.store import Store
from fedzo.data.preprocess.rephrase.tasks import rephrase_task
from fedzo.errors import ConfigError, FolderInUseError
from fedzo.records.rephrase import Calibration, RowOutcome

_WAIT_S = 1.0  # between two looks at a store that another process has


def prompts_of(config: OatRephraseConfig, task: TaskConfig, examples: str | None = None) -> Prompts:
    """The prompts of a recipe, with the examples of a file if one is named; errors as ``read_examples``."""
    told = rephrase_task(task)
    column = config.column or told.column
    shown = () if examples is None else read_examples(Path(examples).expanduser(), task, told, column)
    return Prompts(config.style, told, column, shown)


@dataclass(frozen=True)
class Rephraser:
    """What a site needs to rewrite rows by a recipe.

    Attributes:
        config: The recipe, its prompts' digest filled in.
        task: What the rows are for.
        rewriter: Who rewrites and judges here.
        folder: Where answers, results and tests of judges are kept.
    """

    config: OatRephraseConfig
    task: TaskConfig
    rewriter: RewriterConfig
    folder: Path
    _totals: Totals = field(default_factory=Totals, compare=False)

    @cached_property
    def prompts(self) -> Prompts:
        """What rewriter and judge read.

        Raises:
            ConfigError: They are not those of the recipe.
        """
        prompts = prompts_of(self.config, self.task, self.rewriter.examples)
        if prompts.digest != self.config.prompt:
            raise ConfigError(
                f"preprocess.oat_rephrase.prompt must be the digest of this site's prompts, {prompts.digest}, got "
                f"{self.config.prompt}. Give the run that key, or both sides the same fedzo and rewriter.examples."
            )
        return prompts

    @property
    def results(self) -> Results:
        """What has been rewritten."""
        return Results(self.folder, recipe_digest(self.config))

    @property
    def judge_model(self) -> str:
        """Name of the judge's model."""
        return self.rewriter.judge_model or self.rewriter.model

    @property
    def judge(self) -> str:
        """Digest of the judge."""
        return judge_digest(self.prompts, self.judge_model)

    def calibration(self) -> Calibration | None:
        """What is known of the judge here."""
        return find(self.folder, self.judge) if self.config.judged else None

    def check_gate(self) -> None:
        """Raise ``EndpointError`` where the recipe's gate keeps the judge from judging."""
        check_gate(self.folder, self.judge, self.config)

    @contextmanager
    def course(self) -> Iterator[Course]:
        """The rows' way, with the site's store open.

        Raises:
            EndpointError: The site names no rewriter.
            ConfigError: The prompts cannot be made, or the model cannot be loaded.
        """
        prompts = self.prompts
        backend = REWRITERS.build(self.rewriter)
        with closing(backend), Store(self.folder / "calls") as store:
            yield Course(
                self.config,
                self.task,
                prompts,
                backend,
                Caller(backend, store, self.rewriter, totals=self._totals),
                rewriter=self.rewriter.model,
                judge=self.judge_model,
                max_tokens=self.rewriter.max_tokens,
                context_tokens=self.rewriter.context_tokens,
            )

    def rewrite(self, rows: Sequence[Row], on_progress: Callable[[int, int], None]) -> list[Attempt]:
        """Rewrite rows and keep the results; errors as ``Course.run``, and those of the gate before any call."""
        self.check_gate()
        with self.course() as course:
            attempts = course.run(rows, on_progress)
        self.results.add({each.outcome.row: each.outcome for each in attempts if each.outcome is not None})
        return attempts

    def outcomes(self, rows: Sequence[Row], on_progress: Callable[[int, int], None]) -> list[RowOutcome]:
        """What stands in the place of each row's text: what is kept, or made now where a row has nothing."""
        while (found := self.results.find(rows)) is None:
            if self.config.imported:
                raise ConfigError(
                    f"{self.results.file}: the imported rewrites of all rows must be there. Call fedzo rephrase import "
                    "on this machine, for these rows and with this recipe."
                )
            try:
                self.rewrite(rows, on_progress)
            except FolderInUseError:  # another process of this site has the store, and may be making these very rows
                on_progress(0, len(rows))
                time.sleep(_WAIT_S)
        return found

    def test_judge(self, rows: Sequence[Row], *, most: int, on_progress: Callable[[int, int], None]) -> Calibration:
        """Test the judge on pairs from rows; errors as ``calibrate``."""
        with self.course() as course:
            return calibrate(
                self.prompts,
                course.caller,
                rows,
                model=self.judge_model,
                request=course.judge_request,
                most=most,
                on_progress=on_progress,
            )
