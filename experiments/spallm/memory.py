"""Memory of a client's step by trainer: ``python experiments/spallm/memory.py --sketch DIR``, six minutes.

``fedzo bench step`` measures the peak of a step, weights included, in a process of its own: tables of a 4-bit sketch of
the embedded model, and other trainers on the dense model in float32. ``DIR`` is made by
``fedzo sketch --out DIR --calibration FILE``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from fedzo.bench.claims import Claims
from fedzo.bench.step import OURS

HERE = Path(__file__).parent
EMBEDDED = "SmolLM2-135M (itself from a Q4_1 file, 5 bits a weight)"
TABLES = "tables of a 4-bit sketch"
DENSE = {"Meerkat": "meerkat", "LoRA-MeZO": "lora", "MeZO": "mezo"}
"""Trainers of the dense model, by the name that claims give them."""
ROWS, TOKENS = 16, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sketch", type=Path, required=True, help="folder of a 4-bit sketch of the embedded model")
    arguments = parser.parse_args()
    claims = Claims(command="python experiments/spallm/memory.py --sketch DIR")
    what = f"{EMBEDDED}, one thread, {ROWS} x {TOKENS} tokens, peak memory of a step"
    ours = bench("trainer=tables", f"model={arguments.sketch}")
    claims.environment = ours["environment"]
    claims.add(f"{what}: {TABLES}", peak_bytes(ours) / 1e6, "MB")
    for name, trainer in DENSE.items():
        theirs = peak_bytes(bench(f"trainer={trainer}"))
        claims.add(f"{what}: {name}", theirs / 1e6, "MB")
        claims.add(f"{what}: {TABLES} / {name}", peak_bytes(ours) / theirs, "ratio")
    claims.show()
    claims.write(HERE / "claims.json")


def bench(*settings: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        shape = [f"--rows={ROWS}", f"--tokens={TOKENS}", "--repeats=1", f"--out={out}"]
        subprocess.run([sys.executable, "-m", "fedzo", "bench", "step", *settings, "threads=1", *shape], check=True)
        found: dict[str, Any] = json.loads(out.read_text())
    return found


def peak_bytes(result: dict[str, Any]) -> int:
    (figure,) = [figure for figure in result["figures"] if figure["name"] == OURS]
    if figure["peak_bytes"] is None:
        sys.exit("The peak of a step must be measured, but this system does not tell it. Use Linux.")
    return int(figure["peak_bytes"])


if __name__ == "__main__":
    main()
