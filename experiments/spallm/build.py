"""How long a sketch takes to build: ``python experiments/spallm/build.py --data DIR``, three minutes.

The embedded model at 4 bits, on 16 windows of 512 tokens of C4, by one thread. ``fedzo sketch`` itself says what its
two phases took. DIR has ``c4``.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fedzo.bench.claims import Claims

HERE = Path(__file__).parent
EMBEDDED = "SmolLM2-135M (itself from a Q4_1 file, 5 bits a weight)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with c4")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = ["--calibration", str(arguments.data / "c4" / "train.jsonl"), "--windows", "16", "--tokens", "512"]
        began = time.perf_counter()
        command = [sys.executable, "-m", "fedzo", "sketch", "--out", f"{folder}/sk4", *text, "threads=1"]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        minutes = (time.perf_counter() - began) / 60
    print(said)
    phases = re.search(r"sketched \d+ layers: (.+) for forwards of the text, (.+) for tables and codes", said)
    if phases is None:
        sys.exit("The command must tell what its two phases took, but does not. Mend this script.")
    claims = Claims(command="python experiments/spallm/build.py --data DIR")
    what = f"4-bit sketch of {EMBEDDED}, one thread, 16 windows of 512 tokens"
    claims.add(f"{what}: the whole command, with loading and perplexity before and after", minutes, "min", at_most=10)
    claims.add(f"{what}: the text's way through the model", seconds(phases[1]), "s")
    claims.add(f"{what}: tables and codes", seconds(phases[2]), "s")
    claims.show()
    claims.write(HERE / "claims.json")


def seconds(text: str) -> float:
    """Of a duration as the command prints it: ``39 s``, ``1 min 06 s``."""
    whole = re.fullmatch(r"(?:(\d+) min )?([\d.]+) s", text)
    if whole is None:
        sys.exit(f"A phase must take minutes and seconds, got {text!r}. Mend this script.")
    return 60 * int(whole[1] or 0) + float(whole[2])


if __name__ == "__main__":
    main()
