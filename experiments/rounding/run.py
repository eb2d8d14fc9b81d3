"""What is left of one MeZO step in a 16-bit model, by dtype and rounding; writes claims.json beside this file.

    python experiments/rounding/run.py

One step of s = lr * |g| along a Gaussian direction moves every weight of SmolLM2-135M by s * z. Measured: the share of
weights whose bits change, and the share of the step that arrives, <moved, s z> / <s z, s z>: 1 for an exact step, and
in the mean over the draws for stochastic rounding, whose noise gives it the standard error that is stated.
"""

from __future__ import annotations

import os
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from fedzo.bench.claims import Claims
from fedzo.models.config import DType, ModelConfig
from fedzo.models.load import load_model
from fedzo.zo.config import Rounding
from fedzo.zo.directions import direction, stream_key
from fedzo.zo.spaces.full import FullSpace

HERE = Path(__file__).parent
STEPS = (1e-6, 1e-5)
CASES = (
    (DType.float32, Rounding.nearest),
    (DType.bfloat16, Rounding.nearest),
    (DType.bfloat16, Rounding.stochastic),
    (DType.float16, Rounding.nearest),
    (DType.float16, Rounding.stochastic),
)


class Outcome(NamedTuple):
    """Shares, 0 to 1, and the standard error of the second."""

    moved: float
    arrived: float
    standard_error: float


def main() -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    claims = Claims(command="python experiments/rounding/run.py")
    for dtype, rounding in CASES:
        model = load_model(ModelConfig(dtype=dtype), device="cpu").model
        for s in STEPS:
            outcome = step(model, rounding, s)
            head = f"SmolLM2-135M in {dtype}, rounded {rounding}, one step of lr*|g| = {s:g}"
            claims.add(f"{head}: weights that moved", outcome.moved, "share")
            error = f"standard error {outcome.standard_error:.1g}"
            claims.add(f"{head}: share of the step that arrived ({error})", outcome.arrived, "share")
            print(
                f"{head}: {outcome.moved:.2%} of the weights moved, {outcome.arrived:.4f} of the step arrived ({error})"
            )
    claims.write(HERE / "claims.json")


def step(model: nn.Module, rounding: Rounding, s: float) -> Outcome:
    """Take one step, compare, and take it back."""
    space, key = FullSpace(model, rounding=rounding), stream_key(0, round=0)
    parameters = [parameter.detach() for parameter in model.parameters()]
    ends = list(accumulate(parameter.numel() for parameter in parameters))
    before = [parameter.clone() for parameter in parameters]
    space.mark()
    space.step(float(np.float32(s)), key)
    moved, along, length, noise = 0, 0.0, 0.0, 0.0
    for old, new, end in zip(before, parameters, ends, strict=True):
        wanted = -s * direction(key, old.numel(), start=end - old.numel()).astype(np.float64)
        got = (new.double() - old.double()).view(-1).numpy()
        moved += int((new != old).sum())
        along += float(got @ wanted)
        length += float(wanted @ wanted)
        noise += float((((got - wanted) * wanted) ** 2).sum())
    space.rewind()
    return Outcome(moved / ends[-1], along / length, noise**0.5 / length)


if __name__ == "__main__":
    main()
