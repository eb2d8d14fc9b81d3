"""A run folder as a run of ten rounds and three clients leaves it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedzo.errors import RunFolderError
from fedzo.records.metrics import MetricRecord, decode_metric

Lines = list[dict[str, Any]]
CLIENTS = [
    {"client": 0, "num_train": 40, "num_heldout": 4, "label_counts": {"0": 39, "1": 1}},
    {"client": 1, "num_train": 30, "num_heldout": 3, "label_counts": {"0": 15, "1": 15}},
    {"client": 2, "num_train": 20, "num_heldout": 2, "label_counts": {"1": 20}},
]


def score(split: str, round: int, value: float) -> dict[str, Any]:
    return {
        "kind": "score",
        "seconds": 5.0 + round,
        "evaluator": "answers",
        "split": split,
        "round": round,
        "metric": "accuracy",
        "value": value,
        "loss": 1 - value,
        "num_examples": 200,
        "auc": value + 0.05,
        "best_threshold_accuracy": value + 0.02,
        "per_class": {"0": [80, 100], "1": [int(200 * value) - 80, 100]},
    }


def client_line(client: int, *, abs_g: float) -> dict[str, Any]:
    """One local step of a client, compared with no gradient."""
    signals = {
        "grad_ip": [None],
        "abs_g": [abs_g],
        "loss": [0.7],
        "cosine": [None],
        "mean_abs_grad_ip": None,
        "mean_abs_g": abs_g,
    }
    return {"client": client, "loss": 0.7, "abs_g": abs_g, "steps": 1, "signals": signals}


def round_line(number: int) -> dict[str, Any]:
    return {
        "kind": "round",
        "seconds": 6.0 + number,
        "round": number,
        "calibration": False,
        "loss": None if number == 4 else 0.8 - 0.03 * number,
        "mean_abs_g": 10.0 - number / 2,
        "payload_up_bytes": 12,
        "payload_down_bytes": 12,
        "message_up_bytes": 240,
        "message_down_bytes": 900,
        "round_seconds": 1.0,
        "dropped_probes": 1 if number == 4 else 0,
        "clip_bound": None,
        "clipped": 0,
        "absent": [2] if number == 6 else [],
        "reasons": {},
        "clients": [client_line(c, abs_g=9.0 + c) for c in range(3)],
    }


def metrics() -> Lines:
    setup = {
        "kind": "setup",
        "seconds": 3.0,
        "trainer": "meerkat",
        "num_params": 134_515_008,
        "space_size": 106_020,
        "setup_down_bytes": 459_000,
        "estimate": {"memory_bytes": 500_000_000, "seconds": 100.0},
        "clients": CLIENTS,
    }
    before, after = score("test", 0, 0.555), score("test", 10, 0.765)
    federated = {
        "kind": "federated_score",
        "seconds": 20.0,
        "evaluator": "answers",
        "round": 10,
        "metric": "accuracy",
        "value": 0.7,
        "loss": 0.5,
        "num_examples": 9,
        "message_up_bytes": 300,
        "message_down_bytes": 900,
        "worst_client": 0.5,
        "per_class": {"0": [4, 5], "1": [2, 4]},
        "clients": [
            {
                "client": c,
                "metric": "accuracy",
                "value": 0.5 + c / 10,
                "loss": 0.5,
                "num_examples": 4 - c,
                "per_class": {},
            }
            for c in range(3)
        ],
    }
    summary = {
        "kind": "summary",
        "seconds": 25.0,
        "rounds": 10,
        "best_round": 10,
        "before": before,
        "after": after,
        "worst_client": {"client": 0, "metric": "accuracy", "value": 0.5, "round": 10},
        "step_policy": None,
        "final_digest": "ab" * 32,
        "dropped_probes": 1,
        "payload_up_bytes": 120,
        "payload_down_bytes": 120,
        "message_up_bytes": 2700,
        "message_down_bytes": 9900,
        "dev": score("dev", 10, 0.75),
    }
    return [
        setup,
        before,
        score("dev", 0, 0.54),
        *map(round_line, range(10)),
        score("dev", 10, 0.75),
        federated,
        after,
        summary,
    ]


@pytest.fixture
def lines() -> Lines:
    """What such a run tells, as it is read; a test may change it."""
    told: Lines = json.loads(json.dumps(metrics()))
    return told


@pytest.fixture
def records(lines: Lines) -> list[MetricRecord]:
    """The same, decoded."""
    return [decode_metric(line, where="metrics", error=RunFolderError) for line in lines]


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    def make(name: str = "run", *, lines: Lines | None = None, task: str = "reviews", **overrides: str) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        text = "".join(json.dumps(line) + "\n" for line in (metrics() if lines is None else lines))
        (folder / "metrics.jsonl").write_text(text)
        config: dict[str, Any] = {
            "trainer": {"plugin": "meerkat"},
            "task": {"name": task, "candidates": [" terrible", " great"]},
            "model": {"name": "smollm2-135m"},
            "fl": {"num_clients": 3},
        }
        for key, value in overrides.items():  # what the words say is in the configuration, too
            section, _, name = key.partition("__")
            config[section] = value if section == "seed" else {**config.get(section, {}), name or "plugin": value}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        (folder / "environment.json").write_text(json.dumps({"fedzo": "0.1.0", "cpu_count": 2}))
        given = [f"{key.replace('__', '.')}={value}" for key, value in overrides.items()]
        (folder / "overrides.yaml").write_text(yaml.safe_dump(given))
        return folder

    return make
