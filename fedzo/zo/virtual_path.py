"""A client's virtual path: what the server knows of its local steps from scalars and directions alone.

Meerkat-vp (arXiv 2506.03337) compares every local step of a client with a gradient that the server holds:

    ghat_k[t] = mean over p of g_k[t, p] z[t, p]            the step's estimate, z restricted to the trained values
    GradIP_k[t] = <grad, ghat_k[t]> = mean over p of g_k[t, p] xi[t, p],    xi[t, p] = <grad, z[t, p]>

xi depends on the direction alone. So where all clients of a round share their directions it is computed once for
all of them, O(T P n) instead of O(K T P n). The cosine also needs the length of ghat_k[t], from the inner products of a
step's directions with one another (``gram``): O(T P^2 n), once for all clients, too. Where every client has directions
of its own, it pays for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from fedzo.zo.config import Distribution
from fedzo.zo.directions import add_direction, dot_direction
from fedzo.zo.log import ScalarRecord, Scalars
from fedzo.zo.steps import scalars_and_keys

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class VirtualPath:
    """One client's local steps of a round, float64 [T_k] each.

    Attributes:
        grad_ip: GradIP, signed; the paper's plots show its absolute value.
        cosine: GradIP / (|grad| |ghat|); nan where one of the two is zero.
    """

    grad_ip: Numbers
    cosine: Numbers


def virtual_paths(
    gradient: torch.Tensor,
    scalars: Mapping[int, Scalars],
    record: ScalarRecord,
    xi: Numbers,
    *,
    run_seed: int,
    distribution: Distribution,
) -> dict[int, VirtualPath]:
    """The virtual paths of all clients of one round, from what the logs hold of it.

    Args:
        gradient: The server's gradient in the space's wire order (Meerkat: of the pre-training loss at the base
            weights, signed, restricted to the mask), float32 [n].
        scalars: g of each client, float32 [T_k, P]; T_k may differ.
        record: The round: its number, steps, probes and owners.
        xi: What ``round_products`` gives for the record.
        run_seed: Seed of the run's directions.
        distribution: Law of the directions.

    Returns:
        A path for each client. Probes that were dropped (g = 0) count as 0.

    Raises:
        ValueError: The gradient is not a float32 vector, or a client's scalars are not of the round's shape.
    """
    _check_gradient(gradient)
    steps, probes, _ = record.coefficients.shape
    if any(len(g) > steps or g.shape[1] != probes for g in scalars.values()):
        raise ValueError(f"g must be at most {steps} steps of {probes}, got {[g.shape for g in scalars.values()]}")
    norm = float(torch.linalg.vector_norm(gradient, dtype=torch.float64))
    columns = {owner: column for column, owner in enumerate(record.owners)}

    @lru_cache(maxsize=steps)  # what all share is made once; an owner's own is asked for once
    def products(column: int, step: int) -> Numbers:
        return gram(gradient, record.keys_of(run_seed, step=step, column=column), distribution=distribution)

    paths = {}
    for client, sent in scalars.items():
        g, column = sent.astype(np.float64), 0 if record.shared else columns[client]
        of_steps = np.array([products(column, step) for step in range(len(g))]).reshape(-1, probes, probes)
        squares = ((g[:, None] @ of_steps)[:, 0] * g).sum(axis=1)
        grad_ip = step_products(g, xi, column)
        with np.errstate(invalid="ignore"):
            cosine = grad_ip / (norm * np.sqrt(np.maximum(squares, 0)) / probes)
        paths[client] = VirtualPath(grad_ip, cosine)
    return paths


def step_products(g: npt.NDArray[np.floating], xi: Numbers, column: int) -> Numbers:
    """GradIP of each step, float64 [T_k], of scalars [T_k, P] along one owner's directions of a round."""
    products: Numbers = (g * xi[: len(g), :, column]).mean(axis=1)
    return products


def round_products(
    gradient: torch.Tensor, record: ScalarRecord, *, run_seed: int, distribution: Distribution
) -> Numbers:
    """Xi of each direction of a round, float64: [T, P, 1] where clients share them, else a column for each owner.

    One pass a direction, also where several scalars lie along the same.

    Raises:
        ValueError: The gradient is not a float32 vector.
    """
    _check_gradient(gradient)
    keys = [key for _, key in scalars_and_keys(record, run_seed=run_seed)]
    products = {key: dot_direction(gradient, key, distribution=distribution) for key in dict.fromkeys(keys)}
    xi = np.array([products[key] for key in keys]).reshape(record.coefficients.shape)
    return xi[:, :, :1] if record.shared else xi


def gram(like: torch.Tensor, keys: Sequence[int], *, distribution: Distribution) -> Numbers:
    """<z_p, z_q> of directions as long as ``like``, float64 [P, P]; the diagonal holds their squared norms."""
    products = np.empty((len(keys), len(keys)))
    z = torch.empty_like(like)
    for p, key in enumerate(keys):
        add_direction(z.zero_(), key, scale=1.0, out=z, distribution=distribution)
        for q in range(p, len(keys)):
            products[p, q] = products[q, p] = dot_direction(z, keys[q], distribution=distribution)
    return products


def _check_gradient(gradient: torch.Tensor) -> None:
    if gradient.dtype != torch.float32 or gradient.ndim != 1:
        raise ValueError(f"the gradient must be float32 [n], got {gradient.dtype} {list(gradient.shape)}")
