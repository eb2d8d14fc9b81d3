"""Other papers' methods as settings of a federation, against what their papers write down."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fedzo.runs import rebuild
from fedzo.zo.directions import stream_key

Run = Callable[..., Path]
Lines = Callable[[Path, str], list[dict[str, Any]]]


def test_feedsign_sends_bits_and_its_local_steps_can_be_replayed_from_the_audit_log(run: Run, lines: Lines) -> None:
    folder = run("strategy=majority_sign", "fl.local_steps=3", "estimator.num_probes=2", "optimizer.lr=1e-3")

    audit, metrics = lines(folder, "audit.jsonl"), lines(folder, "metrics.jsonl")
    g = np.array([[entry["g"] for entry in line["clients"]] for line in audit])  # [R, K, T, P]
    assert set(np.unique(g)) <= {-1.0, 0.0, 1.0}
    assert {line["payload_up_bytes"] for line in metrics if line["kind"] == "round"} == {4 * 1}  # six bits a client
    c = np.array([line["c"] for line in lines(folder, "public.jsonl")])[..., 0]
    assert np.array_equal(c, np.sign(g.sum(axis=1)) / 2)

    for line in audit:
        replica = rebuild(folder, rounds=line["round"]).replica
        start = replica.space.values()
        for entry in line["clients"]:
            replica.space.load(start)
            for t, row in enumerate(entry["g"]):
                for p, sign in enumerate(row):
                    key = stream_key(0, round=line["round"], step=t, probe=p)
                    replica.space.step(float(np.float32(np.float32(1e-3) * np.float32(sign / 2))), key)
            assert replica.space.check() == entry["end_check"]
