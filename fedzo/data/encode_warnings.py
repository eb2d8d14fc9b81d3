"""What a user is told, once, of rows from whose tokens a model learns less than from the rows, or something else."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

from fedzo.data.chat import special_tokens
from fedzo.data.config import TaskConfig, TaskKind
from fedzo.data.tasks import Rendered
from fedzo.system import warn_once

log = logging.getLogger(__name__)


def tell_endless_answers(task: TaskConfig, tokenizer: Any) -> None:
    """Where answers are written and nothing ends them; for a tokenizer that puts no token behind a text."""
    if task.kind is TaskKind.generation and not task.answer.endswith(("\n", *special_tokens(tokenizer).values())):
        warn_once(
            log,
            f"task {task.name!r}: its answers end with neither a line break nor a special token, so nothing teaches "
            "the model where to stop. End task.answer with a line break, in a file: on a command line, \\n is two "
            "characters.",
        )


def tell_endless_turns(task: TaskConfig) -> None:
    """Where no token ends the answers of a chat template."""
    warn_once(
        log,
        f"task {task.name!r}: this model's chat template ends an answer with no special token, so nothing teaches "
        "the model where to stop. Choose another model, or a chat template that writes one.",
    )


def tell_other_texts(task: TaskConfig) -> None:
    """Where the prompt to write from is no beginning of the text to learn, by the chat template."""
    warn_once(
        log,
        f"task {task.name!r}: this model's chat template begins an answer that is to be written otherwise than the "
        "answer of a row, by a thought in most templates. So the model learns behind one text and writes behind "
        "another. Take thoughts out of the answers, or choose another model or chat template.",
    )


def tell_other_tokens(task: TaskConfig) -> None:
    """Where it is one, and its tokens are others."""
    warn_once(
        log,
        f"task {task.name!r}: to this model, the end of a prompt has other tokens where an answer follows, in some "
        "rows. So the model learns behind other tokens than it writes behind. End the prompt without white space and "
        "begin the answer with a blank, or choose another model or chat template.",
    )


def tell_unread_system(task: TaskConfig) -> None:
    """Where the chat template leaves a system message out of the text."""
    warn_once(
        log,
        f"task {task.name!r}: this model's chat template leaves out the system message of some rows, so the model does "
        "not read it. Begin the user's first message with it, or choose another model or chat template.",
    )


def tell_special_tokens(rendered: Sequence[Rendered], task: TaskConfig, tokenizer: Any) -> None:
    """Where a row has a text, which no template has, that is a special token to the model."""
    templates = (task.template, task.system, task.answer, *task.candidates)
    tokens = [token for token in special_tokens(tokenizer).values() if not any(token in each for each in templates)]
    if not tokens:
        return
    special = re.compile("|".join(map(re.escape, tokens)))
    found = (special.search(text) for row in rendered for text in (row.prompt, *row.answers))
    if (match := next(filter(None, found), None)) is not None:
        warn_once(
            log,
            f"task {task.name!r}: the text of some rows holds {match[0]!r}, which this model reads as a special token, "
            "as if a text or a turn began or ended there. Remove it from the rows, or spell it otherwise.",
        )
