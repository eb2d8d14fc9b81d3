"""The CPU kernels of directions (Numba): Philox4x32-10 fused with what its words are for.

Words of some blocks are made, turned into a tile of z, and spent, all within the nearest caches. The rounds compute in
64-bit lanes, whose upper halves hold what the next product ignores: so no lane is packed or widened on the way, and
LLVM turns a round into six vector instructions. Nothing here checks its arguments; ``fedzo.zo.directions`` calls it.
"""

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np

_TILE = 1 << 14  # coordinates made together: 64 KiB of z and 32 KiB of words, within the second cache
SPAN = 1 << 15  # coordinates of one piece of parallel work
_LOW = nb.uint64(0xFFFFFFFF)


@nb.njit(inline="always")
def _two_rounds(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> Any:
    """Two rounds on the lower halves of 64-bit words."""
    p0, p1 = nb.uint64(0xD2511F53) * (c0 & _LOW), nb.uint64(0xCD9E8D57) * (c2 & _LOW)
    c0, c1, c2, c3 = (p1 >> nb.uint64(32)) ^ c1 ^ k0, p1, (p0 >> nb.uint64(32)) ^ c3 ^ k1, p0
    k0, k1 = k0 + nb.uint64(0x9E3779B9), k1 + nb.uint64(0xBB67AE85)
    p0, p1 = nb.uint64(0xD2511F53) * (c0 & _LOW), nb.uint64(0xCD9E8D57) * (c2 & _LOW)
    c0, c1, c2, c3 = (p1 >> nb.uint64(32)) ^ c1 ^ k0, p1, (p0 >> nb.uint64(32)) ^ c3 ^ k1, p0
    return c0, c1, c2, c3, k0 + nb.uint64(0x9E3779B9), k1 + nb.uint64(0xBB67AE85)


@nb.njit(cache=True)
def make_words(words: Any, first: Any, count: Any, purpose: Any, k0: Any, k1: Any) -> None:
    """The four words of the blocks first, first + 1, ... into the rows of ``words`` [4, >= count]."""
    words0, words1, words2, words3 = words[0], words[1], words[2], words[3]
    for i in range(count):
        block = nb.uint64(first) + nb.uint64(i)
        c0, c1, c2, c3, a, b = block & _LOW, block >> nb.uint64(32), nb.uint64(purpose), nb.uint64(0), k0, k1
        c0, c1, c2, c3, a, b = _two_rounds(c0, c1, c2, c3, nb.uint64(a), nb.uint64(b))
        c0, c1, c2, c3, a, b = _two_rounds(c0, c1, c2, c3, a, b)
        c0, c1, c2, c3, a, b = _two_rounds(c0, c1, c2, c3, a, b)
        c0, c1, c2, c3, a, b = _two_rounds(c0, c1, c2, c3, a, b)
        c0, c1, c2, c3, a, b = _two_rounds(c0, c1, c2, c3, a, b)
        words0[i], words1[i] = nb.uint32(c0 & _LOW), nb.uint32(c1 & _LOW)
        words2[i], words3[i] = nb.uint32(c2 & _LOW), nb.uint32(c3 & _LOW)


@nb.njit(inline="always")
def _look_up(z: Any, table: Any, words: Any, count: Any) -> None:
    """The Gaussian values of ``count`` blocks, eight each: two of a word, its lower half first."""
    for i in range(count):
        for j in range(4):
            word = words[j, i]
            z[8 * i + 2 * j] = table[word & nb.uint32(0xFFFF)]
            z[8 * i + 2 * j + 1] = table[word >> nb.uint32(16)]


@nb.njit(inline="always")
def _read_signs(z: Any, words: Any, count: Any, bits: Any) -> None:
    """The signs of ``count`` blocks, 128 each: one of a bit, a word's lowest first; a set bit is -1.

    ``bits`` is 32; a bound that the compiler does not know keeps it from unrolling the loop instead of vectorising it.
    """
    one = np.float32(1)
    for i in range(count):
        for j in range(4):
            word, at = words[j, i], (4 * i + j) * bits
            signs = z[at : at + bits]
            for bit in range(signs.size):
                signs[bit] = -one if (word >> nb.uint32(bit)) & nb.uint32(1) else one


@nb.njit(inline="always")
def _make_tile(z: Any, words: Any, table: Any, first: Any, count: Any, width: Any, k0: Any, k1: Any) -> None:
    """z of the blocks first, first + 1, ...; ``width``: coordinates a block, 8 Gaussian ones or 128 signs."""
    make_words(words, first, count, 0, k0, k1)
    if width == 8:
        _look_up(z, table, words, count)
    else:
        _read_signs(z, words, count, width // 4)


@nb.njit(cache=True)
def _add_span(base: Any, out: Any, table: Any, scale: Any, start: Any, width: Any, k0: Any, k1: Any) -> None:
    """out = base + scale * z, where z starts at the coordinate ``start``."""
    z, words = np.empty(_TILE, np.float32), np.empty((4, _TILE // 8), np.uint32)
    end = (start + out.size - 1) // width + 1
    for first in range(start // width, end, _TILE // width):
        count = min(_TILE // width, end - first)
        _make_tile(z, words, table, first, count, width, k0, k1)
        low, high = max(first * width - start, 0), min((first + count) * width - start, out.size)
        old, new, moves = base[low:high], out[low:high], z[low + start - first * width :]
        for i in range(new.size):  # of slices, whose indices from 0 on LLVM knows how to vectorise
            new[i] = old[i] + scale * moves[i]


@nb.njit(parallel=True, cache=True)
def add_kernel(base: Any, out: Any, table: Any, scale: Any, start: Any, width: Any, k0: Any, k1: Any) -> None:
    """out = base + scale * z for flat float32 arrays; one rounded product and one rounded sum a coordinate."""
    for i in nb.prange((out.size + SPAN - 1) // SPAN):
        low, high = i * SPAN, min((i + 1) * SPAN, out.size)
        _add_span(base[low:high], out[low:high], table, scale, start + low, width, k0, k1)


@nb.njit(parallel=True, cache=True)
def add_rows_kernel(base: Any, out: Any, table: Any, scale: Any, starts: Any, width: Any, k0: Any, k1: Any) -> None:
    """The same for each row of ``base`` and ``out`` [R, C]; ``starts`` [R]: the coordinates of their first elements."""
    spans = (base.shape[1] + SPAN - 1) // SPAN
    for i in nb.prange(starts.size * spans):
        row, low = i // spans, i % spans * SPAN
        high = min(low + SPAN, base.shape[1])
        _add_span(base[row, low:high], out[row, low:high], table, scale, starts[row] + low, width, k0, k1)


@nb.njit(cache=True)
def _halves_span(out: Any, start: Any, purpose: Any, k0: Any, k1: Any) -> None:
    draws, words = np.empty(_TILE, np.uint16), np.empty((4, _TILE // 8), np.uint32)
    end = (start + out.size - 1) // 8 + 1
    for first in range(start // 8, end, _TILE // 8):
        count = min(_TILE // 8, end - first)
        make_words(words, first, count, purpose, k0, k1)
        for i in range(count):
            for j in range(4):
                draws[8 * i + 2 * j] = words[j, i] & nb.uint32(0xFFFF)
                draws[8 * i + 2 * j + 1] = words[j, i] >> nb.uint32(16)
        low, high = max(first * 8 - start, 0), min((first + count) * 8 - start, out.size)
        out[low:high] = draws[low + start - first * 8 : high + start - first * 8]


@nb.njit(parallel=True, cache=True)
def halves_kernel(out: Any, start: Any, purpose: Any, k0: Any, k1: Any) -> None:
    """The 16-bit draws of the coordinates from ``start`` on, into ``out`` (int32 or uint16)."""
    for i in nb.prange((out.size + SPAN - 1) // SPAN):
        low, high = i * SPAN, min((i + 1) * SPAN, out.size)
        _halves_span(out[low:high], start + low, purpose, k0, k1)


@nb.njit(cache=True)
def _dot_span(vector: Any, table: Any, start: Any, width: Any, k0: Any, k1: Any) -> Any:
    """The inner product of ``vector`` with z from the coordinate ``start`` on: a sum a block, summed in their order."""
    z, words = np.empty(_TILE, np.float32), np.empty((4, _TILE // 8), np.uint32)
    end = (start + vector.size - 1) // width + 1
    total = 0.0
    for first in range(start // width, end, _TILE // width):
        count = min(_TILE // width, end - first)
        _make_tile(z, words, table, first, count, width, k0, k1)
        for i in range(count):
            at = (first + i) * width - start
            values, moves = vector[max(at, 0) : min(at + width, vector.size)], z[i * width + max(-at, 0) :]
            of_block = 0.0
            for k in range(values.size):
                of_block += nb.float64(values[k]) * nb.float64(moves[k])
            total += of_block
    return total


@nb.njit(parallel=True, cache=True)
def dot_kernel(vector: Any, sums: Any, table: Any, start: Any, width: Any, k0: Any, k1: Any) -> None:
    """Inner products of ``vector`` with z, one for each span of ``SPAN`` coordinates, into ``sums`` (float64)."""
    for i in nb.prange(sums.size):
        low, high = i * SPAN, min((i + 1) * SPAN, vector.size)
        sums[i] = _dot_span(vector[low:high], table, start + low, width, k0, k1)
