"""Tables of a sketch, or a gradient of theirs, in one file that names the model to which they belong.

It is a safetensors file with ``<layer>.tables``, float32 [R, G, 2^bits] each. Its metadata holds one entry,
``fedzo_tables``: canonical JSON of the format, what the values are, the base's digest, and the SHA-256 of all values in
the order of ``named_parameters``, as ``fedzo replay`` prints it of a run that trains all of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from fedzo.errors import ConfigError, RunFolderError, printable, some
from fedzo.records.folder import replace_file, told_as
from fedzo.sketch import tables_of

if TYPE_CHECKING:
    from fedzo.models.loaded import LoadedModel

FORMAT = 1
TABLES, GRADIENT = "tables", "gradient"
"""What the values are."""
_KEY = "fedzo_tables"


def write_tables(path: Path, tables: Mapping[str, torch.Tensor], *, base_digest: str, content: str = TABLES) -> None:
    """Write tables to a file: completely or not at all.

    Args:
        path: The file.
        tables: By name, float32 each, in the order of ``named_parameters`` (``tables_of``).
        base_digest: Of the model to which they belong.
        content: What the values are.

    Raises:
        RunFolderError: The file cannot be written.
    """
    held = {"format": FORMAT, "content": content, "base_digest": base_digest, "digest": _digest(tables)}
    tensors = {name: table.detach().cpu().clone() for name, table in tables.items()}
    # one entry, since safetensors writes several in no fixed order
    data = save(tensors, metadata={_KEY: json.dumps(held, sort_keys=True, separators=(",", ":"))})
    with told_as(RunFolderError, f"table file {path}: it must be writable", "Choose another place."):
        replace_file(path, data, durable=True)


def read_tables(path: Path, loaded: LoadedModel, *, content: str = TABLES) -> dict[str, torch.Tensor]:
    """Read tables that belong to a loaded sketch, checking all of the file.

    Args:
        path: What ``write_tables`` or ``fedzo export --tables`` wrote; nothing in it is trusted.
        loaded: The sketch.
        content: What the values must be.

    Returns:
        The tables by name, float32 on the CPU, in the order of ``named_parameters``.

    Raises:
        ConfigError: The file cannot be read, is no such file, is of another model, or was changed.
    """
    where = f"table file {path}"
    try:
        with told_as(ConfigError, f"{where}: it must be readable", "Check the path."):
            with safe_open(path, framework="pt") as file:
                told: dict[str, object] = json.loads(file.metadata()[_KEY])
            _check_told(told, where, loaded, content)
            found = load_file(path)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{where}: it must be a whole file that `fedzo export RUN OUT --tables` wrote, it is not. Export it again."
        ) from error
    wanted = {name: (torch.float32, table.shape) for name, table in tables_of(loaded.model).items()}
    got = {name: (table.dtype, table.shape) for name, table in found.items()}
    if wrong := sorted(name for name in {*wanted, *got} if wanted.get(name) != got.get(name)):
        raise ConfigError(
            f"{where}: it must hold the tables of {loaded.source!r}, in their shapes and float32, but differs in "
            f"{printable(some(wrong))}. Export it again."
        )
    tables = {name: found[name] for name in wanted}
    if _digest(tables) != told.get("digest"):
        raise ConfigError(f"{where}: its values must have the SHA-256 that it tells, got another. Copy it again.")
    if not all(bool(table.isfinite().all()) for table in tables.values()):
        raise ConfigError(f"{where}: its values must be finite, got NaN or infinity. Export tables of a sound run.")
    return tables


def _check_told(told: Mapping[str, object], where: str, loaded: LoadedModel, content: str) -> None:
    if told.get("format") != FORMAT:
        raise ConfigError(
            f"{where}: its format must be {FORMAT}, got {printable(repr(told.get('format')))}. Export it again."
        )
    if told.get("content") != content:
        raise ConfigError(
            f"{where}: it must hold {content}, got {printable(repr(told.get('content')))}. Give another file."
        )
    if told.get("base_digest") != loaded.base_digest:
        raise ConfigError(
            f"{where}: it must be of the model {loaded.source!r} (SHA-256 {loaded.base_digest[:12]}...), got tables of "
            f"another ({printable(str(told.get('base_digest')))[:12]}...). Name the sketch on which they were trained."
        )


def _digest(tables: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for table in tables.values():
        digest.update(table.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()
