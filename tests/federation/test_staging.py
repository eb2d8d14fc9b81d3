"""Stages that take their time, from the command line: what is kept, told and refused.

Every program is a process of its own, in which the stage of a package of somebody else is found by its entry point.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "third_party"
Lines = Callable[[Path, str], list[dict[str, Any]]]
STAGE = ("preprocess=[marks]", "fl.rounds=1", "evaluation.federated_every_rounds=-1")
Fedzo = Callable[..., tuple[int, str]]


@pytest.fixture
def fedzo(forked_fedzo: Fedzo, tmp_path: Path) -> Fedzo:
    """Runs a command in a working folder of the test's own; returns its exit code and what it said."""
    return partial(forked_fedzo, path=PACKAGE, cwd=tmp_path)


def test_what_a_stage_made_is_found_by_the_next_run_counted_and_proved_on_resume(
    fedzo: Fedzo, overrides: Callable[..., list[str]], lines: Lines, tmp_path: Path
) -> None:
    """One command after another in one working folder."""
    command = ["train", *overrides(*STAGE)]
    first, second = tmp_path / "first", tmp_path / "second"

    code, said = fedzo(*command, "report.html=true", "preprocess.marks.seconds=0.02", f"hydra.run.dir={first}")
    assert code == 0, said
    kept = tmp_path / "rephrase" / "marks.jsonl"
    setup, *_ = lines(first, "metrics.jsonl")
    assert len(kept.read_text().splitlines()) == sum(client["num_train"] for client in setup["clients"])
    for client in setup["clients"]:
        assert client["stages"] == {"marks.marked": client["num_train"], "marks.share of the gate": 0.5}
    assert json.loads((first / "run.json").read_text())["preprocess"][0]["mark"] == "custom"  # by the task
    assert "rewriter" not in json.loads((first / "run.json").read_text())
    report = (first / "report.html").read_text()
    assert "Preprocess stages" in report
    assert "marks.share of the gate" in report

    text = kept.read_text()
    code, said = fedzo(*command, f"hydra.run.dir={second}")
    assert code == 0, said
    assert kept.read_text() == text
    chains = [lines(folder, "public.jsonl")[0]["c"] for folder in (first, second)]
    assert chains[0] == chains[1]

    kept.write_text(text.replace(" custom", " costume"))
    code, said = fedzo("resume", str(first), "fl.rounds=2")
    assert code != 0
    assert "refusal 2, its rows are not those that it began the run with" in said
    assert "rows of client 0 after preprocess=marks: they must be the" in said
    assert "A stage gave other text. Put back what it kept at that time" in said
    kept.write_text(text)
    code, said = fedzo("resume", str(first), "fl.rounds=2")
    assert code == 0, said
    assert len(lines(first, "public.jsonl")) == 2


def test_a_stage_that_needs_a_rewriter_says_which_key_to_set_before_any_work(
    fedzo: Fedzo, overrides: Callable[..., list[str]], tmp_path: Path
) -> None:
    command = overrides(*STAGE, "preprocess.marks.by_rewriter=true", "model.name=/nowhere/at/all")

    code, said = fedzo("train", *command, f"hydra.run.dir={tmp_path / 'run'}")

    assert code != 0
    assert "rewriter must name who rewrites text for preprocess=[marks], got 'none'. Set rewriter=" in said


@pytest.mark.net
@pytest.mark.timeout(400)
def test_clients_whose_stages_take_longer_than_startup_s_take_part_and_status_shows_them(
    overrides: Callable[..., list[str]], lines: Lines, tmp_path: Path
) -> None:
    """Processes of their own; four training rows of each of two clients take 8 s each."""
    (tmp_path / "data").mkdir()
    for client in range(2):
        rows = [{"text": f"site {client} says {['bad', 'good'][i % 2]} {i}", "label": i % 2} for i in range(4)]
        (tmp_path / "data" / f"{client}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows_of_each = f"data.path='{tmp_path}/data/{{client}}.jsonl'"
    settings = [
        *("partition=own", "partition.holdout=0", "trainer.calibration=imdb", "evaluation.central=false", rows_of_each),
        *("fl.num_clients=2", "runtime=local", "strategy.startup_s=30", "preprocess.marks.seconds=8"),
    ]
    path = os.pathsep.join([str(PACKAGE), *sys.path])
    run = tmp_path / "run"
    command = [sys.executable, "-m", "fedzo", "train", *overrides(*STAGE, *settings), f"hydra.run.dir={run}"]
    environment = {**os.environ, "PYTHONPATH": path}
    seen: set[str] = set()
    shown = False
    with subprocess.Popen(
        command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as training:
        while training.poll() is None:
            if (run / "presence.json").exists():
                told = json.loads((run / "presence.json").read_text())
                new = {f"{row['state']}: {row['why']}" for row in told["clients"]} - seen
                seen |= new
                if not shown and any(state.startswith("preparing") for state in new):
                    shown = True
                    status = [sys.executable, "-m", "fedzo", "status", str(run)]
                    assert " preparing " in subprocess.check_output(status, env=environment, cwd=tmp_path, text=True)
            time.sleep(1.0)
        assert training.returncode == 0, training.stdout.read() if training.stdout else ""

    setup, *_ = lines(run, "metrics.jsonl")
    assert shown
    assert setup["seconds"] > 4 * 8 > 30
    assert "preparing: preparing, 2 of 4 rows" in seen
    assert lines(run, "public.jsonl")[0]["attendance"] == [0, 1]
