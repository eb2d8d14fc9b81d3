"""The study of ``README.md``, piece by piece; an interrupted piece goes on where it stopped.

    python experiments/meerkat/run.py --data DIR                       # everything that is missing
    python experiments/meerkat/run.py --data DIR tune core --task sst2 # some pieces, one task
    python experiments/meerkat/run.py tables                           # figures, tables and claims anew

DIR holds a folder a data set (``sst2``, ``ag_news``; ``c4`` for the mask), each with ``train.jsonl`` and ``test.jsonl``
of the columns text and label. Every run is a ``fedzo train -m`` of one job, two at a time; what has finished is in
``results/PIECE.json`` and is not run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import draw
from collect import Row, best_dev_loss, collect, merge, name_of

HERE = Path(__file__).parent
CONF, RESULTS, RUNS = HERE / "conf", HERE / "results", Path("runs/meerkat")
WRITING = threading.Lock()
MASK = RUNS / "mask-c4.safetensors"
TASKS = ("sst2", "ag_news")
METHODS = ("meerkat", "full", "lora", "magnitude", "random")
LADDER = 2.0  # between neighbouring learning rates
FIRST = {"meerkat": 1e-4, "full": 1e-6, "lora": 4e-3, "magnitude": 1e-3, "random": 2e-3}
SEEDS = "seed=0,1,2"
PIECES: dict[str, tuple[str, list[str]]] = {
    # methods, and what varies: words of `fedzo train -m`
    "core": ("all", ["+budget=T1,T10", SEEDS]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pieces", nargs="*", help="tune, core or tables; all of them by default")
    parser.add_argument("--data", type=Path, help="folder of the data sets")
    parser.add_argument("--task", choices=TASKS, action="append", help="only this task")
    parser.add_argument("--method", choices=METHODS, action="append", help="only this method")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each (2)")
    flags = parser.parse_args()
    cells = [f"{task}-{method}" for task in flags.task or TASKS for method in flags.method or METHODS]
    pieces = flags.pieces or ["tune", *PIECES, "tables"]
    if {*pieces} - {"tables"}:
        if flags.data is None:
            parser.error("--data must name the folder of the data sets")
        os.environ["FEDZO_STUDY_DATA"] = str(flags.data.resolve())
        choose_mask(flags.data)
    with ThreadPoolExecutor(flags.jobs) as pool:
        if "tune" in pieces:
            list(pool.map(tune, cells))
        for piece in [piece for piece in PIECES if piece in pieces]:
            methods, varied = PIECES[piece]
            chosen = [cell for cell in cells if methods == "all" or cell.partition("-")[2] in methods.split(",")]
            list(
                pool.map(
                    lambda words, piece=piece: run(piece, words), [w for cell in chosen for w in jobs(cell, varied)]
                )
            )
    if "tables" in pieces:
        draw.main()


def jobs(cell: str, varied: list[str]) -> list[list[str]]:
    """Every combination of what varies, as Hydra's sweeper would make them."""
    choices = [
        [f"{key}={value}" for value in values.split(",")] for key, _, values in (w.partition("=") for w in varied)
    ]
    return [[f"+cell={cell}", *words] for words in itertools.product(*choices)]


def choose_mask(data: Path) -> None:
    """The mask that all runs of Meerkat share: 100 windows of 256 tokens of C4."""
    if MASK.exists():
        return
    MASK.parent.mkdir(parents=True, exist_ok=True)
    calibration = ["trainer.calibration=file", f"trainer.calibration_path={data / 'c4' / 'train.jsonl'}"]
    length = ["trainer.calibration_docs=100", "trainer.calibration_tokens=256"]
    fedzo("mask", "trainer=meerkat", *calibration, *length, "--out", str(MASK))


def tune(cell: str) -> None:
    """Climb the ladder of learning rates until the best dev loss of seed 0 lies inside; keep it in the cell's YAML."""
    method = cell.partition("-")[2]
    rates = [FIRST[method] / LADDER, FIRST[method], FIRST[method] * LADDER]
    while True:
        fixed = ["+budget=T1", "seed=0", "data.num_test=0", "evaluation.federated_every_rounds=-1"]
        for words in jobs(cell, [*fixed, "trainer.lr=" + ",".join(f"{rate:.4g}" for rate in rates)]):
            run("tune", words)
        tried = {row["lr"]: best_dev_loss(row) for row in known("tune") if f"{row['task']}-{row['method']}" == cell}
        best = min(tried, key=tried.__getitem__)
        if min(tried) < best < max(tried):
            break
        rates = [best / LADDER if best == min(tried) else best * LADDER]
    path = CONF / "cell" / f"{cell}.yaml"
    lines = [f"  lr: {best:g}" if line.startswith("  lr:") else line for line in path.read_text().splitlines()]
    path.write_text("\n".join(lines) + "\n")


def run(piece: str, words: list[str]) -> None:
    """One run, if the results lack it: a sweep of one, which goes on where an earlier call was stopped."""
    if name_of(words) in {row["name"] for row in known(piece)}:
        return
    print(f"{piece}: {name_of(words)}", flush=True)
    folder = RUNS / piece
    fedzo("train", "-m", "--config-dir", str(CONF), "experiment=study", *words, f"hydra.sweep.dir={folder}")
    with WRITING:
        RESULTS.mkdir(exist_ok=True)
        rows = merge(collect(folder), known(piece))
        (RESULTS / f"{piece}.json").write_text(json.dumps(rows, indent=1) + "\n")


def known(piece: str) -> list[Row]:
    path = RESULTS / f"{piece}.json"
    return json.loads(path.read_text()) if path.exists() else []


def fedzo(*words: str) -> None:
    log = RUNS / "log.txt"
    with log.open("a") as out:
        subprocess.run([sys.executable, "-m", "fedzo", *words], check=True, stdout=out, stderr=out)


if __name__ == "__main__":
    main()
