"""The folder of a sketch: a model folder that transformers reads, and ``sketch.json`` with what it was made of.

``sketch.json`` has the SHA-256 of each tensor, so a folder whose codes or tables were cut, swapped or changed is not
taken. A folder without it is one that ``save_pretrained`` wrote.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fedzo
from fedzo.errors import ConfigError
from fedzo.models.digest import Entry, stored_entries
from fedzo.models.sketched.layers import dense_layers, sketched_layers
from fedzo.models.sketched.registry import SketchFormat, mark_as_sketch
from fedzo.models.source import without_progress_bars
from fedzo.records.decode import decode_json, to_json
from fedzo.records.folder import replace_file, sync_folder
from fedzo.records.sketch import SketchedLayer, SketchManifest, SketchRecipe, StoredTensor
from fedzo.sketch.build import TABLE_DTYPE

MANIFEST = "sketch.json"
_NARROW = (torch.bfloat16, torch.float16)


def write_sketch(
    model: Any, tokenizer: Any, recipe: SketchRecipe, layers: dict[str, SketchedLayer], folder: Path
) -> SketchManifest:
    """Write a model that was just sketched, its tables in 16 bits, and flush all of it to the disk.

    What stays dense is written in 16 bits where no number of it changes.

    Raises:
        OSError: It cannot be written.
    """
    form = SketchFormat(recipe.bits, recipe.groups_per_row, sorted(dense_layers(model)))
    mark_as_sketch(model, form)
    with without_progress_bars():
        model.save_pretrained(folder, state_dict=_stored_state(model))
        tokenizer.save_pretrained(folder)
    tensors = {
        name: StoredTensor(dtype=dtype, shape=shape, sha256=digest)
        for name, dtype, shape, digest in stored_entries(sorted(folder.glob("*.safetensors"))).values()
    }
    manifest = SketchManifest(fedzo=fedzo.__version__, recipe=recipe, layers=layers, tensors=tensors)
    replace_file(folder / MANIFEST, to_json(manifest) + "\n", durable=True)
    for file in folder.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())
    sync_folder(folder)
    return manifest


def read_manifest(file: Path) -> SketchManifest:
    """What ``write_sketch`` said.

    Raises:
        ConfigError: It is no manifest of a sketch.
    """
    text = file.read_bytes()
    remedy = "Copy the folder again, or build the sketch anew."
    manifest: SketchManifest = decode_json(SketchManifest, text, where=str(file), error=ConfigError, remedy=remedy)
    return manifest


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


def _stored_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state to store; tensors that are one stay one."""
    tables = {f"{name}.tables" for name in sketched_layers(model)}
    narrowed: dict[int, torch.Tensor] = {}
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in narrowed:
            held = tensor.detach()
            narrowed[id(tensor)] = held.to(TABLE_DTYPE) if name in tables else _narrowest(held)
        state[name] = narrowed[id(tensor)]
    return state


def _narrowest(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype == torch.float32:
        for dtype in _NARROW:
            if torch.equal((narrow := tensor.to(dtype)).float(), tensor):
                return narrow
    return tensor
