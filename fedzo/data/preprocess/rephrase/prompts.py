"""What the rewriter and the judge read: our own words, after arXiv 2506.17264 (the paper's prompts are not published).

A prompt holds the instructions, examples where there are any, and one row. The row's values are JSON texts, so no value
can pass for an instruction's end. The rewriter is told the right answer, as in the paper. The judge is told no label;
an answer that is written is in a column, which both read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fedzo.data.config import TaskConfig
from fedzo.data.files import Row
from fedzo.data.preprocess.backend import Message
from fedzo.data.preprocess.rephrase.config import Style
from fedzo.data.preprocess.rephrase.tasks import RephraseTask
from fedzo.data.tasks import answers_in, right_label
from fedzo.data.words import is_utf8
from fedzo.errors import ConfigError, printable

SAME, DIFFERENT = "same", "different"
ORDERS = ((SAME, DIFFERENT), (DIFFERENT, SAME))
"""In which order the judge is told of the verdicts; rows are judged in the first."""

_GOALS = {
    Style.plain: (),
    Style.oat: (
        "The rewritten text is training data for MeZO, which fine-tunes a language model by forward passes alone: it "
        "estimates a gradient from how the loss changes when all weights are shifted a little. Write text that makes "
        "these estimates good:",
        "- Sensitive: say things in clear and varied words, so that a small change of the model shows in its answer.",
        "- Economical: be concise; leave out what only repeats.",
        "- Robust: what matters must still be there if the text is short or cut off.",
        "- Decidable: make what separates the possible answers stand out in the facts, for a score that only counts "
        "right and wrong.",
    ),
    Style.paper: (
        "The rewritten text is training data for MeZO (Malladi et al., 2023). MeZO fine-tunes a language model with "
        "the memory of inference: it perturbs all weights along one random direction, measures the loss on either "
        "side, and steps along that direction by the difference of the two losses. No back-propagation takes place. "
        "Its paper shows that this works where a prompt makes the task close to what the model has learned already, "
        "since then few directions matter, and that it can follow scores that have no gradient, such as accuracy. "
        "Keep this in mind while you rewrite.",
    ),
}
_RULES = (
    "- Keep the meaning: every fact, name, number and negation stays, and none is added.",
    "- Keep the answer: with the other fields as they are, the right answer must stay right, and no other may become "
    "right.",
    "- Stay neutral: do not state the answer or hint at it, and do not use words of it that the text does not have. "
    "The reader must still draw the conclusion.",
    "- Write fluent text in other words and another sentence structure than the original, of about the same length.",
)
_JUDGED = (
    ("Ten people came to the party.", "The party was attended by ten people.", SAME),
    ("Ten people came to the party.", "Nobody came to the party.", DIFFERENT),
    ("Because the train was late, Ana missed the meeting.", "Ana missed the meeting as her train was late.", SAME),
    ("Because the train was late, Ana missed the meeting.", "Ben missed the meeting as his bus was late.", DIFFERENT),
)
"""Two rewrites to accept and two to refuse, of no task."""


@dataclass(frozen=True, slots=True)
class Example:
    """A row and a rewrite of it that somebody has accepted."""

    row: Row
    label: int | None
    text: str


@dataclass(frozen=True)
class Prompts:
    """All prompts of a recipe.

    Attributes:
        style: What the rewriter is asked for.
        task: What both are told of the task.
        column: The column that is rewritten.
        examples: Accepted rewrites, which both see.
    """

    style: Style
    task: RephraseTask
    column: str
    examples: tuple[Example, ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        """What the judge may call the answers; none for a task whose answer is written."""
        return self.task.choices or self.task.labels

    @cached_property
    def instructions(self) -> str:
        """What the rewriter is told before it sees a row."""
        goals = _GOALS[self.style]
        return "\n".join(
            (
                f"Rewrite one field of a training example. {self.task.about}",
                f"The field to rewrite is `{self.column}`. The other fields stay as they are.",
                *(("", *goals) if goals else ()),
                "",
                "Rules:",
                *_RULES,
                *(self._anchor_rule()),
                f"- Answer with the new text of `{self.column}` and nothing else: no quotation marks, no introduction, "
                "no explanation.",
            )
        )

    def rewriter(self, row: Row, label: int | None) -> tuple[Message, ...]:
        """The chat that asks for a rewrite.

        Args:
            row: Has the task's columns.
            label: Index of the right answer; None where it is written in a column.
        """
        shown = [
            f"Example {number}\n{self._fields(example.row, example.label)}\nnew {self.column}: {example.text}"
            for number, example in enumerate(self.examples, start=1)
        ]
        asked = f"{self._fields(row, label)}\nnew {self.column}:"
        return (Message("user", "\n\n".join((self.instructions, *shown, asked))),)

    def judge(self, row: Row, rewrite: str, order: Sequence[str] = ORDERS[0]) -> tuple[Message, ...]:
        """The chat that asks whether a rewrite leaves meaning and answer as they were.

        Args:
            row: The row as it was.
            rewrite: What may take the place of its column.
            order: In which order the verdicts are named.
        """
        told = {
            SAME: f"- {SAME}: text B says what text A says, and the answer to the task stays the same.",
            DIFFERENT: f"- {DIFFERENT}: a fact, name, number or negation was changed, dropped or added, or the answer "
            "to the task changes or is given away.",
        }
        about = f"Judge whether a rewritten text can take the place of the original. {self.task.about}"
        verdicts = "\n".join(("Verdicts:", *(told[verdict] for verdict in order)))
        return (
            Message("system", "You compare texts carefully and answer in JSON only."),
            Message(
                "user",
                "\n\n".join((about, verdicts, self._answer_rule(order), *self._judged(), self._ab(row, rewrite))),
            ),
        )

    def judge_schema(self, order: Sequence[str] = ORDERS[0]) -> Mapping[str, Any]:
        """JSON schema of the judge's answer."""
        properties: dict[str, Any] = {"verdict": {"type": "string", "enum": [*order]}}
        if self.labels:
            properties["predicted_label"] = {"type": "string", "enum": [*self.labels]}
        return {
            "type": "object",
            "properties": properties,
            "required": [*properties],
            "additionalProperties": False,
        }

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that the prompts say beside a row."""
        named = {column: f"<{column}>" for column in self._columns}
        labels = range(len(self.task.labels)) if self.task.labels else (None,)
        chats = [self.rewriter(named, label) for label in labels]
        chats += [self.judge(named, "<rewrite>", order) for order in ORDERS]
        plain = [[[message.role, message.content] for message in chat] for chat in chats]
        return hashlib.sha256(json.dumps([plain, self.judge_schema()]).encode()).hexdigest()

    @property
    def judge_digest(self) -> str:
        """SHA-256 of what the judge reads beside a row, whatever the rewriter is told."""
        return Prompts(Style.plain, self.task, self.column, self.examples).digest

    @property
    def _columns(self) -> tuple[str, ...]:
        return (self.column, *self.task.others(self.column))

    def _anchor_rule(self) -> tuple[str, ...]:
        if not self.task.anchors:
            return ()
        columns = " and ".join(f"`{column}`" for column in self.task.anchors)
        return (f"- The text of {columns} must occur in the new text unchanged.",)

    def _fields(self, row: Row, label: int | None) -> str:
        lines = [_line(column, answers_in(row, column)[0]) for column in self._columns]
        if label is not None and self.task.labels:
            lines.append(_line("right answer", self.task.meaning(label, row)))
        return "\n".join(lines)

    def _answer_rule(self, order: Sequence[str]) -> str:
        form = {"verdict": "|".join(order)}
        rule = "Answer with one JSON object and nothing else"
        if not self.labels:
            return f"{rule}: {json.dumps(form)}"
        form["predicted_label"] = "|".join(self.labels)
        return f"{rule}: {json.dumps(form)}. predicted_label is the answer that you give if you read text B alone."

    def _judged(self) -> list[str]:
        """Examples of verdicts: what people accepted, and beside it pairs of no task, two of each kind.

        An answer is one as the rule asks for. Pairs of no task have no answer to it: each label stands there in turn,
        once beside each verdict, so none goes with one.
        """
        shown = [
            self._answered(str(each.row[self.column]), each.text, SAME, each.label, self._others(each.row))
            for each in self.examples
        ]
        count = len(self.labels) or 1
        turns = (0, 0, 1, 1)
        return shown + [
            self._answered(a, b, verdict, turn % count, [])
            for (a, b, verdict), turn in zip(_JUDGED, turns, strict=True)
        ]

    def _answered(self, a: str, b: str, verdict: str, label: int | None, others: list[str]) -> str:
        answer = {"verdict": verdict}
        if self.labels and label is not None:
            answer["predicted_label"] = self.labels[label]
        return "\n".join([*others, _line("text A", a), _line("text B", b), json.dumps(answer, ensure_ascii=False)])

    def _others(self, row: Row) -> list[str]:
        return [_line(column, answers_in(row, column)[0]) for column in self.task.others(self.column)]

    def _ab(self, row: Row, rewrite: str) -> str:
        return "\n".join([*self._others(row), _line("text A", row[self.column]), _line("text B", rewrite)])


def _line(name: str, value: object) -> str:
    return f"{name}: {json.dumps(str(value), ensure_ascii=False)}"


def label_of(row: Row, prompts: Prompts, task: TaskConfig, *, where: str) -> int | None:
    """Index of the right answer; None where it is written.

    Args:
        row: The row.
        prompts: What shows it.
        task: What it is for.
        where: Names it in an error.

    Raises:
        ConfigError: The row does not fit the task, or lacks what the prompts show.
    """
    told = prompts.task
    task_columns = (*told.others(prompts.column), *told.choices, *told.anchors, *told.written)
    for column in dict.fromkeys((prompts.column, *task_columns)):
        values = answers_in(row, column) if column in told.written else [row.get(column)]
        for value in values or [None]:
            _check_text(row, column, value, rewritten=column == prompts.column, where=where)
    try:
        return right_label(row, task)
    except ConfigError as error:
        raise ConfigError(f"oat_rephrase: {where}: {error}") from error


def _check_text(row: Row, column: str, value: object, *, rewritten: bool, where: str) -> None:
    must = f"oat_rephrase: {where} must have text in the column {printable(column)!r}, got"
    if value is None and column not in row:
        told = ", ".join(printable(str(name), most=60) for name in sorted(map(str, row)))
        key = "preprocess.oat_rephrase.column" if rewritten else "the data as the task names it"
        raise ConfigError(f"{must} a row with the columns {told}. Name the column in {key}.")
    if not isinstance(value, str) and (rewritten or not isinstance(value, int | float)):
        raise ConfigError(f"{must} a value of the type {type(value).__name__}. Write text there, or leave the row out.")
    if not str(value).strip():
        raise ConfigError(f"{must} a blank one. Write text there, or leave the row out.")
    if not is_utf8(str(value)):
        raise ConfigError(f"{must} half of a character (a lone surrogate), which no UTF-8 holds. Correct the row.")
