"""The table of a sweep holds every job, the failed ones too."""

from __future__ import annotations

import csv
import hashlib
import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedzo.config.travel import _MACHINE
from fedzo.errors import FolderInUseError, RunFolderError
from fedzo.report.jobs import jobs_of_sweep, noted_failure
from fedzo.report.over_seeds import _ELSEWHERE
from fedzo.report.sweep import unfinished_jobs, write_comparison, write_sweep_report
from fedzo.report.sweep_figures import draw_sweep

MakeRun = Callable[..., Path]
Lines = list[dict[str, Any]]


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
    assert rows[1] == ["2", "lora", "failed"]
    assert [row[:3] for row in rows[2:4]] == [["0", "meerkat", "finished"], ["1", "mezo", "finished"]]
    assert [row[3:10] for row in rows[2:4]] == [["10", "0.25", "0.75", "0.555", "0.765", "0.5", ""]] * 2
    assert "must hold at least one record" in page.read_text()
    assert (tmp_path / "sweep.md").read_text().count("\n") == 5


def test_a_job_that_failed_is_told_with_its_reason_and_its_own_settings(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("good", trainer="good", fl__rounds="200")
    held = make_run("held", trainer="held", fl__rounds="100")  # a finished run, of other settings
    (tmp_path / "refused" / "deep").mkdir(parents=True)
    errors = {"held": RunFolderError("it holds a run of other settings."), "refused/deep": KeyError("of a\n plugin")}
    for name, error in errors.items():
        words = [f"trainer={name}", "fl.rounds=200"]
        with pytest.raises(type(error)), noted_failure(tmp_path / name, words):
            raise error

    page = write_sweep_report(tmp_path)

    assert page is not None
    with (tmp_path / "sweep.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header[:3] == ["job", "trainer", "state"]
    assert [row[:3] for row in rows] == [
        ["good", "good", "finished"],
        ["held", "held", "failed"],
        ["refused/deep", "refused/deep", "failed"],
    ]
    assert len(rows[1]) == 3  # no number of the run that is there
    text = html.unescape(page.read_text())
    assert "held: it holds a run of other settings." in text
    assert "refused/deep: KeyError('of a\\n plugin')" in text
    assert unfinished_jobs(tmp_path) == ["held", "refused/deep"]
    with noted_failure(held, []):
        pass
    with pytest.raises(FolderInUseError), noted_failure(held, []):
        raise FolderInUseError("another process is using it")
    assert unfinished_jobs(tmp_path) == ["refused/deep"]


def test_a_sweep_without_test_rows_is_judged_by_its_dev_rows(make_run: MakeRun, tmp_path: Path, lines: Lines) -> None:
    lines = [line for line in lines if line.get("split") != "test"]
    lines[-1] |= {"before": None, "after": None}
    for lr, up in (("0.1", 12), ("0.2", 1_200)):
        lines = [{**line, "payload_up_bytes": up} if line["kind"] == "round" else line for line in lines]
        lines[-1] = {**lines[-1], "payload_up_bytes": 10 * up}
        make_run(f"jobs/{lr}", lines=lines, trainer__lr=lr)

    page = write_sweep_report(tmp_path / "jobs")

    assert page is not None
    table = (tmp_path / "jobs" / "sweep.md").read_text().splitlines()
    assert "| 0.1 | finished | 10 | 0.250 | 75.0 % |  |  | 50.0 % |" in table[2]
    text = page.read_text()
    assert "Dev score of every job" in text
    assert "Dev score against bytes of a client" in text


def test_runs_that_were_started_one_by_one_are_compared_by_what_differs(
    make_run: MakeRun, tmp_path: Path, lines: Lines
) -> None:
    for line in lines:
        if line.get("split") == "dev" and line["round"] == 10:
            line["loss"] = 0.2
    runs = [make_run("here/first", trainer="meerkat"), make_run("there/second", trainer="mezo", lines=lines)]

    page = write_comparison(runs, tmp_path / "both")

    assert page == tmp_path / "both" / "report.html"
    text = page.read_text()
    assert "Lowest dev loss: 0.200 (mezo)" in text
    assert "Choose settings by the dev loss" in text
    assert [line.split(" | ")[1] for line in (tmp_path / "both" / "sweep.md").read_text().splitlines()[2:]] == [
        "meerkat",
        "mezo",
    ]
    assert not (runs[0] / "sweep.md").exists()


def test_a_folder_without_jobs_has_no_report(tmp_path: Path) -> None:
    assert write_sweep_report(tmp_path) is None


@pytest.mark.parametrize(
    "names",
    [
        ["lr-2e-4_seed-1", "lr-2e-4_seed-2", "lr-2e-4_seed-10", "lr-0.001_seed-0", "lr-0.03_seed-0", "trainer-mezo"],
        ["0_trainer-meerkat", "1_trainer-mezo", "2_x", "10_x", "other"],
    ],
)
def test_jobs_of_equal_settings_are_in_the_order_of_the_numbers_in_their_names(
    make_run: MakeRun, tmp_path: Path, names: list[str]
) -> None:
    for name in reversed(names):
        make_run(name)

    write_sweep_report(tmp_path)

    with (tmp_path / "sweep.csv").open(newline="") as file:
        assert [row[0] for row in csv.reader(file)][1:] == names


def test_jobs_are_in_the_order_of_what_they_set_key_by_key(make_run: MakeRun, tmp_path: Path) -> None:
    """Not of their folders, whose long names may end in a hash."""
    settings = [
        {"trainer": trainer, "server_optimizer__lr": lr, "evaluation__every_rounds": rounds}
        for trainer in ("lora", "mezo")
        for lr in ("3.2e-05", "6.4e-05", "0.000128", "2", "10", "null")
        for rounds in ("-1", "5", "10")
    ]
    names = [hashlib.sha256(repr(each).encode()).hexdigest() for each in settings]
    for name, each in zip(names, settings, strict=True):
        make_run(name, **each)
    (tmp_path / "unreadable").mkdir()
    (tmp_path / "unreadable" / "overrides.yaml").write_text("5")

    write_sweep_report(tmp_path)

    with (tmp_path / "sweep.csv").open(newline="") as file:
        rows = [row["job"] for row in csv.DictReader(file)]
    assert rows == ["unreadable", *names]


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


def test_dev_losses_of_other_numbers_of_rows_have_no_lowest(make_run: MakeRun, tmp_path: Path, lines: Lines) -> None:
    lines = [{**line, "num_examples": 201} if line.get("split") == "dev" else line for line in lines]
    runs = [make_run("first", trainer="meerkat"), make_run("second", trainer="mezo", lines=lines)]

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
    assert "worst client (last round)</th>" in page.read_text()
    assert "| worst client (last round) |" in (tmp_path / "sweep.md").read_text()
    assert "worst_client_last_round" in (tmp_path / "sweep.csv").read_text()
    assert "fallback,worst_client_rows,metric" in (tmp_path / "sweep.csv").read_text()


def test_means_over_seeds_name_the_best_setting_and_not_the_luckiest_job(make_run: MakeRun, tmp_path: Path) -> None:
    for lr, seed, dev_loss, test in (
        *(("0.1", "0", 0.2, 0.7), ("0.1", "1", 0.6, 0.8)),  # the lowest loss of all, and the higher mean
        *(("0.2", "0", 0.3, 0.74), ("0.2", "1", 0.4, 0.76)),
    ):
        _score(make_run(f"{lr}-{seed}", trainer__lr=lr, seed=seed), dev_loss=dev_loss, test=test)

    page = write_sweep_report(tmp_path)

    assert page is not None
    text = html.unescape(page.read_text())
    assert "Lowest mean dev loss: 0.350 over 2 seeds (0.2)" in text
    assert "+- is the half width of the 95 % interval of the mean over run seeds, by Student's t." in text
    assert "Over seeds</h2>" in text
    # deviations of 0.05 and 0.01 from the means: of two values that is the error of the mean, too
    assert (tmp_path / "sweep.md").read_text().split("\n\n")[1].splitlines() == [
        "| trainer.lr | seeds | mean dev loss | mean test | test less that of the best dev loss |",
        "| --- | --- | --- | --- | --- |",
        "| 0.1 | 2 | 0.400 | 75.0 % +- 63.5 points | +0.0 points +- 50.8 |",  # of -0.04 and 0.04: their error is 0.04
        "| 0.2 | 2 | 0.350 | 75.0 % +- 12.7 points |  |",
    ]


def test_a_setting_of_fewer_seeds_is_not_named_the_best(make_run: MakeRun, tmp_path: Path) -> None:
    for lr, seed, dev_loss in (
        *(("0.1", "0", 0.5), ("0.1", "1", 0.3), ("0.2", "0", 0.6), ("0.2", "1", 0.4)),
        ("0.4", "0", 0.1),
    ):
        _score(make_run(f"{lr}-{seed}", trainer__lr=lr, seed=seed), dev_loss=dev_loss)

    page = write_sweep_report(tmp_path)

    assert page is not None
    text = page.read_text()
    assert "Lowest mean dev loss: 0.400 over 2 seeds (0.1)" in text
    assert "Groups of fewer than 2 seeds are not named the best: 0.4." in text
    assert "| 0.4 | 1 | 0.100 | 76.5 % |  |" in (tmp_path / "sweep.md").read_text().splitlines()


def test_seeds_of_one_setting_have_a_mean_and_no_best(make_run: MakeRun, tmp_path: Path) -> None:
    for seed, test in (("0", 0.7), ("1", 0.8), ("2", 0.9)):
        _score(make_run(seed, seed=seed), test=test)

    page = write_sweep_report(tmp_path)

    assert page is not None
    assert "dev loss:" not in page.read_text()
    assert "| 3 | 0.250 | 80.0 % +- 24.8 points |" in (tmp_path / "sweep.md").read_text()  # 4.303 x 0.1 / sqrt(3)


def test_a_run_that_is_repeated_with_its_seed_counts_once(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("first"), make_run("again", seed="0"), make_run("other", seed="1")]
    for run, seed, test in zip(runs, (0, 0, 1), (0.1, 0.7, 0.8), strict=True):
        _change_config(run, {}, seed=seed)  # what no command line sets is recorded, too
        _score(run, test=test)

    page = write_comparison(runs, tmp_path / "all")

    assert "only the last counts in the means" in page.read_text()
    assert "| 2 | 0.250 | 75.0 % +- 63.5 points |" in (tmp_path / "all" / "sweep.md").read_text()


@pytest.mark.parametrize("key", ["device", "threads", "runtime", "runtime__num_actors", "report", "trackers"])
def test_seeds_have_a_mean_wherever_they_were_computed_and_however_told_of(
    make_run: MakeRun, tmp_path: Path, key: str
) -> None:
    for seed, elsewhere, dev_loss, test in (("0", "one", 0.2, 0.7), ("1", "other", 0.6, 0.8)):
        _score(make_run(seed, seed=seed, **{key: elsewhere}), dev_loss=dev_loss, test=test)

    page = write_sweep_report(tmp_path)

    assert page is not None
    assert "dev loss:" not in page.read_text()  # neither seed is named the best
    assert "different settings" not in page.read_text()
    assert (tmp_path / "sweep.md").read_text().split("\n\n")[1].splitlines() == [
        "| seeds | mean dev loss | mean test |",
        "| --- | --- | --- |",
        "| 2 | 0.400 | 75.0 % +- 63.5 points |",
    ]


def test_what_makes_no_other_run_parts_no_seeds_but_for_who_rewrites_rows() -> None:
    assert {*_ELSEWHERE, "rewriter"} == {*_MACHINE}


def test_seeds_whose_rows_other_models_rewrote_are_of_other_settings(make_run: MakeRun, tmp_path: Path) -> None:
    for model, seed, dev_loss in (("a", "0", 0.1), ("a", "1", 0.2), ("b", "0", 0.5), ("b", "1", 0.7)):
        _score(make_run(f"{model}{seed}", rewriter__model=model, seed=seed), dev_loss=dev_loss)

    write_sweep_report(tmp_path)

    rows = (tmp_path / "sweep.md").read_text().split("\n\n")[1].splitlines()[2:]
    assert [row.split(" | ")[:3] for row in rows] == [["| a", "2", "0.150"], ["| b", "2", "0.600"]]


def test_a_larger_budget_of_the_rewriter_parts_no_seeds(make_run: MakeRun, tmp_path: Path) -> None:
    for seed, budget_calls in (("0", "100"), ("1", "200")):
        _score(make_run(seed, rewriter__model="a", rewriter__budget_calls=budget_calls, seed=seed), dev_loss=0.5)

    write_sweep_report(tmp_path)

    assert "| 2 | 0.500 |" in (tmp_path / "sweep.md").read_text().split("\n\n")[1]


@pytest.mark.parametrize("seeds", [1, 2])
def test_runs_of_the_same_words_and_other_settings_have_no_mean_together(
    make_run: MakeRun, tmp_path: Path, seeds: int
) -> None:
    """As of an experiment's file of ``--config-dir`` that was edited between them."""
    for number in range(2 * seeds):
        run = make_run(str(number), experiment="mine", seed=str(number))
        _change_config(run, {"trainer": {"lr": 0.1 if number < seeds else 0.9}})
        _score(run, dev_loss=0.1 * (1 + number))

    page = write_sweep_report(tmp_path)

    assert page is not None
    assert "Jobs of the same words have different settings" in page.read_text()
    tables = (tmp_path / "sweep.md").read_text().split("\n\n")[1:]
    rows = [row.split(" | ")[:2] for table in tables for row in table.splitlines()[2:]]
    assert rows == ([] if seeds == 1 else [["| 2", "0.150"], ["| 2", "0.350"]])  # of 0.1 and 0.2, of 0.3 and 0.4


def test_runs_without_a_configuration_go_by_their_words(make_run: MakeRun, tmp_path: Path) -> None:
    for lr, seed, dev_loss in (("0.1", "0", 0.1), ("0.1", "1", 0.2), ("0.2", "0", 0.5), ("0.2", "1", 0.7)):
        run = make_run(f"{lr}-{seed}", trainer__lr=lr, seed=seed, device=seed)
        (run / "config.yaml").unlink()
        _score(run, dev_loss=dev_loss)

    write_sweep_report(tmp_path)

    rows = (tmp_path / "sweep.md").read_text().split("\n\n")[1].splitlines()[2:]
    assert [row.split(" | ")[:3] for row in rows] == [["| 0.1", "2", "0.150"], ["| 0.2", "2", "0.600"]]


@pytest.mark.parametrize(
    ("lower_is_better", "headline"),
    [(False, "Highest dev accuracy: 80.0 % (mezo)"), (True, "Lowest dev accuracy: 70.0 % (meerkat)")],
)
def test_jobs_that_chose_by_the_dev_value_are_ordered_by_it(
    make_run: MakeRun, tmp_path: Path, lower_is_better: bool, headline: str
) -> None:
    for trainer, dev_loss, dev in (("meerkat", 0.2, 0.7), ("mezo", 0.3, 0.8)):
        job = make_run(trainer, trainer=trainer)
        _score(job, dev_loss=dev_loss, dev=dev, lower_is_better=lower_is_better)
        _change_config(job, {"evaluation": {"best_by": "value"}})

    page = write_sweep_report(tmp_path)

    assert page is not None
    assert headline in page.read_text()
    assert "Choose settings by the dev value" in page.read_text()


def test_dev_values_without_a_loss_are_ordered_on_the_same_rows_only(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("first", trainer="meerkat"), make_run("second", trainer="mezo")]
    for run in runs:
        _score(run, dev_loss=None)
        _change_config(run, {"evaluation": {"best_by": "value"}})
    same = write_comparison(runs, tmp_path / "same").read_text()
    _change_config(runs[1], {"split": {"seed": 1}})

    page = write_comparison(runs, tmp_path / "both").read_text()

    assert "Highest dev accuracy" in same
    assert "Highest dev accuracy" not in page
    assert "The dev values may be of different rows or kinds: none is named the best." in page


def test_the_plain_numbers_tell_what_a_run_cost_and_what_its_test_rows_gave(
    make_run: MakeRun, tmp_path: Path, lines: Lines
) -> None:
    lines[0] |= {"forwards_per_step": 2, "prepare_seconds": 4.5}
    lines[-1] |= {"wire_up_bytes": 5_000, "wire_down_bytes": 20_000}
    make_run("new", trainer="meerkat", lines=lines)
    make_run("old", trainer="mezo")

    write_sweep_report(tmp_path)

    with (tmp_path / "sweep.csv").open(newline="") as file:
        new, old = csv.DictReader(file)
    told = {
        **{"metric": "accuracy", "test_loss": str(1 - 0.765), "test_auc": str(0.765 + 0.05), "num_test": "200"},
        **{"trained_values": "106020", "setup_down_bytes_per_client": "459000", "bytes_per_client": "459080.0"},
        **{"payload_up_bytes": "120", "payload_down_bytes": "120"},
        **{"message_up_bytes": "2700", "message_down_bytes": "9900"},
        **{"round_seconds": "10.0", "seconds": "25.0"},
    }
    assert {name: old[name] for name in told} == {name: new[name] for name in told} == told
    later = ("wire_up_bytes", "wire_down_bytes", "forwards", "prepare_seconds")
    assert [new[name] for name in later] == ["5000", "20000", "60", "4.5"]  # 10 rounds, 3 clients, 2 forwards a step
    assert [old[name] for name in later] == ["", "", "", ""]
    assert "| 459 kB | 80 B | 10 s | 25 s |" in (tmp_path / "sweep.md").read_text()


@pytest.mark.parametrize(
    ("flagged", "fallback", "cell", "numbers"),
    [
        ([1, 2], False, "| 1, 2 |", ["1 2", "False"]),
        ([1, 2], True, "| 1, 2 (too many: none stopped) |", ["1 2", "True"]),
        ([], False, "| none |", ["none", "False"]),
        (None, False, "|  |", ["", ""]),
    ],
)
def test_clients_that_were_too_many_to_be_stopped_are_not_shown_as_stopped(
    make_run: MakeRun, tmp_path: Path, flagged: list[int] | None, fallback: bool, cell: str, numbers: list[str]
) -> None:
    job = make_run("0", trainer="meerkat")
    lines = [json.loads(line) for line in (job / "metrics.jsonl").read_text().splitlines()]
    if flagged is not None:
        clients = [{"client": client, "steps": 1} for client in flagged]
        lines[-1]["step_policy"] = {"flagged": clients, "fallback": fallback}
    (job / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    write_sweep_report(tmp_path)

    assert cell in (tmp_path / "sweep.md").read_text()
    with (tmp_path / "sweep.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert [row["flagged"], row["fallback"]] == numbers


def test_a_number_that_an_evaluator_reports_beside_its_value_has_a_column(
    make_run: MakeRun, tmp_path: Path, lines: Lines
) -> None:
    make_run("0", trainer="lora")
    for line in lines:
        if line.get("split") == "test":
            line["numbers"] = {"exact_match": line["round"] / 20}
    make_run("1", trainer="meerkat", lines=lines)
    make_run("2", trainer="mezo", lines=[])

    write_sweep_report(tmp_path)

    with (tmp_path / "sweep.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0][-2:] == ["seconds", "test_exact_match"]
    assert [row[-1] for row in rows[1:]] == ["", "0.5", "failed"]


def test_a_number_with_the_name_of_a_column_stands_there_if_it_is_empty(
    make_run: MakeRun, tmp_path: Path, lines: Lines
) -> None:
    make_run("0", trainer="lora")
    for line in lines:
        if line.get("split") == "test":
            line |= {"auc": None, "numbers": {"auc": 0.25, "before": 0.125, "shots": 4.0}}
    make_run("1", trainer="meerkat", lines=lines)

    write_sweep_report(tmp_path)

    with (tmp_path / "sweep.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert len({*header}) == len(header)
    own, other = (dict(zip(header, row, strict=True)) for row in rows)
    names = ("test_before", "test_auc", "test_shots")
    assert [own[name] for name in names] == ["0.555", str(0.765 + 0.05), ""]
    assert [other[name] for name in names] == ["0.555", "0.25", "4.0"]


def test_jobs_that_chose_among_different_numbers_of_rounds_are_named(
    make_run: MakeRun, tmp_path: Path, lines: Lines
) -> None:
    runs = [make_run("first", trainer="meerkat"), make_run("second", trainer="mezo")]
    same = write_comparison(runs, tmp_path / "same").read_text()
    once_more = next(line for line in lines if line.get("split") == "dev") | {"round": 5}
    (runs[1] / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [once_more, *lines]))

    page = write_comparison(runs, tmp_path / "both").read_text()

    told = "Best rounds were chosen among 2 to 3 dev scores: jobs with more scores are favoured."
    assert told not in same
    assert told in page


def test_bytes_are_those_of_a_client_both_ways_with_its_set_up(make_run: MakeRun, tmp_path: Path, lines: Lines) -> None:
    """A pool costs bytes down and not up, and twice as many clients send twice as much in all."""
    jobs = tmp_path / "jobs"
    for num_clients, along, up, down in ((3, "shared", 12, 12), (3, "pool", 12, 96), (6, "shared", 24, 24)):
        for line in lines:
            if line["kind"] == "setup":
                line["clients"] = [{**line["clients"][0], "client": k} for k in range(num_clients)]
            if line["kind"] == "round":
                line |= {"payload_up_bytes": up, "payload_down_bytes": down}
        make_run(f"jobs/{num_clients}-{along}", lines=lines, fl__num_clients=str(num_clients), fl__directions=along)

    keys = ["fl.num_clients", "fl.directions"]
    pictures = {picture.name: picture for picture in draw_sweep(jobs_of_sweep(jobs), keys)}

    (axes,) = pictures["bytes"].figure.axes
    told = {text.get_text(): text.xy[0] for text in axes.texts}
    assert told == pytest.approx({"3, shared": 459_080, "3, pool": 459_000 + (120 + 960) / 3, "6, shared": 459_080})
    assert sorted(float(line.get_xdata()[0]) for line in axes.lines) == pytest.approx(sorted(told.values()))
    assert axes.get_xlim()[0] == 0  # 280 B on top of 459 kB are no large difference


def test_what_is_to_be_subtracted_and_every_other_evaluator_are_in_the_plain_numbers(
    make_run: MakeRun, tmp_path: Path, lines: Lines
) -> None:
    make_run("0", trainer="lora")
    scores = [line for line in lines if line.get("split") == "test"]
    lines += [{**line, "evaluator": "nats", "metric": "nats", "value": 4.0 - line["round"] / 4} for line in scores]
    make_run("1", trainer="meerkat", lines=lines)

    write_sweep_report(tmp_path)

    with (tmp_path / "sweep.csv").open(newline="") as file:
        own, both = csv.DictReader(file)
    told = {
        **{"test_auc_before": str(0.555 + 0.05), "test_auc": str(0.765 + 0.05)},
        "test_best_threshold_accuracy_before": str(0.555 + 0.02),
        "test_best_threshold_accuracy": str(0.765 + 0.02),
    }
    assert {name: own[name] for name in told} == {name: both[name] for name in told} == told
    assert (own["test_nats"], both["test_nats"]) == ("", "1.5")


def test_seeds_without_test_rows_are_not_compared_by_them(make_run: MakeRun, tmp_path: Path, lines: Lines) -> None:
    lines = [line for line in lines if line.get("split") != "test"]
    lines[-1] |= {"before": None, "after": None}
    for lr, seed in (("0.1", "0"), ("0.1", "1"), ("0.2", "0"), ("0.2", "1")):
        make_run(f"jobs/{lr}-{seed}", lines=lines, trainer__lr=lr, seed=seed)

    page = write_sweep_report(tmp_path / "jobs")

    assert page is not None
    table = (tmp_path / "jobs" / "sweep.md").read_text().split("\n\n")[1].splitlines()
    assert table[0] == "| trainer.lr | seeds | mean dev loss | mean test |"
    assert "last column" not in page.read_text()
    assert "Dev loss over rounds" in page.read_text()


_BEGUN = {"fedzo": "0.1.0", "threads": 2, "platform": "one", "packages": {"torch": "2.8", "numba": "0.61"}}


@pytest.mark.parametrize(
    ("other", "differ"),
    [
        ({**_BEGUN, "platform": "other", "git_commit": "c"}, ""),
        ({**_BEGUN, "threads": 1, "packages": {"torch": "2.9", "numba": "0.61"}}, "threads, torch"),
        ({**_BEGUN, "later": [{"round": 3, "fedzo": "0.2.0"}]}, "fedzo"),
    ],
)
def test_jobs_that_were_computed_with_something_else_are_told(
    make_run: MakeRun, tmp_path: Path, other: dict[str, Any], differ: str
) -> None:
    for name, environment in (("meerkat", _BEGUN), ("mezo", other)):
        (make_run(name, trainer=name) / "environment.json").write_text(json.dumps(environment))
    (make_run("lost", trainer="lora") / "environment.json").unlink()

    page = write_sweep_report(tmp_path)

    assert page is not None
    told = re.findall(r"Jobs were computed with different (.*): times do not compare", page.read_text())
    assert told == ([differ] if differ else [])


@pytest.mark.parametrize(("dtype", "differ"), [("auto", ["dtype (of model.dtype=auto)"]), ("bfloat16", [])])
def test_jobs_whose_dtype_was_chosen_otherwise_are_told(
    make_run: MakeRun, tmp_path: Path, dtype: str, differ: list[str], lines: Lines
) -> None:
    for trainer, chosen in (("meerkat", "float32"), ("mezo", "bfloat16")):
        lines[0]["forwards"] = {"dtype": chosen, "products": "", "tokens_per_batch": 4096}
        make_run(f"jobs/{trainer}", lines=lines, trainer=trainer, model__dtype=dtype)

    page = write_sweep_report(tmp_path / "jobs")

    assert page is not None
    assert re.findall(r"Jobs were computed with different (.*): times do not compare", page.read_text()) == differ


def _score(run: Path, *, dev_loss: float | None = 0.25, dev: float = 0.75, test: float = 0.765, **both: Any) -> None:
    """Give a run other scores at its best round; ``both``: fields of all its scores."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "score":
            line |= both
            if line["round"] == 10:
                line |= {"loss": dev_loss, "value": dev} if line["split"] == "dev" else {"value": test}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _change_config(run: Path, changes: dict[str, dict[str, Any]], **values_at_the_top: Any) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text()) | values_at_the_top
    for section, values in changes.items():
        config[section] = {**config.get(section, {}), **values}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
