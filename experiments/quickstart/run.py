"""Run the quickstart over three run seeds and write results.json, claims.json and accuracy.png beside this file.

    python experiments/quickstart/run.py

A seed whose run is complete is not run again, so an interrupted call goes on where it stopped.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fedzo.bench.claims import Claims

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
COMMAND = "python experiments/quickstart/run.py"


def main() -> None:
    runs = [run(seed) for seed in SEEDS]
    results = {"run": [entry["summary"] for entry in runs], "environment": runs[0]["environment"], "command": COMMAND}
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    gather(runs).write(HERE / "claims.json")
    draw(runs)
    print("`python docs/tables.py` puts them into the pages")


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


def gather(runs: list[dict[str, Any]]) -> Claims:
    gains = [100 * (e["summary"]["after"]["value"] - e["summary"]["before"]["value"]) for e in runs]
    minutes = [e["summary"]["seconds"] / 60 for e in runs]
    clients = 8

    def mean(when: str, what: str) -> float:
        return sum(e["summary"][when][what] for e in runs) / len(runs)

    up = max(e["summary"]["payload_up_bytes"] for e in runs) / clients
    messages = max(e["summary"]["message_up_bytes"] + e["summary"]["message_down_bytes"] for e in runs) / clients
    # in one process the mask is not sent
    messages += next(line["setup_down_bytes"] for line in runs[0]["lines"] if line["kind"] == "setup")
    claims = Claims(command=COMMAND, seeds=list(SEEDS), environment=runs[0]["environment"])
    add = claims.add
    add("accuracy rises from its zero-shot value, mean over seeds", sum(gains) / len(gains), "points", at_least=20)
    add("accuracy rises from its zero-shot value, worst seed", min(gains), "points", at_least=15)
    for what, name in (("value", "accuracy"), ("best_threshold_accuracy", "accuracy at the best threshold")):
        add(f"{name} before", mean("before", what), "share")
        add(f"{name} after", mean("after", what), "share")
    add("AUC before", mean("before", "auc"), "area")
    add("AUC after", mean("after", "auc"), "area")
    add("a run's time, median of the seeds, installation apart", statistics.median(minutes), "minutes", at_most=10)
    add("scalars that a client sends in a whole run", up, "bytes", at_most=20_000)
    add("message contents of a client in a whole run, both ways, the mask included", messages, "bytes")
    return claims


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


if __name__ == "__main__":
    main()
