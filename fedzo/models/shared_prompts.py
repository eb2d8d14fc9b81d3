"""One run of a prompt that several answers go on from: keys and values kept, and read for every answer.

The answers' forward reads the prompt's keys and values row by row of its own batch, one layer at a time, and keeps
nothing: what stays in memory is the prompts' cache alone, however many answers there are.
"""

from __future__ import annotations

import logging
from typing import Any, cast

import torch
from torch import nn

from fedzo.models.checks import mismatch, some_ids

logger = logging.getLogger(__name__)


def read_only(cache: Any, *, rows: torch.Tensor | None = None) -> Any:
    """The cache with layers that keep nothing of what they are given: one layer's keys and values live at a time.

    Args:
        cache: A filled cache of transformers; changed in place.
        rows: int64 [R]: which row of the cache each row of the coming forward goes on from; by default its own.
    """

    def update(before: tuple[torch.Tensor, torch.Tensor]) -> Any:
        def joined(keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
            ours = before if rows is None else (before[0][rows], before[1][rows])
            return torch.cat([ours[0], keys], dim=-2), torch.cat([ours[1], values], dim=-2)

        return joined

    for layer in cache.layers:
        layer.update = update((layer.keys, layer.values))  # not of the layer, which would then be in a cycle
    return cache


def run_prompts(model: nn.Module, ids: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """The decoder's output at the end of each prompt, and its cache.

    Args:
        model: A causal language model.
        ids: int64 [B, T], padded on the left, so that a sliding window holds a text's tokens and nothing else.
        lengths: int64 [B]: tokens of each prompt.

    Returns:
        [B, H] in the model's dtype, and the cache.
    """
    columns = torch.arange(ids.shape[1], device=ids.device)
    positions = columns - (ids.shape[1] - lengths).unsqueeze(1)
    given: dict[str, torch.Tensor] = {}
    if bool((lengths < ids.shape[1]).any()):
        given = {"attention_mask": (positions >= 0).long(), "position_ids": positions.clamp(min=0)}
    output = cast(Any, model).get_decoder()(input_ids=ids, use_cache=True, **given)
    return output.last_hidden_state[:, -1], output.past_key_values


def run_answers(
    model: nn.Module, cache: Any, ids: torch.Tensor, *, owners: torch.Tensor, lengths: torch.Tensor, width: int
) -> torch.Tensor:
    """The decoder's output at every token of answers that go on from cached prompts.

    Args:
        model: The same model.
        cache: Of ``run_prompts``; of no use afterwards.
        ids: int64 [R, T], padded on the right.
        owners: int64 [R]: each answer's prompt.
        lengths: int64 [B]: tokens of each prompt.
        width: Columns of the prompts' forward, padding included.

    Returns:
        [R, T, H] in the model's dtype.
    """
    columns = torch.arange(width + ids.shape[1], device=ids.device)
    positions = columns - (width - lengths[owners]).unsqueeze(1)
    given = {"position_ids": positions[:, width:]}
    if bool((lengths < width).any()):
        given["attention_mask"] = (positions >= 0).long()
    cache = read_only(cache, rows=owners)
    output = cast(Any, model).get_decoder()(input_ids=ids, past_key_values=cache, use_cache=True, **given)
    return cast(torch.Tensor, output.last_hidden_state)


@torch.inference_mode()
def check_cache(model: nn.Module) -> bool:
    """Whether answers on top of cached prompts of unequal lengths give what whole sequences give."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    device = next(model.parameters()).device
    whole = some_ids(model, 2, 11)
    lengths, owners = torch.tensor([5, 8], device=device), torch.tensor([1, 0, 1], device=device)
    try:
        decoder = cast(Any, model).get_decoder()
        prompts = torch.stack([torch.cat([whole[0, :3] * 0, whole[0, :5]]), whole[1, :8]])
        ends, cache = run_prompts(model, prompts, lengths)
        layers = {DynamicLayer, DynamicSlidingWindowLayer}  # others also keep states that are no keys and values
        if not all(type(layer) in layers for layer in cache.layers):
            return False
        answers = torch.stack([whole[1, 8:], whole[0, 5:8], whole[1, 8:]])
        on_top = run_answers(model, cache, answers, owners=owners, lengths=lengths, width=8)
        ours = torch.cat([ends, on_top.flatten(0, 1)])
        own = [
            decoder(input_ids=row[:end].unsqueeze(0)).last_hidden_state[0]
            for row, end in zip(whole, (8, 11), strict=True)
        ]
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        logger.debug("%s: its prompts are not shared among candidates (%s)", type(model).__name__, error)
        return False
    expected = torch.cat([own[0][4:5], own[1][7:8], own[1][8:], own[0][5:], own[1][8:]])
    return not mismatch(ours, expected)
