"""Sizes of sketches: figures that SketchTune's authors published, sums by hand, and the bytes of a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from fedzo.errors import ConfigError
from fedzo.models.sketched.layers import dense_layers
from fedzo.testing.tiny_models import FAMILIES, tiny_model, tiny_sketch

FOLDER = Path(__file__).parents[3] / "experiments"
SHAPES: dict[str, dict[str, Any]] = {
    "llama-7b": {},  # LlamaConfig's defaults
    "llama-2-7b": {"max_position_embeddings": 4096},
    "llama-13b": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
    },
    "llama-3-8b": {"vocab_size": 128_256, "intermediate_size": 14336, "num_key_value_heads": 8},
    "llama-3-70b": {
        "vocab_size": 128_256,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "llama-3.2-1b": {
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "smollm2-135m": {
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
}


@pytest.fixture(scope="module")
def sizes(script: Callable[[Path], ModuleType]) -> Any:
    return script(FOLDER / "spallm" / "sizes.py")


def on_meta(config: PreTrainedConfig) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model


def size_of(sizes: Any, name: str, *, bits: int = 4, groups_per_row: int = 1) -> Any:
    model = on_meta(LlamaConfig(**SHAPES[name]))
    return sizes.sketch_size(model, bits=bits, groups_per_row=groups_per_row, keep=["lm_head"])


def by_hand(name: str, bits: int, groups: int) -> tuple[int, int, int, int]:
    """Entries, bytes of codes, of tables and of what stays dense, from the widths of a Llama."""
    config = LlamaConfig(**SHAPES[name])
    d, f, v = config.hidden_size, config.intermediate_size, config.vocab_size
    kv = d // config.num_attention_heads * config.num_key_value_heads
    rows = d + kv + kv + d + f + f + d  # q, k, v, o, gate, up, down
    weights = d * d + kv * d + kv * d + d * d + f * d + f * d + d * f
    entries = config.num_hidden_layers * rows * groups * 2**bits
    dense = v * d * (1 if config.tie_word_embeddings else 2) + (2 * config.num_hidden_layers + 1) * d
    return entries, config.num_hidden_layers * weights * bits // 8, 2 * entries, 2 * dense


@pytest.mark.parametrize(("bits", "groups"), [(4, 1), (4, 8), (3, 2), (2, 4)])
@pytest.mark.parametrize("name", SHAPES)
def test_counts_and_bytes_are_those_of_the_formula(sizes: Any, name: str, bits: int, groups: int) -> None:
    size = size_of(sizes, name, bits=bits, groups_per_row=groups)

    found = size.num_entries, size.code_bytes, size.table_bytes, size.dense_bytes
    assert found == by_hand(name, bits, groups)
    assert size.num_bytes == sum(found[1:])


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("llama-7b", {1: 21.8, 2: 43.5, 4: 87.0, 8: 174.1}),
        ("llama-2-7b", {1: 21.8, 2: 43.5, 4: 87.0, 8: 174.1}),
        ("llama-13b", {1: 34.1, 4: 136.3}),
        ("llama-3-8b", {1: 22.0, 4: 88.1}),
    ],
)
def test_trained_values_are_as_many_as_the_authors_published(sizes: Any, name: str, millions: dict[int, float]) -> None:
    found = {groups: round(size_of(sizes, name, groups_per_row=groups).num_entries / 1e6, 1) for groups in millions}

    assert found == millions


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [
        ("llama-7b", {1: 3.89, 2: 3.93, 4: 4.02, 8: 4.19}),
        ("llama-13b", {1: 7.14}),
        ("llama-3-8b", {1: 5.77}),
        ("llama-3-70b", {4: 39.8}),
    ],
)
def test_bytes_are_within_three_percent_of_the_published_ones(
    sizes: Any, name: str, gigabytes: dict[int, float]
) -> None:
    """What the authors measured holds what a framework adds."""
    for groups, published in gigabytes.items():
        assert 0.97 * published < size_of(sizes, name, groups_per_row=groups).num_bytes / 1e9 < published


def test_the_embedded_models_sketch_has_the_bytes_that_were_measured(sizes: Any) -> None:
    size = size_of(sizes, "smollm2-135m")

    assert (size.num_entries, size.code_bytes) == (2_488_320, 53_084_160)
    assert round(size.num_bytes / 1e6, 1) == 114.8
    assert size.bits_per_weight == pytest.approx(4.375, abs=0.001)
    assert size_of(sizes, "smollm2-135m", bits=3).bits_per_weight == pytest.approx(3.19, abs=0.005)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_has_just_the_bytes_of_the_formula(sizes: Any, family: str, bits: int, tmp_path: Path) -> None:
    size = sizes.sketch_size(on_meta(tiny_model(family).config), bits=bits, groups_per_row=2, keep=["lm_head"])

    for dtype in (torch.float32, torch.bfloat16):
        tiny_sketch(family, bits=bits, groups_per_row=2, dtype=dtype).save_pretrained(tmp_path / str(dtype))

    assert bytes_in(tmp_path / "torch.bfloat16") == (size.code_bytes, size.table_bytes, size.dense_bytes)
    assert bytes_in(tmp_path / "torch.float32")[:2] == (size.code_bytes, size.table_bytes)  # tables as built


def bytes_in(folder: Path) -> tuple[int, int, int]:
    """Bytes of codes, of tables and of the rest."""
    stored = load_file(folder / "model.safetensors")
    sums = {"codes": 0, "tables": 0, "": 0}
    for name, tensor in stored.items():
        kind = name.rpartition(".")[2]
        sums[kind if kind in sums else ""] += tensor.nbytes
    return sums["codes"], sums["tables"], sums[""]


def test_layers_that_are_kept_stay_dense(sizes: Any) -> None:
    model = on_meta(LlamaConfig(**SHAPES["smollm2-135m"]))
    kept = [name for name in dense_layers(model) if name == "lm_head" or ".layers.0." in name]

    all_of_it = sizes.sketch_size(model, bits=4, groups_per_row=1, keep=["lm_head"])
    part = sizes.sketch_size(model, bits=4, groups_per_row=1, keep=kept)

    assert part.num_weights * 30 == all_of_it.num_weights * 29
    assert part.num_weights + part.num_dense == all_of_it.num_weights + all_of_it.num_dense == 134_515_008
    assert sizes.sketch_size(model, bits=4, groups_per_row=1, keep=dense_layers(model)).bits_per_weight == 0


def test_what_cannot_be_sketched_has_no_size(sizes: Any) -> None:
    with pytest.raises(ConfigError, match=r"the width of 'model.layers.0.self_attn.q_proj' must be a multiple of .*=5"):
        size_of(sizes, "smollm2-135m", groups_per_row=5)
    with pytest.raises(ConfigError, match=r"bits must be 2, 3 or 4, got 5"):
        size_of(sizes, "smollm2-135m", bits=5)
