"""The blocks of a decoder: the modules that its forward runs one after another, each on the states of the last."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from fedzo.errors import ConfigError


def find_blocks(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """A decoder's blocks and the name of their list: of the lists in no other list, the one with the most parameters.

    Where there is none, or another holds half as many, the name is empty, and so is the list.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outer = {
        name: sum(parameter.numel() for parameter in blocks.parameters())
        for name, blocks in lists.items()
        if not any(name.startswith(f"{other}.") for other in lists)
    }
    first, second, *_ = (*sorted(outer.values(), reverse=True), 0, 0)
    if first <= 2 * second or first == 0:
        return "", []
    name = max(outer, key=outer.__getitem__)
    return name, list(lists[name])


def upper_blocks(model: nn.Module, first_layer: int) -> tuple[str, list[nn.Module]]:
    """The blocks from ``first_layer`` on and the name of the list of all.

    Raises:
        ConfigError: The model has no such block.
    """
    name, blocks = find_blocks(model)
    if not blocks:
        raise ConfigError(
            f"trainer.first_layer must be 0 for a {type(model).__name__}, which has no single list of blocks, got "
            f"{first_layer}. Leave it out."
        )
    if first_layer >= len(blocks):
        raise ConfigError(
            f"trainer.first_layer must be < {len(blocks)}, the number of blocks of this {type(model).__name__}, got "
            f"{first_layer}. Lower it."
        )
    return name, blocks[first_layer:]


def parameters_from(model: nn.Module, first_layer: int) -> dict[str, nn.Parameter]:
    """The parameters of the blocks from ``first_layer`` on, by name in the order of ``named_parameters``; all from 0.

    What lower blocks share with them is left out.

    Raises:
        ConfigError: The model has no such block.
    """
    named = dict(model.named_parameters())
    if first_layer == 0:
        return named
    _, upper = upper_blocks(model, first_layer)
    lower = find_blocks(model)[1][:first_layer]
    mine, shared = ({id(each) for block in blocks for each in block.parameters()} for blocks in (upper, lower))
    return {name: parameter for name, parameter in named.items() if id(parameter) in mine - shared}


def first_trained_block(model: nn.Module, trained: Iterable[nn.Parameter]) -> int:
    """Index of the first block that holds a trained parameter; 0 also where one lies in no block."""
    _, blocks = find_blocks(model)
    places: dict[int, list[int]] = {}
    for index, block in enumerate(blocks):
        for parameter in block.parameters():
            places.setdefault(id(parameter), []).append(index)
    return min((min(places.get(id(parameter), [0])) for parameter in trained), default=0)
