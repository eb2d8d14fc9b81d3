"""Which parameters a mask may pick from: the attention and MLP projection matrices.

The rule is that of SensZOQ's code (arXiv 2406.02913), by name: ``weight`` is in it and none of the words of norms,
embeddings and the head. So the router of a mixture of experts (``mlp.gate.weight``) is eligible, as it is there.

Deviations: these words are looked for in the last three parts of a name only; vectors are never eligible; fused
expert tensors, whose names lack ``weight``, are; what an ``nn.Embedding`` or the model's output head owns is not,
whatever its name; a shared weight counts once, and not at all if an embedding shares it.
"""

from __future__ import annotations

from collections.abc import Hashable
from itertools import islice

import torch
from torch import nn

from fedzo.errors import ConfigError

_EXCLUDED = ("layer_norm", "layernorm", "ln_", "norm", "embed", "lm_head", "wte", "wpe")


def eligible_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a mask may pick from, in the order of ``named_parameters``.

    Raises:
        ConfigError: There is none; the message lists the first parameters that there are.
    """
    barred = _barred(model)
    found: dict[Hashable, tuple[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if _is_projection(name, parameter) and _identity(parameter) not in barred:
            found.setdefault(_identity(parameter), (name, parameter))
    if not found:
        first = ", ".join(f"{n} {tuple(p.shape)} {p.dtype}" for n, p in islice(model.named_parameters(), 5))
        raise ConfigError(
            "mask: the model must have an eligible weight (an attention or MLP projection, floating point), got none. "
            f"Its first parameters: {first or 'none'}. Choose another trainer, or a model of dense layers."
        )
    return dict(found.values())


def _is_projection(name: str, parameter: nn.Parameter) -> bool:
    if not parameter.is_floating_point() or parameter.numel() == 0 or _has_excluded_word(name):
        return False
    return ("weight" in name and parameter.ndim >= 2) or ("experts" in name and parameter.ndim >= 3)


def _has_excluded_word(name: str) -> bool:
    """Looks at the parameter, its module and what that is in; farther out, DBRX names a whole attention after norms."""
    near = ".".join(name.lower().split(".")[-3:])
    return any(word in near for word in _EXCLUDED)


def _barred(model: nn.Module) -> set[Hashable]:
    """Weights that a name or an owner marks as embedding, head or norm; of a shared weight one such name is enough."""
    barred = {
        _identity(parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if _has_excluded_word(name)
    }
    head = getattr(model, "get_output_embeddings", lambda: None)()
    owners = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    for owner in [*owners, *([head] if isinstance(head, nn.Module) else [])]:
        barred.update(_identity(parameter) for parameter in owner.parameters(recurse=False))
    return barred


def _identity(parameter: torch.Tensor) -> Hashable:
    """Equal for two parameters over the same memory; a tensor without memory (the meta device) is only itself."""
    if parameter.is_meta or parameter.numel() == 0:
        return id(parameter)
    return parameter.device, parameter.data_ptr(), parameter.numel()
