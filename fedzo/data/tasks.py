"""Rows to text, by templates.

A template is text in which ``{column}`` stands for a row's value. It is filled by one regular-expression pass and
nothing else (no format specs, no attributes), so a template or a row from elsewhere can read nothing but the row.
Rows that hold whole conversations (``fedzo.data.conversation``) need none.

No prompt is without its row: a template has a column, every brace before a name is a column's, and what fills a column
is a value that somebody wrote, neither blank nor what a table puts in the place of one that is missing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from fedzo.data.config import TaskConfig, TaskKind
from fedzo.data.conversation import Turn, as_text, conversation, opened, system_texts
from fedzo.data.derivations import find_derivation
from fedzo.data.files import Row
from fedzo.errors import ConfigError

FIELD = re.compile(r"\{(\w[\w .-]*)\}")
"""A column in a template; other braces are plain text."""
_NO_VALUE = {"nan", "nat", "<na>", "\\n", "#n/a", "#na", "#name?", "#null!", "#num!", "#ref!", "#value!", "#div/0!"}
"""How tables and dumps write a missing value as text, in lower case; an answer may be one of the words below."""
_NO_WORD = {"null", "none", "n/a"}
_NA = "NA"  # R's; in lower case it is a word of some languages, and Na is sodium


@dataclass(frozen=True, slots=True)
class Rendered:
    """A row as text.

    Attributes:
        prompt: What the model reads; of a chat, all that is said in it as one text.
        answers: What may follow, byte for byte; one entry, the answer to learn, for generation and instruction.
        label: Index of the right answer.
        references: All right answers without outer white space, the one to learn first (generation, instruction).
        chat: The prompt as messages, of which a system message may be the first (generation, instruction).
    """

    prompt: str
    answers: tuple[str, ...]
    label: int
    references: tuple[str, ...] = ()
    chat: tuple[Turn, ...] = ()

    @property
    def system(self) -> str:
        """The system message that the chat begins with; empty where it begins with another."""
        return "".join(system_texts(self.chat[:1]))


def render(row: Row, task: TaskConfig) -> Rendered:
    """Fill a task's templates from a row, or read the conversation that it holds.

    Raises:
        ConfigError: A column is missing, empty or not text, or holds no conversation, the label is not one of the
            candidates, or an answer is blank.
    """
    if task.messages:
        *asked, said = conversation(_value(row, task.messages, "task.messages"), task.messages)
        answer = said["content"]
        return Rendered(as_text(asked), (answer,), 0, (answer,), tuple(asked))
    fields = derived(row, task)
    prompt = _fill(task.template, fields, "task.template")
    if task.kind is TaskKind.candidates:
        rendered = Rendered(prompt, _candidates(fields, task), label_index(row, task))
    else:
        written = _filled(task.answer, fields, "task.answer")
        asked = opened(prompt, _fill(task.system, fields, "task.system"))
        references = tuple(answer.strip() for answer in written)
        rendered = Rendered(as_text(asked), written[:1], 0, references, tuple(asked))
    for answer in rendered.answers:
        if not answer.strip():
            raise ConfigError(
                f"an answer of task {task.name!r} is blank: {answer!r}. Remove the row or fill its answer."
            )
    return rendered


def template_faults(template: str, *, constant: bool = False) -> Iterator[str]:
    """The rules that a template breaks whatever the rows are; ``constant`` is one that needs no column.

    A template may come from elsewhere: all of it takes time linear in the text.
    """
    rest = FIELD.sub("\0", template)
    if opened := re.search(r"(?<!\$)\{[ \t]*(\w[\w .-]*)", rest):
        yield (
            f"close the brace of {opened[0]!r} right after the column's name, as in {{{opened[1].strip()}}} (a name "
            "may hold letters, digits, blanks and _ . -: rename a column with other signs)"
        )
    elif rest.count("{") < rest.count("}") and (closed := re.search(r"(?<!\w)(\w+)[ \t]*\}", rest)):
        yield f"open the brace of {closed[0]!r} right before the column's name, as in {{{closed[1]}}}"
    elif "\0" not in rest and not constant:
        yield "hold a {column} of the rows, or every row has the same text"


def beginning(prompt: str) -> str:
    """What a message shows of a row whose number is in no file that a user has, since rows were split and dealt."""
    return repr(prompt if len(prompt) <= 80 else prompt[:77] + "...")


def has_answer(row: Row, task: TaskConfig) -> bool:
    """Whether a row says what is right; files without answers leave the column out or empty, or put -1 there."""

    def is_hidden(value: object) -> bool:
        return is_missing(value) or str(value).strip() in {"-1", "-1.0"}

    columns = (task.label,) if task.kind is TaskKind.candidates else answer_columns(task)
    return not any(all(map(is_hidden, answers_in(row, column))) for column in columns)


def is_missing(value: object, *, may_be_word: bool = True) -> bool:
    """Whether a cell is null, blank, or what a table puts in the place of a value that it lacks.

    Args:
        value: Of the cell.
        may_be_word: Whether words for nothing, such as ``NA`` and ``none``, are values, as they may be among labels.
    """
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return True
    text = str(value).strip()
    if not text or text.casefold() in _NO_VALUE:
        return True
    return not may_be_word and (text == _NA or text.casefold() in _NO_WORD)


def answers_in(row: Row, column: str) -> list[Any]:
    """The values in a column of ``task.answer``: all that it lists, of which the first is learned, or its only one."""
    value = _opened(row, [column]).get(column)
    return value if isinstance(value, list) else [value]


def answer_columns(task: TaskConfig) -> tuple[str, ...]:
    """The columns of a row that its written answer is made of; none where the answer is one of candidates.

    Raises:
        ConfigError: ``task.derive`` names no derivation.
    """
    if task.kind is TaskKind.candidates:
        return ()
    columns = [*dict.fromkeys(FIELD.findall(task.answer))]
    if task.derive is None:
        return tuple(columns)
    derivation = find_derivation(task.derive)
    return (*(each for each in columns if each not in derivation.makes), *derivation.answers)


def lists_candidates(task: TaskConfig) -> bool:
    """Whether each row lists its own candidates, in a column of the only one that the task names."""
    return task.kind is TaskKind.candidates and len(task.candidates) == 1 and bool(FIELD.search(task.candidates[0]))


def has_labels(task: TaskConfig) -> bool:
    """Whether rows have labels: numbers of answers that are the same in all rows."""
    return task.kind is TaskKind.candidates and not lists_candidates(task)


def num_labels(task: TaskConfig) -> int:
    """Labels that rows of the task may have; 0 where ``has_labels`` is false."""
    return len(task.candidates) if has_labels(task) else 0


def label_index(row: Row, task: TaskConfig) -> int:
    """Which candidate is right: an index (a number, or one as text), or a value of ``task.labels`` if there are any.

    Raises:
        ConfigError: The column is missing or its value names no candidate. A boolean is no index: which of two answers
            is the true one, only ``task.labels`` can say.
    """
    value = _value(row, task.label, "task.label")
    shown = f"{str(value).lower()}, a boolean" if isinstance(value, bool) else f"{value!r}"
    count = len(_candidates(derived(row, task), task)) if lists_candidates(task) else len(task.candidates)
    if task.labels:
        text, labels = str(value).strip(), [label.strip() for label in task.labels[:count]]
        if text not in labels and text.lower() in ("true", "false"):  # JSON, pandas and spreadsheets spell them apart
            text, labels = text.lower(), [label.lower() for label in labels]
        if text in labels:
            return labels.index(text)
        raise ConfigError(
            f"column {task.label!r} must hold one of task.labels {task.labels[:count]}, got {shown}. "
            "Correct the row or task.labels."
        )
    try:
        index = float(str(value))
    except ValueError:  # of a boolean, too
        index = -1.0
    if not (index.is_integer() and 0 <= index < count):
        if isinstance(value, bool):
            advice = "Name the values in the order of task.candidates: task.labels=['false','true'], or the other way."
        elif str(value).strip() in {"-1", "-1.0"}:
            advice = (
                "-1 stands for a label that nobody gave: remove the row, or list the column's values in task.labels "
                "where -1 is one."
            )
        else:
            advice = "Correct the row, or list the column's values in task.labels."
        raise ConfigError(
            f"column {task.label!r} must hold an index (0 to {count - 1}) of task.candidates "
            f"{task.candidates}, got {shown}. {advice}"
        )
    return int(index)


def right_label(row: Row, task: TaskConfig) -> int | None:
    """``label_index`` of a row; None for a task whose answers are written."""
    return label_index(row, task) if task.kind is TaskKind.candidates else None


def columns_used(task: TaskConfig) -> tuple[str, ...]:
    """Columns that a row must have for a task, sorted.

    Raises:
        ConfigError: ``task.derive`` names no derivation.
    """
    if task.messages:
        return (task.messages,)
    is_choice = task.kind is TaskKind.candidates
    templates = [task.template, task.system, *(task.candidates if is_choice else [task.answer])]
    columns = {column for template in templates for column in FIELD.findall(template)}
    if task.derive is not None:
        derivation = find_derivation(task.derive)
        columns = columns - set(derivation.makes) | set(derivation.reads)
    return tuple(sorted(columns | ({task.label} if is_choice else set())))


def derived(row: Row, task: TaskConfig) -> Row:
    """The row with the fields that ``task.derive`` makes; the row itself if there is none."""
    if task.derive is None:
        return row
    derivation = find_derivation(task.derive)
    key = f"task.derive={task.derive}"
    fields = {
        column: _text(row, column, key, may_be_blank=column in derivation.may_be_blank) for column in derivation.reads
    }
    return row | derivation.make(fields)


def _candidates(row: Row, task: TaskConfig) -> tuple[str, ...]:
    """The candidates, filled: as many as the task names, or as the row lists."""
    key = "task.candidates"
    if not lists_candidates(task):
        row = _opened(row, FIELD.findall("\n".join(task.candidates)))
        return tuple(_fill(each, row, key) for each in task.candidates)
    answers = _filled(task.candidates[0], row, key)
    if len(answers) < 2:
        raise ConfigError(
            f"{key} {task.candidates} must name a column that lists at least 2 answers, got {answers[0]!r} alone. "
            "Write a list (jsonl, json, parquet), remove the row, or name each candidate of the task."
        )
    return answers


def _filled(template: str, row: Row, key: str) -> tuple[str, ...]:
    """A template filled with each of the answers that a column lists; once where none lists any."""
    columns = [*dict.fromkeys(FIELD.findall(template))]
    row = _opened(row, columns)
    lists = [column for column in columns if isinstance(row.get(column), list)]
    if not lists:
        return (_fill(template, row, key),)
    if len(lists) > 1:
        raise ConfigError(
            f"{key} must name at most one column that lists answers, got lists in {' and '.join(map(repr, lists))}. "
            "List whole answers in one column."
        )
    if not row[lists[0]]:
        raise ConfigError(f"column {lists[0]!r} ({key}) lists no answer: []. Fill it or remove the row.")
    return tuple(_fill(template, row | {lists[0]: answer}, key) for answer in row[lists[0]])


def _opened(row: Row, columns: Iterable[str]) -> Row:
    """The row, with a column more for each ``answers.text`` that is the field of an object, or of each in a list."""
    for column in columns:
        outer, _, name = column.partition(".")
        inside = row.get(outer)
        if column in row:
            continue
        if isinstance(inside, dict) and name in inside:
            row = row | {column: inside[name]}
        elif isinstance(inside, list) and all(isinstance(each, dict) and name in each for each in inside):
            row = row | {column: [each[name] for each in inside]}
    return row


def _fill(template: str, row: Row, key: str) -> str:
    return FIELD.sub(lambda match: _text(row, match[1], key), template)


def _text(row: Row, column: str, key: str, *, may_be_blank: bool = False) -> str:
    if may_be_blank and column in row and row[column] is None:
        return ""
    value = _value(row, column, key)
    if not isinstance(value, str | int | float):
        named = key in ("task.answer", "task.candidates") and isinstance(value, dict)
        advice = f"Name one of its fields, as in {{{column}.text}}." if named else "Flatten it first."
        raise ConfigError(f"column {column!r} ({key}) must hold text or a number, got {type(value).__name__}. {advice}")
    text = str(value).strip()
    if text and (text == _NA or is_missing(value, may_be_word=key not in ("task.template", "task.system"))):
        raise ConfigError(
            f"column {column!r} ({key}) holds {value!r}, which stands for a missing value. Fill it or remove the row."
        )
    if not text and not may_be_blank:
        raise ConfigError(f"column {column!r} ({key}) is blank: {value!r}. Fill it or remove the row.")
    return text


def _value(row: Row, column: str, key: str) -> object:
    if column not in row:
        there = ", ".join(map(str, row)) or "none"
        raise ConfigError(
            f"{key} needs a column {column!r}, the columns there are: {there}. Rename one, or change {key}."
        )
    if row[column] is None:
        raise ConfigError(f"column {column!r} ({key}) is empty (null). Fill it or remove the row.")
    return row[column]
