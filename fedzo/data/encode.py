"""Rows to token ids.

Prompt and answer are tokenised together, as the model would read them, and parted where the prompt's own tokens end.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Protocol

from fedzo.data.chat import chat_end, chat_opening, chat_texts
from fedzo.data.config import TaskConfig, TaskKind
from fedzo.data.conversation import Turn, system_texts
from fedzo.data.encode_warnings import (
    tell_endless_answers,
    tell_endless_turns,
    tell_other_texts,
    tell_other_tokens,
    tell_special_tokens,
    tell_unread_system,
)
from fedzo.data.files import Row
from fedzo.data.tasks import Rendered, beginning, render
from fedzo.errors import ConfigError

_FORMAT = "fedzo-prompt/4"  # change it when rendering or derivations change, so that old and new sites do not mix
_SAMPLE = "a"  # a text on which is seen what the tokenizer puts before and after one
_BLOCK_CHARS = 1 << 20  # tokenised at once: what a tokenizer holds of a text takes far more room than its tokens


@dataclass(frozen=True, slots=True)
class Example:
    """A row as the model sees it: token ids.

    Attributes:
        prompt: Token ids of the prompt; never empty.
        candidates: Token ids of each answer that may follow it; one entry, the answer to learn, for generation and
            instruction.
        label: Index of the right candidate.
        references: All right answers as text, the one to learn first (generation, instruction).
        cut: Whether the prompt or the right answer lost tokens, so that both fit ``task.max_length``.
        written_from: Token ids of the prompt from which a model writes an answer of its own, where they are others than
            ``prompt``: that one is cut by the length of the right answer, and ends before a token that the two share.
        written_cut: Whether that one lost tokens, so that ``task.max_new_tokens`` fit behind it.
        one_token: Whether each answer is a single token, so that one forward of the prompt serves them all.
    """

    prompt: tuple[int, ...]
    candidates: tuple[tuple[int, ...], ...]
    label: int
    references: tuple[str, ...] = ()
    cut: bool = False
    written_from: tuple[int, ...] = ()
    written_cut: bool = False
    one_token: bool = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "one_token", all(len(candidate) == 1 for candidate in self.candidates))

    @property
    def generation_prompt(self) -> tuple[int, ...]:
        """The prompt that a model writes an answer to, whatever the right one is."""
        return self.written_from or self.prompt

    @property
    def scored_cut(self) -> bool:
        """Whether a score of the row, its loss or what is written, goes by a text that lost tokens."""
        return self.cut or self.written_cut


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    @property
    def bos_token_id(self) -> int | None:
        """Token that begins every text, if the tokenizer has one."""

    def __call__(self, text: list[str], *, add_special_tokens: bool, verbose: bool) -> Mapping[str, Any]:
        """Token ids of each text under ``input_ids``."""

    def apply_chat_template(self, conversation: list[Turn], *, tokenize: bool, add_generation_prompt: bool) -> Any:
        """The conversation as the text that the model was tuned on."""


def encode(rows: Sequence[Row], task: TaskConfig, *, tokenizer: Tokenizer, max_length: int) -> list[Example]:
    """Render rows and tokenise them.

    The answer's tokens are those after the prompt's; where a token spans the border, the parting moves left to the
    longest prefix that the prompt and all candidates share, so that each answer has a token. Where candidates do not
    begin alike, all tokens that they share are the prompt's, which alone may have others at its end. What the
    tokenizer puts behind every text is part of an answer that is written, since it ends there, but of no candidate. An
    ``instruction`` goes through the tokenizer's chat template, and its answer ends with the turn. A longer prompt loses
    its beginning, but not what the tokenizer or the chat template puts before it, with a system message that comes
    first; a longer reference answer loses its end, so that half of ``max_length`` is left for the prompt.
    ``Example.cut`` tells. The prompt that an answer is written from is that of ``encode_prompts`` or
    ``encode_instructions``, with room for ``task.max_new_tokens`` behind it, by the same rule.

    Args:
        rows: The rows.
        task: Its templates; all candidates are encoded for ``kind=candidates`` whatever the training loss, since the
            score needs them.
        tokenizer: A transformers tokenizer.
        max_length: Most tokens of prompt and longest answer together.

    Raises:
        ConfigError: A row does not fit the task, candidates do not fit ``max_length``, or there is no chat template.
    """
    examples: list[Example] = []
    for first, block in _blocks(rows, task):
        examples += _encode_block(block, task, tokenizer=tokenizer, max_length=max_length, first=first)
    return examples


def _blocks(rows: Sequence[Row], task: TaskConfig) -> Iterator[tuple[int, list[Rendered]]]:
    """Rendered rows that are tokenised at once, and the number of the first.

    Without rows one empty block, so that a tokenizer that cannot serve is refused all the same.
    """
    block: list[Rendered] = []
    num_chars = 0
    for number, row in enumerate(rows):
        rendered = _render(number, row, task)
        more = sum(len(rendered.prompt) + len(answer) for answer in ("", *rendered.answers))
        if block and num_chars + more > _BLOCK_CHARS:
            yield number - len(block), block
            block, num_chars = [], 0
        block.append(rendered)
        num_chars += more
    yield len(rows) - len(block), block


def _encode_block(
    rendered: list[Rendered], task: TaskConfig, *, tokenizer: Tokenizer, max_length: int, first: int
) -> list[Example]:
    """As ``encode``; ``first`` is the number of the first row."""
    names = [row_name(number, row.prompt) for number, row in enumerate(rendered, first)]
    texts, add_special_tokens = _texts(rendered, task, tokenizer, names=names)
    if not rendered:
        return []
    tell_special_tokens(rendered, task, tokenizer)
    ids = _ids(texts, tokenizer, add_special_tokens=add_special_tokens, names=names)
    begins, num_after, turn_end = _frame(task, tokenizer, systems={row.system for row in rendered})
    is_written = task.kind is not TaskKind.candidates
    num_behind = 0 if is_written else num_after
    room_to_write = max(max_length - task.max_new_tokens, max_length // 2)
    examples, start = [], 0
    known: dict[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]] = {}  # most rows have the same candidates
    for name, group, row in zip(names, texts, rendered, strict=True):
        prompt, *joint = (tuple(tokens) for tokens in ids[start : start + len(group)])
        start += len(group)
        prompt, joint = prompt[: len(prompt) - num_after], [tokens[: len(tokens) - num_behind] for tokens in joint]
        part_at_once = len({answer.encode(errors="replace")[0] for answer in row.answers}) > 1
        # the prompt alone may end in other tokens: GPT-2's split joins two line breaks, but not before a word
        shared = _common(joint[0], joint[1:]) if part_at_once else _common(prompt, joint)
        cut = min(shared, min(map(len, joint)) - 1)
        if is_written and cut < len(prompt) and group[1].startswith(group[0]):
            tell_other_tokens(task)
        whole = answers = tuple(_through(tokens[cut:], turn_end) for tokens in joint)
        if cut < 1:
            raise ConfigError(f"{name}: the prompt must have a token of its own, got none. Extend task.template.")
        if answers.count(answers[row.label]) > 1:
            raise ConfigError(
                f"{name}: the right candidate must have tokens that no other has, but {row.answers[row.label]!r} "
                "and another are the same tokens to this model. Correct the row, word task.candidates otherwise, or "
                "choose another model."
            )
        if is_written:
            room = max(max_length - cut, max_length // 2)
            whole, answers = answers, tuple(answer[:room] for answer in answers)
        begin = begins[row.system]
        head = _shortened(joint[0][:cut], max_length - max(map(len, answers)), begin=begin)
        if not head:
            raise ConfigError(
                f"{name}: the longest candidate has {max(map(len, answers))} tokens and task.max_length is "
                f"{max_length}, no room is left for the prompt. Raise task.max_length or shorten the candidates."
            )
        asked = _shortened(prompt, room_to_write, begin=begin) if is_written else head
        examples.append(
            Example(
                prompt=head,
                candidates=known.setdefault(answers, answers),
                label=row.label,
                references=row.references,
                cut=len(head) < cut or answers != whole,
                written_from=() if asked == head else asked,
                written_cut=is_written and len(asked) < len(prompt),
            )
        )
    return examples


def encode_prompts(texts: Sequence[str], tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """Token ids of texts that the model is to go on from: what the tokenizer puts after a text is left out.

    Some tokenizers end every text with an end-of-text token, after which a model begins another text. The prompts of
    rows never have it, since the answer follows in the same text (``encode``).

    Args:
        texts: The texts.
        tokenizer: A transformers tokenizer.

    Returns:
        Token ids of each text, with what the tokenizer puts before it.
    """
    _, num_after = _around(tokenizer)
    ids = tokenizer(list(texts), add_special_tokens=True, verbose=False)["input_ids"] if texts else []
    return [tuple(tokens[: len(tokens) - num_after]) for tokens in ids]


def opening(tokenizer: Tokenizer) -> int | None:
    """The token that the tokenizer begins every text with, if it does: the last, where it puts several before it."""
    before, _ = _around(tokenizer)
    return before[-1] if before else None


def row_name(number: int, prompt: str) -> str:
    """How a message names a row: by its number among those that are encoded together, and by its prompt."""
    return f"row {number}, {beginning(prompt)}"


def task_digest(task: TaskConfig) -> str:
    """SHA-256 (hex) of all that defines prompts, answers and labels; sites with the same digest read a row alike."""
    fields = [task.kind, task.template, task.candidates, task.label, task.labels, task.answer, task.derive]
    if task.messages or task.system:  # others keep the digest that they had before
        fields += [task.messages, task.system]
    return hashlib.sha256(json.dumps([_FORMAT, *fields], ensure_ascii=True).encode("ascii")).hexdigest()


def _around(tokenizer: Tokenizer) -> tuple[tuple[int, ...], int]:
    """The tokens that the tokenizer puts before every text, and how many it puts after it."""
    plain, whole = (
        tokenizer([_SAMPLE], add_special_tokens=special, verbose=False)["input_ids"][0] for special in (False, True)
    )
    starts = [at for at in range(len(whole)) if whole[at : at + len(plain)] == plain]
    if not (plain and starts):
        return (), 0
    return tuple(whole[: starts[0]]), len(whole) - starts[0] - len(plain)


def _frame(
    task: TaskConfig, tokenizer: Tokenizer, *, systems: Set[str]
) -> tuple[Mapping[str, tuple[int, ...]], int, set[int]]:
    """What cut prompts begin with, by system message; how many tokens follow a text; what ends an answer in a chat."""
    if task.kind is not TaskKind.instruction:
        before, num_after = _around(tokenizer)
        bos: tuple[int, ...] = () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)
        if not num_after:
            tell_endless_answers(task, tokenizer)
        return dict.fromkeys(systems, before or bos), num_after, set()  # a template may write BOS itself
    if not (turn_end := chat_end(tokenizer)):
        tell_endless_turns(task)
    return {system: chat_opening(tokenizer, system=system) for system in systems}, 0, turn_end


def _render(number: int, row: Row, task: TaskConfig) -> Rendered:
    try:
        return render(row, task)
    except ConfigError as error:
        raise ConfigError(f"row {number}: {error}") from error


def _texts(
    rendered: list[Rendered], task: TaskConfig, tokenizer: Tokenizer, *, names: Sequence[str]
) -> tuple[list[list[str]], bool]:
    """Of each row the prompt, then the prompt with each answer; and whether special tokens are to be added."""
    if task.kind is not TaskKind.instruction:
        return [[row.prompt, *(row.prompt + answer for answer in row.answers)] for row in rendered], True
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            f"task {task.name!r} (kind=instruction) needs a tokenizer with a chat template, this model's has none. "
            "Choose an instruction-tuned model, or task.kind=generation with a template of your own."
        )
    texts = []
    for name, row in zip(names, rendered, strict=True):
        try:
            texts.append(chat_texts(row.chat, row.answers[0], tokenizer))
        except Exception as error:  # whatever the template's own code raises
            has_system = bool(system_texts(row.chat))
            raise _unencodable(name, "chat template", error, has_system=has_system) from error
    if not all(answered.startswith(asked) for asked, answered in texts):
        tell_other_texts(task)
    both = zip(rendered, texts, strict=True)
    if any(said not in asked for row, (asked, _) in both for said in system_texts(row.chat)):
        tell_unread_system(task)
    return texts, False  # a chat template writes its special tokens itself


def _ids(
    texts: list[list[str]], tokenizer: Tokenizer, *, add_special_tokens: bool, names: Sequence[str]
) -> list[list[int]]:
    """Token ids of all texts, one after another."""
    flat = [text for group in texts for text in group]
    if not flat:
        return []
    try:
        ids: list[list[int]] = tokenizer(flat, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
    except Exception as error:  # each tokenizer has errors of its own; whose text is it?
        for name, group in zip(names, texts, strict=True):
            try:
                tokenizer(group, add_special_tokens=add_special_tokens, verbose=False)
            except Exception as own:
                raise _unencodable(name, "tokenizer", own) from own
        raise ConfigError(f"the tokenizer cannot encode these rows: {type(error).__name__}: {error}") from error
    return ids


def _unencodable(name: str, what: str, error: Exception, *, has_system: bool = False) -> ConfigError:
    remedy = "Begin the user's first message with what the system says, correct" if has_system else "Correct"
    return ConfigError(
        f"{name}: the model's {what} must take its text, but raises {type(error).__name__}: "
        f"{' '.join(str(error).split())[:200]}. {remedy} or remove the row, or choose another model."
    )


def _through(tokens: tuple[int, ...], ends: set[int]) -> tuple[int, ...]:
    """The tokens up to the last of ``ends``, with it; all where there is none. The user's turn may end in them, too."""
    return tokens[: max((at for at, token in enumerate(tokens, 1) if token in ends), default=None)]


def _common(prompt: tuple[int, ...], others: Sequence[tuple[int, ...]]) -> int:
    """Length of the longest prefix that all share."""
    for at, tokens in enumerate(zip(prompt, *others, strict=False)):
        if len(set(tokens)) > 1:
            return at
    return min(len(prompt), *(len(other) for other in others))


def _shortened(prompt: tuple[int, ...], room: int, *, begin: tuple[int, ...]) -> tuple[int, ...]:
    """The last ``room`` tokens, of which the first are those of ``begin`` that the prompt begins with, half at most."""
    if len(prompt) <= room:
        return prompt
    if room < 1:
        return ()
    kept = min(_common(prompt, [begin]), room // 2)
    return (*prompt[:kept], *prompt[len(prompt) - room + kept :])
