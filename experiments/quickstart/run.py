"""Run the quickstart over three run seeds and write results.json, claims.json and accuracy.png beside this file.

    python experiments/quickstart/run.py

Beside the seeds, a run of seed 0 has oneDNN and MKL use AVX2 at most, and an installation into a fresh clone is timed.
A part that is complete is not run again, so an interrupted call goes on where it stopped. Nothing else should run on
the machine.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fedzo.bench.claims import Claims, measured_in, metric_lines, ran_with

HERE = Path(__file__).parent
RUNS = Path("runs/quickstart")
SEEDS = (0, 1, 2)
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}  # of matrix products, not of all kernels
COMMAND = "python experiments/quickstart/run.py"


def main() -> None:
    runs = [run(RUNS / f"seed{seed}", seed) for seed in SEEDS]
    avx2 = run(RUNS / "avx2", SEEDS[0], AVX2)
    installation_s = timed(RUNS / "install", install)
    results = {
        "run": [entry["summary"] for entry in runs],
        "wall_s": [entry["wall_s"] for entry in runs],
        "avx2_wall_s": avx2["wall_s"],
        "installation_s": installation_s,
        "environment": measured_in([*runs, avx2]),
        "command": COMMAND,
    }
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    gather(results).write(HERE / "claims.json")
    draw(runs)
    print("`python docs/tables.py` puts them into the pages")


def run(folder: Path, seed: int, variables: dict[str, str] | None = None) -> dict[str, Any]:
    """A run's summary, its lines, its environment, and the seconds of its command."""

    def train() -> None:
        command = ["train", "experiment=quickstart", f"seed={seed}", f"hydra.run.dir={folder}"]
        subprocess.run([sys.executable, "-m", "fedzo", *command], check=True, env={**os.environ, **(variables or {})})

    wall_s = timed(folder, train)
    lines = metric_lines(folder)
    summary = {"seed": seed, **next(line for line in lines if line["kind"] == "summary")}
    return {"summary": summary, "lines": lines, "environment": ran_with(folder), "wall_s": wall_s}


def timed(folder: Path, work: Any) -> float:
    """The seconds of work that fills a folder; done once, and from its beginning where it was interrupted."""
    told = folder.with_suffix(".json")
    if not told.exists():
        shutil.rmtree(folder, ignore_errors=True)
        begin = time.monotonic()
        work()
        told.write_text(json.dumps(time.monotonic() - begin))
    return float(json.loads(told.read_text()))


def install() -> None:
    """What ``make demo`` does before the run, in a fresh clone."""
    clone = RUNS / "install"
    subprocess.run(["git", "clone", "--quiet", ".", str(clone)], check=True)
    uncached = {**os.environ, "PIP_NO_CACHE_DIR": "1"}
    subprocess.run(["make", "-C", str(clone), ".venv/.installed", ".venv/.embedded"], check=True, env=uncached)


def gather(results: dict[str, Any]) -> Claims:
    """The claims of results.json."""
    runs, clients = results["run"], 8
    gains = [100 * (run["after"]["value"] - run["before"]["value"]) for run in runs]
    # beyond what the best threshold on the test rows would give the base
    learnt = [100 * (run["after"]["value"] - run["before"]["best_threshold_accuracy"]) for run in runs]
    areas = [run["after"]["auc"] - run["before"]["auc"] for run in runs]

    def mean(when: str, what: str) -> float:
        return statistics.fmean(run[when][what] for run in runs)

    up = max(run["payload_up_bytes"] for run in runs) / clients
    messages = max(run["message_up_bytes"] + run["message_down_bytes"] for run in runs) / clients
    claims = Claims(command=COMMAND, seeds=list(SEEDS), environment=results["environment"])
    add = claims.add
    claims.add_mean("accuracy rises from its zero-shot value, mean over seeds", gains, "points", at_least=20)
    add("accuracy rises from its zero-shot value, worst seed", min(gains), "points", at_least=15)
    base = "accuracy as it answers, less the base model's at its best threshold"
    claims.add_mean(f"{base}, mean over seeds", learnt, "points", at_least=5)
    add(f"{base}, worst seed", min(learnt), "points", at_least=3)
    claims.add_mean("AUC, less the base model's, mean over seeds", areas, "", at_least=0.04)
    for what, name in (("value", "accuracy"), ("best_threshold_accuracy", "accuracy at the best threshold")):
        add(f"{name} before", mean("before", what), "share")
        add(f"{name} after", mean("after", what), "share")
    add("AUC before", mean("before", "auc"), "area")
    add("AUC after", mean("after", "auc"), "area")
    wall_s, installation_s = statistics.median(results["wall_s"]), results["installation_s"]
    add("make demo: installation and run, median of the seeds", (installation_s + wall_s) / 60, "minutes", at_most=10)
    slow_s = installation_s + results["avx2_wall_s"]
    add("make demo: installation and run, oneDNN and MKL held to AVX2", slow_s / 60, "minutes", at_most=10)
    add("the run alone, median of the seeds", wall_s / 60, "minutes")
    add("scalars that a client sends in a whole run", up, "bytes", at_most=20_000)
    add("message contents of a client in a whole run, both ways", messages, "bytes")
    return claims


def draw(runs: list[dict[str, Any]]) -> None:
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for entry, colour in zip(runs, ("#0072B2", "#D55E00", "#009E73"), strict=True):
        scores = [line for line in entry["lines"] if line["kind"] == "score"]
        dev = sorted((line["round"], line["value"]) for line in scores if line["split"] == "dev")
        test = sorted((line["round"], line["value"]) for line in scores if line["split"] == "test")
        axes.plot(*zip(*dev, strict=True), color=colour, linewidth=1.5, label=f"seed {entry['summary']['seed']}")
        axes.plot(*zip(*test, strict=True), "o", color=colour, markersize=6)
    axes.set_xlabel("round (one step of joint batch 512)")
    axes.set_ylabel("accuracy")
    axes.set_title("Rotten Tomatoes, 8 non-IID clients: dev (lines), 1,024 test reviews (dots)", fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(HERE / "accuracy.png", dpi=130)


if __name__ == "__main__":
    main()
