"""The rules on a task, which types cannot say."""

from __future__ import annotations

from collections.abc import Iterator

from fedzo.config.schema import RunSettings
from fedzo.data.config import Loss, TaskConfig, TaskKind
from fedzo.data.tasks import lists_candidates, template_faults
from fedzo.errors import Problem, at_least, problem


def task_problems(config: RunSettings) -> Iterator[Problem]:
    """Every broken rule on how rows become prompts, answers and a loss."""
    task = config.task
    yield from _conversations(task) if task.messages else _templates(task)
    if task.kind is not TaskKind.instruction:
        for key, value in (("task.messages", task.messages), ("task.system", task.system)):
            if value:
                rule = f"be empty for task.kind={task.kind}, which uses no chat template"
                yield problem(key, rule, value, "Leave it out, or write task.kind=instruction.")
    if task.kind is not TaskKind.candidates and task.loss is Loss.candidates:
        rule = f"be lm or score for task.kind={task.kind}, which has no candidates"
        yield problem("task.loss", rule, "candidates", "Write task.loss=lm.")
    if not 0 < task.common_shift <= 1:
        yield problem("task.common_shift", "be > 0 and <= 1", task.common_shift, "1 leaves the loss as it is.")
    elif task.common_shift < 1 and task.loss is not Loss.candidates:
        rule = f"be 1 for task.loss={task.loss}, which is not made of the scores of candidates"
        yield problem("task.common_shift", rule, task.common_shift, "Leave it out.")
    elif task.common_shift < 1 and lists_candidates(task):
        rule = "be 1 for rows that list their own candidates, whose scores have nothing in common"
        yield problem("task.common_shift", rule, task.common_shift, "Leave it out.")
    elif task.common_shift < 1 and config.fl.batch_size < 2:
        rule = "be 1 with fl.batch_size=1, where a row has nothing in common with another"
        yield problem("task.common_shift", rule, task.common_shift, "Write fl.batch_size=8, or more.")
    yield from at_least("task.max_length", task.max_length, 1, "It counts tokens.")
    yield from at_least("task.max_new_tokens", task.max_new_tokens, 1, "It counts generated tokens.")


def _conversations(task: TaskConfig) -> Iterator[Problem]:
    """Rows that hold whole conversations leave nothing to templates."""
    for key in ("template", "answer", "derive"):
        if value := getattr(task, key):
            rule = "be left out beside task.messages, whose rows have both prompt and answer"
            yield problem(f"task.{key}", rule, value, "Choose task=chat, or leave task.messages out.")
    if task.system:
        rule = "be left out beside task.messages, whose rows have system messages of their own"
        yield problem("task.system", rule, task.system, "Write it into the rows, as the first message of each.")


def _templates(task: TaskConfig) -> Iterator[Problem]:
    if not task.template:
        yield problem("task.template", "not be empty", task.template, "Choose a task=<option>, or write a template.")
    else:
        yield from _template("task.template", task.template)
    if task.kind is TaskKind.generation and task.template.endswith((" ", "\t")):
        remedy = "Begin task.answer with it: most tokenizers join a space to the word after it."
        yield problem("task.template", "not end in a space for task.kind=generation", task.template, remedy)
    yield from _template("task.system", task.system, constant=True)
    if task.kind is TaskKind.candidates:
        yield from _candidates(task)
    elif not task.answer:
        blank = " " if task.kind is TaskKind.generation else ""  # most tokenizers join it to the word after it
        remedy = f"Name the answer's column, as in task.answer='{blank}{{answer}}'."
        yield problem("task.answer", f"not be empty for task.kind={task.kind}", task.answer, remedy)
    else:
        yield from _template("task.answer", task.answer)


def _template(key: str, template: str, *, constant: bool = False) -> Iterator[Problem]:
    for rule in template_faults(template, constant=constant):
        yield problem(key, rule, template, "Each {column} stands for a row's value.")


def _candidates(task: TaskConfig) -> Iterator[Problem]:
    is_listed = lists_candidates(task)
    if len(task.candidates) < 2 and not is_listed:
        rule = "hold at least 2 answers for task.kind=candidates"
        remedy = "List the answers in the order of the labels, or write one with a {column} that lists a row's own."
        yield problem("task.candidates", rule, task.candidates, remedy)
    labels = [label.strip() for label in task.labels]  # as they are compared with the column's values
    for key, texts in (("task.candidates", task.candidates), ("task.labels", labels)):
        if len(set(texts)) < len(texts):
            yield problem(key, "differ from one another", texts, "Each answer has one label and one text.")
    for candidate in task.candidates:
        yield from _template("task.candidates", candidate, constant=True)
    if task.labels and len(task.labels) != len(task.candidates) and not is_listed:
        rule = f"hold one value per candidate ({len(task.candidates)})"
        yield problem("task.labels", rule, task.labels, "Or leave it empty when the column holds indices.")
    if not task.label:
        yield problem(
            "task.label", "name the column of the right answer", task.label, "Set it to a column of the rows."
        )
