"""Tiny causal language models with random weights, one of each family that tests cover, and a tokenizer of bytes.

Neither needs a download; a seed names the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    RwkvConfig,
)

from fedzo.models.load import wrap_model
from fedzo.models.loaded import LoadedModel
from fedzo.models.sketched.layers import dense_layers, weight_of
from fedzo.models.sketched.registry import SketchFormat, mark_as_sketch
from fedzo.sketch import SketchLinear, SketchSettings, sketch_matrix

_SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
}


def _llama(**common: Any) -> PreTrainedConfig:
    return LlamaConfig(**_SHAPE, tie_word_embeddings=True, **common)


def _opt(**common: Any) -> PreTrainedConfig:
    """With a narrower word embedding, so that its projections are there."""
    return OPTConfig(
        hidden_size=32,
        word_embed_proj_dim=16,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        init_std=0.1,
        **common,
    )


def _qwen3(**common: Any) -> PreTrainedConfig:
    return Qwen3Config(**_SHAPE, head_dim=8, tie_word_embeddings=False, **common)


def _qwen2(**common: Any) -> PreTrainedConfig:
    """With biases at query, key and value alone."""
    return Qwen2Config(**_SHAPE, tie_word_embeddings=True, **common)


def _gemma2(**common: Any) -> PreTrainedConfig:
    """With capped logits low enough to matter, and a sliding window shorter than its sequences."""
    return Gemma2Config(
        **_SHAPE, head_dim=8, query_pre_attn_scalar=8, sliding_window=16, final_logit_softcapping=3.0, **common
    )


def _gpt2(**common: Any) -> PreTrainedConfig:
    return GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=512, initializer_range=0.1, **common)


def _mixtral(**common: Any) -> PreTrainedConfig:
    """With fused expert weights."""
    return MixtralConfig(**_SHAPE, num_local_experts=4, num_experts_per_tok=2, sliding_window=None, **common)


_CONFIGS: dict[str, Callable[..., PreTrainedConfig]] = {
    "llama": _llama,
    "opt": _opt,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gpt2": _gpt2,
    "mixtral": _mixtral,
}
FAMILIES = tuple(_CONFIGS)


def _mamba(**common: Any) -> PreTrainedConfig:
    return MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=8, initializer_range=0.1, **common)


def _mamba2(**common: Any) -> PreTrainedConfig:
    return Mamba2Config(
        hidden_size=32, num_hidden_layers=2, state_size=8, num_heads=8, head_dim=8, n_groups=2, chunk_size=32, **common
    )


def _rwkv(**common: Any) -> PreTrainedConfig:
    """With more layers than it would leave unscaled by itself."""
    return RwkvConfig(hidden_size=32, num_hidden_layers=7, rescale_every=6, **common)


_SKETCHED: dict[str, Callable[..., PreTrainedConfig]] = {**_CONFIGS, "qwen2": _qwen2}
SKETCHED = tuple(_SKETCHED)
"""Families that ``fedzo sketch`` is tested with."""
_WITHOUT_ATTENTION: dict[str, Callable[..., PreTrainedConfig]] = {"mamba": _mamba, "mamba2": _mamba2, "rwkv": _rwkv}
WITHOUT_ATTENTION = tuple(_WITHOUT_ATTENTION)


def tiny_model(
    family: str = "llama", *, vocab_size: int = 512, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Any:
    """A random model of one of ``SKETCHED`` or ``WITHOUT_ATTENTION``; the global generator is left alone.

    ``llama`` has 34,976 parameters.
    """
    tokenizer = byte_tokenizer()
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = {**_SKETCHED, **_WITHOUT_ATTENTION}[family](vocab_size=vocab_size, **ids)
    return tiny_model_from(config, seed=seed, dtype=dtype)


def tiny_model_from(config: PreTrainedConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A random model of any config."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    return model.to(dtype).eval().requires_grad_(False)


def tiny_sketch(
    family: str = "llama", *, bits: int = 4, groups_per_row: int = 1, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Any:
    """A random model whose linear layers are sketched, its head left out, as if each input were independent."""
    model = tiny_model(family, seed=seed)
    settings = SketchSettings(bits=bits, groups_per_row=groups_per_row)
    for name, layer in dense_layers(model).items():
        if name != "lm_head":
            weight = weight_of(layer)
            sketch = sketch_matrix(weight, torch.eye(weight.shape[1]), settings, name=name)
            sketched = SketchLinear.of(sketch.codes, sketch.tables, sketch.num_columns, layer.bias)
            model.set_submodule(name, sketched)
    mark_as_sketch(model, SketchFormat(bits, groups_per_row, ["lm_head"]))
    return model.to(dtype).eval().requires_grad_(False)


def tiny_loaded(
    family: str = "llama",
    *,
    vocab_size: int = 512,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    sketched: bool = False,
) -> LoadedModel:
    """A random model with the byte tokenizer, as ``load_model`` would return it."""
    if sketched:
        model = tiny_sketch(family, seed=seed, dtype=dtype).to(device)
    else:
        model = tiny_model(family, vocab_size=vocab_size, seed=seed, dtype=dtype).to(device)
    return wrap_model(model, byte_tokenizer(), source=f"tiny-{family}")


def save_tiny_model(folder: Path, family: str = "llama", *, vocab_size: int = 512, seed: int = 0) -> Path:
    """Write a random float32 model and the byte tokenizer to a folder that ``load_model`` reads without a network."""
    tiny_model(family, vocab_size=vocab_size, seed=seed).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def save_tiny_sketch(folder: Path, family: str = "llama", *, bits: int = 4, groups_per_row: int = 1) -> Path:
    """Write a random sketch and the byte tokenizer to a folder that ``load_model`` reads without a network."""
    tiny_sketch(family, bits=bits, groups_per_row=groups_per_row).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def tiny_tokens(start: int, length: int) -> tuple[int, ...]:
    """Ids that any of these models knows, alike for equal arguments and well mixed."""
    return tuple((start * 31 + i * 17) % 256 for i in range(length))


SPECIALS = ("<pad>", "<bos>", "<eos>")
"""Token ids 0, 1, 2; a byte b is token 3 + b."""
_CHAT = (
    "{% for message in messages %}<bos>{{ message.role }}\n{{ message.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant\n{% endif %}"
)


def byte_tokenizer(*, add_bos: bool = False, add_eos: bool = False, chat: bool = True) -> PreTrainedTokenizerFast:
    """259 tokens: three special ones and the 256 bytes of UTF-8 text.

    Args:
        add_bos: Put ``<bos>`` before every text, as Llama and Gemma do.
        add_eos: Put ``<eos>`` after every text, as ``add_eos_token=True`` asks of Llama's.
        chat: Give it a chat template.
    """
    vocabulary = {token: number for number, token in enumerate((*SPECIALS, *_byte_letters()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if add_bos or add_eos:
        around = f"{'<bos> ' if add_bos else ''}$A{' <eos>' if add_eos else ''}"
        backend.post_processor = processors.TemplateProcessing(
            single=around, special_tokens=[("<bos>", 1), ("<eos>", 2)]
        )
    pad, bos, eos = SPECIALS
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, pad_token=pad, bos_token=bos, eos_token=eos
    )
    if chat:
        tokenizer.chat_template = _CHAT
    return tokenizer


def _byte_letters() -> list[str]:
    """ByteLevel's letter for each byte: itself if printable, else one from U+0100 on (GPT-2's table)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
