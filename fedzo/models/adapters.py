"""PEFT adapters on a loaded model: which layers they sit on, injection, removal."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedzo.errors import ConfigError
from fedzo.models.blocks import upper_blocks
from fedzo.models.loaded import LoadedModel
from fedzo.models.virtual_tokens import attach, detach, misfit, num_virtual_tokens, paused

Names = tuple[str, ...]
_FUSED: tuple[Names, ...] = (("c_attn",), ("query_key_value",), ("qkv_proj",), ("Wqkv",))
QUERY_VALUE: tuple[Names, ...] = (
    ("q_proj", "v_proj"),
    ("query", "value"),
    ("query_proj", "value_proj"),
    ("q", "v"),
    *_FUSED,
)
"""Names of query and value projections in the families of transformers; a fused projection is adapted whole."""
KEY_VALUE: tuple[Names, ...] = (("k_proj", "v_proj"), ("key", "value"), ("key_proj", "value_proj"), ("k", "v"), *_FUSED)
FEED_FORWARD: tuple[Names, ...] = (("down_proj",), ("fc2",), ("mlp.c_proj",), ("dense_4h_to_h",), ("fc_out",), ("w2",))


def find_layers(model: nn.Module, wanted: Sequence[str], *, known: Iterable[Names], key: str) -> list[str]:
    """Names under which an adapter's linear layers are found.

    Args:
        model: A causal language model.
        wanted: What the user says; nothing: the first of ``known`` whose names all are there.
        known: Groups of names, the most usual first.
        key: The setting to name in an error.

    Returns:
        Ends of module names, each of at least one linear layer.

    Raises:
        ConfigError: A name is of no linear layer, or nothing that is known is there.
    """
    linear = [name for name, module in _base_modules(model) if isinstance(module, nn.Linear | Conv1D)]

    def there(name: str) -> bool:
        return any(f".{layer}".endswith(f".{name}") for layer in linear)

    found = sorted({layer.rsplit(".", 1)[-1] for layer in linear})
    if missing := [name for name in wanted if not there(name)]:
        raise ConfigError(f"{key} must name linear layers of the model ({', '.join(found)}), got {', '.join(missing)}.")
    if wanted:
        return list(wanted)
    for names in known:
        if all(map(there, names)):
            return list(names)
    raise ConfigError(
        f"{key} must be given for a {type(model).__name__}: fedzo knows none of its linear layers by name. "
        f"Choose from {', '.join(found)}."
    )


def layers_from(model: nn.Module, first_layer: int, names: Sequence[str], *, named: bool, key: str) -> list[str]:
    """The layers that ``names`` are ends of in the blocks from ``first_layer`` on, by full names; from 0 as they are.

    Args:
        model: A causal language model.
        first_layer: The first of the blocks.
        names: Ends of names.
        named: Whether the user names them: then each must be of a layer there.
        key: The setting to name in an error.

    Raises:
        ConfigError: The model has no such block, or none there has a layer that the user names.
    """
    if first_layer == 0 or not names:
        return list(names)
    prefix, blocks = upper_blocks(model, first_layer)
    starts = tuple(f"{prefix}.{index}." for index in range(first_layer, first_layer + len(blocks)))
    upper = [name for name, _ in _base_modules(model) if name.startswith(starts)]
    layers = [layer for layer in upper if _is_named(layer, names)]
    if named and (lost := [name for name in names if not any(_is_named(layer, [name]) for layer in layers)]):
        raise ConfigError(
            f"{key} must name layers in the blocks from trainer.first_layer={first_layer} on, which have no "
            f"{', '.join(lost)}. Lower trainer.first_layer, or name layers of these blocks."
        )
    return layers


def are_transposed(model: nn.Module, names: Sequence[str]) -> bool:
    """Whether these layers store their weights as [in, out] (GPT-2's Conv1D), which PEFT must be told."""
    return any(isinstance(module, Conv1D) and _is_named(layer, names) for layer, module in _base_modules(model))


def inject(loaded: LoadedModel, config: PeftConfig) -> PeftModel:
    """Put an adapter into a loaded model, in place of an earlier one.

    The base layers stay the very same objects, so decoder, head and whoever holds the model compute with the adapter;
    virtual tokens are added to the decoder's input (``virtual_tokens``).
    Torch's global generator, from which PEFT draws initial values, is left as it was.

    Returns:
        PEFT's view of the model; its trained parameters (``trained_parameters``) are float32.

    Raises:
        ConfigError: PEFT has no such adapter for this model, or the model would not read it.
    """
    remove(loaded.model)
    targets = cast(Iterable[str], getattr(config, "target_modules", None) or ())
    asked = {name for name, _ in loaded.model.named_modules() if _is_named(name, targets)}  # before PEFT changes it
    devices = [loaded.device] if loaded.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # by PEFT
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys", RuntimeWarning)  # see below
        try:
            peft_model = cast(PeftModel, get_peft_model(loaded.model, config, revision=loaded.revision))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise _unsuitable(loaded, config, " ".join(str(error).split())[:300]) from error
    _check_layers(loaded.model, asked)
    for _, parameter in trained_parameters(peft_model):
        parameter.data = parameter.data.float()
    if config.is_prompt_learning:
        attach(loaded.model, peft_model)
    peft_model.eval()
    if config.is_prompt_learning and (reason := misfit(loaded.model)):
        detach(loaded.model)
        raise _unsuitable(loaded, config, reason)
    return peft_model


def trained_parameters(peft_model: PeftModel) -> list[tuple[str, nn.Parameter]]:
    """What the adapter trains, in the order of ``named_parameters``: the base is frozen."""
    return [(name, parameter) for name, parameter in peft_model.named_parameters() if parameter.requires_grad]


def remove(model: nn.Module) -> None:
    """Take any adapter out of the model: every layer is the base's own again."""
    detach(model)
    replaced: tuple[str, ...] = ()
    for name, module in list(model.named_modules()):
        # PEFT nests the layers that adapt several parameters of one module: the outer one's base is the module itself
        if isinstance(module, BaseTunerLayer) and not name.startswith(replaced):
            model.set_submodule(name, module.get_base_layer())
            replaced = (*replaced, f"{name}.")
    if hasattr(model, "peft_config"):
        del model.peft_config


def has_adapter(model: nn.Module) -> bool:
    """Whether an adapter is in the model."""
    return num_virtual_tokens(model) > 0 or any(isinstance(module, BaseTunerLayer) for module in model.modules())


@contextmanager
def base_model(model: nn.Module) -> Iterator[None]:
    """Let the model compute as if it had no adapter."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        with paused(model):
            yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)  # makes the adapter's parameters require gradients, whatever they did before
        model.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)


def _check_layers(model: nn.Module, asked: set[str]) -> None:
    """Refuse what PEFT adapts in place of the layers that were asked for; it is taken out of the model again."""
    made = {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    if asked != made:
        remove(model)
        names = ", ".join(sorted({name.rpartition(".")[2] for name in asked - made}))
        raise ConfigError(
            f"trainer.target_modules must name layers of a {type(model).__name__} that PEFT adapts as they are, got "
            f"{names}: PEFT would adapt the fused weights of all experts in their place. Leave them out."
        )


def _is_named(layer: str, names: Iterable[str]) -> bool:
    return f".{layer}".endswith(tuple(f".{name}" for name in names))


def _unsuitable(loaded: LoadedModel, config: PeftConfig, reason: str) -> ConfigError:
    return ConfigError(
        f"trainer: a {type(loaded.model).__name__} must be a model that can have an adapter of the kind "
        f"{config.peft_type}, but cannot: {reason}. Choose another trainer, such as meerkat or lora."
    )


def _base_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules by the names that they have without an adapter."""
    return [
        (name.removesuffix(".base_layer"), module)
        for name, module in model.named_modules()
        if not isinstance(module, BaseTunerLayer)
    ]
