"""The check of evaluators refuses broken ones, each by the rule that it breaks."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from fedzo.data.config import TaskConfig
from fedzo.data.encode import Example
from fedzo.evaluate import Measure
from fedzo.models.loaded import LoadedModel
from fedzo.records.scores import Score
from fedzo.testing import check_evaluator
from fedzo.testing.tiny_models import tiny_loaded

ROWS = [Example((1,) * (i + 1), ((7,),), 0) for i in range(5)]


class Lengths:
    """Mean length of the prompts, and the mean of its squares."""

    def measure(self, task: TaskConfig) -> Measure:
        return Measure(metric="length", high=1000, numbers=("square",))

    def evaluate(self, loaded: LoadedModel, examples: Sequence[Example], task: TaskConfig, **limits: Any) -> Score:
        lengths = np.array([len(example.prompt) for example in examples], dtype=float)
        return self.score(lengths, loaded, limits["tokens_per_batch"])

    def score(self, lengths: np.ndarray, loaded: LoadedModel, limit: int) -> Score:
        return self.told(lengths.mean(), lengths)

    def told(self, value: float, lengths: np.ndarray) -> Score:
        square = float((lengths**2).mean())
        return self.measure(TaskConfig()).score(value, num_examples=len(lengths), numbers={"square": square})


class Sums(Lengths):
    def score(self, lengths: np.ndarray, loaded: LoadedModel, limit: int) -> Score:
        return self.told(lengths.sum(), lengths)


class Spreads(Lengths):
    """A number that is no mean over examples."""

    def score(self, lengths: np.ndarray, loaded: LoadedModel, limit: int) -> Score:
        number = {"square": float(lengths.std())}
        return self.measure(TaskConfig()).score(lengths.mean(), num_examples=len(lengths), numbers=number)


class First(Lengths):
    def score(self, lengths: np.ndarray, loaded: LoadedModel, limit: int) -> Score:
        return self.told(lengths[0], lengths)


class Counts(Lengths):
    def __init__(self) -> None:
        self.calls = 0

    def score(self, lengths: np.ndarray, loaded: LoadedModel, limit: int) -> Score:
        self.calls += 1
        return self.told(lengths.mean() + self.calls, lengths)


class Draws(Lengths):
    def score(self, lengths: np.ndarray, loaded: LoadedModel, limit: int) -> Score:
        return self.told(lengths.mean() + random.random(), lengths)


class GoesByBatches(Lengths):
    def score(self, lengths: np.ndarray, loaded: LoadedModel, limit: int) -> Score:
        return self.told(lengths.mean() + limit, lengths)


class Infinite(Lengths):
    def score(self, lengths: np.ndarray, loaded: LoadedModel, limit: int) -> Score:
        return self.told(float("inf"), lengths)


class Trains(Lengths):
    def score(self, lengths: np.ndarray, loaded: LoadedModel, limit: int) -> Score:
        with torch.no_grad():
            next(loaded.model.parameters()).add_(1.0)
        return self.told(lengths.mean(), lengths)


class Drops(Lengths):
    """Leaves the model in training mode."""

    def score(self, lengths: np.ndarray, loaded: LoadedModel, limit: int) -> Score:
        loaded.model.train()
        return self.told(lengths.mean(), lengths)


def test_without_a_fault_it_passes() -> None:
    check_evaluator(Lengths, tiny_loaded(), ROWS, TaskConfig())


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (Sums, r"the value of all examples must be the mean of the scores of its parts, 15.0, got "),
        (Spreads, r"the square of all examples must be the mean of the scores of its parts"),
        (First, r"the value of all examples in another order must be the same, 1.0, got 5.0"),
        (Counts, r"the score must not depend on what was scored before"),
        (Draws, r"the score must not depend on what was scored before|global generators must be left alone"),
        (GoesByBatches, r"the value of all examples in smaller batches must be the same"),
        (Infinite, r"must have a value of 0 to 1000, got inf"),
        (Trains, r"the model must be left as it is"),
        (Drops, r"the model must be left with training=False"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_broken_evaluators(make: Callable[[], Lengths], rule: str) -> None:
    with pytest.raises(AssertionError, match=rule):
        check_evaluator(make, tiny_loaded(), ROWS, TaskConfig())
