"""The quickstart on other rows: three run seeds with ``split.seed=1``; adds to claims.json.

    python experiments/quickstart/other_rows.py    # two runs at a time, of one thread each

The quickstart's settings were compared on the test rows of run.py (README.md). Another split seed draws training, dev
and test rows anew from all reviews of the package. What the test rows have in common with those of run.py is counted.
A run that is complete is not run again.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

from fedzo.bench.claims import Claims, measured_in, metric_lines, ran_with
from fedzo.config.load import load
from fedzo.data.sources import load_splits

HERE = Path(__file__).parent
RUNS = Path("runs/quickstart-other-rows")
COMMAND = "python experiments/quickstart/other_rows.py"
SEEDS = (0, 1, 2)
OTHER = "split.seed=1"


def main() -> None:
    with ThreadPoolExecutor(2) as pool:  # runs of one thread each
        runs = list(pool.map(run, SEEDS))
    learnt = [100 * (each["after"]["value"] - each["before"]["best_threshold_accuracy"]) for each in runs]
    areas = [each["after"]["auc"] - each["before"]["auc"] for each in runs]
    claims = Claims(command=COMMAND, seeds=list(SEEDS), environment=measured_in(runs))
    base = "accuracy as it answers, less the base model's at its best threshold"
    claims.add_mean(f"{base}, mean over seeds", learnt, "points", at_least=5)
    claims.add(f"{base}, worst seed", min(learnt), "points", at_least=3)
    claims.add_mean("AUC, less the base model's, mean over seeds", areas, "", at_least=0.04)
    claims.add("accuracy after", fmean(each["after"]["value"] for each in runs), "share")
    claims.add("accuracy at the best threshold before", runs[0]["before"]["best_threshold_accuracy"], "share")
    claims.add("AUC after", fmean(each["after"]["auc"] for each in runs), "area")
    claims.add("test rows that are test rows of run.py, too", common(), "share")
    claims.write(HERE / "claims.json")
    claims.show()


def run(seed: int) -> dict[str, Any]:
    """A run's summary, with its environment."""
    folder = RUNS / str(seed)
    lines = folder / "metrics.jsonl"
    if not lines.exists() or '"kind":"summary"' not in lines.read_text():
        shutil.rmtree(folder, ignore_errors=True)
        settings = ["experiment=quickstart", OTHER, f"seed={seed}", "threads=1", "report=none"]
        subprocess.run([sys.executable, "-m", "fedzo", "train", *settings, f"hydra.run.dir={folder}"], check=True)
    (summary,) = metric_lines(folder, "summary")
    return {**summary, "environment": ran_with(folder)}


def common() -> float:
    """The share of test rows that both splits have."""
    tests = []
    for words in ([], [OTHER]):
        config = load(["experiment=quickstart", *words])
        tests.append({row["text"] for row in load_splits(config.data, config.split, config.task).test})
    return len(tests[0] & tests[1]) / len(tests[1])


if __name__ == "__main__":
    main()
