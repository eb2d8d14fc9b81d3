"""What clients that lie do to a model: ``python experiments/network/hostile.py``.

The quickstart's task and model with ten clients, of which two lie: their labels are flipped, or they send another
multiple of the scalars that they measured, kept within the bound that the server announces, as a liar would who knows
it. Each attack meets the plain mean, the mean of clipped scalars, the median and the trimmed mean. A run is short (see
``ROUNDS``, ``SETTINGS``), so that the table takes about 40 minutes of one core; one that is in hostile.json is not
run again. A plain mean is the clipped one bit for bit where no scalar reached the bound: then it is not run.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from fedzo.bench.claims import Claims, check_alike, kept_results, measured_in, metric_lines, ran_with
from fedzo.commands.mask import make_mask
from fedzo.commands.run_folder import rebuild
from fedzo.commands.train import start_run
from fedzo.config.load import load
from fedzo.data.encode import Example
from fedzo.evaluate import evaluate
from fedzo.fl.client.local_update import Batches
from fedzo.fl.client.scalar_update import ScalarUpdate
from fedzo.records.folder import replace_file

HERE = Path(__file__).parent
RESULTS = HERE / "hostile.json"
COMMAND = "python experiments/network/hostile.py"
ROUNDS, TEST_ROWS = 20, 128
HOSTILE = (0, 1)
SETTINGS = [
    *("experiment=meerkat", "fl.num_clients=10", "fl.batch_size=1", f"fl.rounds={ROUNDS}", "threads=1"),
    "server_optimizer.schedule=constant",
    *(f"split.num_test={TEST_ROWS}", "split.num_dev=8", "evaluation.central=false"),
    *("evaluation.federated_every_rounds=-1", "report=none"),
]
ATTACKS: dict[str, float | None] = {
    "none": 1.0,
    "scalars x -10": -10.0,
    "labels flipped": None,
    "scalars x 1000": 1000.0,
    "scalars x -1": -1.0,
    "scalars x 10": 10.0,
}
RULES = {
    "clipped mean": [],
    "mean": ["strategy.clip_factor=0"],
    "clipped mean, factor 3": ["strategy.clip_factor=3"],
    "median": ["strategy=median"],
    "trimmed mean": ["strategy=trimmed_mean"],
}


def main() -> None:
    """Run what is missing, then write the claims."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    done: list[dict[str, Any]] = kept_results(RESULTS, [])
    with tempfile.TemporaryDirectory() as folder:
        mask = Path(folder) / "mask.safetensors"
        make_mask(load(SETTINGS), mask)  # once for all runs
        for attack in ATTACKS:
            for rule in RULES:
                if find(done, attack, rule):
                    continue
                clipped = find(done, attack, "clipped mean")
                if rule == "mean" and clipped and not clipped["clipped"] and not clipped["refused"]:
                    found = {**clipped, "rule": rule}
                else:
                    found = run(Path(folder) / f"run{len(done)}", attack, rule, mask, first=not done)
                done.append(found)
                replace_file(RESULTS, json.dumps(done, indent=1) + "\n")
                check_alike(done)
                print(json.dumps({key: value for key, value in found.items() if key != "environment"}), flush=True)
    gather(done).write(HERE / "claims.json")


def find(done: list[dict[str, Any]], attack: str, rule: str) -> dict[str, Any] | None:
    """What a run was found to be, if it has been run."""
    return next((each for each in done if (each["attack"], each["rule"]) == (attack, rule)), None)


def run(folder: Path, attack: str, rule: str, mask: Path, *, first: bool) -> dict[str, Any]:
    """One run and its score on test rows after the last round; of the first one also before it."""
    settings = [*SETTINGS, *RULES[rule], f"inputs.artifact={mask}"]
    with lies(ATTACKS[attack]) as told:
        start_run(load(settings), folder, overrides=settings)
    if {*told} != ({*HOSTILE} if attack != "none" else set()):
        raise SystemExit(f"{attack}: clients {HOSTILE} alone must lie, got {dict(told)}. Mend what `lies` replaces.")
    rounds = metric_lines(folder, "round")
    return {
        "attack": attack,
        "rule": rule,
        "after": score(folder, ROUNDS),
        **({"before": score(folder, 0)} if first else {}),
        "clipped": sum(line["clipped"] for line in rounds),
        "refused": sum(len(line["absent"]) for line in rounds),
        "environment": ran_with(folder, "strategy"),
    }


@contextmanager
def lies(factor: float | None) -> Iterator[Counter[int]]:
    """Make the hostile clients lie: flip their labels (None), or multiply the scalars that they measured (1: no lie).

    Labels are flipped where a local step takes its rows, so a count says that steps were taken on them.

    Yields:
        By client: how many rows of its steps had another label, or how many of its scalars were multiplied.
    """
    of, as_sent = Batches.of, ScalarUpdate.as_sent
    told: Counter[int] = Counter()

    def flipped(batches: Batches, request: Any, *, step: int) -> list[Example]:
        rows = of(batches, request, step=step)
        if factor is not None or request.client not in HOSTILE:
            return rows
        told[request.client] += len(rows)
        return [replace(row, label=1 - row.label) for row in rows]

    def scaled(update: ScalarUpdate, projections: list[Any], request: Any) -> Any:
        if factor not in (None, 1) and request.client in HOSTILE:
            told[request.client] += len(projections)
            projections = [replace(each, g=each.g * factor) for each in projections]
        return as_sent(update, projections, request)

    with mock.patch.object(Batches, "of", flipped), mock.patch.object(ScalarUpdate, "as_sent", scaled):
        yield told


def score(folder: Path, rounds: int) -> dict[str, Any]:
    """Loss and accuracy on the test rows after so many rounds; the loss of a model that has diverged is None."""
    built = rebuild(folder, rounds=rounds)
    process, tokens = built.process, built.workspace.tokens_per_batch
    config = process.peer.config
    (name, evaluator), *_ = process.peer.evaluators.items()
    found = evaluate(
        name, evaluator, process.peer.loaded, process.server.examples("test"), config.task, tokens_per_batch=tokens
    )
    return {"loss": found.loss, "accuracy": found.value}


def gather(done: list[dict[str, Any]]) -> Claims:
    """The claims of the table."""
    claims = Claims(command=COMMAND, environment=measured_in(done))
    honest = done[0]
    what = f"quickstart's task, 10 clients, {ROUNDS} rounds of one row a client, {TEST_ROWS} test rows"
    claims.add(f"{what}: accuracy before", honest["before"]["accuracy"], "share")
    for rule in RULES:
        by_attack = {each["attack"]: each["after"]["accuracy"] for each in done if each["rule"] == rule}
        if len(by_attack) == len(ATTACKS):
            own = by_attack.pop("none")
            claims.add(f"{rule}: accuracy after, nobody lies", own, "share")
            worst, attack = max((own - accuracy, attack) for attack, accuracy in by_attack.items())
            claims.add(f"{rule}: most accuracy lost to two of ten clients ({attack})", worst, "share")
    return claims


if __name__ == "__main__":
    main()
