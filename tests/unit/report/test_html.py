"""The page of a run: its numbers are the metrics', it is closed in itself, and hostile text stays text."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedzo.errors import RunFolderError
from fedzo.report.format import bytes_text
from fedzo.report.html import write_report
from fedzo.report.style import _CSS_NAMES

MakeRun = Callable[..., Path]
Lines = list[dict[str, Any]]


def contrast(one: str, other: str) -> float:
    """By WCAG 2."""
    lights = []
    for colour in (one, other):
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        lights.append(0.2126 * red + 0.7152 * green + 0.0722 * blue)
    return (max(lights) + 0.05) / (min(lights) + 0.05)


def test_the_numbers_of_the_page_are_those_of_the_metrics(make_run: MakeRun) -> None:
    text = write_report(make_run()).read_text()

    for wanted in (
        "55.5 % to 76.5 % (+21.0 points)",
        "at the best threshold for these rows 57.5 % to 78.5 %",
        "No choice of this run used the test rows.",
        "<th>time of rounds</th><td>10 s</td>",
        "<th>time with scores</th><td>25 s</td>",
        "AUC 0.605 to 0.815",
        "106,020 of 134,515,008",
        "40 B up, 40 B down",  # scalars: 10 rounds x 12 bytes / 3 clients
        "900 B up, 3.3 kB down",  # messages: those of the scores of clients, too
        "ab" * 32,
        "terrible 39, great 1",
    ):
        assert wanted in text, wanted
    assert re.search(r"probes dropped[^\n]*</th><td>1</td>", text)
    assert re.search(r"client 2 without a usable reply</th><td>1 round</td>", text)


def test_whom_a_selection_holds_back_and_what_that_costs_show_by_class_and_by_client(
    make_run: MakeRun, lines: Lines
) -> None:
    verdicts = [
        {"client": k, "flagged": k == 2, "steps": 1 if k == 2 else 8, "statistics": {"level": 1.0}} for k in range(3)
    ]
    told = {"kind": "step_policy", "seconds": 7.0, "round": 1, "windows": None, "clients": verdicts, "fallback": False}
    (scored,) = (line for line in lines if line["kind"] == "federated_score")
    early = {**scored, "round": 5, "seconds": 11.0, "per_class": {"0": [1, 5], "1": [3, 4]}}
    lines[0:0] = [early, told]
    next(line for line in lines if line["kind"] == "round")["calibration"] = True  # of loss 0.8, the next has 0.77

    text = write_report(make_run("run", lines=lines)).read_text()

    assert "<th>flagged clients</th><td>2</td>" in text
    assert "<th>loss, first and last round</th><td>0.770, 0.530</td>" in text
    assert 'terrible</th><td class="n">1 of 5</td><td class="n">4 of 5</td>' in text
    assert 'great</th><td class="n">3 of 4</td><td class="n">2 of 4</td>' in text
    assert '>after round 5</th><th scope="col" class="n">after round 10</th>' in text
    (flagged,) = re.findall(r"<tr><th>2</th>(.*?)</tr>", text)
    assert re.findall(r">([^<>]+)</td>", flagged) == ["20", "great 20", "1 (flagged)", "2", "2", "70.0 %"]


@pytest.mark.parametrize(
    ("early", "cells"),
    [
        ({"0": [9, 10]}, ["9 of 10", "49 of 100"]),  # of one client, then of both: no rise from 9 to 49
        ({}, ["n/a", "49 of 100"]),  # no client told its classes
        ({"0": [9, 10], "1": [2, 2]}, ["9 of 10", "49 of 100", "2 of 2", "n/a"]),
    ],
)
def test_rows_of_a_class_are_counted_for_each_score_of_clients(
    make_run: MakeRun, early: dict[str, list[int]], cells: list[str], lines: Lines
) -> None:
    (scored,) = (line for line in lines if line["kind"] == "federated_score")
    scored |= {"num_examples": 102, "per_class": {"0": [49, 100]}}
    lines.insert(0, {**scored, "round": 5, "seconds": 11.0, "per_class": early})

    text = write_report(make_run("run", lines=lines)).read_text()

    _, _, table = text.partition("<h2>Correct held-out rows by class</h2>")
    assert re.findall(r"<td[^>]*>([^<]+)</td>", table.partition("</table>")[0]) == cells


def test_columns_have_headers_where_their_first_row_names_them(make_run: MakeRun) -> None:
    text = write_report(make_run()).read_text()

    heads = dict(re.findall(r"<h2>([^<]+)</h2>\n<div class=\"wide\"><table><thead><tr>(.*?)</tr></thead>", text))
    named = {title: re.findall(r'<th scope="col"[^>]*>([^<]+)</th>', head) for title, head in heads.items()}
    assert named == {
        "Correct test rows by class": ["class", "rows", "before", "after"],
        "Correct held-out rows by class": ["class", "after round 10"],
        "Clients": ["client", "training rows", "labels", "own held-out rows", "of these scored", "score"],
    }
    assert not any("<td" in head for head in heads.values())
    assert "<h2>Numbers</h2>" in text


def test_in_the_dark_words_and_lines_of_figures_have_contrast(make_run: MakeRun) -> None:
    page = write_report(make_run()).read_text()

    light, dark = (dict(re.findall(r"--(\w+):(#\w{6})", root)) for root in re.findall(r":root \{(.*?)\}", page))
    assert light.keys() == dark.keys() >= {*_CSS_NAMES.values()}
    assert {light[name] for name in _CSS_NAMES.values()} == {*_CSS_NAMES}
    for name in {*_CSS_NAMES.values()} - {"grid", "paper"}:  # words need more than lines
        assert contrast(dark[name], dark["paper"]) >= (3 if name.startswith("c") else 4.5), name


@pytest.mark.parametrize(("fallback", "text"), [(False, "1, 2"), (True, "1, 2 (too many: none stopped)")])
def test_clients_that_were_too_many_to_be_stopped_are_not_shown_as_stopped(
    make_run: MakeRun, fallback: bool, text: str, lines: Lines
) -> None:
    verdicts = [{"client": k, "flagged": k > 0, "steps": 4, "statistics": {}} for k in range(3)]
    told = {"kind": "step_policy", "seconds": 7.0, "round": 1, "windows": None, "clients": verdicts}

    page = write_report(make_run("run", lines=[*lines, {**told, "fallback": fallback}])).read_text()

    assert f"<th>flagged clients</th><td>{text}</td>" in page


def test_the_page_says_how_long_the_trainer_was_prepared_where_the_run_does(make_run: MakeRun, lines: Lines) -> None:
    lines[0] |= {"prepare_seconds": 4.5}

    assert "to prepare the trainer" not in write_report(make_run("older")).read_text()
    page = write_report(make_run("new", lines=lines)).read_text()
    assert "<th>time to prepare the trainer</th><td>4.5 s</td>" in page


@pytest.mark.parametrize(("products", "told"), [("", "bfloat16"), ("float32 with TF32 products",) * 2])
def test_the_page_says_in_what_the_server_computed(make_run: MakeRun, products: str, told: str, lines: Lines) -> None:
    lines[0] |= {"forwards": {"dtype": "bfloat16", "products": products, "tokens_per_batch": 4096}}

    assert "forwards at the server" not in write_report(make_run("older")).read_text()
    page = write_report(make_run("new", lines=lines)).read_text()
    assert f"<th>forwards at the server</th><td>{told}, up to 4,096 tokens at once</td>" in page


def test_the_page_says_how_many_clients_told_their_scores(make_run: MakeRun, lines: Lines) -> None:
    assert "reported by" not in write_report(make_run("all", lines=lines)).read_text()
    (scored,) = (line for line in lines if line["kind"] == "federated_score")
    scored["clients"] = scored["clients"][:2]
    scored["clients"][1]["value"] = None

    some = write_report(make_run("some", lines=lines)).read_text()
    scored |= {"value": None, "worst_client": None, "clients": scored["clients"][1:]}
    none = write_report(make_run("none", lines=lines)).read_text()

    row = "<th>own held-out rows: accuracy and loss reported by</th><td>{} of 3 clients</td>"
    assert row.format("1 and 2") in some
    assert "1 of 3 clients report accuracy." in some
    assert re.findall(r"<tr><th>1</th>.*?>([^<>]+)</td></tr>", some) == ["n/a"]
    assert row.format("0 and 1") in none
    assert "Accuracy per client" in some
    assert "Accuracy per client" not in none


def test_where_a_value_is_trained_the_page_names_it_and_asks_for_no_other_loss(make_run: MakeRun, lines: Lines) -> None:
    (scored,) = (line for line in lines if line["kind"] == "federated_score")
    scored |= {"loss": None, "clients": [{**client, "loss": None} for client in scored["clients"]]}
    for dev in (line for line in lines if line.get("split") == "dev"):
        dev["loss"] = None  # of written answers

    lm = write_report(make_run("lm", lines=lines, task__loss="lm")).read_text()
    score = write_report(make_run("score", lines=lines, task__loss="score")).read_text()

    assert "<th>loss, first and last round</th>" in lm
    assert "accuracy and loss reported by</th><td>3 and 0 of 3 clients</td>" in lm
    assert "<th>loss (-accuracy), first and last round</th>" in score
    assert "<th>best dev round</th><td>10 (accuracy 75.0 %)</td>" in score
    assert "reported by" not in score
    scored["clients"][0]["value"] = None
    some = write_report(make_run("some", lines=lines, task__loss="score")).read_text()
    assert "<th>own held-out rows: accuracy reported by</th><td>2 of 3 clients</td>" in some


def test_test_rows_are_spoken_of_where_there_are_any(make_run: MakeRun, lines: Lines) -> None:
    assert "once before training and once at the best round." in write_report(make_run("with")).read_text()
    no_dev = [line for line in lines if line.get("split") != "dev"]
    assert (
        "once before training and once after the last round." in write_report(make_run("x", lines=no_dev)).read_text()
    )
    lines = [line for line in lines if line["kind"] != "score"]
    lines[-1] |= {"before": None, "after": None}

    assert "The test rows were scored" not in write_report(make_run("without", lines=lines)).read_text()


def test_without_test_rows_the_page_shows_the_dev_score_of_the_best_round(make_run: MakeRun, lines: Lines) -> None:
    """Also of a folder whose summary does not have it."""
    lines = [line for line in lines if line.get("split") != "test"]
    dev = next(line for line in lines if line.get("split") == "dev")
    best = {"round": 6, "seconds": 12.0, "value": 0.8, "loss": 0.125, "auc": None, "best_threshold_accuracy": None}
    lines[-1] |= {"before": None, "after": None, "best_round": 6}
    del lines[-1]["dev"]

    page = write_report(make_run("run", lines=[dev | best, *lines])).read_text()

    assert '<p class="big">54.0 % to 80.0 % (+26.0 points)</p>' in page
    assert "accuracy on 200 dev rows, before training and at the best round, which they chose." in page
    assert "<th>best dev round</th><td>6 (loss 0.125, accuracy 80.0 %)</td>" in page
    assert "The test rows were scored" not in page
    unfinished = write_report(make_run("begun", lines=[dev | best, *lines[:-1]])).read_text()
    assert '<p class="big">' not in unfinished
    assert "best dev round" not in unfinished


def test_the_page_needs_nothing_from_outside(make_run: MakeRun) -> None:
    folder = make_run()

    text = write_report(folder).read_text()

    assert text.count("<svg") == 7
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!#)""", text)
    assert "@import" not in text
    assert len(list((folder / "figures").glob("*.png"))) == 7


def test_hostile_text_stays_text(make_run: MakeRun) -> None:
    text = write_report(make_run(task="<script>alert(1)</script>")).read_text()

    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_an_unfinished_run_is_shown_and_says_so(make_run: MakeRun) -> None:
    folder = make_run()
    path = folder / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:8]))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "rou')

    text = write_report(folder).read_text()

    assert "This run is not finished: 5 rounds are shown" in text


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl"):
        write_report(tmp_path)


def test_the_page_tells_how_far_apart_the_clients_of_a_round_are(make_run: MakeRun, lines: Lines) -> None:
    rounds = [line for line in lines if line["kind"] == "round"]
    for number, line in enumerate(rounds):
        losses = ([0.5, 0.9, 0.7], [0.4, None, None], [0.6, 0.7, 0.65])[number % 3]
        line["clients"] = [{**each, "loss": loss} for each, loss in zip(line["clients"], losses, strict=True)]

    text = write_report(make_run("run", lines=lines)).read_text()

    # 0.4 in rounds 0, 3, 6, 9 and 0.1 in rounds 2, 5, 8; one loss alone has no spread
    assert "<th>loss spread (max - min) over a round&#39;s clients</th><td>0.400 (median), 0.400 (largest)</td>" in text


def test_the_messages_of_the_page_are_those_of_the_summary_also_where_clients_are_scored_every_round(
    make_run: MakeRun, lines: Lines
) -> None:
    *before, scored, after, summary = lines
    scores = [{**scored, "round": done, "seconds": 6.0 + done} for done in range(1, 11)]
    shared = [{**score, "evaluator": "second", "message_up_bytes": 0, "message_down_bytes": 0} for score in scores]
    summary |= {"message_up_bytes": 10 * (240 + 300), "message_down_bytes": 10 * (900 + 900)}

    text = write_report(make_run("run", lines=[*before, *scores, *shared, after, summary])).read_text()

    up, down = (bytes_text(summary[f"message_{way}_bytes"] / 3) for way in ("up", "down"))
    assert f"<th>messages a client, whole run, with set-up</th><td>{up} up, {down} down</td>" in text
    assert "Messages: payload and set-up in Flower&#39;s message format." in text
    assert f"messages up {up}" in text  # of the figure


def test_beside_the_score_of_a_client_stands_how_many_of_its_rows_were_scored(make_run: MakeRun, lines: Lines) -> None:
    (scored,) = (line for line in lines if line["kind"] == "federated_score")
    scored["clients"] = [{**client, "num_examples": 1} for client in scored["clients"][:2]]

    text = write_report(make_run("run", lines=lines)).read_text()

    assert '>own held-out rows</th><th scope="col" class="n">of these scored</th>' in text
    assert "<tr><th>all scored rows</th>" in text  # not all rows that clients hold
    clients = re.findall(r"<tr><th>[012]</th>(.*?)</tr>", text)
    assert [re.findall(r">([^<>]+)</td>", cells)[-3:] for cells in clients] == [
        ["4", "1", "50.0 %"],
        ["3", "1", "60.0 %"],
        ["2", "n/a", "n/a"],
    ]
