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


def norms_from(model: nn.Module, first_layer: int) -> dict[str, nn.Parameter]:
    """The scales and shifts of the norms in the blocks from ``first_layer`` on and behind them; all from 0.

    By name in the order of ``named_parameters``. With the number of blocks, only the norms behind them.

    Raises:
        ConfigError: The model has no such block, or no norms there.
    """
    _, blocks = find_blocks(model)
    if not blocks and first_layer:
        upper_blocks(model, first_layer)  # says that there are none
    if first_layer > len(blocks):
        raise ConfigError(
            f"trainer.first_layer must be <= {len(blocks)} for trainer=norms, the number of blocks of this "
            f"{type(model).__name__}, got {first_layer}. Lower it."
        )
    left_out = {id(each) for block in blocks[:first_layer] for each in block.parameters()}
    found = _norms(model, before_blocks=not first_layer) - left_out
    norms = {name: each for name, each in model.named_parameters() if id(each) in found}
    if not norms:
        raise ConfigError(
            f"trainer=norms must find norms with weights from block {first_layer} of this {type(model).__name__} on, "
            "but there are none. Lower trainer.first_layer, or take another trainer."
        )
    return norms


def first_trained_block(model: nn.Module, trained: Iterable[nn.Parameter]) -> int:
    """Index of the first block with a trained parameter in it or before it; the number of blocks where all lie behind.

    Of parameters in no block those of norms count as lying behind: who leaves blocks out must see that nothing changes.
    """
    _, blocks = find_blocks(model)
    places: dict[int, list[int]] = {}
    for index, block in enumerate(blocks):
        for parameter in block.parameters():
            places.setdefault(id(parameter), []).append(index)
    norms = _norms(model, before_blocks=False)

    def first(parameter: nn.Parameter) -> int:
        return min(places.get(id(parameter), [len(blocks) if id(parameter) in norms else 0]))

    return min(map(first, trained), default=0)


def _norms(model: nn.Module, *, before_blocks: bool) -> set[int]:
    """The ``id`` of each parameter of a norm; those of embeddings' norms only if ``before_blocks``."""
    return {
        id(each)
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower() and (before_blocks or "embed" not in name)
        for each in module.parameters(recurse=False)
    }
