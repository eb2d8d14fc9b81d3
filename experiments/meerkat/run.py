"""The study of ``README.md``, piece by piece; an interrupted piece goes on where it stopped.

    python experiments/meerkat/run.py --data DIR                       # the core grid: everything that is missing
    python experiments/meerkat/run.py --data DIR tune core --task sst2 # some pieces, one task
    python experiments/meerkat/run.py --data DIR all                   # the full grid
    python experiments/meerkat/run.py tables                           # figures, tables and claims anew

DIR holds a folder a data set (``sst2``, ``ag_news``; ``c4`` for the mask), each with ``train.jsonl`` and ``test.jsonl``
of the task's columns. Every run is a ``fedzo train -m`` of one job, two at a time; what has finished is in
``results/PIECE.json`` and is not run again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import tables
from collect import Row, best_dev_loss, keep, known, name_of
from pieces import CORE_TASKS, METHODS, OWN_RATES, PIECES, RUNS, SEEDS, TASKS, combinations, corpus_of, jobs_of

CONF = Path(__file__).parent / "conf"
STORE = threading.Lock()
MASK = "mask-c4.safetensors"
LADDER = 2.0  # between neighbouring learning rates
FIRST = {"meerkat": 4e-4, "full": 3.2e-5, "lora": 2e-3, "magnitude": 8e-3, "random": 0.24}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    pieces = ["mask", "tune", *PIECES, "tables"]
    parser.add_argument(
        "pieces", nargs="*", metavar="PIECE", help=f"{', '.join(pieces)}, or all; by default tune core tables"
    )
    parser.add_argument("--data", type=Path, help="folder of the data sets")
    parser.add_argument("--task", choices=TASKS, action="append", help="only this task; by default those of the core")
    parser.add_argument("--method", choices=METHODS, action="append", help="only this method")
    parser.add_argument("--seed", type=int, choices=SEEDS, action="append", help="only this run seed")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each (2)")
    flags = parser.parse_args()
    wanted = pieces if "all" in flags.pieces else flags.pieces or ["tune", "core", "tables"]
    if strange := {*wanted} - {*pieces}:
        parser.error(f"PIECE must be of {', '.join(pieces)} or all, got {', '.join(sorted(strange))}")
    if {*wanted} - {"tables"} and flags.data is None:
        parser.error("--data must name the folder of the data sets")
    tasks = flags.task or (TASKS if "all" in flags.pieces else CORE_TASKS)
    cells = [f"{task}-{method}" for task in tasks for method in flags.method or METHODS]
    if flags.data is not None:
        os.environ["FEDZO_STUDY_DATA"] = str(flags.data.resolve())
        choose_mask(flags.data, MASK)
    with ThreadPoolExecutor(flags.jobs) as pool:
        if "tune" in wanted:
            keep("tune", RUNS / "tune")
            list(pool.map(tune, cells))
        for piece in [piece for piece in PIECES if piece in wanted]:
            if open_ends := [cell for cell in cells if not is_tuned(cell)]:
                sys.exit(f"{', '.join(open_ends)}: the learning rate is not tuned yet. Run the piece `tune` first.")
            keep(piece, RUNS / piece)
            words = [job for cell in cells for job in jobs_of(piece, cell, lr=rate_of(cell))]
            words = [job for job in words if any(f"seed={seed}" in job for seed in flags.seed or SEEDS)]
            if piece in OWN_RATES:
                ladders = sorted({ladder_of(job) for job in words})
                rates = dict(zip(ladders, pool.map(partial(climb, f"tune_{piece}"), ladders), strict=True))
                words = [[*job, f"trainer.lr={rates[ladder_of(job)]:.4g}"] for job in words]
            for mask in sorted({*re.findall(r"mask-[^/ ]*safetensors", " ".join(" ".join(job) for job in words))}):
                choose_mask(flags.data, mask)
            list(pool.map(partial(run, piece), words))
    if "tables" in wanted:
        tables.main()


def choose_mask(data: Path, name: str) -> None:
    """A mask that several runs share: a window of 256 tokens of each document."""
    if (RUNS / name).exists():
        return
    corpus = corpus_of(name.removesuffix(".safetensors"))
    path = data / corpus.file
    if not path.is_file():
        sys.exit(f"--data must hold {corpus.file}, which the mask {name} is chosen on; it is not in {data}.")
    if path.parent.name in TASKS:
        path = documents_of(path, number=corpus.docs)
    calibration = ["trainer.calibration=file", f"inputs.calibration={path}", "trainer.calibration_tokens=256"]
    size = [f"trainer.density={corpus.density}", f"trainer.calibration_docs={corpus.docs}"]
    fedzo("mask", "model=smollm2", "trainer=meerkat", *size, *calibration, "--out", str(RUNS / name))


def documents_of(path: Path, *, number: int) -> Path:
    """So many documents of all rows of a task: one row is too short for a window."""
    rows = [_text_of(json.loads(line)) for line in path.read_text().splitlines()]
    joined = ["\n".join(rows[at * len(rows) // number : (at + 1) * len(rows) // number]) for at in range(number)]
    RUNS.mkdir(parents=True, exist_ok=True)
    made = RUNS / f"{path.parent.name}.jsonl"
    made.write_text("".join(json.dumps({"text": text}) + "\n" for text in joined))
    return made


def _text_of(row: Row) -> str:
    return " ".join(value for value in row.values() if isinstance(value, str))


def rate_of(cell: str) -> float:
    """The learning rate that the cell's YAML holds."""
    (found,) = re.findall(r"^  lr: (\S+)", (CONF / "cell" / f"{cell}.yaml").read_text(), re.MULTILINE)
    return float(found)


def tried(cell: str) -> dict[float, float]:
    """Best dev loss by learning rate."""
    return {row["lr"]: best_dev_loss(row) for row in known("tune") if f"{row['task']}-{row['method']}" == cell}


def is_tuned(cell: str) -> bool:
    """Whether the cell's learning rate is the best of the ladder, and inside of it."""
    losses, rate = tried(cell), rate_of(cell)
    return rate in losses and min(losses) < rate < max(losses) and losses[rate] == min(losses.values())


def ladder_of(job: list[str]) -> tuple[str, ...]:
    """The words that runs of all seeds share: they share a learning rate, too."""
    return tuple(word for word in job if not word.startswith("seed="))


def climb(piece: str, ladder: tuple[str, ...]) -> float:
    """The learning rate of the best dev loss of seed 0 among neighbours; the runs that find it are a piece."""
    keep(piece, RUNS / piece)
    cell, *words = ladder
    first = rate_of(cell.removeprefix("+cell="))
    rates = [first / LADDER, first, first * LADDER]
    while True:
        for rate in rates:
            run(piece, [cell, *words, "seed=0", "evaluation.test=False", f"trainer.lr={rate:.4g}"])
        losses = {row["lr"]: best_dev_loss(row) for row in known(piece) if {*ladder} <= {*row["name"].split()}}
        best = min(losses, key=losses.__getitem__)
        if min(losses) < best < max(losses):
            return best
        rates = [best / LADDER if best == min(losses) else best * LADDER]


def tune(cell: str) -> None:
    """Climb the ladder of learning rates until the best dev loss of seed 0 lies inside; keep it in the cell's YAML."""
    first = FIRST[cell.partition("-")[2]]
    rates = [first / LADDER, first, first * LADDER]
    while not is_tuned(cell):
        fixed = ["+budget=T1", "seed=0", "split.num_test=0", "evaluation.federated_every_rounds=-1"]
        for words in combinations([*fixed, "trainer.lr=" + ",".join(f"{rate:.4g}" for rate in rates)]):
            run("tune", [f"+cell={cell}", *words])
        losses = tried(cell)
        best = min(losses, key=losses.__getitem__)
        path = CONF / "cell" / f"{cell}.yaml"
        path.write_text(re.sub(r"(?m)^  lr: \S+", f"  lr: {best:g}", path.read_text()))
        rates = [best / LADDER if best == min(losses) else best * LADDER]


def run(piece: str, words: list[str]) -> None:
    """One run, if the results lack it: a sweep of one, which goes on where an earlier call was stopped."""
    name, lr = name_of(words), [float(word.split("=")[1]) for word in words if word.startswith("trainer.lr=")]
    with STORE:
        done = {row["name"]: row["lr"] for row in known(piece)}
    if name in done:
        cell = words[0].removeprefix("+cell=")
        if done[name] != (lr[0] if lr else rate_of(cell)):
            remedy = f"Take it out of results/{piece}.json and {RUNS / piece}."
            sys.exit(f"{name} was run at the learning rate {done[name]:g}, which is not the tuned one. {remedy}")
        return
    print(f"{piece}: {name}", flush=True)
    folder = RUNS / piece / hashlib.sha256(name.encode()).hexdigest()[:12]  # of its own: a sweep's is locked
    fedzo("train", "-m", "--config-dir", str(CONF), "experiment=study", *words, f"hydra.sweep.dir={folder}")
    with STORE:
        keep(piece, RUNS / piece)


def fedzo(*words: str) -> None:
    RUNS.mkdir(parents=True, exist_ok=True)
    log = RUNS / "log.txt"
    with log.open("a") as out:
        if code := subprocess.run([sys.executable, "-m", "fedzo", *words], stdout=out, stderr=out).returncode:
            sys.exit(f"`fedzo {' '.join(words)}` ended with {code}: see the end of {log}.")


if __name__ == "__main__":
    main()
