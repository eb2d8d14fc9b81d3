"""What ``run.py`` and ``sweep.py`` share: the run that they start, and their results by device."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fedzo.bench.claims import Claims, kept_results
from fedzo.models.load import resolve_device
from fedzo.records.folder import replace_file
from fedzo.system import environment

Result = dict[str, Any]


def measure(file: Path, measured: Callable[[], Result], gather: Callable[[Mapping[str, Result]], Claims]) -> None:
    """Measure on the device of ``device=auto``, keep it beside other devices' results in a file, and write claims."""
    results: dict[str, Result] = kept_results(file, {})
    device = resolve_device("auto")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    results[name] = {**measured(), "environment": environment(device)}
    replace_file(file, json.dumps(results, indent=1) + "\n")
    claims = gather(results)
    claims.show()
    claims.write(file.with_name("claims.json"))


@contextmanager
def short_run() -> Iterator[tuple[Path, list[str]]]:
    """A folder for runs, and words of one: a round of experiment=meerkat, with a mask and without scores."""
    with tempfile.TemporaryDirectory() as kept:
        mask = Path(kept) / "mask.safetensors"
        fedzo("mask", "--out", str(mask), "experiment=meerkat", "trainer.calibration_docs=2")
        words = ["experiment=meerkat", f"inputs.artifact={mask}", "fl.rounds=1", "report=none"]
        yield Path(kept), [*words, "evaluation.central=false", "evaluation.federated_every_rounds=-1"]


def fedzo(*words: str, python: tuple[str, ...] = (), errors: int = subprocess.DEVNULL) -> subprocess.CompletedProcess:
    """Run a command of fedzo."""
    command = [sys.executable, *python, "-m", "fedzo", *words]
    return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=errors, text=True, check=True)
