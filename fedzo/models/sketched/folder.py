"""The folder of a sketch: a model folder that transformers reads, and ``sketch.json`` with what it was made of.

``sketch.json`` has the SHA-256 of each tensor, so a folder whose codes or tables were cut, swapped or changed is not
taken. A folder without it is one that ``save_pretrained`` wrote.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fedzo
from fedzo.errors import ConfigError
from fedzo.models.digest import Entry, stored_entries
from fedzo.models.saved import save_model, sync_files
from fedzo.models.sketched.layers import dense_layers
from fedzo.models.sketched.registry import SketchFormat, mark_as_sketch
from fedzo.models.source import without_progress_bars
from fedzo.records.decode import decode_json, to_json
from fedzo.records.folder import replace_file
from fedzo.records.sketch import SketchedLayer, SketchManifest, SketchRecipe, StoredTensor
from fedzo.sketch import sketched_layers

MANIFEST = "sketch.json"


def write_sketch(
    model: Any,
    tokenizer: Any,
    recipe: SketchRecipe | None,
    layers: dict[str, SketchedLayer],
    folder: Path,
    *,
    source_digest: str | None = None,
) -> SketchManifest:
    """Write a sketch, and flush all of it to the disk.

    A tensor is written in 16 bits where no number of it changes: tables that were just built, and what stays dense of a
    model that came in 16 bits. ``recipe`` and ``layers`` are None and empty where the sketch came from elsewhere, or
    its tables were trained; then ``source_digest`` says of what.

    Raises:
        OSError: It cannot be written.
    """
    first = next(iter(sketched_layers(model).values()))
    form = SketchFormat(first.bits, first.groups_per_row, sorted(dense_layers(model)))
    mark_as_sketch(model, form)
    with without_progress_bars():
        save_model(model, tokenizer, folder)
    tensors = {
        name: StoredTensor(dtype=dtype, shape=shape, sha256=digest)
        for name, dtype, shape, digest in stored_entries(sorted(folder.glob("*.safetensors"))).values()
    }
    manifest = SketchManifest(
        fedzo=fedzo.__version__, recipe=recipe, layers=layers, tensors=tensors, source_digest=source_digest
    )
    replace_file(folder / MANIFEST, to_json(manifest) + "\n", durable=True)
    sync_files(folder)
    return manifest


def read_manifest(file: Path) -> SketchManifest:
    """What ``write_sketch`` said.

    Raises:
        ConfigError: It is no manifest of a sketch.
    """
    text = file.read_bytes()
    remedy = "Copy the folder again, or build the sketch anew."
    return decode_json(SketchManifest, text, where=str(file), error=ConfigError, remedy=remedy)


def check_tensors(manifest: SketchManifest, entries: dict[str, Entry], *, name: str) -> None:
    """Every tensor of the files is the one that the manifest names.

    Args:
        manifest: Of the folder.
        entries: What its safetensors files hold.
        name: ``model.name``, for the error.

    Raises:
        ConfigError: One is not, is missing, or is there beside them.
    """
    stored = {own: StoredTensor(dtype=dtype, shape=shape, sha256=sha) for own, dtype, shape, sha in entries.values()}
    if wrong := sorted({own for own, _ in stored.items() ^ manifest.tensors.items()}):
        raise ConfigError(
            f"model.name {name!r}: each tensor must have the SHA-256 that {MANIFEST} names, but {wrong[0]!r} has not "
            f"({len(wrong)} in all): the files were cut, swapped or changed. Copy the sketch again, or build it anew."
        )
