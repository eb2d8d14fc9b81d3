"""A recipe at a site: its prompts, its judge's test, and the results that are there."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from fedzo.data.config import TaskConfig
from fedzo.data.files import Row
from fedzo.data.preprocess.backend import REWRITERS, Backend, RecipeError, RewriterConfig
from fedzo.data.preprocess.rephrase.caller import Caller, Totals
from fedzo.data.preprocess.rephrase.config import OatRephraseConfig
from fedzo.data.preprocess.rephrase.course import Attempt, Course, is_failed
from fedzo.data.preprocess.rephrase.examples import read_examples
from fedzo.data.preprocess.rephrase.gate import check_gate, find_test, judge_digest, judge_test_digest, test_judge
from fedzo.data.preprocess.rephrase.manifest import Used, manifest_of
from fedzo.data.preprocess.rephrase.prompts import Prompts
from fedzo.data.preprocess.rephrase.results import Results, recipe_digest, row_digest
from fedzo.data.preprocess.rephrase.store import Store
from fedzo.data.preprocess.rephrase.tasks import rephrase_task
from fedzo.errors import ConfigError, FolderInUseError, printable
from fedzo.records.decode import read_record, to_json
from fedzo.records.folder import raised_as, replace_file
from fedzo.records.rephrase import JudgeTest, Manifest, RowOutcome
from fedzo.system import OnProgress

_WAIT_S = 1.0  # between two looks at a store that another process has
OTHER_STORE = "to have them rewritten by another model, set rewriter.store to another folder"
"""What to do about rows that have another model's text."""


def prompts_of(config: OatRephraseConfig, task: TaskConfig, examples: str | None = None) -> Prompts:
    """The prompts of a recipe, with the examples of a file if one is named.

    Raises:
        ConfigError: As ``rephrase_task`` and ``read_examples``.
    """
    told = rephrase_task(task, config)
    column = config.column or told.column
    shown = () if examples is None else read_examples(Path(examples).expanduser(), task, told, column)
    return Prompts(config.style, told, column, shown)


def rewritten_by(outcomes: Iterable[RowOutcome]) -> str:
    """The models that the rewriter's answers said they were from, as a person may read them; empty for none."""
    return ", ".join(sorted({printable(each.model, most=80) for each in outcomes if each.model}))


@dataclass(frozen=True)
class Rephraser:
    """What a site needs to rewrite rows by a recipe.

    Attributes:
        config: The recipe, its prompts' digest filled in.
        task: What the rows are for.
        rewriter: Who rewrites and judges here.
        folder: Where answers, results and tests of judges are kept.
        totals: What all callers of this recipe did.
    """

    config: OatRephraseConfig
    task: TaskConfig
    rewriter: RewriterConfig
    folder: Path
    totals: Totals = field(default_factory=Totals, compare=False)

    @cached_property
    def prompts(self) -> Prompts:
        """What rewriter and judge read.

        Raises:
            RecipeError: They are not those of the recipe.
        """
        prompts = prompts_of(self.config, self.task, self.rewriter.examples)
        if prompts.digest != self.config.prompt:
            raise RecipeError(
                f"preprocess.oat_rephrase.prompt must be the digest of this site's prompts, {prompts.digest}, got "
                f"{self.config.prompt}. Give the run that key, or both sides the same fedzo and rewriter.examples."
            )
        return prompts

    @property
    def results(self) -> Results:
        """What has been rewritten."""
        return Results(self.folder, recipe_digest(self.config, self.task))

    def kept_of_others(self, rows: Sequence[Row]) -> str:
        """Says whose text rows have already, where it is another model's than this site's rewriter; else empty.

        A result knows its model by what the answer said alone, and a server may call the model that it was asked for
        by another name. So this is told and refused nowhere.
        """
        if self.config.imported:
            return ""
        there, own = self.results.read(), self.rewriter.model
        kept = [each for row in rows if (each := there.get(row_digest(row))) is not None]
        names = {own, Path(own).name}  # of a folder, answers tell the name, and the weights' digest behind it
        others = [each for each in kept if each.model and not {each.model, each.model.rpartition(" ")[0]} & names]
        if not others:
            return ""
        return (
            f"oat_rephrase: {len(others)} of {len(rows)} rows had results already, by {rewritten_by(others)}: "
            f"rewriter.model={printable(own, most=80)} is not asked for them; {OTHER_STORE}"
        )

    def judge_test(self, outcomes: Sequence[RowOutcome]) -> JudgeTest | None:
        """The test that the judge had had when most of these rows were judged; None where it had none."""
        found = Counter(each.judged for each in outcomes if each.judged).most_common(1)
        return find_test(self.folder, found[0][0]) if found else None

    @contextmanager
    def course(self) -> Iterator[Course]:
        """The rows' way, with the site's store open.

        Raises:
            EndpointError: The site names no rewriter.
            ConfigError: The prompts cannot be made, the model cannot be loaded, or the store not written.
        """
        prompts = self.prompts
        backend = REWRITERS.build(self.rewriter)
        with closing(backend), self._store() as store:
            yield Course(
                self.config,
                self.task,
                prompts,
                backend,
                Caller(backend, store, self.rewriter, totals=self.totals),
                self.rewriter,
            )

    def _store(self) -> Store:
        try:
            return Store(self.folder / "calls")
        except FolderInUseError:  # an OSError, too; whoever waits for it goes on
            raise
        except OSError as error:
            raise ConfigError(
                f"rewriter.store: it must be possible to write in {self.folder}, got: {error}. Choose another folder."
            ) from error

    def rewrite(self, rows: Sequence[Row], on_progress: OnProgress, *, again: bool = False) -> dict[str, Attempt]:
        """Rewrite the rows that have no result, and keep results and manifest; returns what was done, by row digest.

        Args:
            rows: The rows.
            on_progress: Told of rows done and in all.
            again: Whether rows that the endpoint failed are asked for again. A run never does: the text that it began
                with stays.

        Raises:
            ConfigError: Rows, prompts or settings do not fit.
            EndpointError: The judge has not passed its test, which is told before any call; else as ``Course.run``.
        """
        there, before = self.results.read(), replace(self.totals)
        digests = {row_digest(row) for row in rows}
        wanted = {each for each in digests if each not in there or (again and is_failed(there[each]))}
        if not wanted:
            return {}

        def told(num_ready: int) -> OnProgress:
            return lambda done, _: on_progress((num_ready + done) * len(rows) // len(digests), len(rows))

        with self.course() as course:
            test = self._last_test(course.backend)
            known = course.check_rows(rows)  # all of them, so that a row is named by its place among them
            new = {digest: each for digest, each in known.items() if digest not in there}
            failed = {digest: each for digest, each in known.items() if digest in wanted and digest in there}
            course.run(new, told(len(known) - len(wanted)))
            course.run(failed, told(len(known) - len(failed)), beside=len(known) - len(failed))
        attempts = new | failed
        judged = "" if test is None else judge_test_digest(test)
        done = ((digest, each.outcome) for digest, each in attempts.items() if each.outcome is not None)
        made = {digest: replace(outcome, judged=judged) for digest, outcome in done}
        self.results.add(made, instead=[row for row in made if row in there and there[row].reason != made[row].reason])
        if (outcomes := self.results.find(rows)) is not None:
            self.keep_manifest(rows, outcomes, Used.of(self.totals, self.rewriter, since=before))
        return attempts

    def keep_manifest(self, rows: Sequence[Row], outcomes: Sequence[RowOutcome], used: Used | None = None) -> Path:
        """Write what is told of a set of rows; returns the file.

        Args:
            rows: As they were.
            outcomes: What became of each.
            used: What it took now, which is added to what it took before; None where nothing was made: a manifest that
                is there stays as it is.

        Raises:
            ConfigError: The file cannot be written, or holds something else.
            RunFolderError: It is a link.
        """
        file = self.results.file_of_set(outcomes, ".manifest.json")
        rule = f"{file}: it must be readable and writable"
        with raised_as(ConfigError, rule, "Make room, or choose another rewriter.store."):
            if used is None and file.exists():
                return file
            took, remedy = used or Used(), "Remove the file: it is written anew."
            if old := read_record(Manifest, file.parent, file.name, error=ConfigError, remedy=remedy):
                took = Used(old.calls + took.calls, old.tokens + took.tokens, old.cost + took.cost)
            replace_file(file, to_json(manifest_of(self, rows, outcomes, took)) + "\n", durable=True, mode=0o600)
        return file

    def outcomes(self, rows: Sequence[Row], on_progress: OnProgress) -> list[RowOutcome]:
        """What stands in the place of each row's text: what is kept, or made now where a row has nothing."""
        while (found := self.results.find(rows)) is None:
            if self.config.imported:
                raise RecipeError(
                    f"{self.results.file}: the imported rewrites of all rows must be there. Call fedzo rephrase import "
                    "on this machine, for these rows and with this recipe."
                )
            try:
                self.rewrite(rows, on_progress)
            except FolderInUseError:  # another process of this site has the store, and may be making these very rows
                on_progress(0, len(rows))
                time.sleep(_WAIT_S)
        return found

    def _last_test(self, backend: Backend) -> JudgeTest | None:
        """The test of the judge under which it judges now; errors as ``check_gate``."""
        if not self.config.judged:
            return None
        judge = judge_digest(self.prompts, backend.fingerprint(self.rewriter.judge))
        return check_gate(self.folder, judge, self.config)

    def test_judge(self, rows: Sequence[Row], *, most: int, on_progress: OnProgress) -> JudgeTest:
        """Test the judge on pairs from rows.

        Raises:
            ConfigError: A row does not fit the task, or its prompt the context: before the first call.
            EndpointError: The judge cannot be asked.
        """
        with self.course() as course:
            return test_judge(course, rows, most=most, on_progress=on_progress)
