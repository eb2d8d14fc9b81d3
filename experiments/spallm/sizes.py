"""How large sketches of 4 bits are: ``python experiments/spallm/sizes.py``, seconds.

Counts and bytes of five published models on the meta device, beside those that SketchTune's authors published. A count
is exact, to the digits that they printed. Their bytes hold what a framework adds, up to 3 %. Nothing is built.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from fedzo.bench.claims import Claims
from fedzo.models.sketched.sizes import sketch_size

HERE = Path(__file__).parent
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
