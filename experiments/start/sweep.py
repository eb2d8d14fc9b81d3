"""What the jobs of a sweep cost in one process, beside the same runs as single commands and in two processes.

    python experiments/start/sweep.py      # about ten minutes on 2 cores, which must be idle

A job is the run of run.py, of one round. In one process (``fedzo train -m``) the jobs share a loaded model. Each of the
two processes of the launcher of the extra ``sweep`` has a model of its own and half of the CPUs; without the extra they
are left out. All ways take turns. The device is that of ``device=auto``.

Results of a device take the place of earlier ones of this device in sweep.json; claims.json is made of all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

from common import Result, fedzo, measure, short_run

from fedzo.bench.claims import Claims, with_range
from fedzo.system import package_version, usable_cpus

HERE = Path(__file__).parent
RESULTS = HERE / "sweep.json"
REPEATS = 3
SEEDS = (0, 1, 2, 3)
ONE, COMMANDS, TWO = "in one process", "as commands, one after another", "in two processes"
WHAT = f"{len(SEEDS)} runs of a round of experiment=meerkat, mask given"
Run = Callable[[list[str], Path], None]


def main() -> None:
    measure(RESULTS, measured, gather)


# --- measuring --------------------------------------------------------------------------------------------------------


def measured() -> Result:
    """Seconds of all jobs together, for each way and repeat; and how many logs of jobs are those of the commands."""
    ways: dict[str, Run] = {ONE: in_one_process, COMMANDS: as_commands}
    if package_version("hydra-joblib-launcher"):
        ways[TWO] = in_two_processes
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    alike = 0
    with short_run() as (work, settings):
        for repeat in range(REPEATS):
            folders = {name: work / f"{repeat}-{number}" for number, name in enumerate(ways)}
            for name, run in ways.items():
                begin = time.perf_counter()
                run(settings, folders[name])
                seconds[name].append(time.perf_counter() - begin)
                print(f"{name}: {seconds[name][-1]:.1f} s")
            logs = [[(folders[name] / f"job{seed}" / "public.jsonl").read_bytes() for seed in SEEDS] for name in ways]
            alike += sum(shared == alone for shared, alone in zip(logs[0], logs[1], strict=True))
    return {"seconds": seconds, "alike": alike, "jobs": REPEATS * len(SEEDS)}


def in_one_process(settings: list[str], folder: Path) -> None:
    fedzo("train", "-m", *settings, *as_jobs(folder))


def as_commands(settings: list[str], folder: Path) -> None:
    for seed in SEEDS:
        fedzo("train", *settings, f"seed={seed}", f"hydra.run.dir={folder / f'job{seed}'}")


def in_two_processes(settings: list[str], folder: Path) -> None:
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", f"threads={max(1, usable_cpus() // 2)}"]
    fedzo("train", "-m", *launcher, *settings, *as_jobs(folder))


def as_jobs(folder: Path) -> list[str]:
    """The seeds, and a folder for each: the number of a job is its seed."""
    return [f"seed={','.join(map(str, SEEDS))}", f"hydra.sweep.dir={folder}", "hydra.sweep.subdir=job${hydra:job.num}"]


# --- claims -----------------------------------------------------------------------------------------------------------


def gather(results: Mapping[str, Result]) -> Claims:
    """Of all devices; the rows of a card name it, and before there is one its target is told."""
    claims = Claims(command="python experiments/start/sweep.py", seeds=[*SEEDS])
    for device, found in results.items():
        claims.environment = found["environment"]
        head = WHAT if device == "cpu" else f"{device}: {WHAT}"
        seconds: dict[str, list[float]] = found["seconds"]
        for way, of_way in seconds.items():
            rates = [60 * len(SEEDS) / each for each in of_way]
            claims.add(f"{head}, {way}: jobs a minute", median(rates), with_range("", rates))
        for way in (each for each in seconds if each != COMMANDS):
            ratios = [alone / each for alone, each in zip(seconds[COMMANDS], seconds[way], strict=True)]
            faster = f"{head}, {way} / {COMMANDS}: jobs a minute"
            claims.add(faster, median(ratios), with_range("ratio", ratios), at_least=1.0 if way == ONE else None)
        same = found["alike"] / found["jobs"]
        claims.add(f"{head}, {ONE}: logs that are those of the commands, byte for byte", same, "share", at_least=1.0)
    if not {*results} - {"cpu"}:
        claims.add(f"on a GPU: {WHAT}, {ONE} / {COMMANDS}: jobs a minute", None, "ratio", at_least=1.0)
    return claims


if __name__ == "__main__":
    main()
