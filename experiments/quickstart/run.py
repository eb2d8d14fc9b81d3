"""Run the quickstart over three run seeds and write results.json, claims.json and accuracy.png beside this file.

    python experiments/quickstart/run.py

A seed whose run is complete is not run again, so an interrupted call goes on where it stopped.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
COMMAND = "python experiments/quickstart/run.py"


def main() -> None:
    runs = [run(seed) for seed in SEEDS]
    results = {"run": [entry["summary"] for entry in runs], "environment": runs[0]["environment"], "command": COMMAND}
    write("results.json", results)
    write("claims.json", claims(runs))
    draw(runs)
    for line in table(runs):
        print(line)


def run(seed: int) -> dict[str, Any]:
    folder = Path("runs") / f"quickstart-seed{seed}"
    if not summary_of(folder):
        command = ["resume", str(folder)]
        if not (folder / "config.json").exists():
            command = ["train", "experiment=quickstart", f"seed={seed}", f"hydra.run.dir={folder}"]
        subprocess.run([sys.executable, "-m", "fedzo", *command], check=True)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = {"seed": seed, **(summary_of(folder) or {})}
    environment = json.loads((folder / "environment.json").read_text())
    environment.pop("command")
    return {"summary": summary, "lines": lines, "environment": environment}


def summary_of(folder: Path) -> dict[str, Any] | None:
    path = folder / "metrics.jsonl"
    if not path.exists():
        return None
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return next((line for line in lines if line["kind"] == "summary"), None)


def claims(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    gains = [100 * (e["summary"]["after"]["value"] - e["summary"]["before"]["value"]) for e in runs]
    minutes = [e["summary"]["seconds"] / 60 for e in runs]
    clients = 8

    def row(claim: str, value: float, unit: str, target: float | None, holds: bool) -> dict[str, Any]:
        return {
            "claim": claim,
            "value": round(value, 4),
            "unit": unit,
            "target": target,
            "holds": holds,
            "command": COMMAND,
            "seeds": list(SEEDS),
            "environment": runs[0]["environment"],
        }

    def mean(when: str, what: str) -> float:
        return sum(e["summary"][when][what] for e in runs) / len(runs)

    middle = sorted(minutes)[len(minutes) // 2]
    average, worst = sum(gains) / len(gains), min(gains)
    up = max(e["summary"]["payload_up_bytes"] for e in runs) / clients
    messages = max(e["summary"]["message_up_bytes"] + e["summary"]["message_down_bytes"] for e in runs) / clients
    return [
        row("accuracy rises from its zero-shot value, mean over seeds", average, "points", 20, average >= 20),
        row("accuracy rises from its zero-shot value, worst seed", worst, "points", 15, worst >= 15),
        row("accuracy before", mean("before", "value"), "share", None, True),
        row("accuracy after", mean("after", "value"), "share", None, True),
        row("accuracy at the best threshold before", mean("before", "best_threshold_accuracy"), "share", None, True),
        row("accuracy at the best threshold after", mean("after", "best_threshold_accuracy"), "share", None, True),
        row("AUC before", mean("before", "auc"), "area", None, True),
        row("AUC after", mean("after", "auc"), "area", None, True),
        row("a run's time, median of the seeds, installation apart", middle, "minutes", 10, middle <= 10),
        row("scalars that a client sends in a whole run", up, "bytes", 20_000, up <= 20_000),
        row("message contents of a client in a whole run, both ways, the mask included", messages, "bytes", None, True),
    ]


def table(runs: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| seed | accuracy | at the best threshold | AUC | best round | minutes |",
        "|---|---|---|---|---|---|",
    ]
    for entry in runs:
        s = entry["summary"]
        cells = [f"{s['before'][k]:.3f} -> {s['after'][k]:.3f}" for k in ("value", "best_threshold_accuracy", "auc")]
        lines.append(f"| {s['seed']} | {' | '.join(cells)} | {s['best_round']} | {s['seconds'] / 60:.1f} |")
    return lines


def draw(runs: list[dict[str, Any]]) -> None:
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for entry, colour in zip(runs, ("#0072B2", "#D55E00", "#009E73"), strict=True):
        scores = [line for line in entry["lines"] if line["kind"] == "score"]
        dev = sorted((line["round"], line["value"]) for line in scores if line["split"] == "dev")
        test = sorted((line["round"], line["value"]) for line in scores if line["split"] == "test")
        axes.plot(*zip(*dev, strict=True), color=colour, linewidth=1.5, label=f"seed {entry['summary']['seed']}")
        axes.plot(*zip(*test, strict=True), "o", color=colour, markersize=6)
    axes.set_xlabel("round (one step of joint batch 16)")
    axes.set_ylabel("accuracy")
    axes.set_title("Rotten Tomatoes, 8 non-IID clients: dev (lines), 1,024 test reviews (dots)", fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(HERE / "accuracy.png", dpi=130)


def write(name: str, value: object) -> None:
    (HERE / name).write_text(json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    main()
