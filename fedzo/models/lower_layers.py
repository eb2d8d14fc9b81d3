"""The blocks below the first trained one: run once a batch, however often a step asks for its loss.

What they make of a batch does not depend on the trained values. So both sides of all probes of a step start from the
same states, and a step of P central differences costs one run of the lower blocks and 2P of the upper ones. In its
later forwards the lower blocks hand out what was kept, and all else of the model's own forward stays as it is.

States of a batch are kept within a step: the losses are those of whole forwards, bit for bit. States of single rows can
be kept over all rounds, too (``fedzo.models.kept_rows``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from fedzo.models.blocks import Reached, called_modules, find_blocks, first_trained_block
from fedzo.models.checks import mismatch, some_ids
from fedzo.models.kept_rows import Make, Output, Read, RowStates, Tokens
from fedzo.system import is_out_of_memory

log = logging.getLogger(__name__)
Forward = Callable[[torch.Tensor], torch.Tensor]
"""What is computed with a model, from ids int64 [B, T]: for each position its numbers."""
Moved = Callable[[], AbstractContextManager[None]]
MAX_STEP_BYTES = 1 << 28
"""Of states that one step keeps; batches beyond run whole in each forward."""


@dataclass(frozen=True, slots=True)
class LowerLayers:
    """The lower blocks of a model.

    Attributes:
        model: The model.
        blocks: Those below the first that is trained, at least one.
        upper: The others.
        trained: The parameters with trained values, which lie in the others or behind them.
        rows: States of single texts, if they are kept.
        evaluate: How the lower blocks run for ids int64 [B, T]; ``run`` by default.
        given: What they hand out at present, without running: one ``Output``, or none.
    """

    model: nn.Module
    blocks: Sequence[nn.Module]
    upper: Sequence[nn.Module]
    trained: Sequence[nn.Parameter] = ()
    rows: RowStates | None = None
    evaluate: Callable[[torch.Tensor], Output] | None = None
    given: list[Output] = field(default_factory=list)

    def of_step(self, *, repeats: bool = True) -> StepStates:
        """What one step keeps, with nothing in it yet; no batches, if none comes again."""
        if self.rows is not None:
            self.rows.drop_if_other(self.weights())
        return StepStates(self, repeats)

    def whole_forwards(self, forwards: float, *, kept: float = 0.0) -> float:
        """What a step of so many forwards costs in forwards of the whole model, blocks counted.

        Args:
            forwards: Of a step.
            kept: Share of its rows whose states are there already.
        """
        share = len(self.blocks) / (len(self.blocks) + len(self.upper))
        return forwards - share * (forwards - 1 + kept)

    def kept_share(self, visits: float, num_rows: int, *, row_bytes: float) -> float:
        """Share of row visits saved by kept states, net of the one run that each kept row costs.

        Negative where most rows are never visited again: all rows that fit run once, visited or not.

        Args:
            visits: How often rows are needed, all together.
            num_rows: How many rows there are.
            row_bytes: Of one row's states.
        """
        if self.rows is None or not (num_rows and visits):  # a simulation may not know the rows of its clients
            return 0.0
        fit = min(1.0, self.rows.max_bytes / (row_bytes * num_rows))
        return fit * (1 - num_rows / visits)

    @property
    def reads_alone(self) -> bool:
        """Whether of a text only the positions that are read are kept (``RowStates.reads_alone``)."""
        return self.rows is not None and self.rows.reads_alone

    def kept_bytes(self, num_tokens: int, *, token_bytes: int) -> int:
        """Most bytes that a step on so many tokens keeps, and all steps and all scores together."""
        return min(MAX_STEP_BYTES, num_tokens * token_bytes) + (2 * self.rows.max_bytes if self.rows else 0)

    def states(self, ids: torch.Tensor, texts: Sequence[Tokens]) -> Output:
        """What the last of the blocks gives for ids int64 [B, T]; their first rows are ``texts``."""
        if (rows := self.rows) is None:
            return (self.evaluate or self.run)(ids)

        def make(fresh: list[int]) -> Iterator[tuple[int, torch.Tensor]]:
            for row, states in zip(fresh, self.run(ids[fresh]).states, strict=True):
                yield row, states[: len(texts[row])]

        found = rows.of(texts, make)
        batch = found[0].new_zeros(*ids.shape, *found[0].shape[1:])
        for place, states in zip(batch, found, strict=False):  # padding is seen by nobody
            place[: len(states)] = states
        return Output(batch, rows.num_nones)

    @contextmanager
    def skipped(self, output: Output) -> Iterator[None]:
        """Within the context the lower blocks do not run: each gives ``output``."""
        given = output.given()
        with ExitStack() as undo:
            for block in self.blocks:
                own = vars(block)
                if (before := own.get("forward")) is None:
                    undo.callback(own.pop, "forward")
                else:
                    undo.callback(own.__setitem__, "forward", before)
                own["forward"] = lambda *args, **kwargs: given
            self.given.append(output)
            undo.callback(self.given.pop)
            yield

    def weights(self) -> Hashable:
        """Where all tensors lie but the trained ones and their blocks', and torch's count of the writes to each.

        Torch counts its own. Whoever writes past it adds to the count (``torch.autograd.graph.increment_version``), as
        spaces do.
        """
        upper = {id(parameter) for block in self.upper for parameter in block.parameters()}
        upper.update(map(id, self.trained))
        tensors = (*self.model.parameters(), *self.model.buffers())
        return tuple((each.data_ptr(), each.dtype, each._version) for each in tensors if id(each) not in upper)

    def run(self, ids: torch.Tensor) -> Output:
        """What the last of the blocks gives, by running them."""
        found: list[Output] = []

        def end(block: nn.Module, args: object, given: Any) -> None:
            states, *rest = given if isinstance(given, tuple) else (given,)
            if not isinstance(states, torch.Tensor) or any(each is not None for each in rest):
                raise NotImplementedError(f"a {type(block).__name__} gives more than states")
            found.append(Output(states, len(rest) if isinstance(given, tuple) else None))
            raise Reached

        with self.blocks[-1].register_forward_hook(end), suppress(Reached):
            self.model(input_ids=ids)
        if not found:
            raise NotImplementedError("they are not part of it")
        return found[0]


@dataclass(slots=True)
class StepStates:
    """The states of one step's batches."""

    lower: LowerLayers
    repeats: bool = True
    _num_bytes: int = 0
    _by_batch: dict[Hashable, Output] = field(default_factory=dict)

    @property
    def reads_alone(self) -> bool:
        """Whether a text needs the positions that are read and no others (``reads``)."""
        return self.lower.reads_alone

    def run(self, forward: Callable[[], torch.Tensor], ids: torch.Tensor, texts: Sequence[Tokens]) -> torch.Tensor:
        """``forward()``, a forward of the model on ids int64 [B, T] whose first rows are ``texts``."""
        output = self._once((tuple(ids.shape), *texts), lambda: self.lower.states(ids, texts))
        with self.lower.skipped(output):
            return forward()

    def reads(self, texts: Sequence[Read], make: Make) -> Output:
        """What the last of the blocks gives at the positions that are read, each a row of its own: [N, 1, H]."""
        rows = self.lower.rows
        assert rows is not None
        return self._once((*texts,), lambda: Output(torch.cat(rows.of(texts, make))[:, None], rows.num_nones))

    def _once(self, key: Hashable, make: Callable[[], Output]) -> Output:
        output = self._by_batch.get(key)
        if output is None:
            output = make()
            if self.repeats and self._num_bytes + output.states.nbytes <= MAX_STEP_BYTES:
                self._by_batch[key] = output
                self._num_bytes += output.states.nbytes
        return output


def find_lower_layers(
    model: nn.Module,
    trained: Iterable[nn.Parameter],
    forward: Forward,
    *,
    moved: Moved = nullcontext,
    cache_mb: int = 0,
) -> LowerLayers | None:
    """The blocks of a model below the first that is trained; None where there is none, or they cannot be left out.

    A model is asked once whether leaving them out changes a bit, at the trained values and elsewhere.

    Args:
        model: A causal language model.
        trained: Its parameters with trained values.
        forward: What is computed with it, from ids int64 [B, T].
        moved: Within its context the model computes with other trained values.
        cache_mb: MiB of states of single rows that are kept over all rounds.
    """
    trained = tuple(trained)
    first = first_trained_block(model, trained)
    if first == 0:
        return None
    _, blocks = find_blocks(model)
    lower = LowerLayers(model, blocks[:first], blocks[first:], trained)
    if (problem := _problem(lower, forward, moved)) is not None:
        log.warning(
            "%s: the blocks below number %d, the first trained one, run in every forward: %s",
            type(model).__name__,
            first,
            problem,
        )
        return None
    passed = {id(each) for module in called_modules(model, lower.run) for each in module.parameters(recurse=False)}
    if any(id(parameter) in passed for parameter in trained):  # a step of few bits may not have shown it
        return None
    if not cache_mb:
        return lower
    if (problem := _problem_of_rows(lower)) is not None:
        log.warning("%s: model.lower_layers_cache_mb has no effect: %s", type(model).__name__, problem)
        return lower
    num_nones = lower.run(some_ids(model, 2, 16)).num_nones
    return replace(lower, rows=RowStates(cache_mb << 20, num_nones, reads_alone=_reads_alone(lower, forward, moved)))


@torch.inference_mode()
def _problem(
    lower: LowerLayers,
    forward: Forward,
    moved: Moved,
) -> str | None:
    """Why the lower blocks cannot be left out, if they cannot."""
    numbers = some_ids(lower.model, 2, 16).view(2, 2, 8)
    step = lower.of_step()
    try:
        for at in (nullcontext, moved, moved):
            with at():
                for ids in numbers:  # two batches in turn: what one left behind must not enter the other
                    texts: list[Tokens] = [tuple(row) for row in ids.tolist()]
                    if not torch.equal(step.run(partial(forward, ids), ids, texts), forward(ids)):
                        return "without them its states are not the same"
    except Exception as error:  # a model may do anything where blocks that it counts on do not run
        if is_out_of_memory(error):
            raise
        return f"{type(error).__name__}: {error}"
    return None


@torch.inference_mode()
def _problem_of_rows(lower: LowerLayers) -> str | None:
    """Why states of single rows cannot be kept from one batch for another, if they cannot."""
    for module in lower.model.modules():
        kinds = getattr(module, "rope_type", None)  # of each kind of layer, in some models
        if {"dynamic", "longrope"} & set(kinds.values() if isinstance(kinds, dict) else [kinds]):
            return "its positions depend on the longest row of a batch"
        if type(module).__name__ == "Linear8bitLt":
            return "its 8-bit layers compute a row by what else is in the batch"
    try:
        before = lower.weights()
    except RuntimeError as error:
        return str(error)
    ids = some_ids(lower.model, 2, 16)
    states, alone = lower.run(ids).states, lower.run(ids[1:, :9]).states
    if lower.weights() != before:
        return "its forward writes to its buffers"
    if states.shape[:2] != ids.shape:
        return f"its states have the shape {tuple(states.shape)} for {tuple(ids.shape)} tokens"
    if mismatch(alone[0], states[1, :9]):
        return "a row's states are others in another batch"
    return None


@torch.inference_mode()
def _reads_alone(lower: LowerLayers, forward: Forward, moved: Moved) -> bool:
    """Whether each position is computed alone behind the lower blocks, to the last bit: there are no other blocks."""
    if lower.upper:
        return False
    ids = some_ids(lower.model, 2, 16)
    output = lower.run(ids)
    alone = output._replace(states=output.states.reshape(-1, 1, output.states.shape[-1]))
    for at in (nullcontext, moved):
        with at():
            whole = forward(ids)
            try:
                with lower.skipped(alone):
                    found = forward(ids.view(-1, 1))
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                return False
            if not torch.equal(found.reshape(whole.shape), whole):
                return False
    return True
