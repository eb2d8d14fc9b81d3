"""The linear layers of a model, dense and sketched, by name; GPT-2's transposed ``Conv1D`` is one of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedzo.sketch import SketchLinear


def sketched_layers(model: nn.Module) -> dict[str, SketchLinear]:
    """The sketched layers by name, in the order of ``named_modules``; empty for a dense model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SketchLinear)}


def dense_layers(model: nn.Module) -> dict[str, nn.Linear | Conv1D]:
    """The dense linear layers by name, in the order of ``named_modules``."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def weight_of(layer: nn.Linear | Conv1D) -> torch.Tensor:
    """A dense layer's weight as [outputs, inputs]; a view."""
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight


def replace_layers(model: nn.Module, *, bits: int, groups_per_row: int, keep: Iterable[str]) -> None:
    """Put an empty ``SketchLinear`` in the place of each dense layer whose name is not in ``keep``.

    Raises:
        ConfigError: A width that the groups do not divide.
    """
    kept = set(keep)
    for name, layer in dense_layers(model).items():
        if name in kept:
            continue
        outputs, inputs = weight_of(layer).shape
        empty = SketchLinear(
            inputs,
            outputs,
            bits=bits,
            groups_per_row=groups_per_row,
            bias=layer.bias is not None,
            device=layer.weight.device,
            dtype=layer.weight.dtype,
            name=name,
        )
        model.set_submodule(name, empty)


def narrowest(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in 16 bits, if no number of it changes, else as it is."""
    if tensor.dtype == torch.float32:
        for dtype in (torch.bfloat16, torch.float16):
            if torch.equal((narrow := tensor.to(dtype)).float(), tensor):
                return narrow
    return tensor
