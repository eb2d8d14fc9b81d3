"""The experiment with lying clients: that they lie, and that nobody else does."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from fedzo.bench.claims import metric_lines
from fedzo.commands.train import start_run
from fedzo.config.load import load
from fedzo.testing.tiny_models import save_tiny_model

FOLDER = Path(__file__).parents[3] / "experiments" / "network"


@pytest.fixture
def hostile(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("hostile")


def test_liars_alone_measure_or_send_something_else(hostile: Any, tmp_path: Path) -> None:
    """In the first round, where all are at the same model whatever was sent; the last of three clients is honest."""
    save_tiny_model(tmp_path / "model")
    words = ["experiment=tiny", "trainer=mezo", f"model.name={tmp_path / 'model'}", "fl.num_clients=3"]
    config = load([*words, "trainer.lr=1e-2", "trackers=[]", "device=cpu", "split.num_dev=0", "split.num_test=0"])

    def first_round(factor: float | None) -> tuple[set[int], dict[int, Any]]:
        folder = tmp_path / f"{factor}"
        with hostile.lies(factor) as told:
            start_run(config, folder, overrides=[])
        clients = metric_lines(folder, "round")[0]["clients"]
        return {*told}, {each["client"]: (each["loss"], each["abs_g"]) for each in clients}

    nobody, honest = first_round(1.0)
    flipping, of_other_labels = first_round(None)
    scaling, of_other_scalars = first_round(2.0)

    assert (nobody, flipping, scaling) == (set(), {*hostile.HOSTILE}, {*hostile.HOSTILE})
    for sent in (of_other_labels, of_other_scalars):
        assert {client for client in honest if sent[client] != honest[client]} == {*hostile.HOSTILE}


def test_a_run_in_which_nobody_lied_is_no_result(hostile: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As where training takes its rows from somewhere else."""
    monkeypatch.setattr(hostile, "load", lambda settings: None)
    monkeypatch.setattr(hostile, "start_run", lambda *args, **words: None)

    with pytest.raises(SystemExit, match=r"labels flipped: clients \(0, 1\) alone must lie, got {}"):
        hostile.run(tmp_path, "labels flipped", "median", tmp_path / "mask", first=False)
