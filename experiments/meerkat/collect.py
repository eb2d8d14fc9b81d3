"""Run folders of the study as rows of plain numbers, which is what is committed, drawn and put into tables."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

Row = dict[str, Any]
KEPT = ("value", "loss", "auc", "best_threshold_accuracy", "per_class", "num_examples")


def collect(sweep: Path) -> list[Row]:
    """A row for each finished run of a sweep's folder."""
    return [row for folder in sorted(sweep.iterdir()) if folder.is_dir() for row in _row(folder)]


def merge(rows: list[Row], known: list[Row]) -> list[Row]:
    """Rows by what was run; a new one takes the place of the known one."""
    named = {row["name"]: row for row in [*known, *rows]}
    return [named[name] for name in sorted(named)]


def name_of(words: Sequence[str]) -> str:
    """What was run, whatever the order of the words."""
    return " ".join(sorted(words))


def best_dev_loss(row: Row) -> float:
    """A rate at which the loss is not finite is the worst."""
    return min((math.inf if loss is None else loss for _, _, loss in row["dev"][1:]), default=math.inf)


def _row(folder: Path) -> Iterator[Row]:
    if not (folder / "metrics.jsonl").exists():
        return
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = next((line for line in lines if line["kind"] == "summary"), None)
    if summary is None:
        return  # interrupted: the sweep will go on with it
    setup = next(line for line in lines if line["kind"] == "setup")
    overrides = [word for word in yaml.safe_load((folder / "overrides.yaml").read_text()) if "experiment=" not in word]
    words = dict(word.split("=", 1) for word in overrides)
    config = json.loads((folder / "config.json").read_text())
    task, _, method = words.pop("+cell").partition("-")
    federated = [line for line in lines if line["kind"] == "federated_score"]
    selections = [line for line in lines if line["kind"] == "selection"]
    yield {
        "name": name_of(overrides),
        "task": task,
        "method": method,
        "budget": words.pop("+budget"),
        "seed": int(words.pop("seed")),
        "changed": words,
        "lr": config["trainer"]["lr"],
        "before": _score(summary["before"]),
        "after": _score(summary["after"]),
        "best_round": summary["best_round"],
        "rounds": summary["rounds"],
        "dev": [[s["round"], s["value"], s["loss"]] for s in lines if s["kind"] == "score" and s["split"] == "dev"],
        "federated": {k: federated[-1][k] for k in ("value", "worst_client", "per_class")} if federated else None,
        "flagged": [client["client"] for client in selections[-1]["clients"] if client["flagged"]]
        if selections
        else [],
        "num_clients": config["fl"]["num_clients"],
        "space_size": setup["space_size"],
        "setup_down_bytes": setup["setup_down_bytes"],
        "payload_up_bytes": summary["payload_up_bytes"],
        "payload_down_bytes": summary["payload_down_bytes"],
        "seconds": round(summary["seconds"], 1),
        "final_digest": summary["final_digest"],
        "git_commit": json.loads((folder / "environment.json").read_text())["git_commit"],
    }


def _score(score: Row | None) -> Row | None:
    return None if score is None else {key: score[key] for key in KEPT}
