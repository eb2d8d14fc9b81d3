"""What must hold of a model before a run trains it: finite weights, rows for all tokens, and causality.

A model that breaks one of these trains all the same, or fails rounds later with an error about something else. So each
is measured on the loaded model, in a few forwards, whatever its files claim.

Other modules compare a faster computation with the model's own before they use it: ``some_ids`` and ``mismatch``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import nn

from fedzo.errors import ConfigError, some

NUM_TOKENS = 8
_NUM_TEXTS = 3
_MASKED = 1e4
BOUND, EXPERTS_16_BITS_BOUND, PACKED_BOUND = 1e-5, 1e-2, 3e-2
"""How far another last token may move earlier logits, as a share of the largest |logit|.

A token's numbers are computed from its own and those before it, in the same order whatever comes after: causal families
move by nothing, in 16 bits as well. Experts get batches of another size, which moves last bits: by 4e-7 in float32, by
some of three digits in 16 bits. Packed weights (8 or 4 bits) may round a column of activations in another way for one
more token. Models that look ahead moved by 4e-2 and more, and by 1e-3 with weights so small that they say nothing.
"""
_EXPERTS = ("expert", "moe", "router")
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}  # of the largest |value|


def check_finite(model: nn.Module, files: Iterable[Path], *, name: str) -> None:
    """Every weight is a finite number: one that is not makes each loss NaN, whatever the learning rate.

    Args:
        model: The model as it is held.
        files: What it was read from, to tell where the weight stands.
        name: ``model.name``, for the error.

    Raises:
        ConfigError: A weight is NaN or infinite, in the files or as held.
    """
    parameters = list(model.named_parameters())
    packed = any(_is_packed(each) for _, each in parameters)
    bad = [] if packed else [(own, each) for own, each in parameters if not _is_finite(each)]
    searched = [file for file in files if file.suffix == ".safetensors"] if bad or packed else []
    if stored := [f"{key} in {file.name}" for file in searched for key in _not_finite_in(file)]:
        raise ConfigError(
            f"model.name {name!r} must hold finite weights, but NaN or infinity stands in {some(stored)}. Copy the "
            "files again, or take another checkpoint: this one was damaged or diverged."
        )
    if bad:
        held = str(bad[0][1].dtype).removeprefix("torch.")
        raise ConfigError(
            f"model.name {name!r} must hold finite weights, but {some([own for own, _ in bad])} holds NaN or infinity "
            f"in {held}. Write model.dtype=float32 if the files hold numbers that {held} cannot; else copy them again."
        )


def check_tokens(model: nn.Module, tokenizer: Any, *, name: str) -> None:
    """Every token of the vocabulary, and every special one in use, has a row of the embedding.

    An added token without a role may lack one, as in checkpoints that are a part of a larger model; a text that holds
    it is refused when it is encoded (``check_ids``).

    Raises:
        ConfigError: Tokens have ids beyond the embedding.
    """
    rows = num_rows(model)
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= rows}
    if not beyond:
        return
    added = set(tokenizer.get_added_vocab())
    template = str(getattr(tokenizer, "chat_template", None) or "")
    named = type(tokenizer).SPECIAL_TOKENS_ATTRIBUTES  # its own list has every `*_token` of tokenizer_config.json, too
    roles = {token for role, token in tokenizer.special_tokens_map.items() if role in named}
    used = [token for token in beyond if token not in added or token in roles or token in template]
    if used:
        shown = [f"{token!r} (id {beyond[token]})" for token in sorted(used, key=beyond.__getitem__)]
        raise ConfigError(
            f"model.name {name!r}: the tokenizer has {len(tokenizer)} tokens and the embedding {rows} rows, so "
            f"{some(shown)} has none. Take the tokenizer that belongs to the weights, or save the model after "
            "model.resize_token_embeddings(len(tokenizer))."
        )


def check_ids(model: nn.Module, ids: Iterable[int], *, where: str) -> None:
    """Every token of a text has a row of the embedding.

    Raises:
        ConfigError: One has not.
    """
    rows, most = num_rows(model), max(ids, default=0)
    if most >= rows:
        raise ConfigError(
            f"{where}: every token must have a row of the model's embedding, which has {rows}, but the text holds the "
            f"token with id {most}. Change the text, or take the tokenizer that belongs to the weights."
        )


@torch.inference_mode()
def check_causal(model: nn.Module, *, name: str) -> None:
    """Another last token moves no earlier logit by more than rounding, and a forward writes to no weight.

    Where a token sees those after it, an answer sees itself: losses fall and accuracy rises without any learning.
    Texts run one at a time. A model must pass on one of three texts: experts that are chosen by a hair may change with
    the last bits of a 16-bit forward, but hardly in every text, while a model that looks ahead does so in each.

    Raises:
        ConfigError: The model looks ahead, gives no numbers, or changes its weights as it runs.
    """
    versions = [parameter._version for parameter in model.parameters()]
    bound, moved = _bound(model), math.inf
    for text in range(_NUM_TEXTS):
        this = _moved(model, text)
        if math.isnan(this):
            dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
            raise ConfigError(
                f"model.name {name!r}: the logits of a {type(model).__name__} must be finite, but are not in {dtype}, "
                "while its weights are. Write model.dtype=float32 if it is another, or correct its config.json."
            )
        moved = min(moved, this)
        if moved <= bound:
            break
    else:
        raise ConfigError(
            f"model.name {name!r} must be a causal language model, but a {type(model).__name__} is none as it is "
            f"configured: another last token moves the logits before it by {moved:.1%} of the largest (at most "
            f"{bound:g}), so that an answer sees itself. Take a decoder model such as Llama, Qwen or GPT-2 (where "
            "this one was trained as a decoder, its config.json must say is_decoder=true)."
        )
    if versions != [parameter._version for parameter in model.parameters()]:
        raise ConfigError(
            f"model.name {name!r}: a forward of {type(model).__name__} must leave the weights as they are, but writes "
            "to them. Take another model."
        )


def num_positions(model: nn.Module) -> int | None:
    """Tokens of the longest text that the model has positions for; None where there is no limit."""
    there = getattr(text_config(model), "max_position_embeddings", None)
    return there if isinstance(there, int) and there > 0 else None


def positions_alone(model: nn.Module) -> int | None:
    """Tokens of the longest text whose positions depend on no text beside it; None where they never do.

    longrope has frequencies for short texts and others for long ones. transformers takes one of the two for a whole
    batch, by its longest text.
    """
    rope = getattr(text_config(model), "rope_parameters", None) or {}
    kinds = [rope, *(each for each in rope.values() if isinstance(each, dict))]  # of each kind of layer, in some models
    ends: list[int | None] = [
        each.get("original_max_position_embeddings") for each in kinds if each.get("rope_type") == "longrope"
    ]
    return min((end for end in ends if end), default=None)


def num_rows(model: nn.Module) -> int:
    """Tokens that the model's embedding has a row for."""
    return int(cast(Any, model).get_input_embeddings().weight.shape[0])


def some_ids(model: nn.Module, rows: int, width: int) -> torch.Tensor:
    """Tokens to run a model on for a comparison: int64 [rows, width], where the model is, the same in every call."""
    numbers = torch.arange(rows * width, device=next(model.parameters()).device) * 7
    return (numbers % num_rows(model)).view(rows, width)


def mismatch(
    ours: torch.Tensor, own: torch.Tensor, *, dtype: torch.dtype | None = None, equal_nan: bool = False
) -> str:
    """How two computations of one thing differ, if by more than rounding; else nothing.

    Args:
        ours: The faster computation.
        own: The model's own, of the same shape.
        dtype: What both were computed in; None = that of ``own``.
        equal_nan: Whether NaN in the same place is no difference. Else it is one.
    """
    if ours.shape != own.shape:
        return f"of shape {tuple(ours.shape)} instead of {tuple(own.shape)}"
    limit = _TOLERANCE.get(dtype or own.dtype, 4e-2) * float(own.nan_to_num(0, 0, 0).abs().max())
    if torch.allclose(ours.to(own.dtype), own, rtol=0, atol=limit, equal_nan=equal_nan):
        return ""
    return f"off by {float((ours - own).abs().max()):g}, more than {limit:g}"


def said_by_both(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Where two computations hold logits: some families write a lowest number in place of those that they never say."""
    return (one.abs() < _MASKED) & (other.abs() < _MASKED)


def text_config(model: nn.Module) -> Any:
    """The model's config; of a model that reads images as well, the part for text."""
    return cast(Any, model).config.get_text_config()


def _moved(model: nn.Module, text: int) -> float:
    """How far the logits before the last token move with it, as a share of the largest |logit|; NaN if one is."""
    rows = num_rows(model)
    low, device = rows // 4, next(model.parameters()).device  # special tokens stand at the ends of a vocabulary
    numbers = torch.arange(NUM_TOKENS + 1, device=device) * 7 + 11 * text
    ids = low + numbers % max(1, rows // 2 - low)
    texts = ids[:-1], torch.cat([ids[:-2], ids[-1:]])
    one, other = (cast(Any, model)(input_ids=tokens[None]).logits[0, : NUM_TOKENS - 1].float() for tokens in texts)
    if bool((one.isnan() | one.isposinf()).any()):
        return math.nan
    said = said_by_both(one, other)
    one, other = one[said], other[said]
    return float((one - other).abs().max() / one.abs().max().clamp(min=1e-30)) if len(one) else 0.0


def _bound(model: nn.Module) -> float:
    held = dict(model.named_parameters())
    if any(_is_packed(parameter) for parameter in held.values()):
        return PACKED_BOUND
    has_experts = any(part in name for name in held for part in _EXPERTS)
    return EXPERTS_16_BITS_BOUND if has_experts and any(each.itemsize == 2 for each in held.values()) else BOUND


def _is_packed(parameter: nn.Parameter) -> bool:
    return type(parameter.data) is not torch.Tensor or not parameter.is_floating_point()


def _is_finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    wide = tensor.detach().float() if tensor.itemsize < 2 else tensor.detach()
    low, high = torch.aminmax(wide)  # one pass that keeps nothing; a NaN is both
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _not_finite_in(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as stored:
        return [key for key in stored.keys() if not _is_finite(stored.get_tensor(key))]  # noqa: SIM118
