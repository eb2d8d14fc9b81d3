"""What is learnt where only the blocks from some first layer on are trained, by forwards; adds to accuracy.json.

    python experiments/lower_layers/accuracy.py [--seeds 0 1 2]    # about 8 minutes a run on 2 idle cores, 12 runs

Each run is experiment=meerkat (Rotten Tomatoes, 160 rounds) with ``trainer.first_layer``, nothing else being
changed: the mask is that of all blocks, less the blocks below. Runs of one seed see the same rows in the same order. A
run that is complete is not run again, and an interrupted one goes on. Forwards are counted in whole forwards of a
round's rows: two, less what the blocks below the first layer cost in the second of them.

Equal forwards are all those of the cheapest run, which alone has come to the end of its cosine schedule there. The
others are read in the middle of theirs: the more a step costs, the higher the learning rate still is. So a comparison
at equal forwards may favour runs of fewer blocks. Schedules of equal forwards would need runs of their own.
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

from fedzo.bench.claims import Claims, kept_results, measured_in, ran_with
from fedzo.records.folder import replace_file

HERE = Path(__file__).parent
RUNS = Path("runs/lower_layers")
RESULTS = HERE / "accuracy.json"
COMMAND = "python experiments/lower_layers/accuracy.py"
FIRST_LAYERS = (0, 11, 15, 20)
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
    return kept_results(RESULTS, {})


def store(entry: Run) -> None:
    runs = known() | {f"seed {entry['seed']}, from block {entry['first_layer']}": entry}
    replace_file(RESULTS, json.dumps(dict(sorted(runs.items())), indent=1) + "\n")
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
        "environment": ran_with(folder, "trainer.first_layer"),
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
    counted = [by[seed, first] for seed in seeds for first in done]
    claims = Claims(command=COMMAND, seeds=seeds, environment=measured_in(counted))
    base = [by[seed, min(done)] for seed in seeds]
    equal = min(cost(first) * by[seed, first]["dev"][-1][0] for first in done for seed in seeds)
    for first in done:
        mine = [by[seed, first] for seed in seeds]
        name = f"from block {first}"
        claims.add(f"{name}: a step, blocks counted", cost(first), "whole forwards")
        claims.add_mean(f"{name}: least dev loss", [least(each) for each in mine], "nat")
        losses = [least(each, equal) for each in mine]
        claims.add_mean(f"{name}: least dev loss within equal forwards", losses, "nat")
        claims.add_mean(f"{name}: test accuracy", [100 * each["after"]["value"] for each in mine], "%")
        claims.add_mean(f"{name}: test AUC", [each["after"]["auc"] for each in mine], "")
        if first != min(done):
            pairs = list(zip(mine, base, strict=True))
            more = [least(one, equal) - least(other, equal) for one, other in pairs]
            claims.add_mean(f"{name}: dev loss less that of all blocks, equal forwards", more, "nat")
            values = [100 * (one["after"]["value"] - other["after"]["value"]) for one, other in pairs]
            claims.add_mean(f"{name}: test accuracy less that of all blocks", values, "points")
            areas = [one["after"]["auc"] - other["after"]["auc"] for one, other in pairs]
            claims.add_mean(f"{name}: test AUC less that of all blocks", areas, "")
    claims.write(HERE / "claims.json")
    draw({first: [by[seed, first] for seed in seeds] for first in done})


def least(entry: Run, forwards: float = float("inf")) -> float:
    """The lowest dev loss within so many whole forwards of a round's rows; one that is not finite is the worst."""
    within = [loss for number, loss in entry["dev"] if cost(entry["first_layer"]) * number <= forwards]
    return min(float("inf") if loss is None else loss for loss in within)


def draw(entries: dict[int, list[Run]]) -> None:
    """A thin line a run, a thick one of the mean over seeds."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for (first, runs), colour in zip(entries.items(), COLOURS, strict=False):
        spent = [cost(first) * number for number, _ in runs[0]["dev"]]
        curves = [[loss for _, loss in run["dev"]] for run in runs]
        for curve in curves:
            axes.plot(spent, curve, color=colour, linewidth=0.5, alpha=0.6)
        mean = [fmean(each) for each in zip(*curves, strict=True)]
        axes.plot(spent, mean, color=colour, linewidth=1.8, label=f"from block {first}")
    axes.set_xlabel("whole forwards of a round's 16 rows")
    axes.set_ylabel("dev loss (nat)")
    axes.set_title("Rotten Tomatoes, Meerkat: run seeds (thin) and their mean (thick)", fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(HERE / "accuracy.png", dpi=130)


if __name__ == "__main__":
    main()
