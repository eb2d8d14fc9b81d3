"""What trained tables reach beside other trainers: ``python experiments/spallm/accuracy.py --data DIR``.

Tasks, clients, rows, seeds and steps are those of the study in ``experiments/meerkat`` with T = 1: 8 clients, 200 steps
of 2 rows a client, SmolLM2-135M. Here it is a sketch of 4 bits, made on 16 windows of 512 tokens of C4, whose tables
are trained. Fixed before any run, as in that study: the learning rate is of a ladder of factors of two, begun at 1e-4,
and has the least dev loss of seed 0, inside the ladder; eps is 1e-3; the tested model is the best by dev loss of five.
A comparison is by seeds: the run here less the run of the study with the same seed, with Student's 95 % interval. Its
verdict is by the study's rules (``experiments/meerkat/verdicts.py``), which replaced others after the runs. Trained
tables are ahead or behind where the interval leaves out 0 and the difference is a point at least. Where the whole
interval lies within 2 points, that is said. All else cannot be judged, nor can a method all of whose runs diverge.

Results are in ``accuracy.json``, so a repeated call goes on. DIR has ``sst2``, ``ag_news`` and ``c4``. A run takes one
thread and 6 to 15 minutes; two run at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

from fedzo.bench.claims import Claims, kept_results, measured_in, metric_lines, ran_with
from fedzo.records.folder import replace_file
from fedzo.report.format import interval

HERE = Path(__file__).parent
EMBEDDED = "SmolLM2-135M (itself from a Q4_1 file, 5 bits a weight)"
STUDY = HERE.parent / "meerkat"
RESULTS = HERE / "accuracy.json"
RUNS = Path("runs/spallm")
SKETCH = RUNS / "sk4"
COMMAND = "python experiments/spallm/accuracy.py --data DIR"
TASKS = {"sst2": "SST-2", "ag_news": "AG News"}
OTHERS = {"meerkat": "Meerkat", "full": "Full-FedZO", "lora": "LoRA-FedZO"}
SEEDS = (0, 1, 2)
FIRST, LADDER = 1e-4, 2.0
LEAST, SAME = 1.0, 2.0
"""Points: a smaller difference is not judged; two methods that are nearer do the same. Both are the study's."""
STORE = threading.Lock()
Run = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with sst2, ag_news and c4")
    parser.add_argument("--task", choices=TASKS, action="append", help="only this task (default: both)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each (default: 2)")
    options = parser.parse_args()
    data = options.data.resolve()
    os.environ["FEDZO_STUDY_DATA"] = str(data)
    RUNS.mkdir(parents=True, exist_ok=True)
    if not SKETCH.exists():
        fedzo("sketch", "--out", str(SKETCH), "--calibration", str(data / "c4" / "train.jsonl"), "--windows", "16")
    with ThreadPoolExecutor(options.jobs) as pool:
        for task in options.task or TASKS:
            rate = tuned(pool, task)
            list(pool.map(lambda seed, task=task, rate=rate: run(task, seed=seed, lr=rate), SEEDS))
            write_claims()


def tuned(pool: ThreadPoolExecutor, task: str) -> float:
    """The rate of the least dev loss of seed 0, once there is a worse one on either side."""
    rates = [FIRST / LADDER, FIRST, FIRST * LADDER]
    while True:
        losses = dict(zip(rates, pool.map(lambda rate: best_dev_loss(run(task, seed=0, lr=rate)), rates), strict=True))
        best = min(losses, key=losses.__getitem__)
        if min(rates) < best < max(rates):
            return best
        rates.append(best / LADDER if best == min(rates) else best * LADDER)


def run(task: str, *, seed: int, lr: float) -> Run:
    """One run, which a later call does not repeat; dev and test scores are read off its records."""
    name = f"{task} lr={lr:g} seed={seed}"
    if name in (done := known()):
        return done[name]
    folder = RUNS / f"{task}-{lr:g}-{seed}"
    words = ["experiment=study", "+budget=T1", f"task={task}", f"data.path={os.environ['FEDZO_STUDY_DATA']}/{task}"]
    words += [f"model={SKETCH}", "trainer=tables", "trainer.gradient=false", f"trainer.lr={lr:g}", f"seed={seed}"]
    fedzo("train", "-m", "--config-dir", str(STUDY / "conf"), *words, f"hydra.sweep.dir={folder}")
    # beside it may lie what an earlier version of fedzo began under another name
    (records,) = (path for path in folder.glob("*/metrics.jsonl") if '"summary"' in path.read_text())
    (summary,) = metric_lines(records.parent, "summary")
    scores = metric_lines(records.parent, "score")
    found = {
        "task": task,
        "seed": seed,
        "lr": lr,
        "before": {key: summary["before"][key] for key in ("value", "loss")},
        "after": {key: summary["after"][key] for key in ("value", "loss")},
        "dev": [[s["round"], s["value"], s["loss"]] for s in scores if s["split"] == "dev"],
        "best_round": summary["best_round"],
        "seconds": round(summary["seconds"], 1),
        "environment": ran_with(records.parent, "task", "trainer.lr", "server_optimizer.lr"),
    }
    with STORE:
        replace_file(RESULTS, json.dumps(known() | {name: found}, indent=1) + "\n")
    print(f"{name}: dev loss {best_dev_loss(found):.4f}, test {found['after']}", flush=True)
    return found


def known() -> dict[str, Run]:
    """Every run so far, by name."""
    return kept_results(RESULTS, {})


def best_dev_loss(found: Run) -> float:
    """The least after training began; a loss that is not finite is the worst."""
    return min((float("inf") if loss is None else loss for _, _, loss in found["dev"][1:]), default=float("inf"))


def write_claims() -> None:
    """Rows of each task whose seeds are all there."""
    claims = Claims(command=COMMAND, seeds=list(SEEDS), environment=measured_in(known().values()))
    for task, title in TASKS.items():
        found = [each for each in known().values() if each["task"] == task]
        rates = {rate: {each["seed"]: each for each in found if each["lr"] == rate} for rate in lrs()}
        chosen = [(rate, runs) for rate, runs in rates.items() if runs.keys() == {*SEEDS}]
        if len(chosen) != 1:
            continue
        ((rate, runs),) = chosen
        what = f"{title}, 8 clients, 200 steps, tables of a 4-bit sketch of {EMBEDDED}"
        claims.add(f"{what}: learning rate of the least dev loss", rate, "")
        claims.add(f"{what}: test accuracy before training", 100 * runs[0]["before"]["value"], "%")
        after = [100 * runs[seed]["after"]["value"] for seed in SEEDS]
        mean, half = interval(after)
        claims.add(f"{what}: test accuracy, mean of three seeds", mean, f"% +- {half:.1f}")
        claims.add(f"{what}: test loss, mean of three seeds", fmean(r["after"]["loss"] for r in runs.values()), "")
        for label, theirs in others(task):
            gains = [100 * (runs[seed]["after"]["value"] - theirs[seed]["after"]["value"]) for seed in SEEDS]
            mean, half = interval(gains)
            sides = (("the tables", runs), (label, theirs))
            lost = [side for side, by_seed in sides if all(diverged(by_seed[seed]) for seed in SEEDS)]
            seen = f"cannot judge; all runs of {' and '.join(lost)} diverge" if lost else verdict(gains)
            unit = f"points +- {half:.1f}: {seen}"
            claims.add(f"{what}: test accuracy, less that of {label} of the dense model", mean, unit)
    claims.show()
    claims.write(HERE / "claims.json")


def verdict(gains: list[float]) -> str:
    """Of differences in points, one a seed."""
    mean, half = interval(gains)
    if abs(mean) >= max(half, LEAST):
        return "ahead" if mean > 0 else "behind"
    return f"within {SAME:g} points" if abs(mean) + half <= SAME else "cannot judge"


def diverged(found: Run) -> bool:
    """Whether the run ended with a higher dev loss than the base model's, whatever its best checkpoint reached."""
    base, last = found["dev"][0][2], found["dev"][-1][2]
    return last is None or last > base


def lrs() -> list[float]:
    """Every rate that was tried."""
    return sorted({found["lr"] for found in known().values()})


def others(task: str) -> Iterator[tuple[str, dict[int, Run]]]:
    """Each other method with its runs by seed: the study's rows."""
    rows = json.loads((STUDY / "results" / "core.json").read_text())
    for method, label in OTHERS.items():
        found = [row for row in rows if (row["task"], row["method"], row["budget"]) == (task, method, "T1")]
        yield label, {row["seed"]: row for row in found}


def fedzo(*words: str) -> None:
    log = RUNS / "log.txt"
    with log.open("a") as out:
        if code := subprocess.run([sys.executable, "-m", "fedzo", *words], stdout=out, stderr=out).returncode:
            sys.exit(f"`fedzo {' '.join(words)}` ended with {code}: see the end of {log}.")


if __name__ == "__main__":
    main()
