"""``fedzo rephrase``: rewrite training text ahead of runs, test the judge, make examples, take in rewrites."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fedzo.config.overrides import quoted
from fedzo.config.plugins import plugin_name
from fedzo.config.schema import LaunchConfig
from fedzo.config.travel import load_site
from fedzo.data.config import TaskConfig
from fedzo.data.files import MARK, Row, read_rows
from fedzo.data.partition.base import shuffled
from fedzo.data.preprocess.rephrase.config import OatRephraseConfig
from fedzo.data.preprocess.rephrase.course import (
    TOO_LONG,
    Attempt,
    counts,
    is_failed,
)
from fedzo.data.preprocess.rephrase.examples import columns_of, write_table
from fedzo.data.preprocess.rephrase.gate import faults, few_pairs, keep, remedy
from fedzo.data.preprocess.rephrase.manifest import Used, count_names
from fedzo.data.preprocess.rephrase.rephraser import OTHER_STORE, Rephraser, prompts_of, rewritten_by
from fedzo.data.preprocess.rephrase.results import apply_outcomes, row_digest
from fedzo.data.preprocess.rephrase.tasks import usual_column
from fedzo.data.words import is_utf8
from fedzo.errors import ConfigError, FedzoError, printable
from fedzo.records.folder import replace_file
from fedzo.records.rephrase import RowOutcome
from fedzo.report.format import counted
from fedzo.report.html import write_page
from fedzo.report.rephrased import figures_table, judge_test_lines, rephrased_page
from fedzo.report.sinks import phase
from fedzo.run.client_context import STAGE_FOLDER
from fedzo.system import OnProgress

STAGE = "oat_rephrase"
BOOTSTRAP_ROWS = 40


@dataclass(frozen=True)
class Work:
    """A recipe at this site, and the rows that it is for.

    Attributes:
        rephraser: The recipe at the site.
        rows: In the order of their file.
    """

    rephraser: Rephraser
    rows: list[Row]

    @property
    def column(self) -> str:
        """The column in question."""
        return self.rephraser.prompts.column


def rewriter_of(site_file: Path) -> list[str]:
    """The rewriter of a site's file, as overrides; what it makes is kept beside that file, as for a run.

    Raises:
        ConfigError: The file cannot be read.
    """
    rewriter = load_site(site_file).rewriter
    plain = asdict(rewriter)
    plain["store"] = plain["store"] or str((site_file.parent / STAGE_FOLDER).resolve())
    keys = [
        f"rewriter.{key}={quoted(value) if isinstance(value, str) else json.dumps(value)}"
        for key, value in plain.items()
    ]
    return [f"rewriter={plugin_name('rewriter', rewriter)}", *keys]


def open_work(config: LaunchConfig, data: Path) -> Work:
    """What a command line means: ``preprocess=[oat_rephrase]`` is in it.

    Raises:
        ConfigError: The rows cannot be read, or fit neither task nor recipe.
    """
    if (recipe := config.preprocess.get(STAGE)) is None:
        raise ConfigError(f"preprocess must hold {STAGE}, as fedzo rephrase itself writes. Leave the key out.")
    assert isinstance(recipe, OatRephraseConfig)
    rows = read_rows(data)
    if not rows:
        raise ConfigError(f"--data: {data} must hold at least one row, got none.")
    folder, examples = Path(config.rewriter.store or STAGE_FOLDER).expanduser(), config.rewriter.examples
    if examples is not None and recipe.prompt == prompts_of(recipe, config.task).digest:
        recipe = replace(recipe, prompt=prompts_of(recipe, config.task, examples).digest)  # a run needs the key
    return Work(Rephraser(recipe, config.task, config.rewriter, folder), rows)


def rephrase(work: Work, *, out: Path | None, again: bool = False) -> Iterator[str]:
    """Rewrite the rows, or find them rewritten; yields lines for people.

    Args:
        work: Recipe and rows.
        out: File for all rows with their text, each marked.
        again: Whether rows that the endpoint failed before are asked for again, and have another result perhaps.

    Raises:
        ConfigError: Rows, prompts or settings do not fit.
        FedzoError: The endpoint cannot be used; what it has answered is kept.
    """
    rephraser = work.rephraser
    if out is not None and out.suffix != ".jsonl":
        raise ConfigError(f"--out: the file must end in .jsonl, got {str(out)!r}. Name it so.")
    if out is not None:
        _check_out(out, work)
    kept_before = len(rephraser.results.older())
    with _progress(work, "rewriting") as told:
        attempts = rephraser.rewrite(work.rows, told, again=again)
    outcomes = rephraser.results.find(work.rows)
    assert outcomes is not None
    figures = figures_table(rephraser, work.rows, outcomes)
    yield from set_lines(work, outcomes, Used.of(rephraser.totals, rephraser.rewriter), figures)
    if not attempts:
        models = rewritten_by(outcomes)
        yield f"all rows had results already{f', by {models}' if models else ''}: no call was made"
        yield OTHER_STORE
    elif ready := len({each.row for each in outcomes}) - len(attempts):
        yield f"{ready} rows had results already, the others are new"
    if long := len({each.row for each in outcomes if each.reason == TOO_LONG}):
        yield f"no room in the context: {counted(long, 'row')}. Raise rewriter.context_tokens, then call with --again"
    if failed := len({each.row for each in outcomes if is_failed(each)}) - long:
        yield (
            f"the endpoint failed {counted(failed, 'row')}: --again retries them. Runs that began with these results "
            "cannot be resumed then"
        )
    if len(rephraser.results.older()) > kept_before:
        yield kept_line(rephraser)
    yield f"manifest: {rephraser.keep_manifest(work.rows, outcomes)}"
    page = rephraser.results.file_of_set(outcomes, ".html")
    if attempts or not page.exists():  # one that is there also has what was refused
        write_set_page(work, outcomes, attempts, figures)
    yield f"before and after: {page}"
    if out is not None:
        _write_rows(out, work.rows, outcomes)
        yield f"{out}: the whole file, each row marked in the column {MARK!r}"
    yield key_line(rephraser)


def judge_test(work: Work, *, pairs: int | None) -> Iterator[str]:
    """Test the judge; yields lines for people, and keeps what was found.

    Args:
        work: Recipe and rows.
        pairs: Most pairs of each kind; None for as many as the recipe's gate wishes for.

    Raises:
        FedzoError: The judge does not pass the recipe's gate, or cannot be asked.
    """
    most = work.rephraser.config.gate_pairs if pairs is None else pairs
    with _progress(work, "asking the judge") as told:
        found = work.rephraser.test_judge(work.rows, most=most, on_progress=told)
    file = keep(found, work.rephraser.folder, min_pairs=work.rephraser.config.gate_pairs)
    yield from judge_test_lines(found)
    yield from _said(work.rephraser)
    if few := few_pairs(found, work.rephraser.config):
        yield few
    yield f"kept in {file}"
    if reasons := [*faults(found, work.rephraser.config)]:
        what_to_do = remedy(found, work.rephraser.config)
        raise FedzoError(f"the judge does not pass: {'; '.join(reasons)}. {what_to_do}")
    yield "the judge passes"


def bootstrap(work: Work, table: Path) -> Iterator[str]:
    """Have some rows, which a fixed seed draws, rewritten for a person to read; yields lines for people.

    No judge takes part: the table is what judge and rewriter are to learn from.
    """
    if table.exists():
        raise ConfigError(f"--table: {table} must not exist, but does: somebody may have edited it. Choose another.")
    _check_folder("--table", table)
    recipe = replace(work.rephraser.config, judged=False)
    rows = [work.rows[at] for at in shuffled(len(work.rows), seed=0)[:BOOTSTRAP_ROWS]]
    with replace(work.rephraser, config=recipe).course() as course, _progress(work, "rewriting") as told:
        known = course.check_rows(work.rows)  # all of them, so that a row is named by its number in the file
        drawn = {digest: known[digest] for digest in map(row_digest, rows)}
        course.run(drawn, told)
    attempts = [drawn[row_digest(row)] for row in rows]
    texts = [each.outcome.text if each.outcome and not each.outcome.reason else each.refused for each in attempts]
    told_task = work.rephraser.prompts.task
    write_table(table, columns_of(work.rephraser.task, told_task, work.column), [*zip(rows, texts, strict=True)])
    page = table.with_suffix(".html")
    outcomes = [each.outcome for each in attempts if each.outcome is not None]
    figures = figures_table(work.rephraser, rows, outcomes)
    write_page(page, rephrased_page(work.rephraser, rows, outcomes, drawn, figures), mode=0o600)
    yield f"{table}: {len(rows)} rows. Correct the column rewrite where it is wrong, and write yes into accept"
    yield f"{page}: the same to read"
    yield f"then: rewriter.examples={table}"


def set_lines(work: Work, outcomes: Sequence[RowOutcome], used: Used, figures: list[list[str]]) -> Iterator[str]:
    """What became of a set of rows, what it took, and its figures."""
    for name, number in counts(outcomes).items():
        yield f"{number:6d}  {name}"
    if names := count_names(work.rows, outcomes):
        yield f"{names:6d}  rewritten with a name lost or added (a warning)"
    if used.calls:
        yield _spent(used)
    yield from _said(work.rephraser)
    yield from (f"{name}: {value}" for name, value in figures)


def key_line(rephraser: Rephraser) -> str:
    """What a run must say to find the results."""
    words = "".join(f" {text}" for text in _settings(rephraser.config, rephraser.task))
    return f"use it in a run by: preprocess=[{STAGE}]{words}"


def _settings(recipe: OatRephraseConfig, task: TaskConfig) -> Iterator[str]:
    """What a command line must say beside the stage's name to mean this recipe."""
    usual = asdict(OatRephraseConfig()) | {"column": usual_column(task), "prompt": prompts_of(recipe, task).digest}
    for name, value in asdict(recipe).items():
        if value != usual[name]:
            is_quoted = isinstance(value, list | bool) or name == "about"
            text = json.dumps(value, separators=(",", ":"), ensure_ascii=False) if is_quoted else value
            yield shlex.quote(f"preprocess.{STAGE}.{name}={text}")


def _spent(used: Used) -> str:
    cost = f", cost {used.cost:.2f}" if used.cost else ""
    return f"{used.calls} calls, {used.tokens:,} tokens{cost}"


def kept_line(rephraser: Rephraser) -> str:
    """Where the results are that were replaced last."""
    older = rephraser.results.older()[-1]
    return f"the results of before are kept: {older}. A run that began with them needs them in their old place"


def _said(rephraser: Rephraser) -> Iterator[str]:
    """The first fault of each kind, in the endpoint's words."""
    for words in rephraser.totals.said.values():
        yield f"a call failed: {printable(words)}"


def _check_out(out: Path, work: Work) -> None:
    _check_folder("--out", out)

    def others(rows: Sequence[Row]) -> list[str]:
        """Digests, which are the same of a row and of what is read back of it: a date as text, a NaN."""
        kept = ({name: value for name, value in row.items() if name not in (work.column, MARK)} for row in rows)
        return [row_digest(row) for row in kept]

    if out.exists():
        there = read_rows(out)
        if not all(MARK in row for row in there) or others(there) != others(work.rows):
            raise ConfigError(
                f"--out: {out} must not exist, or hold what fedzo rephrase wrote of these rows, got other rows. "
                "Choose another."
            )


def _check_folder(option: str, file: Path) -> None:
    """Before any call: afterwards it would be too late."""
    if not file.absolute().parent.is_dir():
        raise ConfigError(f"{option}: the folder of {file} must exist, but does not. Make it, or choose another.")


def _write_rows(out: Path, rows: Sequence[Row], outcomes: Sequence[RowOutcome]) -> None:
    marked = [{**row, MARK: each.status} for row, each in zip(apply_outcomes(rows, outcomes), outcomes, strict=True)]
    replace_file(out, "".join(f"{_json_line(row)}\n" for row in marked), durable=True, mode=0o600)


def _json_line(row: Row) -> str:
    """The row as JSON, a date or a decimal as text; escaped where another column holds half of a character."""
    line = json.dumps(row, ensure_ascii=False, default=str)
    return line if is_utf8(line) else json.dumps(row, default=str)


def write_set_page(
    work: Work, outcomes: Sequence[RowOutcome], attempts: Mapping[str, Attempt], figures: list[list[str]]
) -> Path:
    """The page of a set before and after, for its owner alone; returns the file."""
    page = rephrased_page(work.rephraser, work.rows, outcomes, attempts, figures)
    return write_page(work.rephraser.results.file_of_set(outcomes, ".html"), page, mode=0o600)


def _progress(work: Work, title: str) -> AbstractContextManager[OnProgress]:
    """A bar that also tells what was spent, and what is waited for."""
    totals = work.rephraser.totals

    def note() -> str:
        busy = f"; endpoint busy: wait {totals.waiting_s:.0f} s" if totals.waiting_s else ""
        return f"{_spent(Used.of(totals, work.rephraser.rewriter))}{busy}"

    return phase(title, stderr=True, note=note)
