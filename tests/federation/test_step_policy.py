"""Step policies on a real, tiny federation: functions of the log that nothing else notices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedzo.commands.mask import make_mask
from fedzo.commands.replay import replay_client, replay_run
from fedzo.commands.resume import resume_run
from fedzo.config.load import load
from fedzo.errors import ConfigError
from fedzo.fl.server.rounds import Server
from fedzo.masks.mask_file import load_mask, save_mask

Run = Callable[..., Path]
Lines = Callable[[Path, str], list[dict[str, Any]]]
COMMON = ["fl.rounds=4", "fl.local_steps=4", "server_optimizer.lr=0.02", "partition=extreme", "partition.num_extreme=2"]
SHORT = [
    "step_policy.calibration_steps=8",
    "step_policy.initial_steps=3",
    "step_policy.later_steps=3",
    "step_policy.max_share=1",
]
VPCS = ["step_policy=vpcs", *SHORT, "step_policy.tests=[ratio,level]", "step_policy.ratio_threshold=1.3"]
KINDS = {
    "vpcs": [*VPCS, "step_policy.level_threshold=1.3"],
    "vpcs graded by GradIP": [*VPCS, "step_policy.statistic=gradip", "step_policy.graded=true"],
    "vpcs, own directions, Adam": [
        *VPCS,
        "fl.directions=per_client",
        "server_optimizer=adam",
        "step_policy.level_threshold=1.01",
    ],
    "cusum": ["step_policy=cusum", "step_policy.drift=0.1", "step_policy.threshold=0.8", "step_policy.max_share=1"],
    "oracle": ["step_policy=oracle"],
    "oracle, shares made even": ["step_policy=oracle", "step_policy.normalise=true"],
}


class Killed(BaseException):
    """The process is gone."""


def steps_of(audit: list[dict[str, Any]]) -> list[dict[int, int]]:
    return [{entry["client"]: entry["steps"] for entry in line["clients"]} for line in audit]


def decisions(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in metrics if line["kind"] == "step_policy"]


@pytest.mark.slow
@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_a_killed_and_resumed_run_decides_and_ends_as_an_unbroken_one(
    run: Run, finished: Run, lines: Lines, monkeypatch: pytest.MonkeyPatch, settings: list[str], tmp_path: Path
) -> None:
    unbroken, broken = finished(*COMMON, *settings), tmp_path / "run0"
    commits = Server._commit

    def dying(self: Server, record: Any, *rest: Any, **kwargs: Any) -> None:
        if record.round == at and at % 2 == 0:
            raise Killed  # between the replies and the log
        commits(self, record, *rest, **kwargs)
        if record.round == at:
            raise Killed  # between the log and the metrics

    monkeypatch.setattr(Server, "_commit", dying)
    at = 0
    with pytest.raises(Killed):
        run(*COMMON, *settings)
    for at in range(1, 4):  # noqa: B007 - read by dying
        with pytest.raises(Killed):
            resume_run(broken)
    at = -1
    resume_run(broken)

    for log in ("public.jsonl", "audit.jsonl"):
        assert (broken / log).read_bytes() == (unbroken / log).read_bytes()
    told = decisions(lines(unbroken, "metrics.jsonl"))
    assert decisions(lines(broken, "metrics.jsonl")) == told
    assert any(row["flagged"] for record in told for row in record["clients"]), "a test of nothing"
    assert min(steps_of(lines(unbroken, "audit.jsonl"))[-1].values()) < 4
    assert replay_run(unbroken)["rounds"] == 4


def test_after_the_calibration_a_run_is_at_its_base_weights(run: Run, lines: Lines) -> None:
    folder = run(*COMMON, *KINDS["vpcs"], "fl.rounds=1", "evaluation.every_rounds=1")

    (record,), (audit,) = lines(folder, "public.jsonl"), lines(folder, "audit.jsonl")
    assert record["lr"] == 0.0
    assert np.array(record["c"]).shape == (8, 1, 1)
    assert not np.any(record["c"])
    assert steps_of([audit]) == [dict.fromkeys(range(4), 8)]
    assert audit["lr"] == pytest.approx(0.02)
    assert np.array(audit["xi"]).shape == (8, 1, 1)
    assert np.abs([entry["g"] for entry in audit["clients"]]).min() > 0
    before, after = (line for line in lines(folder, "metrics.jsonl") if line.get("split") == "dev")
    assert (before["round"], after["round"]) == (0, 1)
    assert before["loss"] == after["loss"]
    assert [line["calibration"] for line in lines(folder, "metrics.jsonl") if line["kind"] == "round"] == [True]
    # what it found is told, although no round comes that would follow it
    (told,) = decisions(lines(folder, "metrics.jsonl"))
    assert told["round"] == 1
    assert any(row["flagged"] for row in told["clients"])
    resume_run(folder)
    assert decisions(lines(folder, "metrics.jsonl")) == [told]
    whole = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)  # killed before it was told
    kept = [line for line in whole if '"kind":"step_policy"' not in line and '"kind":"summary"' not in line]
    assert len(kept) == len(whole) - 2
    (folder / "metrics.jsonl").write_text("".join(kept))
    resume_run(folder)
    assert decisions(lines(folder, "metrics.jsonl")) == [told]


def test_calibration_scalars_are_those_of_a_run_whose_first_round_has_as_many_steps(run: Run, lines: Lines) -> None:
    """The calibration is nothing but local training: a run without step_policy, T = 8, measures the same."""
    calibrated = run(*COMMON, *KINDS["vpcs"], "fl.rounds=1")
    plain = run(*COMMON, "fl.rounds=1", "fl.local_steps=8")

    for ours, theirs in zip(*(lines(each, "audit.jsonl")[0]["clients"] for each in (calibrated, plain)), strict=True):
        assert ours == theirs


def test_a_clients_path_of_the_calibration_and_of_a_later_round_is_rebuilt_and_proved(
    finished: Run, lines: Lines
) -> None:
    folder = finished(*COMMON, *KINDS["vpcs"])

    first = replay_client(folder, client=3, round=0)

    assert (len(first.g), first.checked, first.lr) == (8, True, pytest.approx(0.02))
    for client, steps in steps_of(lines(folder, "audit.jsonl"))[2].items():
        path = replay_client(folder, client=client, round=2)
        assert (len(path.g), path.checked) == (steps, steps > 1)


def test_what_a_selection_costs_shows_by_class_and_by_client(run: Run, lines: Lines) -> None:
    folder = run(*COMMON, *KINDS["oracle"], "partition.holdout=0.25")

    (told,) = decisions(lines(folder, "metrics.jsonl"))
    assert [row["flagged"] for row in told["clients"]] == [False, False, True, True]
    assert [row["statistics"]["label_share"] for row in told["clients"]][2:] == [1.0, 1.0]
    (scored,) = [line for line in lines(folder, "metrics.jsonl") if line["kind"] == "federated_score"]
    assert set(scored["per_class"]) == {"0", "1"}
    assert scored["worst_client"] == min(client["value"] for client in scored["clients"])
    assert len(scored["clients"]) == 4
    summary = lines(folder, "metrics.jsonl")[-1]
    worst = next(row for row in scored["clients"] if row["value"] == scored["worst_client"])
    assert summary["worst_client"] == {
        "client": worst["client"],
        "metric": "accuracy",
        "value": worst["value"],
        "round": 4,
        "num_examples": worst["num_examples"],
    }
    assert summary["step_policy"] == {
        "flagged": [{"client": 2, "steps": 1}, {"client": 3, "steps": 1}],
        "fallback": False,
    }


def test_gradip_with_a_mask_that_holds_no_gradient_ends_before_any_round(
    run: Run, tmp_path: Path, overrides: Callable[..., list[str]]
) -> None:
    mask = tmp_path / "mask.safetensors"
    make_mask(load(overrides("trainer.selector=random")), mask)

    with pytest.raises(ConfigError, match=r"step_policy\.statistic must be abs_g for a trainer that has no gradient"):
        run(*COMMON, *KINDS["vpcs graded by GradIP"], f"inputs.artifact={mask}", "trainer.selector=random")

    told = load_mask(mask)  # one whose recipe says nothing is looked at when the run is opened
    save_mask(replace(told, manifest={}), mask)
    with pytest.raises(ConfigError, match=r"step_policy\.statistic=gradip must find a gradient at the server"):
        run(*COMMON, *KINDS["vpcs graded by GradIP"], f"inputs.artifact={mask}")
