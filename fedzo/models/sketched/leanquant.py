"""The layout in which LeanQuant and SketchTune release sketches, as a safetensors file.

Their files are pickles of ``{layer: (table, codes)}``, which fedzo never reads. The same tensors in a safetensors file,
named ``LAYER.table`` and ``LAYER.codes``, are read and written here:

    table    [R, 2^b], or [R, G, 2^b] for G groups a row
    codes    uint8 [R, d / 2], or [R, G, d / G / 2]: two a byte, the even column in the high half, whatever b is
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from fedzo.errors import ConfigError
from fedzo.models.sketched.layers import dense_layers, narrowest, weight_of
from fedzo.records.folder import replace_file
from fedzo.sketch import SketchLinear, pack, sketched_layers, unpack

_VALUES = (4, 8, 16)


def write_layout(model: nn.Module, file: Path) -> int:
    """Write the sketched layers of a model, all or nothing; returns how many.

    Raises:
        ConfigError: The model is dense, or a group has an odd number of columns, which nibbles cannot hold.
        OSError: The file cannot be written.
    """
    layers = sketched_layers(model)
    if not layers:
        raise ConfigError("--export: the model must be a sketch, but is dense. Build one with: fedzo sketch --out DIR.")
    tensors: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        rows, groups, _ = layer.tables.shape
        if layer.in_features // groups % 2:
            raise ConfigError(
                f"--export: a group of {name!r} must have an even number of columns in this layout, got "
                f"{layer.in_features // groups}. Sketch the model with fewer groups."
            )
        codes = unpack(layer.codes, layer.bits, layer.in_features).view(rows, groups, -1)
        halves = codes[..., 0::2] << 4 | codes[..., 1::2]
        table = narrowest(layer.tables.detach())
        one = groups == 1
        tensors[f"{name}.table"] = (table[:, 0] if one else table).contiguous()
        tensors[f"{name}.codes"] = (halves[:, 0] if one else halves).contiguous()
    replace_file(file, save(tensors, metadata={"format": "pt"}), durable=True)
    return len(layers)


def put_layout(model: Any, file: Path) -> None:
    """Replace the dense layers that a file has by its sketches, in place. The other layers stay dense.

    Raises:
        ConfigError: The file is no such file, its layers differ in bits or groups, or one does not fit the model.
    """
    layers = dense_layers(model)
    kinds: set[tuple[int, int]] = set()
    for name, (table, halves) in _read(file).items():
        where = f"--import: {file.name}: {name!r}"
        if name not in layers:
            raise ConfigError(
                f"{where} must be a dense linear layer of the model ({', '.join(list(layers)[:3])}, ...), but is none. "
                "Give the dense model that was sketched."
            )
        table = table[:, None] if table.dim() == 2 else table
        halves = halves[:, None] if halves.dim() == 2 else halves
        outputs, inputs = weight_of(layers[name]).shape
        rows, groups, values = table.shape if table.dim() == 3 else (0, 0, 0)
        fits = rows == outputs and halves.shape[:-1] == (outputs, groups) and groups * halves.shape[-1] * 2 == inputs
        if not (fits and values in _VALUES and table.is_floating_point() and halves.dtype == torch.uint8):
            raise ConfigError(
                f"{where} must have a table [{outputs}, groups, 4, 8 or 16] and codes uint8 [{outputs}, groups, "
                f"{inputs} / groups / 2], got {table.dtype} {list(table.shape)} and {halves.dtype} "
                f"{list(halves.shape)}. Give the dense model that was sketched."
            )
        codes = torch.stack([halves >> 4, halves & 15], dim=-1).view(rows, -1)
        if int(codes.max()) >= values:
            raise ConfigError(f"{where}: codes must be below {values}, got {int(codes.max())}. Copy the file again.")
        if not bool(table.float().isfinite().all()):
            raise ConfigError(f"{where}: its table must be finite, got NaN or infinity. Copy the file again.")
        bits, dense = values.bit_length() - 1, layers[name]
        kinds.add((bits, groups))
        layer = SketchLinear.of(pack(codes, bits), table, inputs, dense.bias)
        model.set_submodule(name, layer.to(dense.weight.device))
    if len(kinds) != 1:
        raise ConfigError(
            f"--import: {file.name}: all layers must have the same bits and groups, got {sorted(kinds) or 'no layer'}. "
            "Give a file of one sketch."
        )


def _read(file: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"--import: {str(file)!r} must be a safetensors file of LAYER.table and LAYER.codes, got {error}. Pickles "
            "are never read: docs/how-to-sketch-a-model.md has the lines that turn one into such a file."
        ) from error
    names = {key.removesuffix(".table").removesuffix(".codes") for key in tensors}
    missing = sorted({f"{name}.{part}" for name in names for part in ("table", "codes")} - tensors.keys())
    if missing:
        raise ConfigError(
            f"--import: {file.name}: each layer must have a table and codes, but {missing[0]!r} is not there. "
            "Make the file again, with both."
        )
    return {name: (tensors[f"{name}.table"], tensors[f"{name}.codes"]) for name in sorted(names)}
