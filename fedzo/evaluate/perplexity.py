"""Perplexity: how well a model predicts running text, the exponential of its mean loss of a token.

Documents are joined end to end with nothing between them, and the whole is tokenised once, without special tokens. The
tokens are cut into windows of one length, each after the other, and what is left at the end is dropped. A window is a
text of its own: its first token has no loss, its second is predicted from the first alone. So a figure depends on the
length of the windows, and on which of them were taken: compare models on the same ones.

Where the tokenizer begins every text with a token of its own, that one stands in place of a window's first: some models
(Gemma) are lost without it. So the same tokens are predicted with it and without. Deviation from papers that cut one
long text (GPTQ, arXiv 2210.17323; SpaLLM, arXiv 2410.06364): only their first window begins with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedzo.data.config import Loss
from fedzo.data.encode import Example, opening
from fedzo.errors import ConfigError, NumericsError
from fedzo.models.checks import check_ids, num_positions
from fedzo.models.loaded import LoadedModel
from fedzo.models.scoring import mean_loss
from fedzo.system import OnProgress

_MAX_LOSS = 700.0  # exp of a little more is beyond any float


@dataclass(frozen=True, slots=True)
class Perplexity:
    """A measurement.

    Attributes:
        value: exp of the mean cross-entropy, in nats, of the predicted tokens.
        num_windows: Windows that it is the mean over.
        num_tokens: Tokens that were predicted: all of the windows but the first of each.
    """

    value: float
    num_windows: int
    num_tokens: int


def text_windows(
    loaded: LoadedModel, documents: Sequence[str], *, num_tokens: int, num_windows: int | None = None, source: str
) -> torch.Tensor:
    """The first windows of the documents, joined and cut as the module says.

    Args:
        loaded: Whose tokenizer cuts the text into tokens.
        documents: The texts, in order.
        num_tokens: T, the length of a window.
        num_windows: N; None for all that there are.
        source: Where the documents are from, for errors.

    Returns:
        int64 [N, T], on the CPU.

    Raises:
        ConfigError: The text is shorter than that, a window does not fit the model, or a token has no embedding.
    """
    longest = num_positions(loaded.model)
    if num_tokens < 2 or (longest is not None and num_tokens > longest):
        rule = "have at least 2 tokens" + (f" and at most {longest:,}, the model's positions" if longest else "")
        raise ConfigError(f"a window must {rule}, got {num_tokens:,}. Choose another length of the windows.")
    (ids,) = loaded.tokenizer(["".join(documents)], add_special_tokens=False, verbose=False)["input_ids"]
    there = len(ids) // num_tokens
    if there < (num_windows or 1):
        raise ConfigError(
            f"{source}: must hold at least {num_windows or 1} x {num_tokens:,} tokens (windows x their length), got "
            f"{len(ids):,} tokens of {len(documents):,} documents. Give more text, or take fewer or shorter windows."
        )
    taken = ids[: (num_windows or there) * num_tokens]
    check_ids(loaded.model, taken, where=source)
    windows = torch.tensor(taken, dtype=torch.int64).view(-1, num_tokens)
    if (begin := opening(loaded.tokenizer)) is not None:
        windows[:, 0] = begin
    return windows


def perplexity(loaded: LoadedModel, windows: torch.Tensor, *, on_window: OnProgress | None = None) -> Perplexity:
    """The perplexity of a model on windows of text.

    One window runs at a time, whatever the device, and logits are made for a part of it at a time. Logits become losses
    in float32 whatever the dtype of the model, and losses are summed in float64.

    Args:
        loaded: The model, which is left as it is.
        windows: int64 [N, T], N >= 1 and T >= 2.
        on_window: Called after each window with windows done and in total.

    Raises:
        NumericsError: The loss of a window is not finite, or has no exponential.
    """
    num_windows, num_tokens = windows.shape
    total = 0.0
    for number, (first, *rest) in enumerate(windows.tolist(), start=1):
        text = Example(prompt=(first,), candidates=(tuple(rest),), label=0)
        loss = mean_loss(loaded, [text], loss=Loss.lm, tokens_per_batch=num_tokens)
        if not loss <= _MAX_LOSS:
            raise NumericsError(
                f"perplexity: the loss of window {number} must be finite and at most {_MAX_LOSS:g}, got {loss:g}. "
                "Write model.dtype=float32, or take another model."
            )
        total += loss
        if on_window is not None:
            on_window(number, num_windows)
    return Perplexity(math.exp(total / num_windows), num_windows, num_windows * (num_tokens - 1))
