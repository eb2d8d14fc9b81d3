"""Time and memory of a round against the number of simulated clients: joint forwards, one after another, and Ray.

    python experiments/clients/run.py           # about 45 minutes on 2 cores; a measured point is not measured again

Every point is a process of its own: SmolLM2-135M on Rotten Tomatoes, one row a client and step, Meerkat, three rounds,
the median of the last two (of 10,000 client steps: one round). Writes results.json, claims.json and
clients.png beside this file.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from fedzo.bench.claims import Claims, check_alike, kept_results, measured_in, metric_lines, ran_with
from fedzo.records.folder import replace_file

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
ROUNDS = 3
RUNTIMES = ("inline_batched", "inline", "ray")
POINTS = [
    # the quick ones first; a round of Ray's with 1,000 client steps would take a quarter of an hour
    *[(runtime, clients, 1) for clients in (10, 100) for runtime in RUNTIMES],
    *[(runtime, 10, 10) for runtime in RUNTIMES],
    ("inline_batched", 1000, 1),
    ("inline_batched", 100, 10),
    ("inline", 100, 10),
    ("inline_batched", 1000, 10),
]
NAMES = {"inline_batched": "together", "inline": "one after another", "ray": "Ray, two actors"}
COLOURS = {"inline_batched": "#0072B2", "inline": "#D55E00", "ray": "#009E73"}


def main() -> None:
    done = kept_results(RESULTS, [])
    for runtime, clients, steps in POINTS:
        if any((r["runtime"], r["clients"], r["local_steps"]) == (runtime, clients, steps) for r in done):
            continue
        print(f"{runtime}, {clients} clients, T = {steps} ...", flush=True)
        done.append(measure(runtime, clients, steps))
        replace_file(RESULTS, json.dumps(done, indent=1) + "\n")
        check_alike(done)
        print(json.dumps({k: v for k, v in done[-1].items() if k != "environment"}), flush=True)
    gather(done).write(HERE / "claims.json")
    draw(done)


def measure(runtime: str, clients: int, steps: int) -> dict[str, Any]:
    """Run one point in a process of its own and watch the memory of all its processes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--one", runtime, str(clients), str(steps), folder]
        process = subprocess.Popen(command, env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"})
        peak, stop = [0], threading.Event()

        def watch() -> None:
            while not stop.wait(0.2):
                peak[0] = max(peak[0], tree_bytes(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        code = process.wait()
        stop.set()
        watcher.join()
        if code != 0:
            raise SystemExit(f"{runtime}, {clients} clients: the run failed with exit code {code}")
        return {**json.loads((Path(folder) / "point.json").read_text()), "peak_bytes": peak[0]}


def tree_bytes(pid: int) -> int:
    """Resident memory of a process and all below it; shared pages count in each."""
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
    except psutil.Error:
        return 0
    total = 0
    for member in family:
        try:
            total += member.memory_info().rss
        except psutil.Error:
            continue
    return total


def one(runtime: str, clients: int, steps: int, folder: str) -> None:
    """One point, in this process."""
    import fedzo.fl.client.scalar_update as local_steps
    from fedzo.commands.train import start_run
    from fedzo.config.load import load

    spent = [0.0]
    example_losses = local_steps.example_losses

    def timed(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        try:
            return example_losses(*args, **kwargs)
        finally:
            spent[0] += time.perf_counter() - begin

    local_steps.example_losses = timed
    rounds = ROUNDS if clients * steps < 10_000 else 1
    settings = [f"runtime={runtime}", f"fl.num_clients={clients}", f"fl.local_steps={steps}", f"fl.rounds={rounds}"]
    settings += ["fl.batch_size=1", "partition=iid", "partition.holdout=0", "trainer.selector=random", "report=none"]
    settings += ["evaluation.central=false", "evaluation.federated_every_rounds=-1"]
    settings += ["strategy.deadline_s=86400"] if runtime == "ray" else []  # else clients take turns, without one
    run = Path(folder) / "run"
    start_run(load(settings), run, overrides=settings)
    seconds = [line["round_seconds"] for line in metric_lines(run, "round")]
    point = {
        "runtime": runtime,
        "clients": clients,
        "local_steps": steps,
        "round_s": statistics.median(seconds[1:] or seconds),
        "rounds_s": seconds,
        # on Ray the forwards are in other processes
        "losses_share": spent[0] / sum(seconds) if runtime != "ray" else None,
        "environment": ran_with(run, "fl.num_clients", "fl.local_steps", "fl.rounds"),
    }
    (Path(folder) / "point.json").write_text(json.dumps(point))


def gather(done: list[dict[str, Any]]) -> Claims:
    at = {(point["runtime"], point["clients"], point["local_steps"]): point for point in done}
    claims = Claims(command="python experiments/clients/run.py", environment=measured_in(done))
    add = claims.add
    for steps in (1, 10):
        few, many = at["inline_batched", 10, steps], at["inline_batched", 1000, steps]
        per_client, overhead = (many["peak_bytes"] - few["peak_bytes"]) / 990, 1 - many["losses_share"]
        add(
            f"memory of a simulated client beyond the tenth, of 1,000, T = {steps}", per_client / 1e6, "MB", at_most=1.0
        )
        add(
            f"share of a round of 1,000 clients that is not spent on losses, T = {steps}",
            overhead,
            "share",
            at_most=0.05,
        )
    for (runtime, clients, steps), point in at.items():
        add(f"a round of {clients} clients, T = {steps}, {runtime}", point["round_s"], "s")
        add(f"peak memory, {clients} clients, T = {steps}, {runtime}", point["peak_bytes"] / 1e9, "GB")
    return claims


def draw(done: list[dict[str, Any]]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    figure = Figure(figsize=(8, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, key, label, unit in zip(
        figure.subplots(1, 2), ("round_s", "peak_bytes"), ("seconds a round", "peak memory (GB)"), (1, 1e9), strict=True
    ):
        for runtime, colour in COLOURS.items():
            for steps, style in ((1, "-"), (10, ":")):
                points = sorted(
                    (p["clients"], p[key] / unit) for p in done if (p["runtime"], p["local_steps"]) == (runtime, steps)
                )
                if points:
                    name = f"{NAMES[runtime]}, T = {steps}"
                    axes.plot(*zip(*points, strict=True), style, marker="o", color=colour, label=name)
        axes.set_xscale("log")
        axes.set_xticks(numbers := sorted({p["clients"] for p in done}), [f"{number:,}" for number in numbers])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_yscale("log" if key == "round_s" else "linear")
        if key == "round_s":
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.set_ylim(bottom=None if key == "round_s" else 0)
        axes.set_xlabel("clients of a round")
        axes.set_title(label, fontsize=10)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(HERE / "clients.png", dpi=130)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
    else:
        main()
