"""The loss on answer tokens and the scores of candidates, with no wasted head rows.

An example's prompt and answer are one sequence; the last answer token is never an input, and only the positions that
predict an answer token pay for the LM head. Where all candidates of an example are single tokens, one forward of the
prompt serves them all, and only the candidates' rows of the head are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from fedzo.data.config import Loss
from fedzo.data.example import Example
from fedzo.errors import ConfigError
from fedzo.models.head import hidden_at, own_logits_at, project
from fedzo.models.load import LoadedModel
from fedzo.models.virtual_tokens import num_virtual_tokens

Scores = npt.NDArray[np.float64]
OnBatch = Callable[[int, int], None]

FEW_FORWARDS = 1 << 30
"""``forward_cost_tokens`` for which batches are never split to save padding."""
_CHUNK_LOGITS = 1 << 26  # logits made at once: 256 MiB in float32


@dataclass(frozen=True, slots=True)
class _Sequence:
    """Input tokens whose last ``len(targets)`` positions predict ``targets`` (without any: the last alone)."""

    tokens: tuple[int, ...]
    targets: tuple[int, ...]

    @property
    def num_positions(self) -> int:
        return max(1, len(self.targets))


def mean_loss(
    loaded: LoadedModel,
    examples: Sequence[Example],
    *,
    loss: Loss,
    tokens_per_batch: int,
    forward_cost_tokens: int = FEW_FORWARDS,
) -> float:
    """Mean of ``example_losses``, in float64; NaN or infinity if the model's numbers are."""
    losses = example_losses(
        loaded, examples, loss=loss, tokens_per_batch=tokens_per_batch, forward_cost_tokens=forward_cost_tokens
    )
    return float(np.mean(losses))


def example_losses(
    loaded: LoadedModel,
    examples: Sequence[Example],
    *,
    loss: Loss,
    tokens_per_batch: int,
    forward_cost_tokens: int = FEW_FORWARDS,
) -> Scores:
    """Loss of every example; token log-probabilities in float32, all means in float64.

    Args:
        loaded: The model.
        examples: At least one.
        loss: ``candidates``: cross-entropy over the candidates' mean log-probabilities; ``lm``: mean cross-entropy of
            the right answer's tokens.
        tokens_per_batch: Most tokens in one forward, padding included (a longer sequence goes alone).
        forward_cost_tokens: What one more forward costs, counted in tokens: batches of unequal lengths are split where
            that saves more padding. By default never; see ``forward_cost``.

    Returns:
        float64 [num_examples].

    Raises:
        ConfigError: There is no example, or one has an empty prompt or answer.
    """
    if not examples:
        raise ConfigError("a loss needs at least one example, got none. Check the batch size and the client's rows.")
    planning = _Planning(tokens_per_batch, forward_cost_tokens)
    if loss is Loss.lm:
        return -_mean_logprobs(loaded, [_answer(example, example.label) for example in examples], planning)
    scores = _candidate_scores(loaded, examples, planning, full_vocabulary=False)
    return choice_losses(scores, [example.label for example in examples])


def candidate_scores(
    loaded: LoadedModel,
    examples: Sequence[Example],
    *,
    tokens_per_batch: int,
    full_vocabulary: bool = False,
    forward_cost_tokens: int = FEW_FORWARDS,
    on_batch: OnBatch | None = None,
) -> npt.NDArray[np.float32]:
    """Mean log-probability per answer token of every candidate.

    Where all candidates of an example are single tokens, they are normalised over the candidates only (softmax and
    differences are the same; the head's other rows need not be read), unless ``full_vocabulary`` is set.

    Args:
        loaded: The model.
        examples: The examples.
        tokens_per_batch: As in ``mean_loss``.
        full_vocabulary: Normalise single tokens over the whole vocabulary, too.
        forward_cost_tokens: As in ``mean_loss``.
        on_batch: Called after each forward with sequences done and in total.

    Returns:
        float32 [num_examples, most candidates], ``-inf`` where an example has fewer.
    """
    planning = _Planning(tokens_per_batch, forward_cost_tokens, on_batch)
    return _candidate_scores(loaded, examples, planning, full_vocabulary=full_vocabulary).astype(np.float32)


def choice_losses(scores: npt.NDArray[np.floating], labels: Sequence[int]) -> Scores:
    """Cross-entropy of the right candidate, float64 [num_examples], from scores [num_examples, candidates]."""
    return -_log_softmax(scores.astype(np.float64))[np.arange(len(labels)), labels]


def forward_cost(device: torch.device) -> int:
    """What one more forward costs on a device, in tokens, when no weight is perturbed for it (a rough figure)."""
    return 32 if device.type == "cpu" else 2048


def plan_batches(lengths: Sequence[int], *, tokens_per_batch: int, forward_cost_tokens: int) -> list[list[int]]:
    """Cut sequences, longest first, into batches: least padded tokens plus ``forward_cost_tokens`` a batch.

    Args:
        lengths: Tokens of each sequence.
        tokens_per_batch: Most padded tokens of a batch of two or more.
        forward_cost_tokens: Cost of a batch beside its tokens.

    Returns:
        Indices of each batch; a pure function of the arguments.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    cost, start = [0], [0]  # of the best cut of the first i sequences, and where its last batch starts
    for end in range(1, len(order) + 1):
        best, best_start = None, end - 1
        for begin in range(end - 1, -1, -1):
            padded = lengths[order[begin]] * (end - begin)
            if padded > tokens_per_batch and begin < end - 1:
                break
            total = cost[begin] + padded + forward_cost_tokens
            if best is None or total < best:
                best, best_start = total, begin
        cost.append(best or 0)
        start.append(best_start)
    batches: list[list[int]] = []
    end = len(order)
    while end:
        batches.append(order[start[end] : end])
        end = start[end]
    return batches[::-1]


@dataclass(frozen=True, slots=True)
class _Planning:
    tokens_per_batch: int
    forward_cost_tokens: int
    on_batch: OnBatch | None = None


def _candidate_scores(
    loaded: LoadedModel, examples: Sequence[Example], planning: _Planning, *, full_vocabulary: bool
) -> Scores:
    scores = np.full((len(examples), max((len(e.candidates) for e in examples), default=0)), -np.inf)
    short = [i for i, e in enumerate(examples) if all(len(candidate) == 1 for candidate in e.candidates)]
    if short:
        chosen = [examples[i] for i in short]
        scores[short] = _single_token_scores(
            loaded, chosen, planning, width=scores.shape[1], full_vocabulary=full_vocabulary
        )
    taken = set(short)
    cells = [(i, j) for i, e in enumerate(examples) if i not in taken for j in range(len(e.candidates))]
    if cells:
        means = _mean_logprobs(loaded, [_answer(examples[i], j) for i, j in cells], planning)
        for (i, j), mean in zip(cells, means, strict=True):
            scores[i, j] = mean
    return scores


def _single_token_scores(
    loaded: LoadedModel, examples: Sequence[Example], planning: _Planning, *, width: int, full_vocabulary: bool
) -> Scores:
    """Log-probabilities [num_examples, width] of single-token candidates from one forward of the prompts."""
    sequences = [_Sequence(_prompt(example), ()) for example in examples]
    tokens = np.empty((len(examples), width), dtype=np.int64)
    there = np.zeros((len(examples), width), dtype=bool)
    for row, example in enumerate(examples):
        there[row, : len(example.candidates)] = True
        tokens[row] = example.candidates[0][0]  # a filler that reads no further row of the head
        tokens[row, : len(example.candidates)] = [candidate[0] for candidate in example.candidates]
    order: list[int] = []
    picked: list[torch.Tensor] = []
    for batch, hidden in _forwards(loaded, sequences, planning):
        vocabulary, column = np.unique(tokens[batch], return_inverse=True)
        columns = torch.from_numpy(column.reshape(len(batch), width)).to(loaded.device)
        if full_vocabulary:
            parts = [_logits(loaded, part).log_softmax(-1) for part in _chunks(loaded, hidden)]
            columns = torch.from_numpy(tokens[batch]).to(loaded.device)
            logits = torch.cat(parts)
        else:
            logits = _logits(loaded, hidden, torch.from_numpy(vocabulary).to(loaded.device))
        picked.append(logits.gather(1, columns))
        order.extend(batch)
    scores = np.full(tokens.shape, -np.inf)
    scores[order] = torch.cat(picked).cpu().numpy()
    scores = np.where(there, scores, -np.inf)
    return scores if full_vocabulary else _log_softmax(scores)


def _mean_logprobs(loaded: LoadedModel, sequences: Sequence[_Sequence], planning: _Planning) -> Scores:
    """Mean log-probability of each sequence's targets over the whole vocabulary, float64 [num_sequences]."""
    order: list[int] = []
    parts: list[torch.Tensor] = []
    for batch, hidden in _forwards(loaded, sequences, planning):
        targets = torch.tensor([token for i in batch for token in sequences[i].targets], device=loaded.device)
        done = 0
        for part in _chunks(loaded, hidden):
            wanted = targets[done : done + len(part)]
            parts.append(-F.cross_entropy(_logits(loaded, part), wanted, reduction="none"))
            done += len(part)
        order.extend(batch)
    logprobs = torch.cat(parts).cpu().numpy().astype(np.float64)
    counts = np.array([len(sequences[i].targets) for i in order])
    means = np.empty(len(sequences))
    means[order] = np.add.reduceat(logprobs, np.cumsum(counts) - counts) / counts
    return means


def _forwards(
    loaded: LoadedModel, sequences: Sequence[_Sequence], planning: _Planning
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Run all sequences; yields each batch's indices and its positions' hidden states [N, H] (or logits [N, V])."""
    lengths = [len(sequence.tokens) for sequence in sequences]
    virtual = num_virtual_tokens(loaded.model)
    batches = plan_batches(
        [length + virtual for length in lengths],
        tokens_per_batch=planning.tokens_per_batch,
        forward_cost_tokens=planning.forward_cost_tokens,
    )
    pad = loaded.tokenizer.pad_token_id or 0
    counter, num_done = loaded.counter, 0
    for batch in batches:
        ids = np.full((len(batch), lengths[batch[0]]), pad, dtype=np.int64)
        for row, i in enumerate(batch):
            ids[row, : lengths[i]] = sequences[i].tokens
        counts = [sequences[i].num_positions for i in batch]
        rows = np.repeat(np.arange(len(batch)), counts)
        columns = np.concatenate(
            [np.arange(lengths[i] - count, lengths[i]) for i, count in zip(batch, counts, strict=True)]
        )
        on_device = [torch.from_numpy(array).to(loaded.device) for array in (ids, rows, columns)]
        at = hidden_at if loaded.direct_head else own_logits_at
        with torch.inference_mode():
            hidden = at(loaded.model, *on_device)
        counter.num_forwards += 1
        counter.num_tokens += ids.size
        counter.num_padding += ids.size - sum(lengths[i] for i in batch)
        counter.num_head_rows += len(rows) if loaded.direct_head else ids.size
        yield batch, hidden
        num_done += len(batch)
        if planning.on_batch is not None:
            planning.on_batch(num_done, len(sequences))


def _logits(loaded: LoadedModel, hidden: torch.Tensor, vocabulary: torch.Tensor | None = None) -> torch.Tensor:
    with torch.inference_mode():
        if loaded.direct_head:
            return project(loaded.model, hidden, vocabulary=vocabulary)
        return hidden if vocabulary is None else hidden[:, vocabulary]


def _chunks(loaded: LoadedModel, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rows such that a chunk's logits stay within ``_CHUNK_LOGITS``."""
    return torch.split(hidden, max(1, _CHUNK_LOGITS // max(1, len(loaded.tokenizer))))


def _answer(example: Example, candidate: int) -> _Sequence:
    targets = example.candidates[candidate]
    if not targets:
        raise ConfigError(
            f"every candidate must have at least one token, got an empty one ({candidate}). Check task.candidates."
        )
    return _Sequence(_prompt(example) + targets[:-1], targets)


def _prompt(example: Example) -> tuple[int, ...]:
    if not example.prompt:
        raise ConfigError("every prompt must have at least one token, got an empty one. Check the task's template.")
    return example.prompt


def _log_softmax(scores: Scores) -> Scores:
    with np.errstate(invalid="ignore"):  # infinities give NaN, as they should
        shifted = scores - scores.max(axis=1, keepdims=True)
        return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))
