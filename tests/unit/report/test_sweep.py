"""The table of a sweep holds every job, the failed ones too."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedzo.report.sweep import write_comparison, write_sweep_report

MakeRun = Callable[..., Path]


def test_the_table_has_a_row_a_job_with_what_varies(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("0", trainer="meerkat", fl__local_steps="1")
    make_run("1", trainer="mezo", fl__local_steps="1")
    make_run("2", trainer="lora", fl__local_steps="1", lines=[])

    page = write_sweep_report(tmp_path)

    assert page is not None
    with (tmp_path / "sweep.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0][:6] == ["job", "trainer", "state", "best_round", "dev_loss", "dev"]
    assert rows[0][6:10] == ["test_before", "test_after", "worst_client_last_round", "flagged"]
    assert [row[:3] for row in rows[1:3]] == [["0", "meerkat", "finished"], ["1", "mezo", "finished"]]
    assert [row[3:10] for row in rows[1:3]] == [["10", "0.25", "0.75", "0.555", "0.765", "0.5", ""]] * 2
    assert rows[3] == ["2", "lora", "failed"]
    assert "must hold at least one record" in page.read_text()
    assert (tmp_path / "sweep.md").read_text().count("\n") == 5


def test_a_sweep_without_test_rows_is_judged_by_its_dev_rows(make_run: MakeRun, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (make_run("other/whole") / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line.get("split") != "test"]
    lines[-1] |= {"before": None, "after": None}
    for lr in ("0.1", "0.2"):
        make_run(f"jobs/{lr}", lines=lines, trainer__lr=lr)
        lines[-1] = {**lines[-1], "payload_up_bytes": 12_000}

    page = write_sweep_report(tmp_path / "jobs")

    assert page is not None
    table = (tmp_path / "jobs" / "sweep.md").read_text().splitlines()
    assert "| 0.1 | finished | 10 | 0.250 | 75.0 % |  |  | 50.0 % |" in table[2]
    text = page.read_text()
    assert "Dev score of every job" in text
    assert "Dev score against payload sent" in text


def test_runs_that_were_started_one_by_one_are_compared_by_what_differs(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("here/first", trainer="meerkat"), make_run("there/second", trainer="mezo")]
    lines = [json.loads(line) for line in (runs[1] / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line.get("split") == "dev" and line["round"] == 10:
            line["loss"] = 0.2
    (runs[1] / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    page = write_comparison(runs, tmp_path / "both")

    assert page == tmp_path / "both" / "report.html"
    text = page.read_text()
    assert "Lowest dev loss: 0.200 (mezo)" in text
    assert "Choose by the dev loss" in text
    assert [line.split(" | ")[1] for line in (tmp_path / "both" / "sweep.md").read_text().splitlines()[2:]] == [
        "meerkat",
        "mezo",
    ]
    assert not (runs[0] / "sweep.md").exists()


def test_a_folder_without_jobs_has_no_report(tmp_path: Path) -> None:
    assert write_sweep_report(tmp_path) is None


def test_jobs_are_in_the_order_of_their_numbers(make_run: MakeRun, tmp_path: Path) -> None:
    """Hydra names a job's folder by its number and what varies."""
    names = ["0_trainer-meerkat", "1_trainer-mezo", "2_x", "10_x", "other"]
    for name in reversed(names):
        make_run(name)

    write_sweep_report(tmp_path)

    with (tmp_path / "sweep.csv").open(newline="") as file:
        assert [row[0] for row in csv.reader(file)][1:] == names


def test_runs_of_different_measures_are_listed_and_not_compared(make_run: MakeRun, tmp_path: Path) -> None:
    """An F1 is no accuracy, and the losses of two tasks have no order."""
    runs = [make_run("first", trainer="meerkat"), make_run("second", trainer="mezo")]
    same = write_comparison(runs, tmp_path / "same").read_text()
    text = (runs[1] / "metrics.jsonl").read_text()
    (runs[1] / "metrics.jsonl").write_text(text.replace('"metric": "accuracy"', '"metric": "token_f1"'))

    page = write_comparison(runs, tmp_path / "both").read_text()

    assert "Lowest dev loss" in same
    assert "<svg" in same
    assert "Lowest dev loss" not in page
    assert "<svg" not in page
    assert "The runs have different tasks or measures" in page


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        ("task", {"loss": "lm"}),
        ("task", {"candidates": [" no", " yes"]}),
        ("data", {"path": "/b"}),
        ("split", {"seed": 1}),
    ],
)
def test_dev_losses_of_another_kind_or_of_other_rows_have_no_lowest(
    make_run: MakeRun, tmp_path: Path, section: str, changes: dict[str, Any]
) -> None:
    runs = [make_run("first", trainer="meerkat"), make_run("second", trainer="mezo")]
    alike = {"task": {"loss": "candidates", "template": "{text}"}, "data": {"path": "/a"}, "split": {"seed": 0}}
    for run in runs:
        _change_config(run, alike)
    _change_config(runs[1], {"task": {"template": "Text: {text}"}})
    same = write_comparison(runs, tmp_path / "same").read_text()
    _change_config(runs[1], {section: changes})

    page = write_comparison(runs, tmp_path / "both").read_text()

    assert "Lowest dev loss" in same
    assert "none is named the lowest" not in same
    assert "Lowest dev loss" not in page
    assert "The dev losses may be of different rows or kinds: none is named the lowest." in page
    assert "Test score of every job" in page


def test_dev_losses_of_other_numbers_of_rows_have_no_lowest(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("first", trainer="meerkat"), make_run("second", trainer="mezo")]
    lines = [json.loads(line) for line in (runs[1] / "metrics.jsonl").read_text().splitlines()]
    lines = [{**line, "num_examples": 201} if line.get("split") == "dev" else line for line in lines]
    (runs[1] / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    assert "Lowest dev loss" not in write_comparison(runs, tmp_path / "both").read_text()


def test_language_model_losses_of_other_tokenizers_have_no_lowest(make_run: MakeRun, tmp_path: Path) -> None:
    """A loss per token is lower where a text has more tokens."""
    runs = [make_run("first", trainer="meerkat"), make_run("second", trainer="mezo")]
    for run in runs:
        _change_config(run, {"task": {"loss": "lm"}})
        (run / "run.json").write_text(json.dumps({"base": {"tokenizer_digest": "a"}}))
    same = write_comparison(runs, tmp_path / "same").read_text()
    (runs[1] / "run.json").write_text(json.dumps({"base": {"tokenizer_digest": "b"}}))

    page = write_comparison(runs, tmp_path / "both").read_text()

    assert "Lowest dev loss" in same
    assert "Lowest dev loss" not in page
    for run, model in zip(runs, ("one", "other"), strict=True):
        (run / "run.json").unlink()
        _change_config(run, {"model": {"name": model}})
    assert "Lowest dev loss" not in write_comparison(runs, tmp_path / "both").read_text()


def test_a_sweep_is_compared_by_its_jobs_and_repeated_names_have_their_parents(
    make_run: MakeRun, tmp_path: Path
) -> None:
    for name in ("one/0", "one/1", "two/0"):
        make_run(name, trainer=name)
    single = make_run("single", trainer="mezo")
    (single / "config.json").touch()

    write_comparison([tmp_path / "one", tmp_path / "two", single], tmp_path / "both")

    with (tmp_path / "both" / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["job"] for row in rows] == ["one/0", "1", "two/0", "single"]
    assert {row["state"] for row in rows} == {"finished"}


def test_jobs_may_lie_deeper_than_one_folder(make_run: MakeRun, tmp_path: Path) -> None:
    """By ``hydra.sweep.subdir``; with ``hydra.output_subdir``, Hydra keeps overrides of its own in each."""
    for name in ("mezo/1", "meerkat/0"):
        job = make_run(name)
        (job / "config.json").touch()
        (job / ".hydra").mkdir()
        (job / ".hydra" / "overrides.yaml").touch()

    page = write_sweep_report(tmp_path)

    assert page is not None
    with (tmp_path / "sweep.csv").open(newline="") as file:
        assert [row["job"] for row in csv.DictReader(file)] == ["meerkat/0", "mezo/1"]


def test_a_worst_client_is_said_to_be_that_of_the_last_round(make_run: MakeRun, tmp_path: Path) -> None:
    """Beside it stand test scores of the best round."""
    make_run("0", trainer="meerkat")

    page = write_sweep_report(tmp_path)

    assert page is not None
    assert "worst client (last round)</td>" in page.read_text()
    assert "| worst client (last round) |" in (tmp_path / "sweep.md").read_text()
    assert "worst_client_last_round" in (tmp_path / "sweep.csv").read_text()


def _change_config(run: Path, changes: dict[str, dict[str, Any]]) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    for section, values in changes.items():
        config[section] = {**config.get(section, {}), **values}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
