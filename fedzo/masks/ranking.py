"""The coordinates of the largest scores over one tensor or several, exactly and deterministically."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fedzo.errors import NumericsError

ScoreFn = Callable[[str], torch.Tensor]
"""Name of a tensor to its scores: flat, float32 or int64, the same at every call."""
_CHUNK = 1 << 24  # scores ranked at a time: bounds what topk allocates


def largest(score: ScoreFn, names: Sequence[str], k: int) -> dict[str, torch.Tensor]:
    """Sorted indices of the k largest scores; of equal ones the earlier tensor's, then the lower index.

    ``topk`` leaves open which of equal scores it returns, so only its k-th value is used: that does not depend on it.

    Args:
        score: Gives the scores of a tensor; asked a few times for each, so that they need not be held all at once.
        names: Tensors that compete with one another.
        k: At least 1, at most the number of scores.

    Returns:
        int64 indices per name; without the names that have none.

    Raises:
        NumericsError: A score is NaN or infinite.
    """
    threshold = _kth_largest(score, names, k)
    num_ties = k - sum(int((score(name) > threshold).sum()) for name in names)
    chosen: dict[str, torch.Tensor] = {}
    for name in names:
        values = score(name)
        ties = (values == threshold).nonzero().squeeze(1)[:num_ties]
        num_ties -= ties.numel()
        above = (values > threshold).nonzero().squeeze(1)
        if above.numel() + ties.numel():
            chosen[name] = torch.cat([above, ties]).sort().values
    return chosen


def _kth_largest(score: ScoreFn, names: Sequence[str], k: int) -> float:
    """The k-th largest score as a number, from the k largest so far and one chunk at a time."""
    best: list[torch.Tensor] = []
    for name in names:
        values = score(name)
        _check_finite(name, values)
        for part in torch.split(values, _CHUNK):
            top = part.topk(min(k, part.numel()), sorted=False).values
            both = torch.cat([*(kept.to(top.device) for kept in best), top])
            best = [both.topk(min(k, both.numel()), sorted=False).values]
    return best[0].min().item()


def _check_finite(name: str, values: torch.Tensor) -> None:
    bad = values.numel() - int(values.isfinite().sum())
    if bad:
        raise NumericsError(
            f"mask: every score of {name!r} must be finite, got {bad} of {values.numel()} that are NaN or infinite. "
            "Check the weights, or load the model in float32."
        )
