"""How long a sketch takes to build: ``python experiments/spallm/build.py --data DIR``, three minutes.

The embedded model at 4 bits, on 16 windows of 512 tokens of C4, by one thread. ``fedzo sketch`` itself says what its
two phases took. DIR has ``c4``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fedzo.bench.claims import Claims

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with c4")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = ["--calibration", str(arguments.data / "c4" / "train.jsonl"), "--windows", "16", "--tokens", "512"]
        began = time.perf_counter()
        command = [sys.executable, "-m", "fedzo", "sketch", "--out", f"{folder}/sk4", *text, "threads=1"]
        subprocess.run(command, check=True)
        minutes = (time.perf_counter() - began) / 60
    claims = Claims(command="python experiments/spallm/build.py --data DIR")
    what = "4-bit sketch of SmolLM2-135M, one thread, 16 windows of 512 tokens"
    claims.add(f"{what}: the whole command, with loading and perplexity before and after", minutes, "min", at_most=10)
    claims.show()
    claims.write(HERE / "claims.json")


if __name__ == "__main__":
    main()
