"""What a person sees of a run without a terminal."""

from __future__ import annotations

import io
import sys
import time
from dataclasses import replace

import pytest

from fedzo.records.metrics import (
    Flagged,
    FlaggedClient,
    MetricRecord,
    Round,
    Setup,
    Summary,
)
from fedzo.report.sinks import ProgressSink, ending, phase

Records = list[MetricRecord]


def test_without_a_terminal_plain_lines_tell_rounds_bytes_time_and_the_result(
    records: Records, capsys: pytest.CaptureFixture[str]
) -> None:
    sink = ProgressSink(10, evaluator="answers")
    for record in records:
        sink.write(record)
    sink.close()

    out = capsys.readouterr().out
    assert "106,020 of 134,515,008 weights trained (0.079 %), 3 clients, 90 training rows" in out
    assert "estimate: 500 MB of memory per step, 1 min 40 s for all forwards" in out
    assert "round 10/10  loss 0.530" in out
    assert "up 2.4 kB  down 9.0 kB" in out
    assert "0.555 -> 0.765" in out
    assert "best dev round 10 of 10" in out
    assert "accuracy at best test threshold  0.575 -> 0.785" in out
    assert "worst client's accuracy          0.500 (client 0, on its own rows after round 10)" in out
    assert "flagged" not in out
    assert "240 B (13 kB as messages, with set-up)" in out


def test_an_estimate_says_what_the_memory_is_of_and_what_is_free_where(
    records: Records, capsys: pytest.CaptureFixture[str]
) -> None:
    setup = records[0]
    assert isinstance(setup, Setup)
    assert setup.estimate is not None
    parts = {"weights": 538_000_000, "activations": 132_000_000}
    told = replace(setup.estimate, parts=parts, device="cuda:0, NVIDIA H200", free_bytes=149 * 10**9)
    for estimate in (told, setup.estimate):  # that of an older record tells neither
        sink = ProgressSink(10)
        sink.write(replace(setup, estimate=estimate))
        sink.close()

    lines = capsys.readouterr().out.splitlines()
    first = "estimate: 500 MB of memory per step, 1 min 40 s for all forwards in one process"
    second = "  on cuda:0, NVIDIA H200: weights 538 MB, activations 132 MB; beside the weights 149 GB are free"
    assert [line for line in lines if "weights trained" not in line] == [first, second, first]


def test_a_loss_that_is_a_value_is_named(records: Records, capsys: pytest.CaptureFixture[str]) -> None:
    sink = ProgressSink(10, loss="loss (-token_f1)")
    for record in records:
        sink.write(record)
    sink.close()

    assert "round 10/10  loss (-token_f1) 0.530" in capsys.readouterr().out


@pytest.mark.parametrize(("has_dev", "words"), [(False, "after round 10 of 10"), (True, "best dev round 10 of 10")])
def test_no_dev_round_is_spoken_of_where_no_dev_score_chose_one(
    records: Records, capsys: pytest.CaptureFixture[str], has_dev: bool, words: str
) -> None:
    """The summary alone says so: scores may be another evaluator's, or from before the run was resumed."""
    *before, summary = records
    assert isinstance(summary, Summary)
    sink = ProgressSink(10, evaluator="answers")
    for record in [*([] if has_dev else before), summary if has_dev else replace(summary, dev=None)]:
        sink.write(record)
    sink.close()

    assert f"test, before -> after ({words}):" in capsys.readouterr().out


def test_a_run_that_trains_all_weights_says_100_percent(records: Records, capsys: pytest.CaptureFixture[str]) -> None:
    setup = records[0]
    assert isinstance(setup, Setup)
    sink = ProgressSink(10)
    sink.write(replace(setup, space_size=setup.num_params))
    sink.close()

    assert "134,515,008 of 134,515,008 weights trained (100 %), " in capsys.readouterr().out


def test_neither_the_first_round_nor_a_calibration_measures_the_time_that_is_left(
    records: Records, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the others all time counts, also that of the model's update and of scores, which are no part of a round."""
    monkeypatch.setattr("fedzo.report.sinks.PLAIN_EVERY_S", -1.0)
    sink = ProgressSink(10)
    first, second, *_ = (line for line in records if isinstance(line, Round))
    for line in (
        replace(first, seconds=1000.0),
        replace(second, calibration=True, seconds=2000.0),
        replace(second, round=2, seconds=2009.0, round_seconds=1.0),
        replace(second, round=3, seconds=2020.0, round_seconds=1.0),
    ):
        with sink.round():
            pass
        sink.write(line)
    sink.close()

    begun, *lines = capsys.readouterr().out.splitlines()
    assert begun == "first round ..."
    assert lines[0].startswith("round 1/10  loss 0.800")
    assert lines[1].startswith("round 2/10  (calibration)  loss 0.770")
    ends = [line.rpartition("  ")[2] for line in lines]
    assert ends == ["n/a left", "n/a left", "1 min 03 s left", "1 min 00 s left"]


@pytest.mark.parametrize(
    ("step_policy", "words"),
    [
        (Flagged(flagged=(), fallback=False), "none"),
        (Flagged(flagged=(FlaggedClient(client=1, steps=2),), fallback=False), "1 (T_k = 2)"),
        (
            Flagged(flagged=tuple(FlaggedClient(client=k, steps=4) for k in (1, 3)), fallback=True),
            "1, 3; too many to be stopped early",
        ),
    ],
)
def test_a_run_without_test_and_dev_rows_ends_with_its_worst_client_whom_it_flagged_and_bytes(
    records: Records, step_policy: Flagged, words: str
) -> None:
    summary = records[-1]
    assert isinstance(summary, Summary)

    unscored = replace(summary, before=None, after=None, dev=None)
    lines = ending(replace(unscored, step_policy=step_policy))

    assert lines[0] == "after 10 rounds:"
    assert [line[2:34].rstrip() for line in lines[1:]] == [
        "worst client's accuracy",
        "flagged clients",
        "scalars, all clients, both ways",
    ]
    assert words in lines[2]


def test_a_run_without_test_rows_ends_with_the_dev_score_of_its_best_round(records: Records) -> None:
    summary = records[-1]
    assert isinstance(summary, Summary)
    assert summary.dev is not None
    best = replace(summary.dev, round=4, value=0.875, loss=0.125)

    lines = ending(replace(summary, before=None, after=None, best_round=4, dev=best))
    lossless = ending(replace(summary, before=None, after=None, dev=replace(best, loss=None)))

    assert lines[0] == "dev (best round 4 of 10):"
    assert [line.split() for line in lines[1:3]] == [["accuracy", "0.875"], ["loss", "0.125"]]
    assert [line.split()[0] for line in lossless[1:3]] == ["accuracy", "worst"]


def test_the_rows_of_the_worst_client_are_counted_where_the_run_tells_them(records: Records) -> None:
    summary = records[-1]
    assert isinstance(summary, Summary)
    assert summary.worst_client is not None

    lines = ending(replace(summary, worst_client=replace(summary.worst_client, num_examples=13)))

    assert any("0.500 (client 0, on 13 own rows after round 10)" in line for line in lines)


def test_a_run_ends_with_what_its_evaluator_reports_beside_the_value(records: Records) -> None:
    summary = records[-1]
    assert isinstance(summary, Summary)
    assert summary.before is not None
    assert summary.after is not None
    before = replace(summary.before, numbers={"exact_match": 0.125})
    after = replace(summary.after, numbers={"exact_match": 0.25, "later": 1.0})

    lines = ending(replace(summary, before=before, after=after))

    assert any(line.split() == ["exact_match", "0.125", "->", "0.250"] for line in lines)
    assert not any("later" in line for line in lines)  # with nothing before to compare it with


def test_progress_that_is_switched_off_is_silent(records: Records, capsys: pytest.CaptureFixture[str]) -> None:
    sink = ProgressSink(10, enabled=False)
    for record in records:
        sink.write(record)
    with sink.phase("scoring", 3) as advance:
        advance(1, 3)
    sink.close()

    assert capsys.readouterr().out == ""


def test_a_replay_that_takes_long_is_told_and_one_of_nothing_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    sink = ProgressSink(10)
    for start, rounds in ((0, 1), (10, 4), (4, 4), (0, 0)):
        with sink.replay(rounds, start=start) as advance:
            advance(rounds, rounds)
    sink.close()

    assert capsys.readouterr().out == "replaying 1 round ...\nrestoring the model after 4 rounds ...\n"


def test_a_terminal_that_cannot_draw_is_told_of_rounds_by_plain_lines(
    records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Emacs' shell is."""
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr("fedzo.report.sinks.PLAIN_EVERY_S", -1.0)
    sink = ProgressSink(10)
    with sink.round():
        pass
    sink.write(next(line for line in records if isinstance(line, Round)))
    shown = terminal.getvalue()
    sink.close()

    begun, told = shown.splitlines()
    assert begun == "first round ..."
    assert told.startswith("round 1/10  loss 0.800")


@pytest.mark.parametrize(("stderr", "shown"), [(False, ("measuring ...\n", "")), (True, ("", "measuring ...\n"))])
def test_without_a_terminal_long_work_is_one_plain_line(
    stderr: bool, shown: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with phase("measuring", stderr=stderr, note=lambda: "a note") as advance:
        advance(1, 3)
    with phase("in silence", stderr=stderr, enabled=False) as advance:
        advance(1, 3)

    captured = capsys.readouterr()
    assert (captured.out, captured.err) == shown


def test_on_a_terminal_long_work_is_a_bar_with_a_note_and_standard_output_stays_free(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", terminal)
    for name, value in (("TERM", "xterm"), ("COLUMNS", "150"), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)
    notes = iter(["before", "4 calls [/b]"])

    with phase("rewriting [/b]", stderr=True, note=lambda: next(notes)) as advance:
        advance(1, 7)
        advance(3, 7)
        for _ in range(1000):  # it is drawn now and then
            if "3/7" in terminal.getvalue():
                break
            time.sleep(0.01)
    shown = terminal.getvalue()

    assert "rewriting [/b]" in shown
    assert "3/7 4 calls [/b]" in shown
    assert "..." not in shown
    assert capsys.readouterr().out == ""
