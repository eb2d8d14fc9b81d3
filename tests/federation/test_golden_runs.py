"""Whole runs against recorded ones: a change of structure must leave every chain and digest as it was.

The recorded numbers hold where forwards have the bits of the recording machine; elsewhere these tests are skipped.
Record anew, after a change that is listed under *Numerics* in the changelog, with ``FEDZO_RECORD=1``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

GOLDEN = Path(__file__).with_name("golden_runs.json")
T3, T2 = "fl.local_steps=3", "fl.local_steps=2"
RUNS: dict[str, list[str]] = {
    "meerkat": [],
    "meerkat magnitude": ["trainer.selector=magnitude"],
    "meerkat random everywhere": ["trainer.selector=random", "trainer.granularity=everywhere"],
    "mezo": ["trainer=mezo"],
    "mezo in bfloat16, stochastic": ["trainer=mezo", "model.dtype=bfloat16", "trainer.rounding=stochastic"],
    "lora": ["trainer=lora", T2],
    "ia3": ["trainer=ia3"],
    "prefix": ["trainer=prefix", "task.max_length=64"],
    "prompt": ["trainer=prompt", "task.max_length=64"],
    "tables": ["trainer=tables", T2],
    "one_sided": ["estimator=one_sided", "estimator.num_probes=3"],
    "fzoo": ["estimator=fzoo"],
    "two_point, 2 probes, T = 3": ["estimator.num_probes=2", T3],
    "momentum": ["server_optimizer=momentum", "server_optimizer.schedule=cosine", "server_optimizer.warmup_rounds=1"],
    "adam with decay": ["server_optimizer=adam", "server_optimizer.weight_decay=0.1"],
    "scaffold": ["server_optimizer=scaffold", T2],
    "feddyn": ["server_optimizer=feddyn", T2],
    "own directions": ["fl.directions=per_client", T2],
    "pool of directions": ["fl.directions=pool", T2],
    "values": ["fl.transport=values", T2],
    "median": ["strategy=median"],
    "trimmed mean": ["strategy=trimmed_mean", "strategy.trim_share=0.3"],
    "majority of signs": ["strategy=majority_sign"],
    "by size, dirichlet": ["strategy=size", "partition=dirichlet", "partition.alpha=1.0"],
    "dirichlet_equal": ["partition=dirichlet_equal", "partition.num_extreme=1"],
    "shards": ["partition=shards"],
    "natural": ["partition=natural", "partition.column=site"],
    "sampled, clipped, absent": ["strategy.clients_per_round=3", "strategy.clip_factor=2", "faults.absent=['1@1']"],
    "vpcs": ["step_policy=vpcs", "step_policy.calibration_steps=6", "step_policy.initial_steps=3",
             "step_policy.later_steps=3", T3],
    "cusum": ["step_policy=cusum", "step_policy.threshold=0.5", T3],
    "random step policy": ["step_policy=random", T3],
    "oracle": ["step_policy=oracle", "partition=extreme", "partition.num_extreme=1", T3],
    "joint forwards": ["runtime=inline_batched", T3],
    "decomfl": ["experiment=decomfl", "trainer=mezo"],
    "fedkseed": ["experiment=fedkseed", "trainer=mezo"],
    "feedsign": ["experiment=feedsign", "trainer=mezo"],
    "backprop": ["estimator=backprop", "server_optimizer.lr=0.1", T2],
    "backprop, lora, adamw, sampled": ["estimator=backprop", "estimator.local_optimizer=adamw", "trainer=lora",
                                       "server_optimizer.lr=0.01", "strategy.clients_per_round=3", T2],
    "backprop, tables, adamw": ["estimator=backprop", "estimator.local_optimizer=adamw", "trainer=tables",
                                "server_optimizer.lr=1e-3", T2],
    "backprop, all weights, trimmed mean": ["estimator=backprop", "trainer=mezo", "server_optimizer.lr=0.01",
                                            "strategy=trimmed_mean", "strategy.trim_share=0.3"],
}  # fmt: skip


def told(folder: Path, lines: Callable[[Path, str], list[dict[str, Any]]]) -> dict[str, Any]:
    """What a run's log ends with, and the loss and the weights of the base model, which tell machines apart."""
    last = lines(folder, "public.jsonl")[-1]
    scores = [line for line in lines(folder, "metrics.jsonl") if line["kind"] == "score"]
    return {
        "base_loss": scores[0]["loss"],
        "base_digest": json.loads((folder / "run.json").read_text())["base"]["weights_digest"],
        "chain": last["chain"],
        "digest": last["digest"],
        "loss": scores[-1]["loss"],
    }


@pytest.fixture(scope="session")
def machine(tiny_model_dir: Path) -> str:
    """What tells machines apart, without fedzo: the bits of plain forwards."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with torch.inference_mode():
        logits = [model(input_ids=torch.arange(7 * rows).view(rows, 7) % 256).logits for rows in (1, 2, 8)]
    return hashlib.sha256(b"".join(each.numpy().tobytes() for each in logits)).hexdigest()


@pytest.mark.parametrize("name", RUNS)
def test_a_run_ends_as_the_recorded_one(
    name: str, machine: str, run: Callable[..., Path], lines: Callable[[Path, str], list[dict[str, Any]]]
) -> None:
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}

    got = told(run(*RUNS[name]), lines)

    if os.environ.get("FEDZO_RECORD"):
        GOLDEN.write_text(json.dumps({**golden, "machine": machine, name: got}, indent=1) + "\n")
        pytest.skip("recorded")
    if got["base_digest"] != golden[name]["base_digest"]:
        # only a sketch's: its codes come from decompositions, which differ more widely than forwards
        assert "trainer=tables" in RUNS[name]
        pytest.skip("the decompositions of this machine have other last bits than those of the recording one")
    if machine != golden["machine"] and got["base_loss"] != golden[name]["base_loss"]:
        pytest.skip("the forwards of this machine have other last bits than those of the recording one")
    assert got == golden[name]
