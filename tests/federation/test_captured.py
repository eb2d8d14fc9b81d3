"""``model.cuda_graphs``: where a run takes graphs, and that its shapes, replies and resumption are right with them.

What a graph is made of and reads is the matter of ``tests/unit/models/test_captured.py``; here work is done again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedzo.commands.replay import replay_run
from fedzo.commands.resume import resume_run
from fedzo.commands.train import start_run
from fedzo.config.load import load
from fedzo.errors import ConfigError
from fedzo.fl.client.worker import ClientWorker
from fedzo.models import captured
from fedzo.models.captured import Captures, CudaGraph
from fedzo.run import process
from fedzo.system import warn_once

Run = Callable[..., Path]
GRAPHS = "model.cuda_graphs=true"
TOGETHER = "runtime.batch_clients=true"


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
        (["fl.local_steps=2", TOGETHER], 1),
        (["trainer=lora", "trainer.first_layer=1"], 2),
        (["trainer=tables"], 1),
        (["trainer=mezo", "trainer.lr=1e-4"], 1),
        (["server_optimizer=scaffold", "fl.local_steps=2"], 1),
    ],
    ids=lambda settings: str(settings),
)
def test_a_run_through_graphs_is_the_eager_run(
    run: Run, settings: list[str], graphs: int, graphs_on_cpu: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all weights trained the work makes the perturbed ones when it is done again, which needs no kernels here."""
    eager = run(*settings)
    assert not graphs_on_cpu
    kernels = SimpleNamespace(write_draw=lambda key, scale: None, reading_later=nullcontext)
    monkeypatch.setattr("fedzo.zo.perturb.fused", lambda device: kernels)

    captured = run(*settings, GRAPHS)

    assert len(graphs_on_cpu) == graphs
    check_scalars(captured, eager)
    assert audit_of(captured) != audit_of(eager)  # at padded shapes
    assert replay_run(captured)["rounds"] == 3


@pytest.mark.parametrize("settings", [["trainer=meerkat"], ["trainer=tables"], ["trainer.first_layer=1"]])
def test_clients_share_their_later_steps_beside_graphs(
    run: Run, settings: list[str], graphs_on_cpu: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In eager forwards, for a graph knows no rows with weights of their own; only first steps are replayed."""
    replays: list[str] = []
    own, train = captured._Captured.run, ClientWorker.train

    def counted(graph: Any, *given: Any) -> Any:
        replays.append("a replay")
        return own(graph, *given)

    def without_forwards(worker: ClientWorker, request: Any) -> Any:
        counter = process._open.process.peer.loaded.counter
        before = counter.num_forwards
        reply = train(worker, request)
        assert counter.num_forwards == before  # they were made together
        return reply

    monkeypatch.setattr(captured._Captured, "run", counted)
    monkeypatch.setattr(ClientWorker, "train", without_forwards)
    run(TOGETHER, GRAPHS, *settings)
    of_one_step = len(replays)
    replays.clear()

    run(TOGETHER, GRAPHS, "fl.local_steps=3", *settings)

    assert len(replays) == of_one_step > 0


def test_what_cannot_be_captured_is_told_once_however_often_a_run_tries(
    run: Run, graphs_on_cpu: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """To choose its dtype it captures the model in float32 and in bfloat16, and to train it once more."""
    warn_once.cache_clear()
    tried: list[str] = []
    own = Captures._give_up

    def refused(ours: Any, eager: Any) -> None:
        raise RuntimeError("operation not permitted")

    def counted(captures: Captures, error: Exception) -> None:
        tried.append(str(error))
        own(captures, error)

    monkeypatch.setattr("fedzo.run.peer.rounded_products", lambda device: None)
    monkeypatch.setattr(captured, "_compare", refused)
    monkeypatch.setattr(Captures, "_give_up", counted)
    run("model.dtype=auto", GRAPHS, "fl.rounds=1")

    assert len(tried) == 3
    assert len([message for message in caplog.messages if "cannot run as CUDA graphs" in message]) == 1


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


def test_there_are_no_graphs_on_a_cpu(run: Run, finished: Run) -> None:
    assert audit_of(run(GRAPHS)) == audit_of(finished())


@pytest.mark.gpu
@pytest.mark.parametrize(
    "settings", [["trainer=meerkat"], ["trainer=mezo", "trainer.lr=1e-4"], ["trainer=lora"], ["trainer=tables"]]
)
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
