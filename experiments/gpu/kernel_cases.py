"""Directions beside a copy of as many bytes, and the update of all weights of a model in one launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from functools import partial
from typing import Any

import card
import torch
from card import Case, Figure, Goal, Result, name_of

from fedzo.bench.measure import medians_on_gpu
from fedzo.bench.shapes import random_model
from fedzo.zo.config import Distribution, Rounding
from fedzo.zo.directions import add_direction, fused
from fedzo.zo.rounding import is_rounded
from fedzo.zo.spaces.full import FullSpace

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COORDINATES = 1 << 28
COMPARED = 1 << 20
SCALE, START = 2.0**-10, 8
SHAPE, TITLE = "opt-1.3b", "OPT-1.3B's shape"
Move = Callable[[torch.Tensor, torch.Tensor, int], object]
"""From one tensor to another; the number is the coordinate of their first elements."""


# --- measuring --------------------------------------------------------------------------------------------------------


def directions() -> Result:
    """Every law, dtype and rounding."""
    return {
        "rows": [
            direction(dtype, law, rounding)
            for dtype in DTYPES
            for law in Distribution
            for rounding in Rounding
            if rounding is Rounding.nearest or is_rounded(dtype)
        ]
    }


def direction(dtype: torch.dtype, law: Distribution, rounding: Rounding) -> dict[str, Any]:
    """From one tensor to the other, or within the other where it is rounded stochastically."""
    stochastic = rounding is Rounding.stochastic

    def move(base: torch.Tensor, out: torch.Tensor, start: int) -> None:
        base = out if stochastic else base
        add_direction(base, 1, scale=SCALE, start=start, distribution=law, out=out, stochastic=stochastic)

    return {"dtype": name_of(dtype), "law": law, "rounding": rounding, **beside_a_copy(dtype, move, move)}


def directions_without_shared_table() -> Result:
    """The Gaussian law as on a card whose shared memory is too small for its table."""
    kernels = copy(fused(card.DEVICE))
    assert kernels is not None, "these kernels cannot be used: see the warning"
    kernels.shares_table = False

    def move(base: torch.Tensor, out: torch.Tensor, start: int) -> None:
        kernels.add(base, 1, scale=SCALE, start=start, out=out, distribution=Distribution.gaussian)

    def on_cpu(base: torch.Tensor, out: torch.Tensor, start: int) -> None:
        add_direction(base, 1, scale=SCALE, start=start, out=out)

    return {"rows": [{"dtype": name_of(dtype), **beside_a_copy(dtype, move, on_cpu)} for dtype in DTYPES]}


def beside_a_copy(dtype: torch.dtype, move: Move, on_cpu: Move) -> dict[str, float]:
    """Milliseconds of both; a million of the values that ``move`` makes are compared with the CPU's bits."""
    base = torch.randn(COORDINATES, device=card.DEVICE).to(dtype)
    out = base.clone()
    move(base, out, START)
    here = base[-COMPARED:].cpu()
    want = here.clone()
    on_cpu(here, want, START + COORDINATES - len(here))
    assert torch.equal(out[-len(want) :].cpu(), want), dtype
    return in_turn({"copy": partial(out.copy_, base), "move": partial(move, base, out, START)})


def update() -> Result:
    """The step of all weights, in place, and a copy of as many bytes."""
    return {"rows": [updated(dtype) for dtype in DTYPES[:2]]}


def updated(dtype: torch.dtype) -> dict[str, Any]:
    model = random_model(SHAPE, device=card.DEVICE.type, dtype=dtype).model
    space = FullSpace(model)
    base = torch.randn(space.size, device=card.DEVICE).to(dtype)
    out = torch.empty_like(base)
    times = in_turn({"copy": partial(out.copy_, base), "move": partial(space.step, 1e-6, 1)})
    return {"dtype": name_of(dtype), "tensors": len(list(model.parameters())), "n": space.size, **times}


def in_turn(work: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Milliseconds of each."""
    return {f"{name}_ms": found for name, found in medians_on_gpu(work).items()}


# --- figures ----------------------------------------------------------------------------------------------------------


def direction_name(law: str, dtype: str, rounding: str) -> str:
    how = "to nearest" if rounding == "nearest" else "rounded stochastically"
    return f"a direction of 2^28 coordinates, {law}, {dtype}, {how} / a copy"


def direction_figures(result: Result) -> Iterator[Figure]:
    for row in result["rows"]:
        name = direction_name(row["law"], row["dtype"], row["rounding"])
        yield name, row["move_ms"] / row["copy_ms"], "ratio"


def global_name(dtype: str) -> str:
    return f"a direction of 2^28 coordinates, gaussian, {dtype}, its table in global memory / a copy"


def global_figures(result: Result) -> Iterator[Figure]:
    for row in result["rows"]:
        yield global_name(row["dtype"]), row["move_ms"] / row["copy_ms"], "ratio"


def update_name(dtype: str) -> str:
    return f"a step of all weights of {TITLE} in {dtype}"


def update_figures(result: Result) -> Iterator[Figure]:
    for row in result["rows"]:
        name = update_name(row["dtype"])
        yield f"{name} / a copy", row["move_ms"] / row["copy_ms"], "ratio"
        yield name, row["move_ms"] / 1e3, "s"


KERNELS = {
    "directions": Case(
        directions,
        direction_figures,
        {
            direction_name(law, name_of(dtype), "nearest"): Goal(1.15 if dtype == torch.float32 else 1.3)
            for dtype in DTYPES
            for law in Distribution
        },
    ),
    "directions-global": Case(
        directions_without_shared_table, global_figures, {global_name(name_of(dtype)): Goal() for dtype in DTYPES}
    ),
    "update": Case(update, update_figures, {f"{update_name(name_of(dtype))} / a copy": Goal() for dtype in DTYPES[:2]}),
}
