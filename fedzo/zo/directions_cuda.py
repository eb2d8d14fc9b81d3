"""Directions on CUDA: ``directions.cu``, launched over one tensor, many tensors, rows, or a mask's weights.

One launch takes any number of tensors: their addresses, coordinates and sizes lie in a table on the device
(``Pieces``). ``fedzo.zo.directions`` takes these kernels where they run and make the specified bits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import NamedTuple, Protocol

import numpy as np
import torch

from fedzo.zo.config import Distribution

THREADS = 1024
TILE = 2 * THREADS  # units of 16 bytes
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_TABLE_BYTES = 4 * 32768


class Piece(ctypes.Structure):
    """A tensor as a kernel sees it; ``directions.cu`` says what the numbers are."""

    _fields_ = [(name, ctypes.c_int64) for name in ("base", "out", "start", "size", "first")]


class Draw(ctypes.Structure):
    """Which direction, and times what."""

    _fields_ = [("k0", ctypes.c_uint32), ("k1", ctypes.c_uint32), ("scale", ctypes.c_float)]


class Arguments(ctypes.Structure):
    """What every kernel takes; ``directions.cu`` says what it is."""

    _fields_ = [
        ("pieces", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("tiles", ctypes.c_int64),
        ("one", Piece),
        ("room", ctypes.c_int64),
        ("table", ctypes.c_int64),
        ("index", ctypes.c_int64),
        ("draw", Draw),
        ("draws", ctypes.c_uint32),
        ("later_draw", ctypes.c_int64),
    ]


class Variant(NamedTuple):
    """What ``directions.cu`` is compiled for: macros of these names, in capitals."""

    dtype: int
    gaussian: int
    stochastic: int
    shared_table: int
    later_draw: int


class Launch(Protocol):
    """Starts a kernel: ``Compiler.launch``, or a test's stand-in."""

    def __call__(
        self, name: str, variant: Variant, arguments: ctypes.Structure, *, blocks: int, threads: int, shared_bytes: int
    ) -> None:
        """Start ``blocks`` blocks of ``threads`` threads that have ``shared_bytes`` of shared memory each."""


@dataclass(frozen=True, slots=True)
class Pieces:
    """Tensors of one device and dtype that one launch moves, in place or to wherever there is room.

    Attributes:
        dtype: Of all of them.
        count: How many there are.
        tiles: Tiles in all.
        room: Elements that the moved values take where they do not stay in place, each tensor's from a multiple of 16
            bytes on.
        rows: int64 [count, 5] on the device: ``Piece`` by ``Piece``.
    """

    dtype: torch.dtype
    count: int
    tiles: int
    room: int
    rows: torch.Tensor

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor], starts: Sequence[int], *, in_place: bool) -> Pieces:
        """Contiguous tensors, none empty, and the coordinates of their first elements."""
        dtype = tensors[0].dtype
        rows, tiles, room = [], 0, 0
        for tensor, start in zip(tensors, starts, strict=True):
            out = tensor.data_ptr() if in_place else room * dtype.itemsize
            rows.append([tensor.data_ptr(), out, start, tensor.numel(), tiles])
            tiles += _tiles(start, tensor.numel(), dtype)
            room += 0 if in_place else -(-tensor.numel() // _width(dtype)) * _width(dtype)
        return cls(dtype, len(rows), tiles, room, torch.tensor(rows).to(tensors[0].device))


class CudaDirections:
    """The kernels on one device.

    Args:
        launch: Starts a kernel there.
        table: The upper half of the Gaussian table, float32 [32768], there.
        processors: Multiprocessors of the device.
        shared_bytes: Shared memory that a block can have. The table needs 128 KiB; with less it is read from
            global memory.

    Attributes:
        shares_table: Whether blocks read the table from their shared memory.
    """

    def __init__(self, launch: Launch, table: torch.Tensor, *, processors: int, shared_bytes: int) -> None:
        self._launch = launch
        self._table = table
        self._table_address = table.data_ptr()
        self._processors = processors
        self.shares_table = shared_bytes >= _TABLE_BYTES
        self._draw = torch.zeros(3, dtype=torch.int32, device=table.device)
        self._written: tuple[int, float] | None = None
        self._reads_later = False

    def write_draw(self, key: int, scale: float) -> None:
        """Tell the kernels of ``reading_later`` their direction and its factor: in this device's memory, in order."""
        if (key, scale) == self._written:
            return
        words = torch.frombuffer(Draw(key & 0xFFFFFFFF, key >> 32, scale), dtype=torch.int32)
        for place, word in zip(self._draw, words.tolist(), strict=True):
            place.fill_(word)  # a copy from the host would wait for the device
        self._written = key, scale

    @contextmanager
    def reading_later(self) -> Iterator[None]:
        """Kernels that are started within read what ``write_draw`` wrote last, each time that they run.

        So that a CUDA graph of them serves every direction. They must be started with what is written at the time.
        """
        self._reads_later = True
        try:
            yield
        finally:
            self._reads_later = False

    def add(
        self,
        base: torch.Tensor,
        key: int,
        *,
        scale: float,
        start: int,
        out: torch.Tensor,
        distribution: Distribution,
        stochastic: bool = False,
    ) -> None:
        """``out = cast(float32(base) + scale * z)``: one rounded product, one rounded sum, one cast.

        Args:
            base: Contiguous, not empty, of any shape; float32, bfloat16 or float16.
            key: Stream key.
            scale: A float32 value.
            start: Coordinate of ``base``'s first element.
            out: Contiguous, of the same shape and dtype; may be ``base``.
            distribution: Law of z.
            stochastic: Whether the cast rounds by the draws of purpose 1 and not to nearest.
        """
        one = Piece(base.data_ptr(), out.data_ptr(), start, base.numel(), 0)
        arguments = Arguments(tiles=_tiles(start, base.numel(), base.dtype), one=one)
        self._start("add", base.dtype, arguments, key, scale, distribution, arguments.tiles, stochastic)

    def add_pieces(
        self,
        pieces: Pieces,
        key: int,
        *,
        scale: float,
        distribution: Distribution,
        stochastic: bool = False,
        room: torch.Tensor | None = None,
    ) -> None:
        """The same for all tensors of ``pieces`` in one launch, to ``room`` if they do not stay in place."""
        arguments = Arguments(pieces=pieces.rows.data_ptr(), count=pieces.count, tiles=pieces.tiles)
        arguments.room = 0 if room is None else room.data_ptr()
        self._start("add", pieces.dtype, arguments, key, scale, distribution, pieces.tiles, stochastic)

    def add_rows(
        self,
        rows: torch.Tensor,
        key: int,
        *,
        scale: float,
        starts: torch.Tensor,
        out: torch.Tensor,
        distribution: Distribution,
    ) -> None:
        """The same for rows [R, C] of a larger tensor; ``starts`` int64 [R]: coordinates of their first elements."""
        one = Piece(rows.data_ptr(), out.data_ptr(), 0, rows.shape[1], 0)
        tiles = _tiles(_width(rows.dtype) - 1, rows.shape[1], rows.dtype)  # as many as a row has wherever it begins
        arguments = Arguments(one=one, count=rows.shape[0], tiles=tiles, index=starts.data_ptr())
        self._start("add_rows", rows.dtype, arguments, key, scale, distribution, rows.shape[0] * tiles)

    def scatter(
        self,
        values: torch.Tensor,
        addresses: torch.Tensor,
        dtype: torch.dtype,
        key: int | None = None,
        *,
        scale: float = 0.0,
        distribution: Distribution = Distribution.gaussian,
        update: bool = False,
    ) -> None:
        """Cast ``values + scale * z`` to weights wherever they lie; without a key the values as they are.

        Args:
            values: Contiguous float32 [n], z's coordinates 0 to n - 1.
            addresses: Where the weights lie, int64 [n].
            dtype: Of the weights.
            key: Stream key.
            scale: A float32 value.
            distribution: Law of z.
            update: Whether ``values`` move, too.
        """
        one = Piece(values.data_ptr(), values.data_ptr() if update else 0, 0, values.numel(), 0)
        arguments = Arguments(one=one, index=addresses.data_ptr(), draws=key is not None)
        blocks = -(-values.numel() // (THREADS * _width(dtype)))
        self._start("scatter", dtype, arguments, key or 0, scale, distribution, blocks)

    def lots(self, key: int, n: int) -> torch.Tensor:
        """The lots of a random mask (``fedzo.masks.select``), int64 [n]."""
        out = torch.empty(n, dtype=torch.int64, device=self._table.device)
        arguments = Arguments(one=Piece(0, out.data_ptr(), 0, n, 0))
        self._start("lots", torch.float32, arguments, key, 0.0, Distribution.rademacher, -(-n // (2 * THREADS)))
        return out

    def _start(
        self,
        name: str,
        dtype: torch.dtype,
        arguments: Arguments,
        key: int,
        scale: float,
        distribution: Distribution,
        blocks: int,
        stochastic: bool = False,
    ) -> None:
        """Launch ``blocks`` blocks, or as many as the device holds at once if that is less."""
        gaussian = distribution is Distribution.gaussian
        shares = gaussian and self.shares_table
        if later := self._reads_later:
            if (key, scale) != self._written:
                raise RuntimeError(f"{name}: must be started with the draw {self._written} that is in memory")
            arguments.later_draw = self._draw.data_ptr()
        variant = Variant(DTYPES[dtype], gaussian, stochastic and dtype != torch.float32, shares, later)
        arguments.table, arguments.draw = self._table_address, Draw(key & 0xFFFFFFFF, key >> 32, scale)
        at_once = self._processors if shares else 2 * self._processors
        shared_bytes = _TABLE_BYTES if shares else 0
        self._launch(name, variant, arguments, blocks=min(blocks, at_once), threads=THREADS, shared_bytes=shared_bytes)


def cuda_directions(device: torch.device, table: np.ndarray) -> CudaDirections:
    """The kernels on a CUDA device.

    Args:
        device: Where.
        table: The Gaussian table, float32 [65536].

    Raises:
        ImportError: NVIDIA's bindings are not installed.
    """
    from fedzo.zo.nvrtc import Compiler, shared_memory_of_a_block

    source = (files("fedzo.zo") / "directions.cu").read_text(encoding="utf-8")
    upper = torch.from_numpy(table[len(table) // 2 :].copy()).to(device)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    shared_bytes = shared_memory_of_a_block(device)
    return CudaDirections(Compiler(source, device).launch, upper, processors=processors, shared_bytes=shared_bytes)


def _width(dtype: torch.dtype) -> int:
    """Coordinates of a unit: what 16 bytes hold."""
    return 16 // dtype.itemsize


def _tiles(start: int, size: int, dtype: torch.dtype) -> int:
    width = _width(dtype)
    units = (start + size - 1) // width - start // width + 1
    return -(-units // TILE)
