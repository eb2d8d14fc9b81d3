"""``fedzo replay``: what a user sees of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fedzo.commands.evaluate import evaluate_run
from fedzo.commands.replay import replay_run
from fedzo.commands.resume import resume_run

Run = Callable[..., Path]


def test_every_replay_is_told_as_it_may_take_hours(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """All dev losses are equal, so the first model is the best one."""
    folder = run("trainer=mezo", "server_optimizer.lr=0", "fl.rounds=2", "report.progress=true")
    shown = capsys.readouterr().out.splitlines()
    resume_run(folder)
    resumed = capsys.readouterr().out.splitlines()
    replay_run(folder)
    replayed = capsys.readouterr()
    evaluate_run(folder, split="test")

    back = "restoring the model after 0 rounds ..."
    assert shown.count(back) == resumed.count(back) == 1
    assert "replaying 2 rounds ..." in resumed
    assert not any("replaying" in line for line in shown)
    assert (replayed.out, replayed.err) == ("", "replaying 2 rounds ...\n")
    assert "replaying" not in "".join(capsys.readouterr())
