"""How large sketches of 4 bits are: ``python experiments/spallm/sizes.py``, seconds.

Counts and bytes of five published models on the meta device, beside those that SketchTune's authors published. A count
is exact, to the digits that they printed. Their bytes hold what a framework adds, up to 3 %. Nothing is built.

Of a layer with R outputs and d inputs, b bits and G groups a row (SpaLLM, arXiv 2410.06364):

    codes    R * ceil(d * b / 8) bytes
    tables   R * G * 2^b values, which are also what is trained
    dense    what stays as it is: biases, embeddings, head, norms, skipped layers, and experts that are one tensor

A tied head counts once. Sizes are of 16-bit tables and 16-bit dense weights; trained tables are float32 and take twice
as much.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from fedzo.bench.claims import Claims
from fedzo.models.sketched.layers import dense_layers, weight_of
from fedzo.sketch.packing import check_bits, columns_per_group, packed_width

HERE = Path(__file__).parent
VALUE_BYTES = 2  # of a 16-bit value
LLAMA_3: dict[str, Any] = {"vocab_size": 128_256, "num_key_value_heads": 8}
SHAPES: dict[str, dict[str, Any]] = {
    "LLaMA-7B": {},  # LlamaConfig's defaults
    "Llama-2-7B": {"max_position_embeddings": 4096},
    "LLaMA-13B": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
    },
    "Llama-3-8B": {**LLAMA_3, "intermediate_size": 14336},
    "Llama-3-70B": {
        **LLAMA_3,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}
MILLIONS = {
    "LLaMA-7B": {1: 21.8, 2: 43.5, 4: 87.0, 8: 174.1},
    "Llama-2-7B": {1: 21.8, 2: 43.5, 4: 87.0, 8: 174.1},
    "LLaMA-13B": {1: 34.1, 4: 136.3},
    "Llama-3-8B": {1: 22.0, 4: 88.1},
}
"""Trained values that were published, by groups a row."""
GIGABYTES = {
    "LLaMA-7B": {1: 3.89, 2: 3.93, 4: 4.02, 8: 4.19},
    "LLaMA-13B": {1: 7.14},
    "Llama-3-8B": {1: 5.77},
    "Llama-3-70B": {4: 39.8},
}


class SketchSize(NamedTuple):
    """The size of a sketch.

    Attributes:
        num_weights: Weights of the layers that are sketched.
        num_entries: Values of their tables.
        code_bytes: Their packed codes.
        num_dense: Weights that stay dense.
    """

    num_weights: int
    num_entries: int
    code_bytes: int
    num_dense: int

    @property
    def table_bytes(self) -> int:
        """The tables in 16 bits."""
        return VALUE_BYTES * self.num_entries

    @property
    def dense_bytes(self) -> int:
        """What stays dense, in 16 bits."""
        return VALUE_BYTES * self.num_dense

    @property
    def num_bytes(self) -> int:
        """All of it."""
        return self.code_bytes + self.table_bytes + self.dense_bytes

    @property
    def bits_per_weight(self) -> float:
        """Of a sketched weight, its share of the tables included."""
        return 8 * (self.code_bytes + self.table_bytes) / self.num_weights if self.num_weights else 0.0


def sketch_size(model: nn.Module, *, bits: int, groups_per_row: int, keep: Iterable[str]) -> SketchSize:
    """The size of the sketch that fedzo's ``replace_layers`` makes room for with the same arguments.

    Args:
        model: A dense causal language model, on any device; nothing of it is read but shapes. One on the meta device
            must be made there: ``.to("meta")`` parts tied weights, which then count twice.
        bits: Of a code: 2, 3 or 4.
        groups_per_row: G.
        keep: Names of the linear layers that stay dense.

    Returns:
        Exact counts.

    Raises:
        ConfigError: ``bits`` cannot be, or a width that the groups do not divide.
    """
    check_bits(bits)
    kept = set(keep)
    layers = {name: layer for name, layer in dense_layers(model).items() if name not in kept}
    shapes = [tuple(weight_of(layer).shape) for layer in layers.values()]
    for name, (_, inputs) in zip(layers, shapes, strict=True):
        columns_per_group(inputs, groups_per_row, name=name)
    sketched = {id(layer.weight) for layer in layers.values()}
    return SketchSize(
        num_weights=sum(outputs * inputs for outputs, inputs in shapes),
        num_entries=sum(outputs for outputs, _ in shapes) * groups_per_row * 2**bits,
        code_bytes=sum(outputs * packed_width(inputs, bits) for outputs, inputs in shapes),
        num_dense=sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in sketched),
    )


def main() -> None:
    claims = Claims(command="python experiments/spallm/sizes.py")
    for name, settings in SHAPES.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(LlamaConfig(**settings))
        for groups in sorted(MILLIONS.get(name, {}) | GIGABYTES.get(name, {})):
            size = sketch_size(model, bits=4, groups_per_row=groups, keep=["lm_head"])
            what = f"{name}, 4 bits, {groups} group{'s' * (groups > 1)}"
            if published := MILLIONS.get(name, {}).get(groups):
                claims.add(f"{what}: table values", size.num_entries / 1e6, "million", near=(published, 0.05))
            if published := GIGABYTES.get(name, {}).get(groups):
                claims.add(f"{what}: size", size.num_bytes / 1e9, "GB", near=(published, 0.03 * published))
    claims.show()
    claims.write(HERE / "claims.json")


if __name__ == "__main__":
    main()
