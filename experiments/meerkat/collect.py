"""Run folders of the study as rows of plain numbers, which is what is committed, drawn and put into tables."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from fedzo.bench.claims import kept_results, metric_lines, ran_with
from fedzo.records.folder import replace_file

Row = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
PANELS = RESULTS / "panels"
"""Records of single runs, whose clients are drawn step by step: a folder a run."""
ROUNDS = ("fl.rounds", "evaluation.every_rounds")
"""What a run with a calibration has one of more, or has scored at other rounds."""
KEPT = ("value", "loss", "auc", "best_threshold_accuracy", "per_class", "num_examples")


def known(piece: str) -> list[Row]:
    """The rows of a piece."""
    return kept_results(RESULTS / f"{piece}.json", [])


def keep(piece: str, runs: Path) -> list[Row]:
    """Add a row for each finished run below a folder, in place of a known one of the same name."""
    named = {row["name"]: row for row in known(piece)}
    for folder in sorted(metrics.parent for metrics in runs.rglob("metrics.jsonl")):
        for row in _row(folder):
            named[row["name"]] = row
            if row["method"] == "meerkat" and (row["seed"], row["budget"]) == (0, "T10"):
                _keep_steps(folder, row)
    rows = [named[name] for name in sorted(named)]
    if rows:
        RESULTS.mkdir(exist_ok=True)
        replace_file(RESULTS / f"{piece}.json", json.dumps(rows, indent=1) + "\n")
    return rows


def _keep_steps(folder: Path, row: Row) -> None:
    """Keep the records of a run without changes, not even of its length, and of one with VPCS."""
    changed = {key: value for key, value in row["changed"].items() if key not in ROUNDS}
    if title := "plain" if not row["changed"] else "vpcs" if changed == {"step_policy": "vpcs"} else None:
        kept = PANELS / f"{row['task']}-{title}"
        kept.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "metrics.jsonl", kept)
        task = yaml.safe_load((folder / "config.yaml").read_text())["task"]  # the labels' names; no paths
        (kept / "config.yaml").write_text(yaml.safe_dump({"task": task}))


def name_of(words: Sequence[str]) -> str:
    """What was run, whatever the order of the words."""
    return " ".join(sorted(words))


def best_dev_loss(row: Row) -> float:
    """A rate at which the loss is not finite is the worst."""
    return min((math.inf if loss is None else loss for _, _, loss in row["dev"][1:]), default=math.inf)


def _row(folder: Path) -> Iterator[Row]:
    lines = metric_lines(folder)
    summary = next((line for line in lines if line["kind"] == "summary"), None)
    if summary is None:
        return  # interrupted: the sweep will go on with it
    setup = next(line for line in lines if line["kind"] == "setup")
    config = json.loads((folder / "config.json").read_text())
    environment = ran_with(folder, "step_policy.num_flagged")  # by lot, as many are stopped as VPCS stopped
    federated = [line for line in lines if line["kind"] == "federated_score"]
    step_policies = [line for line in lines if line["kind"] == "step_policy"]
    yield {
        **_identity(yaml.safe_load((folder / "overrides.yaml").read_text())),
        "lr": config["trainer"]["lr"],
        "before": _score(summary["before"]),
        "after": _score(summary["after"]),
        "best_round": summary["best_round"],
        "rounds": summary["rounds"],
        "dev": [[s["round"], s["value"], s["loss"]] for s in lines if s["kind"] == "score" and s["split"] == "dev"],
        "federated": {k: federated[-1][k] for k in ("value", "worst_client", "per_class")} if federated else None,
        "clients": _clients(lines, setup),
        "flagged": [client["client"] for client in step_policies[-1]["clients"] if client["flagged"]]
        if step_policies
        else [],
        "fallback": bool(step_policies) and step_policies[-1]["fallback"],
        "num_clients": config["fl"]["num_clients"],
        "space_size": setup["space_size"],
        "setup_down_bytes": setup["setup_down_bytes"],
        "payload_up_bytes": summary["payload_up_bytes"],
        "payload_down_bytes": summary["payload_down_bytes"],
        "seconds": round(summary["seconds"], 1),
        "final_digest": summary["final_digest"],
        **{key: environment[key] for key in ("git_commit", "settings")},
    }


def _identity(overrides: Sequence[str]) -> Row:
    """What was run, by the words of the command: those that are common to all runs aside."""
    own = [word for word in overrides if "experiment=" not in word]
    words = dict(word.split("=", 1) for word in own)
    task, _, method = words.pop("+cell").partition("-")
    budget, seed = words.pop("+budget"), int(words.pop("seed"))
    return {"name": name_of(own), "task": task, "method": method, "budget": budget, "seed": seed, "changed": words}


def _score(score: Row | None) -> Row | None:
    return None if score is None else {key: score[key] for key in KEPT}


def _clients(lines: Sequence[Row], setup: Row) -> list[Row]:
    """Each client's label counts, and its mean |g| and |GradIP| over the first and the last quarter of its steps."""
    steps: dict[int, list[Mapping[str, Any]]] = {}
    for client in (client for line in lines if line["kind"] == "round" for client in line["clients"]):
        signals = client.get("signals") or {"abs_g": [client["abs_g"]], "grad_ip": [None]}
        steps.setdefault(client["client"], []).extend(
            {"abs_g": g, "grad_ip": ip} for g, ip in zip(signals["abs_g"], signals["grad_ip"], strict=True)
        )
    return [
        {
            "client": client["client"],
            "labels": client["label_counts"],
            **{f"mean_{name}": _quarters(steps.get(client["client"], []), name) for name in ("abs_g", "grad_ip")},
        }
        for client in setup["clients"]
    ]


def _quarters(steps: Sequence[Mapping[str, Any]], name: str) -> list[float] | None:
    size = len(steps) // 4
    values = [[abs(step[name]) for step in part if step[name] is not None] for part in (steps[:size], steps[-size:])]
    return [float(f"{fmean(part):.4g}") for part in values] if size and all(values) else None
