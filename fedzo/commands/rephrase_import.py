"""``fedzo rephrase import``: rewrites from elsewhere, through the same checks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from fedzo.commands.rephrase import Work, kept_line, key_line, set_lines, write_set_page
from fedzo.data.files import Row, read_rows
from fedzo.data.preprocess.rephrase.checks import check
from fedzo.data.preprocess.rephrase.course import IDENTICAL, outcome_of
from fedzo.data.preprocess.rephrase.manifest import Used
from fedzo.data.preprocess.rephrase.prompts import label_of
from fedzo.data.preprocess.rephrase.rephraser import Rephraser
from fedzo.data.preprocess.rephrase.results import row_digest
from fedzo.data.words import is_utf8
from fedzo.errors import ConfigError
from fedzo.models.digest import file_digest
from fedzo.records.rephrase import RowOutcome
from fedzo.report.format import counted
from fedzo.report.rephrased import figures_table


def import_sets(work: Work, file: Path) -> Iterator[str]:
    """Take in rewrites from elsewhere, through the same checks; yields lines for people.

    Args:
        work: Recipe and rows.
        file: Table with ``row`` (number in the data, from 0), ``text``, and where it has one ``verdict``: all but
            ``same`` keeps the original. A ``field`` or ``column`` must be the recipe's.
    """
    digest = file_digest(file) if file.is_file() else ""
    sets = read_rows(file)
    recipe = replace(work.rephraser.config, imported=digest)
    own = replace(work.rephraser, config=recipe)
    given = _by_number(sets, file, len(work.rows), work.column)
    outcomes = [_imported(own, row, given.get(number), f"row {number}") for number, row in enumerate(work.rows)]
    made = {each.row: each for each in sorted(outcomes, key=lambda each: each.reason != "absent")}  # of equal rows one
    there = own.results.read()
    changed = [row for row, outcome in made.items() if row in there and there[row] != outcome]
    own.results.add(made, instead=changed)
    found = [made[row_digest(row)] for row in work.rows]
    mine = Work(own, work.rows)
    figures = figures_table(own, work.rows, found)
    yield from set_lines(mine, found, Used(), figures)
    if changed:
        yield f"{counted(len(changed), 'row')} had another result from these sets, for other data perhaps"
        yield kept_line(own)
    yield f"manifest: {own.keep_manifest(work.rows, found)}"
    yield f"before and after: {write_set_page(mine, found, {}, figures)}"
    yield key_line(own)


def _by_number(sets: Iterable[Row], file: Path, num_rows: int, column: str) -> dict[int, Row]:
    given: dict[int, Row] = {}
    for line, entry in enumerate(sets, start=1):
        where = f"{file}, entry {line}"
        number = str(entry.get("row", "")).strip()
        if not number.isascii() or not number.isdigit() or int(number) >= num_rows:
            raise ConfigError(f"{where}: row must be a number from 0 to {num_rows - 1}, got {entry.get('row')!r:.40}.")
        if int(number) in given:
            raise ConfigError(f"{where}: row {number} must be there once. Remove one of the two.")
        named = entry.get("column", entry.get("field", column))
        if named != column:
            raise ConfigError(f"{where}: the column must be {column!r}, got {named!r:.40}.")
        if not isinstance(entry.get("text"), str) or not is_utf8(entry["text"]):
            raise ConfigError(f"{where}: text must be a text, got {entry.get('text')!r:.40}.")
        given[int(number)] = entry
    return given


def _imported(rephraser: Rephraser, row: Row, entry: Row | None, where: str) -> RowOutcome:
    prompts, digest = rephraser.prompts, row_digest(row)
    label = label_of(row, prompts, rephraser.task, where=where)
    original = str(row[prompts.column])
    reason, text = "absent", original
    if entry is not None:
        checked = check(entry["text"], row, label, prompts=prompts, rules=rephraser.config)
        refused = "" if entry.get("verdict") in (None, "", "same") else "verdict"
        reason = str(checked.fault or "") or (IDENTICAL if checked.text == original.strip() else refused)
        text = original if reason else checked.text
    return outcome_of(digest, prompts.column, text, reason=reason, model="imported")
