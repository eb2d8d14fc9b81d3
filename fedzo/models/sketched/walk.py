"""Running a decoder one block at a time, on states that stay in memory between blocks.

A decoder is a list of blocks, each of which takes the hidden states of the one before it. A block is called as the
model itself calls it: with the arguments that were captured in a forward of the whole model (positions, masks), which
do not depend on the text. So no family of models is spelled out here. Where the states of such a walk differ from those
of a forward, for the captured text or for another, the model is refused.

The linear layers of a block are met in stages: those that read one tensor, such as the projections of query, key and
value, share a stage. Their order is the one in which the block calls them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from fedzo.errors import ConfigError
from fedzo.models.blocks import Reached, find_blocks
from fedzo.models.sketched.layers import dense_layers

_TOLERANCE = 1e-4  # of the largest state, for a walk beside a forward: batches of other sizes move last bits
_ROWS_AT_ONCE = 4  # windows of a forward


@dataclass(frozen=True, slots=True)
class Call:
    """How a block is called, but for the hidden states.

    Attributes:
        args: Positional arguments after the hidden states.
        kwargs: Named arguments.
        by_name: Whether the hidden states are named, too.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_name: bool

    def __call__(self, block: nn.Module, states: torch.Tensor) -> torch.Tensor:
        """The block's states [rows, tokens, width]."""
        if self.by_name:
            out = block(*self.args, hidden_states=states, **self.kwargs)
        else:
            out = block(states, *self.args, **self.kwargs)
        return cast(torch.Tensor, out[0] if isinstance(out, tuple) else out)


@dataclass(slots=True)
class Walk:
    """The blocks of a model, and the states of the calibration text before the next of them.

    Attributes:
        name: Of the list of blocks in the model.
        blocks: In their order.
        states: One tensor [rows, tokens, width] a batch of windows; replaced as the walk goes on.
        calls: How each block is called, by the number of rows of a batch.
    """

    name: str
    blocks: list[nn.Module]
    states: list[torch.Tensor]
    calls: dict[int, list[Call]] = field(repr=False)

    def stages(self, block: int) -> list[list[str]]:
        """Names within the block of its dense linear layers, those that read the same tensor together.

        A layer that the calibration text does not reach (an expert) is in none.
        """
        layers = dense_layers(self.blocks[block])
        stages: list[list[str]] = []
        for batch in self.states:
            last = None
            for name, x in self._all_inputs(block, layers, batch):
                if any(name in stage for stage in stages):
                    continue
                if x is not last:
                    stages.append([])
                stages[-1].append(name)
                last = x
            if sum(map(len, stages)) == len(layers):
                break
        return stages

    def inputs(self, block: int, name: str) -> Iterator[torch.Tensor]:
        """What one layer of a block reads, [tokens, width] a batch; the rest of the block is not run."""
        layer = self.blocks[block].get_submodule(name)
        for batch in self.states:
            seen: list[torch.Tensor] = []

            def keep(_: nn.Module, args: tuple[Any, ...], seen: list[torch.Tensor] = seen) -> None:
                seen.append(args[0].reshape(-1, args[0].shape[-1]))
                raise Reached

            with layer.register_forward_pre_hook(keep):
                self._call(block, batch)
            yield from seen

    def advance(self, block: int) -> None:
        """Put the states after the block in the place of those before it."""
        for i, batch in enumerate(self.states):
            self.states[i] = self.calls[len(batch)][block](self.blocks[block], batch)

    def _all_inputs(
        self, block: int, layers: Mapping[str, nn.Module], batch: torch.Tensor
    ) -> list[tuple[str, torch.Tensor]]:
        """What each layer reads, in the order of the calls."""
        inputs: list[tuple[str, torch.Tensor]] = []
        with ExitStack() as hooks:
            for name, layer in layers.items():

                def note(_: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                    inputs.append((name, args[0]))

                hooks.enter_context(layer.register_forward_pre_hook(note))
            self._call(block, batch)
        return inputs

    def _call(self, block: int, batch: torch.Tensor) -> None:
        with suppress(Reached):
            self.calls[len(batch)][block](self.blocks[block], batch)


def start_walk(model: nn.Module, windows: Sequence[torch.Tensor]) -> Walk:
    """The states of all windows before the first block.

    Args:
        model: A causal language model in evaluation mode.
        windows: Token ids, int64 [tokens] each, all of one length.

    Raises:
        ConfigError: The model's blocks are not found, or cannot be run one after another.
    """
    name, blocks = find_linear_blocks(model)
    device = next(model.parameters()).device
    walk = Walk(name, blocks, [], {})
    for low in range(0, len(windows), _ROWS_AT_ONCE):
        ids = torch.stack(list(windows[low : low + _ROWS_AT_ONCE])).to(device)
        known = len(ids) in walk.calls
        states, calls, last = _capture(model, blocks, ids, first_only=known)
        walk.states.append(states)
        if not known:
            other, _, other_last = _capture(model, blocks, ids.flip(1), first_only=False)
            _check(model, blocks, calls, [states, other], [last, other_last])
            walk.calls[len(ids)] = calls
    return walk


def find_linear_blocks(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """A decoder's blocks, which hold linear layers, and the name of their list.

    Raises:
        ConfigError: There is none.
    """
    name, blocks = find_blocks(model)
    if not any(map(dense_layers, blocks)):
        raise ConfigError(
            f"sketch: a {type(model).__name__} must be a decoder whose blocks hold linear layers, but none is found. "
            "Take another model."
        )
    return name, blocks


def _capture(
    model: nn.Module, blocks: list[nn.Module], ids: torch.Tensor, *, first_only: bool
) -> tuple[torch.Tensor, list[Call], torch.Tensor]:
    """The states before the first block, how each block is called, and the states after the last.

    The forward ends where the LM head begins: logits of a whole batch can outweigh all the rest.
    """
    before: list[torch.Tensor] = []
    calls: list[Call] = []
    after: list[torch.Tensor] = []

    def called(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        by_name = "hidden_states" in kwargs
        states = kwargs["hidden_states"] if by_name else args[0]
        if not before:
            before.append(states)
        rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
        calls.append(Call(args if by_name else args[1:], rest, by_name))
        if first_only:
            raise Reached

    def done(_: nn.Module, args: Any, out: Any) -> None:
        after.append(out[0] if isinstance(out, tuple) else out)

    def end(*_: Any) -> None:
        raise Reached

    with ExitStack() as hooks:
        for block in blocks:
            hooks.enter_context(block.register_forward_pre_hook(called, with_kwargs=True))
        hooks.enter_context(blocks[-1].register_forward_hook(done))
        whole: Any = model
        if isinstance(model, PreTrainedModel) and isinstance(head := whole.get_output_embeddings(), nn.Module):
            hooks.enter_context(head.register_forward_pre_hook(end))
        with suppress(Reached):
            model(input_ids=ids)
    if first_only:
        return before[0], calls, before[0]
    if len(calls) != len(blocks):
        raise ConfigError(
            f"sketch: each block of a {type(model).__name__} must run once a forward, but {len(calls)} calls reached "
            f"{len(blocks)} blocks. Take another model."
        )
    return before[0], calls, after[0]


def _check(
    model: nn.Module,
    blocks: list[nn.Module],
    calls: list[Call],
    states: list[torch.Tensor],
    expected: list[torch.Tensor],
) -> None:
    """Refuse a model whose blocks, called one after another, do not give what its forward gives.

    Two texts go through block by block, as those of a walk do, with the calls of the first: the second shows what else
    of a text a block is handed, and what one block leaves for another.
    """
    if not all(bool(torch.isfinite(each).all()) for each in expected):
        raise ConfigError(
            "sketch: the states of the calibration text must be finite, got NaN or infinity. Check the model's "
            "weights, or load it in float32."
        )
    for block, call in zip(blocks, calls, strict=True):
        states = [call(block, each) for each in states]
    for ours, theirs in zip(states, expected, strict=True):
        error = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))
        if not error <= _TOLERANCE * (1 if theirs.dtype == torch.float32 else 100):
            raise ConfigError(
                f"sketch: the blocks of a {type(model).__name__}, run one after another, must give what its forward "
                f"gives, but differ by {error:.1e} of the largest state: its blocks exchange more than hidden states. "
                "Take another model."
            )
