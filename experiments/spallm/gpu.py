"""What the kernels of a sketch do on a GPU; adds rows to claims.json beside this file.

    python experiments/spallm/gpu.py              # every piece that gpu.json does not have yet (minutes)
    python experiments/spallm/gpu.py --only NAME  # this one again: check, replay, decode, product or step

Matrices have the shape of Llama-2-7B's largest, random codes of 4 bits and bfloat16 inputs. So many are used in turn
that their codes do not fit the card's cache. Without a GPU nothing is measured. A piece without a result has rows that
say so, and claim nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from fedzo.bench.claims import Claims, kept_results
from fedzo.bench.measure import measure_peak_bytes, medians_on_gpu
from fedzo.bench.shapes import random_model
from fedzo.bench.step import DENSE, OURS, Bench, bench_step
from fedzo.data.encode import Example
from fedzo.models.loaded import LoadedModel
from fedzo.models.sketched.layers import replace_layers
from fedzo.models.sketched.registry import SketchFormat, mark_as_sketch
from fedzo.records.folder import replace_file
from fedzo.sketch import SketchLinear, TableSpace, decode, sketched_layers
from fedzo.sketch.gpu import DTYPES, FUSED_TOKENS, kernels_for
from fedzo.system import environment, no_progress
from fedzo.zo.directions import add_direction, stream_key
from fedzo.zo.estimator import TwoPointConfig, build_estimator
from fedzo.zo.steps import apply_steps

HERE = Path(__file__).parent
RESULTS = HERE / "gpu.json"
CUDA = torch.device("cuda", 0)
ROWS, COLUMNS, MATRICES = 11_008, 4096, 8
SHAPES = ((4096, 4096, 1), (1024, 11_008, 4), (521, 2056, 8))
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048)
ROUNDING = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
Result = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=PIECES, help="measure this one again; repeatable")
    only = parser.parse_args().only
    results, wanted = known(), only or [name for name in PIECES if name not in known()]
    if wanted and (reason := why_not()):
        print(f"Nothing is measured: this machine has {reason}.")
        wanted = []
    for name in wanted:
        print(f"{name} ...", flush=True)
        found = PIECES[name]()
        results[name] = {"card": torch.cuda.get_device_name(CUDA), "found": found, "environment": environment()}
        replace_file(RESULTS, json.dumps(results, indent=1) + "\n")
    claims = gather(results)
    claims.write(HERE / "claims.json")
    claims.show()


def known() -> dict[str, Result]:
    """What earlier calls have found, by piece."""
    return kept_results(RESULTS, {})


def why_not() -> str:
    """What this machine lacks, as half a sentence; empty where it can measure."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    kernels = kernels_for(torch.empty(0, dtype=torch.bfloat16, device=CUDA), 4)
    return "no usable kernels: see the warning" if kernels is None else ""


def layer_of(rows: int, columns: int, *, bits: int = 4, groups: int = 1, seed: int = 0) -> SketchLinear:
    """A layer of random tables and codes, on the card."""
    layer = SketchLinear(columns, rows, bits=bits, groups_per_row=groups, device=CUDA)
    fill(layer, seed)
    return layer.requires_grad_(False)


def fill(layer: SketchLinear, seed: int) -> None:
    tables = layer.tables.detach()
    add_direction(torch.zeros_like(tables), stream_key(seed, round=0), scale=0.02, out=tables)
    layer.codes.random_(0, 256, generator=torch.Generator(layer.codes.device).manual_seed(seed))
    layer.codes[:, -1] &= 0xFF << (-layer.in_features * layer.bits % 8) & 0xFF  # a row is filled up with zeros


# --- pieces -----------------------------------------------------------------------------------------------------------


def check() -> Result:
    """Kernels beside the CPU's decoding and a product in float64: weights that differ, and the largest error.

    The error is in units of the last place of the result, beyond what sums in float32 explain. Small and odd shapes are
    those of ``pytest -m gpu tests/unit/sketch``.
    """
    differing, worst, cases = 0, 0.0, 0
    for ((rows, columns, groups), bits), dtype in product(zip(SHAPES, (4, 3, 2), strict=True), DTYPES):
        layer = layer_of(rows, columns, bits=bits, groups=groups)
        out = decode(layer.codes, layer.tables, torch.empty(rows, columns, dtype=dtype, device=CUDA))
        weight = decode(layer.codes.cpu(), layer.tables.cpu(), torch.empty(rows, columns, dtype=dtype))
        differing += int((out.cpu() != weight).sum())
        for num_tokens in (1, 8, FUSED_TOKENS):
            x = torch.randn(num_tokens, columns, device=CUDA, generator=torch.Generator(CUDA).manual_seed(1)).to(dtype)
            exact = x.double() @ weight.double().to(CUDA).T
            sums = 1e-6 * (x.double().abs() @ weight.double().abs().to(CUDA).T)
            beyond = (layer(x).double() - exact).abs() - sums
            worst = max(worst, float((beyond / (ROUNDING[dtype] * exact.abs()).clamp(min=1e-30)).max()))
            cases += 1
    return {"differing": differing, "units": max(worst, 0.0), "cases": cases}


def replay() -> Result:
    """One log on both devices: tables that differ after 100 steps."""
    layers = [layer_of(512, 1024)]
    layers.append(SketchLinear(1024, 512, bits=4))
    layers[1].load_state_dict({name: tensor.cpu() for name, tensor in layers[0].state_dict().items()})
    for layer in layers:
        space = TableSpace([layer])
        for step in range(100):
            apply_steps(space, [(0.1 * step - 3, stream_key(0, round=step))], lr=1e-4)
    return {"differing": int((layers[0].tables.cpu() != layers[1].tables).sum())}


def decoding() -> Result:
    """Milliseconds of decoding a matrix into the scratch, and of copying the decoded matrix."""
    layers = [layer_of(ROWS, COLUMNS, seed=seed) for seed in range(MATRICES)]
    outs = [torch.empty(ROWS, COLUMNS, dtype=torch.bfloat16, device=CUDA) for _ in layers]
    others = [torch.empty_like(out) for out in outs]
    return medians_on_gpu(
        {
            "decode": each(lambda layer, out: decode(layer.codes, layer.tables, out), layers, outs),
            "copy": each(lambda other, out: other.copy_(out), others, outs),
        }
    )


def products() -> Result:
    """Milliseconds of a product by numbers of tokens: with tiles decoded, with the matrix decoded first, and dense."""
    layers = [layer_of(ROWS, COLUMNS, seed=seed) for seed in range(MATRICES)]
    weights = [layer.weight.bfloat16() for layer in layers]
    scratch = torch.empty_like(weights[0])
    codes = [torch.empty_like(layer.codes) for layer in layers]
    kernels = kernels_for(scratch, layers[0].bits)
    assert kernels is not None
    copied = medians_on_gpu({"copy": each(lambda out, layer: out.copy_(layer.codes), codes, layers)})
    found = {}
    for num_tokens in TOKENS:
        x = torch.randn(num_tokens, COLUMNS, device=CUDA).bfloat16()

        def fused(layer: SketchLinear, x: torch.Tensor = x) -> None:
            kernels.product(x, layer.codes, layer.tables.detach().bfloat16(), None)

        def decoded(layer: SketchLinear, x: torch.Tensor = x) -> None:
            F.linear(x, decode(layer.codes, layer.tables, scratch))

        work = {
            "fused": each(fused, layers),
            "decoded": each(decoded, layers),
            "dense": each(partial(F.linear, x), weights),
        }
        found[num_tokens] = medians_on_gpu(work)
    return {"copy_of_codes": copied["copy"], "tokens": found}


def each(run: Callable[..., object], *lists: list[Any]) -> Callable[[], object]:
    """One piece of work: ``run`` on the first of each list, then on the second, and so on."""
    return lambda: [run(*arguments) for arguments in zip(*lists, strict=True)]


def step() -> Result:
    """``fedzo bench step`` on 32 rows of 128 tokens, and the peak of its step, before a dense twin is made."""
    bench = bench_of(random_sketch("llama-2-7b", device="cuda", dtype=torch.bfloat16), rows=32, tokens=128)
    torch.cuda.empty_cache()
    works = bench.contestants()
    works[OURS]()
    peak = measure_peak_bytes(works[OURS], CUDA)
    result = bench_step(bench, repeats=7, on_repeat=no_progress)
    (figure,) = (each for each in result["figures"] if each["name"] == OURS)
    figure["peak_bytes"] = peak
    return result


def random_sketch(shape: str, *, device: str, dtype: torch.dtype) -> LoadedModel:
    """A model of a published shape whose codes and tables are random, of 4 bits with one group a row."""
    loaded = random_model(shape, device=device, dtype=dtype)
    replace_layers(loaded.model, bits=4, groups_per_row=1, keep=["lm_head"])
    mark_as_sketch(loaded.model, SketchFormat(4, 1, ["lm_head"]))
    loaded.model.eval().requires_grad_(False)
    for number, layer in enumerate(sketched_layers(loaded.model).values()):
        fill(layer, number)
    return loaded


def bench_of(loaded: LoadedModel, *, rows: int, tokens: int) -> Bench:
    """As ``fedzo bench step`` makes it, on the tables."""
    vocabulary, config = len(loaded.tokenizer), TwoPointConfig(eps=1e-3)
    prompts = [tuple((row * tokens + i) * 7919 % vocabulary for i in range(tokens)) for row in range(rows)]
    examples = [Example(prompt=prompt, candidates=((11,), (29,)), label=0) for prompt in prompts]
    space = TableSpace(list(sketched_layers(loaded.model).values()))
    return Bench(loaded, space, build_estimator(config), examples, config.float32_eps, config.num_probes)


PIECES: dict[str, Callable[[], Result]] = {
    "check": check,
    "replay": replay,
    "decode": decoding,
    "product": products,
    "step": step,
}


# --- claims -----------------------------------------------------------------------------------------------------------


CHECKED = "products of several bits, groups, widths, dtypes and numbers of tokens"
REPLAYED = "table values that a log of 100 steps makes unlike a CPU"
DECODED = f"decoding 4 bits to bfloat16, {ROWS} x {COLUMNS}"
STEPPED = "Llama-2-7B's shape, 4 bits, bfloat16, 32 x 128 tokens, a step of tables"
TILES, FIRST = "tiles decoded / cuBLAS with the dense matrix", "decoded first / cuBLAS with the dense matrix"
Goal = tuple[str, float | None]
"""A unit and an upper bound."""
GOALS: dict[str, dict[str, Goal]] = {
    "check": {
        f"{CHECKED}, decoded weights that differ from the CPU's": ("", 0),
        f"{CHECKED}, largest error beyond float32 sums, in units of the last place": ("", 1),
    },
    "replay": {REPLAYED: ("", 0)},
    "decode": {f"{DECODED}, bandwidth / a copy's": ("ratio", None)},
    "product": {f"a product with {ROWS} x {COLUMNS}, 4 bits, bfloat16, tokens: 1, {TILES}": ("ratio", None)},
    "step": {f"{STEPPED} / its two forwards": ("ratio", 1.08), f"{STEPPED}, peak memory": ("GiB", 8)},
}
"""What each piece must find, by the names of figures: else a row says that it was not measured."""


def gather(results: dict[str, Result]) -> Claims:
    claims = Claims(command="python experiments/spallm/gpu.py")
    for name, goals in GOALS.items():
        if name not in results:
            for what, (unit, at_most) in goals.items():
                claims.add(what, None, unit, at_most=at_most)
            continue
        claims.environment, card = results[name]["environment"], results[name]["card"]
        for what, value, unit in figures(name, results[name]["found"]):
            claims.add(f"{card}: {what}", value, unit, at_most=goals.get(what, (unit, None))[1])
    return claims


def figures(name: str, found: Result) -> Iterator[tuple[str, float, str]]:
    """What follows from the results of a piece: names, values and units."""
    code_bytes, table_bytes = ROWS * COLUMNS // 2, ROWS * 16 * 2
    if name == "check":
        yield f"{CHECKED}, decoded weights that differ from the CPU's", found["differing"], ""
        yield f"{CHECKED}, largest error beyond float32 sums, in units of the last place", found["units"], ""
    elif name == "replay":
        yield REPLAYED, found["differing"], ""
    elif name == "decode":
        moved = (code_bytes + table_bytes + 2 * ROWS * COLUMNS) / found["decode"]
        yield f"{DECODED}, bandwidth / a copy's", moved / (4 * ROWS * COLUMNS / found["copy"]), "ratio"
        yield DECODED, found["decode"] / MATRICES / 1e3, "s"
    elif name == "product":
        for num_tokens, times in found["tokens"].items():
            of = f"a product with {ROWS} x {COLUMNS}, 4 bits, bfloat16, tokens: {num_tokens}"
            yield f"{of}, {TILES}", times["fused"] / times["dense"], "ratio"
            yield f"{of}, {FIRST}", times["decoded"] / times["dense"], "ratio"
            if int(num_tokens) <= 8:
                share = (code_bytes + table_bytes) / times["fused"] / (2 * code_bytes / found["copy_of_codes"])
                yield f"{of}, tiles decoded, bandwidth / a copy's", share, "ratio"
    else:
        named = {figure["name"]: figure for figure in found["figures"]}
        ours = named[OURS]
        yield f"{STEPPED} / its two forwards", ours["ratio"], "ratio"
        yield f"{STEPPED} / the dense model's two forwards", ours["median_s"] / named[DENSE]["median_s"], "ratio"
        yield f"{STEPPED}, peak memory", ours["peak_bytes"] / 2**30, "GiB"


if __name__ == "__main__":
    main()
