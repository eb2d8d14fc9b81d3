"""A model that is loaded, and what was asked of it: apart from loading, which takes seconds to import."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from fedzo.errors import ConfigError, some
from fedzo.sketch import sketched_layers

if TYPE_CHECKING:
    from fedzo.models.lower_layers import LowerLayers


class BucketedDecoder(Protocol):
    """A decoder that is called at few shapes, since each costs something of its own."""

    def width(self, length: int) -> int:
        """Columns that ``length`` tokens are padded to; a text of more than the longest has a shape of its own."""
        ...

    def __call__(self, *, input_ids: torch.Tensor) -> Any:
        """What the model's decoder gives for ids int64 [B, T], as far as ``last_hidden_state``; to be copied."""
        ...


@dataclass(slots=True)
class ForwardCounter:
    """What the model was asked to do since it was loaded."""

    num_forwards: int = 0
    num_tokens: int = 0
    """Tokens run, padding included."""
    num_padding: int = 0
    num_head_rows: int = 0
    """Positions that paid for the LM head."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A frozen model in evaluation mode, its tokenizer, and digests of both as stored.

    Attributes:
        model: The model; no parameter requires a gradient.
        tokenizer: A transformers tokenizer.
        device: Where the model is.
        base_digest: SHA-256 of the stored weights, whatever the dtype they are held in.
        tokenizer_digest: SHA-256 of vocabulary, special tokens and chat template.
        source: Folder or hub name they came from.
        read_weights: Reads the base weights again, with their parameters' names; other tensors may be among them.
        reads_whole: Whether ``read_weights`` has to make a second model, beside this one.
        direct_head: Whether the LM head may be applied apart (``head.check_head``).
        shared_prompts: Whether candidates may run on top of their prompt's cache (``cache.check_cache``).
        decoder: What losses and scores run through, if not the model's own (``model.compile``, ``model.cuda_graphs``).
        kept: Where scores find states of texts that ran before, and leave them (``model.lower_layers_cache_mb``).
        revision: Hub revision that ``source`` was read at, if one was named.
        architecture_digest: SHA-256 of what ``config.json`` says of the computation (``digest.architecture_digest``).
        counter: Forwards and tokens so far.
    """

    model: nn.Module
    tokenizer: Any
    device: torch.device
    base_digest: str
    tokenizer_digest: str
    source: str
    read_weights: Callable[[], Iterable[tuple[str, torch.Tensor]]]
    reads_whole: bool = False
    direct_head: bool = True
    shared_prompts: bool = False
    decoder: BucketedDecoder | None = None
    kept: LowerLayers | None = None
    revision: str | None = None
    architecture_digest: str = ""
    counter: ForwardCounter = field(default_factory=ForwardCounter)

    @property
    def is_sketch(self) -> bool:
        """Whether linear layers are codes and tables (``fedzo.sketch``)."""
        return bool(sketched_layers(self.model))

    @property
    def packed_as(self) -> str | None:
        """By what linear layers hold packed weights (``quant_method``); None of dense layers, and of a sketch's."""
        method = None if self.is_sketch else getattr(self.model, "quantization_method", None)
        return None if method is None else str(getattr(method, "value", method))

    def reload_weights(self) -> None:
        """Write the base weights back into the model, in place.

        Raises:
            ConfigError: The source lacks a weight by now.
        """
        waiting = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, weight in self.read_weights():
                if name in waiting:
                    waiting.pop(name).copy_(weight)
        if waiting:
            raise ConfigError(
                f"model {self.source!r} must hold the weights that it held when it was loaded, but {some([*waiting])} "
                "is not there any more. Copy its files again."
            )
