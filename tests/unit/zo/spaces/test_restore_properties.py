"""Whatever the space, the dtype, the law, eps and the key: a probe leaves every bit, and all paths compute the same.

Models are small, with what makes restoring hard: a tied embedding, a parameter that is a transposed view, a slice with
gaps in its memory, negative zeros and values near the ends of the dtype.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fedzo.zo import directions
from fedzo.zo.config import Distribution
from fedzo.zo.directions import add_direction, add_direction_rows, direction, direction_at
from fedzo.zo.spaces import full as full_space
from fedzo.zo.spaces.base import Space
from fedzo.zo.spaces.dense import DenseSpace
from fedzo.zo.spaces.full import FullSpace
from fedzo.zo.spaces.masked import MaskedSpace

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
LAWS = st.sampled_from(list(Distribution))
KEYS = st.integers(0, 2**64 - 1)
SCALES = st.one_of(
    st.floats(-4, 4, width=32),
    st.sampled_from([1e-3, -1e-3, 1e-30, 1e30, float(np.float32(1e-45)), 3e38]),
)
IDS = torch.tensor([[1, 5, 1], [10, 0, 7]])
EXTREMES = [0.0, -0.0, 1e-7, -1e-7, 6e-8, 65000.0, -65000.0, 1.0, -1.0, 0.1]


class Hard(nn.Module):
    """An embedding tied to the head, a transposed view, a slice with gaps, and a bias."""

    def __init__(self, dtype: torch.dtype, *, wild: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6, dtype=dtype)
        self.head = nn.Linear(6, 11, bias=True, dtype=dtype)
        self.head.weight = self.embed.weight
        self.turned = nn.Parameter(torch.empty(8, 6, dtype=dtype).t())
        self.gaps = nn.Parameter(torch.empty(8, 12, dtype=dtype)[:, ::2])
        self.requires_grad_(False)
        for number, parameter in enumerate(self.parameters()):
            numbers = torch.from_numpy(direction(number, parameter.numel())) * 0.3
            if wild:
                numbers[: len(EXTREMES)] = torch.tensor(EXTREMES)
            parameter.copy_(numbers.view(parameter.shape))

    def forward(self) -> torch.Tensor:
        hidden = self.embed(IDS)
        hidden = torch.tanh(F.linear(hidden, self.turned.t())) @ self.gaps
        return self.head(hidden)


def masked(model: Hard, law: Distribution) -> Space:
    picks = {name: torch.arange(number % 2, p.numel(), 3) for number, (name, p) in enumerate(model.named_parameters())}
    return MaskedSpace(model, picks, distribution=law)


def full(model: Hard, law: Distribution) -> Space:
    return FullSpace(model, distribution=law)


def dense(model: Hard, law: Distribution) -> Space:
    return DenseSpace([model.turned, model.gaps, model.head.bias], distribution=law)


SPACES = st.sampled_from([masked, full, dense])


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: raw(parameter) for name, parameter in model.named_parameters()}


def raw(tensor: torch.Tensor) -> bytes:
    whole = tensor.detach().contiguous()
    return (whole.view(torch.int16) if whole.dtype == torch.bfloat16 else whole).numpy().tobytes()


def build(make: Callable[[Hard, Distribution], Space], dtype: torch.dtype, law: Distribution, *, wild: bool) -> Any:
    model = Hard(torch.float32 if make is dense else dtype, wild=wild)
    return model, bits(model), make(model, law)


def values_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@given(
    make=SPACES,
    dtype=DTYPES,
    law=LAWS,
    wild=st.booleans(),
    probes=st.lists(st.tuples(SCALES, KEYS), min_size=1, max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_probes_leave_every_bit_and_every_tie(
    make: Any, dtype: torch.dtype, law: Distribution, wild: bool, probes: list[tuple[float, int]]
) -> None:
    model, before, trained = build(make, dtype, law, wild=wild)
    digest, check, theta = trained.digest(), trained.check(), trained.values().tobytes()

    for scale, key in probes:
        with trained.probe(scale, key):
            model()

    assert bits(model) == before
    assert (trained.digest(), trained.check(), trained.values().tobytes()) == (digest, check, theta)
    assert model.head.weight is model.embed.weight


@given(make=SPACES, dtype=DTYPES, law=LAWS, scale=SCALES, key=KEYS)
@settings(max_examples=30, deadline=None)
def test_a_probe_that_is_broken_off_leaves_every_bit(
    make: Any, dtype: torch.dtype, law: Distribution, scale: float, key: int
) -> None:
    model, before, trained = build(make, dtype, law, wild=True)

    def broken_off() -> None:
        with trained.probe(scale, key):
            model()
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        broken_off()

    assert bits(model) == before


@given(make=SPACES, dtype=DTYPES, law=LAWS, scale=SCALES, key=KEYS, lr=st.floats(-1, 1, width=32))
@settings(max_examples=40, deadline=None)
def test_mark_and_rewind_bring_every_bit_back_after_steps_and_probes(
    make: Any, dtype: torch.dtype, law: Distribution, scale: float, key: int, lr: float
) -> None:
    model, before, trained = build(make, dtype, law, wild=True)

    trained.mark()
    for step in range(3):
        trained.step(lr, (key + step) % 2**64)
        with trained.probe(scale, key):
            pass
    trained.scale_by(0.75)
    trained.rewind()

    assert bits(model) == before
    trained.load(trained.values())
    assert bits(model) == before


@given(dtype=DTYPES, law=LAWS, scale=st.floats(-0.5, 0.5, width=32), key=KEYS)
@settings(max_examples=30, deadline=None)
def test_a_full_probe_computes_what_a_model_moved_by_hand_computes(
    dtype: torch.dtype, law: Distribution, scale: float, key: int
) -> None:
    model, _, trained = build(full, dtype, law, wild=False)
    twin = Hard(dtype, wild=False)
    start = 0
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        z = torch.from_numpy(direction(key, mine.numel(), start=start, distribution=law)).view(mine.shape)
        theirs.data = (mine.float() + z * torch.tensor(scale)).to(dtype)
        start += mine.numel()

    with trained.probe(scale, key):
        probed = model()

    assert torch.equal(probed, twin())


@given(dtype=DTYPES, law=LAWS, scale=st.floats(-0.5, 0.5, width=32), key=KEYS)
@settings(max_examples=30, deadline=None)
def test_a_masked_probe_moves_its_weights_by_one_product_one_sum_one_cast_and_no_other(
    dtype: torch.dtype, law: Distribution, scale: float, key: int
) -> None:
    model, _, trained = build(masked, dtype, law, wild=False)
    expected, start = values_of(model), 0
    for number, weight in enumerate(expected.values()):
        flat = np.arange(number % 2, weight.numel(), 3)
        z = torch.from_numpy(direction(key, len(flat), start=start, distribution=law))
        at = np.unravel_index(flat, tuple(weight.shape))
        weight[at] = (weight[at].float() + z * torch.tensor(scale)).to(dtype)
        start += len(flat)

    with trained.probe(scale, key):
        moved = values_of(model)

    assert [name for name in expected if not torch.equal(moved[name], expected[name])] == []


@contextmanager
def small_pieces(size: int) -> Iterator[None]:
    """Widen and scale a few values, and read a few bytes at a time."""
    kept = directions._CHUNK, full_space._CHUNK, full_space._READ_BYTES
    directions._CHUNK = full_space._CHUNK = full_space._READ_BYTES = size
    try:
        yield
    finally:
        directions._CHUNK, full_space._CHUNK, full_space._READ_BYTES = kept


@given(
    n=st.integers(0, 700),
    dtype=DTYPES,
    law=LAWS,
    scale=SCALES,
    key=KEYS,
    start=st.one_of(st.integers(0, 300), st.integers(2**35 - 300, 2**35 + 300)),
    chunk=st.integers(1, 200),
)
@settings(max_examples=80, deadline=None)
def test_fused_chunked_cut_and_plain_paths_give_the_same_bits(
    n: int, dtype: torch.dtype, law: Distribution, scale: float, key: int, start: int, chunk: int
) -> None:
    base = torch.from_numpy(direction(7, n)).to(dtype)
    z = direction_at(key, torch.arange(start, start + n), distribution=law)
    plain = (base.float() + z * torch.tensor(scale, dtype=torch.float32)).to(dtype)

    fused = add_direction(base, key, scale=scale, start=start, distribution=law)
    in_place = add_direction(out := base.clone(), key, scale=scale, start=start, out=out, distribution=law)
    with small_pieces(chunk):
        chunked = add_direction(base, key, scale=scale, start=start, distribution=law)
    cut = [
        add_direction(part, key, scale=scale, start=start + i * chunk, distribution=law)
        for i, part in enumerate(base.split(chunk))
    ]
    rows = base[: n - n % 7].view(-1, 7)
    starts = start + 7 * torch.arange(len(rows))
    by_rows = add_direction_rows(rows, key, scale=scale, starts=starts, distribution=law)

    for found in (fused, in_place, chunked, torch.cat(cut)):
        assert same_bits(found, plain)
    assert same_bits(by_rows.view(-1), plain[: n - n % 7])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and raw(a) == raw(b)


@given(dtype=DTYPES, factor=st.floats(-2, 2, width=32), chunk=st.integers(1, 40))
@settings(max_examples=20, deadline=None)
def test_scaling_in_pieces_is_scaling_at_once(dtype: torch.dtype, factor: float, chunk: int) -> None:
    model, _, trained = build(full, dtype, Distribution.gaussian, wild=True)
    expected = {name: (weight.float() * torch.tensor(factor)).to(dtype) for name, weight in values_of(model).items()}

    with small_pieces(chunk):
        trained.scale_by(factor)

    assert all(same_bits(weight, expected[name]) for name, weight in values_of(model).items())


@given(dtype=DTYPES, room=st.integers(1, 600))
@settings(max_examples=20, deadline=None)
def test_a_model_that_is_read_in_groups_is_the_one_that_is_read_at_once(dtype: torch.dtype, room: int) -> None:
    model, _, trained = build(full, dtype, Distribution.gaussian, wild=True)

    with small_pieces(room):
        values, digest, check = trained.values(), trained.digest(), trained.check()

    parts = list(model.parameters())
    whole = b"".join(map(raw, parts))  # each has fewer than 1,024 values, so the check is of all
    assert values.tobytes() == torch.cat([part.float().reshape(-1) for part in parts]).numpy().tobytes()
    assert (digest, check) == (hashlib.sha256(whole).hexdigest(), zlib.crc32(whole))
