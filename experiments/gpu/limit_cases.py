"""Limits of the card: what a step takes of its memory beside the estimate, and how far it is from the roofline."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from statistics import median

import card
import torch
from card import Case, Figure, Goal, Result
from step_cases import REPEATS, STEPS, TOKENS, Step

from fedzo.bench.measure import free_memory, interleaved, measure_peak_bytes, medians_on_gpu
from fedzo.bench.step import BARE, OURS, finish, kind_of_forwards
from fedzo.models.blocks import find_blocks
from fedzo.models.captured import NUM_EAGER
from fedzo.models.memory import step_memory, weights_bytes
from fedzo.run.costs import trained_bytes

SIDE, COPIED = 8192, 1 << 28
"""Of the matrices whose product is the first ceiling, and how many 16-bit values a copy moves, which is the other."""
WEIGHED = (
    *((name, "eager") for name in ("opt-1.3b-mezo", "opt-1.3b-meerkat", "opt-13b-mezo", "opt-13b-meerkat")),
    *((name, "captured") for name in ("opt-1.3b-mezo", "opt-1.3b-meerkat")),
)
COUNTED = ("opt-1.3b-mezo", "opt-13b-mezo")


# --- measuring --------------------------------------------------------------------------------------------------------


def weigh(step: Step) -> Result:
    """The peak of two forwards and of a step, and what the estimate before a run says of that step.

    With CUDA graphs of the step alone: the forwards' graphs would keep memory beside its own.
    """
    free_memory()
    before = card.held_bytes()
    bench = step.open()
    loaded, works = bench.loaded, bench.contestants()
    captured = kind_of_forwards(loaded) == "captured"
    peaks = {}
    for name in (OURS,) if captured else (BARE, OURS):
        for _ in range(NUM_EAGER if captured else 1):  # what is compiled, recorded or made once is no step's memory
            works[name]()
        peak = measure_peak_bytes(works[name], card.DEVICE)
        peaks[name] = None if peak is None else peak - before
    trained = trained_bytes(loaded, bench.space, 1, reads_head=False)  # as in the estimate of a run
    parts = step_memory(loaded.model, batch_tokens=step.rows * TOKENS, trained_bytes=trained, captured=captured)
    return {
        "kind": kind_of_forwards(loaded),
        "peak_bytes": peaks,
        "estimate_bytes": sum(parts),
        "parts": parts._asdict(),
        "layer_bytes": max(map(weights_bytes, find_blocks(loaded.model)[1])),
    }


def count(step: Step) -> Result:
    """Operations and bytes, the ceilings of the card for both, and the seconds of forwards and step."""
    bench = step.open()
    model, works = bench.loaded.model, bench.contestants()
    seconds = interleaved({name: partial(finish, works[name], card.DEVICE) for name in (BARE, OURS)}, repeats=REPEATS)
    blocks = find_blocks(model)[1]
    matrices = sum(each.numel() for block in blocks for each in block.parameters() if each.ndim == 2)
    attention = 4 * step.rows * TOKENS**2 * model.config.hidden_size * len(blocks)
    return {
        "rows": step.rows,
        "tokens": TOKENS,
        "operations": 2 * matrices * step.rows * TOKENS + attention,
        "block_bytes": sum(map(weights_bytes, blocks)),
        "weight_bytes": weights_bytes(model),
        "forwards_s": median(seconds[BARE]),
        "step_s": median(seconds[OURS]),
        **ceilings(),
    }


def ceilings() -> dict[str, float]:
    """Operations a second of a large bfloat16 product, and bytes a second that a copy reads and writes."""
    a, b, product = (torch.randn(SIDE, SIDE, device=card.DEVICE).bfloat16() for _ in range(3))
    source, target = (torch.zeros(COPIED, device=card.DEVICE, dtype=torch.bfloat16) for _ in range(2))
    found = medians_on_gpu({"product": partial(torch.mm, a, b, out=product), "copy": partial(target.copy_, source)})
    copied = source.nbytes + target.nbytes
    return {"operations_per_s": 2e3 * SIDE**3 / found["product"], "bytes_per_s": 1e3 * copied / found["copy"]}


# --- figures ----------------------------------------------------------------------------------------------------------


def weighed_figures(name: str, kind: str, result: Result) -> Iterator[Figure]:
    """None where graphs were given up, or a machine does not tell a peak."""
    ours, bare = result["peak_bytes"][OURS], result["peak_bytes"].get(BARE)
    if result["kind"] != kind or ours is None:
        return
    yield f"{name}, peak memory of a step", ours / 2**30, "GiB"
    yield estimate_name(name), result["estimate_bytes"] / ours, "ratio"
    if bare is not None:
        yield more_name(name), (ours - bare) / result["layer_bytes"], "layers"


def more_name(name: str) -> str:
    return f"{name}, peak memory of a step less that of 2 forwards"


def estimate_name(name: str) -> str:
    return f"{name}, estimated memory of a step / its peak"


def weighed_case(name: str, kind: str) -> tuple[str, Case]:
    """The name of its results, and the case."""
    step, own = STEPS[name], name if kind == "eager" else f"{name}-{kind}"
    goals = {estimate_name(own): Goal(near=(1.0, 0.1))}
    if step.trainer == "mezo" and kind == "eager":
        goals[more_name(own)] = Goal(1.0, "layers")
    return f"memory-{own}", Case(partial(weigh, step.of_kind(kind)), partial(weighed_figures, own, kind), goals)


def counted_figures(name: str, result: Result) -> Iterator[Figure]:
    """Beside the roofline: a forward takes its operations or the reading of its weights, whichever takes longer.

    A step of all weights has two of them, reads and writes the weights of the blocks for each of its two sides, and
    reads and writes all weights for its update.
    """
    sizes = f"{result['rows']} x {result['tokens']} tokens"
    arithmetic, reading = (
        result[of] / result[ceiling]
        for of, ceiling in (("operations", "operations_per_s"), ("block_bytes", "bytes_per_s"))
    )
    forwards = 2 * max(arithmetic, reading)
    passes = (4 * result["block_bytes"] + 2 * result["weight_bytes"]) / result["bytes_per_s"]
    yield f"{name}, ceiling: a product of {SIDE} x {SIDE} in bfloat16", result["operations_per_s"] / 1e12, "TFLOP/s"
    yield f"{name}, ceiling: a copy, read and written", result["bytes_per_s"] / 1e12, "TB/s"
    yield f"{name}, a forward of {sizes}, operations counted", result["operations"] / 1e12, "TFLOP"
    yield f"{name}, a forward of {sizes}, weights that it reads", result["block_bytes"] / 1e9, "GB"
    yield f"{name}, passes over the weights in a step", passes, "s"
    yield roofline_name(name, "2 forwards"), result["forwards_s"] / forwards, "ratio"
    yield roofline_name(name, OURS), result["step_s"] / (forwards + passes), "ratio"


def roofline_name(name: str, work: str) -> str:
    return f"{name}, {work} / the roofline"


def counted_case(name: str) -> Case:
    goals = {roofline_name(name, work): Goal() for work in ("2 forwards", OURS)}
    return Case(partial(count, STEPS[name]), partial(counted_figures, name), goals)


MEMORY = dict(weighed_case(name, kind) for name, kind in WEIGHED)
ROOFLINE = {f"roofline-{name}": counted_case(name) for name in COUNTED}
