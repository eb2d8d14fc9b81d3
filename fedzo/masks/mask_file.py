"""The file of a mask, and the bytes that clients get of it.

It is a safetensors file: per tensor ``index/NAME`` (int32, or int64 where the tensor is too large) and, where
known, ``gradient/NAME`` (float32). Its metadata holds one entry, ``fedzo_mask``: canonical JSON of the layout (names
and shapes in wire order, which safetensors itself does not keep), the manifest, and the SHA-256 of all content. Equal
masks give equal bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as read_tensors
from safetensors.torch import save as write_tensors

from fedzo.errors import ConfigError, RunFolderError
from fedzo.masks.mask import Mask, canonical, little_endian
from fedzo.records.folder import replace_file, told_as

FORMAT = 1
_KEY = "fedzo_mask"
_MAX_INT32, _MAX_INT64 = 2**31 - 1, 2**63 - 1
_MOST_AXES = 64  # of a tensor in torch
_STORED_DTYPES = {"I32", "I64", "F32"}
Layout = list[tuple[str, tuple[int, ...]]]


def encode_mask(mask: Mask) -> bytes:
    """The mask as clients need it: about 4 bytes a coordinate, without the gradient, which stays on the server."""
    return _encode(replace(mask, gradient=None))


def decode_mask(data: bytes, *, source: str = "mask") -> Mask:
    """Read what ``encode_mask`` or ``save_mask`` wrote, checking all of it.

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
        return Mask(
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
    with told_as(RunFolderError, f"mask file {path}: it must be writable", "Choose another place."):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, data, durable=True)


def load_mask(path: Path) -> Mask:
    """Read and check the mask at ``path``.

    Raises:
        ConfigError: No such file, or not a sound mask.
    """
    with told_as(ConfigError, f"mask file {path}: it must be readable", "Make one with `fedzo mask --out FILE`."):
        data = Path(path).read_bytes()
    return decode_mask(data, source=f"mask file {path}")


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
    return write_tensors(tensors, metadata={_KEY: canonical(held).decode()})


def _compact(flat: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return flat.cpu().to(torch.int32 if math.prod(shape) <= _MAX_INT32 else torch.int64).contiguous()


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
        layout = [(_text(name), _shape(sizes)) for name, sizes in held["layout"]]
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


def _shape(sizes: list[object]) -> tuple[int, ...]:
    if len(sizes) > _MOST_AXES:
        raise TypeError("too many axes")
    return tuple(_size(value) for value in sizes)


def _size(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MAX_INT64:
        raise TypeError("not a positive integer")
    return value


def _content_digest(layout: Layout, manifest: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(canonical([layout, dict(manifest)]))
    for name in sorted(tensors):
        digest.update(canonical([name, str(tensors[name].dtype), list(tensors[name].shape)]))
        digest.update(little_endian(tensors[name]))
    return digest.hexdigest()
