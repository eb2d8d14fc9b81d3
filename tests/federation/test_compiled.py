"""``model.compile``: a whole federation through the compiled forward, beside the eager one and beside itself."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from fedzo.commands.replay import replay_run

Run = Callable[..., Path]
Lines = Callable[[Path, str], list[dict[str, Any]]]

FEW_SHAPES = ("task.max_length=24", "partition.holdout=0", "split.num_dev=0", "split.num_test=2")


@pytest.mark.slow
@pytest.mark.skipif(
    not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")),
    reason="torch.compile needs a C++ compiler on the CPU, and there is none",
)
def test_a_federation_trains_through_the_compiled_forward(
    run: Run, lines: Lines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager = run(*FEW_SHAPES)
    torch._dynamo.reset()
    counters.clear()
    compiled = run(*FEW_SHAPES, "model.compile=true")
    graphs = counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))  # compiled anew
    again = run(*FEW_SHAPES, "model.compile=true")

    assert graphs == 2  # of 2 x 8 tokens, when the decoder is compared with the eager one, and 2 x 24
    ours, own = (scalars(lines(folder, "audit.jsonl")) for folder in (compiled, eager))
    np.testing.assert_allclose(ours, own, rtol=0, atol=2e-3)
    assert not np.array_equal(ours, own)  # another forward it is
    for name in ("public.jsonl", "audit.jsonl"):
        assert (again / name).read_bytes() == (compiled / name).read_bytes()
    assert replay_run(compiled)["digest"] == replay_run(again)["digest"]


def scalars(audit: list[dict[str, Any]]) -> list[float]:
    return [g for line in audit for client in line["clients"] for step in client["g"] for g in step]
