"""What the server reads off every client's local steps (``fedzo.zo.virtual_path``), for the metrics.

The running means are a function of the audit log, so those of a resumed run are those of an unbroken one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from fedzo.fl.server.aggregate import ClientResult
from fedzo.fl.server.metrics import finite_mean
from fedzo.zo.config import Distribution
from fedzo.zo.log import RoundRecord
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
        audit: Lines of the audit log so far.
        run_seed: Seed of the run's directions.
        distribution: Law of the directions.
    """

    def __init__(
        self,
        gradient: torch.Tensor | None,
        audit: Iterable[Mapping[str, Any]],
        *,
        run_seed: int,
        distribution: Distribution,
    ) -> None:
        self._gradient = gradient
        self._run_seed = run_seed
        self._distribution = distribution
        self._tallies: dict[int, _Tally] = {}
        for line in audit:
            self._note(line)

    def products(self, record: RoundRecord) -> list[Any] | None:
        """Xi for the audit log: <gradient, z> by step, probe and owner of the direction; None without a gradient."""
        if self._gradient is None:
            return None
        xi = round_products(self._gradient, record, run_seed=self._run_seed, distribution=self._distribution)
        return cast(list[Any], xi.tolist())

    def _note(self, line: Mapping[str, Any]) -> None:
        """Count the steps of a line of the audit log."""
        xi = _products_of(line)
        for index, entry in enumerate(line["clients"]):
            tally = self._tallies.setdefault(entry["client"], _Tally())
            g, known = np.asarray(entry["g"]), ~np.asarray(entry["dropped"]).all(axis=1)
            tally.steps += int(known.sum())
            tally.abs_g += float(np.abs(g).mean(axis=1)[known].sum())
            if xi is not None:
                column = 0 if xi.shape[2] == 1 else index  # shared directions, or a column a client
                tally.abs_grad_ip += float(np.abs(step_products(g, xi, column))[known].sum())

    def of_round(
        self, record: RoundRecord, results: Mapping[int, ClientResult], line: Mapping[str, Any]
    ) -> dict[int, dict[str, Any]]:
        """Per client: ``grad_ip``, ``abs_g``, ``loss`` and ``cosine`` of each step, and the means so far.

        Each round once, in their order. Six digits; null where unknown: a step without a finite loss, or no gradient to
        compare with.

        Args:
            record: The round.
            results: Its usable replies.
            line: What the audit log holds of it.
        """
        self._note(line)
        xi = _products_of(line)
        scalars = {client: results[client].g for client in sorted(results)}
        paths = {}
        if self._gradient is not None and xi is not None:
            paths = virtual_paths(
                self._gradient, scalars, record, xi, run_seed=self._run_seed, distribution=self._distribution
            )
        found = {}
        for client, g in scalars.items():
            unknown, path = np.all(results[client].dropped, axis=1), paths.get(client)
            found[client] = {
                "grad_ip": _list(path.grad_ip, unknown) if path else [None] * len(g),
                "abs_g": _list(np.abs(g.astype(np.float64)).mean(axis=1), unknown),
                "loss": [_short(finite_mean(step)) for step in results[client].loss],
                "cosine": _list(path.cosine, unknown) if path else [None] * len(g),
                **self._means(client),
            }
        return found

    def _means(self, client: int) -> dict[str, float | None]:
        """Means over all the steps of a client that the log holds."""
        tally = self._tallies.get(client, _Tally())
        if not tally.steps:
            return {"mean_abs_grad_ip": None, "mean_abs_g": None}
        grad_ip = None if self._gradient is None else _short(tally.abs_grad_ip / tally.steps)
        return {"mean_abs_grad_ip": grad_ip, "mean_abs_g": _short(tally.abs_g / tally.steps)}


def _products_of(line: Mapping[str, Any]) -> Numbers | None:
    return None if line["xi"] is None else np.asarray(line["xi"])


def _list(values: Numbers, unknown: np.ndarray) -> list[float | None]:
    return [None if lost else _short(value) for value, lost in zip(values, unknown, strict=True)]


def _short(value: float) -> float | None:
    """Six digits are enough for a figure; the audit log has them all."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
