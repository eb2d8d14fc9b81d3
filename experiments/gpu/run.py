"""What directions, steps, masks and runs cost on a GPU; writes claims.json beside this file.

    python experiments/gpu/run.py PIECE ...    # what these pieces lack
    python experiments/gpu/run.py CASE ...     # single cases of a piece, also those that are there already
    python experiments/gpu/run.py              # measures nothing: claims.json from the results that are there

README.md lists the pieces. Each should take less than four minutes on an H200. A case is a file of results/, so a piece
that was interrupted goes on. Nothing is downloaded. Without a CUDA device nothing is measured. What has no result has a
row that says so, and makes no claim.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path

import card
import torch
from card import Case, Result, rows_of
from kernel_cases import KERNELS
from limit_cases import MEMORY, ROOFLINE
from mask_cases import LARGE_MASKS, MASKS
from run_cases import LOCAL_STEPS, REPLAY, ROUNDS
from step_cases import CAPTURED, COMPILED, EAGER

from fedzo.bench.claims import kept_results
from fedzo.bench.measure import free_memory
from fedzo.records.folder import replace_file
from fedzo.system import environment

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PIECES: Mapping[str, Mapping[str, Case]] = {
    "kernel": KERNELS,
    "masks": MASKS,
    "large-masks": LARGE_MASKS,
    "steps": EAGER,
    "captured": CAPTURED,
    "compiled": COMPILED,
    "memory": MEMORY,
    "roofline": ROOFLINE,
    "rounds": ROUNDS,
    "local-steps": LOCAL_STEPS,
    "replay": REPLAY,
}
CASES = {name: case for piece in PIECES.values() for name, case in piece.items()}


def main(arguments: list[str]) -> None:
    if strange := [word for word in arguments if word not in PIECES and word not in CASES]:
        pieces, cases = ", ".join(PIECES), ", ".join(CASES)
        sys.exit(f"PIECE must be one of {pieces}, and CASE one of {cases}; got {', '.join(strange)}")
    wanted = [name for word in arguments for name in names_of(word)]
    if wanted and not torch.cuda.is_available():
        print("Nothing is measured: this machine has no CUDA device.")
        wanted = []
    failed = [name for name in wanted if not measure(name)]
    rows = [row for name, case in CASES.items() for row in rows_of(name, case, result_of(name))]
    (HERE / "claims.json").write_text(json.dumps(rows, indent=1) + "\n")
    if failed:
        sys.exit(f"not measured, see above: {', '.join(failed)}")


def names_of(word: str) -> list[str]:
    """A case, or those of a piece that have no result yet."""
    return [name for name in PIECES[word] if result_of(name) is None] if word in PIECES else [word]


def measure(name: str) -> bool:
    """Measure a case and keep what it found; what goes wrong with it is told, and says nothing of the next one."""
    print(f"{name} ...", flush=True)
    begin = time.perf_counter()
    try:
        found = CASES[name].measure()
    except Exception:
        traceback.print_exc()
        return False
    finally:
        free_memory()
    told = {"device_name": torch.cuda.get_device_name(card.DEVICE), "environment": environment(card.DEVICE)}
    RESULTS.mkdir(exist_ok=True)
    replace_file(RESULTS / f"{name}.json", json.dumps({**told, **found}, indent=1) + "\n")
    print(f"{name}: {time.perf_counter() - begin:.0f} s", flush=True)
    return True


def result_of(name: str) -> Result | None:
    """What is kept of a case."""
    return kept_results(RESULTS / f"{name}.json", None)


if __name__ == "__main__":
    main(sys.argv[1:])
