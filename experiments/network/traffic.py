"""Bytes of a client and round over a real network: ``python experiments/network/traffic.py``.

Short runs of ``runtime=local`` with two clients and a tiny model, with T = 1, 10 and 100 local steps, of scalars and
of vectors (``estimator=backprop``). Payload and wire bytes are those of the run's metrics: the wire is all HTTP
within TLS, also what a SuperNode sends to ask for work, ten times a second after its last and then less often. The
kernel's count of the same TCP connections (``ss``) stands beside it. About five minutes.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedzo.bench.claims import Claims
from fedzo.testing.tiny_models import save_tiny_model

HERE = Path(__file__).parent
ROUNDS, WARM, CLIENTS = 30, 2, 2
STALLED_S = 300.0
"""Without a round, or before the first."""
CASES = {
    **{f"scalars, T = {steps}": [f"fl.local_steps={steps}"] for steps in (1, 10, 100)},
    **{f"vectors, T = {steps}": [f"fl.local_steps={steps}", "estimator=backprop"] for steps in (1, 10, 100)},
}


def main() -> None:
    """Measure, print and write the claims."""
    claims = Claims(command="python experiments/network/traffic.py")
    with tempfile.TemporaryDirectory() as folder:
        shares = []
        for number, (case, settings) in enumerate(CASES.items()):
            run, sockets = Path(folder) / f"run{number}", Sockets()
            lines = tiny_run(run, [*settings, f"fl.rounds={ROUNDS}"], watch=sockets.look)
            rounds = [line for line in lines if line["kind"] == "round"][WARM:]
            size = next(line["space_size"] for line in lines if line["kind"] == "setup")
            what = case if "scalars" in case else f"{case}, {size:,} numbers"
            for kind in ("payload", "wire"):
                for way in ("up", "down"):
                    found = statistics.median(line[f"{kind}_{way}_bytes"] for line in rounds) / CLIENTS
                    claims.add(f"{what}: {kind} {way}, bytes a client and round", found, "bytes")
            claims.add(f"{what}: median seconds a round", statistics.median(r["round_seconds"] for r in rounds), "s")
            shares.append(sockets.beside(lines))
        what = "TCP payload with TLS, by the kernel / wire bytes, by the metrics, in the rounds of a run"
        claims.add(f"{what}: least of the runs", min(shares), "ratio")
        claims.add(f"{what}: most of the runs", max(shares), "ratio")
    claims.show()
    claims.write(HERE / "claims.json")


def tiny_run(folder: Path, settings: list[str], *, watch: Callable[[Path, int], None]) -> list[dict[str, Any]]:
    """A run over the network with a tiny model; returns its metrics.

    Args:
        folder: Of the run.
        settings: Beside the usual ones.
        watch: Called again and again with the folder and the pid of the process that started all others.

    Raises:
        SystemExit: The run failed, or had no round for long, with the end of each of its logs.
    """
    made = folder.parent / f"{folder.name}-made"
    save_tiny_model(made / "model", "llama")
    for name, first, count in (("train", 0, 64), ("dev", 100, 8), ("test", 200, 8)):
        rows = [{"text": f"item {i} is {('bad', 'good')[i % 2]}", "label": i % 2} for i in range(first, first + count)]
        (made / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        *(sys.executable, "-m", "fedzo", "train", "runtime=local", f"model={made / 'model'}", "task=custom"),
        *("task.template='Text: {text}\\nVerdict:'", "task.candidates=[' bad',' good']", f"data.path={made}"),
        *("partition=iid", f"fl.num_clients={CLIENTS}", "trainer.density=0.05", "trainer.selector=random", "threads=1"),
        *("report=none", "evaluation.every_rounds=0", "evaluation.federated_every_rounds=-1"),
        *(*settings, f"hydra.run.dir={folder}"),
    ]
    process = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=subprocess.DEVNULL)
    metrics, size, since = folder / "metrics.jsonl", 0, time.monotonic()
    try:
        while process.poll() is None:
            time.sleep(0.2)
            watch(folder, process.pid)
            if metrics.exists() and metrics.stat().st_size != size:
                size, since = metrics.stat().st_size, time.monotonic()
            if time.monotonic() - since > STALLED_S:
                raise failure(f"no round within {STALLED_S:g} s", folder, command)
    finally:
        process.terminate()
        process.wait(120)
    if process.returncode:
        raise failure(f"it ended with status {process.returncode}", folder, command)
    return [json.loads(line) for line in metrics.read_text().splitlines()]


def failure(why: str, folder: Path, command: list[str]) -> SystemExit:
    """What to end with where a run failed: why, and the last lines of each log of it."""
    told = [f"the run failed: {why}: {' '.join(command)}"]
    for log in sorted([*folder.glob("*.log"), *folder.glob("logs/*.log")]):
        told += [f"The end of {log.relative_to(folder)}:", *log.read_text(errors="replace").splitlines()[-15:]]
    return SystemExit("\n".join(told))


class Sockets:
    """The kernel's count of TCP payload, both ways, at the port that sites reach, while a run goes on."""

    def __init__(self) -> None:
        self._seen: dict[str, int] = {}
        self._totals: list[tuple[int, int]] = []  # rounds that were done, and bytes of all connections until then

    def beside(self, lines: list[dict[str, Any]]) -> float:
        """What was counted between two looks, as a multiple of the wire bytes of the rounds between them."""
        (first, before), (last, after) = next(each for each in self._totals if each[0] >= WARM), self._totals[-1]
        rounds = [line for line in lines if line["kind"] == "round"][first:last]
        return (after - before) / sum(line[f"wire_{way}_bytes"] for line in rounds for way in ("up", "down"))

    def look(self, folder: Path, pid: int) -> None:
        """Take the counters of the connections that are there."""
        settings = folder / "network" / "server" / "server.json"
        if not settings.exists():
            return
        port = json.loads(settings.read_text())["listen"].rpartition(":")[2]
        told = subprocess.run(["ss", "-tinHO", f"sport = :{port}"], capture_output=True, text=True, check=True).stdout
        for line in told.splitlines():
            counts = [int(number) for number in re.findall(r" bytes_(?:sent|received):(\d+)", line)]
            if counts:
                self._seen[line.split()[4]] = sum(counts)
        log = folder / "public.jsonl"
        done = log.read_bytes().count(b"\n") if log.exists() else 0
        if not self._totals or self._totals[-1][0] < done:  # at the first look after a round
            self._totals.append((done, sum(self._seen.values())))


if __name__ == "__main__":
    main()
