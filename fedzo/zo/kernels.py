"""The CPU kernels of directions (Numba): Philox4x32-10 fused with what its words are for.

Words of a few hundred blocks are made first, then spent: the ten rounds written out have no inner loop and no strided
store, so that LLVM turns them into vector instructions. Nothing here
checks its arguments; ``fedzo.zo.directions`` calls it.
"""

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np

_TILE = 512  # blocks whose words are made together: 8 KiB, well within the first cache
SPAN = 1 << 15  # coordinates of one piece of parallel work


@nb.njit(inline="always")
def _two_rounds(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> Any:
    p0, p1 = nb.uint64(0xD2511F53) * nb.uint64(c0), nb.uint64(0xCD9E8D57) * nb.uint64(c2)
    c0, c2 = nb.uint32(nb.uint32(p1 >> nb.uint64(32)) ^ c1 ^ k0), nb.uint32(nb.uint32(p0 >> nb.uint64(32)) ^ c3 ^ k1)
    c1, c3 = nb.uint32(p1), nb.uint32(p0)
    k0, k1 = nb.uint32(k0 + nb.uint32(0x9E3779B9)), nb.uint32(k1 + nb.uint32(0xBB67AE85))
    p0, p1 = nb.uint64(0xD2511F53) * nb.uint64(c0), nb.uint64(0xCD9E8D57) * nb.uint64(c2)
    c0, c2 = nb.uint32(nb.uint32(p1 >> nb.uint64(32)) ^ c1 ^ k0), nb.uint32(nb.uint32(p0 >> nb.uint64(32)) ^ c3 ^ k1)
    c1, c3 = nb.uint32(p1), nb.uint32(p0)
    return c0, c1, c2, c3, nb.uint32(k0 + nb.uint32(0x9E3779B9)), nb.uint32(k1 + nb.uint32(0xBB67AE85))


@nb.njit(cache=True)
def make_words(words: Any, first: Any, count: Any, purpose: Any, k0: Any, k1: Any) -> None:
    """The four words of the blocks first, first + 1, ... into the rows of ``words`` [4, >= count]."""
    words0, words1, words2, words3 = words[0], words[1], words[2], words[3]
    for i in range(count):
        block = nb.uint64(first) + nb.uint64(i)
        c0, c1, c2, c3 = nb.uint32(block), nb.uint32(block >> nb.uint64(32)), nb.uint32(purpose), nb.uint32(0)
        c0, c1, c2, c3, a, b = _two_rounds(c0, c1, c2, c3, k0, k1)
        c0, c1, c2, c3, a, b = _two_rounds(c0, c1, c2, c3, a, b)
        c0, c1, c2, c3, a, b = _two_rounds(c0, c1, c2, c3, a, b)
        c0, c1, c2, c3, a, b = _two_rounds(c0, c1, c2, c3, a, b)
        c0, c1, c2, c3, a, b = _two_rounds(c0, c1, c2, c3, a, b)
        words0[i], words1[i], words2[i], words3[i] = c0, c1, c2, c3


@nb.njit(inline="always")
def _add_gaussian(base: Any, out: Any, table: Any, scale: Any, words: Any, i: Any, at: Any) -> None:
    """Spend the words of one block on its eight coordinates, of which the first lies at ``at``."""
    if at >= 0 and at + 8 <= out.size:
        for j in range(4):
            word = words[j, i]
            out[at + 2 * j] = base[at + 2 * j] + scale * table[word & nb.uint32(0xFFFF)]
            out[at + 2 * j + 1] = base[at + 2 * j + 1] + scale * table[word >> nb.uint32(16)]
    else:
        for j in range(8):
            if 0 <= at + j < out.size:
                half = words[j // 2, i] >> nb.uint32(16 * (j % 2)) & nb.uint32(0xFFFF)
                out[at + j] = base[at + j] + scale * table[half]


@nb.njit(inline="always")
def _add_signs(base: Any, out: Any, scale: Any, words: Any, i: Any, at: Any) -> None:
    """The same for the 128 coordinates of a block of signs."""
    inside = at >= 0 and at + 128 <= out.size
    for j in range(4):
        word = words[j, i]
        for bit in range(32):
            k = at + 32 * j + bit
            if inside or 0 <= k < out.size:
                out[k] = base[k] + (-scale if (word >> nb.uint32(bit)) & nb.uint32(1) else scale)


@nb.njit(cache=True)
def _add_span(base: Any, out: Any, table: Any, scale: Any, start: Any, width: Any, k0: Any, k1: Any) -> None:
    """out = base + scale * z, where z starts at the coordinate ``start``; ``width``: coordinates a block."""
    words = np.empty((4, _TILE), np.uint32)
    end = (start + out.size - 1) // width + 1
    for first in range(start // width, end, _TILE):
        count = min(_TILE, end - first)
        make_words(words, first, count, 0, k0, k1)
        for i in range(count):
            at = (first + i) * width - start
            if width == 8:
                _add_gaussian(base, out, table, scale, words, i, at)
            else:
                _add_signs(base, out, scale, words, i, at)


@nb.njit(parallel=True, cache=True)
def add_kernel(base: Any, out: Any, table: Any, scale: Any, start: Any, width: Any, k0: Any, k1: Any) -> None:
    """out = base + scale * z for flat float32 arrays; one rounded product and one rounded sum a coordinate."""
    for i in nb.prange((out.size + SPAN - 1) // SPAN):
        low, high = i * SPAN, min((i + 1) * SPAN, out.size)
        _add_span(base[low:high], out[low:high], table, scale, start + low, width, k0, k1)


@nb.njit(parallel=True, cache=True)
def add_rows_kernel(base: Any, out: Any, table: Any, scale: Any, starts: Any, width: Any, k0: Any, k1: Any) -> None:
    """The same for each row of ``base`` and ``out`` [R, C]; ``starts`` [R]: the coordinates of their first elements."""
    for row in nb.prange(starts.size):
        _add_span(base[row], out[row], table, scale, starts[row], width, k0, k1)


@nb.njit(cache=True)
def _halves_span(out: Any, start: Any, purpose: Any, k0: Any, k1: Any) -> None:
    words = np.empty((4, _TILE), np.uint32)
    end = (start + out.size - 1) // 8 + 1
    for first in range(start // 8, end, _TILE):
        count = min(_TILE, end - first)
        make_words(words, first, count, purpose, k0, k1)
        for i in range(count):
            at = (first + i) * 8 - start
            for j in range(8):
                if 0 <= at + j < out.size:
                    out[at + j] = words[j // 2, i] >> nb.uint32(16 * (j % 2)) & nb.uint32(0xFFFF)


@nb.njit(parallel=True, cache=True)
def halves_kernel(out: Any, start: Any, purpose: Any, k0: Any, k1: Any) -> None:
    """The 16-bit draws of the coordinates from ``start`` on, into ``out`` (int32)."""
    for i in nb.prange((out.size + SPAN - 1) // SPAN):
        low, high = i * SPAN, min((i + 1) * SPAN, out.size)
        _halves_span(out[low:high], start + low, purpose, k0, k1)


@nb.njit(inline="always")
def _dot_gaussian(vector: Any, table: Any, words: Any, i: Any, at: Any) -> Any:
    """The sum over one block's coordinates, in their order."""
    total = 0.0
    if at >= 0 and at + 8 <= vector.size:
        for j in range(4):
            word = words[j, i]
            total += nb.float64(vector[at + 2 * j]) * nb.float64(table[word & nb.uint32(0xFFFF)])
            total += nb.float64(vector[at + 2 * j + 1]) * nb.float64(table[word >> nb.uint32(16)])
    else:
        for j in range(8):
            if 0 <= at + j < vector.size:
                half = words[j // 2, i] >> nb.uint32(16 * (j % 2)) & nb.uint32(0xFFFF)
                total += nb.float64(vector[at + j]) * nb.float64(table[half])
    return total


@nb.njit(inline="always")
def _dot_signs(vector: Any, words: Any, i: Any, at: Any) -> Any:
    """The same for a block of signs."""
    total = 0.0
    inside = at >= 0 and at + 128 <= vector.size
    for j in range(4):
        word = words[j, i]
        for bit in range(32):
            k = at + 32 * j + bit
            if inside or 0 <= k < vector.size:
                value = nb.float64(vector[k])
                total += -value if (word >> nb.uint32(bit)) & nb.uint32(1) else value
    return total


@nb.njit(cache=True)
def _dot_span(vector: Any, table: Any, start: Any, width: Any, k0: Any, k1: Any) -> Any:
    """The inner product of ``vector`` with z from the coordinate ``start`` on: blocks summed in their order."""
    words = np.empty((4, _TILE), np.uint32)
    end = (start + vector.size - 1) // width + 1
    total = 0.0
    for first in range(start // width, end, _TILE):
        count = min(_TILE, end - first)
        make_words(words, first, count, 0, k0, k1)
        for i in range(count):
            at = (first + i) * width - start
            if width == 8:
                total += _dot_gaussian(vector, table, words, i, at)
            else:
                total += _dot_signs(vector, words, i, at)
    return total


@nb.njit(parallel=True, cache=True)
def dot_kernel(vector: Any, sums: Any, table: Any, start: Any, width: Any, k0: Any, k1: Any) -> None:
    """Inner products of ``vector`` with z, one for each span of ``SPAN`` coordinates, into ``sums`` (float64)."""
    for i in nb.prange(sums.size):
        low, high = i * SPAN, min((i + 1) * SPAN, vector.size)
        sums[i] = _dot_span(vector[low:high], table, start + low, width, k0, k1)
