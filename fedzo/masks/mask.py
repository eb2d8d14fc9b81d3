"""A static mask: which single weights of a model are trained, and its file.

The file is a safetensors file: per tensor ``index/NAME`` (int32, or int64 where the tensor is too large) and, where
known, ``gradient/NAME`` (float32). Its metadata holds one entry, ``fedzo_mask``: canonical JSON of the layout (names
and shapes in wire order, which safetensors itself does not keep), the manifest, and the SHA-256 of all content. Equal
masks give equal bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as read_tensors
from safetensors.torch import save as write_tensors
from torch import nn

from fedzo.errors import ConfigError, RunFolderError

FORMAT = 1
_KEY = "fedzo_mask"
_MAX_INT32 = 2**31 - 1
_STORED_DTYPES = {"I32", "I64", "F32"}


@dataclass(frozen=True, slots=True, eq=False)
class Mask:
    """The trained coordinates of a model, in wire order: tensor by tensor, then by index.

    Building one checks it, so every ``Mask`` is sound in itself; ``check_fits`` compares it with a model.

    Raises:
        ConfigError: Indices are out of range, unsorted or repeated; there are none; the gradient does not match them.
    """

    indices: dict[str, torch.Tensor]
    """Per parameter the flat row-major indices, int64 [k], ascending; names in the order of ``named_parameters``."""
    shapes: dict[str, tuple[int, ...]]
    """Shape of each of these parameters."""
    gradient: dict[str, torch.Tensor] | None
    """Signed mean gradient of the calibration loss at the coordinates, float32 [k] each; kept for GradIP."""
    manifest: dict[str, str]
    """How the mask was made."""

    def __post_init__(self) -> None:
        if not self.indices:
            raise ConfigError("mask: it must hold at least one weight, got none. Raise trainer.density.")
        if list(self.shapes) != list(self.indices):
            raise ConfigError("mask: shapes must name the same tensors as indices, in the same order.")
        for name, flat in self.indices.items():
            _check_indices(name, flat, math.prod(self.shapes[name]))
        if self.gradient is not None:
            if list(self.gradient) != list(self.indices):
                raise ConfigError("mask: gradient must name the same tensors as indices, in the same order.")
            for name, values in self.gradient.items():
                _check_gradient(name, values, self.indices[name].numel())

    @property
    def size(self) -> int:
        """Number of coordinates n."""
        return sum(flat.numel() for flat in self.indices.values())

    def digest(self) -> str:
        """SHA-256 over names, shapes and indices in wire order; the same on every machine, whatever the manifest."""
        digest = hashlib.sha256()
        for name, flat in self.indices.items():
            digest.update(_canonical([name, self.shapes[name], flat.numel()]))
            digest.update(_little_endian(flat))
        return digest.hexdigest()

    def to_bytes(self) -> bytes:
        """The mask as clients need it: about 4 bytes a coordinate, without the gradient, which stays on the server."""
        return _encode(replace(self, gradient=None))

    @classmethod
    def from_bytes(cls, data: bytes, *, source: str = "mask") -> Mask:
        """Read what ``to_bytes`` or ``save_mask`` wrote, checking all of it.

        Args:
            data: The bytes; nothing in them is trusted.
            source: What to call them in an error, a path for instance.

        Raises:
            ConfigError: They are not a mask, are cut short, are corrupt, or hold impossible indices.
        """
        layout, stored_digest, manifest = _header(data, source)
        try:
            tensors = read_tensors(data)
        except SafetensorError as error:
            raise ConfigError(f"{source}: it must be complete, got {error}. Copy or make the mask again.") from error
        names = [name for name, _ in layout]
        has_gradient = any(key.startswith("gradient/") for key in tensors)
        expected = {f"index/{name}" for name in names} | {f"gradient/{name}" for name in names if has_gradient}
        if set(tensors) != expected or len(set(names)) != len(names):
            raise ConfigError(f"{source}: its tensors must be those of its layout. Make the mask again.")
        if _content_digest(layout, manifest, tensors) != stored_digest:
            raise ConfigError(f"{source}: the content must match its SHA-256, got other. Copy or make the mask again.")
        try:
            return cls(
                indices={name: tensors[f"index/{name}"].to(torch.int64) for name in names},
                shapes={name: tuple(shape) for name, shape in layout},
                gradient={name: tensors[f"gradient/{name}"] for name in names} if has_gradient else None,
                manifest=manifest,
            )
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from error


def save_mask(mask: Mask, path: Path) -> None:
    """Write ``mask``, with its gradient, to ``path``: completely or not at all.

    Raises:
        RunFolderError: The file cannot be written.
    """
    path = Path(path)
    data = _encode(mask)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # temporary files are private; a mask is to be shared
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()
        raise RunFolderError(
            f"mask file {path}: it must be possible to write it, got {error.strerror!r}. Choose another place."
        ) from error


def load_mask(path: Path) -> Mask:
    """Read and check the mask at ``path``.

    Raises:
        ConfigError: No such file, or not a sound mask.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(
            f"mask file {path}: it must be readable, got {error.strerror!r}. Make one with `fedzo mask --out FILE`."
        ) from error
    return Mask.from_bytes(data, source=f"mask file {path}")


def check_fits(mask: Mask, model: nn.Module) -> None:
    """Check that every tensor of ``mask`` is a parameter of ``model`` with the same shape.

    Raises:
        ConfigError: Naming the first tensor that is missing or shaped otherwise.
    """
    parameters = dict(model.named_parameters())
    for name, shape in mask.shapes.items():
        if name not in parameters:
            raise ConfigError(f"mask: the model has no parameter {name!r}. Make the mask for this model.")
        if tuple(parameters[name].shape) != shape:
            got = tuple(parameters[name].shape)
            raise ConfigError(f"mask: {name!r} must have shape {shape}, got {got}. Make the mask for this model.")


def overlap(mask_a: Mask, mask_b: Mask) -> float:
    """Share of ``mask_a``'s coordinates that ``mask_b`` holds too, 0 to 1."""
    shared = sum(
        int(torch.isin(flat, mask_b.indices[name], assume_unique=True).sum())
        for name, flat in mask_a.indices.items()
        if mask_a.shapes[name] == mask_b.shapes.get(name)
    )
    return shared / mask_a.size


def _check_indices(name: str, flat: torch.Tensor, numel: int) -> None:
    where = f"mask: the indices of {name!r}"
    if flat.dtype != torch.int64 or flat.ndim != 1 or flat.numel() == 0:
        raise ConfigError(f"{where} must be a non-empty int64 vector, got {flat.dtype} of shape {tuple(flat.shape)}.")
    if not bool((flat[1:] > flat[:-1]).all()):
        raise ConfigError(f"{where} must ascend without repeats, they are unsorted or repeated. Make the mask again.")
    low, high = int(flat[0]), int(flat[-1])
    if low < 0 or high >= numel:
        raise ConfigError(f"{where} must lie in 0..{numel - 1}, got {low}..{high}: out of range. Make the mask again.")


def _check_gradient(name: str, values: torch.Tensor, size: int) -> None:
    where = f"mask: the gradient of {name!r}"
    if values.dtype != torch.float32 or tuple(values.shape) != (size,):
        raise ConfigError(f"{where} must be float32 of shape ({size},), got {values.dtype} of {tuple(values.shape)}.")
    if not bool(values.isfinite().all()):
        raise ConfigError(f"{where} must be finite, got NaN or infinity. Make the mask again.")


def _encode(mask: Mask) -> bytes:
    tensors = {f"index/{name}": _compact(flat, mask.shapes[name]) for name, flat in mask.indices.items()}
    for name, values in (mask.gradient or {}).items():
        tensors[f"gradient/{name}"] = values.cpu().contiguous()
    layout = [(name, shape) for name, shape in mask.shapes.items()]
    held = {
        "format": FORMAT,
        "layout": layout,
        "manifest": mask.manifest,
        "sha256": _content_digest(layout, mask.manifest, tensors),
    }
    # one entry, since safetensors writes several in no fixed order
    return write_tensors(tensors, metadata={_KEY: _canonical(held).decode()})


def _compact(flat: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return flat.cpu().to(torch.int32 if math.prod(shape) <= _MAX_INT32 else torch.int64).contiguous()


Layout = list[tuple[str, tuple[int, ...]]]


def _header(data: bytes, source: str) -> tuple[Layout, str, dict[str, str]]:
    """Layout, content digest and manifest from a safetensors header, or a ConfigError that says what is wrong."""
    not_a_mask = f"{source}: it must be a mask that fedzo wrote, it is not. Make one with `fedzo mask --out FILE`."
    header_bytes = int.from_bytes(data[:8], "little")
    if len(data) < 8 or data[8:9] != b"{":
        raise ConfigError(not_a_mask)
    if len(data) < 8 + header_bytes:
        raise ConfigError(f"{source}: it must be complete, its header is cut short. Copy or make the mask again.")
    try:
        header = json.loads(data[8 : 8 + header_bytes])
        held: dict[str, Any] = json.loads(header.pop("__metadata__")[_KEY])
        version = held["format"]
        if version != FORMAT:
            raise ConfigError(f"{source}: its format must be {FORMAT}, got {version!r}. Make the mask again.")
        if not {entry["dtype"] for entry in header.values()} <= _STORED_DTYPES:
            raise ConfigError(not_a_mask)
        layout = [(_text(name), tuple(_positive(size) for size in shape)) for name, shape in held["layout"]]
        manifest = {_text(key): _text(value) for key, value in held["manifest"].items()}
        return layout, _text(held["sha256"]), manifest
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(not_a_mask) from error


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("not a string")
    return value


def _positive(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise TypeError("not a positive integer")
    return value


def _content_digest(layout: Layout, manifest: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(_canonical([layout, dict(manifest)]))
    for name in sorted(tensors):
        digest.update(_canonical([name, str(tensors[name].dtype), list(tensors[name].shape)]))
        digest.update(_little_endian(tensors[name]))
    return digest.hexdigest()


def _little_endian(values: torch.Tensor) -> bytes:
    array = values.detach().cpu().numpy()
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
