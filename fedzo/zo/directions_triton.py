"""``add_direction`` as one fused kernel for CUDA: the direction is made in registers and never written down.

Only CUDA builds of torch bring triton, so ``fedzo.zo.directions`` imports this module where it can and otherwise uses
its integer torch path, which is equal bit for bit. To that end the Philox rounds are written out in unsigned 32-bit
words, and the compiler may not fuse the product into the sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fedzo.zo.config import Distribution

_COORDINATES = 1024  # that one program makes


@triton.jit
def _round(c0, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    m0: tl.constexpr = 0xD2511F53
    m1: tl.constexpr = 0xCD9E8D57
    a0 = tl.full(c0.shape, m0, tl.uint32)
    a1 = tl.full(c0.shape, m1, tl.uint32)
    return tl.umulhi(c2, a1) ^ c1 ^ k0, c2 * a1, tl.umulhi(c0, a0) ^ c3 ^ k1, c0 * a0


@triton.jit
def _words(block, k0, k1):  # type: ignore[no-untyped-def]
    """Words 0, 1, 2, 3 of the first block, then of the next, ...: uint32 [4 * blocks] from int64 [blocks]."""
    w0: tl.constexpr = 0x9E3779B9
    w1: tl.constexpr = 0xBB67AE85
    c0 = (block & 0xFFFFFFFF).to(tl.uint32)
    c1 = (block >> 32).to(tl.uint32)
    c2 = tl.zeros(block.shape, tl.uint32)
    c3 = tl.zeros(block.shape, tl.uint32)
    k0 = tl.zeros(block.shape, tl.uint32) + k0.to(tl.uint32, bitcast=True)
    k1 = tl.zeros(block.shape, tl.uint32) + k1.to(tl.uint32, bitcast=True)
    for _ in tl.static_range(10):
        c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
        k0 += tl.full(block.shape, w0, tl.uint32)
        k1 += tl.full(block.shape, w1, tl.uint32)
    return tl.interleave(tl.interleave(c0, c2), tl.interleave(c1, c3))


@triton.jit(do_not_specialize=["start", "numel", "k0", "k1"])  # type: ignore[untyped-decorator]
def _add_kernel(  # type: ignore[no-untyped-def]
    base, out, table, scale, start, numel, k0, k1, WIDTH: tl.constexpr, BLOCKS: tl.constexpr
):
    first = start // WIDTH + tl.program_id(0).to(tl.int64) * BLOCKS
    words = _words(first + tl.arange(0, BLOCKS), k0, k1)
    if WIDTH == 8:
        half = tl.interleave(words & 0xFFFF, words >> 16)
        z = tl.load(table + half.to(tl.int32))
    else:
        bit = words[:, None] >> tl.arange(0, 32)[None, :].to(tl.uint32) & 1
        z = 1.0 - 2.0 * tl.reshape(bit, [WIDTH * BLOCKS]).to(tl.float32)
    at = first * WIDTH - start + tl.arange(0, WIDTH * BLOCKS)
    inside = (at >= 0) & (at < numel)
    moved = tl.load(base + at, mask=inside, other=0.0).to(tl.float32) + z * scale
    if out.dtype.element_ty == tl.bfloat16:  # to nearest even here, so that the cast is exact: not all of them round
        bits = moved.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
        moved = tl.where(moved == moved, bits.to(tl.float32, bitcast=True), moved)  # as it is if not a number
    tl.store(out + at, moved.to(out.dtype.element_ty), mask=inside)


def add_direction_fused(
    base: torch.Tensor,
    key: int,
    *,
    scale: float,
    start: int,
    out: torch.Tensor,
    table: torch.Tensor,
    distribution: Distribution,
) -> None:
    """``out = cast(float32(base) + scale * z)``: one rounded product, one rounded sum, one cast.

    Args:
        base: Contiguous, not empty, of any shape; float32, bfloat16 or float16, on a CUDA device.
        key: Stream key.
        scale: A float32 value.
        start: Coordinate of ``base``'s first element.
        out: Contiguous, of the same shape and dtype; may be ``base``.
        table: The Gaussian table on the same device.
        distribution: Law of z.
    """
    width = 8 if distribution is Distribution.gaussian else 128
    blocks = _COORDINATES // width
    num_blocks = (start + base.numel() - 1) // width - start // width + 1
    words = (_signed(key & 0xFFFFFFFF), _signed(key >> 32))
    with torch.cuda.device(base.device):
        _add_kernel[(triton.cdiv(num_blocks, blocks),)](
            base, out, table, scale, start, base.numel(), *words, WIDTH=width, BLOCKS=blocks, enable_fp_fusion=False
        )


def _signed(word: int) -> int:
    """The same 32 bits as a signed integer, so that triton takes every word for an int32."""
    return word - (1 << 32) if word >= 1 << 31 else word
