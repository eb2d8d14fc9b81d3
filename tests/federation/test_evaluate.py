"""``fedzo evaluate``: a finished run's model is scored again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedzo.commands.evaluate import evaluate_run
from fedzo.evaluate import evaluate

Run = Callable[..., Path]
Lines = Callable[..., list[dict[str, Any]]]


def test_scoring_a_run_again_gives_its_own_score(finished: Run, lines: Lines) -> None:
    folder = finished("server_optimizer.lr=0.05", "fl.rounds=4")

    again = evaluate_run(folder, split="test")

    after = lines(folder, "metrics.jsonl")[-1]["after"]
    assert {"metric", "value", "loss", "num_examples", "per_class", "auc"} <= again["answers"].keys()
    assert again == {"answers": {name: after[name] for name in again["answers"]}}


def test_every_round_that_a_run_scored_can_be_scored_again(finished: Run, lines: Lines) -> None:
    folder = finished("server_optimizer.lr=0.05", "fl.rounds=4")

    dev = {line["round"]: line["loss"] for line in lines(folder, "metrics.jsonl") if line.get("split") == "dev"}
    assert sorted(dev) == [0, 2, 4]
    assert len({*dev.values()}) == 3
    assert {n: evaluate_run(folder, split="dev", rounds=n)["answers"]["loss"] for n in dev} == dev


def test_a_run_is_scored_again_in_forwards_like_its_own(
    run: Run, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of as many tokens as fit into memory, and from the lower blocks' states where these are kept."""
    asked = []

    def recorded(name: str, evaluator: Any, loaded: Any, *rest: Any, tokens_per_batch: int) -> Any:
        asked.append((tokens_per_batch, loaded.kept is not None))
        return evaluate(name, evaluator, loaded, *rest, tokens_per_batch=tokens_per_batch)

    monkeypatch.setattr("fedzo.commands.evaluate.evaluate", recorded)
    monkeypatch.setattr("fedzo.run.peer.fitting_tokens_per_batch", lambda *_, wanted, **__: wanted // 16)
    folder = run("trainer=norms", "trainer.first_layer=2", "model.lower_layers_cache_mb=1")

    again = evaluate_run(folder, split="test")

    setup, *_, summary = lines(folder, "metrics.jsonl")
    assert asked == [(256, True)]
    assert setup["forwards"]["tokens_per_batch"] == 256
    assert again == {"answers": {name: summary["after"][name] for name in again["answers"]}}
