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
from fedzo.models.blocks import text_parameters, upper_blocks
from fedzo.models.loaded import LoadedModel
from fedzo.models.sketched.layers import dense_layers
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


def text_layers(model: nn.Module) -> list[str]:
    """Names of the linear layers that a text passes: another has no part in any loss of a text."""
    text = {id(each) for each in text_parameters(model).values()}
    return [name for name, layer in dense_layers(model).items() if any(id(each) in text for each in layer.parameters())]


def find_layers(
    model: nn.Module, text: Sequence[str], wanted: Sequence[str], *, known: Iterable[Names], first_layer: int, key: str
) -> list[str]:
    """The linear layers that an adapter sits on, in the blocks from ``first_layer`` on, by full names.

    From 0 on, ends of their names, unless some of these lie where no text passes, as in towers for images or sound.

    Args:
        model: A causal language model.
        text: Its ``text_layers``.
        wanted: Ends of names that the user says; nothing: the first of ``known`` whose names all are there.
        known: Groups of names, the most usual first.
        first_layer: The first of the blocks.
        key: The setting to name in an error.

    Raises:
        ConfigError: A name that the user says is of no such layer, nothing that is known is there, or the model has no
            such block.
    """
    names = _names_there(model, text, wanted, known=known, key=key)
    layers = [layer for layer in text if _is_named(layer, names)]
    if first_layer == 0:
        everywhere = [layer for layer in dense_layers(model) if _is_named(layer, names)]
        return names if layers == everywhere else layers
    prefix, upper, _ = upper_blocks(model, first_layer)
    starts = tuple(f"{prefix}.{index}." for index in range(first_layer, first_layer + len(upper)))
    layers = [layer for layer in layers if layer.startswith(starts)]
    if lost := [name for name in wanted if not any(_is_named(layer, [name]) for layer in layers)]:
        raise ConfigError(
            f"{key} must name layers in the blocks from trainer.first_layer={first_layer} on, which have no "
            f"{', '.join(lost)}. Lower trainer.first_layer, or name layers of these blocks."
        )
    return layers


def are_transposed(model: nn.Module, names: Sequence[str]) -> bool:
    """Whether these layers store their weights as [in, out] (GPT-2's Conv1D), which PEFT must be told."""
    return any(isinstance(layer, Conv1D) and _is_named(name, names) for name, layer in dense_layers(model).items())


def inject(loaded: LoadedModel, config: PeftConfig) -> PeftModel:
    """Put an adapter into a loaded model that holds none.

    The base layers stay the very same objects, so decoder, head and whoever holds the model compute with the adapter;
    virtual tokens are added to the decoder's input (``virtual_tokens``).
    Torch's global generator, from which PEFT draws initial values, is left as it was.

    Returns:
        PEFT's view of the model; its trained parameters (``trained_parameters``) are float32.

    Raises:
        ConfigError: PEFT has no such adapter for this model, or the model would not read it.
    """
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


def _names_there(
    model: nn.Module, text: Sequence[str], wanted: Sequence[str], *, known: Iterable[Names], key: str
) -> list[str]:
    """Ends of names, each of at least one layer that a text passes: what the user says, or the first known group."""

    def there(name: str) -> bool:
        return any(_is_named(layer, [name]) for layer in text)

    found = sorted({layer.rsplit(".", 1)[-1] for layer in text})
    if missing := [name for name in wanted if not there(name)]:
        raise ConfigError(
            f"{key} must name linear layers that a text passes ({', '.join(found)}), got {', '.join(missing)}. Choose "
            "from these."
        )
    if wanted:
        return list(wanted)
    for names in known:
        if all(map(there, names)):
            return list(names)
    raise ConfigError(
        f"{key} must be given for a {type(model).__name__}: fedzo knows none of its linear layers by name. "
        f"Choose from {', '.join(found)}."
    )
