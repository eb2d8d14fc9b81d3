"""What a step costs beside its bare forwards: `fedzo bench step` over models and spaces; writes claims.json.

    python experiments/bench/run.py             # the cases of a CPU (about 25 minutes on 2 cores)
    python experiments/bench/run.py --gpu       # those of a GPU
    python experiments/bench/run.py NAME ...    # some of them again

A case whose result is there is not measured again unless it is named.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent


class Case(NamedTuple):
    """One call of ``fedzo bench step`` and what it has to reach."""

    arguments: str
    time_target: float | None
    memory_target: float | None


LONG = "--rows 64 --tokens 64"
CPU = {
    "smollm2-masked": Case("trainer=meerkat --repeats 9", 1.05, 1.05),
    "smollm2-full": Case("trainer=mezo --repeats 9", 1.25, None),
    "smollm2-lora": Case("trainer=lora --repeats 9", 1.05, 1.05),
    "opt-125m-masked": Case("trainer=meerkat --shape opt-125m --repeats 9", 1.05, 1.05),
    "opt-125m-full": Case("trainer=mezo --shape opt-125m --repeats 9", 1.25, None),
    "llama-3.2-1b-masked": Case("trainer=meerkat --shape llama-3.2-1b --rows 4 --repeats 3", 1.05, 1.05),
    "llama-3.2-1b-full": Case("trainer=mezo --shape llama-3.2-1b --rows 4 --repeats 3", None, None),
}
GPU = {
    f"gpu-{shape}-{trainer}": Case(f"trainer={trainer} --shape {shape} model.dtype={dtype} {LONG}", target, None)
    for shape, dtype in (("opt-1.3b", "float32"), ("opt-13b", "bfloat16"), ("llama-2-7b", "bfloat16"))
    for trainer, target in (("meerkat", 1.08), ("mezo", 1.15), ("lora", 1.08))
}


def main(arguments: list[str]) -> None:
    cases = GPU if "--gpu" in arguments else CPU
    names = [name for name in arguments if not name.startswith("--")]
    for name in names or cases:
        path = HERE / "results" / f"{name}.json"
        if names or not path.exists():
            path.parent.mkdir(exist_ok=True)
            command = [sys.executable, "-m", "fedzo", "bench", "step", *cases[name].arguments.split()]
            subprocess.run([*command, "--out", os.path.relpath(path)], check=True)
    rows = [row for name, case in {**CPU, **GPU}.items() for row in claims(name, case)]
    (HERE / "claims.json").write_text(json.dumps(rows, indent=1) + "\n")


def claims(name: str, case: Case) -> list[dict[str, Any]]:
    path = HERE / "results" / f"{name}.json"
    if not path.exists():
        return []
    result = json.loads(path.read_text())
    bare, *others = result["figures"]
    rows = []
    for figure in others:
        ours = figure["name"] == "fedzo step"
        memory = figure["peak_bytes"] / bare["peak_bytes"] if figure["peak_bytes"] and bare["peak_bytes"] else None
        for what, value, target in (
            ("time", figure["ratio"], case.time_target),
            ("peak memory", memory, case.memory_target),
        ):
            if value is not None:
                rows.append(
                    {
                        "claim": f"{name}: {figure['name']} / bare forwards, {what}",
                        "value": round(value, 3),
                        "unit": "ratio",
                        "target": target if ours else None,
                        "holds": not ours or target is None or value <= target,
                        "command": f"python experiments/bench/run.py {name}",
                        "seeds": [0],
                        "environment": result["environment"],
                    }
                )
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
