"""Greedy generation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from fedzo.data.chat import chat_end
from fedzo.data.config import TaskKind
from fedzo.errors import ConfigError
from fedzo.models.checks import mismatch, num_positions, num_rows, said_by_both
from fedzo.models.loaded import LoadedModel
from fedzo.models.memory import cache_tokens
from fedzo.models.plan import FEW_FORWARDS, plan_batches
from fedzo.models.virtual_tokens import num_virtual_tokens
from fedzo.system import OnProgress


def generate(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    tokens_per_batch: int,
    ends: Iterable[int] = (),
    stop_at_newline: bool = False,
    on_batch: OnProgress | None = None,
    before: Callable[[list[int]], None] | None = None,
) -> list[str]:
    """The most probable next tokens of each prompt, as text; no randomness is drawn.

    Args:
        loaded: The model.
        prompts: Token ids of each prompt, none empty, and with room for an answer behind it.
        max_new_tokens: Longest answer.
        tokens_per_batch: Memory of a batch, in tokens of one forward: for prompts padded and the new ones.
        ends: Tokens that end an answer, beside the tokenizer's end and those of the model (``answer_ends``).
        stop_at_newline: Keep the first line of an answer only, and stop there.
        on_batch: Called after each batch with prompts done and in total.
        before: Called before each batch with the numbers of its prompts, where rows have weights of their own.

    Returns:
        The answers in the order of the prompts, without special tokens and outer white space.

    Raises:
        ConfigError: A prompt is empty, or the model has too few positions for it and an answer.
    """
    tokenizer = loaded.tokenizer
    stops = end_tokens(loaded).union(ends)
    if stop_at_newline:
        stops |= _newline(tokenizer)
    answers = generate_tokens(
        loaded,
        prompts,
        ends=stops,
        max_new_tokens=max_new_tokens,
        tokens_per_batch=tokens_per_batch,
        on_batch=on_batch,
        before=before,
    )
    texts = [tokenizer.decode(_until(tokens, stops), skip_special_tokens=True) for tokens in answers]
    return [(text.split("\n", 1)[0] if stop_at_newline else text).strip() for text in texts]


@torch.inference_mode()
def generate_tokens(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    *,
    ends: set[int],
    max_new_tokens: int,
    tokens_per_batch: int,
    on_batch: OnProgress | None = None,
    before: Callable[[list[int]], None] | None = None,
    change: LogitsProcessor | None = None,
) -> list[list[int]]:
    """The most probable next tokens of each prompt, as they come: behind an answer's end may lie padding.

    Args:
        loaded: The model.
        prompts: As in ``generate``.
        ends: Tokens that end an answer, and belong to it.
        max_new_tokens: As in ``generate``.
        tokens_per_batch: As in ``generate``.
        on_batch: As in ``generate``.
        before: As in ``generate``.
        change: Changes a batch's logits before the highest is taken.

    Raises:
        ConfigError: A prompt is empty, or the model has too few positions for it and an answer.
    """
    if not all(prompts):
        raise ConfigError("every prompt must have at least one token, got an empty one. Check the task's template.")
    tokenizer = loaded.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(end_tokens(loaded)), 0)
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad,
    )
    virtual = num_virtual_tokens(loaded.model)
    if (longest := num_positions(loaded.model)) is not None:
        _check_room(prompts, max_new_tokens, virtual=virtual, longest=longest)
    answers: list[list[int]] = [[] for _ in prompts]
    num_done = 0
    lengths = [virtual + len(prompt) + max_new_tokens for prompt in prompts]
    if before is not None and prompts:
        before([0])  # whose weights the row of ``_ignores_padding`` has
    # padding would lie between virtual tokens and text, and use up a sliding window: then no batch has any
    padded = virtual == 0 and len(set(lengths)) > 1 and _ignores_padding(loaded, pad)
    changes = {} if change is None else {"logits_processor": LogitsProcessorList([change])}
    most = max(1, int(tokens_per_batch / max(1.0, cache_tokens(loaded.model))))  # of each, keys and values are kept
    for batch in _batches(lengths, tokens_per_batch=most, padded=padded):
        width = max(len(prompts[i]) for i in batch)
        ids = torch.tensor([[pad] * (width - len(prompts[i])) + list(prompts[i]) for i in batch])
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in batch])
        if before is not None:
            before(batch)
        output = _generated(loaded, ids, mask, settings, **changes)
        for i, tokens in zip(batch, output[:, width:].tolist(), strict=True):
            answers[i] = tokens
        num_done += len(batch)
        if on_batch is not None:
            on_batch(num_done, len(prompts))
    return answers


def _check_room(prompts: Sequence[Sequence[int]], max_new_tokens: int, *, virtual: int, longest: int) -> None:
    """Refuse prompts whose answer would end behind the model's last position: cut, they would ask something else."""
    taken = f"{max_new_tokens} tokens of an answer" + (f" and {virtual} virtual ones" if virtual else "")
    for number, prompt in enumerate(prompts):
        if len(prompt) + virtual + max_new_tokens > longest:
            raise ConfigError(
                f"prompt {number} must fit into the model's {longest} positions together with {taken}, got "
                f"{len(prompt)} tokens. Shorten it, or lower --max-new-tokens."
            )


def _generated(
    loaded: LoadedModel, ids: torch.Tensor, mask: torch.Tensor, settings: GenerationConfig, **changes: Any
) -> Any:
    """Transformers' ``generate`` by these settings alone.

    It would take what they leave open from the checkpoint: a penalty on tokens that the prompt has, tokens that are
    never said, a time after which it stops.
    """
    model: Any = loaded.model
    own, model.generation_config = model.generation_config, GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        return model.generate(
            ids.to(loaded.device), attention_mask=mask.to(loaded.device), generation_config=settings, **changes
        )
    finally:
        model.generation_config = own


def _ignores_padding(loaded: LoadedModel, pad: int) -> bool:
    """Whether a prompt with padding before it gives the logits that it gives alone.

    It does not where positions are counted from the first column, or where a state goes through the padding (RWKV).
    """
    ids = torch.arange(4, device=loaded.device)[None] + num_rows(loaded.model) // 4
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=2, do_sample=False, pad_token_id=pad, output_logits=True, return_dict_in_generate=True
    )
    logits = []
    for num_pads in (0, 3):
        before = ids.new_zeros(1, num_pads)
        mask = torch.cat([before, torch.ones_like(ids)], dim=1)
        output = _generated(loaded, torch.cat([before + pad, ids], dim=1), mask, settings)
        logits.append(torch.stack(output.logits).float())
    alone, padded = logits
    said = said_by_both(alone, padded)
    return not mismatch(padded[said], alone[said], dtype=next(loaded.model.parameters()).dtype)


def _batches(lengths: Sequence[int], *, tokens_per_batch: int, padded: bool) -> Iterator[list[int]]:
    """Batches of as many sequences as fit; without padding, of one length each."""
    groups: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        groups.setdefault(0 if padded else length, []).append(i)
    for group in groups.values():
        of_group = [lengths[i] for i in group]
        for batch in plan_batches(of_group, tokens_per_batch=tokens_per_batch, forward_cost_tokens=FEW_FORWARDS):
            yield [group[i] for i in batch]


def answer_ends(tokenizer: Any, kind: TaskKind) -> set[int]:
    """Tokens at which the score of a task of this kind stops to read an answer, beside the model's own ends."""
    if kind is TaskKind.instruction:
        return chat_end(tokenizer)
    return _newline(tokenizer) if kind is TaskKind.generation else set()


def end_tokens(loaded: LoadedModel) -> set[int]:
    """What ends an answer: the tokenizer's end, and those of the model (a chat model may have several)."""
    named = getattr(cast(Any, loaded.model).generation_config, "eos_token_id", None)
    ends = {named} if isinstance(named, int) else set(named or ())
    return ends | ({loaded.tokenizer.eos_token_id} - {None})


def _until(tokens: list[int], ends: set[int]) -> list[int]:
    """The tokens up to the first that ends an answer, with it."""
    size = next((place for place, token in enumerate(tokens, 1) if token in ends), None)
    return tokens[:size]


def _newline(tokenizer: Any) -> set[int]:
    """The token of a line's end behind a text if it is one; otherwise the text is cut afterwards."""
    tokens = tokenizer.encode("a\n", add_special_tokens=False)
    return {tokens[-1]} if tokenizer.decode(tokens[-1:]) == "\n" else set()
