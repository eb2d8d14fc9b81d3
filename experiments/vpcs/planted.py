"""Does VPCS find planted clients on a real model? SmolLM2-135M on SST-2, 12 clients, the last four with one label each.

    python experiments/vpcs/planted.py --data DIR          # SST-2 as train.*; 20 minutes to 2 hours a seed on 2 cores

One calibration round of 100 steps (batch 8, lr 2e-4, Meerkat with a sensitivity mask); everything else is read from its
audit log: each statistic after the first 10, 20, 50 and 100 steps, for |g| and for GradIP. Writes planted.json,
planted.png and its rows of claims.json beside this file. A seed whose run is complete is not run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fedzo.bench.claims import Claims, measured_in, metric_lines, ran_with
from fedzo.errors import RunFolderError
from fedzo.evaluate.metrics import auc
from fedzo.fl.server.step_policy.statistics import Statistic, magnitudes
from fedzo.fl.server.step_policy.vpcs import Combine, VpcsConfig, VpcsTest, judge
from fedzo.records.decode import decode_json
from fedzo.records.log import ScalarAuditLine

HERE = Path(__file__).parent
PHASES = {10: 5, 20: 5, 50: 10, 100: 20}
"""Steps that are looked at: the length of the initial and of the later phase."""
RULES = {
    "ratio": {"tests": [VpcsTest.ratio]},
    "quiet": {"tests": [VpcsTest.quiet]},
    "level": {"tests": [VpcsTest.level]},
    "ratio and quiet": {"tests": [VpcsTest.ratio, VpcsTest.quiet]},
    "ratio or quiet, or level": {"combine": Combine.either},
    "combined": {},
}
"""``combined`` is the default: ratio and quiet, or level."""
COLOURS = {False: "#0072B2", True: "#D55E00"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, type=Path, help="folder with SST-2 as train.*")
    parser.add_argument("--seeds", default=[0], type=int, nargs="+", help="run seeds")
    options = parser.parse_args()
    command = "python experiments/vpcs/planted.py --data DIR --seeds " + " ".join(map(str, options.seeds))
    found = []
    for seed in options.seeds:
        folder = run(options.data, seed)
        found.append({"seed": seed, **analyse(*read(folder)), "environment": ran_with(folder)})
    (HERE / "planted.json").write_text(json.dumps({"run": found, "command": command}, indent=1) + "\n")
    claims(found, command=command, seeds=options.seeds).write(HERE / "claims.json")
    draw(found[0])
    for entry in summary(found):
        print(json.dumps(entry))


def run(data: Path, seed: int) -> Path:
    """One calibration round, in a process of its own; nothing is scored."""
    folder = Path("runs") / f"planted-seed{seed}"
    settings = [f"seed={seed}", "task=sst2", "data=files", f"data.path={data}", "split.num_dev=0", "split.num_test=0"]
    settings += ["partition=extreme", "partition.num_extreme=4", "partition.holdout=0", "trainer=meerkat"]
    settings += ["step_policy=vpcs", "fl.num_clients=12", "fl.rounds=1", "fl.local_steps=10", "fl.batch_size=8"]
    settings += [
        "server_optimizer.lr=2e-4",
        "evaluation.central=false",
        "evaluation.federated_every_rounds=-1",
        "report=none",
    ]
    public = folder / "public.jsonl"
    if not public.exists() or not public.read_bytes().endswith(b"\n"):
        command = ["resume", str(folder)]
        if not (folder / "config.json").exists():
            command = ["train", *settings, f"hydra.run.dir={folder}"]
        subprocess.run([sys.executable, "-m", "fedzo", *command], check=True)
    return folder


def read(folder: Path) -> tuple[ScalarAuditLine, set[int]]:
    """The audit line of the calibration, and the clients that declared a single label."""
    text = (folder / "audit.jsonl").read_text().splitlines()[0]
    line = decode_json(ScalarAuditLine, text, where=str(folder / "audit.jsonl"), error=RunFolderError)
    (setup,) = metric_lines(folder, "setup")
    return line, {client["client"] for client in setup["clients"] if len(client["label_counts"]) == 1}


# --- what the audit log says


def analyse(line: ScalarAuditLine, planted: set[int]) -> dict[str, Any]:
    """AUC and verdicts of every rule after the first T steps, for both statistics.

    Args:
        line: The audit line of the calibration.
        planted: The clients that ought to be found.
    """
    found: list[dict[str, Any]] = []
    paths = {statistic: magnitudes(line, statistic) for statistic in Statistic}
    for statistic, of_client in paths.items():
        clients = sorted(of_client)
        wanted = [int(client in planted) for client in clients]
        for steps, phase in PHASES.items():
            first = {client: path[:steps] for client, path in of_client.items()}
            for rule, settings in RULES.items():
                config = VpcsConfig(initial_steps=phase, later_steps=phase, **settings)  # type: ignore[arg-type]
                verdicts = judge(first, config)
                scores = [verdicts[client].strength for client in clients]
                found.append(
                    {
                        "statistic": str(statistic),
                        "steps": steps,
                        "rule": rule,
                        "auc": auc(scores, wanted),
                        "found": [client for client in clients if verdicts[client].flagged and client in planted],
                        "false_alarms": [c for c in clients if verdicts[c].flagged and c not in planted],
                    }
                )
    default = judge(paths[Statistic.abs_g], VpcsConfig())
    return {
        "planted": sorted(planted),
        "clients": [
            {
                "client": entry.client,
                "planted": entry.client in planted,
                "abs_g": paths[Statistic.abs_g][entry.client].tolist(),
                "grad_ip": paths[Statistic.gradip][entry.client].tolist(),
                "loss": entry.loss.astype(float).mean(axis=1).tolist(),
                **default[entry.client].statistics,
            }
            for entry in line.clients
        ],
        "tests": found,
    }


def summary(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the seeds."""
    rows = []
    for position, test in enumerate(found[0]["tests"]):
        every = [entry["tests"][position] for entry in found]
        loud = sum(len(entry["clients"]) - len(entry["planted"]) for entry in found)
        rows.append(
            {
                **{key: test[key] for key in ("statistic", "steps", "rule")},
                "auc": float(np.mean([one["auc"] for one in every])),
                "worst_auc": min(one["auc"] for one in every),
                "found": sum(len(one["found"]) for one in every) / sum(len(entry["planted"]) for entry in found),
                "false_alarms": sum(len(one["false_alarms"]) for one in every) / loud,
            }
        )
    return rows


def claims(found: list[dict[str, Any]], *, command: str, seeds: list[int]) -> Claims:
    claims = Claims(command=command, seeds=seeds, environment=measured_in(found))
    for entry in summary(found):
        head = f"planted single-label clients, {entry['rule']} on {entry['statistic']}, T = {entry['steps']}"
        aim = (entry["rule"], entry["statistic"], entry["steps"]) == ("combined", "abs_g", 100)
        claims.add(f"{head}: AUC", entry["auc"], "area", at_least=0.9 if aim else None)
        if entry["rule"] == "combined" and entry["steps"] == 100:
            claims.add(f"{head}: found", 100 * entry["found"], "%")
            claims.add(f"{head}: false alarms", 100 * entry["false_alarms"], "%")
    return claims


def draw(entry: dict[str, Any]) -> None:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for client in entry["clients"]:
        smooth = np.convolve(client["abs_g"], np.full(10, 0.1), mode="valid")
        left.plot(np.arange(len(smooth)) + 10, smooth, color=COLOURS[client["planted"]], linewidth=1.2)
    for planted, label in ((True, "one label"), (False, "IID")):
        left.plot([], color=COLOURS[planted], label=label)
    left.set_yscale("log")
    left.set_xlabel("local step")
    left.set_title("|g| of each client, mean of 10 steps", fontsize=10)
    left.legend(frameon=False, fontsize=8)
    drawn = (
        ("ratio", "#0072B2", 1.5),
        ("quiet", "#CC79A7", 1.5),
        ("level", "#009E73", 4.0),
        ("combined", "#000000", 1.0),
    )
    for rule, colour, width in drawn:  # level and combined often agree: one lies visibly under the other
        for statistic, style in (("abs_g", "-"), ("gradip", ":")):
            points = [
                (t["steps"], t["auc"]) for t in entry["tests"] if (t["rule"], t["statistic"]) == (rule, statistic)
            ]
            name = {"abs_g": "|g|", "gradip": "GradIP"}[statistic]
            right.plot(
                *zip(*points, strict=True),
                style,
                color=colour,
                linewidth=width,
                marker="o",
                markersize=3 + width,
                label=f"{rule}, {name}",
            )
    right.set_xscale("log")
    right.set_xticks(list(PHASES), list(map(str, PHASES)))
    right.set_ylim(-0.02, 1.02)
    right.set_xlabel("calibration steps")
    right.set_title("AUC", fontsize=10)
    right.legend(frameon=False, fontsize=7, ncols=2)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "planted.png", dpi=130)


if __name__ == "__main__":
    main()
