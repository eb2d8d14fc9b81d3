"""Numbers between a forward and a loss: measured ones, of which a float is left, and ones that can be differentiated.

What a task's loss is (``fedzo.models.scoring``) is written once, for both. Measured numbers are float64 arrays of numpy
on the host, whose operations keep their order and so their last bits; differentiable ones are float64 tensors with
their graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Scores = npt.NDArray[np.float64]


class Arithmetic:
    """What a loss is made with, here of measured numbers: a forward keeps nothing for a gradient.

    Arrays are numpy's, or a subclass's own, which are indexed and assigned alike.
    """

    def forwards(self) -> AbstractContextManager[Any]:
        """What forwards run in."""
        return torch.inference_mode()

    def empty_scores(self, *shape: int) -> Any:
        """Float64, all of them -inf, which stands for no score."""
        return np.full(shape, -np.inf)

    def taken(self, logprobs: torch.Tensor) -> Any:
        """Log-probabilities of a forward, float32 of any shape, as float64."""
        return logprobs.cpu().numpy().astype(np.float64)

    def means(self, logprobs: Any, counts: Sequence[int]) -> Any:
        """Means of consecutive parts, [len(counts)], from [sum(counts)]."""
        sizes = np.array(counts)
        return np.add.reduceat(logprobs, np.cumsum(sizes) - sizes) / sizes

    def log_softmax(self, scores: Any) -> Any:
        """Over the last axis of [N, C]."""
        with np.errstate(invalid="ignore"):  # infinities give NaN, as they should
            shifted = scores - scores.max(axis=1, keepdims=True)
            return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


class Differentiable(Arithmetic):
    """Tensors with their graph: all activations of a batch are kept until the gradient is taken.

    Scores are float64 on the CPU, since not every device has float64 (Apple's).
    """

    def forwards(self) -> AbstractContextManager[Any]:
        return torch.enable_grad()

    def empty_scores(self, *shape: int) -> torch.Tensor:
        return torch.full(shape, -torch.inf, dtype=torch.float64)

    def taken(self, logprobs: torch.Tensor) -> torch.Tensor:
        return logprobs.cpu().double()

    def means(self, logprobs: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        return torch.stack([part.mean() for part in torch.split(logprobs, list(counts))])

    def log_softmax(self, scores: torch.Tensor) -> torch.Tensor:
        return scores.log_softmax(-1)


MEASURED, DIFFERENTIABLE = Arithmetic(), Differentiable()
