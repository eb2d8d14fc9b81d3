"""The blocks of a decoder: the modules that its forward runs one after another, each on the states of the last."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
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

    By name in the order of ``named_parameters``. With the number of blocks, only the norms behind them. Which norms
    texts pass, and in which order, is seen in one small forward.

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
    order = called_modules(model)
    if first_layer:
        inside = {id(module) for block in blocks for module in block.modules()}
        upper = {id(module) for block in blocks[first_layer:] for module in block.modules()}
        end = order.index(blocks[-1]) if blocks[-1] in order else len(order)
        behind = {id(module) for module in order[end + 1 :]} - inside
        order = [module for module in order if id(module) in upper | behind]
    left_out = {id(each) for block in blocks[:first_layer] for each in block.parameters()}
    found = {id(each) for module in order if _is_norm(module) for each in module.parameters()} - left_out
    norms = {name: each for name, each in model.named_parameters() if id(each) in found}
    if not norms:
        raise ConfigError(
            f"trainer=norms must find norms with weights from block {first_layer} of this {type(model).__name__} on, "
            "but there are none. Lower trainer.first_layer, or take another trainer."
        )
    return norms


def first_trained_block(model: nn.Module, trained: Iterable[nn.Parameter]) -> int:
    """Index of the first block with a trained parameter in it or before it; the number of blocks where all lie behind.

    Of parameters in no block those of norms count as lying behind: who leaves blocks out must see whether they do.
    """
    _, blocks = find_blocks(model)
    places: dict[int, list[int]] = {}
    for index, block in enumerate(blocks):
        for parameter in block.parameters():
            places.setdefault(id(parameter), []).append(index)
    norms = {id(each) for module in model.modules() if _is_norm(module) for each in module.parameters()}

    def first(parameter: nn.Parameter) -> int:
        return min(places.get(id(parameter), [len(blocks) if id(parameter) in norms else 0]))

    return min(map(first, trained), default=0)


@torch.inference_mode()
def called_modules(model: nn.Module, forward: Callable[[torch.Tensor], object] | None = None) -> list[nn.Module]:
    """The modules that a text passes, in the order of their first calls.

    Args:
        model: A causal language model.
        forward: From ids int64 [B, T]; the model's own by default.
    """
    seen: dict[int, nn.Module] = {}

    def note(module: nn.Module, args: object) -> None:
        seen.setdefault(id(module), module)

    hooks = [module.register_forward_pre_hook(note) for module in model.modules()]
    try:
        (forward or model)(torch.zeros(1, 2, dtype=torch.int64, device=next(model.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()
    return list(seen.values())


def _is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm with weights: a name says so, and it has vectors only and nothing inside."""
    own = list(module.parameters(recurse=False))
    named = "norm" in type(module).__name__.lower()
    return named and bool(own) and all(each.ndim == 1 for each in own) and not list(module.children())
