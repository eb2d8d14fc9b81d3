"""The linear layers of a model, dense and sketched, by name; GPT-2's transposed ``Conv1D`` is one of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedzo.models.source import forget_packing
from fedzo.sketch import SketchLinear, sketched_layers


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


def stored_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """What the files of a sketch hold, by name: a tensor in 16 bits where no number of it changes.

    So trained tables are float32. Tensors that are one stay one.
    """
    kept: dict[int, torch.Tensor] = {}
    state: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in kept:
            kept[id(tensor)] = narrowest(tensor.detach())
        state[name] = kept[id(tensor)]
    return state


def decoded_layers(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """For each sketched layer, by name, a dense one that computes the same: its decoded weight, and its very bias.

    The weights have the model's dtype, to which a sketched layer would round them, too.

    Args:
        model: A sketch; the classes of its dense layers are those that its config describes.
    """
    dtype = model.get_input_embeddings().weight.dtype
    with torch.device("meta"):
        plain = type(model)(model.config)
    for name, layer in sketched_layers(model).items():
        dense, weight = plain.get_submodule(name), layer.weight.to(dtype)
        weight = weight.T.contiguous() if isinstance(dense, Conv1D) else weight
        dense.weight = nn.Parameter(weight, requires_grad=False)
        dense.bias = layer.bias
        yield name, dense


def make_dense(model: Any) -> None:
    """Put dense layers in the place of the sketched ones, one by one; plain transformers reads what is then saved."""
    for name, dense in decoded_layers(model):
        model.set_submodule(name, dense)
    forget_packing(model)


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
