"""Which sequences run together: pure functions of lengths and costs, in tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

FEW_FORWARDS = 1 << 30
"""``forward_cost_tokens`` for which batches are never split to save padding."""
_PASS_TOKENS = 160  # what perturbing a weight on its way into a forward costs, in tokens that it is multiplied with
_LAYER_SHARE = 1 / 8  # tokens that keys and values of one position in one layer take; 2 / 18 or less in common models

Costs = Callable[[int], Iterator[int]]
"""Of an end: the costs of the batches [end - 1, end), [end - 2, end), ... for as long as they are allowed."""


@dataclass(frozen=True, slots=True)
class Shared:
    """Batches of examples whose candidates share their prompt, and the examples that do not."""

    batches: list[list[int]]
    others: list[int]


def forward_cost(device: torch.device, *, perturbs_weights: bool = False) -> int:
    """What one more forward costs on a device, in tokens (a rough figure).

    Args:
        device: Where the model is.
        perturbs_weights: Whether every forward makes a direction of all weights anew (full space).
    """
    return (32 if device.type == "cpu" else 2048) + _PASS_TOKENS * perturbs_weights


def bucket(size: int) -> int:
    """The least of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is not below ``size``.

    Example:
        >>> [bucket(size) for size in (1, 5, 6, 7, 9, 13, 100)]
        [1, 6, 6, 8, 12, 16, 128]
    """
    power = 1 << (size - 1).bit_length()
    return 3 * power // 4 if size <= 3 * power // 4 else power


def bucketed_width(length: int, *, longest: int) -> int:
    """Tokens to which a text of ``length`` is padded: to its bucket, but not beyond the longest text.

    Example:
        >>> [bucketed_width(length, longest=9) for length in (7, 9, 11)]
        [8, 9, 11]
    """
    return max(length, min(bucket(length), longest))


def plan_batches(
    lengths: Sequence[int], *, tokens_per_batch: int, forward_cost_tokens: int, bucketed: bool = False
) -> list[list[int]]:
    """Cut sequences, longest first, into batches: least padded tokens plus ``forward_cost_tokens`` a batch.

    Args:
        lengths: Tokens of each sequence.
        tokens_per_batch: Most padded tokens of a batch of two or more.
        forward_cost_tokens: Cost of a batch beside its tokens.
        bucketed: Whether a batch's rows are padded to their ``bucket``, too.

    Returns:
        Indices of each batch; a pure function of the arguments.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])

    def costs(end: int) -> Iterator[int]:
        for begin in range(end - 1, -1, -1):
            padded = lengths[order[begin]] * (bucket(end - begin) if bucketed else end - begin)
            if padded > tokens_per_batch and begin < end - 1:
                return
            yield padded + forward_cost_tokens

    return _cheapest_cut(order, costs)[1]


def plan_shared(
    prompts: Sequence[int],
    answers: Sequence[Sequence[int]],
    *,
    tokens_per_batch: int,
    forward_cost_tokens: int,
    cache_tokens: float,
    padding: bool = True,
) -> Shared:
    """Decide whose candidates share one run of their prompt: those of all examples that fit, or of none.

    A shared batch runs its prompts once, padded to the longest, then the candidates' input tokens on top; candidates
    without any cost nothing. All who fit share if that takes fewer padded tokens, ``forward_cost_tokens`` a forward
    included, than a sequence for every candidate.

    Args:
        prompts: Tokens of each example's prompt.
        answers: Of each example the input tokens of its candidates: all but the last of each.
        tokens_per_batch: Most tokens of one forward; keys and values that are kept count, too.
        forward_cost_tokens: Cost of a forward beside its tokens.
        cache_tokens: Memory of one kept position (keys and values of all layers), in tokens of a forward.
        padding: Whether prompts of one batch may differ in length.

    Returns:
        The plan; a pure function of the arguments.
    """

    def costs(order: Sequence[int], end: int) -> Iterator[int]:
        rows = longest = 0
        for begin in range(end - 1, -1, -1):
            there = [length for length in answers[order[begin]] if length]
            rows, longest = rows + len(there), max(longest, *there, 0)
            prompt = prompts[order[begin]]
            first, second = prompt * (end - begin), rows * longest
            most = cache_tokens * first + max(first, second + _LAYER_SHARE * rows * (prompt + longest))
            if most > tokens_per_batch or not (padding or prompt == prompts[order[end - 1]]):
                return
            yield first + second + forward_cost_tokens * (2 if rows else 1)

    fit = [i for i in range(len(prompts)) if next(costs([i], 1), None) is not None]
    fit.sort(key=lambda i: (-prompts[i], -max(answers[i])))
    shared_cost, batches = _cheapest_cut(fit, partial(costs, fit))
    sequences = [prompts[i] + length for i in fit for length in answers[i]]
    apart = plan_batches(sequences, tokens_per_batch=tokens_per_batch, forward_cost_tokens=forward_cost_tokens)
    apart_cost = sum(max(sequences[i] for i in batch) * len(batch) + forward_cost_tokens for batch in apart)
    if shared_cost >= apart_cost:
        return Shared([], list(range(len(prompts))))
    return Shared(batches, sorted(set(range(len(prompts))) - set(fit)))


def _cheapest_cut(order: Sequence[int], costs: Costs) -> tuple[int, list[list[int]]]:
    """Cut ``order`` into consecutive batches of least total cost."""
    cost, start = [0], [0]  # of the best cut of the first i, and where its last batch starts
    for end in range(1, len(order) + 1):
        cuts = ((cost[end - 1 - i] + more, end - 1 - i) for i, more in enumerate(costs(end)))
        best, best_start = min(cuts, key=lambda cut: cut[0])  # of equal ones the smallest last batch
        cost.append(best)
        start.append(best_start)
    batches: list[list[int]] = []
    end = len(order)
    while end:
        batches.append(list(order[start[end] : end]))
        end = start[end]
    return cost[-1], batches[::-1]
