"""Examples that the prompts show: rewrites that a person has accepted in the table of ``fedzo rephrase bootstrap``."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

from fedzo.data.config import TaskConfig, TaskKind
from fedzo.data.files import Row, read_located
from fedzo.data.preprocess.rephrase.prompts import Example
from fedzo.data.preprocess.rephrase.tasks import RephraseTask
from fedzo.data.tasks import answers_in, right_label
from fedzo.data.words import is_utf8
from fedzo.errors import ConfigError
from fedzo.records.folder import replace_file

ACCEPT, REWRITE = "accept", "rewrite"
"""Columns of the table beside the task's own."""
MAX_EXAMPLES = 40


def columns_of(task: TaskConfig, told: RephraseTask, column: str) -> list[str]:
    """Columns of the table."""
    label = [task.label] if task.kind is TaskKind.candidates else []
    return [ACCEPT, *dict.fromkeys((column, REWRITE, *told.others(column), *label))]


_FORMULA = re.compile(r"'*[=+\-@\t\r]")  # what a spreadsheet would compute, with quotes that say that it is text


def write_table(file: Path, columns: Sequence[str], rows: Sequence[tuple[Row, str]]) -> None:
    """Write rows and what a rewriter made of them as CSV, none of them accepted yet; no cell is a formula."""
    text = io.StringIO()
    table = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    for row, rewrite in rows:
        cells = {name: answers_in(row, name)[0] for name in columns} | {ACCEPT: "", REWRITE: rewrite}
        table.writerow({name: _as_cell(text) if isinstance(text, str) else text for name, text in cells.items()})
    replace_file(file, text.getvalue(), durable=True, mode=0o600)


def read_examples(file: Path, task: TaskConfig, told: RephraseTask, column: str) -> tuple[Example, ...]:
    """The accepted rows of a table.

    Raises:
        ConfigError: It cannot be read, lacks a column, none or too many rows are accepted, or a rewrite is empty.
    """
    examples = []
    for where, row in read_located(file):
        if missing := [name for name in columns_of(task, told, column) if name not in row]:
            raise ConfigError(
                f"{where}: a table of examples must have the column {missing[0]!r}, as fedzo rephrase bootstrap writes "
                "it. Add it."
            )
        said = str(row[ACCEPT]).strip().casefold()
        if said not in {"yes", "no", ""}:
            raise ConfigError(f"{where}: column {ACCEPT!r} must hold yes, no or nothing, got {row[ACCEPT]!r}.")
        if said != "yes":
            continue
        if file.suffix == ".csv":
            row = {name: _of_cell(cell) if isinstance(cell, str) else cell for name, cell in row.items()}
        text = str(row[REWRITE]).strip()
        if not text:
            raise ConfigError(f"{where}: an accepted row must have text in the column {REWRITE!r}. Write it, or no.")
        if bad := [name for name in columns_of(task, told, column) if not is_utf8(str(row[name]))]:
            raise ConfigError(
                f"{where}: column {bad[0]!r} must hold text, got half of a character. Correct it, or write no."
            )
        label = right_label(row, task)
        examples.append(Example({name: row[name] for name in (column, *told.others(column))}, label, text))
    if not 1 <= len(examples) <= MAX_EXAMPLES:
        raise ConfigError(
            f"{file}: 1 to {MAX_EXAMPLES} rows must be accepted, got {len(examples)}. Write yes into the column "
            f"{ACCEPT!r} of rows whose rewrite is right."
        )
    return tuple(examples)


def _as_cell(text: str) -> str:
    return f"'{text}" if _FORMULA.match(text) else text


def _of_cell(text: str) -> str:
    return text.removeprefix("'") if _FORMULA.match(text) else text
