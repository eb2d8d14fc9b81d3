"""The blocks below the first trained one: run once a batch, however often a step asks for its loss.

What they make of a batch does not depend on the trained values. So both sides of all probes of a step start from the
same states, and a step of P central differences costs one run of the lower blocks and 2P of the upper ones. In its
later forwards the lower blocks hand out what was kept, and all else of the model's own forward stays as it is.

States of a batch are kept within a step: the losses are those of whole forwards, bit for bit. States of single rows can
be kept over all rounds, too (``model.lower_layers_cache_mb``): which rows then run together depends on what is kept, so
losses may differ in their last bits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from fedzo.models.blocks import find_blocks, first_trained_block

log = logging.getLogger(__name__)
MOST_STEP_BYTES = 1 << 28
"""Of states that one step keeps; batches beyond run whole in each forward."""
Tokens = tuple[int, ...]


class _Reached(Exception):
    """Ends a forward where the lower blocks do."""


@dataclass(slots=True)
class RowStates:
    """States of single texts, kept for as long as the weights that made them are what they were; the first stay.

    Attributes:
        most_bytes: What they may take together.
        weights: Names the weights that made them, and their contents.
    """

    most_bytes: int
    num_bytes: int = 0
    by_tokens: dict[Tokens, torch.Tensor] = field(default_factory=dict)
    weights: Hashable = None

    def drop_if_other(self, weights: Hashable) -> None:
        """Keep nothing that other weights made."""
        if weights != self.weights:
            self.by_tokens.clear()
            self.num_bytes, self.weights = 0, weights

    def put(self, tokens: Tokens, states: torch.Tensor) -> None:
        """Keep a copy of the states [len(tokens), H], if there is room."""
        if self.num_bytes + states.nbytes <= self.most_bytes:
            self.by_tokens[tokens] = states.clone()
            self.num_bytes += states.nbytes


@dataclass(frozen=True, slots=True)
class LowerLayers:
    """The lower blocks of a model.

    Attributes:
        model: The model.
        blocks: Those below the first that is trained, at least one.
        upper: The others.
        rows: States of single texts, if they are kept.
    """

    model: nn.Module
    blocks: Sequence[nn.Module]
    upper: Sequence[nn.Module]
    rows: RowStates | None = None

    def of_step(self) -> StepStates:
        """What one step keeps, with nothing in it yet."""
        if self.rows is not None:
            self.rows.drop_if_other(self._weights())
        return StepStates(self)

    def whole_forwards(self, forwards: int) -> float:
        """What a step of so many forwards costs in forwards of the whole model, blocks counted, no row kept before."""
        share = len(self.blocks) / (len(self.blocks) + len(self.upper))
        return forwards - share * (forwards - 1)

    def states(self, ids: torch.Tensor, texts: Sequence[Tokens]) -> torch.Tensor:
        """What the last of the blocks gives, [B, T, H], for ids int64 [B, T]; their first rows are ``texts``."""
        if (rows := self.rows) is None:
            return self._run(ids)
        fresh = {tokens: row for row, tokens in enumerate(texts) if tokens not in rows.by_tokens}
        made: dict[Tokens, torch.Tensor] = {}
        if fresh:
            for tokens, states in zip(fresh, self._run(ids[[*fresh.values()]]), strict=True):
                made[tokens] = states[: len(tokens)]
                rows.put(tokens, made[tokens])
        found = [made[tokens] if tokens in made else rows.by_tokens[tokens] for tokens in texts]
        batch = found[0].new_zeros(*ids.shape, found[0].shape[-1])
        for place, states in zip(batch, found, strict=False):  # padding is seen by nobody
            place[: len(states)] = states
        return batch

    @contextmanager
    def skipped(self, states: torch.Tensor) -> Iterator[None]:
        """Within the context the lower blocks do not run: each gives ``states``."""
        with ExitStack() as undo:
            for block in self.blocks:
                own = vars(block)
                if (before := own.get("forward")) is None:
                    undo.callback(own.pop, "forward")
                else:
                    undo.callback(own.__setitem__, "forward", before)
                own["forward"] = lambda *args, **kwargs: states
            yield

    def _weights(self) -> Hashable:
        """Where all weights but the trained blocks' lie, and how often each was written to."""
        upper = {id(parameter) for block in self.upper for parameter in block.parameters()}
        return tuple(
            (parameter.data_ptr(), parameter.dtype, parameter._version)
            for parameter in self.model.parameters()
            if id(parameter) not in upper
        )

    def _run(self, ids: torch.Tensor) -> torch.Tensor:
        found: list[torch.Tensor] = []

        def end(block: nn.Module, args: object, output: object) -> None:
            if not isinstance(output, torch.Tensor):
                raise NotImplementedError(f"a {type(block).__name__} gives more than states")
            found.append(output)
            raise _Reached

        hook = self.blocks[-1].register_forward_hook(end)
        try:
            with suppress(_Reached):
                self.model(input_ids=ids)
        finally:
            hook.remove()
        if not found:
            raise NotImplementedError("they are not part of it")
        return found[0]


@dataclass(slots=True)
class StepStates:
    """The states of one step's batches."""

    lower: LowerLayers
    _num_bytes: int = 0
    _by_batch: dict[Hashable, torch.Tensor] = field(default_factory=dict)

    def run(self, forward: Callable[[], torch.Tensor], ids: torch.Tensor, texts: Sequence[Tokens]) -> torch.Tensor:
        """``forward()``, a forward of the model on ids int64 [B, T] whose first rows are ``texts``."""
        key = (tuple(ids.shape), *texts)
        states = self._by_batch.get(key)
        if states is None:
            states = self.lower.states(ids, texts)
            if self._num_bytes + states.nbytes <= MOST_STEP_BYTES:
                self._by_batch[key] = states
                self._num_bytes += states.nbytes
        with self.lower.skipped(states):
            return forward()


def find_lower_layers(
    model: nn.Module, trained: Iterable[nn.Parameter], forward: Callable[[torch.Tensor], torch.Tensor], *, cache_mb: int
) -> LowerLayers | None:
    """The blocks of a model below the first that is trained; None where there is none, or they cannot be left out.

    A model is asked once whether leaving them out changes a bit.

    Args:
        model: A causal language model.
        trained: Its parameters with trained values.
        forward: What is computed with it, from ids int64 [B, T].
        cache_mb: MiB of states of single rows that are kept over all rounds.
    """
    first = first_trained_block(model, trained)
    if first == 0:
        return None
    _, blocks = find_blocks(model)
    lower = LowerLayers(model, blocks[:first], blocks[first:])
    problem = _problem(lower, forward)
    if problem:
        log.warning(
            "%s: the blocks below number %d, the first trained one, run in every forward: %s",
            type(model).__name__,
            first,
            problem,
        )
        return None
    return replace(lower, rows=RowStates(cache_mb << 20) if cache_mb else None)


@torch.inference_mode()
def _problem(lower: LowerLayers, forward: Callable[[torch.Tensor], torch.Tensor]) -> str:
    """Why the lower blocks cannot be left out; empty where they can."""
    size: Any = lower.model.get_input_embeddings()  # type: ignore[operator]
    device = next(lower.model.parameters()).device
    numbers = (torch.arange(32, device=device) * 7 % size.num_embeddings).view(2, 2, 8)
    step = lower.of_step()
    try:
        for ids in (*numbers, *numbers):  # two batches in turn: what one left behind must not enter the other
            texts: list[Tokens] = [tuple(row) for row in ids.tolist()]
            if not torch.equal(step.run(partial(forward, ids), ids, texts), forward(ids)):
                return "without them its states are not the same"
    except (NotImplementedError, RuntimeError, TypeError, AttributeError) as error:
        return str(error)
    return ""
