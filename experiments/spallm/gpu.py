"""What the kernels of a sketch do on a GPU; adds rows to claims.json beside this file.

    python experiments/spallm/gpu.py              # every piece that gpu.json does not have yet (minutes)
    python experiments/spallm/gpu.py --only NAME  # this one again: check, replay, decode, product or step

Matrices have the shape of Llama-2-7B's largest, random codes of 4 bits and bfloat16 inputs. So many are used in turn
that their codes do not fit the card's cache. Without a GPU the script says so and claims nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F

from fedzo.bench.claims import Claims
from fedzo.bench.measure import measure_peak_bytes, medians_on_gpu
from fedzo.bench.shapes import random_model
from fedzo.bench.step import DENSE, OURS, Bench, bench_step
from fedzo.data.encode import Example
from fedzo.models.loaded import LoadedModel
from fedzo.models.sketched.layers import replace_layers
from fedzo.models.sketched.registry import SketchFormat, mark_as_sketch
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
    reason = "no CUDA device" if not torch.cuda.is_available() else None
    if reason is None and kernels_for(torch.empty(0, dtype=torch.bfloat16, device=CUDA), 4) is None:
        reason = "no usable kernels: see the warning"
    if reason is not None:
        print(f"Nothing is measured and nothing claimed: this machine has {reason}.")
        return
    results: dict[str, Result] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in only or [name for name in PIECES if name not in results]:
        print(f"{name} ...", flush=True)
        found = PIECES[name]()
        results[name] = {"card": torch.cuda.get_device_name(CUDA), "found": found, "environment": environment()}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    claims = gather(results)
    claims.write(HERE / "claims.json")
    claims.show()


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


def gather(results: dict[str, Result]) -> Claims:
    claims = Claims(command="python experiments/spallm/gpu.py")
    code_bytes, table_bytes = ROWS * COLUMNS // 2, ROWS * 16 * 2
    for name, result in results.items():
        claims.environment = result["environment"]
        card, found = result["card"], result["found"]
        if name == "check":
            of = f"{card}: {found['cases']} products of bits, groups, widths, dtypes and tokens"
            claims.add(f"{of}, decoded weights that differ from the CPU's", found["differing"], "", at_most=0)
            claims.add(
                f"{of}, largest error beyond float32 sums, in units of the last place", found["units"], "", at_most=1
            )
        elif name == "replay":
            claims.add(
                f"{card}: table values that a log of 100 steps makes unlike a CPU", found["differing"], "", at_most=0
            )
        elif name == "decode":
            moved = (code_bytes + table_bytes + 2 * ROWS * COLUMNS) / found["decode"]
            of = f"{card}: decoding 4 bits to bfloat16, {ROWS} x {COLUMNS}"
            claims.add(f"{of}, bandwidth / a copy's", moved / (4 * ROWS * COLUMNS / found["copy"]), "ratio")
            claims.add(f"{of}", found["decode"] / MATRICES / 1e3, "s")
        elif name == "product":
            for num_tokens, times in found["tokens"].items():
                of = f"{card}: a product with {ROWS} x {COLUMNS}, 4 bits, bfloat16, tokens: {num_tokens}"
                claims.add(
                    f"{of}, tiles decoded / cuBLAS with the dense matrix", times["fused"] / times["dense"], "ratio"
                )
                claims.add(
                    f"{of}, decoded first / cuBLAS with the dense matrix", times["decoded"] / times["dense"], "ratio"
                )
                if int(num_tokens) <= 8:
                    share = (code_bytes + table_bytes) / times["fused"] / (2 * code_bytes / found["copy_of_codes"])
                    claims.add(f"{of}, tiles decoded, bandwidth / a copy's", share, "ratio")
        else:
            figures = {figure["name"]: figure for figure in found["figures"]}
            size = f"{found['rows']} x {found['tokens']} tokens"
            of = f"{card}: Llama-2-7B's shape, 4 bits, bfloat16, {size}, a step of tables"
            claims.add(f"{of} / its two forwards", figures[OURS]["ratio"], "ratio", at_most=1.08)
            claims.add(
                f"{of} / the dense model's two forwards",
                figures[OURS]["median_s"] / figures[DENSE]["median_s"],
                "ratio",
            )
            claims.add(f"{of}, peak memory", cast(int, figures[OURS]["peak_bytes"]) / 2**30, "GiB", at_most=8)
    return claims


if __name__ == "__main__":
    main()
