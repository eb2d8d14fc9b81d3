"""What is learnt where only the blocks from some first layer on are trained, by forwards; adds to accuracy.json.

    python experiments/lower_layers/accuracy.py [--seeds 0 1 2]    # about 8 minutes a run on 2 idle cores, 15 runs

Each run is experiment=meerkat (Rotten Tomatoes, 160 rounds) with ``trainer.first_layer``, nothing else being
changed: the mask is that of all blocks, less the blocks below. Runs of one seed see the same rows in the same order. A
run that is complete is not run again, and an interrupted one goes on. Forwards are counted in whole forwards of a
round's rows: two, less what the blocks below the first layer cost in the second of them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fedzo.bench.claims import Claims

HERE = Path(__file__).parent
RUNS = Path("runs/lower_layers")
RESULTS = HERE / "accuracy.json"
COMMAND = "python experiments/lower_layers/accuracy.py"
FIRST_LAYERS = (0, 11, 15, 20, 5)
"""In the order in which they are run."""
NUM_BLOCKS = 30
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
Run = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="run seeds (default: 0 1 2)")
    for seed in parser.parse_args().seeds:
        for first in FIRST_LAYERS:
            store(run(seed, first))
    gather(known())


def known() -> dict[str, Run]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def store(entry: Run) -> None:
    runs = known() | {f"seed {entry['seed']}, from block {entry['first_layer']}": entry}
    RESULTS.write_text(json.dumps(dict(sorted(runs.items())), indent=1) + "\n")
    gather(runs)


def run(seed: int, first: int) -> Run:
    """One run, which a later call does not repeat."""
    if entry := known().get(f"seed {seed}, from block {first}"):
        return entry
    folder = RUNS / f"{seed}-{first}"
    if not lines_of(folder, "summary"):
        command = ["resume", str(folder)]
        if not (folder / "config.json").exists():
            command = ["train", "experiment=meerkat", f"seed={seed}", f"trainer.first_layer={first}"]
            command += ["report=none", f"hydra.run.dir={folder}"]
        subprocess.run([sys.executable, "-m", "fedzo", *command], check=True)
    (summary,) = lines_of(folder, "summary")
    scores = lines_of(folder, "score")
    return {
        "seed": seed,
        "first_layer": first,
        "best_round": summary["best_round"],
        "before": test_score(summary["before"]),
        "after": test_score(summary["after"]),
        "dev": sorted([line["round"], line["loss"]] for line in scores if line["split"] == "dev"),
    }


def test_score(line: Run) -> dict[str, float]:
    return {key: line[key] for key in ("value", "loss", "auc", "best_threshold_accuracy")}


def lines_of(folder: Path, kind: str) -> list[Run]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in (json.loads(text) for text in lines if text.endswith("}")) if line["kind"] == kind]


def cost(first: int) -> float:
    """Of a step, in whole forwards, by the number of blocks: the head and the embedding, which always run, left out."""
    return 2 - first / NUM_BLOCKS


def gather(runs: dict[str, Run]) -> None:
    """Claims over the seeds that have every first layer that is named, so that all are over the same."""
    by = {(entry["seed"], entry["first_layer"]): entry for entry in runs.values()}
    done = [first for first in FIRST_LAYERS if any(of == first for _, of in by)]
    seeds = [seed for seed in sorted({seed for seed, _ in by}) if all((seed, first) in by for first in done)]
    if not seeds:
        return
    claims = Claims(command=COMMAND, seeds=seeds)
    for first in sorted(done):
        mine = [by[seed, first] for seed in seeds]
        name = f"from block {first}"
        claims.add(f"{name}: least dev loss", fmean(min(loss for _, loss in each["dev"]) for each in mine), "nat")
        claims.add(f"{name}: test accuracy", 100 * fmean(each["after"]["value"] for each in mine), "%")
        claims.add(f"{name}: test AUC", fmean(each["after"]["auc"] for each in mine), "area")
        claims.add(f"{name}: a step, blocks counted", cost(first), "whole forwards")
    claims.write(HERE / "claims.json")
    draw([by[seeds[0], first] for first in sorted(done)])


def draw(entries: list[Run]) -> None:
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for entry, colour in zip(entries, COLOURS, strict=False):
        rounds, losses = zip(*entry["dev"], strict=True)
        spent = [cost(entry["first_layer"]) * number for number in rounds]
        axes.plot(spent, losses, color=colour, linewidth=1.5, label=f"from block {entry['first_layer']}")
    axes.set_xlabel("whole forwards of a round's 16 rows")
    axes.set_ylabel("dev loss (nat)")
    axes.set_title(f"Rotten Tomatoes, Meerkat, run seed {entries[0]['seed']}", fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(HERE / "accuracy.png", dpi=130)


if __name__ == "__main__":
    main()
