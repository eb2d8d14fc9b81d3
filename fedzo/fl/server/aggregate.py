"""From checked replies to one record of the log: pure functions, no Flower objects."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Protocol

import numpy as np

from fedzo.errors import ProtocolError
from fedzo.fl.clip import LARGE_LOSS, NO_BOUND, far_off, largest_of
from fedzo.fl.config import Aggregation, StrategyConfig, Weighting
from fedzo.fl.messages import TrainReply, TrainRequest, scalars_from_bytes, signs_from_bytes
from fedzo.records.scores import MAX_LOSS
from fedzo.zo.directions import PURPOSE_SAMPLING, SHARED, permutation, stream_key
from fedzo.zo.log import RoundRecord, Scalars


class Result(Protocol):
    """A client's checked reply, as far as it is read alike of scalars and vectors."""

    @property
    def loss(self) -> np.ndarray:
        """Of each step (and probe); nan where it was not finite."""
        ...

    @property
    def dropped(self) -> np.ndarray:
        """Of the same shape: what was measured in vain, and moves nothing."""
        ...

    @property
    def payload_bytes(self) -> int:
        """Length of its numbers on the wire."""
        ...


@dataclass(frozen=True, slots=True)
class ClientResult:
    """A client's checked answer for a round of T steps with P probes.

    Attributes:
        g: Projected gradients, float32 [T, P]; 0 where dropped. Their signs where only these are sent.
        loss: Each probe's view of the loss at theta, float32 [T, P]; nan where dropped.
        dropped: Probes without a finite loss, bool [T, P].
        end_check: Check of the client's theta after its local steps (T > 1), for its virtual path.
        payload_bytes: Length of its scalars, or of its signs, on the wire.
    """

    g: Scalars
    loss: Scalars
    dropped: np.ndarray
    end_check: int
    payload_bytes: int = 0


def check_reply(
    reply: TrainReply, request: TrainRequest, *, probes: int, strategy: StrategyConfig, all_may_drop: bool = True
) -> ClientResult:
    """The reply as numbers, or ``ProtocolError`` saying why it cannot be used.

    Args:
        reply: What the client sent.
        request: What it was asked: T steps, clipped to a bound.
        probes: P.
        strategy: Its aggregation says whether ``g`` holds signs, a bit a probe, of which a dropped one counts as 0.
            Other scalars are held to the request's bound.
        all_may_drop: Whether a reply without any finite loss counts as one of zeros.
    """
    shape, signs = (request.steps, probes), strategy.aggregation is Aggregation.majority_sign
    g = (signs_from_bytes if signs else scalars_from_bytes)(reply.g, shape=shape, what="g")
    loss = checked_losses(reply.loss, shape=shape)
    if len(reply.dropped) != g.size:
        raise ProtocolError(f"dropped must hold {g.size} flags, got {len(reply.dropped)}")
    dropped = np.frombuffer(reply.dropped, np.uint8).reshape(shape) != 0
    if signs:
        g[dropped] = 0
    if not np.isfinite(g).all():
        raise ProtocolError("g must be finite; a probe without a finite loss is sent as 0 with its flag")
    if (worst := float(np.abs(g).max())) > strategy.scalar_bound and not signs:
        raise ProtocolError(f"|g| must be at most strategy.max_abs_g = {strategy.scalar_bound:g}, got {worst:g}")
    if request.max_abs_g != NO_BOUND and worst > request.max_abs_g:
        raise ProtocolError(f"|g| must be at most the announced bound {request.max_abs_g:g}, got {worst:g}")
    if dropped.all() and not all_may_drop:
        raise ProtocolError("no probe had a finite loss, which this server optimizer cannot use")
    if (g[dropped] != 0).any():
        raise ProtocolError("a dropped probe must carry g = 0")
    return ClientResult(
        g=g,
        loss=loss,
        dropped=dropped,
        end_check=reply.end_check,
        payload_bytes=len(reply.g),
    )


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


def aggregate(
    results: Mapping[int, ClientResult],
    weights: Mapping[int, float],
    *,
    round: int,
    lr: float,
    directions: int,
    strategy: StrategyConfig,
    own_columns: bool = False,
    normalise: bool = False,
) -> RoundRecord:
    """A round's scalars c[t, p] from those of its responders; the mean is sum s_k g_k[t, p] / P (``shares``).

    Evaluated in float64 in the order of client index and rounded to float32 once, so the order of arrival changes
    nothing and N identical clients equal one. A client past its last step counts as 0, and so does a dropped probe.
    A median of many such zeros would stand still, so all but the mean are of the clients that took the step, times
    their share of the round's clients: the length that the mean's step has.

    Where directions are not shared each client keeps its own column instead of being summed.

    Args:
        results: Checked answers, by client, of equal P; T is that of the client with most steps.
        weights: w of every client; the mean alone reads them.
        round: Number of the round.
        lr: Its learning rate.
        directions: Along which directions the clients stepped (``fedzo.zo.seeds``). Only scalars along the same
            direction can be compared, so where they are not shared there is but the mean.
        strategy: How the scalars of a probe become one: median, trimmed mean (arXiv 1803.01498) and majority of
            signs (FeedSign, arXiv 2501.17610) are taken of g_k[t, p] over the clients and divided by P.
        own_columns: Keep each client's own scalars g_k[t, p] / P, for a server optimizer that walks each client's path.
        normalise: Whether the mean's shares make up for unequal steps.
    """
    clients, aggregation = sorted(results), strategy.aggregation
    steps = {client: len(results[client].g) for client in clients}
    (probes,) = {result.g.shape[1] for result in results.values()}
    share = dict.fromkeys(clients, 1.0)
    if aggregation is Aggregation.mean and not own_columns:
        share = shares(weights, steps, normalise=normalise)
    g = np.zeros((max(steps.values()), probes, len(clients)), np.float64)
    for column, client in enumerate(clients):
        own = results[client].g.astype(np.float64)
        g[: len(own), :, column] = share[client] * own / probes
    if own_columns or directions != SHARED:
        assert aggregation is Aggregation.mean, "validation refuses to compare scalars along unlike directions"
        return RoundRecord(
            round=round, lr=lr, owners=tuple(clients), coefficients=g.astype(np.float32), directions=directions
        )
    match aggregation:
        case Aggregation.mean:
            c = np.zeros(g.shape[:2], np.float64)
            for column in range(len(clients)):
                c += g[:, :, column]
        case Aggregation.median:
            c = _of_takers(g, results, lambda part: np.median(part, axis=1))
        case Aggregation.trimmed_mean:
            c = _of_takers(g, results, trimming(strategy.trim_share, len(clients)))
        case Aggregation.majority_sign:
            c = _of_takers(np.sign(g), results, lambda part: np.sign(part.sum(axis=1))) / probes  # a tie moves nothing
    return RoundRecord(round=round, lr=lr, owners=(SHARED,), coefficients=c.astype(np.float32)[:, :, None])


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


def _of_takers(
    g: np.ndarray, results: Mapping[int, ClientResult], middle: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """[T, P]: each step's ``middle`` of those who took it, times their share; ``g`` is [T, P, clients]."""
    taken = np.array([len(results[client].g) for client in sorted(results)])
    takers = [np.flatnonzero(taken > step) for step in range(len(g))]
    return np.stack([middle(g[step][:, who]) * len(who) / len(taken) for step, who in enumerate(takers)])


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


def unmoved(record: RoundRecord) -> RoundRecord:
    """The record of a round that only measures: as long as its steps, but nothing moves theta along it in round 0.

    lr = 0 stops every step and the decay; c = 0 leaves the moments at zero.
    """
    return replace(record, lr=0.0, coefficients=np.zeros_like(record.coefficients))


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


def sampling_order(*, run_seed: int, round: int, num_clients: int, connected: Container[int]) -> list[int]:
    """All clients in the order in which a round that needs only some takes them; those that are connected come first.

    While all are connected it is a function of run seed and round alone.
    """
    order: list[int] = permutation(stream_key(run_seed, round=round), num_clients, purpose=PURPOSE_SAMPLING).tolist()
    away = [client for client in order if client not in connected]
    return [client for client in order if client in connected] + away
