"""What a client counts for in a round's mean, and which replies are left out of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median

import numpy as np

from fedzo.errors import ProtocolError
from fedzo.fl.clip import LARGE_LOSS, far_off, largest_of
from fedzo.fl.config import Weighting
from fedzo.fl.messages import scalars_from_bytes
from fedzo.fl.server.aggregator import Result
from fedzo.records.scores import MAX_LOSS
from fedzo.zo.log import Scalars


def client_weights(rows: Mapping[int, int], weighting: Weighting, *, size_cap: float) -> dict[int, float]:
    """w of every client, from the rows that it declared: 1, or these up to ``size_cap`` times their median (0: all).

    Example:
        >>> client_weights({0: 10, 1: 20, 2: 10**9}, Weighting.size, size_cap=10)
        {0: 10.0, 1: 20.0, 2: 200.0}
    """
    if weighting is Weighting.uniform:
        return dict.fromkeys(rows, 1.0)
    most = size_cap * median(rows.values()) or math.inf
    return {client: float(min(size, most)) for client, size in rows.items()}


def shares(weights: Mapping[int, float], steps: Mapping[int, int], *, normalise: bool) -> dict[int, float]:
    """s_k of a round's clients: their weights, renormalised.

    Normalised, a share is also multiplied by the weighted mean of steps over the client's own (FedNova for plain
    steps, arXiv 2007.07481): clients whose steps are alike then move the model by their weights, however many
    steps each of them takes.

    Args:
        weights: w of every client.
        steps: T_k of the round's clients.
        normalise: Whether shares make up for unequal steps.

    Example:
        >>> shares({0: 1.0, 1: 1.0}, {0: 3, 1: 1}, normalise=True)
        {0: 0.3333333333333333, 1: 1.0}
    """
    clients = sorted(steps)
    total = sum(weights[client] for client in clients)
    share = {client: weights[client] / total for client in clients}
    if not normalise or len(set(steps.values())) == 1:
        return share
    mean = sum(share[client] * steps[client] for client in clients)
    return {client: share[client] * (mean / steps[client]) for client in clients}


def trimming(share: float, num_clients: int) -> Callable[[np.ndarray], np.ndarray]:
    """The trimmed mean of a round of so many clients: over the clients of [numbers, clients].

    One is cut off at each end also where absent clients leave too few for the share. Where fewer took a step, as many
    are cut off as of the whole round: those who lie need not stop early.
    """
    return partial(_trimmed_mean, cut=max(1, num_trimmed(share, num_clients)))


def _trimmed_mean(part: np.ndarray, *, cut: int) -> np.ndarray:
    number = part.shape[1]
    cut = min(cut, (number - 1) // 2)
    return np.asarray(np.sort(part, axis=1)[:, cut : number - cut].mean(axis=1))


def num_trimmed(share: float, num_clients: int) -> int:
    """Clients that a trimmed mean cuts off at each end: share * num_clients, rounded down to whole clients.

    Example:
        >>> num_trimmed(0.2, 9), num_trimmed(0.29, 100)  # 0.29 * 100 is a little below 29 in float64
        (1, 29)
    """
    return int(round(share * num_clients, 9))


def checked_losses(data: bytes, *, shape: tuple[int, ...]) -> Scalars:
    """Losses as numbers, nan where none was measured; ``ProtocolError`` where one is none."""
    loss = scalars_from_bytes(data, shape=shape, what="loss")
    if (worst := float(np.nanmax(np.abs(loss), initial=0.0))) > MAX_LOSS:
        raise ProtocolError(f"|loss| must be at most {MAX_LOSS:g}, and nan where it is not finite, got {worst:g}")
    return loss


def losses_far_off(results: Mapping[int, Result]) -> dict[int, str]:
    """Whose losses are so large that they would decide the mean of the round, and why they cannot be used."""
    largest = {client: largest_of(result.loss[np.isfinite(result.loss)]) for client, result in results.items()}
    return {
        client: f"|loss| must be at most {most:g}, by the round's other clients, got {largest[client]:g}"
        for client, most in far_off(largest, least=LARGE_LOSS).items()
    }
