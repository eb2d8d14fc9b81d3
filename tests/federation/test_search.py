"""Hydra's Optuna sweeper over real runs: it optimises the jobs' own dev scores, and goes on when it is repeated."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig

from fedzo.cli import main

SEARCHED = "server_optimizer.lr=tag(log,interval(1e-3,1e-1))"
Search = Callable[..., int]


@pytest.fixture
def search(tmp_path: Path, overrides: Callable[..., list[str]]) -> Search:
    def start(*extra: str) -> int:
        words = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", f"hydra.sweep.dir={tmp_path}", *extra]
        return main(["train", "-m", *overrides("trainer=mezo", "fl.rounds=2", "evaluation.every_rounds=1", *words)])

    return start


@pytest.fixture
def lossless(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The jobs of these numbers leave what an evaluator that gives no loss would have told."""
    from fedzo.commands import resume

    start = resume.start_or_resume_run

    def scored(config: Any, run_dir: Path, *, overrides: list[str]) -> None:
        start(config, run_dir, overrides=overrides)
        if HydraConfig.get().job.num not in request.param:
            return
        metrics = run_dir / "metrics.jsonl"
        told: list[dict[str, Any]] = [json.loads(line) for line in metrics.read_text().splitlines()]
        lines = [{**line, "loss": None} if line["kind"] == "score" else line for line in told]
        metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))

    monkeypatch.setattr(resume, "start_or_resume_run", scored)


def dev_scores(folder: Path, key: str) -> dict[str, list[float]]:
    """By job, from its own lines."""
    found: dict[str, list[float]] = {}
    for file in folder.glob("*/metrics.jsonl"):
        lines: list[dict[str, Any]] = [json.loads(line) for line in file.read_text().splitlines()]
        found[file.parent.name] = [line[key] for line in lines if line.get("split") == "dev"]
    return found


def test_a_search_optimises_the_dev_score_that_chooses_the_best_round(
    search: Search, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert search(SEARCHED, "evaluation.best_by=value") == 0

    scores = {name: max(each) for name, each in dev_scores(tmp_path, "value").items()}
    result = yaml.safe_load((tmp_path / "optimization_results.yaml").read_text())
    assert len(scores) == 3
    assert result["best_value"] == max(scores.values())
    lr = result["best_params"]["server_optimizer.lr"]
    assert 1e-3 <= lr <= 1e-1
    assert scores[f"server_optimizer.lr-{lr}"] == result["best_value"]
    with (tmp_path / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {float(row["server_optimizer.lr"]) for row in rows} >= {lr}
    assert [row["state"] for row in rows] == ["finished"] * 3
    printed = capsys.readouterr().out
    assert "alembic" not in printed
    assert printed.endswith(f"sweep folder: {tmp_path}\nreport:       {tmp_path / 'report.html'}\n")
    assert main(["report", str(tmp_path)]) == 0


def test_a_search_survives_a_job_that_fails_and_goes_on_when_it_is_repeated(
    search: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fedzo.commands import resume
    from fedzo.errors import NumericsError

    start, failing = resume.start_or_resume_run, {"job": 1}

    def sometimes(config: Any, run_dir: Path, *, overrides: list[str]) -> None:
        start(config, run_dir, overrides=overrides)
        if HydraConfig.get().job.num == failing["job"]:
            (run_dir / "metrics.jsonl").write_text("")  # it ended before anything was told
            raise NumericsError("round 1: the loss must be finite, got nan.")

    monkeypatch.setattr(resume, "start_or_resume_run", sometimes)
    assert search(SEARCHED) == 1

    told = capsys.readouterr()
    assert "1 jobs failed, the others ran: server_optimizer.lr-" in told.err
    scores = {name: each for name, each in dev_scores(tmp_path, "loss").items() if each}
    first = yaml.safe_load((tmp_path / "optimization_results.yaml").read_text())
    assert len(scores) == 2
    assert first["best_value"] == min(min(each) for each in scores.values())

    times = {name: (tmp_path / name / "public.jsonl").stat().st_mtime_ns for name in scores}
    assert search(SEARCHED) == 1
    again = dev_scores(tmp_path, "loss")
    assert again.keys() >= scores.keys()
    assert len(again) == 3  # the same jobs
    assert {name: (tmp_path / name / "public.jsonl").stat().st_mtime_ns for name in scores} == times


def test_a_job_of_a_search_that_is_refused_when_it_starts_is_one_that_failed(
    search: Search, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only the corners are looked at before, and they are sound: scaffold with equal weights, and sgd with sizes."""
    choices = ["trainer=meerkat", "server_optimizer=scaffold,sgd", "strategy.weighting=uniform,size"]
    assert search(*choices, "hydra.sweeper.sampler.seed=5") == 1  # the third job is scaffold with sizes

    refused = "server_optimizer-scaffold_strategy.weighting-size"
    assert capsys.readouterr().err.endswith(f"1 jobs failed, the others ran: {refused}\n")
    with (tmp_path / "sweep.csv").open(newline="") as file:
        rows = {row["job"]: row for row in csv.DictReader(file)}
    assert {name: row["state"] for name, row in rows.items() if row["state"] != "finished"} == {refused: "failed"}
    assert len(rows) == 3
    assert [*rows[refused]][:4] == ["job", "server_optimizer", "strategy.weighting", "state"]
    assert (
        f"{refused}: strategy.weighting must be uniform for server_optimizer=scaffold"
        in (tmp_path / "report.html").read_text()
    )


@pytest.mark.usefixtures("lossless")
@pytest.mark.parametrize("lossless", [range(3)], indirect=True)
@pytest.mark.parametrize(("by", "code"), [("loss", 1), ("value", 0)])
def test_a_search_by_a_loss_that_no_dev_score_has_ends_with_its_first_job_and_says_by_what_to_search(
    search: Search, tmp_path: Path, capsys: pytest.CaptureFixture[str], by: str, code: int
) -> None:
    assert search(SEARCHED, f"evaluation.best_by={by}") == code

    told = capsys.readouterr().err
    rule = "evaluators.answers: for evaluation.best_by=loss its dev scores must have a finite loss, got none. "
    ended = f"fedzo: sweep {tmp_path}: the search ended with its first job: {rule}Write evaluation.best_by=value."
    assert (ended in told) == (by == "loss")
    assert len(dev_scores(tmp_path, "value")) == (1 if by == "loss" else 3)
    assert (tmp_path / "report.html").exists()


@pytest.mark.usefixtures("lossless")
@pytest.mark.parametrize("lossless", [[1]], indirect=True)
def test_a_later_job_without_a_loss_to_search_by_is_one_that_failed(
    search: Search, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as of a model that overflows in float16, where others do not."""
    assert search(SEARCHED) == 0

    told = capsys.readouterr().err
    assert told.count("for evaluation.best_by=loss its dev scores must have a finite loss, got none.") >= 1
    assert "the search ended" not in told
    losses = list(dev_scores(tmp_path, "loss").values())
    known = [min(each) for each in losses if None not in each]
    result = yaml.safe_load((tmp_path / "optimization_results.yaml").read_text())
    assert (len(losses), len(known), result["best_value"]) == (3, 2, min(known))


@pytest.mark.usefixtures("lossless")
@pytest.mark.parametrize("lossless", [range(2)], indirect=True)
def test_a_sweep_that_searches_nothing_needs_no_dev_loss(overrides: Callable[..., list[str]], tmp_path: Path) -> None:
    words = ["trainer=mezo", "fl.rounds=1", f"hydra.sweep.dir={tmp_path}", "hydra.sweep.subdir=job${hydra:job.num}"]

    assert main(["train", "-m", *overrides(*words, "seed=0,1")]) == 0

    with (tmp_path / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["state"], row["dev_loss"]) for row in rows] == [("finished", "")] * 2
    assert all(row["dev"] for row in rows)


def test_a_search_is_checked_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def search(*words: str) -> int:
        """Over the defaults: what is wrong in a few words is soon found, and no model is read."""
        return main(["train", "-m", "trainer=mezo", "hydra/sweeper=optuna", f"hydra.sweep.dir={tmp_path}", *words])

    for words, text in (
        (["server_optimizer.lr=interval(-1.0,0.1)"], "server_optimizer.lr must be >= 0 and finite"),
        (["trainer=mezo,nope,meerkat"], "trainer must be one of"),  # neither the first choice nor the last
        # of a range, Optuna draws the stop as well
        (["fl.num_clients=4", "strategy.clients_per_round=range(1,5)"], "strategy.clients_per_round"),
        ([SEARCHED, "hydra.sweeper.direction=maximize"], "hydra.sweeper.direction must be minimize for this dev score"),
        ([SEARCHED, "split.num_dev=0", "evaluation.every_rounds=0"], "a job must have dev scores, but has none"),
        ([SEARCHED, "hydra.sweeper.storage='sqlite:///study.db'"], "hydra.sweeper.storage must be null"),
    ):
        assert search(*words) == 2
        assert text in capsys.readouterr().err
    monkeypatch.delitem(ConfigStore.instance().repo["hydra"]["sweeper"], "optuna.yaml")  # as if it were not installed
    assert search(SEARCHED) == 2
    assert "pip install 'fedzo[optuna]'" in capsys.readouterr().err
    assert list(tmp_path.glob("*/public.jsonl")) == []
