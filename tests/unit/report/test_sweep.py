"""The table of a sweep holds every job, the failed ones too."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

from fedzo.report.sweep import write_sweep_report

MakeRun = Callable[..., Path]


def test_the_table_has_a_row_a_job_with_what_varies(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("0", trainer="meerkat", fl__local_steps="1")
    make_run("1", trainer="mezo", fl__local_steps="1")
    make_run("2", trainer="lora", fl__local_steps="1", lines=[])

    page = write_sweep_report(tmp_path)

    assert page is not None
    with (tmp_path / "sweep.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0][:5] == ["job", "trainer", "state", "before", "after"]
    assert rows[0][5:8] == ["best_round", "worst_client", "flagged"]
    assert [row[6:8] for row in rows[1:3]] == [["0.5", ""], ["0.5", ""]]
    assert [row[:5] for row in rows[1:3]] == [
        ["0", "meerkat", "finished", "0.555", "0.765"],
        ["1", "mezo", "finished", "0.555", "0.765"],
    ]
    assert rows[3] == ["2", "lora", "failed"]
    assert "must hold at least one record" in page.read_text()
    assert (tmp_path / "sweep.md").read_text().count("\n") == 5


def test_a_folder_without_jobs_has_no_report(tmp_path: Path) -> None:
    assert write_sweep_report(tmp_path) is None
