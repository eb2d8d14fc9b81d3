"""What passes between ``fedzo train`` and its first round, import by import; writes claims.json beside this file.

    python experiments/start/run.py

The run is that of experiment=meerkat (SmolLM2, Meerkat, 8 clients in one process) with a mask that is there already
and nothing scored, so that what is left is what every run pays. Medians of several starts in turn:

- start: from the start of the process to its first round, which ends when the first line of the log is there;
- loading: ``load_model`` alone, in a process that has imported it;
- imports: the sum of Python's own account (``-X importtime``), by the package that is imported, what it imports in
  turn counted with whoever is imported.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median

from fedzo.bench.claims import Claims, metric_lines

HERE = Path(__file__).parent
REPEATS = 3
MAX_SHOWN = 12
POLL_S = 0.005
LOADING = (
    "import time\n"
    "from fedzo.models.config import ModelConfig\n"
    "from fedzo.models.load import load_model\n"
    "from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM\n"
    "begin = time.perf_counter()\n"
    "load_model(ModelConfig(), device='cpu')\n"
    "print(time.perf_counter() - begin)\n"
)
_IMPORT = re.compile(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\w+)")


def main() -> None:
    with tempfile.TemporaryDirectory() as kept:
        work = Path(kept)
        mask = work / "mask.safetensors"
        fedzo("mask", "--out", str(mask), "experiment=meerkat", "trainer.calibration_docs=2")
        settings = ["experiment=meerkat", f"inputs.artifact={mask}", "fl.rounds=1", "report=none"]
        settings += ["evaluation.central=false", "evaluation.federated_every_rounds=-1"]
        starts, loads, imports = [], [], []
        for repeat in range(REPEATS):
            starts.append(seconds_to_first_round(settings, work / f"start-{repeat}"))
            loads.append(seconds_of_loading())
            imports.append(seconds_by_package(settings, work / f"imports-{repeat}"))
            print(f"start {starts[-1]:.1f} s, loading {loads[-1]:.1f} s, imports {sum(imports[-1].values()):.1f} s")
    claims = Claims(command="python experiments/start/run.py")
    what = "fedzo train experiment=meerkat, its mask given, to the first round"
    claims.add(what, median(starts), "s")
    claims.add("loading SmolLM2 alone, with everything imported", median(loads), "s")
    rest = median(start - load for start, load in zip(starts, loads, strict=True))
    claims.add(f"{what}, less loading alone", rest, "s", at_most=6.0)
    claims.add("imports, all", median(sum(each.values()) for each in imports), "s")
    medians = Counter({name: median(each[name] for each in imports) for name in set().union(*imports)})
    for name, seconds in medians.most_common(MAX_SHOWN):
        claims.add(f"imports, modules of {name}", seconds, "s")
    claims.show()
    claims.write(HERE / "claims.json")


def fedzo(*words: str, python: tuple[str, ...] = (), errors: int = subprocess.DEVNULL) -> subprocess.CompletedProcess:
    """Run a command of fedzo."""
    command = [sys.executable, *python, "-m", "fedzo", *words]
    return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=errors, text=True, check=True)


def seconds_to_first_round(settings: list[str], folder: Path) -> float:
    """Until the run has begun its first round: until that is in the log, less what the round took."""
    log, begin = folder / "public.jsonl", time.perf_counter()
    command = [sys.executable, "-m", "fedzo", "train", *settings, f"hydra.run.dir={folder}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (log.exists() and log.stat().st_size and log.read_text().count("\n")) and process.poll() is None:
        time.sleep(POLL_S)
    end = time.perf_counter()
    if process.wait() != 0:
        sys.exit(f"{' '.join(command)} must succeed")
    return end - begin - sum(line["round_seconds"] for line in metric_lines(folder, "round"))


def seconds_of_loading() -> float:
    """In a process of its own."""
    command = [sys.executable, "-c", LOADING]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    return float(done.stdout)


def seconds_by_package(settings: list[str], folder: Path) -> Counter[str]:
    """Of all imports of a run, by the top-level package of the module that is imported."""
    done = fedzo("train", *settings, f"hydra.run.dir={folder}", python=("-X", "importtime"), errors=subprocess.PIPE)
    seconds: Counter[str] = Counter()
    for microseconds, package in _IMPORT.findall(done.stderr):
        seconds[package] += int(microseconds) / 1e6
    return seconds


if __name__ == "__main__":
    main()
