"""The CUDA kernels, run by the CPU from the same text, against the CPU's own; and on a GPU where there is one."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from fedzo.zo.config import Distribution
from fedzo.zo.directions import (
    _checked_kernels,
    add_direction,
    add_direction_rows,
    direction,
    fused,
    lots,
    philox_words,
    stream_key,
)
from fedzo.zo.directions_cuda import CudaDirections, Pieces
from fedzo.zo.tensor_group import TensorGroup

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCALE = float(np.float32(-1e-3))
CASES = [(0, 1), (0, 1024), (1, 17), (5, 3000), (8, 1), (2**35 - 1000, 3001), (2**40 + 3, 130), (16, 20_000)]
laws = pytest.mark.parametrize("law", list(Distribution))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def weights(n: int, dtype: torch.dtype) -> torch.Tensor:
    """Of many magnitudes, with what is not finite and what is below float16's normal range among them."""
    values = torch.from_numpy(direction(11, n) * np.exp2(direction(12, n) * 5))
    values[:1], values[1:2], values[2:3], values[3:4] = torch.inf, -0.0, 65519.0, 3e-6
    return values.to(dtype)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


@laws
@dtypes
def test_a_direction_has_the_cpus_bits_wherever_a_tensor_begins(
    law: Distribution, dtype: torch.dtype, kernels: CudaDirections
) -> None:
    for start, n in CASES:
        for key in (stream_key(0, round=1), 2**64 - 5):
            base = weights(n, dtype)
            want = add_direction(base, key, scale=SCALE, start=start, distribution=law)
            for offset in (0, 1):  # on 16 bytes and off them
                padded = torch.full((n + 8,), 7.0, dtype=dtype)
                out = padded[offset : offset + n]
                kernels.add(base, key, scale=SCALE, start=start, out=out, distribution=law)
                assert torch.equal(bits(out), bits(want)), (start, n, offset)
                assert (torch.cat([padded[:offset], padded[offset + n :]]) == 7).all(), "written beyond its end"
            kernels.add(base, key, scale=SCALE, start=start, out=base, distribution=law)
            assert torch.equal(bits(base), bits(want)), "in place"


@laws
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_stochastic_rounding_has_the_cpus_bits(law: Distribution, dtype: torch.dtype, kernels: CudaDirections) -> None:
    for start, n in CASES:
        weight = weights(n, dtype)
        want = add_direction(weight, 5, scale=SCALE, start=start, distribution=law, stochastic=True)

        kernels.add(weight, 5, scale=SCALE, start=start, out=weight, distribution=law, stochastic=True)

        assert torch.equal(bits(weight), bits(want)), (start, n)


@laws
@dtypes
def test_many_tensors_move_in_one_launch(
    law: Distribution, dtype: torch.dtype, kernels: CudaDirections, cpu_launch: object
) -> None:
    sizes = [5, 3000, 1, 8, 4096, 77, 2, 2, 2, 30_000, 9]
    starts = np.cumsum([0, *sizes[:-1]]).tolist()
    tensors = [weights(n, dtype) for n in sizes]
    want = [
        add_direction(tensor, 5, scale=SCALE, start=start, distribution=law)
        for tensor, start in zip(tensors, starts, strict=True)
    ]

    pieces = Pieces.of(tensors, starts, in_place=False)
    room = torch.full((pieces.room,), 7.0, dtype=dtype)
    kernels.add_pieces(pieces, 5, scale=SCALE, distribution=law, room=room)
    kernels.add_pieces(Pieces.of(tensors, starts, in_place=True), 5, scale=SCALE, distribution=law)

    assert all(torch.equal(bits(moved), bits(right)) for moved, right in zip(tensors, want, strict=True))
    width = 16 // dtype.itemsize
    found = room.split([-(-n // width) * width for n in sizes])
    assert all(torch.equal(bits(part[: len(right)]), bits(right)) for part, right in zip(found, want, strict=True))
    assert all((part[len(right) :] == 7).all() for part, right in zip(found, want, strict=True))
    assert cpu_launch.launched == ["add", "add"]  # type: ignore[attr-defined]


@laws
@dtypes
@pytest.mark.parametrize("first", [3, 0])  # off a unit's first weight, and on it where the columns allow
@pytest.mark.parametrize("columns", [1, 24, 37, 8191, 16_384, 20_011])
def test_rows_have_the_cpus_bits(
    law: Distribution, dtype: torch.dtype, columns: int, first: int, kernels: CudaDirections
) -> None:
    rows = weights(7 * columns, dtype).view(7, columns)
    starts = first + torch.tensor([0, 9, 4, 4, 2**33, 1, 5]) * columns
    out = torch.full_like(rows, 7.0)

    kernels.add_rows(rows, 5, scale=SCALE, starts=starts, out=out, distribution=law)

    assert torch.equal(bits(out), bits(add_direction_rows(rows, 5, scale=SCALE, starts=starts, distribution=law)))


@dtypes
def test_a_row_as_long_as_an_experts_matrix_is_shared_by_all_blocks(
    dtype: torch.dtype, kernels: CudaDirections, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch, started = kernels._launch, []

    def watched(*args: Any, blocks: int, **how: Any) -> None:
        started.append(blocks)
        launch(*args, blocks=blocks, **how)

    monkeypatch.setattr(kernels, "_launch", watched)
    rows, starts = weights(1 << 18, dtype).view(1, -1), torch.tensor([2**35 - 1001])
    few, out = weights(5 * 12, dtype).view(5, 12), torch.full_like(rows, 7.0)

    kernels.add_rows(rows, 5, scale=SCALE, starts=starts, out=out, distribution=Distribution.gaussian)
    kernels.add_rows(few, 5, scale=SCALE, starts=torch.arange(5), out=few, distribution=Distribution.gaussian)

    at_once = kernels._processors * (1 if kernels.shares_table else 2)
    assert started == [at_once, min(at_once, 5)]
    assert torch.equal(bits(out), bits(add_direction_rows(rows, 5, scale=SCALE, starts=starts)))


@laws
@dtypes
@pytest.mark.parametrize("key", [None, 5])
@pytest.mark.parametrize("update", [False, True])
def test_scattered_weights_are_cast_from_the_moved_values(
    law: Distribution, dtype: torch.dtype, key: int | None, update: bool, kernels: CudaDirections
) -> None:
    values = weights(1001, torch.float32)
    before = values.clone()
    moved = values if key is None else add_direction(values, key, scale=SCALE, distribution=law)
    places = torch.from_numpy(np.random.default_rng(0).permutation(5000)[:1001])
    weight = torch.full((5000,), 7.0, dtype=dtype)
    want = weight.index_copy(0, places, moved.to(dtype))

    addresses = weight.data_ptr() + places * weight.element_size()
    kernels.scatter(values, addresses, dtype, key, scale=SCALE, distribution=law, update=update)

    assert torch.equal(bits(weight), bits(want))
    assert torch.equal(bits(values), bits(moved.clone() if update else before))


@pytest.mark.parametrize("n", [1, 2, 5001])
def test_lots_are_the_streams_words(n: int, kernels: CudaDirections) -> None:
    words = philox_words(2**64 - 9, purpose=5, num_words=2 * n).astype(np.uint64)
    smaller_is_larger = ~(words[0::2] | words[1::2] << np.uint64(32))

    assert ((kernels.lots(2**64 - 9, n).numpy().astype(np.int64) ^ -(2**63)).view(np.uint64) == smaller_is_larger).all()


@pytest.mark.parametrize("fault", [None, "bits", "compiler"])
def test_kernels_are_used_only_if_they_make_the_specified_bits(
    fault: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Kernels:
        def add(self, base: torch.Tensor, key: int, *, out: torch.Tensor, **settings: Any) -> None:
            if fault == "compiler":
                raise RuntimeError("nvrtcCompileProgram failed: NVRTC_ERROR_INVALID_OPTION")
            add_direction(base, key, out=out, **settings)
            if fault == "bits":
                out[7] = torch.nextafter(out[7], torch.tensor(9.0))

    kernels = Kernels()
    monkeypatch.setattr("fedzo.zo.directions.cuda_directions", lambda device, table: kernels)

    found = _checked_kernels.__wrapped__(CPU)

    assert found is (None if fault else kernels)
    assert len(caplog.records) == (fault is not None)


def test_a_moment_without_memory_is_no_fault_of_the_kernels(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Kernels:
        def add(self, base: torch.Tensor, key: int, *, out: torch.Tensor, **settings: Any) -> None:
            add_direction(base, key, out=out, **settings)

    kernels, errors = Kernels(), [torch.OutOfMemoryError("CUDA_ERROR_OUT_OF_MEMORY"), RuntimeError("out of memory")]

    def made(device: torch.device, table: object) -> Kernels:
        if errors:
            raise errors.pop()
        return kernels

    monkeypatch.setattr("fedzo.zo.directions.cuda_directions", made)
    checked = cache(_checked_kernels.__wrapped__)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"OUT_OF_MEMORY|out of memory"):
            checked(CPU)

    assert checked(CPU) is kernels
    assert not caplog.records


@pytest.mark.parametrize(
    ("cuda", "remedy"), [("12.6", "pip install 'cuda-bindings==12.*'"), ("13.0", "==13.*'"), (None, "")]
)
def test_without_nvidias_bindings_there_are_no_kernels_and_a_warning_says_what_to_install(
    cuda: str | None, remedy: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.delitem(sys.modules, "fedzo.zo.nvrtc", raising=False)

    assert _checked_kernels.__wrapped__(CPU) is None
    assert "cannot be used on cpu, so directions take many times longer: " in caplog.text
    assert remedy in caplog.text
    assert ("pip install" in caplog.text) == (cuda is not None)


@pytest.mark.gpu
@laws
@dtypes
@pytest.mark.parametrize("integers", [False, True])
def test_cuda_makes_the_cpus_bits_on_both_paths(
    law: Distribution, dtype: torch.dtype, integers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fused(CUDA) is not None
    if integers:
        monkeypatch.setattr("fedzo.zo.directions.fused", lambda device: None)
    for n, start in ((3_000_001, 2**35 - 1_000_003), (3_000_000, 2**33), (1, 5), (77, 8)):
        base = weights(n, dtype)
        there = add_direction(base.cuda(), 9, scale=SCALE, start=start, distribution=law)
        assert torch.equal(bits(there.cpu()), bits(add_direction(base, 9, scale=SCALE, start=start, distribution=law)))


@pytest.mark.gpu
@laws
@dtypes
@pytest.mark.parametrize("shared_bytes", [1 << 18, 0])
def test_cuda_moves_many_tensors_rows_and_masks_with_the_cpus_bits(
    law: Distribution, dtype: torch.dtype, shared_bytes: int
) -> None:
    known = fused(CUDA)
    assert known is not None
    kernels = CudaDirections(known._launch, known._table, processors=known._processors, shared_bytes=shared_bytes)
    sizes = [5, 300_000, 1, 8, 4096, 77, 2, 2, 2, 3_000_000, 9]
    starts = np.cumsum([3, *sizes[:-1]]).tolist()
    for stochastic in (False, True):
        here = [weights(n, dtype) for n in sizes]
        there = [tensor.cuda() for tensor in here]
        TensorGroup(here, starts).add(5, scale=SCALE, distribution=law, stochastic=stochastic)
        pieces = Pieces.of(there, starts, in_place=True)
        kernels.add_pieces(pieces, 5, scale=SCALE, distribution=law, stochastic=stochastic)
        assert all(torch.equal(bits(a), bits(b.cpu())) for a, b in zip(here, there, strict=True))

    rows, first = weights(300 * 129, dtype).view(300, 129), torch.randperm(300) * 129 + 2**33
    out = torch.full_like(rows, 7.0).cuda()
    kernels.add_rows(rows.cuda(), 5, scale=SCALE, starts=first.cuda(), out=out, distribution=law)
    assert torch.equal(bits(out.cpu()), bits(add_direction_rows(rows, 5, scale=SCALE, starts=first, distribution=law)))

    matrices, first = weights(2 * 3_000_001, dtype).view(2, -1), torch.tensor([2**35, 7])
    out = torch.full_like(matrices, 7.0).cuda()
    kernels.add_rows(matrices.cuda(), 5, scale=SCALE, starts=first.cuda(), out=out, distribution=law)
    want = add_direction_rows(matrices, 5, scale=SCALE, starts=first, distribution=law)
    assert torch.equal(bits(out.cpu()), bits(want))

    values, places = weights(100_001, torch.float32), torch.randperm(1_000_000)[:100_001]
    moved = add_direction(values, 5, scale=SCALE, distribution=law)
    weight, master = torch.zeros(1_000_000, dtype=dtype).cuda(), values.cuda()
    addresses = weight.data_ptr() + places.cuda() * weight.element_size()
    kernels.scatter(master, addresses, dtype, 5, scale=SCALE, distribution=law, update=True)
    assert torch.equal(bits(master.cpu()), bits(moved))
    assert torch.equal(bits(weight.cpu()[places]), bits(moved.to(dtype)))


@pytest.mark.gpu
def test_cuda_draws_the_cpus_lots() -> None:
    assert torch.equal(lots(2**64 - 9, 1_000_001, CUDA).cpu(), lots(2**64 - 9, 1_000_001, CPU))


@pytest.mark.gpu
def test_a_kernel_is_started_in_a_thread_that_has_given_the_device_no_work() -> None:
    base = torch.zeros(1000, device=CUDA)
    want = add_direction(base, 5, scale=SCALE)

    with ThreadPoolExecutor(1) as threads:
        threads.submit(add_direction, base, 5, scale=SCALE, out=base).result()

    assert torch.equal(base, want)
