"""What a sequential test makes of the runs whose local steps are kept."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from collect import PANELS, Row
from pieces import TASKS

from fedzo.fl.server.step_policy.cusum import CusumConfig
from fedzo.fl.server.step_policy.statistics import cusum, shortfall
from fedzo.report.panels import client_traces
from fedzo.report.run_data import load_run


def sequential(core: Sequence[Row]) -> list[str]:
    """What the default CUSUM would have made of a plain run's clients, step by step."""
    config = CusumConfig()
    lines = [
        "| run | single-label clients: highest sum | flagged | others: highest sum | flagged |",
        "|---|---|---|---|---|",
    ]
    for folder in sorted(PANELS.glob("*-plain")):
        task = folder.name.removesuffix("-plain")
        rows = [row for row in core if (row["task"], row["method"], row["budget"]) == (task, "meerkat", "T10")]
        labels = {client["client"]: len(client["labels"]) for client in rows[0]["clients"]} if rows else {}
        traces = client_traces(load_run(folder))
        steps = np.array([traces[client].abs_g for client in sorted(traces)], float)
        sums = peaks = np.zeros(len(steps))
        for step in steps.T:
            sums = cusum(sums, shortfall(step), drift=config.drift)
            peaks = np.maximum(peaks, sums)
        shown = []
        for alone in (True, False):
            found = {c: peaks[at] for at, c in enumerate(sorted(traces)) if (labels.get(c) == 1) == alone}
            over = sum(peak > config.threshold for peak in found.values())
            each = ", ".join(f"client {c}: {peak:.1f}" for c, peak in found.items())
            shown += [each if alone else f"{max(found.values(), default=0):.1f}", f"{over} of {len(found)}"]
        lines.append(f"| {TASKS[task]}, T = 10, seed 0 | {' | '.join(shown)} |")
    return lines
