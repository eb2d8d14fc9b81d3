"""Clients with files of their own, and a server without any row; stages between a client's rows and its tokens."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedzo.commands import evaluate
from fedzo.commands.evaluate import evaluate_run
from fedzo.commands.replay import replay_run
from fedzo.commands.resume import resume_run
from fedzo.config.load import load
from fedzo.data import sources
from fedzo.errors import ConfigError
from fedzo.fl.messages import Hello, TrainRequest
from fedzo.run.start import open_run
from fedzo.trainers.meerkat import Meerkat
from fedzo.zo.log import EMPTY_CHAIN

Run = Callable[..., Path]
Lines = Callable[[Path, str], list[dict[str, Any]]]
Overrides = Callable[..., list[str]]
SETTINGS = ("partition=own", "trainer.calibration=imdb", "evaluation.central=false")


@pytest.fixture
def sites(tmp_path: Path) -> str:
    """A file for each of four clients, of 5, 6, 7 and 8 rows."""
    for client in range(4):
        rows = [{"text": f"site {client} says {['bad', 'good'][i % 2]} {i}", "label": i % 2} for i in range(5 + client)]
        (tmp_path / f"site{client}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"data.path='{tmp_path}/site{{client}}.jsonl'"


def test_clients_with_own_files_train_and_the_server_reads_no_row(
    run: Run, lines: Lines, sites: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> Any:
        raise AssertionError("the server read the rows of a simulation")

    monkeypatch.setattr(sources, "load_splits", refuse)
    monkeypatch.setattr("fedzo.data.rows.load_splits", refuse)

    folder = run(*SETTINGS, sites)

    setup, *_ = lines(folder, "metrics.jsonl")
    assert [client["num_train"] for client in setup["clients"]] == [4, 5, 6, 7]  # one of each is held out
    assert [client["label_counts"] for client in setup["clients"]] == [{}] * 4  # nobody asked for them
    assert setup["estimate"] is None
    assert len(lines(folder, "public.jsonl")) == 3
    assert replay_run(folder)["digest"] == lines(folder, "public.jsonl")[-1]["digest"]


def test_a_dtype_that_is_chosen_is_chosen_by_a_clients_rows_where_all_share_a_model(
    run: Run, sites: str, caplog: pytest.LogCaptureFixture
) -> None:
    run(*SETTINGS, sites, "model.dtype=auto", "fl.rounds=1")

    assert sum("model.dtype=auto" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_a_site_reads_its_rows_for_their_digest_and_their_tokens_and_not_again(
    overrides: Overrides, sites: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    process = open_run(load(overrides(*SETTINGS, sites, f"model.dtype={dtype}")), tmp_path / "run")
    worker, known, read = process.client.worker, sources.load_own, []
    monkeypatch.setattr("fedzo.data.rows.load_own", lambda path, task: read.append(path.name) or known(path, task))
    assert process.launched is not None
    request = TrainRequest(
        client=3,
        config_hash=worker.config_hash,
        space_id=process.launched.prepared.artifact.digest,
        chain=EMPTY_CHAIN.hex(),
        steps=1,
    )

    worker.hello(Hello(client=3))
    worker.train(request)

    assert read == ["site3.jsonl"] * 2


@pytest.mark.parametrize(
    ("settings", "split", "why"),
    [
        (SETTINGS, "test", "but all rows of partition=own are its clients'"),
        (["split.num_test=0"], "test", "but it began with split.num_test=0"),
        (["split.num_dev=0"], "dev", "but it began with split.num_dev=0"),
    ],
)
def test_rows_that_a_run_does_not_have_are_missed_before_its_model_is_rebuilt(
    settings: list[str],
    split: str,
    why: str,
    overrides: Overrides,
    sites: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*arguments: Any) -> Any:
        raise AssertionError("the model is rebuilt")

    config = load(overrides(*settings, *([sites] if settings is SETTINGS else [])))
    monkeypatch.setattr(evaluate, "read_run", lambda folder: config)
    monkeypatch.setattr(evaluate, "rebuild", refuse)

    with pytest.raises(
        ConfigError, match=rf"it must have {split} rows to score, {why}\. `fedzo export` writes its model"
    ):
        evaluate_run(tmp_path, split=split)


def test_label_counts_travel_where_the_run_asks_for_them(run: Run, lines: Lines, sites: str) -> None:
    folder = run(*SETTINGS, sites, "fl.label_counts=true", "step_policy=oracle", "fl.local_steps=2")

    setup, *_ = lines(folder, "metrics.jsonl")
    assert [sum(client["label_counts"].values()) for client in setup["clients"]] == [4, 5, 6, 7]


def test_a_trainer_that_asks_the_server_for_rows_is_told_that_it_has_none(
    run: Run, sites: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By no key of another trainer: the one that asks may be a plugin."""
    monkeypatch.setattr(Meerkat, "prepare", lambda self, loaded, context: context.texts())

    with pytest.raises(ConfigError, match=r"^trainer: the server must have training rows .* partition=own") as told:
        run(*SETTINGS, sites)

    assert "trainer.calibration" not in str(told.value)


def test_what_needs_rows_at_the_server_is_refused_by_name(overrides: Overrides, sites: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        load(overrides("partition=own", sites, "step_policy=oracle"))

    for key in ("trainer.calibration", "fl.label_counts", "evaluation.central"):
        assert f"{key} must be" in str(refusal.value)
    with pytest.raises(ConfigError, match=r"data\.path must be given for partition=own"):
        load(overrides(*SETTINGS, "data.path=null"))


def test_a_file_that_a_client_lacks_is_named(overrides: Overrides, sites: str, tmp_path: Path) -> None:
    (tmp_path / "site2.jsonl").unlink()

    with pytest.raises(ConfigError, match=r"data\.path must name something that exists, got '.*site2\.jsonl'"):
        load(overrides(*SETTINGS, sites))


def test_a_stage_that_changes_nothing_leaves_the_run_as_it_is(run: Run, finished: Run) -> None:
    plain, staged = finished(), run("preprocess=[identity]")

    assert (plain / "public.jsonl").read_bytes() == (staged / "public.jsonl").read_bytes()


def test_stages_see_training_rows_only_and_in_the_order_of_the_command_line(
    overrides: Overrides, tmp_path: Path
) -> None:
    from fedzo.data.preprocess import preprocess
    from fedzo.data.rows import client_rows

    class Mark:
        column: str | None = "text"

        def __init__(self, mark: str) -> None:
            self.mark = mark

        def apply(self, rows: list[dict[str, Any]], *, client: int, on_progress: Any) -> list[dict[str, Any]]:
            return [{**row, "text": row["text"] + self.mark} for row in rows]

        def summary(self, client: int) -> dict[str, float]:
            return {}

    process = open_run(load(overrides()), tmp_path)
    stages = {"first": Mark("1"), "second": Mark("2")}
    before = process.client.staging.rows(0)
    after = client_rows(process.source, 0, share=0.1, seed=0, stages=stages)

    assert [row["text"] for row in after.train] == [f"{row['text']}12" for row in before.train]
    assert after.heldout == before.heldout
    assert [row["label"] for row in after.train] == [row["label"] for row in before.train]

    class Drop(Mark):
        def apply(self, rows: list[dict[str, Any]], *, client: int, on_progress: Any) -> list[dict[str, Any]]:
            return rows[1:]

    class Relabel(Mark):
        def apply(self, rows: list[dict[str, Any]], *, client: int, on_progress: Any) -> list[dict[str, Any]]:
            return [{**row, "label": 1 - row["label"]} for row in rows]

    for stage, text in (
        (Drop(""), r"preprocess\.bad: a stage must give as many rows"),
        (Relabel(""), "label in row 0"),
    ):
        with pytest.raises(ConfigError, match=text):
            preprocess(before.train, {"bad": stage}, client=0)


@pytest.mark.parametrize(
    "runtime",
    ["runtime=inline", pytest.param("runtime=local", marks=[pytest.mark.net, pytest.mark.timeout(300)])],
)
def test_rows_that_cannot_be_encoded_end_the_start_at_once_and_only_the_site_says_which(
    run: Run, sites: str, tmp_path: Path, runtime: str, caplog: pytest.LogCaptureFixture
) -> None:
    """No retry mends them. A lone surrogate passes JSON, and no tokenizer takes it."""
    file = tmp_path / "site1.jsonl"
    file.write_text(file.read_text() + json.dumps({"text": "bad \ud800 secret", "label": 0}) + "\n")
    began = time.monotonic()

    with pytest.raises(ConfigError) as error:
        run(*SETTINGS, sites, runtime, "fl.num_clients=2", "strategy.startup_s=600")

    assert time.monotonic() - began < 120
    assert str(error.value) == (
        "client 1 cannot take part: refusal 1, its rows cannot be read or encoded. Its own log says why"
    )
    told = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    (own,) = [text for text in told if "secret" in text]
    assert "client 1: row " in own
    assert "the model's tokenizer must take its text" in own


def test_a_run_goes_on_with_the_rows_that_it_began_with_or_not_at_all(
    run: Run, sites: str, tmp_path: Path, lines: Lines, caplog: pytest.LogCaptureFixture
) -> None:
    """Their number is not enough. Where one process plays all clients none can be missing."""
    unbroken = run(*SETTINGS, sites)
    folder = run(*SETTINGS, sites, "fl.rounds=1")
    setup, *_ = lines(folder, "metrics.jsonl")
    assert all(len(client["rows_digest"]) == 64 for client in setup["clients"])
    file = tmp_path / "site1.jsonl"
    before = file.read_text()
    file.write_text(before.replace("bad 2", "bad 7").replace('good 3", "label": 1', 'good 3", "label": 0'))

    with pytest.raises(
        ConfigError, match="client 1 cannot take part: refusal 2, its rows are not those that it began the run"
    ):
        resume_run(folder, rounds=3)

    assert "rows of client 1: they must be the 6 rows that the run began with, got 6; others now (from 0): 2, 3." in (
        caplog.text
    )
    assert len(lines(folder, "public.jsonl")) == 1
    file.write_text(before)
    resume_run(folder, rounds=3)
    chains = [[line["chain"] for line in lines(each, "public.jsonl")] for each in (unbroken, folder)]
    assert chains[0] == chains[1]


def test_a_simulation_goes_on_with_the_dev_rows_that_it_began_with(run: Run, tmp_path: Path, data_dir: Path) -> None:
    """They choose the best round."""
    mine = shutil.copytree(data_dir, tmp_path / "mine")
    folder = run(f"data.path={mine}", "fl.rounds=1")
    dev = mine / "dev.jsonl"
    dev.write_text(dev.read_text().replace("item 103", "item 999"))

    with pytest.raises(ConfigError, match="rows of dev: they must be the 8 rows that the run began with, got 8; oth"):
        resume_run(folder, rounds=2)


def test_scores_of_a_run_are_of_the_rows_that_it_began_with(run: Run, tmp_path: Path, data_dir: Path) -> None:
    mine = shutil.copytree(data_dir, tmp_path / "mine")
    folder = run(f"data.path={mine}", "fl.rounds=1")
    before = evaluate_run(folder, split="test")
    test = mine / "test.jsonl"
    rows = test.read_text()
    test.write_text("".join(f"{line}\n" for line in reversed(rows.splitlines())))

    with pytest.raises(ConfigError, match=r"rows of test: they must be the \d+ rows that the run began with"):
        evaluate_run(folder, split="test")

    test.write_text(rows)
    assert evaluate_run(folder, split="test") == before
