"""A realistic run folder, written from numbers that the tests can look up again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

Records = list[dict[str, Any]]
LABELS = ((12, 828), (400, 420), (90, 60), (700, 20), (310, 330), (5, 240), (512, 500), (150, 610))


def _noise(*parts: int) -> float:
    """A deterministic number of [-1, 1) from whole numbers; no generator needed."""
    state = 2166136261
    for part in parts:
        state = ((state ^ (part + 17)) * 16777619) % 2**32
    state ^= state >> 15
    return ((state * 2246822519) % 2**32) / 2**31 - 1


def make_records(*, num_rounds: int = 75, num_clients: int = 8, finished: bool = True) -> Records:
    """The records of a run like the quickstart."""
    shares = [LABELS[client % len(LABELS)] for client in range(num_clients)]
    setup_clients = [
        {"client": c, "num_train": sum(n), "num_heldout": sum(n) // 9, "label_counts": {"0": n[0], "1": n[1]}}
        for c, n in enumerate(shares)
    ]
    records: Records = [
        {
            "kind": "setup", "seconds": 8.1, "num_params": 134515008, "space_size": 134392, "trainer": "meerkat",
            "clients": setup_clients, "setup_down_bytes": 537568 * num_clients,
            "estimate": {"memory_bytes": 812345678, "seconds": 260.0},
        },
        score_record(0, split="test", value=0.5488, auc=0.7421, best=0.6895, seconds=30.0),
        score_record(0, split="dev", value=0.5547, auc=0.7502, best=0.7012, seconds=38.0),
    ]  # fmt: skip
    for r in range(num_rounds):
        fade = math.exp(-r / 28)
        present = [c for c in range(num_clients) if not (c == 3 and r in (20, 21))]
        clients = [
            {
                "client": c, "loss": round(0.47 + 0.34 * fade + 0.22 * _noise(r, c), 4), "steps": 1,
                "abs_g": round(abs(_noise(r, c, 1)) * (9 + 22 * shares[c][1] / sum(shares[c])) * (0.5 + fade), 3),
            }
            for c in present
        ]  # fmt: skip
        records.append(
            {
                "kind": "round", "round": r, "seconds": 40 + 2.6 * (r + 1), "round_seconds": 2.6,
                "loss": round(sum(c["loss"] for c in clients) / len(clients), 4), "step_norm": 0.03,
                "mean_abs_g": round(sum(c["abs_g"] for c in clients) / len(clients), 3),
                "payload_up_bytes": 4 * len(present), "payload_down_bytes": 4 * len(present),
                "message_up_bytes": 389 * len(present), "message_down_bytes": 512 * len(present),
                "dropped_probes": 1 if r == 40 else 0, "absent": [c for c in range(num_clients) if c not in present],
                "clients": clients,
            }
        )  # fmt: skip
        if (r + 1) % 15 == 0:
            value = round(0.555 + 0.225 * (1 - math.exp(-(r + 1) / 25)) + 0.012 * _noise(r), 4)
            records.append(score_record(r + 1, split="dev", value=value, auc=0.85, best=0.79, seconds=42 + 2.6 * (r + 1)))
    if finished:
        records += _ending(num_rounds, num_clients, shares, records)
    return records


def score_record(round_index: int, *, split: str, value: float, auc: float, best: float, seconds: float) -> dict[str, Any]:
    """One score record; the two classes are 512 test rows each."""
    total = 1024 if split == "test" else 256
    return {
        "kind": "score", "split": split, "round": round_index, "seconds": seconds, "metric": "accuracy", "value": value,
        "loss": round(1.1 - 0.7 * value, 4), "num_examples": total, "auc": auc, "best_threshold_accuracy": best,
        "per_class": {"0": [round(total / 2 * (1.9 * value - 0.9)), total // 2], "1": [round(total * 0.46), total // 2]},
    }  # fmt: skip


def _ending(num_rounds: int, num_clients: int, shares: list[tuple[int, int]], earlier: Records) -> Records:
    after = score_record(num_rounds, split="test", value=0.7715, auc=0.8613, best=0.7861, seconds=262.0)
    federated = [
        {
            "kind": "federated_score", "round": round_index, "seconds": 40.0 + 3 * round_index, "metric": "accuracy",
            "value": base, "loss": 0.51, "worst_client": round(base - 0.15, 4), "per_class": {"0": [70, 113], "1": [172, 200]},
            "clients": [
                {"client": c, "value": round(base + 0.15 * _noise(c, round_index), 4), "loss": 0.5, "num_examples": min(64, sum(n) // 9)}
                for c, n in enumerate(shares)
            ],
        }
        for round_index, base in ((0, 0.56), (num_rounds, 0.7731))
    ]  # fmt: skip
    rounds = [record for record in earlier if record["kind"] == "round"]
    totals = {
        key: sum(record[key] for record in rounds)
        for key in ("payload_up_bytes", "payload_down_bytes", "message_up_bytes", "message_down_bytes")
    }
    before = next(record for record in earlier if record["kind"] == "score" and record["split"] == "test")
    summary = {
        "kind": "summary", "seconds": 268.4, "rounds": num_rounds, "best_round": num_rounds, "before": before,
        "after": after, "final_digest": "9f" * 32, **totals,
    }  # fmt: skip
    return [*federated, after, summary]


def make_config(**changes: Any) -> dict[str, Any]:
    """A resolved configuration as a run folder holds it; ``changes`` replace top-level keys."""
    return {
        "seed": 0,
        "model": {"name": "smollm2-135m", "dtype": "float32"},
        "task": {"name": "rotten_tomatoes", "kind": "candidates", "candidates": [" terrible", " great"]},
        "trainer": {"name": "meerkat", "lr": 0.0001, "eps": 0.001, "density": 0.001},
        "fl": {"num_clients": 8, "rounds": 75, "local_steps": 1, "batch_size": 2},
        "partition": {"alpha": 0.5},
        **changes,
    }


WriteRun = Callable[..., Path]


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    """Writes a run folder and returns its path."""

    def write(
        records: Records | None = None,
        *,
        config: dict[str, Any] | None = None,
        overrides: list[str] | None = None,
        where: str = "run",
    ) -> Path:
        run_dir = tmp_path / where
        run_dir.mkdir(parents=True)
        lines = [json.dumps(record) for record in (make_records() if records is None else records)]
        (run_dir / "metrics.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        (run_dir / "config.yaml").write_text(yaml.safe_dump(config or make_config(), sort_keys=False), encoding="utf-8")
        (run_dir / "overrides.yaml").write_text(yaml.safe_dump(overrides or ["experiment=quickstart"]), encoding="utf-8")
        environment = {"fedzo": "0.1.0", "python": "3.11.9", "packages": {"torch": "2.13.0", "flwr": "1.41.0"}, "git_commit": "abc1234"}
        (run_dir / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
        return run_dir

    return write
