"""The linear layers of a model, dense and sketched, by name; GPT-2's transposed ``Conv1D`` is one of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

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


def decoded_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """For each sketched layer a dense one that computes the same: its weight as decoded now, and its very bias.

    Returns:
        Layers by name, in the dtype in which the model computes.
    """
    dtype = cast(Any, model).get_input_embeddings().weight.dtype
    dense = {}
    for name, layer in sketched_layers(model).items():
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(layer.weight.to(dtype), requires_grad=False)
        linear.bias = cast(nn.Parameter, layer.bias)  # None where there is none
        dense[name] = linear
    return dense


@contextmanager
def layers_replaced(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within the context the model computes with ``layers``, by name, in the place of its own."""
    own = {name: model.get_submodule(name) for name in layers}
    try:
        for name, layer in layers.items():
            model.set_submodule(name, layer)
        yield
    finally:
        for name, layer in own.items():
            model.set_submodule(name, layer)
