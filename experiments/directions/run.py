"""What a direction costs beside a forward, in one run; writes claims.json beside this file.

    python experiments/directions/run.py

Interleaved repeats of a bare forward of SmolLM2-135M (16 x 32 tokens, no LM head), of making 10^6 Gaussian coordinates,
and of a masked write and restore of as many weights; medians and quartiles.
"""

from __future__ import annotations

import os
import statistics
from pathlib import Path

import torch

from fedzo.bench.claims import Claims
from fedzo.bench.measure import interleaved
from fedzo.models.config import ModelConfig
from fedzo.models.head import hidden_at
from fedzo.models.load import load_model
from fedzo.zo.directions import add_direction, stream_key
from fedzo.zo.spaces.masked import MaskedSpace

HERE = Path(__file__).parent
COORDINATES = 1_000_000
REPEATS = 15


def main() -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    loaded = load_model(ModelConfig(), device="cpu")
    ids = (torch.arange(16 * 32) * 97 % 49_000).view(16, 32)
    at = torch.zeros(1, dtype=torch.int64)
    matrices = {n: p for n, p in loaded.model.named_parameters() if p.ndim == 2 and "embed" not in n}
    total = sum(p.numel() for p in matrices.values())
    picks = {n: torch.arange(0, p.numel(), total // COORDINATES)[: p.numel()] for n, p in matrices.items()}
    space = MaskedSpace(loaded.model, picks)
    vector = torch.zeros(COORDINATES)
    key = stream_key(0, round=0)

    def forward() -> None:
        with torch.inference_mode():
            hidden_at(loaded.model, ids, at, at)

    def direction() -> None:
        add_direction(vector, key, scale=1.0, out=vector)

    def probe() -> None:
        with space.probe(1e-3, key):
            pass

    seconds = interleaved({"forward": forward, "direction": direction, "probe": probe}, repeats=REPEATS)
    share = statistics.median(d / f for d, f in zip(seconds["direction"], seconds["forward"], strict=True))
    whole = statistics.median(p / f for p, f in zip(seconds["probe"], seconds["forward"], strict=True))
    claims = Claims(command="python experiments/directions/run.py")
    add = claims.add
    what = "a direction of 10^6 coordinates, of a forward of 16 x 32 tokens (SmolLM2, float32)"
    add(what, share, "share", at_most=0.02)
    add(f"a masked probe of {space.size} weights (direction, write, restore), of the same forward", whole, "share")
    add("a Gaussian coordinate", statistics.median(seconds["direction"]) / COORDINATES * 1e9, "ns")
    add("the forward", statistics.median(seconds["forward"]), "s")
    claims.write(HERE / "claims.json")
    claims.show()


if __name__ == "__main__":
    main()
