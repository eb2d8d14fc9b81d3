"""Forwards of many texts in few batches; hidden states come back for the positions that predict something."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from fedzo.data.encode import Example
from fedzo.models.arithmetic import MEASURED, Arithmetic
from fedzo.models.compiled import CompiledDecoder
from fedzo.models.head import hidden_at, own_logits_at
from fedzo.models.kept_rows import Read
from fedzo.models.loaded import LoadedModel
from fedzo.models.lower_layers import LowerLayers, StepStates, find_lower_layers
from fedzo.models.plan import FEW_FORWARDS, bucket, plan_batches
from fedzo.models.shared_prompts import run_answers, run_prompts
from fedzo.models.virtual_tokens import num_virtual_tokens
from fedzo.system import OnProgress, consecutive, on_device
from fedzo.zo.spaces.base import Space

OnRows = Callable[[list[int]], None]


@dataclass(frozen=True, slots=True)
class Planning:
    """What batches may hold, and who is told of each."""

    tokens_per_batch: int
    """Most tokens in one forward, padding included (a longer sequence goes alone)."""
    forward_cost_tokens: int = FEW_FORWARDS
    """What one more forward costs, counted in tokens: batches of unequal lengths are split where that saves more
    padding. By default never; see ``forward_cost``."""
    on_batch: OnProgress | None = None
    share_prompts: bool = False
    """Whether candidates may go on from one run of their prompt: right for scores, whose last bits do not matter."""
    before: OnRows | None = None
    """Called before each forward with the indices of its texts, one a row."""
    lower: StepStates | None = None
    """Where states of the blocks below the trained ones are found again."""
    arithmetic: Arithmetic = MEASURED
    """What becomes of the log-probabilities."""

    def of(self, owners: Sequence[int]) -> Planning:
        """A copy whose ``before`` gets ``owners[i]`` for text i."""
        if (before := self.before) is None:
            return self
        return replace(self, before=lambda batch: before([owners[i] for i in batch]))


class SharedForward(NamedTuple):
    """Hidden states of one batch of examples whose candidates share their prompt.

    Attributes:
        batch: The examples' indices.
        ends: [B, H]: where each prompt ends; predicts the first token of all its candidates.
        cells: (row of the batch, candidate) of each candidate of two or more tokens.
        rest: [N, H]: what predicts the further tokens of those candidates, one after another.
    """

    batch: list[int]
    ends: torch.Tensor
    cells: list[tuple[int, int]]
    rest: torch.Tensor


def run_texts(
    loaded: LoadedModel, texts: Sequence[Read], planning: Planning
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Run all texts; yields each batch's indices and its positions' hidden states [N, H] (or logits [N, V])."""
    if planning.lower is not None and planning.lower.reads_alone:
        yield from _run_reads(loaded, texts, planning, planning.lower)
        return
    lengths = [len(text.tokens) for text in texts]
    decoder, virtual = loaded.decoder, num_virtual_tokens(loaded.model)
    widths = [decoder.width(length) for length in lengths] if decoder else lengths
    batches = plan_batches(
        [width + virtual for width in widths],
        tokens_per_batch=planning.tokens_per_batch,
        forward_cost_tokens=FEW_FORWARDS if decoder else planning.forward_cost_tokens,  # few batches, few shapes
        bucketed=decoder is not None,
    )
    num_done = 0
    for batch in batches:
        shape = (bucket(len(batch)) if decoder else len(batch), max(widths[i] for i in batch))
        ids = _padded([texts[i].tokens for i in batch], loaded, shape=shape)
        counts = [texts[i].num_positions for i in batch]
        rows = np.repeat(np.arange(len(batch)), counts)
        columns = np.concatenate(
            [np.arange(lengths[i] - count, lengths[i]) for i, count in zip(batch, counts, strict=True)]
        )
        placed = [on_device(array, loaded.device) for array in (ids, rows, columns)]
        at = partial(hidden_at, decoder=decoder) if loaded.direct_head else own_logits_at
        if planning.before is not None:
            planning.before(batch)
        forward = partial(at, loaded.model, *placed)
        with _forwards(loaded, planning):
            if planning.lower is None:
                hidden = forward()
            else:
                hidden = planning.lower.run(forward, placed[0], [texts[i].tokens for i in batch])
        _count(
            loaded, ids, used=sum(lengths[i] for i in batch), head_rows=len(rows) if loaded.direct_head else ids.size
        )
        yield batch, hidden
        num_done += len(batch)
        if planning.on_batch is not None:
            planning.on_batch(num_done, len(texts))


@contextmanager
def _forwards(loaded: LoadedModel, planning: Planning) -> Iterator[None]:
    """What forwards of texts run in. On a GPU transformers is told that no row is packed: its look would wait.

    A compiled decoder is left alone: it was checked as transformers lets it be traced.
    """
    look: AbstractContextManager[None] = nullcontext()
    if loaded.device.type == "cuda" and not isinstance(loaded.decoder, CompiledDecoder):
        from fedzo.models.attention import whole_texts  # slow to import

        look = whole_texts()
    with planning.arithmetic.forwards(), look:
        yield


def _run_reads(
    loaded: LoadedModel, texts: Sequence[Read], planning: Planning, lower: StepStates
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """As ``run_texts``, where what is computed behind the lower blocks takes each position alone."""
    counts = [text.num_positions for text in texts]
    num_done = 0

    def make(fresh: list[int]) -> Iterator[tuple[int, torch.Tensor]]:
        nonlocal num_done
        for batch in plan_batches(
            [len(texts[i].tokens) for i in fresh],
            tokens_per_batch=planning.tokens_per_batch,
            forward_cost_tokens=planning.forward_cost_tokens,
        ):
            chosen = [fresh[i] for i in batch]
            ids = _padded([texts[i].tokens for i in chosen], loaded)
            found = lower.lower.run(on_device(ids, loaded.device)).states
            _count(loaded, ids, used=sum(len(texts[i].tokens) for i in chosen), head_rows=0)
            for i, states in zip(chosen, found, strict=True):
                end = len(texts[i].tokens)
                yield i, states[end - counts[i] : end]
            num_done += len(chosen)
            if planning.on_batch is not None:
                planning.on_batch(num_done, len(texts))

    with _forwards(loaded, planning):
        output = lower.reads(texts, make)
    batches = consecutive(counts, most=planning.tokens_per_batch)
    parts = torch.split(output.states, [sum(counts[i] for i in batch) for batch in batches])
    at = hidden_at if loaded.direct_head else own_logits_at
    for batch, states in zip(batches, parts, strict=True):
        rows = torch.arange(len(states), device=loaded.device)
        if planning.before is not None:
            planning.before([i for i in batch for _ in range(counts[i])])
        with _forwards(loaded, planning), lower.lower.skipped(output._replace(states=states)):
            hidden = at(loaded.model, torch.zeros_like(rows)[:, None], rows, torch.zeros_like(rows))
        loaded.counter.num_head_rows += len(rows)
        yield list(batch), hidden
    if planning.on_batch is not None and num_done < len(texts):
        planning.on_batch(len(texts), len(texts))


def lower_layers_of(loaded: LoadedModel, space: Space, *, cache_mb: int = 0) -> LowerLayers | None:
    """The blocks that a space trains nothing in or below; None where there is none, or they cannot be left out.

    Args:
        loaded: The model. One with a decoder of its own, as a compiled one, runs whole.
        space: What is trained on it.
        cache_mb: MiB of states of single rows that are kept over all rounds.
    """
    if loaded.decoder is not None:
        return None

    def forward(ids: torch.Tensor) -> torch.Tensor:
        rows, columns = (part.reshape(-1) for part in torch.meshgrid(*map(torch.arange, ids.shape), indexing="ij"))
        at = hidden_at if loaded.direct_head else own_logits_at
        return at(loaded.model, ids, rows.to(ids.device), columns.to(ids.device))

    return find_lower_layers(
        loaded.model, space.parameters, forward, moved=lambda: space.probe(1e-3, 0), cache_mb=cache_mb
    )


def run_shared(
    loaded: LoadedModel, examples: Sequence[Example], batches: Sequence[list[int]], planning: Planning
) -> Iterator[SharedForward]:
    """Run prompts once and their candidates on top, in the batches of ``plan_shared``."""
    total = sum(len(examples[i].candidates) for batch in batches for i in batch)
    num_done = 0
    for batch in batches:
        prompts = [examples[i].prompt for i in batch]
        cells = [(row, j) for row, i in enumerate(batch) for j, c in enumerate(examples[i].candidates) if len(c) > 1]
        answers = [examples[batch[row]].candidates[j][:-1] for row, j in cells]
        ids = _padded(prompts, loaded, left=True)
        lengths = on_device(np.array([*map(len, prompts)], np.int64), loaded.device)
        with torch.inference_mode():
            ends, cache = run_prompts(loaded.model, on_device(ids, loaded.device), lengths)
            _count(loaded, ids, used=sum(map(len, prompts)), head_rows=len(prompts))
            rest = ends[:0]
            if cells:
                more = _padded(answers, loaded)
                counts = [len(answer) for answer in answers]
                owners = on_device(np.array([row for row, _ in cells], np.int64), loaded.device)
                hidden = run_answers(
                    loaded.model,
                    cache,
                    on_device(more, loaded.device),
                    owners=owners,
                    lengths=lengths,
                    width=ids.shape[1],
                )
                read = np.nonzero(np.arange(more.shape[1]) < np.array(counts)[:, None])
                rest = hidden[tuple(on_device(each, loaded.device) for each in read)]
                _count(loaded, more, used=sum(counts), head_rows=sum(counts))
            del cache  # before the next prompts run
        yield SharedForward(batch, ends, cells, rest)
        num_done += sum(len(examples[i].candidates) for i in batch)
        if planning.on_batch is not None:
            planning.on_batch(num_done, total)


def _padded(
    rows: Sequence[tuple[int, ...]], loaded: LoadedModel, *, shape: tuple[int, int] | None = None, left: bool = False
) -> npt.NDArray[np.int64]:
    """Rows of tokens in an array just large enough, or of ``shape``."""
    shape = shape or (len(rows), max(map(len, rows)))
    ids = np.full(shape, loaded.tokenizer.pad_token_id or 0, dtype=np.int64)
    width = shape[1]
    for row, tokens in zip(ids, rows, strict=False):  # rows beyond the last text are padding
        row[slice(width - len(tokens), None) if left else slice(len(tokens))] = tokens
    return ids


def _count(loaded: LoadedModel, ids: npt.NDArray[np.int64], *, used: int, head_rows: int) -> None:
    counter = loaded.counter
    counter.num_forwards += 1
    counter.num_tokens += ids.size
    counter.num_padding += ids.size - used
    counter.num_head_rows += head_rows
