"""What a tiny federation writes is read by the strict decoder, and written again byte for byte."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedzo.commands.resume import resume_run
from fedzo.errors import RunFolderError
from fedzo.records.decode import decode, parse_json, to_json
from fedzo.records.log import ScalarAuditLine, ScalarLine
from fedzo.records.metrics import METRIC_KINDS, decode_metric
from fedzo.run import start

READ: dict[str, Callable[..., object]] = {
    "public.jsonl": lambda value, **told: decode(ScalarLine, value, **told),
    "audit.jsonl": lambda value, **told: decode(ScalarAuditLine, value, **told),
    "metrics.jsonl": decode_metric,
}


def test_every_kind_of_record_comes_back_byte_for_byte(run: Callable[..., Path]) -> None:
    vpcs = ["step_policy=vpcs", "step_policy.calibration_steps=4", "step_policy.initial_steps=2"]
    folder = run(
        *[*vpcs, "step_policy.later_steps=2", "fl.local_steps=2", "faults.absent=['1@1']", "fl.directions=pool"],
        "partition.holdout=0.2",
    )
    resume_run(folder, rounds=4)

    seen = set()
    for name, read in READ.items():
        for number, line in enumerate((folder / name).read_bytes().splitlines(), start=1):
            told = {"where": f"{name}, line {number}", "error": RunFolderError}
            record = read(parse_json(line, **told), **told)
            assert to_json(record).encode() == line
            seen.add(type(record))

    assert seen == {ScalarLine, ScalarAuditLine, *METRIC_KINDS.values()}


def test_what_a_step_costs_and_how_long_the_trainer_was_prepared_is_told_before_the_first_round(
    run: Callable[..., Path],
    lines: Callable[[Path, str], list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter([10.0, 12.5])
    monkeypatch.setattr(start, "time", SimpleNamespace(monotonic=lambda: next(clock)))

    setup = lines(run("estimator.num_probes=3", "fl.rounds=1"), "metrics.jsonl")[0]

    assert setup["forwards_per_step"] == 6  # two a probe
    assert setup["prepare_seconds"] == 2.5
    assert setup["forwards"].keys() == {"dtype", "products", "tokens_per_batch"}


def test_rows_that_are_cut_are_counted_and_told_before_the_first_round(
    run: Callable[..., Path],
    lines: Callable[[Path, str], list[dict[str, Any]]],
    data_dir: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    longest = 36  # tokens, which are bytes here: "Text: ", the text, "\\nVerdict:" (no line end), " good"
    with caplog.at_level(logging.WARNING):
        folder = run(f"task.max_length={longest}", "fl.rounds=1", "partition.holdout=0.2")

    setup = lines(folder, "metrics.jsonl")[0]
    expected = {
        name: [6 + len(row["text"]) + 10 + 5 > longest for row in lines(data_dir, f"{name}.jsonl")]
        for name in ("train", "dev", "test")
    }
    told = setup["cut_rows"]
    assert all(0 < sum(cut) < len(cut) for cut in expected.values())
    for name in ("dev", "test"):
        assert told[name] == [sum(expected[name]), len(expected[name])]
    assert [sum(pair) for pair in zip(told["train"], told["heldout"], strict=True)] == [sum(expected["train"]), 64]
    assert told["heldout"][1] == sum(client["num_heldout"] for client in setup["clients"])
    [message] = [text for text in caplog.messages if "truncates rows" in text]
    cut, whole = told["dev"]
    assert f"task.max_length={longest} truncates rows" in message
    assert f"dev {cut} of {whole} (" in message


def test_a_run_without_a_cut_row_is_told_nothing(run: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        run("task.max_length=64", "fl.rounds=1")

    assert not [text for text in caplog.messages if "truncates rows" in text]
