"""The file of a mask, and the bytes that clients get of it.

It is a safetensors file: per tensor ``index/NAME`` (int32, or int64 where the tensor is too large) and, where
known, ``gradient/NAME`` (float32). Its metadata holds one entry, ``fedzo_mask``: canonical JSON of the layout (names
and shapes in wire order, which safetensors itself does not keep), the manifest, and the SHA-256 of all content. Equal
masks give equal bytes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fedzo.errors import ConfigError, RunFolderError
from fedzo.masks.mask import Mask, little_endian
from fedzo.records.decode import canonical, decode_json, to_json
from fedzo.records.fields import Hash, Length, Within, Words
from fedzo.records.folder import raised_as, replace_file

FORMAT = 1
_KEY = "fedzo_mask"
_MAX_INT32, _MAX_INT64 = 2**31 - 1, 2**63 - 1
_MAX_AXES = 64  # of a tensor in torch
_INDICES, _GRADIENT = {"I32", "I64"}, {"F32"}
Shape = Annotated[tuple[Annotated[int, Within(1, _MAX_INT64)], ...], Length(0, _MAX_AXES)]
Layout = Annotated[tuple[tuple[Words, Shape], ...], Length(1, 1 << 20)]


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskHeader:
    """What the file says of itself; in canonical JSON its fields stand in the order of their names, as here."""

    format: Annotated[int, Within(FORMAT, FORMAT)]
    layout: Layout
    manifest: Annotated[dict[Words, Words], Length(0, 1 << 10)]
    sha256: Hash


def encode_mask(mask: Mask) -> bytes:
    """The mask as clients need it: about 4 bytes a coordinate, without the gradient, which stays on the server."""
    return _encode(replace(mask, gradient=None))


def save_mask(mask: Mask, path: Path) -> None:
    """Write ``mask``, with its gradient, to ``path``: completely or not at all.

    Raises:
        RunFolderError: The file cannot be written.
        ValueError: The manifest has more than 1,024 entries, or one of more than 1,000 characters.
    """
    path = Path(path)
    data = _encode(mask)
    with raised_as(RunFolderError, f"mask file {path}: it must be writable", "Choose another place."):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, data, durable=True)


def load_mask(path: Path) -> Mask:
    """Read and check the mask at ``path``; nothing in the file is trusted.

    Raises:
        ConfigError: No such file, or not a sound mask: it is cut short, corrupt, or holds impossible indices.
    """
    source, make = f"mask file {path}", "Make one with `fedzo mask --out FILE`."
    with raised_as(ConfigError, f"{source}: it must be readable", make):
        Path(path).open("rb").close()  # safe_open calls each file that it cannot open a missing one
        try:
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {})[_KEY]
                header = decode_json(MaskHeader, text, where=source, error=ConfigError, remedy="Make the mask again.")
                keys = file.keys()
                if not _fits(header, {key: file.get_slice(key) for key in keys}):
                    raise ConfigError(f"{source}: its tensors must be those of its layout. Make the mask again.")
                tensors = {key: file.get_tensor(key).clone() for key in keys}  # else they would follow the file
        except (SafetensorError, KeyError) as error:
            raise ConfigError(f"{source}: it must be a whole mask that fedzo wrote, it is not. {make}") from error
    if _content_digest(header.layout, header.manifest, tensors) != header.sha256:
        raise ConfigError(f"{source}: the content must match its SHA-256, got other. Copy or make the mask again.")
    shapes, has_gradient = dict(header.layout), len(tensors) > len(header.layout)
    try:
        return Mask(
            indices={name: tensors[f"index/{name}"].to(torch.int64) for name in shapes},
            shapes=shapes,
            gradient={name: tensors[f"gradient/{name}"] for name in shapes} if has_gradient else None,
            manifest=header.manifest,
        )
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def _encode(mask: Mask) -> bytes:
    tensors = {f"index/{name}": _compact(flat, mask.shapes[name]) for name, flat in mask.indices.items()}
    for name, values in (mask.gradient or {}).items():
        tensors[f"gradient/{name}"] = values.cpu().contiguous()
    layout, manifest = tuple(mask.shapes.items()), dict(sorted(mask.manifest.items()))
    sha256 = _content_digest(layout, manifest, tensors)
    header = MaskHeader(format=FORMAT, layout=layout, manifest=manifest, sha256=sha256)
    return save(tensors, metadata={_KEY: to_json(header)})  # one entry, since several would have no fixed order


def _compact(flat: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return flat.cpu().to(torch.int32 if math.prod(shape) <= _MAX_INT32 else torch.int64).contiguous()


def _fits(header: MaskHeader, stored: Mapping[str, Any]) -> bool:
    """Whether the file's tensors are the indices of all of its layout, and the gradients of all of it or of nothing."""
    names = [name for name, _ in header.layout]
    dtypes = {f"index/{name}": _INDICES for name in names}
    if any(key.startswith("gradient/") for key in stored):
        dtypes |= {f"gradient/{name}": _GRADIENT for name in names}
    return (
        len(set(names)) == len(names)
        and stored.keys() == dtypes.keys()
        and all(each.get_dtype() in dtypes[key] and len(each.get_shape()) == 1 for key, each in stored.items())
    )


def _content_digest(layout: Layout, manifest: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(canonical([layout, dict(manifest)]))
    for name in sorted(tensors):
        digest.update(canonical([name, str(tensors[name].dtype), list(tensors[name].shape)]))
        digest.update(little_endian(tensors[name]))
    return digest.hexdigest()
