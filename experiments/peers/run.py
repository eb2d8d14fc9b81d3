"""Every protocol in one table: what it reaches after equal time and after equal forwards; see README.md.

    python experiments/peers/run.py --data DIR                       # all that is missing; stop it when you like
    python experiments/peers/run.py --data DIR --task rotten_tomatoes --method meerkat --seed 0
    python experiments/peers/run.py                                  # claims and figure anew, from results.json

``DIR/sst2`` holds ``train.jsonl`` and ``test.jsonl``, ``DIR/c4`` the text that masks are chosen on (``train.jsonl``).
Runs follow one another, since they are given equal time: nothing else should run on the machine. What has finished is
in ``results.json`` and is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import median
from typing import Any

import tables
from methods import FIRST_LAYER, MASK, METHODS, NUM_CLIENTS, UPPER_MASK, Method

from fedzo.bench.claims import kept_results, metric_lines, ran_with
from fedzo.records.folder import replace_file

HERE = Path(__file__).parent
RUNS = Path("runs/peers")
RESULTS = HERE / "results.json"
SEEDS = (0, 1, 2)
LADDER = 2.0  # between neighbouring learning rates
MAX_RATES = 9  # a method that learns nothing at any rate would climb for ever
TRAINING_S = 180.0
NUM_TRAIN = {"rotten_tomatoes": 1024, "sst2": 1000}
TASKS = {
    # a draw on which no setting was chosen: those of the quickstart were chosen on split.seed=0
    "rotten_tomatoes": ["task=rotten_tomatoes", "data=embedded", "split.seed=2", "split.num_test=1024"],
    # of 1,500 training rows a quarter may be dev rows
    "sst2": ["task=sst2", "data.path={data}/sst2", "split.num_test=872"],
}
COMMON = [
    "model=smollm2",
    "partition=dirichlet_equal",
    f"fl.num_clients={NUM_CLIENTS}",
    "runtime=inline_batched",
    "partition.holdout=0",
    "split.num_dev=375",
    "threads=2",
    "evaluation.federated_every_rounds=-1",
    "report=none",
]
UNSCORED = ["evaluation.central=false", "evaluation.every_rounds=0"]
Entry = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the data sets; without it nothing is run")
    parser.add_argument("--task", choices=TASKS, action="append", help="only this task")
    parser.add_argument("--method", choices=METHODS, action="append", help="only this method")
    parser.add_argument("--seed", type=int, choices=SEEDS, action="append", help="only this run seed")
    flags = parser.parse_args()
    if flags.data is not None:
        os.environ["FEDZO_PEERS_DATA"] = str(flags.data.resolve())
        choose_masks(flags.data)
        for task in flags.task or TASKS:
            score_base(task)
            for seed in flags.seed or SEEDS:
                for name in flags.method or METHODS:
                    rate = tune(task, name)
                    run(task, name, rate, seed)
                    score_on_test(task, name, rate, seed)
    tables.write(known())


def known() -> dict[str, Entry]:
    """Everything measured so far, by name."""
    return kept_results(RESULTS, {})


def keep(name: str, entry: Entry) -> Entry:
    """Add a result; one rename, so that a stop leaves whole results."""
    replace_file(RESULTS, json.dumps(dict(sorted({**known(), name: entry}.items())), indent=1) + "\n")
    return entry


def choose_masks(data: Path) -> None:
    """Meerkat's mask of all blocks, and that of the upper ones, on the text of the paper."""
    text = data / "c4" / "train.jsonl"
    settings = ["model=smollm2", "trainer=meerkat", "trainer.calibration=file", f"inputs.calibration={text}"]
    settings += ["trainer.calibration_docs=100", "trainer.calibration_tokens=256"]
    for path, first_layer in ((MASK, 0), (UPPER_MASK, FIRST_LAYER)):
        if not Path(path).exists():
            fedzo("mask", *settings, f"trainer.first_layer={first_layer}", "--out", path)


def tune(task: str, name: str) -> float:
    """Climb the ladder of learning rates until the best dev loss of seed 0 lies inside (the rule of the study).

    The runs are as long as those that are compared, and the best of them is one of these.
    """
    first = METHODS[name].first_lr
    rates = [first / LADDER, first, first * LADDER]
    while True:
        for rate in rates:
            run(task, name, rate, 0)
        losses = tables.ladder(known(), task, name)
        best = min(losses, key=losses.__getitem__)
        if min(losses) < best < max(losses) or len(losses) >= MAX_RATES:
            return best
        rates = [best / LADDER if best == min(losses) else best * LADDER]


def run(task: str, name: str, rate: float, seed: int) -> None:
    """A run of ``TRAINING_S``, unless it is there."""
    key = f"run {task} {name} {rate:g} {seed}"
    if key in known():
        return
    pace, method = measure(task, name), METHODS[name]
    rounds = rounds_within(TRAINING_S, pace)
    length = [
        f"fl.rounds={rounds}",
        f"evaluation.every_rounds={-(-rounds // method.num_scores)}",
        "evaluation.test=false",
    ]
    entry = {"task": task, "method": name, "seed": seed, "lr": rate, "rounds": rounds}
    try:
        lines = train(key, task, name, [f"seed={seed}", *length, f"trainer.lr={rate:g}"])
    except DivergedError:
        keep(key, {**entry, "diverged": True, "dev": []})
        return
    (summary,) = (line for line in lines if line["kind"] == "summary")
    scores = curve(lines, method, commit_s=pace["commit_s"])
    keep(
        key,
        {
            **entry,
            "diverged": False,
            "train_s": scores[-1]["seconds"],
            "best_round": summary["best_round"],
            "dev": scores,
            "peak_bytes": pace["peak_bytes"],
            "environment": ran_with(folder_of(key)),
        },
    )


def rounds_within(seconds: float, pace: Entry) -> int:
    """How many rounds take about so long; one at least, however slow they are."""
    return max(1, round((seconds - pace["first_s"]) / pace["round_s"]) + 1)


def score_on_test(task: str, name: str, rate: float, seed: int) -> None:
    """The test score of a run's best model; rates are chosen without one."""
    key = f"run {task} {name} {rate:g} {seed}"
    made = known()[key]
    if not made["diverged"] and "test" not in made:
        out = subprocess.run(
            [sys.executable, "-m", "fedzo", "evaluate", str(folder_of(key)), "--split", "test"], stdout=subprocess.PIPE
        )
        if out.returncode:
            sys.exit(f"The run of {key!r} could not be scored.")
        keep(key, {**made, "test": told(json.loads(out.stdout)["answers"])})


def score_base(task: str) -> None:
    """The base model's test score: of a run of one round, since it is the same before any run."""
    if (key := f"base {task}") not in known():
        words = ["fl.rounds=1", "evaluation.every_rounds=0"]
        (summary,) = (line for line in train(key, task, "last_norm", words) if line["kind"] == "summary")
        keep(key, told(summary["before"]))


def measure(task: str, name: str) -> Entry:
    """Seconds of the first and of a later round, its update of the model included, and a client's peak of memory."""
    key = f"pace {task} {name}"
    if entry := known().get(key):
        return entry
    unscored = ["evaluation.central=false", "evaluation.every_rounds=0", f"trainer.lr={METHODS[name].first_lr:g}"]
    lines = [line for line in train(key, task, name, [*unscored, "fl.rounds=8"]) if line["kind"] == "round"]
    seconds = [line["round_seconds"] for line in lines]
    # a round is told before the model is moved by it
    commit_s = median(
        after["seconds"] - before["seconds"] - after["round_seconds"] for before, after in pairwise(lines)
    )
    alone = ["fl.num_clients=1", "partition=iid", "strategy.clients_per_round=0", "fl.rounds=3"]
    alone.append(f"split.num_train={NUM_TRAIN[task] // NUM_CLIENTS}")
    return keep(
        key,
        {
            "first_s": seconds[0] + commit_s,
            "round_s": median(seconds[2:]) + commit_s,
            "commit_s": commit_s,
            "peak_bytes": peak_bytes(key + " alone", task, name, [*unscored, *alone]),
        },
    )


def words(task: str, name: str, settings: list[str]) -> list[str]:
    base = [word.format(data=os.environ["FEDZO_PEERS_DATA"]) for word in TASKS[task]]
    chosen: dict[str, str] = {}  # the last of each key
    for word in (*base, f"split.num_train={NUM_TRAIN[task]}", *COMMON, *METHODS[name].words, *settings):
        chosen[word.partition("=")[0]] = word
    return [*chosen.values()]


def train(key: str, task: str, name: str, settings: list[str]) -> list[Entry]:
    """The lines of a run's metrics."""
    print(key, flush=True)
    folder = fresh(key)
    fedzo("train", *words(task, name, settings), f"hydra.run.dir={folder}")
    return metric_lines(folder)


class DivergedError(Exception):
    """A run ended since its numbers were not finite."""


def fedzo(*command: str) -> None:
    RUNS.mkdir(parents=True, exist_ok=True)
    with (RUNS / "log.txt").open("a+") as out:
        begin = out.seek(0, os.SEEK_END)
        if subprocess.run([sys.executable, "-m", "fedzo", *command], stdout=out, stderr=out).returncode:
            out.seek(begin)
            if "finite" in out.read():
                raise DivergedError
            sys.exit(f"`fedzo {' '.join(command)}` failed: see the end of {RUNS / 'log.txt'}.")


def peak_bytes(key: str, task: str, name: str, settings: list[str]) -> int:
    """Of resident memory, by the kernel's own count, from the moment when the client is ready for its first round."""
    command = [sys.executable, "-m", "fedzo", "train", *words(task, name, settings), f"hydra.run.dir={fresh(key)}"]
    freed_at_once = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    with (RUNS / "log.txt").open("a") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=freed_at_once)
    files, metrics, is_ready, peak = Path("/proc") / str(process.pid), folder_of(key) / "metrics.jsonl", False, 0
    while process.poll() is None:
        if not is_ready and metrics.exists() and '"setup"' in metrics.read_text():
            (files / "clear_refs").write_text("5")  # the peak becomes the present size
            is_ready = True
        if is_ready and (found := re.search(r"VmHWM:\s+(\d+) kB", (files / "status").read_text())):
            peak = 1024 * int(found[1])
        time.sleep(0.02)
    if process.returncode or not peak:
        sys.exit(f"{key} failed: see the end of {RUNS / 'log.txt'}.")
    return peak


def fresh(key: str) -> Path:
    """The folder of a run, which begins anew: half a run has no pace."""
    shutil.rmtree(folder_of(key), ignore_errors=True)
    return folder_of(key)


def folder_of(key: str) -> Path:
    return RUNS / re.sub(r"[^\w.-]", "-", key)


def curve(lines: list[Entry], method: Method, *, commit_s: float) -> list[Entry]:
    """Dev scores with the training seconds, the whole forwards and one client's bytes that they took."""
    rounds = [line for line in lines if line["kind"] == "round"]
    (setup,) = (line for line in lines if line["kind"] == "setup")
    num_rows = sum(client["num_train"] for client in setup["clients"])
    seconds = [0.0, *accumulate(line["round_seconds"] + commit_s for line in rounds)]
    sent = [0, *accumulate(line["payload_up_bytes"] + line["payload_down_bytes"] for line in rounds)]
    scores = [line for line in lines if line["kind"] == "score" and line["split"] == "dev"]
    return [
        {
            "round": line["round"],
            "seconds": round(seconds[line["round"]], 2),
            "forwards": method.whole_forwards(line["round"], num_rows=num_rows),
            "bytes": round(setup["setup_down_bytes"] + sent[line["round"]] / len(setup["clients"])),
            **told(line),
        }
        for line in sorted(scores, key=lambda line: line["round"])
    ]


def told(line: Entry) -> Entry:
    return {key: line[key] for key in ("value", "loss", "auc", "best_threshold_accuracy")}


if __name__ == "__main__":
    main()
