"""What a federation over a real network costs beside one in a process: ``python experiments/network/run.py``.

Runs of ``experiment=tiny`` (SmolLM2-135M, two clients, one local step a round) by turns with ``runtime=inline`` and
``runtime=local``, which has TLS, keys and a process a client, with the same threads; medians over the rounds after the
first. Clients of ``local`` work at the same time, so its rounds can be the shorter ones. Beside them an app of Flower
alone (``stock-app``), whose clients compute two forwards of the same model and nothing else. About seven minutes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from stock import stock_rounds
from traffic import failure

from fedzo.bench.claims import Claims, metric_lines

HERE = Path(__file__).parent
OVERHEAD_S, FIRST_S = 0.5, 20.0


def main() -> None:
    """Measure, print and write the claims."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30, help="rounds of a run (default: 30)")
    parser.add_argument("--turns", type=int, default=2, help="runs of each runtime (default: 2)")
    parser.add_argument("--stock-rounds", type=int, default=10, help="rounds of Flower alone (default: 10)")
    options = parser.parse_args()
    told: dict[str, list[dict[str, float]]] = {"inline": [], "local": []}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(options.turns):
            for runtime, runs in told.items():
                runs.append(run(Path(folder) / f"{runtime}{turn}", runtime, options.rounds))
        (stock := Path(folder) / "stock").mkdir()
        alone = statistics.median(stock_rounds(stock, clients=2, rounds=options.stock_rounds)[1:])
    inline, local = (
        {name: statistics.median(each[name] for each in runs) for name in runs[0]} for runs in told.values()
    )
    claims = Claims(command="python experiments/network/run.py")
    what = "two clients, T = 1, one thread each"
    claims.add(f"runtime=inline, {what}: median seconds a round", inline["round"], "s")
    claims.add(f"runtime=local, {what}: median seconds a round", local["round"], "s")
    over = local["round"] - inline["round"]
    claims.add(f"runtime=local, {what}: its round less inline's", over, "s", at_most=OVERHEAD_S)
    claims.add(
        "runtime=local: seconds from the command to the first round's end, less those of inline",
        local["start"] - inline["start"],
        "s",
        at_most=FIRST_S,
    )
    claims.add("Flower alone, without TLS, two clients, two forwards each: median seconds a round", alone, "s")
    claims.add("runtime=local: its round / that of Flower alone", local["round"] / alone, "ratio")
    claims.show()
    claims.write(HERE / "claims.json")


def run(folder: Path, runtime: str, rounds: int) -> dict[str, float]:
    """One run: median seconds of its rounds but the first, and seconds to the end of the first."""
    command = [
        *(sys.executable, "-m", "fedzo", "train", "experiment=tiny", f"runtime={runtime}", f"fl.rounds={rounds}"),
        *("evaluation.every_rounds=1000", f"hydra.run.dir={folder}"),
    ]
    began = time.monotonic()
    process = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=subprocess.DEVNULL)
    first = None
    while process.poll() is None:
        time.sleep(0.05)
        log = folder / "public.jsonl"
        if first is None and log.exists() and log.stat().st_size:
            first = time.monotonic() - began
    if process.returncode:
        raise failure(f"it ended with status {process.returncode}", folder, command)
    seconds = [line["round_seconds"] for line in metric_lines(folder, "round")]
    assert first is not None
    return {"round": statistics.median(seconds[1:]), "start": first}


if __name__ == "__main__":
    main()
