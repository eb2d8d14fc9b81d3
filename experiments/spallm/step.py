"""What a step on tables costs: ``python experiments/spallm/step.py --sketch DIR``, about ten minutes on one thread.

``fedzo bench step`` times, in turn, the forwards of a sketch, the step that consists of two of them, and the forwards
of the dense model to which the sketch decodes. Peak memory is that of a step less the space's own vector (its buffer is
the tables themselves), and that of forwards without a space. ``DIR`` is a sketch of the embedded model, made by
``fedzo sketch --out DIR --calibration FILE``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from fedzo.bench.claims import Claims
from fedzo.bench.step import BARE, DENSE, OURS
from fedzo.models.config import ModelConfig
from fedzo.models.load import load_model
from fedzo.sketch import tables_of

HERE = Path(__file__).parent
EMBEDDED = "SmolLM2-135M (itself from a Q4_1 file, 5 bits a weight)"
BATCHES = {(16, 32): 1.10, (8, 128): None, (2, 32): None}
"""Rows and tokens, and what the sketch's forwards may cost beside the dense ones."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sketch", type=Path, required=True, help="folder of a sketch of the embedded model")
    parser.add_argument("--repeats", type=int, default=9, help="timed repeats (default: 9)")
    arguments = parser.parse_args()
    vector = 4 * sum(
        table.numel() for table in tables_of(load_model(ModelConfig(name=str(arguments.sketch))).model).values()
    )
    claims = Claims(command="python experiments/spallm/step.py --sketch DIR")
    for (rows, tokens), most in BATCHES.items():
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "result.json"
            settings = [f"model={arguments.sketch}", "trainer=tables", "threads=1"]
            shape = [f"--rows={rows}", f"--tokens={tokens}", f"--repeats={arguments.repeats}", f"--out={out}"]
            subprocess.run([sys.executable, "-m", "fedzo", "bench", "step", *settings, *shape], check=True)
            result = json.loads(out.read_text())
        figures = {figure["name"]: figure for figure in result["figures"]}
        what = f"4-bit sketch of {EMBEDDED}, one thread, {rows} x {tokens} tokens"
        claims.environment = result["environment"]
        ours = 1.05 if rows * tokens >= 512 else None
        claims.add(f"{what}: step / its forwards, time", figures[OURS]["ratio"], "ratio", at_most=ours)
        claims.add(f"{what}: forwards / dense forwards, time", 1 / figures[DENSE]["ratio"], "ratio", at_most=most)
        peaks = [figures[name]["peak_bytes"] for name in (OURS, BARE, DENSE)]
        if all(peaks):
            step, inference, dense = peaks
            claims.add(f"{what}: step / inference, peak memory", (step - vector) / inference, "ratio", at_most=1.05)
            claims.add(f"{what}: inference / dense inference, peak memory", inference / dense, "ratio")
    claims.show()
    claims.write(HERE / "claims.json")


if __name__ == "__main__":
    main()
