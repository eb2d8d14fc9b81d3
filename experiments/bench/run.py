"""What a step costs beside its bare forwards: `fedzo bench step` over models and spaces; writes claims.json.

    python experiments/bench/run.py             # all cases (about 25 minutes on 2 cores)
    python experiments/bench/run.py NAME ...    # some of them again

A case whose result is there is not measured again unless it is named. All of them are of a CPU; ``experiments/gpu`` has
those of a GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from fedzo.bench.claims import Claims, with_range

HERE = Path(__file__).parent


class Case(NamedTuple):
    """One call of ``fedzo bench step`` and what it has to reach."""

    arguments: str
    time_target: float | None
    memory_target: float | None


# Where all weights are trained, the target of memory is one transformer layer more than a forward.
CASES = {
    "smollm2-masked": Case("trainer=meerkat --repeats 9", 1.05, 1.05),
    "smollm2-full": Case("trainer=mezo --repeats 21", 1.25, 1.02),
    "smollm2-lora": Case("trainer=lora --repeats 9", 1.05, 1.05),
    "opt-125m-masked": Case("trainer=meerkat --shape opt-125m --repeats 9", 1.05, 1.05),
    "opt-125m-full": Case("trainer=mezo --shape opt-125m --repeats 9", 1.25, 1.05),
    "llama-3.2-1b-masked": Case("trainer=meerkat --shape llama-3.2-1b --rows 4 --repeats 5", 1.05, 1.05),
    "llama-3.2-1b-full": Case("trainer=mezo --shape llama-3.2-1b --rows 4 --repeats 3", None, 1.05),
}


def main(names: list[str]) -> None:
    for name in names or CASES:
        path = HERE / "results" / f"{name}.json"
        if names or not path.exists():
            path.parent.mkdir(exist_ok=True)
            command = [sys.executable, "-m", "fedzo", "bench", "step", "device=cpu", *CASES[name].arguments.split()]
            subprocess.run([*command, "--out", os.path.relpath(path)], check=True)
    rows = [row for name, case in CASES.items() for row in gather(name, case)]
    (HERE / "claims.json").write_text(json.dumps(rows, indent=1) + "\n")


def gather(name: str, case: Case) -> list[dict[str, Any]]:
    path = HERE / "results" / f"{name}.json"
    if not path.exists():
        return []
    result = json.loads(path.read_text())
    claims = Claims(command=f"python experiments/bench/run.py {name}", environment=result["environment"])
    bare, *others = result["figures"]
    for figure in others:
        ours = figure["name"] == "fedzo step"
        head = f"{name}: {figure['name']} / bare forwards"
        unit = with_range("ratio", figure["ratio_quartiles"])
        claims.add(f"{head}, time", figure["ratio"], unit, at_most=case.time_target if ours else None)
        if figure["peak_bytes"] and bare["peak_bytes"]:
            share = figure["peak_bytes"] / bare["peak_bytes"]
            claims.add(f"{head}, peak memory", share, "ratio", at_most=case.memory_target if ours else None)
    return claims.rows


if __name__ == "__main__":
    main(sys.argv[1:])
