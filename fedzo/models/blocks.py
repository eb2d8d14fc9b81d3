"""What a text passes in a model, and its blocks: the modules that run one after another, each on the last's states."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from itertools import chain
from typing import Any, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fedzo.errors import ConfigError
from fedzo.models.checks import NUM_TOKENS
from fedzo.zo.perturb import reads_metadata_only


class Reached(Exception):
    """Ends a forward where all that is asked for was seen."""


def text_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a text can be computed with, by name in the order of ``named_parameters``.

    The others are those of parts for images or sound, such as towers and projectors: no loss of a text depends on them.
    They are what one small forward does not read, and in a model with such parts what it reads without effect. A block
    that it passes counts as a whole, since another text may take another way through it (experts).
    """
    named = dict(model.named_parameters())
    called, read = _passed_by_text(model)
    blocks = [{id(each) for each in block.parameters()} for block in chain.from_iterable(_outer_lists(model).values())]
    text = read.union(*(inside for inside in blocks if inside & read))
    inside = set[int]().union(*blocks)
    outside = [module for module in called if _own(module) - inside]
    if outside and not text.issuperset(map(id, named.values())):
        text -= _without_effect(model, outside) - inside
    return {name: parameter for name, parameter in named.items() if id(parameter) in text}


def find_blocks(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """A decoder's blocks and the name of their list: the one with the most parameters that a text passes.

    Only lists in no other list count. Where there is none, or another holds half as many, the name is empty, and so is
    the list.
    """
    lists = _outer_lists(model)
    if len(lists) > 1:
        _, read = _passed_by_text(model)
        lists = {
            name: blocks for name, blocks in lists.items() if any(id(each) in read for each in blocks.parameters())
        }
    sizes = {name: sum(parameter.numel() for parameter in blocks.parameters()) for name, blocks in lists.items()}
    first, second, *_ = (*sorted(sizes.values(), reverse=True), 0, 0)
    if first <= 2 * second or first == 0:
        return "", []
    name = max(sizes, key=sizes.__getitem__)
    return name, list(lists[name])


def upper_blocks(model: nn.Module, first_layer: int) -> tuple[str, list[nn.Module], list[nn.Module]]:
    """The name of the list of blocks, those from ``first_layer`` on, and those below.

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
    return name, blocks[first_layer:], blocks[:first_layer]


def parameters_from(model: nn.Module, first_layer: int) -> dict[str, nn.Parameter]:
    """The parameters of the blocks from ``first_layer`` on, by name in the order of ``named_parameters``.

    From 0 on, all that a text can be computed with (``text_parameters``). What lower blocks share with the others is
    left out.

    Raises:
        ConfigError: The model has no such block.
    """
    named = text_parameters(model)
    if first_layer == 0:
        return named
    _, upper, lower = upper_blocks(model, first_layer)
    mine, shared = ({id(each) for block in blocks for each in block.parameters()} for blocks in (upper, lower))
    return {name: parameter for name, parameter in named.items() if id(parameter) in mine - shared}


def norms_from(model: nn.Module, first_layer: int) -> dict[str, nn.Parameter]:
    """The scales and shifts of the norms in the blocks from ``first_layer`` on and behind them; all from 0.

    By name in the order of ``named_parameters``. With the number of blocks, only the norms behind them. Which norms
    texts pass, and in which order, is seen in small forwards.

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
    norms = {name: each for name, each in text_parameters(model).items() if id(each) in found}
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

    with ExitStack() as hooks:
        for module in model.modules():
            hooks.enter_context(module.register_forward_pre_hook(note))
        (forward or model)(_small_texts(model, 1))
    return list(seen.values())


def _outer_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The lists of modules with parameters that are in no other list, by name."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    return {
        name: blocks
        for name, blocks in lists.items()
        if not any(name.startswith(f"{other}.") for other in lists) and any(True for _ in blocks.parameters())
    }


def _passed_by_text(model: nn.Module) -> tuple[list[nn.Module], set[int]]:
    """The modules that one small forward calls, and ids, among them those of all parameters that it or they read."""
    with _Reads() as reads:
        called = called_modules(model)
    return called, reads.seen.union(*map(_own, called))


@torch.inference_mode()
def _without_effect(model: nn.Module, modules: list[nn.Module]) -> set[int]:
    """Ids of what modules own that are called for a text, though no logit depends on what they give.

    So Gemma 3n embeds images and sound of every text, and leaves out what it gets. Each module gives NaN in a row of a
    batch that is its own: logits that depend on it are NaN there, those of another computation stay as they are.
    """
    rows = {module: row for row, module in enumerate(modules)}
    kept: set[nn.Module] = set()

    def spoil(module: nn.Module, args: object, output: Any) -> Any:
        if not isinstance(output, torch.Tensor) or output.shape[:1] != (len(rows),) or not output.is_floating_point():
            kept.add(module)  # no row of it is the module's own: it counts as a text's
            return output
        output = output.clone()
        output[rows[module]] = torch.nan
        return output

    with ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_hook(spoil))
        logits = cast(Any, model)(_small_texts(model, len(rows))).logits
    kept |= {module for module, row in rows.items() if logits[row].isnan().any()}
    return set[int]().union(*map(_own, rows.keys() - kept)).difference(*map(_own, kept))


def _small_texts(model: nn.Module, rows: int) -> torch.Tensor:
    return torch.zeros(rows, NUM_TOKENS, dtype=torch.int64, device=next(model.parameters()).device)


def _own(module: nn.Module) -> set[int]:
    """Ids of the parameters of a module that are in no module of it."""
    return {id(each) for each in module.parameters(recurse=False)}


class _Reads(TorchFunctionMode):
    """Notes, by their ids, what torch functions are given: some code reads a module's weight without a call of it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call ``func``."""
        kwargs = kwargs or {}
        if not reads_metadata_only(func):
            for given in (*args, *kwargs.values()):
                self.seen.update(map(id, given if isinstance(given, list | tuple) else [given]))
        return func(*args, **kwargs)


def _is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm with weights: a name says so, and it has vectors only and nothing inside."""
    own = list(module.parameters(recurse=False))
    named = "norm" in type(module).__name__.lower()
    return named and bool(own) and all(each.ndim == 1 for each in own) and not list(module.children())
