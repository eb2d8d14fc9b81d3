"""Directions: the random vectors of a run as a pure function of (key, coordinate), algorithm ``philox4x32-10/1``.

Every random number of a run comes from Philox4x32-10 (Salmon et al., SC 2011) at a position that is written down: no
state, no order, no device. ``docs/explanation-randomness.md`` is the specification; the golden vectors in the tests
come from an implementation that is not this one. There are three implementations, equal bit for bit: Numba kernels for
the CPU (``fedzo.zo.kernels``), CUDA C++ (``fedzo.zo.directions_cuda``), and plain integer torch, here, for every
other device.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib.resources import files

import numpy as np
import numpy.typing as npt
import torch

from fedzo.system import is_out_of_memory
from fedzo.zo.config import Distribution
from fedzo.zo.directions_cuda import CudaDirections, cuda_directions
from fedzo.zo.kernels import SPAN, add_kernel, add_rows_kernel, dot_kernel, halves_kernel, make_words
from fedzo.zo.rounding import is_rounded, round_stochastically

log = logging.getLogger(__name__)

SHARED = 0xFFFFFFFF
"""The owner of directions that all clients share."""
PURPOSE_DIRECTION, PURPOSE_ROUNDING, PURPOSE_DATA, PURPOSE_SAMPLING, PURPOSE_MASK, PURPOSE_INIT = 0, 1, 3, 4, 5, 6
PURPOSE_POOL = 7
PURPOSE_SPLIT, PURPOSE_DEAL, PURPOSE_HOLDOUT, PURPOSE_SELECTION = 16, 17, 18, 19  # those from 256 on are plugins'

Words = npt.NDArray[np.uint32]
_M0, _M1, _W0, _W1 = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85
_MASK32 = 0xFFFFFFFF
_CHUNK = 1 << 20  # coordinates a scratch buffer holds where a kernel cannot be fused


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """One block of Philox4x32-10 in plain integers: four 32-bit words from four counter and two key words.

    Example:
        >>> [f"{word:08x}" for word in philox((0, 0, 0, 0), (0, 0))]
        ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK32, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK32
        k0, k1 = (k0 + _W0) & _MASK32, (k1 + _W1) & _MASK32
    return c0, c1, c2, c3


def stream_key(run_seed: int, *, round: int, step: int = 0, probe: int = 0, owner: int = SHARED) -> int:
    """The 64-bit key of one stream. ``owner`` is ``SHARED`` or the client's index in the run.

    Example:
        >>> hex(stream_key(0, round=0))
        '0xfa3bfcddcc97cef4'
    """
    words = philox((round, step, probe, owner), (run_seed & _MASK32, run_seed >> 32))
    return words[0] | words[1] << 32


@cache
def gaussian_table() -> npt.NDArray[np.float32]:
    """The 65,536 Gaussian quantiles (float32, unit variance) that a 16-bit draw selects."""
    data = (files("fedzo.zo") / "gaussian_u16.f32").read_bytes()
    return np.frombuffer(data, dtype="<f4").astype(np.float32)


@cache
def _table_on(device: torch.device) -> torch.Tensor:
    return torch.from_numpy(gaussian_table().copy()).to(device)


def halves(key: int, n: int, *, purpose: int, start: int = 0) -> npt.NDArray[np.int32]:
    """The 16-bit draws (0 to 65535, int32 [n]) of the coordinates start, start + 1, ...: ``halves_at`` for the CPU."""
    out = np.empty(n, np.int32)
    halves_kernel(out, start, purpose, *_key_words(key))
    return out


def philox_words(key: int, *, purpose: int, num_words: int) -> Words:
    """The first ``num_words`` 32-bit words of a stream for ``purpose`` (data order, sampling, ...)."""
    words = np.empty((4, -(-num_words // 4)), dtype=np.uint32)
    make_words(words, 0, words.shape[1], purpose, *_key_words(key))
    return np.ascontiguousarray(words.T).reshape(-1)[:num_words]


def lots(key: int, n: int, device: torch.device) -> torch.Tensor:
    """``n`` 64-bit draws of a stream for random masks, int64 [n]: larger where the draw, taken unsigned, is smaller.

    Draw i is word 2 i and, above it, word 2 i + 1. On ``device`` where that has fused kernels, else on the CPU.
    """
    if n and (kernels := fused(device)) is not None:
        return kernels.lots(key, n)
    draws = np.empty(4 * n, np.uint16)
    halves_kernel(draws, 0, PURPOSE_MASK, *_key_words(key))  # a word is two halves, the low one first; a lot two words
    return torch.from_numpy(~(draws.view(np.uint64) ^ np.uint64(1 << 63)).view(np.int64))


def gaussians(key: int, n: int, *, purpose: int) -> npt.NDArray[np.float32]:
    """The first ``n`` Gaussian draws of a stream for ``purpose``, float32: 16-bit halves of its words, low half first.

    For ``PURPOSE_DIRECTION`` this is the Gaussian direction itself.
    """
    return gaussian_table()[halves(key, n, purpose=purpose)]


def permutation(key: int, n: int, *, purpose: int) -> npt.NDArray[np.int64]:
    """A uniform permutation of 0..n-1: indices ranked by a 64-bit word each, equal words by index."""
    words = philox_words(key, purpose=purpose, num_words=2 * n).astype(np.uint64)
    return np.argsort(words[0::2] | words[1::2] << np.uint64(32), kind="stable")


def _key_words(key: int) -> tuple[np.uint32, np.uint32]:
    return np.uint32(key & _MASK32), np.uint32(key >> 32)


def _width(distribution: Distribution) -> int:
    return 8 if distribution is Distribution.gaussian else 128


def _words_at(key: int, block: torch.Tensor, *, purpose: int) -> torch.Tensor:
    """The four words of arbitrary blocks (int64, any shape, any device); int64 [..., 4]. Pure torch integers."""
    c = [block & _MASK32, block >> 32, torch.full_like(block, purpose), torch.zeros_like(block)]
    k0, k1 = key & _MASK32, key >> 32
    for _ in range(10):
        # a 32 x 32 bit product wraps in int64, but its 64 bits are right: >> then & recovers the high word
        p0, p1 = c[0] * _M0, c[2] * _M1
        c = [(p1 >> 32 & _MASK32) ^ c[1] ^ k0, p1 & _MASK32, (p0 >> 32 & _MASK32) ^ c[3] ^ k1, p0 & _MASK32]
        k0, k1 = (k0 + _W0) & _MASK32, (k1 + _W1) & _MASK32
    return torch.stack(c, dim=-1)


def _pick(words: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
    return torch.gather(words, -1, which.unsqueeze(-1)).squeeze(-1)


def halves_at(key: int, coordinates: torch.Tensor, *, purpose: int) -> torch.Tensor:
    """The 16-bit draws of arbitrary coordinates (int64, any shape, any device); int64 of the same shape.

    Coordinate i has half i % 8 of block i // 8: the low half of word (i % 8) // 2 if i is even, else the high half.
    """
    # shifts and masks, here and below: before torch 2.8, Apple's GPUs divided integers through float32
    j = coordinates & 7
    return _pick(_words_at(key, coordinates >> 3, purpose=purpose), j >> 1) >> (j & 1) * 16 & 0xFFFF


def direction_at(
    key: int, coordinates: torch.Tensor, *, distribution: Distribution = Distribution.gaussian
) -> torch.Tensor:
    """z at arbitrary coordinates (int64, any shape, any device); float32 of the same shape. Pure torch integers."""
    if distribution is Distribution.gaussian:
        return _table_on(coordinates.device)[halves_at(key, coordinates, purpose=PURPOSE_DIRECTION)]
    j = coordinates & 127
    word = _pick(_words_at(key, coordinates >> 7, purpose=PURPOSE_DIRECTION), j >> 5)
    return (1 - 2 * (word >> (j & 31) & 1)).to(torch.float32)


def fused(device: torch.device) -> CudaDirections | None:
    """The CUDA kernels of a device, where they compile and make these bits; None on any other."""
    return _checked_kernels(device) if device.type == "cuda" else None


@cache
def _checked_kernels(device: torch.device) -> CudaDirections | None:
    base, key, start, scale = torch.linspace(-1, 1, 4099, device=device), 5, 2**35 - 1001, 2.0**-9 + 2.0**-20
    coordinates = torch.arange(start, start + base.numel(), device=device)
    try:
        kernels = cuda_directions(device, gaussian_table())
        for law in Distribution:
            out = torch.empty_like(base)
            kernels.add(base, key, scale=scale, start=start, out=out, distribution=law)
            if not torch.equal(out, base + direction_at(key, coordinates, distribution=law) * scale):
                raise RuntimeError(f"its {law} directions are not the specified ones")
    except Exception as error:  # whatever a compiler or driver raises: the integer path is slower, not wrong
        if is_out_of_memory(error):
            raise  # it says nothing of the kernels, and is not remembered: who asks again may find room
        log.warning(
            "the CUDA kernels for directions cannot be used on %s, so directions take many times longer: %s%s",
            device,
            error,
            _remedy() if isinstance(error, ImportError) else "",
        )
        return None
    return kernels


def _remedy() -> str:
    """What to do without NVIDIA's bindings, which must be of the CUDA that torch brings; another maker's has none."""
    major = (torch.version.cuda or "").split(".")[0]
    return f". Install NVIDIA's bindings: pip install 'cuda-bindings=={major}.*'" if major else ""


def add_direction(
    base: torch.Tensor,
    key: int,
    *,
    scale: float,
    start: int = 0,
    out: torch.Tensor | None = None,
    distribution: Distribution = Distribution.gaussian,
    stochastic: bool = False,
) -> torch.Tensor:
    """Add a scaled direction: ``cast(float32(base) + scale * z)``, one rounded product, one rounded sum, one cast.

    z starts at the coordinate ``start``.

    Args:
        base: Contiguous tensor of any shape, float32, bfloat16 or float16.
        key: Stream key.
        scale: Rounded to float32 first.
        start: Coordinate of ``base``'s first element.
        out: Where to write; may be ``base`` itself. A new tensor by default.
        distribution: Law of z.
        stochastic: Whether a cast to 16 bits rounds by the draws of purpose 1 of the same key (``fedzo.zo.rounding``)
            and not to nearest.

    Returns:
        ``out``, of the shape and dtype of ``base``.
    """
    out = torch.empty_like(base) if out is None else out
    flat_base, flat_out = base.detach().view(-1), out.detach().view(-1)
    scale32 = np.float32(scale)
    if flat_base.numel() == 0:
        return out
    if (kernels := fused(base.device)) is not None:
        kernels.add(
            base, key, scale=float(scale32), start=start, out=out, distribution=distribution, stochastic=stochastic
        )
        return out
    if base.device.type == "cpu" and base.dtype == torch.float32:
        _add_on_cpu(flat_base, flat_out, key, scale=scale32, start=start, distribution=distribution)
        return out
    for low in range(0, flat_base.numel(), _CHUNK):
        part = flat_base[low : low + _CHUNK]
        if base.device.type == "cpu":
            wide = part.float()
            _add_on_cpu(wide, wide, key, scale=scale32, start=start + low, distribution=distribution)
        else:
            coordinates = torch.arange(start + low, start + low + part.numel(), device=base.device)
            # separate product and sum: addcmul and add(alpha=) would fuse and round once
            wide = part.float() + direction_at(key, coordinates, distribution=distribution) * float(scale32)
        if stochastic and is_rounded(base.dtype):
            wide = round_stochastically(wide, _rounding_draws(key, start + low, wide), base.dtype)
        flat_out[low : low + _CHUNK] = wide.to(base.dtype)
    return out


def _rounding_draws(key: int, start: int, like: torch.Tensor) -> torch.Tensor:
    if like.device.type == "cpu":
        return torch.from_numpy(halves(key, like.numel(), purpose=PURPOSE_ROUNDING, start=start))
    coordinates = torch.arange(start, start + like.numel(), device=like.device)
    return halves_at(key, coordinates, purpose=PURPOSE_ROUNDING).to(torch.int32)


def _add_on_cpu(
    base: torch.Tensor, out: torch.Tensor, key: int, *, scale: np.float32, start: int, distribution: Distribution
) -> None:
    """``add_direction`` for flat float32 tensors."""
    table, width = gaussian_table(), _width(distribution)
    add_kernel(base.numpy(), out.numpy(), table, scale, start, width, *_key_words(key))


def add_direction_rows(
    rows: torch.Tensor,
    key: int,
    *,
    scale: float,
    starts: torch.Tensor,
    distribution: Distribution = Distribution.gaussian,
) -> torch.Tensor:
    """As ``add_direction`` for rows [R, C] of a larger tensor; ``starts`` [R]: coordinates of their first elements."""
    scale32 = np.float32(scale)
    if rows.numel() == 0:
        return rows.clone()
    if (kernels := fused(rows.device)) is not None:
        rows, starts = rows.detach().contiguous(), starts.contiguous()
        moved = torch.empty_like(rows)
        kernels.add_rows(rows, key, scale=float(scale32), starts=starts, out=moved, distribution=distribution)
        return moved
    wide = rows.detach().float().contiguous()
    if rows.device.type == "cpu":
        out = torch.empty_like(wide)
        add_rows_kernel(
            wide.numpy(), out.numpy(), gaussian_table(), scale32, starts.numpy(), _width(distribution), *_key_words(key)
        )
        return out.to(rows.dtype)
    coordinates = starts.unsqueeze(1) + torch.arange(rows.shape[1], device=rows.device)
    return (wide + direction_at(key, coordinates, distribution=distribution) * float(scale32)).to(rows.dtype)


def dot_direction(
    vector: torch.Tensor, key: int, *, start: int = 0, distribution: Distribution = Distribution.gaussian
) -> float:
    """The inner product <vector, z> in float64; z starts at the coordinate ``start``.

    A product of two float32 numbers is exact in float64, so only sums are rounded. On the CPU their order is fixed -
    within blocks of z, blocks within spans of 32,768 values, then spans - so the same bits come from any number of
    threads; other devices agree up to float64 rounding.

    Args:
        vector: float32, bfloat16 or float16, any shape.
        key: Stream key.
        start: Coordinate of ``vector``'s first element.
        distribution: Law of z.
    """
    flat = vector.detach().reshape(-1)
    if flat.device.type != "cpu":
        return _dot_in_torch(flat, key, start=start, distribution=distribution)
    sums = np.zeros(-(-flat.numel() // SPAN))
    dot_kernel(flat.float().contiguous().numpy(), sums, gaussian_table(), start, _width(distribution), *_key_words(key))
    total = 0.0
    for part in sums.tolist():
        total += part
    return total


def _dot_in_torch(flat: torch.Tensor, key: int, *, start: int, distribution: Distribution) -> float:
    total = 0.0
    for low in range(0, flat.numel(), _CHUNK):
        part = flat[low : low + _CHUNK].double()
        coordinates = torch.arange(start + low, start + low + part.numel(), device=flat.device)
        total += float(part @ direction_at(key, coordinates, distribution=distribution).double())
    return total


def direction(
    key: int, n: int, *, start: int = 0, distribution: Distribution = Distribution.gaussian
) -> npt.NDArray[np.float32]:
    """z[start : start + n] as float32 on the CPU."""
    return add_direction(torch.zeros(n), key, scale=1.0, start=start, distribution=distribution).numpy()
