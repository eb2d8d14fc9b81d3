"""What this machine could do at best, and what a step makes of it; writes roofline.json in the form of claims.json.

    python experiments/bench/roofline.py        # about a minute

Ceilings are measured (a large matrix product, a copy, the direction kernel); work is counted from the model's shapes.
One float32 forward of SmolLM2-135M on 16 x 32 tokens, and one pass of a direction over its weights.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fedzo.environment import environment
from fedzo.models.config import ModelConfig
from fedzo.models.head import hidden_at
from fedzo.models.load import load_model
from fedzo.site import set_threads
from fedzo.zo.directions import add_direction, stream_key

HERE = Path(__file__).parent
ROWS, TOKENS, REPEATS, SIDE, COPY = 16, 32, 11, 2048, 1 << 26


def main() -> None:
    set_threads(0)
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

    seconds = measure(
        {
            "product": lambda: torch.mm(a, b, out=product),
            "copy": lambda: target.copy_(source),
            "direction": lambda: add_direction(largest, key, scale=1e-3, out=moved),
            "forward": forward,
        }
    )
    products_per_s = 2 * SIDE**3 / seconds["product"]
    bytes_per_s = 2 * COPY / seconds["copy"]
    coordinate_s = seconds["direction"] / largest.numel()
    config: Any = loaded.model.config
    attention = 4 * ROWS * TOKENS**2 * config.hidden_size * config.num_hidden_layers
    flops = 2 * weights * ROWS * TOKENS + attention
    rows = [
        claim("ceiling: float32 matrix product, 2048 x 2048", products_per_s / 1e9, "GFLOP/s"),
        claim("ceiling: copy of 64 MiB, read and written", bytes_per_s / 1e9, "GB/s"),
        claim("a forward of 16 x 32 tokens, counted", flops / 1e9, "GFLOP"),
        claim("the forward at the product's ceiling", flops / products_per_s, "s"),
        claim("the forward, measured", seconds["forward"], "s"),
        claim("share of the ceiling that the forward reaches", flops / products_per_s / seconds["forward"], "share"),
        claim("a direction's coordinate, added on the way from one tensor to another", coordinate_s * 1e9, "ns"),
        claim("the same if it only moved its 8 bytes", 8 / bytes_per_s * 1e9, "ns"),
        claim(
            "three passes over all matrices, of two forwards",
            1.5 * weights * coordinate_s / seconds["forward"],
            "share",
        ),
    ]
    (HERE / "roofline.json").write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        print(f"{row['claim']}: {row['value']} {row['unit']}")


def measure(work: dict[str, Callable[[], object]]) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for repeat in range(REPEATS + 2):
        for name, run in work.items():
            begin = time.perf_counter()
            run()
            if repeat >= 2:
                seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(spent) for name, spent in seconds.items()}


def claim(text: str, value: float, unit: str) -> dict[str, Any]:
    return {
        "claim": text,
        "value": float(f"{value:.3g}"),
        "unit": unit,
        "target": None,
        "holds": True,
        "command": "python experiments/bench/roofline.py",
        "seeds": [0],
        "environment": {**environment(), "threads": torch.get_num_threads(), "cpus": os.cpu_count()},
    }


if __name__ == "__main__":
    main()
