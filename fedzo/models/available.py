"""How much memory a process can take, and how much a model's weights will take of it once they are read.

"Available" is what can be taken now; "most" is what the process could ever get on this machine, whoever gives way. Both
see the limits of the process's control groups (version 2: containers, systemd's ``MemoryMax``, Slurm), which the
machine's own numbers do not tell.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from fedzo.errors import ConfigError
from fedzo.models.config import DType, ModelConfig, Quantization
from fedzo.system import control_groups

logger = logging.getLogger(__name__)

TORCH_DTYPES = {
    DType.float32: torch.float32,
    DType.bfloat16: torch.bfloat16,
    DType.float16: torch.float16,
    DType.auto: torch.float32,  # until the site has measured
}
_MAX_HEADER_BYTES = 100_000_000
"""That safetensors itself takes; the first bytes of another format can name any length."""
_FIRST_WITH_BFLOAT16 = 8  # major number of the compute capability: Ampere
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Stored dtypes that ``model.dtype`` casts; codes and what others packed stay as they are."""
_PACKED = {Quantization.nf4: 0.5 + 4 / 64, Quantization.int8: 1.0, Quantization.torchao_int8: 1.0}
"""Bytes of a packed weight; of nf4 with the float32 scales of blocks of 64."""
_NEVER_PACKED = re.compile(r"embed|lm_head|\bwte\b|\bwpe\b|^head\.")


class Held(NamedTuple):
    """Bytes of a model's weights as a process holds them.

    Attributes:
        copied: Cast or packed as they are read.
        mapped: In the dtype of their files, so on a CPU they are pages of these files until somebody writes to them.
    """

    copied: int
    mapped: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.copied + self.mapped


def held_bytes(config: ModelConfig, files: Iterable[Path]) -> Held | None:
    """What the weights of safetensors files will take, from the headers alone; None where a file has no whole one.

    An estimate in four places: a tensor that the model does not use counts, tables of a sketch as if they were cast,
    weights that transformers merges as if they stayed in their files, and FP8 and MXFP4 as if any GPU computed with
    them. Where there is none, transformers unpacks them.
    """
    unpacks = not torch.cuda.is_available()  # as transformers asks, wherever the model is to be
    dtype, quantization, copied, mapped = TORCH_DTYPES[DType(config.dtype)], config.quantization, 0.0, 0
    try:
        for name, info in chain.from_iterable(_header(file).items() for file in files):
            (low, high), stored = info["data_offsets"], _FLOATS.get(info["dtype"])
            packed = quantization in _PACKED and len(info["shape"]) == 2 and not _NEVER_PACKED.search(name)
            fp8, mxfp4 = info["dtype"] in ("F8_E4M3", "F8_E5M2"), info["dtype"] == "U8" and name.endswith("_blocks")
            if unpacks and (fp8 or mxfp4):
                copied += (high - low) * (2 if mxfp4 else 1) * dtype.itemsize
            elif stored is not None and packed:
                copied += (high - low) // stored.itemsize * _PACKED[quantization]
            elif stored in (None, dtype):
                mapped += high - low
            else:
                copied += (high - low) // stored.itemsize * dtype.itemsize
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # whoever reads the file tells what it is
        return None
    return Held(math.ceil(copied), mapped)


def check_room(config: ModelConfig, held: Held, device: torch.device) -> None:
    """Refuse weights that this machine can never hold, before they are read; warn of such that have no room now.

    Linux gives memory that it does not have and kills whoever uses it, so there is no error later that could be told.
    A GPU's library has one.

    Raises:
        ConfigError: They exceed all memory that this process could ever get.
    """
    must_copy, free = held.copied if device.type == "cpu" else held.total, available_memory_bytes(device)
    if 2 * held.total > free:
        gc.collect()  # a model that was let go is in reference cycles, and would stay beside this one
        free = available_memory_bytes(device)
    if device.type != "cuda" and must_copy > (most := max_memory_bytes()):
        raise ConfigError(
            f"model.name {config.name!r}: the memory of {device} must hold the weights in {config.dtype}, which take "
            f"{must_copy / 2**20:,.0f} MiB, but has {most / 2**20:,.0f} MiB in all, swap included. "
            f"{ways_to_fit(config, device)}"
        ) from MemoryError()  # by which a site tells its server what it lacks
    if held.total > free:
        logger.warning(
            "model.name %r: the weights take %s MiB in %s, but %s MiB of the memory of %s are free. %s",
            config.name,
            f"{held.total / 2**20:,.0f}",
            config.dtype,
            f"{free / 2**20:,.0f}",
            device,
            ways_to_fit(config, device),
        )


def ways_to_fit(config: ModelConfig, device: torch.device) -> str:
    """What to do where a model's weights do not fit on a device."""
    ways = ["Free some"]
    if TORCH_DTYPES[DType(config.dtype)].itemsize > 2:
        narrow = DType.float16 if attends_plainly(device, torch.bfloat16) else DType.bfloat16
        ways.append(f"write model.dtype={narrow}")
    if config.quantization is Quantization.none:
        ways.append("train an adapter with model.quantization=nf4")
    return f"{', '.join(ways)}, or take a sketch or a smaller model."


def attends_plainly(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has no fused attention in a dtype on a device, and so writes all scores down, in float32.

    On a GPU before Ampere it has none in bfloat16.
    """
    return (
        device.type == "cuda"
        and dtype == torch.bfloat16
        and torch.cuda.get_device_properties(device).major < _FIRST_WITH_BFLOAT16
    )


def available_memory_bytes(device: torch.device) -> int:
    """Bytes that can still be taken on a device: of the GPU what is free or kept by torch, else the process's.

    Pages of files count as free, and so do weights that are only mapped (``mapped_bytes``).
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    left = [int(psutil.virtual_memory().available)]
    for folder, limit in _limits():
        if (used := _number(folder / "memory.current")) is not None:
            left.append(limit - used + _file_pages(folder))
    return max(0, min(left))


def max_memory_bytes() -> float:
    """Bytes that this process could ever get, swap included; infinite where swap grows as it is needed."""
    if sys.platform != "linux":
        return math.inf
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of swap's statistics, where the system tells none
        swap = int(psutil.swap_memory().total)
    most = [int(psutil.virtual_memory().total) + swap]
    for folder, limit in _limits():
        allowed = _number(folder / "memory.swap.max")
        most.append(limit + (swap if allowed is None else min(allowed, swap)))
    return min(most)


def mapped_bytes() -> int:
    """Bytes of files that this process has mapped as its own and not written to: a write makes a page take memory.

    Weights that are held in the dtype of their files are mapped so. 0 where the system does not tell.
    """
    if sys.platform != "linux":
        return 0
    try:
        maps = psutil.Process().memory_maps(grouped=False)
    except (psutil.Error, OSError, AttributeError, ValueError):  # psutil lacks the method where the system has no smaps
        return 0
    own = (each for each in maps if each.perms.startswith("rw-p") and each.path.startswith("/"))
    return sum(max(0, each.size - each.anonymous - each.swap) for each in own)


def _header(file: Path) -> dict[str, Any]:
    """Of each tensor, what a safetensors file says before its bytes."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header: dict[str, Any] = json.loads(opened.read(size) if size <= _MAX_HEADER_BYTES else b"")
    header.pop("__metadata__", None)
    return header


def _limits() -> Iterator[tuple[Path, int]]:
    """The process's control group and those around it that limit memory, each with its limit."""
    for folder in control_groups():
        if (limit := _number(folder / "memory.max")) is not None:
            yield folder, limit


def _number(file: Path) -> int | None:
    """The number in a control group's file; None where it is not there, or says ``max``."""
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _file_pages(folder: Path) -> int:
    """What a control group's files in memory take, which is given back when memory gets short."""
    try:
        fields = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
        return int(fields["inactive_file"]) + int(fields["active_file"])
    except (OSError, ValueError, KeyError):
        return 0
