"""From checked replies to one record of the log: pure functions, no Flower objects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from fedzo.errors import ProtocolError
from fedzo.fl.clip import NO_BOUND
from fedzo.fl.config import Seeds
from fedzo.fl.wire import TrainReply, scalars_from_bytes
from fedzo.zo.directions import PURPOSE_SAMPLING, SHARED, permutation, stream_key
from fedzo.zo.path import RoundRecord, Scalars


@dataclass(frozen=True, slots=True)
class ClientResult:
    """A client's checked answer for a round of T steps with P probes.

    Attributes:
        g: Projected gradients, float32 [T, P]; 0 where dropped.
        loss: Each probe's view of the loss at theta, float32 [T, P]; nan where dropped.
        dropped: Probes without a finite loss, bool [T, P].
        num_examples: Training rows the client says it has; reported, never used as a weight.
        end_check: Check of the client's theta after its local steps (T > 1), for its virtual path.
    """

    g: Scalars
    loss: Scalars
    dropped: np.ndarray
    num_examples: int
    end_check: int


def check_reply(
    reply: TrainReply, *, steps: int, probes: int, max_abs_g: float, announced: float = NO_BOUND
) -> ClientResult:
    """The reply as numbers, or ``ProtocolError`` saying why it cannot be used.

    Args:
        reply: What the client sent.
        steps: T of the request.
        probes: P.
        max_abs_g: ``strategy.max_abs_g``.
        announced: The request's own ``max_abs_g``, to which the client had to clip.
    """
    shape = (steps, probes)
    g = scalars_from_bytes(reply.g, shape=shape, what="g")
    loss = scalars_from_bytes(reply.loss, shape=shape, what="loss")
    if len(reply.dropped) != g.size:
        raise ProtocolError(f"dropped must hold {g.size} flags, got {len(reply.dropped)}")
    dropped = np.frombuffer(reply.dropped, np.uint8).reshape(shape) != 0
    if not np.isfinite(g).all():
        raise ProtocolError("g must be finite; a probe without a finite loss is sent as 0 with its flag")
    if (worst := float(np.abs(g).max())) > max_abs_g:
        raise ProtocolError(f"|g| must be at most strategy.max_abs_g = {max_abs_g:g}, got {worst:g}")
    if announced != NO_BOUND and worst > announced:
        raise ProtocolError(f"|g| must be at most the announced bound {announced:g}, got {worst:g}")
    if (g[dropped] != 0).any():
        raise ProtocolError("a dropped probe must carry g = 0")
    return ClientResult(g=g, loss=loss, dropped=dropped, num_examples=reply.num_examples, end_check=reply.end_check)


def aggregate(
    results: Mapping[int, ClientResult],
    weights: Mapping[int, float],
    *,
    round: int,
    lr: float,
    steps: int,
    probes: int,
    seeds: Seeds,
) -> RoundRecord:
    """c[t, p] = sum over responders of w_k g_k[t, p] / P, w renormalised over the responders.

    Summed in float64 in the order of client index and rounded to float32 once, so the order of arrival changes nothing
    and N identical clients equal one. With per-client seeds each client keeps its own column instead of being summed.
    """
    clients = sorted(results)
    total = sum(weights[client] for client in clients)
    shares = np.zeros((steps, probes, len(clients)), np.float64)
    for column, client in enumerate(clients):
        g = results[client].g.astype(np.float64)
        shares[: len(g), :, column] = weights[client] / total * g / probes
    if seeds is Seeds.per_client:
        return RoundRecord(round=round, lr=lr, owners=tuple(clients), coefficients=shares.astype(np.float32))
    summed = np.zeros((steps, probes), np.float64)
    for column in range(len(clients)):
        summed += shares[:, :, column]
    return RoundRecord(round=round, lr=lr, owners=(SHARED,), coefficients=summed.astype(np.float32)[:, :, None])


def unmoved(record: RoundRecord) -> RoundRecord:
    """The record of a round that only measures: as long as its steps, but no rule moves theta along it in round 0.

    lr = 0 stops every step and the decay; c = 0 leaves what a rule remembers at zero.
    """
    return replace(record, lr=0.0, coefficients=np.zeros_like(record.coefficients))


def sample_clients(*, run_seed: int, round: int, num_clients: int, clients_per_round: int) -> list[int]:
    """The clients of a round, ascending; all of them when ``clients_per_round`` is 0."""
    if clients_per_round in (0, num_clients):
        return list(range(num_clients))
    order = permutation(stream_key(run_seed, round=round), num_clients, purpose=PURPOSE_SAMPLING)
    return sorted(order[:clients_per_round].tolist())
