"""What this machine could do at best, and what a step makes of it; writes roofline.json in the form of claims.json.

    python experiments/bench/roofline.py        # about a minute

Ceilings are measured (a large matrix product, a copy, the direction kernel); work is counted from the model's shapes.
One float32 forward of SmolLM2-135M on 16 x 32 tokens, and one pass of a direction over its weights.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch

from fedzo.bench.claims import Claims
from fedzo.bench.measure import interleaved
from fedzo.models.config import ModelConfig
from fedzo.models.head import hidden_at
from fedzo.models.load import load_model
from fedzo.run.peer import set_up_process
from fedzo.zo.directions import add_direction, stream_key

HERE = Path(__file__).parent
ROWS, TOKENS, REPEATS, SIDE, COPY = 16, 32, 11, 2048, 1 << 26


def main() -> None:
    set_up_process(0, "cpu")
    loaded = load_model(ModelConfig(), device="cpu")
    a, b, product = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE), torch.empty(SIDE, SIDE)
    source, target = torch.zeros(COPY // 4), torch.empty(COPY // 4)
    ids = (torch.arange(ROWS * TOKENS) * 97 % 49_000).view(ROWS, TOKENS)
    at = torch.zeros(1, dtype=torch.int64)
    matrices = [p for n, p in loaded.model.named_parameters() if p.ndim == 2 and "embed" not in n]
    weights = sum(p.numel() for p in matrices)
    largest = max(matrices, key=torch.numel)
    moved, key = torch.empty_like(largest), stream_key(0, round=0)

    def forward() -> None:
        with torch.inference_mode():
            hidden_at(loaded.model, ids, at, at)

    spent = interleaved(
        {
            "product": lambda: torch.mm(a, b, out=product),
            "copy": lambda: target.copy_(source),
            "direction": lambda: add_direction(largest, key, scale=1e-3, out=moved),
            "forward": forward,
        },
        repeats=REPEATS,
    )
    seconds = {name: statistics.median(times) for name, times in spent.items()}
    products_per_s = 2 * SIDE**3 / seconds["product"]
    bytes_per_s = 2 * COPY / seconds["copy"]
    coordinate_s = seconds["direction"] / largest.numel()
    config: Any = loaded.model.config
    attention = 4 * ROWS * TOKENS**2 * config.hidden_size * config.num_hidden_layers
    flops = 2 * weights * ROWS * TOKENS + attention
    claims = Claims(command="python experiments/bench/roofline.py")
    add = claims.add
    add("ceiling: float32 matrix product, 2048 x 2048", products_per_s / 1e9, "GFLOP/s")
    add("ceiling: copy of 64 MiB, read and written", bytes_per_s / 1e9, "GB/s")
    add("a forward of 16 x 32 tokens, counted", flops / 1e9, "GFLOP")
    add("the forward at the product's ceiling", flops / products_per_s, "s")
    add("the forward, measured", seconds["forward"], "s")
    add("share of the ceiling that the forward reaches", flops / products_per_s / seconds["forward"], "share")
    add("a direction's coordinate, added on the way from one tensor to another", coordinate_s * 1e9, "ns")
    add("the same if it only moved its 8 bytes", 8 / bytes_per_s * 1e9, "ns")
    add("three passes over all matrices, of two forwards", 1.5 * weights * coordinate_s / seconds["forward"], "share")
    claims.write(HERE / "roofline.json")
    claims.show()


if __name__ == "__main__":
    main()
