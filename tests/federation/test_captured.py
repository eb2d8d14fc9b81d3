"""``model.cuda_graphs``: where a run takes graphs, and that its shapes, replies and resumption are right with them.

What a graph is made of and reads is the matter of ``tests/unit/models/test_captured.py``; here work is done again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedzo.commands.replay import replay_run
from fedzo.commands.resume import resume_run
from fedzo.commands.train import start_run
from fedzo.config.load import load
from fedzo.errors import ConfigError
from fedzo.models.captured import CudaGraph

Run = Callable[..., Path]
GRAPHS = "model.cuda_graphs=true"


def audit_of(folder: Path) -> list[Any]:
    return [json.loads(line)["clients"] for line in (folder / "audit.jsonl").read_text().splitlines()]


def check_scalars(folder: Path, twin: Path) -> None:
    """Losses are float32 near 0.7: an error of 2e-7 each is 2e-4 in g at eps = 1e-3; ten times that is let by."""
    for lines in zip(audit_of(folder), audit_of(twin), strict=True):
        mine, theirs = (np.array([client["g"] for client in line]) for line in lines)
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("settings", "graphs"),
    [
        (["fl.local_steps=2"], 1),
        (["fl.local_steps=2", "runtime.batch_clients=true"], 2),
        (["trainer=lora", "trainer.first_layer=1"], 2),
        (["server_optimizer=scaffold", "fl.local_steps=2"], 1),
    ],
    ids=lambda settings: str(settings),
)
def test_a_run_through_graphs_is_the_eager_run(
    run: Run, settings: list[str], graphs: int, graphs_on_cpu: list[str]
) -> None:
    eager = run(*settings)
    assert not graphs_on_cpu

    captured = run(*settings, GRAPHS)

    assert len(graphs_on_cpu) == graphs
    check_scalars(captured, eager)
    assert audit_of(captured) != audit_of(eager)  # at padded shapes
    assert replay_run(captured)["rounds"] == 3


def test_a_run_through_graphs_is_resumed_as_it_would_go_on(run: Run, graphs_on_cpu: list[str]) -> None:
    unbroken = run(GRAPHS)
    broken = run(GRAPHS, "fl.rounds=2")

    resume_run(broken, rounds=3)

    assert audit_of(broken) == audit_of(unbroken)


@pytest.mark.parametrize("settings", [["estimator.freeze_routing=true"], ["estimator=backprop"]])
def test_what_cannot_go_through_graphs_does_not(
    overrides: Callable[..., list[str]], tmp_path: Path, settings: list[str], graphs_on_cpu: list[str]
) -> None:
    with pytest.raises(ConfigError, match=r"model\.cuda_graphs must be left out for estimator"):
        load(overrides(*settings, GRAPHS))
    config = load(overrides(*settings))
    config.model.cuda_graphs = True  # as a site's file may say

    start_run(config, tmp_path / "run", overrides=[])

    assert not graphs_on_cpu


def test_there_are_no_graphs_on_a_cpu(run: Run) -> None:
    assert audit_of(run(GRAPHS)) == audit_of(run())


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [["trainer=meerkat"], ["trainer=mezo", "trainer.lr=1e-4"], ["trainer=lora"]])
def test_a_run_through_cuda_graphs_is_the_eager_run(
    run: Run, settings: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[CudaGraph] = []
    own = CudaGraph.replay
    monkeypatch.setattr(CudaGraph, "replay", lambda graph: (made.append(graph), own(graph))[1])
    eager = run(*settings, "device=cuda")
    assert not made

    captured = run(*settings, "device=cuda", GRAPHS)

    assert made
    assert "CUDA graphs" not in caplog.text
    check_scalars(captured, eager)
    assert replay_run(captured)["rounds"] == 3
