"""``fedzo evaluate``: a finished run's model is scored again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedzo.commands.evaluate import evaluate_run

Run = Callable[..., Path]


def test_scoring_a_run_again_gives_its_own_score(run: Run, lines: Callable[..., list[dict[str, Any]]]) -> None:
    folder = run("server_optimizer.lr=0.05", "fl.rounds=4")

    again = evaluate_run(folder, split="test")

    after = lines(folder, "metrics.jsonl")[-1]["after"]
    assert {"metric", "value", "loss", "num_examples", "per_class", "auc"} <= again["answers"].keys()
    assert again == {"answers": {name: after[name] for name in again["answers"]}}
