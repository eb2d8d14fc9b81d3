"""Sinks: TensorBoard events read back, and what a person sees without a terminal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedzo.report.sinks import ProgressSink, TensorBoardSink

MakeRun = Callable[..., Path]


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_tensorboard_reads_back_what_was_written(make_run: MakeRun) -> None:
    folder = make_run()
    sink = TensorBoardSink(folder)
    for record in records(folder):
        sink.write(record)
    sink.close()

    events = EventAccumulator(str(folder / "tensorboard")).Reload()

    losses = [(event.step, event.value) for event in events.Scalars("round/loss")]
    wanted = [(r, 0.8 - 0.03 * r) for r in range(10) if r != 4]  # a loss that was not finite is left out
    assert [step for step, _ in losses] == [step for step, _ in wanted]
    assert [value for _, value in losses] == pytest.approx([value for _, value in wanted])
    assert [(e.step, round(e.value, 5)) for e in events.Scalars("dev/accuracy")] == [(0, 0.54), (10, 0.75)]


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
    assert "240 B (11 kB as messages, with set-up)" in out


def test_progress_that_is_switched_off_is_silent(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    sink = ProgressSink(10, enabled=False)
    for record in records(make_run()):
        sink.write(record)
    with sink.phase("scoring", 3) as advance:
        advance(1, 3)
    sink.close()

    assert capsys.readouterr().out == ""
