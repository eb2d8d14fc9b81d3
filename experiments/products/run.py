"""Who multiplies float32 matrices on this CPU: what it saves, and what it does to scalars; writes claims.json.

    python experiments/products/run.py          # about two minutes

The product that `fedzo.models.products` chooses beside PyTorch's own, in interleaved repeats: one large product, and
one forward of SmolLM2-135M on 16 x 32 tokens. Then g along some directions over every thousandth weight, by either
product, against the same model in float64, norms included. Where nothing is chosen there is nothing to compare.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fedzo.bench.claims import Claims
from fedzo.bench.measure import interleaved
from fedzo.bench.step import Bench, open_bench
from fedzo.config.load import load
from fedzo.models.products import default_product, product_is_chosen
from fedzo.zo.directions import stream_key
from fedzo.zo.spaces.masked import MaskedSpace

HERE = Path(__file__).parent
SIDE, REPEATS, DIRECTIONS, EPS = 2048, 9, 16, 1e-3


def main() -> None:
    bench = open_bench(load(["trainer=meerkat", "device=cpu"]), shape=None, rows=16, tokens=32)
    claims = Claims(command="python experiments/products/run.py")
    if not product_is_chosen():
        raise SystemExit("On this machine PyTorch's own product stays; there is nothing to compare.")
    time_them(bench, claims)
    model = bench.loaded.model
    exact = scalars(in_float64(model), bench)
    size = root_mean_square(exact)
    claims.add(f"g along {DIRECTIONS} directions, in float64, rms", size, "nat")
    claims.add("g, chosen: error, rms over that of g", root_mean_square(scalars(model, bench) - exact) / size, "share")
    with default_product():
        error = root_mean_square(scalars(model, bench) - exact) / size
    claims.add("g, PyTorch's own: error, rms over that of g", error, "share")
    claims.write(HERE / "claims.json")
    claims.show()


def time_them(bench: Bench, claims: Claims) -> None:
    a, b, product = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE), torch.empty(SIDE, SIDE)

    def by_default(work: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            with default_product():
                work()

        return run

    work: dict[str, Callable[[], object]] = {"product": lambda: torch.mm(a, b, out=product), "forward": bench.loss}
    defaults = {f"{name} by default": by_default(each) for name, each in work.items()}
    median = {name: statistics.median(s) for name, s in interleaved({**work, **defaults}, repeats=REPEATS).items()}
    for name, what in (("product", f"a product of {SIDE} x {SIDE}"), ("forward", "a forward of 16 x 32 tokens")):
        claims.add(f"{what}: chosen / PyTorch's own, time", median[name] / median[f"{name} by default"], "ratio")
    claims.add("the product, chosen", 2 * SIDE**3 / median["product"] / 1e9, "GFLOP/s")
    claims.add("the product, PyTorch's own", 2 * SIDE**3 / median["product by default"] / 1e9, "GFLOP/s")


def in_float64(model: nn.Module) -> nn.Module:
    """A copy in float64, with norms that do not go down to float32 on the way."""
    wide = copy.deepcopy(model).double()
    for module in wide.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = lambda x, norm=module: (
                norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)
            )
    return wide


def scalars(model: Any, bench: Bench) -> np.ndarray:
    """g of the loss over two candidates, float64 [DIRECTIONS], written plainly."""
    indices = {
        name: torch.arange(0, parameter.numel(), 1000)
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and "embed" not in name
    }
    space = MaskedSpace(model, indices)
    ids = torch.tensor([example.prompt for example in bench.examples])
    choices = torch.tensor([candidate[0] for candidate in bench.examples[0].candidates])
    labels = torch.tensor([example.label for example in bench.examples])

    def loss(scale: float, key: int) -> float:
        with torch.inference_mode(), space.probe(scale, key):
            hidden = model.get_decoder()(input_ids=ids).last_hidden_state[:, -1]
            return float(F.cross_entropy((hidden @ model.lm_head.weight[choices].T).double(), labels))

    keys = [stream_key(0, round=0, probe=probe) for probe in range(DIRECTIONS)]
    return np.array([(loss(EPS, key) - loss(-EPS, key)) / (2 * EPS) for key in keys])


def root_mean_square(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2)))


if __name__ == "__main__":
    main()
