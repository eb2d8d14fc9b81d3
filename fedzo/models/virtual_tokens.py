"""Virtual tokens before every text: what prefix and prompt tuning train, seen by whoever calls the model.

PEFT's model would add them in its own forward; fedzo calls the decoder and the head apart, and transformers' generation
calls the model. So they are added where all of these meet, in hooks on the decoder, from PEFT's own tensors.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from fedzo.errors import ConfigError
from fedzo.models.checks import mismatch, num_positions, some_ids
from fedzo.models.shared_prompts import read_only
from fedzo.system import is_out_of_memory

if TYPE_CHECKING:
    from peft import PeftModel

_ATTACHED = "_fedzo_virtual_tokens"
_STATES = ("cache_params", "state", "mems", "past_buckets_states")
"""Where xLSTM, RWKV, XLNet and Reformer are given what their own first call left, and nothing before it."""


def attach(model: nn.Module, peft_model: PeftModel) -> None:
    """Let the decoder of ``model`` see the virtual tokens that ``peft_model``, a prompt learning one, holds."""
    tokens = VirtualTokens(peft_model)
    decoder = cast(Any, model).get_decoder()
    device = next(model.parameters()).device  # PEFT would copy the tokens' numbers there in every forward
    peft_model.prompt_tokens = {name: numbers.to(device) for name, numbers in peft_model.prompt_tokens.items()}
    tokens.handles.append(decoder.register_forward_pre_hook(tokens.before, with_kwargs=True))
    tokens.handles.append(decoder.register_forward_hook(tokens.after, with_kwargs=True))
    vars(model)[_ATTACHED] = tokens


def detach(model: nn.Module) -> None:
    """Take the virtual tokens away, if there are any."""
    tokens: VirtualTokens | None = vars(model).pop(_ATTACHED, None)
    for handle in tokens.handles if tokens else ():
        handle.remove()


@contextmanager
def paused(model: nn.Module) -> Iterator[None]:
    """Leave the virtual tokens out for a while, if there are any."""
    tokens: VirtualTokens | None = vars(model).get(_ATTACHED)
    if tokens is None:
        yield
        return
    detach(model)
    try:
        yield
    finally:
        attach(model, tokens.peft_model)


@torch.inference_mode()
def misfit(model: nn.Module) -> str:
    """Why the model cannot have the virtual tokens that are attached to it; nothing if it can.

    The output at a text's tokens must depend on them, which it does not where no layer attends. Where they are
    embeddings, embeddings must be all that the decoder reads of a text.
    """
    tokens: VirtualTokens = vars(model)[_ATTACHED]
    ids = some_ids(model, 1, 4)
    decoder = cast(Any, model).get_decoder()
    try:
        seen = decoder(input_ids=ids).last_hidden_state
        with paused(model):
            alone = decoder(input_ids=ids).last_hidden_state
            if isinstance(tokens.peft_model.get_prompt(1), torch.Tensor):
                embedded = decoder(inputs_embeds=decoder.get_input_embeddings()(ids)).last_hidden_state
                if mismatch(embedded, alone):  # as Gemma 3n, which has embeddings of its own in every layer
                    return "it computes otherwise from embeddings than from token ids"
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        line = str(error).partition("\n")[0][:300]
        return f"a forward with virtual tokens fails ({type(error).__name__}: {line})"
    return "its layers do not read the virtual tokens" if torch.equal(seen, alone) else ""


def num_virtual_tokens(model: nn.Module) -> int:
    """Positions that virtual tokens take before every text, 0 without any."""
    tokens: VirtualTokens | None = vars(model).get(_ATTACHED)
    return tokens.count if tokens else 0


def longest_sequence(model: nn.Module, max_length: int) -> int:
    """Positions of a text of ``max_length`` tokens and of the virtual tokens before it.

    Raises:
        ConfigError: The model has fewer.
    """
    there, virtual = num_positions(model), num_virtual_tokens(model)
    if virtual and there is not None and max_length + virtual > there:
        raise ConfigError(
            f"task.max_length must be <= {there - virtual}, since {virtual} of {there} positions are virtual tokens, "
            f"got {max_length}. Lower it, or trainer.num_virtual_tokens."
        )
    return max_length + virtual


def check_answer_length(model: nn.Module, max_length: int, max_new_tokens: int) -> None:
    """Refuse answers that are too long to be written behind a prompt, which has half of ``max_length`` at least.

    Raises:
        ConfigError: The model has too few positions for both, and for the virtual tokens before them.
    """
    there, virtual = num_positions(model), num_virtual_tokens(model)
    if there is None:
        return
    most = there - virtual - max_length // 2
    if max_new_tokens > most:
        taken = f"{virtual} virtual tokens and {max_length // 2}" if virtual else f"{max_length // 2}"
        raise ConfigError(
            f"task.max_new_tokens must be <= {most}, since the model has {there} positions, of which {taken} of the "
            f"prompt (half of task.max_length) come first, got {max_new_tokens}. Lower it, or task.max_length."
        )


@dataclass(eq=False)
class VirtualTokens:
    """The hooks. A text's own positions follow those of the virtual tokens, whatever padding lies between."""

    peft_model: PeftModel
    handles: list[RemovableHandle] = field(default_factory=list)

    @property
    def count(self) -> int:
        """How many there are."""
        return int(self.peft_model.active_peft_config.num_virtual_tokens)

    def before(self, decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        """Add them to the first call of a sequence (later ones find them in what it left), and make room for them."""
        kwargs = {**dict(zip(inspect.signature(decoder.forward).parameters, args, strict=False)), **kwargs}
        positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
        given = kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        size = len(given)
        if mask is not None:
            kwargs["attention_mask"] = torch.cat([mask.new_ones(size, self.count), mask], dim=1)
        if positions is not None:
            kwargs["position_ids"] = positions + self.count
        if _goes_on(kwargs):
            return (), kwargs
        learned: Any = self.peft_model.get_prompt(size)
        if not isinstance(learned, torch.Tensor):
            kwargs["past_key_values"] = learned if kwargs.get("use_cache") else read_only(learned)
            return (), kwargs
        if kwargs.get("inputs_embeds") is None:
            given = cast(Any, decoder).get_input_embeddings()(kwargs.pop("input_ids"))
        kwargs["inputs_embeds"] = torch.cat([learned.to(given.dtype), given], dim=1)
        if positions is not None:
            ahead = torch.arange(self.count, device=positions.device).expand(len(positions), -1)
            kwargs["position_ids"] = torch.cat([ahead, positions + self.count], dim=1)
        return (), kwargs

    def after(self, decoder: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Take the outputs at virtual tokens away."""
        if kwargs.get("inputs_embeds") is not None:
            output.last_hidden_state = output.last_hidden_state[:, self.count :]
        return output


def _goes_on(given: dict[str, Any]) -> bool:
    """Whether a call of a decoder goes on with a sequence, by the keys and values or the states that it is given."""
    from transformers.cache_utils import Cache  # slow to import

    cache, states = given.get("past_key_values"), given.get("cache_params")
    if cache is not None and cache.get_seq_length() > 0:
        return True
    if isinstance(states, Cache):  # Mamba's, which is there from the first call on
        return states.has_previous_state()
    return any(given.get(name) is not None for name in _STATES)
