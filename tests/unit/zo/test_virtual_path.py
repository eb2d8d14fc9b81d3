"""Virtual paths against materialised float64 vectors, a pencil, and one client at a time."""

from __future__ import annotations

import math

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedzo.zo import directions
from fedzo.zo.config import Distribution
from fedzo.zo.directions import SHARED, direction, direction_at, dot_direction, stream_key
from fedzo.zo.kernels import SPAN
from fedzo.zo.keys import step_key
from fedzo.zo.log import ScalarRecord
from fedzo.zo.virtual_path import VirtualPath, round_products, virtual_paths

LAWS = list(Distribution)


def values(n: int, seed: int = 1) -> np.ndarray:
    return direction(seed, n) * np.linspace(0.1, 3, n, dtype=np.float32)


def paths_of(
    gradient: torch.Tensor,
    scalars: dict[int, np.ndarray],
    *,
    run_seed: int,
    round: int,
    shared: bool,
    distribution: Distribution,
) -> dict[int, VirtualPath]:
    """As the server gets them: the products of a record's directions, then the paths."""
    owners = (SHARED,) if shared else tuple(sorted(scalars))
    steps, probes = np.max([(1, 1), *(g.shape for g in scalars.values())], axis=0)
    record = ScalarRecord(
        round=round, lr=1.0, owners=owners, coefficients=np.zeros((steps, probes, len(owners)), np.float32)
    )
    xi = round_products(gradient, record, run_seed=run_seed, distribution=distribution)
    return virtual_paths(gradient, scalars, record, xi, run_seed=run_seed, distribution=distribution)


def slow(gradient: np.ndarray, g: np.ndarray, keys: list[list[int]], law: Distribution) -> list[tuple[float, ...]]:
    """(GradIP, cosine) of each step from whole vectors in float64."""
    out = []
    for row, of_step in zip(g.astype(np.float64), keys, strict=True):
        ghat = np.zeros(len(gradient))
        for scalar, key in zip(row, of_step, strict=True):
            ghat += scalar * direction(key, len(gradient), distribution=law).astype(np.float64)
        ghat /= len(row)
        wide = gradient.astype(np.float64)
        inner = float(wide @ ghat)
        norms = math.sqrt(wide @ wide) * math.sqrt(ghat @ ghat)
        out.append((inner, inner / norms if norms else math.nan))
    return out


def keys_of(owner: int, shape: tuple[int, ...], *, run_seed: int, round: int) -> list[list[int]]:
    return [
        [stream_key(run_seed, round=round, step=t, probe=p, owner=owner) for p in range(shape[1])]
        for t in range(shape[0])
    ]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("n", [1, 7, 8, 129, SPAN - 1, SPAN, SPAN + 1, 3 * SPAN + 5])
@pytest.mark.parametrize("start", [0, 3, 2**35 - 77])
def test_dot_is_the_exact_sum_of_products_rounded_a_few_times(law: Distribution, n: int, start: int) -> None:
    vector = values(n)
    z = direction(5, n, start=start, distribution=law)
    products = vector.astype(np.float64) * z.astype(np.float64)  # exact

    fused = dot_direction(torch.from_numpy(vector), 5, start=start, distribution=law)
    in_torch = directions._dot_in_torch(torch.from_numpy(vector), 5, start=start, distribution=law)

    bound = 1e-13 * np.abs(products).sum()
    assert abs(fused - math.fsum(products)) <= bound
    assert abs(in_torch - math.fsum(products)) <= bound


@pytest.mark.parametrize("law", LAWS)
def test_dot_has_the_same_bits_for_any_number_of_threads_and_is_made_of_its_spans(law: Distribution) -> None:
    vector = torch.from_numpy(values(5 * SPAN + 11))
    found = []
    for threads in range(1, numba.config.NUMBA_NUM_THREADS + 1):
        numba.set_num_threads(threads)
        found.append(dot_direction(vector, 9, distribution=law))
    pieces = 0.0
    for low in range(0, len(vector), SPAN):
        pieces += dot_direction(vector[low : low + SPAN], 9, start=low, distribution=law)

    assert set(found) == {pieces}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dot_of_other_shapes_and_dtypes_is_that_of_their_float32_values(dtype: torch.dtype) -> None:
    matrix = torch.from_numpy(values(60)).view(6, 10).to(dtype)

    assert dot_direction(matrix, 4, start=9) == dot_direction(matrix.float().reshape(-1), 4, start=9)
    assert dot_direction(matrix.T, 4) == dot_direction(matrix.T.contiguous().view(-1), 4)
    assert dot_direction(torch.empty(0), 4) == 0


def test_three_coordinates_by_hand() -> None:
    """grad = (1, 2, 2), one probe of signs; |grad| = 3, |z| = sqrt(3)."""
    key = stream_key(0, round=4)
    z = [float(direction_at(key, torch.tensor([i]), distribution=Distribution.rademacher)) for i in range(3)]
    xi = z[0] + 2 * z[1] + 2 * z[2]

    paths = paths_of(
        torch.tensor([1.0, 2.0, 2.0]),
        {3: np.array([[-0.5]], np.float32)},
        run_seed=0,
        round=4,
        shared=True,
        distribution=Distribution.rademacher,
    )

    assert paths[3].grad_ip.tolist() == [-0.5 * xi]
    assert paths[3].cosine.tolist() == pytest.approx([-xi / (3 * math.sqrt(3))], abs=1e-15)


@given(
    n=st.one_of(st.integers(1, 200), st.sampled_from([SPAN - 1, SPAN + 1])),
    steps=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    probes=st.integers(1, 3),
    law=st.sampled_from(LAWS),
    shared=st.booleans(),
    seed=st.integers(0, 2**64 - 1),
)
@settings(max_examples=25, deadline=None)
def test_all_clients_equal_whole_vectors_and_single_calls(
    n: int, steps: list[int], probes: int, law: Distribution, shared: bool, seed: int
) -> None:
    gradient = values(n)
    scalars = {
        2 * k + 1: direction(seed ^ k, t * probes).reshape(t, probes).astype(np.float32) for k, t in enumerate(steps)
    }

    def run(some: dict[int, np.ndarray]) -> dict:
        return paths_of(torch.from_numpy(gradient), some, run_seed=seed, round=6, shared=shared, distribution=law)

    together = run(scalars)

    assert list(together) == list(scalars)
    for client, g in scalars.items():
        path, alone = together[client], run({client: g})[client]
        keys = keys_of(SHARED if shared else client, g.shape, run_seed=seed, round=6)
        grad_ip, cosine = (list(column) for column in zip(*slow(gradient, g, keys, law), strict=True))
        scale = float(np.abs(g).sum() * np.abs(gradient).sum()) * 5
        assert path.grad_ip.tolist() == pytest.approx(grad_ip, abs=1e-12 * scale)
        assert path.cosine.tolist() == pytest.approx(cosine, abs=1e-9)
        for ours, single in ((path.grad_ip, alone.grad_ip), (path.cosine, alone.cosine)):
            assert np.array_equal(ours, single)


def test_directions_of_a_pool_are_those_that_the_client_drew() -> None:
    gradient, g = values(30), np.array([[0.5, -2.0], [1.0, 3.0]], np.float32)
    keys = [[step_key(7, round=2, step=t, probe=p, owner=4, directions=3) for p in range(2)] for t in range(2)]

    record = ScalarRecord(round=2, lr=1.0, owners=(4,), coefficients=g[:, :, None], directions=3)
    xi = round_products(torch.from_numpy(gradient), record, run_seed=7, distribution=Distribution.gaussian)
    path = virtual_paths(
        torch.from_numpy(gradient), {4: g}, record, xi, run_seed=7, distribution=Distribution.gaussian
    )[4]

    assert path.grad_ip.tolist() == pytest.approx([row[0] for row in slow(gradient, g, keys, Distribution.gaussian)])


def test_where_clients_share_directions_a_record_with_their_own_columns_has_one_product_a_direction() -> None:
    """SCAFFOLD's and FedDyn's records keep each client's scalars along the same directions."""
    gradient, law = torch.linspace(-1, 1, 40), Distribution.gaussian
    own = ScalarRecord(round=2, lr=0.1, owners=(0, 3), coefficients=np.ones((2, 2, 2), np.float32), directions=SHARED)
    common = ScalarRecord(round=2, lr=0.1, owners=(SHARED,), coefficients=np.ones((2, 2, 1), np.float32))

    xi = round_products(gradient, own, run_seed=7, distribution=law)

    assert xi.shape == (2, 2, 1)
    assert np.array_equal(xi, round_products(gradient, common, run_seed=7, distribution=law))


def test_a_direction_is_read_once_for_all_clients_that_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedzo.zo import virtual_path

    asked: list[int] = []
    original = virtual_path.dot_direction
    monkeypatch.setattr(
        virtual_path, "dot_direction", lambda v, key, **more: asked.append(key) or original(v, key, **more)
    )
    g = np.ones((3, 1), np.float32)

    def count(num_clients: int, *, shared: bool) -> int:
        asked.clear()
        paths_of(
            torch.ones(50),
            dict.fromkeys(range(num_clients), g),
            run_seed=1,
            round=0,
            shared=shared,
            distribution=Distribution.gaussian,
        )
        return len(asked)

    assert count(1, shared=True) == count(20, shared=True) == 6  # three directions: xi and the norm
    assert count(20, shared=False) == 20 * 6


def test_a_dropped_step_has_no_direction_and_no_clients_have_no_paths() -> None:
    def run(scalars: dict[int, np.ndarray], gradient: torch.Tensor) -> dict:
        return paths_of(gradient, scalars, run_seed=1, round=0, shared=True, distribution=Distribution.gaussian)

    path = run({0: np.array([[0.0], [1.0]], np.float32)}, torch.ones(20))[0]

    assert path.grad_ip[0] == 0
    assert np.isnan(path.cosine).tolist() == [True, False]
    assert np.isnan(run({0: np.ones((1, 1), np.float32)}, torch.zeros(20))[0].cosine).tolist() == [True]
    assert run({}, torch.ones(20)) == {}


@pytest.mark.parametrize(
    ("gradient", "scalars", "message"),
    [
        (torch.ones(3, dtype=torch.float64), {}, r"must be float32 \[n\], got torch.float64 \[3\]"),
        (
            torch.ones(3),
            {0: np.ones((1, 1), np.float32), 1: np.ones((1, 2), np.float32)},
            r"at most 1 steps of 2, got \[\(1, 1\), \(1, 2\)\]",
        ),
    ],
)
def test_what_is_no_round_is_refused(gradient: torch.Tensor, scalars: dict[int, np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paths_of(gradient, scalars, run_seed=0, round=0, shared=True, distribution=Distribution.gaussian)


def test_the_mean_over_directions_is_the_inner_product_of_the_gradients() -> None:
    """With g = <grad_k, z> the signed GradIP estimates <grad, grad_k>, as the estimator is unbiased."""
    n, steps = 40, 4000
    server, client = values(n, 1), values(n, 2)
    keys = keys_of(SHARED, (steps, 1), run_seed=3, round=0)
    z = np.array([direction(of_step[0], n) for of_step in keys])
    g = (z @ client).astype(np.float32)[:, None]

    path = paths_of(
        torch.from_numpy(server),
        {0: g},
        run_seed=3,
        round=0,
        shared=True,
        distribution=Distribution.gaussian,
    )[0]

    spread = float(path.grad_ip.std()) / math.sqrt(steps)
    assert abs(path.grad_ip.mean() - float(server @ client)) < 4 * spread
