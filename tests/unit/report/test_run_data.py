"""A run's files as the report reads them: whole, torn, damaged and written twice, by lines made for that."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedzo.errors import RunFolderError
from fedzo.records.texts import read_environment, read_overrides
from fedzo.report.html import write_report
from fedzo.report.run_data import load_run

MakeRun = Callable[..., Path]
Lines = list[dict[str, Any]]


def round_line(number: int, **changes: object) -> dict[str, object]:
    line = {
        "kind": "round",
        "seconds": 1.0 + number,
        "round": number,
        "calibration": False,
        "loss": 0.7,
        "mean_abs_g": 1.0,
        "payload_up_bytes": 8,
        "payload_down_bytes": 8,
        "message_up_bytes": 90,
        "message_down_bytes": 90,
        "round_seconds": 1.0,
        "dropped_probes": 0,
        "clip_bound": None,
        "clipped": 0,
        "absent": [],
        "reasons": {},
        "clients": [],
    }
    return {**line, **changes}


def test_a_refused_reply_keeps_its_reason_and_the_report_is_written(make_run: MakeRun) -> None:
    folder = make_run(lines=[round_line(0, absent=[2], reasons={"2": "no reply by the deadline"})])

    assert load_run(folder).rounds[0].reasons == {2: "no reply by the deadline"}
    assert write_report(folder).is_file()


def test_a_line_torn_at_the_end_is_left_out_and_said(make_run: MakeRun) -> None:
    folder = make_run(lines=[round_line(0), round_line(1)])
    metrics = folder / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-25])

    run = load_run(folder)

    assert [line.round for line in run.rounds] == [0]
    assert any("incomplete" in note for note in run.notes)


def test_a_last_line_without_newline_that_is_whole_counts(make_run: MakeRun) -> None:
    folder = make_run(lines=[round_line(0), round_line(1)])
    metrics = folder / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-1])

    run = load_run(folder)

    assert [line.round for line in run.rounds] == [0, 1]
    assert run.notes == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"kind": "round"\n{"kind": "x"}\n', r"metrics\.jsonl, line 1: must be JSON, got Expecting ','"),
        ('{"kind": "round", "loss": NaN}\n', r"line 1: must be JSON, got NaN, which is not JSON"),
        ("[1]\n", r"line 1: kind must be one of setup, extension, round, .*, got None"),
        ("", r"metrics\.jsonl: must hold at least one record, got none"),
        ('{"kind": "ro', r"metrics\.jsonl: must hold at least one record, got none"),
        ("\n", r"line 1: must be JSON, got Expecting value"),
        ("[" * 100_000 + "\n", "line 1: must be JSON, got maximum recursion"),
        ('{"kind": "round", "loss": 1' + "0" * 5000 + "}\n", "line 1: must be JSON, got Exceeds the limit"),
        ('{"kind": "round", "loss": "\udcff"}\n', "line 1: must be JSON, got 'utf-8' codec"),
        (json.dumps(round_line(0, loss="low")) + "\n", r"line 1: loss must be a float of .* or null, got 'low'"),
        (json.dumps(round_line(0, loss=1)) + "\n", r"line 1: loss must be a float of .* or null, got 1\."),
        (json.dumps(round_line(0)).replace("0.7", "1e999") + "\n", "line 1: loss must be a float of .*, got inf"),
        (
            json.dumps(round_line(0, payload_up_bytes=None)) + "\n",
            "payload_up_bytes must be a whole number .* got None",
        ),
        (json.dumps(round_line(0, round=True)) + "\n", "line 1: round must be a whole number of .*, got True"),
        (json.dumps(round_line(0, reasons=[1])) + "\n", r"reasons must be an object of .*, got \[1\]"),
        (json.dumps(round_line(0, reasons={"x": "y"})) + "\n", "reasons must have keys that are a whole number"),
    ],
)
def test_damaged_metrics_name_line_rule_and_value(make_run: MakeRun, text: str, message: str) -> None:
    folder = make_run()
    (folder / "metrics.jsonl").write_bytes(text.encode("utf-8", "surrogateescape"))

    with pytest.raises(RunFolderError, match=message):
        load_run(folder)


def test_a_damaged_config_is_refused_and_a_missing_one_noted(make_run: MakeRun) -> None:
    folder = make_run()
    (folder / "environment.json").unlink()

    assert load_run(folder).notes == ("environment.json is missing from the run folder.",)

    (folder / "config.yaml").write_text("- a list\n", encoding="utf-8")
    with pytest.raises(RunFolderError, match=r"config\.yaml: must hold a mapping, got a list"):
        load_run(folder)


@pytest.mark.parametrize(
    ("written", "got"),
    [
        ("[]", "a list"),
        ('{"packages": null}', "packages that are no mapping"),
        ('{"packages": ["torch"]}', "packages that are no mapping"),
        ('{"later": null}', "a value of later that is no list of mappings"),
        ('{"later": {}}', "a value of later that is no list of mappings"),
        ('{"later": [{}, 1]}', "a value of later that is no list of mappings"),
    ],
)
def test_an_environment_of_another_form_is_refused(tmp_path: Path, written: str, got: str) -> None:
    (tmp_path / "environment.json").write_text(written)
    remedy = r"Restore the file, or delete it to go on without it\."

    with pytest.raises(RunFolderError, match=rf"environment\.json: must hold a mapping, got {got}\. {remedy}$"):
        read_environment(tmp_path)


def test_a_run_with_an_environment_of_another_form_is_refused(make_run: MakeRun) -> None:
    """A page over several runs compares what they were computed with."""
    folder = make_run()
    (folder / "environment.json").write_text('{"packages": null}')

    with pytest.raises(RunFolderError, match=r"environment\.json: must hold a mapping, got packages that"):
        load_run(folder)


def test_brackets_without_end_are_no_configuration(make_run: MakeRun) -> None:
    """YAML's reader would take a second for two thousand of them, and by the square for more."""
    run = make_run()
    for name, read in (("config.yaml", load_run), ("overrides.yaml", read_overrides)):
        (run / name).write_text("- a: " + "[" * 5000)
        with pytest.raises(RunFolderError, match=f"{name}: must hold a .*, got too many brackets inside one another"):
            read(run)
        (run / name).unlink()


def test_aliases_are_no_configuration(make_run: MakeRun) -> None:
    """Thirty lines, each a list of two of the line before, would fill the memory."""
    run = make_run()
    (run / "config.yaml").write_text("a: &a x\nb: [*a, *a]\n")
    (run / "overrides.yaml").write_text("- &a x\n- *a\n")

    for name, read in (("config.yaml", load_run), ("overrides.yaml", read_overrides)):
        with pytest.raises(RunFolderError, match=rf"{name}: must hold a .*, got an alias \(\*name\)"):
            read(run)


def test_a_round_that_was_measured_and_never_committed_is_left_out(make_run: MakeRun) -> None:
    """A kill between the two leaves it; `fedzo status` does not count it, and a resumed run takes it again."""
    folder = make_run(lines=[round_line(0), round_line(1), round_line(2)])
    (folder / "public.jsonl").write_text('{"round": 0}\n{"round": 1}\n{"round": 2, "c')

    assert [line.round for line in load_run(folder).rounds] == [0, 1]


def test_of_a_round_written_twice_the_later_counts(make_run: MakeRun) -> None:
    folder = make_run(
        lines=[round_line(0, loss=0.9), round_line(1), round_line(0, loss=0.4), {"kind": "from the future"}]
    )

    assert [(line.round, line.loss) for line in load_run(folder).rounds] == [(0, 0.4), (1, 0.7)]


def test_signals_of_single_steps_are_read_by_who_draws_them_and_not_kept(make_run: MakeRun) -> None:
    """Of 10,000 rounds, 200 clients and 50 steps they would take gigabytes."""
    run = load_run(make_run())

    kept = {(*signals.abs_g, *signals.loss) for r in run.rounds for signals in (c.signals for c in r.clients)}
    assert kept == {(None, None)}
    assert [client.abs_g for client in run.rounds[3].clients] == [9.0, 10.0, 11.0]
    for clients, found in (({1}, [(10.0,)]), ({2, 0}, [(9.0,), (11.0,)]), (None, [(9.0,), (10.0,), (11.0,)])):
        read = [(record.round, [c.signals.abs_g for c in some]) for record, some in run.with_signals(clients)]
        assert read == [(number, found) for number in range(10)]


def test_signals_of_a_round_written_twice_are_those_of_the_later(make_run: MakeRun, lines: Lines) -> None:
    again = json.loads(json.dumps(next(line for line in lines if line["kind"] == "round")))
    again["clients"][0]["signals"]["abs_g"] = [0.25]
    run = load_run(make_run("twice", lines=[*lines, again]))

    (first, measured), *_ = run.with_signals({0})
    assert (first.round, [client.signals.abs_g for client in measured]) == (0, [(0.25,)])


def test_a_run_that_went_on_after_its_summary_is_unfinished(make_run: MakeRun) -> None:
    folder = make_run()
    assert load_run(folder).summary is not None

    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(round_line(10)) + "\n")

    assert load_run(folder).summary is None
