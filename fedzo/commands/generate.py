"""``fedzo generate``: prompts continued by a run's model; or those of a file answered by any model.

A sketch answers the prompts of a file with the tables of many users. A user is a table file of ``fedzo export RUN OUT
--tables``. The codes and all that is dense are held once; rows of several users share a batch, and each layer decodes
once for each user in it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fedzo.commands.perplexity import check_file
from fedzo.commands.run_folder import rebuild
from fedzo.data.chat import chat_end, encode_instructions
from fedzo.data.config import TaskConfig, TaskKind
from fedzo.data.encode import encode_prompts
from fedzo.data.files import read_located
from fedzo.data.tasks import FIELD, is_missing
from fedzo.errors import ConfigError
from fedzo.models.checks import check_ids
from fedzo.models.config import ModelConfig
from fedzo.models.generate import answer_ends, generate
from fedzo.models.load import load_model
from fedzo.models.loaded import LoadedModel
from fedzo.models.memory import TOKENS_PER_BATCH, weights_bytes
from fedzo.models.sketched.table_file import read_tables
from fedzo.report.format import bytes_text
from fedzo.run.peer import set_up_process
from fedzo.sketch import OwnTables, sketched_layers, tables_of

log = logging.getLogger(__name__)

BASE = ""
"""Whose rows the model answers as it is."""


def generate_run(run_dir: Path, prompts: list[str], *, max_new_tokens: int) -> list[str]:
    """Greedy continuations by the run's model (its best round), which end where the score of its task reads to.

    Of an instruction run they are answers to a chat's user behind the system message of the run's task, of a run of
    ``kind=generation`` one line.
    """
    built = rebuild(run_dir)
    loaded, task = built.workspace.loaded, built.process.peer.config.task
    kind = task.kind
    ids = prompt_ids(loaded, prompts, chat=kind is TaskKind.instruction, system=_system_message(task))
    return generate(
        loaded,
        ids,
        max_new_tokens=max_new_tokens,
        tokens_per_batch=built.workspace.tokens_per_batch,
        ends=answer_ends(loaded.tokenizer, kind),
        stop_at_newline=kind is TaskKind.generation,
    )


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt, and the name of the tables that answer it."""

    prompt: str
    tables: str


def answer_rows(
    model: ModelConfig, tables: Sequence[Path], prompts: Path, *, max_new_tokens: int, chat: bool = False
) -> Iterator[str]:
    """One line of JSON an answer, in the order of the rows; what a user takes comes first.

    Args:
        model: Any; with ``tables`` a sketch.
        tables: Files of its tables, each known by its name without the ending.
        prompts: A data file with the columns ``prompt`` and, where there are tables, ``tables``.
        max_new_tokens: Longest answer.
        chat: Whether each prompt is what a user says in a chat, as in runs of ``kind=instruction``.

    Raises:
        ConfigError: A file cannot be used, a row names no known tables, or there is no chat template.
    """
    names = [file.stem for file in tables]
    if len(set(names)) < len(names):
        raise ConfigError(f"--tables must be files of different names, got {', '.join(map(str, tables))}. Rename one.")
    rows = _read(prompts, names)
    set_up_process(0, "auto")
    loaded = load_model(model)
    if tables and not loaded.is_sketch:
        raise ConfigError(
            f"--tables: {model.name!r} must be a sketch, but is dense. Name the sketch whose tables were trained."
        )
    if chat and not loaded.tokenizer.chat_template:
        raise ConfigError(
            f"--chat: the tokenizer of {model.name!r} must have a chat template, but has none. Leave it out."
        )
    users = {name: _offset(loaded, file) for name, file in zip(names, tables, strict=True)}
    ids = prompt_ids(loaded, [row.prompt for row in rows], chat=chat, where=f"{prompts}: ")
    if users:
        each = next(iter(users.values())).nbytes
        base = bytes_text(weights_bytes(loaded.model))
        yield f"{len(users)} users: {bytes_text(each)} each for tables, beside one model of {base}"
    with _following(loaded, rows, users) as follow:
        answers = generate(
            loaded,
            ids,
            max_new_tokens=max_new_tokens,
            tokens_per_batch=model.tokens_per_batch or TOKENS_PER_BATCH,
            ends=chat_end(loaded.tokenizer) if chat else set(),
            before=follow,
        )
    for row, answer in zip(rows, answers, strict=True):
        yield json.dumps({"tables": row.tables or None, "prompt": row.prompt, "answer": answer}, ensure_ascii=False)


def prompt_ids(
    loaded: LoadedModel, prompts: Sequence[str], *, chat: bool, system: str = "", where: str = ""
) -> list[tuple[int, ...]]:
    """Token ids of what the user of a chat says, behind a system message if there is one, or of text to go on from."""
    tokenizer = loaded.tokenizer
    ids = encode_instructions(prompts, tokenizer, system=system) if chat else encode_prompts(prompts, tokenizer)
    for number, tokens in enumerate(ids):
        check_ids(loaded.model, tokens, where=f"{where}prompt {number}")
    return ids


def _system_message(task: TaskConfig) -> str:
    """The system message before a prompt, as before each row of the run; none where each row has its own."""
    if columns := FIELD.findall(task.system):
        log.warning(
            "task.system of this run holds columns of its rows (%s), which a prompt has not. So prompts are asked "
            "without a system message",
            ", ".join(columns),
        )
        return ""
    return task.system


@contextmanager
def _following(
    loaded: LoadedModel, rows: Sequence[Asked], users: Mapping[str, torch.Tensor]
) -> Iterator[Callable[[list[int]], None] | None]:
    """What gives the rows of a batch their users' tables; None where there are none."""
    if not users:
        yield None
        return
    own, nothing = OwnTables([*sketched_layers(loaded.model).values()]), torch.zeros_like(next(iter(users.values())))

    def follow(batch: list[int]) -> None:
        present, index = np.unique([rows[i].tables for i in batch], return_inverse=True)
        own.follow((users.get(str(name), nothing).to(loaded.device) for name in present), index)

    try:
        with own:
            yield follow
    except NotImplementedError as error:  # of OwnTables
        raise ConfigError(
            f"--tables: each sketched layer of {loaded.source!r} must see all rows of a batch, but {error}, as in a "
            "mixture of experts. Export each user's sketch by `fedzo export RUN OUT`, and name it with --model."
        ) from error


def _read(file: Path, names: Sequence[str]) -> list[Asked]:
    check_file(file, "--prompts")
    rows = []
    for where, row in read_located(file):
        prompt, whose = row.get("prompt"), row.get("tables")
        tables = BASE if is_missing(whose) else str(whose).strip()
        if not (isinstance(prompt, str) and prompt):
            raise ConfigError(f"{where}: column 'prompt' must hold text, got {prompt!r}. Correct or remove the row.")
        if tables != BASE and tables not in names:
            known = ", ".join(names) or "none were given"
            raise ConfigError(
                f"{where}: column 'tables' must name a file of --tables ({known}), got {whose!r}. Give its "
                "file with --tables, or correct the row."
            )
        rows.append(Asked(prompt, tables))
    if not rows:
        raise ConfigError(f"{file}: must hold at least one row, got none. Give another file.")
    return rows


def _offset(loaded: LoadedModel, file: Path) -> torch.Tensor:
    """A user's tables less the sketch's, float32 [n] in wire order, on the host."""
    own = read_tables(file, loaded)
    return torch.cat([(own[name] - base.detach().cpu()).reshape(-1) for name, base in tables_of(loaded.model).items()])
