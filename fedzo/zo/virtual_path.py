"""A client's virtual path: what the server knows of its local steps from scalars and directions alone.

Meerkat-vp (arXiv 2506.03337) compares every local step of a client with a gradient that the server holds:

    ghat_k[t] = mean over p of g_k[t, p] z[t, p]            the step's estimate, z restricted to the trained values
    GradIP_k[t] = <grad, ghat_k[t]> = mean over p of g_k[t, p] xi[t, p],    xi[t, p] = <grad, z[t, p]>

xi depends on the direction alone. So where all clients of a round share their seeds it is computed once for all of
them, O(T n) instead of O(K T n); with per-client seeds every client has directions of its own and pays for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fedzo.zo.config import Distribution
from fedzo.zo.directions import SHARED, add_direction, dot_direction
from fedzo.zo.path import Scalars
from fedzo.zo.seeds import OWN, step_key

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class VirtualPath:
    """One client's local steps of a round, float64 [T_k] each.

    Attributes:
        grad_ip: GradIP, signed; the paper's plots show its absolute value.
        abs_g: Mean over probes of |g|.
        cosine: GradIP / (|grad| |ghat|); nan where one of the two is zero.
    """

    grad_ip: Numbers
    abs_g: Numbers
    cosine: Numbers


def virtual_paths(
    gradient: torch.Tensor,
    scalars: Mapping[int, Scalars],
    *,
    run_seed: int,
    round: int,
    shared_seeds: bool,
    pool_size: int = OWN,
    distribution: Distribution,
) -> dict[int, VirtualPath]:
    """The virtual paths of all clients of one round, from what the audit log holds of it.

    Args:
        gradient: The server's gradient in the space's wire order (Meerkat: of the pre-training loss at the base
            weights, signed, restricted to the mask), float32 [n].
        scalars: g of each client, float32 [T_k, P]; T_k may differ.
        run_seed: Seed of the run's directions.
        round: Number of the round.
        shared_seeds: Whether all clients step along the same directions.
        pool_size: Where they do not, the size of the pool that theirs are drawn from; none by default.
        distribution: Law of the directions.

    Returns:
        A path for each client. Probes that were dropped (g = 0) count as 0.

    Raises:
        ValueError: The gradient is not a float32 vector, or clients differ in their number of probes.
    """
    if gradient.dtype != torch.float32 or gradient.ndim != 1:
        raise ValueError(f"the gradient must be float32 [n], got {gradient.dtype} {list(gradient.shape)}")
    if len({g.shape[1] for g in scalars.values()}) > 1:
        raise ValueError(f"all clients must have the same probes, got {[g.shape for g in scalars.values()]}")
    steps, probes = max((g.shape for g in scalars.values()), default=(0, 1))
    directions = SHARED if shared_seeds else pool_size
    norm = float(torch.linalg.vector_norm(gradient, dtype=torch.float64))

    def along(owner: int, clients: list[int], steps: int) -> dict[int, VirtualPath]:
        """The paths of clients that all step along the directions of one owner."""
        g = np.zeros((len(clients), steps, probes))
        for row, client in enumerate(clients):
            g[row, : len(scalars[client])] = scalars[client]
        xi, products = np.empty((steps, probes)), np.empty((steps, probes, probes))
        for t in range(steps):
            keys = [
                step_key(run_seed, round=round, step=t, probe=p, owner=owner, directions=directions)
                for p in range(probes)
            ]
            xi[t] = inner_products(gradient, keys, distribution=distribution)
            products[t] = gram(gradient, keys, distribution=distribution)
        grad_ip = (g * xi).mean(axis=2)
        norms = np.sqrt(np.maximum(((g[:, :, None] @ products)[:, :, 0] * g).sum(axis=2), 0)) / probes
        with np.errstate(invalid="ignore"):
            cosine = grad_ip / (norm * norms)
        abs_g = np.abs(g).mean(axis=2)
        ends = {client: len(scalars[client]) for client in clients}
        return {
            client: VirtualPath(grad_ip[row, : ends[client]], abs_g[row, : ends[client]], cosine[row, : ends[client]])
            for row, client in enumerate(clients)
        }

    if shared_seeds:
        return along(SHARED, list(scalars), steps)
    return {client: along(client, [client], len(g))[client] for client, g in scalars.items()}


def inner_products(gradient: torch.Tensor, keys: Sequence[int], *, distribution: Distribution) -> Numbers:
    """Xi of each direction, float64 [len(keys)]: <gradient, z>, one pass a direction that keeps nothing."""
    return np.array([dot_direction(gradient, key, distribution=distribution) for key in keys])


def gram(like: torch.Tensor, keys: Sequence[int], *, distribution: Distribution) -> Numbers:
    """<z_p, z_q> of directions as long as ``like``, float64 [P, P]; the diagonal holds their squared norms."""
    products = np.empty((len(keys), len(keys)))
    z = torch.empty_like(like)
    for p, key in enumerate(keys):
        add_direction(z.zero_(), key, scale=1.0, out=z, distribution=distribution)
        for q in range(p, len(keys)):
            products[p, q] = products[q, p] = dot_direction(z, keys[q], distribution=distribution)
    return products
