"""Tables of a sketch, or a gradient of theirs, in one file that names the model to which they belong.

It is a safetensors file with ``<layer>.tables``, float32 [R, G, 2^bits] each. Its metadata holds one entry,
``fedzo_tables``: canonical JSON of the format, what the values are, the base's digest, and the SHA-256 of all values in
the order of ``named_parameters``, as ``fedzo replay`` prints it of a run that trains all of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from fedzo.errors import ConfigError, RunFolderError, printable, some
from fedzo.records.decode import decode_json, to_json
from fedzo.records.fields import Hash, HashOrEmpty, Within
from fedzo.records.folder import raised_as, replace_file
from fedzo.sketch import tables_of

if TYPE_CHECKING:
    from fedzo.models.loaded import LoadedModel

FORMAT = 1
Content = Literal["tables", "gradient"]
"""What the values are."""
TABLES: Content = "tables"
GRADIENT: Content = "gradient"
_KEY = "fedzo_tables"


@dataclass(frozen=True, slots=True, kw_only=True)
class TableHeader:
    """What the file says of itself; in canonical JSON its fields stand in the order of their names, as here."""

    base_digest: HashOrEmpty
    content: Content
    digest: Hash
    format: Annotated[int, Within(FORMAT, FORMAT)]


def write_tables(
    path: Path, tables: Mapping[str, torch.Tensor], *, base_digest: str, content: Content = TABLES
) -> None:
    """Write tables to a file: completely or not at all.

    Args:
        path: The file.
        tables: By name, float32 each, in the order of ``named_parameters`` (``tables_of``).
        base_digest: Of the model to which they belong.
        content: What the values are.

    Raises:
        RunFolderError: The file cannot be written.
    """
    header = TableHeader(base_digest=base_digest, content=content, digest=_digest(tables), format=FORMAT)
    tensors = {name: table.detach().cpu().clone() for name, table in tables.items()}
    data = save(tensors, metadata={_KEY: to_json(header)})  # one entry, since several would have no fixed order
    with raised_as(RunFolderError, f"table file {path}: it must be writable", "Choose another place."):
        replace_file(path, data, durable=True)


def read_tables(path: Path, loaded: LoadedModel, *, content: Content = TABLES) -> dict[str, torch.Tensor]:
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
        with raised_as(ConfigError, f"{where}: it must be readable", "Check the path."):
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {})[_KEY]
            header = decode_json(TableHeader, text, where=where, error=ConfigError, remedy="Export it again.")
            _check_header(header, where, loaded, content)
            found = load_file(path)
    except (SafetensorError, KeyError, AttributeError) as error:  # the last: of a dtype that this torch has not
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
    tables = {name: found[name].clone() for name in wanted}  # else they would follow the file
    if _digest(tables) != header.digest:
        raise ConfigError(f"{where}: its values must have the SHA-256 that it tells, got another. Copy it again.")
    if not all(bool(table.isfinite().all()) for table in tables.values()):
        raise ConfigError(f"{where}: its values must be finite, got NaN or infinity. Export tables of a sound run.")
    return tables


def _check_header(header: TableHeader, where: str, loaded: LoadedModel, content: Content) -> None:
    if header.content != content:
        raise ConfigError(f"{where}: it must hold {content}, got {header.content!r}. Give another file.")
    if header.base_digest != loaded.base_digest:
        raise ConfigError(
            f"{where}: it must be of the model {loaded.source!r} (SHA-256 {loaded.base_digest[:12]}...), got tables of "
            f"another ({header.base_digest[:12]}...). Name the sketch on which they were trained."
        )


def _digest(tables: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for table in tables.values():
        digest.update(table.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()
