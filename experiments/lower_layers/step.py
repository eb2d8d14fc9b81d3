"""What a step costs beside whole forwards where its lower blocks train nothing; writes step.json and claims.json.

    python experiments/lower_layers/step.py --repeats 12      # about five minutes on 2 cores, which must be idle
    python experiments/lower_layers/step.py                   # the claims anew, from step.json

All steps take turns with as many bare forwards of the whole model, SmolLM2-135M (30 blocks), 16 rows of 32 tokens, a
mask drawn at random. "Rows kept" are steps that find all of theirs in ``model.lower_layers_cache_mb``. The arithmetic
beside them counts blocks alone: those from the first layer on run 2P times, those below once, or never for kept rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedzo.bench.claims import Claims, with_range
from fedzo.bench.measure import interleaved
from fedzo.bench.step import BARE, OURS, Bench, open_bench
from fedzo.config.load import load
from fedzo.masks.select import Selector, select_mask
from fedzo.models.blocks import find_blocks, parameters_from
from fedzo.models.forwards import lower_layers_of
from fedzo.records.folder import replace_file
from fedzo.system import environment
from fedzo.zo.spaces.masked import MaskedSpace

HERE = Path(__file__).parent
RESULTS = HERE / "step.json"
FIRST_LAYERS = (0, 5, 11, 15, 20, 25)
TARGETS = {(15, 1, False): 0.80, (15, 4, False): 0.66, (15, 1, True): 0.55, (11, 1, False): 0.86, (11, 1, True): 0.68}
"""By first layer, probes and whether the rows are warm; chosen before anything was measured."""
CASES = [(first, probes, False) for probes in (1, 4) for first in FIRST_LAYERS if probes == 1 or first in (0, 11, 15)]
CASES += [(first, 1, True) for first in FIRST_LAYERS if first]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, help="timed rounds; without it nothing is timed")
    repeats = parser.parse_args().repeats
    if repeats is not None:
        replace_file(RESULTS, json.dumps(measure(repeats), indent=1) + "\n")
    claims = gather(json.loads(RESULTS.read_text()))
    claims.write(HERE / "claims.json")
    claims.show()


def measure(repeats: int) -> dict[str, Any]:
    """All cases in turn; each with its seconds, and with their ratios to those of the forwards in the same round."""
    whole = open_model()
    work: dict[Any, Any] = {}
    for probes in (1, 4):
        work["bare", probes] = replace(whole, num_probes=probes).contestants()[BARE]
    for case in CASES:
        # kept rows are dropped when another step writes to the weights below, so each such step has a model of its own
        work[case] = bench_of(open_model() if case[2] else whole, *case).contestants()[OURS]
    seconds = interleaved(work, repeats=repeats, on_repeat=lambda done, total: print(f"{done} of {total}", flush=True))
    rows = []
    for first, probes, warm in CASES:
        spent = seconds[first, probes, warm]
        ratios = [own / other for own, other in zip(spent, seconds["bare", probes], strict=True)]
        low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
        told = {"first": first, "probes": probes, "warm": warm, "ratio": ratio, "quartiles": [low, high]}
        rows.append({**told, "seconds": spent})
    num_blocks = len(find_blocks(whole.loaded.model)[1])
    return {"repeats": repeats, "num_blocks": num_blocks, "rows": rows, "environment": environment()}


def gather(told: Mapping[str, Any]) -> Claims:
    """The claims of step.json."""
    command = f"python experiments/lower_layers/step.py --repeats {told['repeats']}"
    claims = Claims(command=command, environment=told["environment"])
    for row in told["rows"]:
        first, probes, warm = row["first"], row["probes"], row["warm"]
        counted = 1 - first / told["num_blocks"] * (1 if warm else 1 - 1 / (2 * probes))
        name = f"from block {first}, P = {probes}{', rows kept' if warm else ''}"
        unit, target = with_range("ratio", row["quartiles"]), TARGETS.get((first, probes, warm))
        claims.add(f"{name}: step / its whole forwards", row["ratio"], unit, at_most=target)
        claims.add(f"{name}: the same, blocks counted", counted, "ratio")
    return claims


def open_model() -> Bench:
    return open_bench(load(["trainer=meerkat"]), shape=None, rows=16, tokens=32)


def bench_of(whole: Bench, first_layer: int, probes: int, warm: bool) -> Bench:
    """The step on a mask of the same model, drawn from its blocks from ``first_layer`` on."""
    model = whole.loaded.model
    mask = select_mask(model, density=1e-3, selector=Selector.random, among=parameters_from(model, first_layer))
    space = MaskedSpace(model, mask.indices)
    lower = lower_layers_of(whole.loaded, space, cache_mb=256 if warm else 0)
    return replace(whole, space=space, num_probes=probes, lower=lower)


if __name__ == "__main__":
    main()
