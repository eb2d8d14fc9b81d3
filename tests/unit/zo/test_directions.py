"""Directions against golden vectors of an independent implementation, and against their own other paths."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from fedzo.zo import directions
from fedzo.zo.config import Distribution
from fedzo.zo.kernels import SPAN

GOLDEN = json.loads((Path(__file__).parent / "directions_golden.json").read_text())
LAWS = list(Distribution)


def key_of(vector: dict[str, Any]) -> int:
    names = ("round", "step", "probe", "owner")
    return directions.stream_key(vector["run_seed"], **{name: vector[name] for name in names})


def as_hex(values: np.ndarray) -> list[str]:
    return [f"{bits:08x}" for bits in np.asarray(values, np.float32).view(np.uint32)]


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_published_known_answers(counter: Any, key: Any, words: str) -> None:
    assert " ".join(f"{word:08x}" for word in directions.philox(counter, key)) == words


def test_table_is_the_specified_file() -> None:
    table = directions.gaussian_table()

    assert hashlib.sha256(table.astype("<f4").tobytes()).hexdigest() == (
        "8babbcaf96568f10165a1eab530c0e5c92d04de96761b6dbb3dadfa94baba37f"
    )
    assert np.array_equal(table, -table[::-1])


@pytest.mark.parametrize("vector", GOLDEN, ids=lambda v: v["key"])
def test_directions_equal_the_golden_vectors(vector: dict[str, Any]) -> None:
    key = key_of(vector)

    gaussian = directions.direction(key, 100_000)
    signs = directions.direction(key, 100_000, distribution=Distribution.rademacher)

    assert hex(key) == vector["key"]
    assert as_hex(gaussian[:8]) == vector["gaussian_hex_0_8"]
    assert signs[:16].astype(int).tolist() == vector["rademacher_0_16"]
    assert hashlib.sha256(gaussian.astype("<f4").tobytes()).hexdigest() == vector["gaussian_sha256_first_100000"]
    assert hashlib.sha256(signs.astype("<f4").tobytes()).hexdigest() == vector["rademacher_sha256_first_100000"]


@pytest.mark.parametrize("vector", GOLDEN, ids=lambda v: v["key"])
def test_single_coordinates_far_away_equal_the_golden_vectors_on_both_paths(vector: dict[str, Any]) -> None:
    key = key_of(vector)

    for at, bits in vector["gaussian_at"].items():
        assert as_hex(directions.direction(key, 1, start=int(at))) == [bits]
        assert as_hex(directions.direction_at(key, torch.tensor([int(at)])).numpy()) == [bits]
    for at, sign in vector["rademacher_at"].items():
        law = Distribution.rademacher
        assert directions.direction(key, 1, start=int(at), distribution=law).tolist() == [sign]
        assert directions.direction_at(key, torch.tensor([int(at)]), distribution=law).tolist() == [sign]


class DividesThroughFloat32(TorchFunctionMode):
    """As torch before 2.8 divided integers on Apple's GPUs."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ not in ("__mod__", "remainder", "__floordiv__", "floor_divide"):
            return func(*args, **(kwargs or {}))
        value, by = args
        wide = value.to(torch.float32)
        quotient = (wide / by).floor()
        return (wide - quotient * by if func.__name__ in ("__mod__", "remainder") else quotient).to(value.dtype)


@pytest.mark.parametrize("law", LAWS)
def test_no_coordinate_is_divided_on_a_device(law: Distribution) -> None:
    start = 2**35 - 1001
    coordinates = torch.arange(start, start + 4099)

    with DividesThroughFloat32():
        assert not torch.equal(coordinates % 8, coordinates & 7)
        assert not torch.equal(coordinates // 8, coordinates >> 3)
        z = directions.direction_at(5, coordinates, distribution=law)

    assert np.array_equal(z.numpy(), directions.direction(5, 4099, start=start, distribution=law))


@given(
    key=st.integers(0, 2**64 - 1),
    start=st.integers(0, 2**40),
    sizes=st.lists(st.integers(0, 300), min_size=1, max_size=4),
    law=st.sampled_from(LAWS),
)
@settings(max_examples=30, deadline=None)
def test_any_chunking_gives_the_same_numbers(key: int, start: int, sizes: list[int], law: Distribution) -> None:
    whole = directions.direction(key, sum(sizes), start=start, distribution=law)

    offsets = np.cumsum([0, *sizes[:-1]])
    pieces = [
        directions.direction(key, size, start=start + int(offset), distribution=law)
        for size, offset in zip(sizes, offsets, strict=True)
    ]
    torch_path = directions.direction_at(key, torch.arange(start, start + sum(sizes)), distribution=law)

    assert np.array_equal(whole, np.concatenate(pieces))
    assert np.array_equal(whole, torch_path.numpy())


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_add_direction_is_one_product_one_sum_one_cast(law: Distribution, dtype: torch.dtype) -> None:
    base = (torch.arange(-5000, 5000) / 7000).to(dtype)
    z = torch.from_numpy(directions.direction(9, 10_000, start=3, distribution=law))

    out = directions.add_direction(base, 9, scale=1e-3, start=3, distribution=law)

    scaled = z * torch.tensor(1e-3, dtype=torch.float32)
    assert torch.equal(out, (base.float() + scaled).to(dtype))


def test_add_direction_in_place_equals_sub_of_the_product() -> None:
    base = torch.linspace(-1, 1, 4099)
    z = torch.from_numpy(directions.direction(5, 4099))
    s = np.float32(3.3e-4)
    expected = base.clone().sub_(z * torch.tensor(s))

    directions.add_direction(base, 5, scale=-s, out=base)

    assert torch.equal(base, expected)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_equal_the_rows_of_the_whole(law: Distribution, dtype: torch.dtype) -> None:
    weight = torch.linspace(-1, 1, 50 * 13).reshape(50, 13).to(dtype)
    rows = torch.tensor([49, 0, 7, 7])

    whole = directions.add_direction(weight, 11, scale=0.5, start=100, distribution=law)
    some = directions.add_direction_rows(weight[rows], 11, scale=0.5, starts=100 + rows * 13, distribution=law)

    assert torch.equal(some, whole[rows])


@pytest.mark.parametrize("law", LAWS)
def test_long_rows_equal_the_rows_of_the_whole(law: Distribution) -> None:
    """Longer than what a thread takes at a time."""
    columns = 2 * SPAN + 4465
    weight, rows = torch.linspace(-1, 1, 3 * columns).view(3, columns), torch.tensor([2, 0])
    whole = directions.add_direction(weight, 11, scale=0.5, start=100, distribution=law)

    some = directions.add_direction_rows(weight[rows], 11, scale=0.5, starts=100 + rows * columns, distribution=law)

    assert torch.equal(some, whole[rows])


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("start", [0, 5, 4096 - 3, 2**35 - 40_000])
def test_long_runs_of_coordinates_equal_single_ones(law: Distribution, start: int) -> None:
    """Longer than the pieces in which the CPU kernel works, from starts that are not theirs, past 2**32 blocks."""
    z = directions.direction(5, 70_001, start=start, distribution=law)

    single = directions.direction_at(5, torch.arange(start, start + len(z)), distribution=law)

    assert np.array_equal(z, single.numpy())


def test_permutation_is_a_permutation_that_depends_on_key_and_purpose() -> None:
    first = directions.permutation(1, 1000, purpose=3)

    assert sorted(first.tolist()) == list(range(1000))
    assert not np.array_equal(first, directions.permutation(2, 1000, purpose=3))
    assert not np.array_equal(first, directions.permutation(1, 1000, purpose=4))


def test_purposes_of_fedzo_are_distinct_and_below_those_of_plugins() -> None:
    purposes = [value for name, value in vars(directions).items() if name.startswith("PURPOSE_")]

    assert len(set(purposes)) == len(purposes) == 11
    assert max(purposes) < 256
    drawn = [directions.gaussians(5, 100, purpose=purpose).tobytes() for purpose in (*purposes, 256, 257)]
    assert len(set(drawn)) == 13


def test_global_generators_are_untouched() -> None:
    before, numpy_before = torch.random.get_rng_state(), np.random.get_state()[1].copy()

    directions.direction(3, 1000)
    directions.permutation(3, 1000, purpose=3)

    assert torch.equal(before, torch.random.get_rng_state())
    assert np.array_equal(numpy_before, np.random.get_state()[1])


@pytest.mark.parametrize("n", [1, 8, 37])
def test_gaussian_draws_of_a_purpose_are_halves_of_its_words(n: int) -> None:
    key = directions.stream_key(3, round=0)
    words = [
        word
        for b in range(5)
        for word in directions.philox((b, 0, directions.PURPOSE_INIT, 0), (key & 0xFFFFFFFF, key >> 32))
    ]
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]

    assert np.array_equal(
        directions.gaussians(key, n, purpose=directions.PURPOSE_INIT), directions.gaussian_table()[halves[:n]]
    )
    assert np.array_equal(
        directions.gaussians(key, n, purpose=directions.PURPOSE_DIRECTION), directions.direction(key, n)
    )


@pytest.mark.parametrize("n", [0, 1, 2, SPAN + 1])
def test_a_lot_is_the_complement_of_two_words_of_its_stream_the_low_one_first(n: int) -> None:
    words = directions.philox_words(2**64 - 9, purpose=5, num_words=2 * n).astype(np.uint64)

    lots = directions.lots(2**64 - 9, n, torch.device("cpu")).numpy()

    assert np.array_equal((lots ^ np.int64(-(2**63))).view(np.uint64), ~(words[0::2] | words[1::2] << np.uint64(32)))
