"""What other settings of the quickstart learn: runs of seed 0 on 1,024 dev rows; adds to claims.json.

    python experiments/quickstart/tried.py    # about an hour on 2 cores, two runs at a time

All runs have the same dev rows, apart from the test rows of run.py. A run that is complete is not run again.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fedzo.bench.claims import Claims, metric_lines, ran_with

HERE = Path(__file__).parent
RUNS = Path("runs/quickstart-tried")
COMMAND = "python experiments/quickstart/tried.py"
ROWS = ["split.num_dev=1024", "evaluation.test=false", "threads=1"]
MASK = ["experiment=meerkat", *ROWS, "evaluation.every_rounds=80"]
NORM = ["experiment=quickstart", *ROWS]
ONE_PROBE = [*NORM, "estimator.num_probes=1", "fl.batch_size=32"]
TRIED = {
    "last norm, 4 probes, 64 rows, common_shift 0.3, lr 3 (the quickstart)": NORM,
    "last norm, 4 probes, 64 rows, common_shift 1, lr 0.7": [*NORM, "task.common_shift=1", "trainer.lr=0.7"],
    "the quickstart with 2,048 training rows": [*NORM, "split.num_train=2048"],
    "last norm, 1 probe, 32 rows, common_shift 0.3, lr 1.4": [*ONE_PROBE, "trainer.lr=1.4"],
    "last norm, 1 probe, 32 rows, common_shift 1, lr 0.35": [*ONE_PROBE, "task.common_shift=1", "trainer.lr=0.35"],
    "last norm, 1 probe, 32 rows, common_shift 1, lr 0.7": [*ONE_PROBE, "task.common_shift=1", "trainer.lr=0.7"],
    "Meerkat's mask, all blocks, 160 rounds of 2 rows a client": MASK,
    "Meerkat's mask, its part in the upper 15 blocks": [*MASK, "trainer.first_layer=15"],
}


def main() -> None:
    claims = Claims(command=COMMAND)
    with ThreadPoolExecutor(2) as pool:  # runs of one thread each
        for name, folder in zip(TRIED, pool.map(run, range(len(TRIED)), TRIED.values()), strict=True):
            found = best(folder)
            claims.environment = ran_with(folder)
            claims.add(f"{name}: accuracy", found["value"], "share")
            claims.add(f"{name}: at the best threshold", found["best_threshold_accuracy"], "share")
            claims.add(f"{name}: AUC", found["auc"], "area")
            claims.write(HERE / "claims.json")
    claims.show()


def run(number: int, settings: list[str]) -> Path:
    """The folder of a run; what it was run with lies beside it."""
    folder = RUNS / str(number)
    told = folder.with_suffix(".json")
    if told.exists() and json.loads(told.read_text())["settings"] == settings:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    command = ["train", *settings, "report=none", f"hydra.run.dir={folder}"]
    subprocess.run([sys.executable, "-m", "fedzo", *command], check=True)
    told.write_text(json.dumps({"settings": settings}))
    return folder


def best(folder: Path) -> dict[str, Any]:
    """The dev score of least loss after the first round."""
    scores = [line for line in metric_lines(folder, "score") if line["round"] > 0]
    least: dict[str, Any] = min(scores, key=lambda line: math.inf if line["loss"] is None else line["loss"])
    return least


if __name__ == "__main__":
    main()
