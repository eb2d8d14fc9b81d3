"""Models of published sizes with random weights: time and memory depend on shapes, not on what was learnt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, cast

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PreTrainedConfig
from transformers.initialization import no_init_weights

from fedzo.errors import ConfigError
from fedzo.models.attention import repeat_keys
from fedzo.models.head import check_head
from fedzo.models.load import resolve_device
from fedzo.models.loaded import LoadedModel
from fedzo.zo.directions import add_direction, stream_key


def _opt(hidden: int, layers: int, heads: int) -> PreTrainedConfig:
    return OPTConfig(
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        ffn_dim=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )


def _llama32_1b() -> PreTrainedConfig:
    return LlamaConfig(
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )


SHAPES: dict[str, Callable[[], PreTrainedConfig]] = {
    "opt-125m": lambda: _opt(768, 12, 12),
    "opt-1.3b": lambda: _opt(2048, 24, 32),
    "opt-13b": lambda: _opt(5120, 40, 40),
    "llama-3.2-1b": _llama32_1b,
    "llama-2-7b": LlamaConfig,  # its defaults
}


class _NoTokenizer:
    """Of a tokenizer the scoring needs a padding id and the vocabulary's size only."""

    pad_token_id = 0

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def __len__(self) -> int:
        return self._vocab_size


def random_model(shape: str, *, device: str, dtype: torch.dtype) -> LoadedModel:
    """A model of a published shape: matrices 0.02 z with z a direction, norms one, biases zero.

    Raises:
        ConfigError: The shape is not known, or the device is not on this machine.
    """
    if shape not in SHAPES:
        raise ConfigError(f"--shape must be one of {', '.join(SHAPES)}, got {shape!r}.")
    where = resolve_device(device)
    if where.type == "cuda":
        repeat_keys()
    with no_init_weights(), where:
        model = cast(Any, AutoModelForCausalLM).from_config(SHAPES[shape](), dtype=dtype)
    model.tie_weights()
    model.to(where)
    for number, (name, parameter) in enumerate(model.named_parameters()):
        weight = parameter.detach()
        weight.fill_(1.0 if weight.ndim == 1 and name.endswith("weight") else 0.0)
        if weight.ndim > 1:
            add_direction(weight, stream_key(0, round=number), scale=0.02, out=weight)
    model.eval()
    model.requires_grad_(False)
    model.config.use_cache = False
    return LoadedModel(
        model=model,
        tokenizer=_NoTokenizer(model.config.vocab_size),
        device=where,
        base_digest="",
        tokenizer_digest="",
        source=shape,
        read_weights=_nothing_stored,
        direct_head=check_head(model),
    )


def _nothing_stored() -> NoReturn:
    raise ConfigError("a model of random weights has no stored weights to restore.")
