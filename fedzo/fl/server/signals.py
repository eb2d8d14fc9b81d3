"""What the server reads off every client's local steps (``fedzo.zo.virtual_path``), for the metrics.

The running means are a function of the audit log, so those of a resumed run are those of an unbroken one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from fedzo.fl.server.metrics import finite_mean
from fedzo.records.log import ScalarAuditLine
from fedzo.records.metrics import StepSignals
from fedzo.zo.config import Distribution
from fedzo.zo.log import ScalarRecord
from fedzo.zo.virtual_path import Numbers, round_products, step_products, virtual_paths


@dataclass(slots=True)
class _Tally:
    """Sums over the steps of one client that had a finite loss."""

    steps: int = 0
    abs_g: float = 0.0
    abs_grad_ip: float = 0.0


class Signals:
    """Signals of each client's local steps, round by round.

    Args:
        gradient: The server's gradient, float32 [n] in wire order; None where there is none.
        run_seed: Seed of the run's directions.
        distribution: Law of the directions.
    """

    def __init__(self, gradient: torch.Tensor | None, *, run_seed: int, distribution: Distribution) -> None:
        self._gradient = gradient
        self._run_seed = run_seed
        self._distribution = distribution
        self._tallies: dict[int, _Tally] = {}

    def products(self, record: ScalarRecord) -> Numbers | None:
        """Xi for the audit log: <gradient, z> by step, probe and owner of the direction; None without a gradient."""
        if self._gradient is None:
            return None
        return round_products(self._gradient, record, run_seed=self._run_seed, distribution=self._distribution)

    def note(self, line: ScalarAuditLine) -> None:
        """Count the steps of a line of the audit log: of each once, in their order."""
        for index, entry in enumerate(line.clients):
            tally = self._tallies.setdefault(entry.client, _Tally())
            g, measured = entry.g.astype(np.float64), ~entry.dropped.all(axis=1)
            tally.steps += int(measured.sum())
            tally.abs_g += float(np.abs(g).mean(axis=1)[measured].sum())
            if line.xi is not None:
                column = 0 if line.xi.shape[2] == 1 else index  # shared directions, or a column a client
                tally.abs_grad_ip += float(np.abs(step_products(g, line.xi, column))[measured].sum())

    def of_round(self, record: ScalarRecord, line: ScalarAuditLine) -> dict[int, StepSignals]:
        """Per client the signals of each step, and the means over all lines that were noted.

        Six digits; None where unknown: a step without a finite loss, or no gradient to compare with.

        Args:
            record: The round, whose line was noted last.
            line: What the audit log holds of it.
        """
        scalars = {entry.client: entry.g for entry in line.clients}
        paths = {}
        if self._gradient is not None and line.xi is not None:
            paths = virtual_paths(
                self._gradient, scalars, record, line.xi, run_seed=self._run_seed, distribution=self._distribution
            )
        found = {}
        for entry in line.clients:
            unknown, path = np.all(entry.dropped, axis=1), paths.get(entry.client)
            mean_abs_grad_ip, mean_abs_g = self._means(entry.client)
            found[entry.client] = StepSignals(
                grad_ip=_list(path.grad_ip, unknown) if path else (None,) * entry.steps,
                abs_g=_list(np.abs(entry.g.astype(np.float64)).mean(axis=1), unknown),
                loss=tuple(short(finite_mean(step)) for step in entry.loss),
                cosine=_list(path.cosine, unknown) if path else (None,) * entry.steps,
                mean_abs_grad_ip=mean_abs_grad_ip,
                mean_abs_g=mean_abs_g,
            )
        return found

    def _means(self, client: int) -> tuple[float | None, float | None]:
        """Means of |GradIP| and |g| over all the steps of a client that the log holds."""
        tally = self._tallies.get(client, _Tally())
        if not tally.steps:
            return None, None
        grad_ip = None if self._gradient is None else short(tally.abs_grad_ip / tally.steps)
        return grad_ip, short(tally.abs_g / tally.steps)


def _list(values: Numbers, unknown: np.ndarray) -> tuple[float | None, ...]:
    return tuple(None if lost else short(value) for value, lost in zip(values, unknown, strict=True))


def short(value: float) -> float | None:
    """Six digits are enough for a figure; the audit log has them all."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
