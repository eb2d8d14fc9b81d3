"""What passes between ``fedzo train`` and its first round, part by part and import by import.

    python experiments/start/run.py

The run is that of experiment=meerkat (SmolLM2, Meerkat, 8 clients in one process) with a mask that is there already
and nothing scored, so that what is left is what every run pays. It takes the device that ``device=auto`` takes. Medians
of several starts in turn:

- start: from the start of the process to its first round, which ends when the first line of the log is there;
- loading: ``load_model`` alone, on the same device, in a process that has imported it;
- parts: what functions of fedzo take in such a start (``parts.py``);
- imports: the sum of Python's own account (``-X importtime``), by the package that is imported, what it imports in
  turn counted with whoever is imported.

Results of a device take the place of earlier ones of this device in results.json; claims.json is made of all of them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from statistics import median

from common import Result, fedzo, measure, short_run

from fedzo.bench.claims import Claims, metric_lines

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
REPEATS = 3
MAX_SHOWN = 12
POLL_S = 0.005
WHAT = "fedzo train experiment=meerkat, its mask given, to the first round"
REST = f"{WHAT}, less loading alone"
LIMIT_S = 6.0
LOADING = (
    "import time\n"
    "from fedzo.models.config import ModelConfig\n"
    "from fedzo.models.load import load_model\n"
    "from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM\n"
    "begin = time.perf_counter()\n"
    "load_model(ModelConfig(), device='auto')\n"
    "print(time.perf_counter() - begin)\n"
)
_IMPORT = re.compile(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\w+)")


def main() -> None:
    measure(RESULTS, measured, gather)


# --- measuring --------------------------------------------------------------------------------------------------------


def measured() -> Result:
    starts, loads, parts, imports = [], [], [], []
    with short_run() as (work, settings):
        for repeat in range(REPEATS):
            starts.append(seconds_to_first_round(settings, work / f"start-{repeat}"))
            loads.append(seconds_of_loading())
            parts.append(seconds_by_part(settings, work / f"parts-{repeat}"))
            imports.append(seconds_by_package(settings, work / f"imports-{repeat}"))
            print(f"start {starts[-1]:.1f} s, loading {loads[-1]:.1f} s, imports {sum(imports[-1].values()):.1f} s")
    return {"starts": starts, "loads": loads, "parts": parts, "imports": imports}


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


def seconds_by_part(settings: list[str], folder: Path) -> dict[str, float]:
    """Of a start, in which nothing is counted twice: the last part is what no other one has."""
    file = folder.with_suffix(".json")
    command = [sys.executable, str(HERE / "parts.py"), str(file), str(time.monotonic()), *settings]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([*command, f"hydra.run.dir={folder}"], check=True, **quiet)
    told = json.loads(file.read_text())
    return {**told["parts"], "all else": told["total"] - sum(told["parts"].values())}


def seconds_by_package(settings: list[str], folder: Path) -> Counter[str]:
    """Of all imports of a run, by the top-level package of the module that is imported."""
    done = fedzo("train", *settings, f"hydra.run.dir={folder}", python=("-X", "importtime"), errors=subprocess.PIPE)
    seconds: Counter[str] = Counter()
    for microseconds, package in _IMPORT.findall(done.stderr):
        seconds[package] += int(microseconds) / 1e6
    return seconds


# --- claims -----------------------------------------------------------------------------------------------------------


def gather(results: Mapping[str, Result]) -> Claims:
    """Of all devices; the rows of a card name it, and before there is one its target is told."""
    claims = Claims(command="python experiments/start/run.py")
    for device, found in results.items():
        claims.environment = found["environment"]
        head = "" if device == "cpu" else f"{device}: "
        rest = median(start - load for start, load in zip(found["starts"], found["loads"], strict=True))
        claims.add(f"{head}{WHAT}", median(found["starts"]), "s")
        claims.add(f"{head}loading SmolLM2 alone, with everything imported", median(found["loads"]), "s")
        claims.add(f"{head}{REST}", rest, "s", at_most=LIMIT_S)
        for part, seconds in medians(found["parts"]).items():
            claims.add(f"{head}the start, {part}", seconds, "s")
        claims.add(f"{head}imports, all", median(sum(each.values()) for each in found["imports"]), "s")
        for package, seconds in Counter(medians(found["imports"])).most_common(MAX_SHOWN):
            claims.add(f"{head}imports, modules of {package}", seconds, "s")
    if not {*results} - {"cpu"}:
        claims.add(f"on a GPU: {REST}", None, "s", at_most=LIMIT_S)
    return claims


def medians(found: list[dict[str, float]]) -> dict[str, float]:
    """Of each name, in the order in which they first came."""
    names = dict.fromkeys(name for each in found for name in each)
    return {name: median(each.get(name, 0.0) for each in found) for name in names}


if __name__ == "__main__":
    main()
