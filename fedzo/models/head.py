"""Logits at chosen positions only: the decoder runs on all tokens, the LM head on the rows that are asked for.

What some families do to their logits (Gemma 2 caps them, Cohere, Granite and Falcon H1 scale them) is taken from the
config's attributes. ``check_head`` compares the outcome with the model's own logits once, so that any other habit is
found out.
"""

from __future__ import annotations

import logging
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from fedzo.models.checks import mismatch, some_ids, text_config

logger = logging.getLogger(__name__)


def hidden_at(
    model: nn.Module, ids: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, *, decoder: Any = None
) -> torch.Tensor:
    """The decoder's output at the positions ``(rows[i], columns[i])``.

    Args:
        model: A causal language model.
        ids: int64 [B, T], padded on the right: causal positions before a pad do not see it, so no mask is needed.
        rows: int64 [N].
        columns: int64 [N].
        decoder: Called in place of the model's own.

    Returns:
        [N, H] in the model's dtype.
    """
    output = (decoder or cast(Any, model).get_decoder())(input_ids=ids)
    return cast(torch.Tensor, output.last_hidden_state[rows, columns])


def own_logits_at(model: nn.Module, ids: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """The model's own logits at the positions, float32 [N, V]: for models whose head cannot be applied apart."""
    return cast(torch.Tensor, model(input_ids=ids).logits[rows, columns].float())


def project(model: nn.Module, hidden: torch.Tensor, *, vocabulary: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of hidden states.

    A few rows of the head are multiplied in float32, so that a low-precision model loses nothing there; the whole head
    in the model's dtype, since a float32 copy of it would not fit the memory target.

    Args:
        model: A causal language model.
        hidden: [N, H].
        vocabulary: int64 [C], the token ids wanted; ``None`` for all.

    Returns:
        float32 [N, C] or [N, V].
    """
    head = _head(model)
    if vocabulary is None:
        return _finish(model, head(hidden).float())
    if type(head) is not nn.Linear:  # a wrapped head: only its forward is known to be right
        return _finish(model, head(hidden).float()[:, vocabulary])
    bias = None if head.bias is None else head.bias[vocabulary].float()
    return _finish(model, F.linear(hidden.float(), head.weight[vocabulary].float(), bias))


@torch.inference_mode()
def check_head(model: nn.Module) -> bool:
    """Whether ``project(hidden_at(...))`` equals the model's own logits on two rows of eight tokens."""
    device = next(model.parameters()).device
    ids = some_ids(model, 2, 8)
    rows, columns = torch.tensor([0, 0, 1], device=device), torch.tensor([0, 7, 5], device=device)
    own = own_logits_at(model, ids, rows, columns)
    try:
        ours = project(model, hidden_at(model, ids, rows, columns))
    except (AttributeError, TypeError, RuntimeError) as error:
        logger.warning(
            "%s: its LM head cannot be applied separately (%s); it is applied at all positions",
            type(model).__name__,
            error,
        )
        return False
    if not mismatch(ours, own, dtype=next(model.parameters()).dtype):
        return True
    logger.warning(
        "%s changes its logits in an unknown way; its LM head is applied at all positions", type(model).__name__
    )
    return False


def _head(model: nn.Module) -> nn.Module:
    head = cast(Any, model).get_output_embeddings()
    if head is None:
        raise AttributeError(f"{type(model).__name__} names no output embeddings")
    return cast(nn.Module, head)


def _finish(model: nn.Module, logits: torch.Tensor) -> torch.Tensor:
    config = text_config(model)
    if isinstance(scale := getattr(config, "logit_scale", None), int | float):  # Cohere
        logits = logits * scale
    if isinstance(multiplier := getattr(config, "lm_head_multiplier", None), int | float):  # Falcon H1
        logits = logits * multiplier
    if isinstance(scaling := getattr(config, "logits_scaling", None), int | float):  # Granite
        logits = logits / scaling
    if isinstance(cap := getattr(config, "final_logit_softcapping", None), int | float):  # Gemma
        logits = torch.tanh(logits / cap) * cap
    return logits
