"""What is said in a chat, turn by turn, and the rows that hold a whole one.

A cell of ``task.messages`` is a list of objects with ``role`` and ``content``, as chat data is stored. Its last message
is the assistant's and the right answer; all messages before it are the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedzo.errors import ConfigError, printable

Turn = dict[str, str]
"""A message: its ``role`` and its ``content``."""
SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
_ROLES = (SYSTEM, USER, ASSISTANT)


def opened(question: str, system: str = "") -> list[Turn]:
    """A chat that a user opens with a question, behind a system message if it has text."""
    before = [{"role": SYSTEM, "content": system.strip()}] if system.strip() else []
    return [*before, {"role": USER, "content": question}]


def conversation(value: object, column: str) -> list[Turn]:
    """The messages of a cell, their texts without outer white space; other keys of a message are not read.

    Args:
        value: The cell.
        column: Its column, for messages of errors.

    Returns:
        At least two messages, of which the last is the assistant's.

    Raises:
        ConfigError: The cell holds something else.
    """
    where = f"column {column!r} (task.messages)"
    if not isinstance(value, list):
        raise ConfigError(
            f"{where} must hold a list of messages, each with a 'role' and a 'content', got {type(value).__name__}. "
            "Write a list, in a jsonl, json or parquet file."
        )
    turns = [_turn(message, f"message {number} of {where}") for number, message in enumerate(value, start=1)]
    if len(turns) < 2:
        raise ConfigError(
            f"{where} must hold at least 2 messages, a prompt and its answer, got {len(turns)}. Complete or remove the "
            "row."
        )
    if (last := turns[-1]["role"]) != ASSISTANT:
        raise ConfigError(
            f"{where} must end with a message of the assistant, the right answer, got one of the {last} there. Remove "
            "what follows the last answer, or the row."
        )
    return turns


def as_text(turns: Sequence[Turn]) -> str:
    """All that is said as one text, by which a prompt is known and named. A question alone is the text itself.

    What a system says stands last: a message shows the beginning, and many rows have the same system. Two prompts that
    are spelled alike only stay together.
    """
    if len(turns) == 1:
        return turns[0]["content"]
    ordered = sorted(turns, key=lambda turn: turn["role"] == SYSTEM)
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in ordered)


def system_texts(turns: Sequence[Turn]) -> list[str]:
    """What a system says in a chat, each message of it."""
    return [turn["content"] for turn in turns if turn["role"] == SYSTEM]


def _turn(message: object, where: str) -> Turn:
    if not (isinstance(message, dict) and {"role", "content"} <= message.keys()):
        keys = f"the keys {list(message)}" if isinstance(message, dict) else type(message).__name__
        raise ConfigError(
            f"{where} must be an object with the keys 'role' and 'content', got {printable(keys, most=80)}. Rename its "
            "keys, or remove the row."
        )
    role, content = message["role"], message["content"]
    if role not in _ROLES:
        raise ConfigError(
            f"{where} must have one of the roles {', '.join(_ROLES)}, got {printable(repr(role), most=80)}. Rename it, "
            "or remove the row."
        )
    if not (isinstance(content, str) and content.strip()):
        raise ConfigError(
            f"{where} must have text as its 'content', got {printable(repr(content), most=80)}. Write text, or remove "
            "the message or the row."
        )
    return {"role": role, "content": content.strip()}
