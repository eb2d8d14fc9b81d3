"""What the virtual paths of a round cost for 1 to 1,000 clients, and its replay; writes claims.json and a figure.

    python experiments/replay/run.py

T = 10 local steps, one probe, n = 10^6 values, Gaussian directions. Shared seeds: one direction a step for all clients.
Per-client seeds: every client has its own. Replay applies the round's aggregate to theta. Medians of interleaved
repeats, but for the slowest case, which is measured once.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.ticker import FuncFormatter, NullFormatter
from torch import nn

from fedzo.bench.claims import Claims
from fedzo.report.style import BLUE, ORANGE, PAPER, house_style, new_axes
from fedzo.zo.config import Distribution
from fedzo.zo.directions import SHARED, direction
from fedzo.zo.log import ScalarRecord
from fedzo.zo.spaces.dense import DenseSpace
from fedzo.zo.steps import apply_record
from fedzo.zo.virtual_path import round_products, virtual_paths

HERE = Path(__file__).parent
SIZE, STEPS, REPEATS = 1_000_000, 10, 5
CLIENTS = (1, 10, 100, 1000)
ONCE = 1000  # clients with seeds of their own from which on one repeat has to do
Case = tuple[str, int]


def main() -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    seconds = measure(cases())
    claims = Claims(command="python experiments/replay/run.py")
    for what, num in seconds:
        claims.add(f"{what}: {num} client{'s' * (num > 1)}, T = {STEPS}, n = 10^6", seconds[what, num], "s")
    first, last = CLIENTS[0], CLIENTS[-1]
    for what, target in (("GradIP, shared seeds", 1.5), ("replay, shared seeds", 1.5), ("GradIP, own seeds", None)):
        growth = seconds[what, last] / seconds[what, first]
        claims.add(f"{what}: {last} clients / {first} client, time", growth, "ratio", at_most=target)
    claims.write(HERE / "claims.json")
    draw(seconds)
    claims.show()


def cases() -> dict[Case, Callable[[], object]]:
    gradient = torch.from_numpy(direction(1, SIZE))
    space = DenseSpace([nn.Parameter(torch.zeros(SIZE))])

    sent = {k: direction(k, STEPS).reshape(STEPS, 1) for k in range(CLIENTS[-1])}

    def paths(scalars: dict[int, np.ndarray], *, shared: bool) -> object:
        law, owners = Distribution.gaussian, (SHARED,) if shared else tuple(scalars)
        c = np.zeros((STEPS, 1, len(owners)), np.float32)
        record = ScalarRecord(round=0, lr=1e-3, owners=owners, coefficients=c)
        xi = round_products(gradient, record, run_seed=0, distribution=law)
        return virtual_paths(gradient, scalars, record, xi, run_seed=0, distribution=law)

    def replay(g: np.ndarray) -> None:
        """The aggregate of all clients, and its steps."""
        c = g.mean(axis=0, dtype=np.float64).astype(np.float32)[:, :, None]
        apply_record(space, ScalarRecord(round=0, lr=1e-3, owners=(SHARED,), coefficients=c), run_seed=0)

    found: dict[Case, Callable[[], object]] = {}
    for num in CLIENTS:
        some = {k: sent[k] for k in range(num)}
        stacked = np.stack(list(some.values()))
        found["GradIP, shared seeds", num] = partial(paths, some, shared=True)
        found["replay, shared seeds", num] = partial(replay, stacked)
        found["GradIP, own seeds", num] = partial(paths, some, shared=False)
    return found


def measure(work: dict[Case, Callable[[], object]]) -> dict[Case, float]:
    seconds: dict[Case, list[float]] = {case: [] for case in work}
    for repeat in range(REPEATS + 1):
        for (what, num), run in work.items():
            if "own" in what and num >= ONCE and repeat != 1:
                continue
            begin = time.perf_counter()
            run()
            if repeat:  # the first warms up caches and compilers
                seconds[what, num].append(time.perf_counter() - begin)
    return {case: statistics.median(times) for case, times in sorted(seconds.items())}


def draw(seconds: dict[Case, float]) -> None:
    with house_style():
        figure, axes = new_axes()
        for what, colour, marker in (("GradIP, shared seeds", BLUE, "o"), ("GradIP, own seeds", ORANGE, "s")):
            line = [seconds[what, num] for num in CLIENTS]
            axes.plot(CLIENTS, line, color=colour, marker=marker, label=what.split(", ")[1])
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
            axis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("clients of the round")
        axes.set_ylabel("seconds")
        threads = torch.get_num_threads()
        axes.set_title(f"GradIP of all clients of a round: {STEPS} steps, a million values, {threads} threads")
        axes.legend()
        figure.savefig(HERE / "gradip_cost.png", dpi=144, facecolor=PAPER, metadata={"Software": None})


if __name__ == "__main__":
    main()
