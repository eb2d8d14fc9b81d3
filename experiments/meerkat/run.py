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
from functools import partial
from pathlib import Path

import draw
from collect import Row, best_dev_loss, collect, merge, name_of

HERE = Path(__file__).parent
CONF, RESULTS, RUNS = HERE / "conf", HERE / "results", Path("runs/meerkat")
WRITING = threading.Lock()
MASK = "mask-c4.safetensors"
OTHER_MASKS = {
    # file: corpus, density
    "mask-c4-1e-4.safetensors": ("c4/train.jsonl", 1e-4),
    "mask-c4-1e-2.safetensors": ("c4/train.jsonl", 1e-2),
    "mask-wikitext2.safetensors": ("wikitext2/test.jsonl", 1e-3),
}
TASKS = ("sst2", "ag_news")
METHODS = ("meerkat", "full", "lora", "magnitude", "random")
LADDER = 2.0  # between neighbouring learning rates
FIRST = {"meerkat": 4e-4, "full": 4e-6, "lora": 2e-3, "magnitude": 4e-3, "random": 3e-2}
SEEDS = "seed=0,1,2"
Varied = list[tuple[str, list[str]]]
PIECES: dict[str, Varied] = {
    # of each: the methods, and what varies, as words of `fedzo train -m`
    "core": [("all", ["+budget=T1,T10", SEEDS])],
    "selection": [
        ("meerkat", ["+budget=T10", SEEDS, "selection=oracle"]),
        ("meerkat", ["+budget=T10", SEEDS, "selection=vpcs", "fl.rounds=21"]),  # round 0 calibrates
    ],
    "random_selection": [],  # for each run of VPCS one that stops as many clients, by lot
    "masks": [("meerkat", ["+budget=T1", SEEDS, "trainer.mask_path=" + ",".join(f"{RUNS}/{n}" for n in OTHER_MASKS)])],
    "servers": [
        ("meerkat", ["+budget=T10", SEEDS, "optimizer=momentum,scaffold,feddyn"]),
        ("meerkat", ["+budget=T10", SEEDS, "strategy.aggregation=median,trimmed_mean", "strategy.trim_share=0.2"]),
    ],
    "protocols": [
        ("full", ["+budget=T1", SEEDS, "fl.seeds=pool", "runtime=inline"]),
        ("full", ["+budget=T1", SEEDS, "estimator=one_sided", "estimator.num_probes=1", "estimator.baseline=center"]),
        ("full", ["+budget=T1", SEEDS, "strategy.aggregation=majority_sign", "trainer.lr=1e-5,2e-5,4e-5"]),
    ],
    "long": [("all", ["+budget=T50", SEEDS])],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known_pieces = ["tune", *PIECES, "tables"]
    parser.add_argument(
        "pieces", nargs="*", metavar="PIECE", help=f"{', '.join(known_pieces)}; tune core tables by default"
    )
    parser.add_argument("--data", type=Path, help="folder of the data sets")
    parser.add_argument("--task", choices=TASKS, action="append", help="only this task")
    parser.add_argument("--method", choices=METHODS, action="append", help="only this method")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each (2)")
    flags = parser.parse_args()
    cells = [f"{task}-{method}" for task in flags.task or TASKS for method in flags.method or METHODS]
    pieces = flags.pieces or ["tune", "core", "tables"]
    if strange := {*pieces} - {*known_pieces}:
        parser.error(f"PIECE must be of {', '.join(known_pieces)}, got {', '.join(sorted(strange))}")
    if {*pieces} - {"tables"}:
        if flags.data is None:
            parser.error("--data must name the folder of the data sets")
        os.environ["FEDZO_STUDY_DATA"] = str(flags.data.resolve())
        choose_mask(flags.data, MASK, "c4/train.jsonl", 1e-3)
        if "masks" in pieces:
            for name, (corpus, density) in OTHER_MASKS.items():
                choose_mask(flags.data, name, corpus, density)
            for task in TASKS:
                choose_mask(flags.data, own_mask(task), f"{task}/train.jsonl", 1e-3)
    with ThreadPoolExecutor(flags.jobs) as pool:
        if "tune" in pieces:
            list(pool.map(tune, cells))
        for piece in [piece for piece in PIECES if piece in pieces]:
            wanted = [words for cell in cells for words in jobs_of(piece, cell)]
            list(pool.map(partial(run, piece), wanted))
    if "tables" in pieces:
        draw.main()


def choose_mask(data: Path, name: str, corpus: str, density: float) -> None:
    """A mask that several runs share: 100 windows of 256 tokens, of 8 where the corpus is a task's short rows."""
    if (RUNS / name).exists():
        return
    RUNS.mkdir(parents=True, exist_ok=True)
    tokens = 8 if corpus.startswith(TASKS) else 256
    calibration = ["trainer.calibration=file", f"trainer.calibration_path={data / corpus}"]
    length = ["trainer.calibration_docs=100", f"trainer.calibration_tokens={tokens}"]
    fedzo("mask", "trainer=meerkat", f"trainer.density={density}", *calibration, *length, "--out", str(RUNS / name))


def own_mask(task: str) -> str:
    """File of the mask that is chosen on the task's own rows."""
    return f"mask-{task}.safetensors"


def jobs_of(piece: str, cell: str) -> list[list[str]]:
    """The runs of a piece for a cell."""
    task, _, method = cell.partition("-")
    varied = [varied for methods, varied in PIECES[piece] if methods in ("all", method)]
    if piece == "masks" and method == "meerkat":
        varied.append(["+budget=T1", SEEDS, f"trainer.mask_path={RUNS}/{own_mask(task)}"])
    if piece == "random_selection" and method == "meerkat":
        of_vpcs = [
            row for row in known("selection") if row["changed"].get("selection") == "vpcs" and row["task"] == task
        ]
        varied += [
            ["+budget=T10", f"seed={row['seed']}", "selection=random", f"selection.num_flagged={len(row['flagged'])}"]
            for row in of_vpcs
            if row["flagged"]
        ]
    return [job for words in varied for job in jobs(cell, words)]


def jobs(cell: str, varied: list[str]) -> list[list[str]]:
    """Every combination of what varies, as Hydra's sweeper would make them."""
    choices = [
        [f"{key}={value}" for value in values.split(",")] for key, _, values in (w.partition("=") for w in varied)
    ]
    return [[f"+cell={cell}", *words] for words in itertools.product(*choices)]


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
