"""Sinks: TensorBoard events read back, and what a person sees without a terminal."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedzo.errors import RunFolderError
from fedzo.records.metrics import (
    CentralScore,
    Flagged,
    FlaggedClient,
    MetricRecord,
    Round,
    Summary,
    decode_metric,
)
from fedzo.report.sinks import ProgressSink, TensorBoardSink, ending

MakeRun = Callable[..., Path]


def records(folder: Path) -> list[MetricRecord]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [decode_metric(json.loads(line), where="metrics", error=RunFolderError) for line in lines]


def test_tensorboard_reads_back_what_was_written(make_run: MakeRun) -> None:
    folder = make_run()
    sink = TensorBoardSink(folder)
    for record in records(folder):
        sink.write(record)
    sink.close()

    events = EventAccumulator(str(folder / "tensorboard")).Reload()

    losses = [(event.step, event.value) for event in events.Scalars("round/loss")]
    wanted = [(r + 1, 0.8 - 0.03 * r) for r in range(10) if r != 4]  # a loss that was not finite is left out
    assert [step for step, _ in losses] == [step for step, _ in wanted]
    assert [value for _, value in losses] == pytest.approx([value for _, value in wanted])
    assert [(e.step, round(e.value, 5)) for e in events.Scalars("dev/answers/accuracy")] == [(0, 0.54), (10, 0.75)]


def test_tensorboard_of_a_resumed_run_keeps_what_was_before_and_drops_what_a_kill_left(make_run: MakeRun) -> None:
    folder = make_run()
    told = records(folder)
    for completed in (0, 6):
        sink = TensorBoardSink(folder, completed=completed)
        for record in told:
            if isinstance(record, Round) and (record.round < 8 if completed == 0 else record.round >= completed):
                sink.write(record)
        if completed == 0:
            sink.write(replace(next(r for r in told if isinstance(r, CentralScore) and r.split == "dev"), round=6))
        sink.close()

    events = EventAccumulator(str(folder / "tensorboard")).Reload()

    assert [event.step for event in events.Scalars("round/payload_up_bytes")] == list(range(1, 11))
    assert [event.step for event in events.Scalars("dev/answers/accuracy")] == [6]


def test_tensorboard_drops_a_first_round_that_a_kill_left_uncommitted(make_run: MakeRun) -> None:
    folder = make_run()
    told = records(folder)
    for _ in range(2):  # its metrics are written before its log line
        sink = TensorBoardSink(folder, completed=0)
        sink.write(next(record for record in told if isinstance(record, Round)))
        sink.close()

    events = EventAccumulator(str(folder / "tensorboard")).Reload()

    assert [event.step for event in events.Scalars("round/payload_up_bytes")] == [1]


def test_without_a_terminal_plain_lines_tell_rounds_bytes_time_and_the_result(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    sink = ProgressSink(10)
    for record in records(make_run()):
        sink.write(record)
    sink.close()

    out = capsys.readouterr().out
    assert "106,020 of 134,515,008 weights trained (0.079 %), 3 clients, 90 training rows" in out
    assert "estimate: 500 MB of memory for a step, 1 min 40 s" in out
    assert "round 10/10  loss 0.530" in out
    assert "up 2.4 kB  down 9.0 kB" in out
    assert "0.555 -> 0.765" in out
    assert "worst client's accuracy          0.500 (client 0, on its own rows after round 10)" in out
    assert "flagged" not in out
    assert "240 B (11 kB as messages, with set-up)" in out


def test_a_calibration_is_named_and_no_measure_of_the_time_that_is_left(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedzo.report.sinks.PLAIN_EVERY_S", -1.0)
    sink = ProgressSink(10)
    first, second, *_ = (line for line in records(make_run()) if isinstance(line, Round))
    sink.write(replace(first, calibration=True, round_seconds=1000.0))
    sink.write(second)
    sink.close()

    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("round 1/10  (calibration)  loss 0.800")
    assert lines[1].startswith("round 2/10  loss 0.770")
    assert [line.rpartition("left ")[2] for line in lines] == ["n/a", "8.0 s"]


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
def test_a_run_without_test_rows_ends_with_its_worst_client_whom_it_flagged_and_bytes(
    make_run: MakeRun, step_policy: Flagged, words: str
) -> None:
    summary = records(make_run())[-1]
    assert isinstance(summary, Summary)

    lines = ending(replace(summary, before=None, after=None, step_policy=step_policy))

    assert lines[0] == "after 10 rounds:"
    assert [line[2:34].rstrip() for line in lines[1:]] == [
        "worst client's accuracy",
        "flagged clients",
        "scalars, all clients, both ways",
    ]
    assert words in lines[2]


def test_progress_that_is_switched_off_is_silent(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    sink = ProgressSink(10, enabled=False)
    for record in records(make_run()):
        sink.write(record)
    with sink.phase("scoring", 3) as advance:
        advance(1, 3)
    sink.close()

    assert capsys.readouterr().out == ""
