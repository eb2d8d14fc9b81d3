"""The loss on answer tokens and the scores of candidates, with no wasted head rows.

An example's prompt and answer are one sequence; the last answer token is never an input, and only the positions that
predict an answer token pay for the LM head. Where all candidates of an example are single tokens, one forward of the
prompt serves them all, and only the candidates' rows of the head are read. Longer candidates run on top of the keys and
values of their prompt, if that saves tokens (``fedzo.models.plan``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from fedzo.data.config import Loss
from fedzo.data.encode import Example
from fedzo.errors import ConfigError
from fedzo.models.arithmetic import MEASURED, Scores
from fedzo.models.forwards import Planning, run_shared, run_texts
from fedzo.models.head import project
from fedzo.models.kept_rows import Read, Tokens
from fedzo.models.loaded import LoadedModel
from fedzo.models.memory import cache_tokens
from fedzo.models.plan import FEW_FORWARDS, Shared, plan_shared
from fedzo.models.virtual_tokens import num_virtual_tokens
from fedzo.system import OnProgress, on_device

_CHUNK_LOGITS = 1 << 26  # logits made at once: 256 MiB in float32


def mean_loss(
    loaded: LoadedModel,
    examples: Sequence[Example],
    *,
    loss: Loss,
    tokens_per_batch: int,
    forward_cost_tokens: int = FEW_FORWARDS,
) -> float:
    """Mean of ``example_losses``, in float64, in batches as ``Planning`` says; NaN or infinity if the numbers are."""
    return float(example_losses(loaded, examples, Planning(tokens_per_batch, forward_cost_tokens), loss=loss).mean())


def example_losses(
    loaded: LoadedModel,
    examples: Sequence[Example],
    planning: Planning,
    *,
    loss: Loss,
    common_shift: float = 1.0,
    owners: Sequence[int] | None = None,
) -> Any:
    """Loss of every example; token log-probabilities in float32, all means in float64.

    Every candidate is a sequence of its own, unless ``planning.share_prompts``: losses become the scalars of the log,
    and attention to a prompt that is kept apart gives last bits that differ from process to process.

    Args:
        loaded: The model.
        examples: At least one.
        planning: The batches. Its ``before`` gets the example of each row, by index.
        loss: ``candidates``: cross-entropy over the candidates' mean log-probabilities; ``lm``: mean cross-entropy of
            the right answer's tokens.
        common_shift: Factor on what the scores of a batch have in common (``damp_common_shift``).
        owners: Whose batch each example is of; by default all are of one.

    Returns:
        Float64 [num_examples] in the planning's arithmetic.

    Raises:
        ConfigError: There is no example, one has an empty prompt or answer, or the loss is ``score``.
    """
    if not examples:
        raise ConfigError("a loss needs at least one example, got none. Check the batch size and the client's rows.")
    if loss is Loss.score:
        raise ConfigError("the loss of rows must be candidates or lm, got score, which a batch has. Pass Loss.lm.")
    labels = [example.label for example in examples]
    if loss is Loss.lm:
        answers = [_answer(example, label) for example, label in zip(examples, labels, strict=True)]
        return -_mean_logprobs(loaded, answers, planning)
    scores = _candidate_scores(loaded, examples, planning, full_vocabulary=False)
    if common_shift != 1:
        if len({len(example.candidates) for example in examples}) > 1:
            raise ConfigError("task.common_shift must be 1 where rows have different numbers of answers. Leave it out.")
        owners = [0] * len(examples) if owners is None else owners
        scores = damp_common_shift(scores, owners, factor=common_shift)
    return -planning.arithmetic.log_softmax(scores)[range(len(labels)), labels]


def damp_common_shift(scores: Any, owners: Sequence[int], *, factor: float) -> Any:
    """Subtract, from the scores of each batch, the mean over its rows, but for ``factor`` of it.

    Batch Calibration (arXiv 2309.17249) divides by the mean of the answers' probabilities over a batch, to answer.
    Deviations: here the mean is of scores, thus of log-probabilities; a part of it stays (a learned one in the paper's
    BCL), so that the balance between the answers is trained too; and it is for the loss that is trained on. Where the
    loss is steepest along the direction that shifts all rows alike, that direction bounds the learning rate, and its
    share of a scalar's variance is the largest. Its curvature falls, less than with the square of ``factor``: rows
    still differ along it, and less certain answers curve the loss more, in other directions too.

    Args:
        scores: Float64 [N, C], of numpy or torch; changed in place.
        owners: Whose batch a row is of [N].
        factor: Over 0, at most 1.
    """
    rows_of: dict[int, list[int]] = {}
    for row, owner in enumerate(owners):
        rows_of.setdefault(owner, []).append(row)
    for rows in rows_of.values():
        with np.errstate(invalid="ignore"):  # infinities give NaN, as they do in a softmax
            scores[rows] = scores[rows] - (1 - factor) * scores[rows].mean(0)
    return scores


def candidate_scores(
    loaded: LoadedModel,
    examples: Sequence[Example],
    *,
    tokens_per_batch: int,
    full_vocabulary: bool = False,
    forward_cost_tokens: int = FEW_FORWARDS,
    on_batch: OnProgress | None = None,
) -> npt.NDArray[np.float32]:
    """Mean log-probability per answer token of every candidate.

    Where all candidates of an example are single tokens, they are normalised over the candidates only (softmax and
    differences are the same; the head's other rows need not be read), unless ``full_vocabulary`` is set.

    Args:
        loaded: The model.
        examples: The examples.
        tokens_per_batch: As in ``Planning``.
        full_vocabulary: Normalise single tokens over the whole vocabulary, too.
        forward_cost_tokens: As in ``Planning``.
        on_batch: Called after each forward with sequences done and in total.

    Returns:
        float32 [num_examples, most candidates], ``-inf`` where an example has fewer.
    """
    lower = loaded.kept.of_step(repeats=False) if loaded.kept else None
    shares = lower is None or not lower.reads_alone  # texts that run whole are kept, and cost no more later
    planning = Planning(tokens_per_batch, forward_cost_tokens, on_batch, share_prompts=shares, lower=lower)
    scores: Scores = _candidate_scores(loaded, examples, planning, full_vocabulary=full_vocabulary)
    return scores.astype(np.float32)


def choice_losses(scores: npt.NDArray[np.floating], labels: Sequence[int]) -> Scores:
    """Cross-entropy of the right candidate, float64 [num_examples], from scores [num_examples, candidates]."""
    losses: Scores = -MEASURED.log_softmax(scores.astype(np.float64))[range(len(labels)), labels]
    return losses


def _candidate_scores(
    loaded: LoadedModel, examples: Sequence[Example], planning: Planning, *, full_vocabulary: bool
) -> Any:
    width = max((len(example.candidates) for example in examples), default=0)
    scores = planning.arithmetic.empty_scores(len(examples), width)
    short = [i for i, example in enumerate(examples) if example.one_token]
    if short:
        chosen = [examples[i] for i in short]
        scores[short] = _single_token_scores(
            loaded, chosen, planning.of(short), width=width, full_vocabulary=full_vocabulary
        )
    taken = set(short)
    long = [i for i in range(len(examples)) if i not in taken]
    shared = _plan_shared(loaded, [examples[i] for i in long], planning)
    if shared.batches:
        scores[long] = _shared_scores(loaded, [examples[i] for i in long], shared, planning, width=width)
    cells = [(long[i], j) for i in shared.others for j in range(len(examples[long[i]].candidates))]
    if cells:
        means = _mean_logprobs(loaded, [_answer(examples[i], j) for i, j in cells], planning.of([i for i, _ in cells]))
        for (i, j), mean in zip(cells, means, strict=True):
            scores[i, j] = mean
    return scores


def _single_token_scores(
    loaded: LoadedModel, examples: Sequence[Example], planning: Planning, *, width: int, full_vocabulary: bool
) -> Any:
    """Log-probabilities [num_examples, width] of single-token candidates from one forward of the prompts."""
    prompts = [Read(_prompt(example), 1) for example in examples]
    tokens = np.empty((len(examples), width), dtype=np.int64)
    there = np.zeros((len(examples), width), dtype=bool)
    for row, example in enumerate(examples):
        there[row, : len(example.candidates)] = True
        tokens[row] = example.candidates[0][0]  # a filler that reads no further row of the head
        tokens[row, : len(example.candidates)] = [candidate[0] for candidate in example.candidates]
    order: list[int] = []
    picked: list[torch.Tensor] = []
    for batch, hidden in run_texts(loaded, prompts, planning):
        with planning.arithmetic.forwards():
            if full_vocabulary:
                picked.append(_picked(loaded, hidden, tokens[batch]))
            else:
                vocabulary, column = np.unique(tokens[batch], return_inverse=True)
                logits = _logits(loaded, hidden, on_device(vocabulary, loaded.device))
                columns = on_device(column.reshape(len(batch), width), loaded.device)
                picked.append(logits.gather(1, columns))
        order.extend(batch)
    scores = planning.arithmetic.empty_scores(*tokens.shape)
    scores[order] = planning.arithmetic.taken(torch.cat(picked))
    scores[~there] = -np.inf
    return scores if full_vocabulary else planning.arithmetic.log_softmax(scores)


def _picked(loaded: LoadedModel, hidden: torch.Tensor, tokens: npt.NDArray[np.int64]) -> torch.Tensor:
    """Log-probabilities over the whole vocabulary of some tokens of each row, float32 [rows, tokens]."""
    wanted = on_device(tokens, loaded.device)
    parts = zip(_chunks(loaded, hidden), _chunks(loaded, wanted), strict=True)
    return torch.cat([_logits(loaded, part).log_softmax(-1).gather(1, columns) for part, columns in parts])


def _plan_shared(loaded: LoadedModel, examples: Sequence[Example], planning: Planning) -> Shared:
    if not (planning.share_prompts and loaded.shared_prompts):
        return Shared([], list(range(len(examples))))
    virtual = num_virtual_tokens(loaded.model)
    return plan_shared(
        [len(_prompt(example)) + virtual for example in examples],
        [[len(_answer(example, j)[1]) - 1 for j in range(len(example.candidates))] for example in examples],
        tokens_per_batch=planning.tokens_per_batch,
        forward_cost_tokens=planning.forward_cost_tokens,
        cache_tokens=cache_tokens(loaded.model),
        padding=virtual == 0,  # between virtual tokens and a text it would shift a sliding window
    )


def _shared_scores(
    loaded: LoadedModel, examples: Sequence[Example], shared: Shared, planning: Planning, *, width: int
) -> Scores:
    """Mean log-probabilities [num_examples, width] over the whole vocabulary, ``-inf`` where there is none."""
    scores = np.full((len(examples), width), -np.inf)
    for batch, ends, cells, rest in run_shared(loaded, examples, shared.batches, planning):
        firsts = np.zeros((len(batch), width), dtype=np.int64)
        counts = np.zeros((len(batch), width), dtype=np.int64)
        for row, i in enumerate(batch):
            firsts[row, : len(examples[i].candidates)] = [candidate[0] for candidate in examples[i].candidates]
            counts[row, : len(examples[i].candidates)] = [len(candidate) for candidate in examples[i].candidates]
        with MEASURED.forwards():
            picked = _picked(loaded, ends, firsts)
        sums = MEASURED.taken(picked)
        if cells:
            further = [examples[batch[row]].candidates[j][1:] for row, j in cells]
            logprobs = _token_logprobs(loaded, rest, [token for tokens in further for token in tokens], planning)
            sums[tuple(np.transpose(cells))] += np.add.reduceat(logprobs, np.cumsum([0, *map(len, further[:-1])]))
        scores[batch] = np.where(counts > 0, sums / np.maximum(counts, 1), -np.inf)
    return scores


def _mean_logprobs(loaded: LoadedModel, answers: Sequence[tuple[Tokens, Tokens]], planning: Planning) -> Any:
    """Mean log-probability of each answer's tokens over the whole vocabulary, float64 [num_answers]."""
    means = planning.arithmetic.empty_scores(len(answers))
    reads = [Read(prompt + targets[:-1], len(targets)) for prompt, targets in answers]
    for batch, hidden in run_texts(loaded, reads, planning):
        logprobs = _token_logprobs(loaded, hidden, [token for i in batch for token in answers[i][1]], planning)
        means[batch] = planning.arithmetic.means(logprobs, [len(answers[i][1]) for i in batch])
    return means


def _token_logprobs(loaded: LoadedModel, hidden: torch.Tensor, targets: Sequence[int], planning: Planning) -> Any:
    """Log-probability of each position's target, float64 [N]: float32 numbers, ready to be summed."""
    wanted = on_device(np.array(targets, np.int64), loaded.device)
    parts = zip(_chunks(loaded, hidden), _chunks(loaded, wanted), strict=True)
    with planning.arithmetic.forwards():
        logprobs = [-F.cross_entropy(_logits(loaded, part), tokens, reduction="none") for part, tokens in parts]
        return planning.arithmetic.taken(torch.cat(logprobs))


def _logits(loaded: LoadedModel, hidden: torch.Tensor, vocabulary: torch.Tensor | None = None) -> torch.Tensor:
    if loaded.direct_head:
        return project(loaded.model, hidden, vocabulary=vocabulary)
    return hidden if vocabulary is None else hidden[:, vocabulary]


def _chunks(loaded: LoadedModel, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rows such that a chunk's logits stay within ``_CHUNK_LOGITS``."""
    return torch.split(rows, max(1, _CHUNK_LOGITS // max(1, len(loaded.tokenizer))))


def _answer(example: Example, candidate: int) -> tuple[Tokens, Tokens]:
    """The prompt, and the answer's tokens."""
    targets = example.candidates[candidate]
    if not targets:
        raise ConfigError(
            f"every candidate must have at least one token, got an empty one ({candidate}). Check task.candidates."
        )
    return _prompt(example), targets


def _prompt(example: Example) -> Tokens:
    if not example.prompt:
        raise ConfigError("every prompt must have at least one token, got an empty one. Check the task's template.")
    return example.prompt
