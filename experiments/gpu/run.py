"""What directions, steps and random masks cost on a GPU; writes claims.json beside this file.

    python experiments/gpu/run.py kernel       # directions beside a copy, and the update of all weights (half a minute)
    python experiments/gpu/run.py masks        # the random mask of a large model (half a minute)
    python experiments/gpu/run.py steps        # fedzo bench step: OPT-1.3B and OPT-13B (about 3 minutes)
    python experiments/gpu/run.py captured     # the same with CUDA graphs (about 3 minutes)
    python experiments/gpu/run.py NAME ...     # single cases of these again
    python experiments/gpu/run.py              # claims.json from the results that are there

Each case is a file of results/ and is not measured again unless it is named, so a piece that was interrupted goes on.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fedzo.bench.claims import Claims
from fedzo.bench.measure import medians_on_gpu
from fedzo.bench.shapes import random_model
from fedzo.masks.select import Selector, select_mask
from fedzo.system import environment
from fedzo.zo.config import Distribution, Rounding
from fedzo.zo.directions import add_direction, lots, stream_key
from fedzo.zo.rounding import is_rounded
from fedzo.zo.spaces.full import FullSpace

HERE = Path(__file__).parent
RESULTS = HERE / "results"
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COORDINATES = 1 << 28
SCALE = 2.0**-10
STEPS = {
    f"{shape}-{trainer}": f"trainer={trainer} --shape {shape} model.dtype=bfloat16 --rows {rows} --tokens 64"
    for shape, rows in (("opt-1.3b", 16), ("opt-13b", 64))
    for trainer in ("mezo", "meerkat", "lora")
}
STEPS |= {f"{name}-captured": f"{words} model.cuda_graphs=true" for name, words in STEPS.items()}


def main(arguments: list[str]) -> None:
    RESULTS.mkdir(exist_ok=True)
    pieces = {"kernel": ["directions", "update"], "masks": ["mask"], **step_pieces()}
    for argument in arguments:
        for name in pieces.get(argument, [argument]):
            path = RESULTS / f"{name}.json"
            if name == argument or not path.exists():
                print(f"{name} ...", flush=True)
                measure(name, path)
    claims = [row for path in sorted(RESULTS.glob("*.json")) for row in gather(path.stem, json.loads(path.read_text()))]
    (HERE / "claims.json").write_text(json.dumps(claims, indent=1) + "\n")


def step_pieces() -> dict[str, list[str]]:
    """Steps by the kind of their forwards."""
    captured = [name for name in STEPS if name.endswith("captured")]
    return {"steps": [name for name in STEPS if name not in captured], "captured": captured}


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(name: str, path: Path) -> None:
    if name in STEPS:
        command = [sys.executable, "-m", "fedzo", "bench", "step", *STEPS[name].split(), "--no-memory"]
        subprocess.run([*command, "--repeats", "7", "--out", os.path.relpath(path)], check=True)
        return
    rows = {"directions": directions, "update": update, "mask": mask}[name]()
    card = torch.cuda.get_device_name(CUDA)
    path.write_text(json.dumps({"device_name": card, "rows": rows, "environment": environment()}, indent=1) + "\n")


def directions() -> list[dict[str, Any]]:
    """Every law, dtype and rounding beside a copy of as many bytes; a million of them compared with the CPU's bits."""
    return [
        direction(dtype, law, rounding)
        for dtype in DTYPES
        for law in Distribution
        for rounding in Rounding
        if rounding is Rounding.nearest or is_rounded(dtype)
    ]


def direction(dtype: torch.dtype, law: Distribution, rounding: Rounding) -> dict[str, Any]:
    base = torch.randn(COORDINATES, device=CUDA).to(dtype)
    out = base.clone()
    move(base, out, 8, law, rounding)
    here = base[-(1 << 20) :].cpu()
    want = here.clone()
    move(here, want, 8 + COORDINATES - len(here), law, rounding)
    assert torch.equal(out[-len(want) :].cpu(), want), (dtype, law, rounding)
    times = in_turn({"copy": partial(out.copy_, base), "move": partial(move, base, out, 8, law, rounding)})
    return {"dtype": name_of(dtype), "law": law, "rounding": rounding, **times}


def move(base: torch.Tensor, out: torch.Tensor, start: int, law: Distribution, rounding: Rounding) -> None:
    """From ``base`` to ``out``, or within ``out`` where it is rounded stochastically."""
    stochastic = rounding is Rounding.stochastic
    base = out if stochastic else base
    add_direction(base, 1, scale=SCALE, start=start, distribution=law, out=out, stochastic=stochastic)


def update() -> list[dict[str, Any]]:
    """The step of all weights of OPT-1.3B's shape, one launch, and a copy of as many bytes."""
    return [updated(dtype) for dtype in DTYPES[:2]]


def updated(dtype: torch.dtype) -> dict[str, Any]:
    model = random_model("opt-1.3b", device="cuda", dtype=dtype).model
    space = FullSpace(model)
    base = torch.randn(space.size, device=CUDA).to(dtype)
    out = torch.empty_like(base)
    times = in_turn({"copy": partial(out.copy_, base), "move": partial(space.step, 1e-6, 1)})
    return {"dtype": name_of(dtype), "tensors": len(list(model.parameters())), "n": space.size, **times}


def mask() -> list[dict[str, Any]]:
    """The random mask of OPT-1.3B's shape, as `fedzo mask` draws it."""
    model = random_model("opt-1.3b", device="cuda", dtype=torch.bfloat16).model
    seconds = []
    for _ in range(3):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        found = select_mask(model, density=1e-3, selector=Selector.random, seed=3)
        seconds.append(time.perf_counter() - begin)
    lots(stream_key(3, round=0), 1, CPU)  # compiles the CPU's kernel
    begin = time.perf_counter()
    here = lots(stream_key(3, round=0), COORDINATES // 16, CPU)
    on_cpu = time.perf_counter() - begin
    assert torch.equal(lots(stream_key(3, round=0), COORDINATES // 16, CUDA).cpu(), here)
    eligible = int(found.manifest["num_eligible"])
    return [{"eligible": eligible, "seconds": seconds, "cpu_seconds_of_lots": on_cpu * 16 * eligible / COORDINATES}]


def in_turn(work: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Milliseconds of each."""
    return {f"{name}_ms": found for name, found in medians_on_gpu(work).items()}


# --- claims -----------------------------------------------------------------------------------------------------------


def gather(name: str, result: dict[str, Any]) -> list[dict[str, Any]]:
    card = result["device_name"]
    claims = Claims(command=f"python experiments/gpu/run.py {name}", environment=result["environment"])
    if name in STEPS:
        gather_step(claims, name, card, result)
        return claims.rows
    for row in result["rows"]:
        if name == "directions":
            nearest = row["rounding"] == "nearest"
            how = "to nearest" if nearest else "rounded stochastically"
            head = f"{card}: a direction of 2^28 coordinates, {row['law']}, {row['dtype']}, {how} / a copy"
            target = (1.15 if row["dtype"] == "float32" else 1.3) if nearest else None
            claims.add(head, row["move_ms"] / row["copy_ms"], "ratio", at_most=target)
        elif name == "update":
            head = f"{card}: a step of all {row['tensors']} tensors of OPT-1.3B's shape in {row['dtype']}"
            claims.add(f"{head} / a copy", row["move_ms"] / row["copy_ms"], "ratio")
            claims.add(head, row["move_ms"] / 1e3, "s")
        else:
            billions = row["eligible"] / 1e9
            head = f"{card}: the random mask of OPT-1.3B's shape, a billion eligible weights"
            claims.add(head, statistics.median(row["seconds"]) / billions, "s", at_most=2.0)
    return claims.rows


def gather_step(claims: Claims, name: str, card: str, result: dict[str, Any]) -> None:
    full, small = "mezo" in name, name.startswith("opt-1.3b")
    captured = result.get("forwards") == "captured"  # not where the graphs were given up
    target = 1.05 if not full else (1.55 if captured else 1.35) if small else 1.15 if "H200" in card else 1.25
    for figure in result["figures"][1:]:
        ours = figure["name"] == "fedzo step"
        head = f"{card}: {name}, {figure['name']} / {figure_of_forwards(result)}"
        claims.add(head, figure["ratio"], "ratio", at_most=target if ours else None)
    claims.add(f"{card}: {name}, {figure_of_forwards(result)}", result["figures"][0]["median_s"], "s")


def figure_of_forwards(result: dict[str, Any]) -> str:
    kind = result.get("forwards", "eager")  # older results do not say
    return f"{result['forwards_per_step']} {kind} forwards of {result['rows']} x {result['tokens']} tokens"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    main(sys.argv[1:])
