"""Every protocol in one table: what it reaches after equal time and after equal forwards; see README.md.

    python experiments/peers/run.py --data DIR                       # all that is missing; stop it when you like
    python experiments/peers/run.py --data DIR --task rotten_tomatoes --method meerkat --seed 0
    python experiments/peers/run.py                                  # claims and figure anew, from results.json

``DIR/sst2`` holds ``train.jsonl`` and ``test.jsonl``. Runs follow one another, since they are given equal time: nothing
else should run on the machine. What has finished is in ``results.json`` and is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

import tables
from methods import METHODS, NUM_CLIENTS, Method

HERE = Path(__file__).parent
RUNS = Path("runs/peers")
RESULTS = HERE / "results.json"
SEEDS = (0, 1, 2)
LADDER = 2.0  # between neighbouring learning rates
MOST_RATES = 9  # a method that learns nothing at any rate would climb for ever
TUNING_S, TRAINING_S = 60.0, 300.0
NUM_SCORES = 10
TASKS = {
    "rotten_tomatoes": [
        *("task=rotten_tomatoes", "data=embedded"),
        *("split.num_train=1024", "split.num_dev=512", "split.num_test=1024"),
    ],
    # of 1,500 training rows a quarter may be dev rows
    "sst2": [
        *("task=sst2", "data.path={data}/sst2"),
        *("split.num_train=1000", "split.num_dev=375", "split.num_test=872"),
    ],
}
COMMON = [
    "model=smollm2",
    "partition=dirichlet_equal",
    f"fl.num_clients={NUM_CLIENTS}",
    "runtime=inline_batched",
    "server_optimizer.schedule=cosine",
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
        for seed in flags.seed or SEEDS:
            for task in flags.task or TASKS:
                for name in flags.method or METHODS:
                    compare(task, name, seed)
    tables.write(known())


def known() -> dict[str, Entry]:
    """Everything measured so far, by name."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def keep(name: str, entry: Entry) -> Entry:
    """Add a result; one rename, so that a stop leaves whole results."""
    part = RESULTS.with_suffix(".part")
    part.write_text(json.dumps(dict(sorted({**known(), name: entry}.items())), indent=1) + "\n")
    part.replace(RESULTS)
    return entry


def compare(task: str, name: str, seed: int) -> None:
    """A run of ``TRAINING_S`` at the tuned rate, unless it is there."""
    key = f"run {task} {name} {seed}"
    if key in known():
        return
    rate, pace = tune(task, name), measure(task, name)
    rounds = rounds_in(TRAINING_S, pace)
    lines = train(key, task, name, [f"seed={seed}", *length(rounds), f"trainer.lr={rate:g}"])
    (summary,) = (line for line in lines if line["kind"] == "summary")
    keep(
        key,
        {
            "task": task,
            "method": name,
            "seed": seed,
            "lr": rate,
            "rounds": rounds,
            "train_s": round(sum(line["round_seconds"] for line in lines if line["kind"] == "round"), 1),
            "best_round": summary["best_round"],
            "before": told(summary["before"]),
            "after": told(summary["after"]),
            "dev": curve(lines, METHODS[name]),
            "peak_bytes": pace["peak_bytes"],
            "environment": json.loads((RUNS / key.replace(" ", "-") / "environment.json").read_text()),
        },
    )


def measure(task: str, name: str) -> Entry:
    """Seconds of the first and of a later round; bytes at the peak of a process that plays one client."""
    key = f"pace {task} {name}"
    if entry := known().get(key):
        return entry
    method = METHODS[name]
    lines = train(key, task, name, [*UNSCORED, "fl.rounds=8", f"trainer.lr={method.first_lr:g}"])
    seconds = [line["round_seconds"] for line in lines if line["kind"] == "round"]
    alone = ["fl.num_clients=1", "partition=iid", "strategy.clients_per_round=0", "fl.rounds=2", *UNSCORED]
    if "trainer=meerkat" in method.words:  # a client does not choose the mask, which takes sums of all weights
        alone.append("trainer.selector=random")
    peak = peak_bytes(key + " alone", task, name, alone)
    return keep(key, {"first_s": seconds[0], "round_s": median(seconds[2:]), "peak_bytes": peak})


def tune(task: str, name: str) -> float:
    """Climb the ladder of learning rates until the best dev loss of seed 0 lies inside (the rule of the study)."""
    first, pace = METHODS[name].first_lr, measure(task, name)
    rates = [first / LADDER, first, first * LADDER]
    while True:
        losses = {rate: dev_loss(task, name, rate, rounds_in(TUNING_S, pace)) for rate in rates}
        best = min(losses, key=losses.__getitem__)
        if min(rates) < best < max(rates) or len(rates) == MOST_RATES:
            return best
        rates.append(best / LADDER if best == min(rates) else best * LADDER)


def dev_loss(task: str, name: str, rate: float, rounds: int) -> float:
    key = f"tune {task} {name} {rate:g}"
    if (entry := known().get(key)) is None:
        settings = ["seed=0", "evaluation.test=false", *length(rounds), f"trainer.lr={rate:g}"]
        scores = [line for line in train(key, task, name, settings) if line["kind"] == "score" and line["round"]]
        losses = [line["loss"] for line in scores if line["loss"] is not None]
        entry = keep(key, {"rounds": rounds, "dev_loss": min(losses, default=float("inf"))})
    return float(entry["dev_loss"])


def rounds_in(seconds: float, pace: Entry) -> int:
    return max(8, round((seconds - pace["first_s"]) / pace["round_s"]) + 1)


def length(rounds: int) -> list[str]:
    """The rounds, and dev scores at ten of them at most: more would be more checkpoints to choose from."""
    return [f"fl.rounds={rounds}", f"evaluation.every_rounds={-(-rounds // NUM_SCORES)}"]


def words(task: str, name: str, settings: list[str]) -> list[str]:
    base = [word.format(data=os.environ["FEDZO_PEERS_DATA"]) for word in TASKS[task]]
    chosen: dict[str, str] = {}  # the last of each key
    for word in (*base, *COMMON, *METHODS[name].words, *settings):
        chosen[word.partition("=")[0]] = word
    return [*chosen.values()]


def train(key: str, task: str, name: str, settings: list[str]) -> list[Entry]:
    """The lines of a run's metrics."""
    folder = fedzo(key, task, name, settings)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def peak_bytes(key: str, task: str, name: str, settings: list[str]) -> int:
    """Of resident memory, by the kernel's own count; a process waits for one child only, so the largest is it."""
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=sys.stderr);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    command = [sys.executable, "-m", "fedzo", "train", *words(task, name, settings), f"hydra.run.dir={fresh(key)}"]
    out = subprocess.run([sys.executable, "-c", code, *command], check=True, stdout=subprocess.PIPE, text=True)
    return 1024 * int(out.stdout)


def fedzo(key: str, task: str, name: str, settings: list[str]) -> Path:
    folder = fresh(key)
    print(key, flush=True)
    command = [sys.executable, "-m", "fedzo", "train", *words(task, name, settings), f"hydra.run.dir={folder}"]
    RUNS.mkdir(parents=True, exist_ok=True)
    with (RUNS / "log.txt").open("a") as out:
        if subprocess.run(command, stdout=out, stderr=out).returncode:
            sys.exit(f"{key} failed: see the end of {RUNS / 'log.txt'}.")
    return folder


def fresh(key: str) -> Path:
    """The folder of a run, which begins anew: half a run has no pace."""
    folder = RUNS / re.sub(r"[^\w.-]", "-", key)
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def curve(lines: list[Entry], method: Method) -> list[Entry]:
    """Dev scores with the training seconds, the whole forwards and one client's bytes that they took."""
    rounds = [line for line in lines if line["kind"] == "round"]
    (setup,) = (line for line in lines if line["kind"] == "setup")
    num_rows = sum(client["num_train"] for client in setup["clients"])
    seconds = [0.0, *accumulate(line["round_seconds"] for line in rounds)]
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
