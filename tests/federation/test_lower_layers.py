"""Runs whose lower blocks train nothing: the same log whether these run once a step or in every forward."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedzo.commands.replay import replay_run
from fedzo.commands.resume import resume_run
from fedzo.models.lower_layers import LowerLayers
from fedzo.models.memory import ForwardSeconds

Run = Callable[..., Path]
Lines = Callable[[Path, str], list[dict[str, Any]]]
UPPER = "trainer.first_layer=1"
WHOLE = "model.reuse_lower_layers=false"


@pytest.fixture
def runs_below(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each run of the lower blocks alone had."""
    rows: list[int] = []
    inner = LowerLayers.run

    def counted(self: LowerLayers, ids: Any) -> Any:
        rows.append(len(ids))
        return inner(self, ids)

    monkeypatch.setattr(LowerLayers, "run", counted)
    return rows


def audit_of(folder: Path) -> list[Any]:
    return [json.loads(line)["clients"] for line in (folder / "audit.jsonl").read_text().splitlines()]


def scores_of(folder: Path) -> list[Any]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] in {"score", "federated_score"}]


@pytest.mark.parametrize(
    "settings",
    [
        ["trainer=meerkat", "fl.local_steps=3", "estimator.num_probes=2"],
        ["trainer=meerkat", "fl.local_steps=3", "runtime.batch_clients=true"],
        ["trainer=mezo", "estimator=one_sided", "trainer.lr=1e-4"],
        ["trainer=lora", "fl.local_steps=2", "task.loss=lm"],
        ["trainer=tables", "fl.local_steps=2", "runtime.batch_clients=true"],
        ["trainer=ia3", "server_optimizer=scaffold", "fl.local_steps=2"],
    ],
    ids=lambda settings: " ".join(settings),
)
def test_reuse_changes_no_bit_of_the_log(run: Run, settings: list[str], runs_below: list[int]) -> None:
    whole = run(UPPER, WHOLE, *settings)
    assert not runs_below

    reused = run(UPPER, *settings)

    assert runs_below
    assert audit_of(reused) == audit_of(whole)
    assert replay_run(reused)["digest"] == replay_run(whole)["digest"]
    assert replay_run(reused)["rounds"] == 3


def test_a_run_that_is_resumed_ends_as_an_unbroken_one(run: Run) -> None:
    settings = [UPPER, "fl.local_steps=2"]
    unbroken = run(*settings)
    broken = run(*settings, "fl.rounds=2")

    resume_run(broken, rounds=3)

    assert audit_of(broken) == audit_of(unbroken)


def test_kept_rows_are_run_once_and_give_the_same_scalars_but_for_rounding(run: Run, runs_below: list[int]) -> None:
    """Losses are float32 near 0.7: an error of 2e-7 each is 2e-4 in g at eps = 1e-3; ten times that is let by."""
    settings = [UPPER, "fl.local_steps=8", "fl.rounds=4", "fl.num_clients=2"]
    whole = run(*settings, WHOLE)
    kept = run(*settings, "model.lower_layers_cache_mb=64")

    steps = 8 * 4 * 2
    assert sum(runs_below) < 2 * steps  # of 2 rows each, of 64 in all
    for lines in zip(audit_of(kept), audit_of(whole), strict=True):
        mine, theirs = (np.array([client["g"] for client in line]) for line in lines)
        np.testing.assert_allclose(mine, theirs, atol=2e-3)


@pytest.mark.parametrize("trainer", [[UPPER], ["trainer=norms", "trainer.first_layer=2"]], ids=lambda each: each[0])
@pytest.mark.parametrize("joint", ["true", "false"])
def test_a_resumed_run_that_keeps_rows_ends_as_an_unbroken_one(
    run: Run, trainer: list[str], joint: str, runs_below: list[int]
) -> None:
    settings = [*trainer, "fl.local_steps=2", f"runtime.batch_clients={joint}", "model.lower_layers_cache_mb=1"]
    unbroken = run(*settings)
    in_one = sum(runs_below)
    broken = run(*settings, "fl.rounds=2")
    resume_run(broken, rounds=3)

    assert audit_of(broken) == audit_of(unbroken)
    assert sum(runs_below) == 3 * in_one  # in each process every row runs once


def test_scores_run_the_lower_blocks_once_however_often_they_are_taken(run: Run, runs_below: list[int]) -> None:
    settings = ["trainer=norms", "trainer.first_layer=2", "model.lower_layers_cache_mb=1"]
    run(*settings, "evaluation.central=false", "evaluation.federated_every_rounds=-1")
    unscored = sum(runs_below)
    runs_below.clear()
    run(*settings, "evaluation.every_rounds=0")
    scored = sum(runs_below)
    runs_below.clear()

    run(*settings, "evaluation.every_rounds=1", "evaluation.federated_every_rounds=1")

    assert unscored < scored == sum(runs_below)


@pytest.mark.parametrize("rounds", [1, 40])
def test_the_estimate_counts_the_rows_that_run_to_be_kept_and_no_later_visit(
    run: Run, lines: Lines, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens: list[int] = []
    inner = LowerLayers.run

    def counted(self: LowerLayers, ids: Any) -> Any:
        tokens.append(ids.numel())
        return inner(self, ids)

    monkeypatch.setattr(LowerLayers, "run", counted)
    monkeypatch.setattr("fedzo.run.costs.time_forwards", lambda loaded, num_tokens: ForwardSeconds(0.0, 1.0))
    folder = run(
        *("trainer=norms", "trainer.first_layer=2", "model.lower_layers_cache_mb=1", f"fl.rounds={rounds}"),
        *("evaluation.every_rounds=1", "evaluation.federated_every_rounds=-1", "task.candidates=[a,b]"),
    )

    (setup,) = (line for line in lines(folder, "metrics.jsonl") if line["kind"] == "setup")
    assert setup["estimate"]["seconds"] == pytest.approx(sum(tokens), rel=0.25)  # padding, held-out rows, checks


@pytest.mark.parametrize("trainer", [[UPPER], ["trainer=norms", "trainer.first_layer=2"]], ids=lambda each: each[0])
def test_scores_of_kept_rows_are_those_of_whole_forwards_but_for_rounding(run: Run, trainer: list[str]) -> None:
    """Also where scores and steps keep the same texts: theirs are apart."""
    settings = [*trainer, "evaluation.every_rounds=1", "evaluation.federated_every_rounds=1"]
    whole = run(*settings, WHOLE)
    kept = run(*settings, "model.lower_layers_cache_mb=1")

    for mine, theirs in zip(scores_of(kept), scores_of(whole), strict=True):
        assert mine["value"] == theirs["value"]
        np.testing.assert_allclose(mine["loss"], theirs["loss"], rtol=1e-5)


def test_choices_that_are_held_still_are_those_of_whole_forwards(run: Run, runs_below: list[int]) -> None:
    run(UPPER, "estimator.freeze_routing=true")

    assert not runs_below


def test_what_a_mask_happens_to_leave_alone_is_reused_without_a_setting(
    run: Run, tmp_path: Path, overrides: Callable[..., list[str]], runs_below: list[int]
) -> None:
    from fedzo.commands.mask import make_mask
    from fedzo.config.load import load

    make_mask(load(overrides(UPPER)), tmp_path / "mask.safetensors")
    runs_below.clear()

    run(f"inputs.artifact={tmp_path / 'mask.safetensors'}")

    assert runs_below
