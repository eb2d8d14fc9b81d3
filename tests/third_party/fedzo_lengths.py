"""Another package of somebody else, with an evaluator that fedzo does not know."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedzo.errors import Problem, at_least
from fedzo.evaluate import EVALUATORS, EvaluatorConfig, Measure
from fedzo.models.generate import generate

if TYPE_CHECKING:
    from fedzo.config.schema import RunSettings
    from fedzo.data.config import TaskConfig
    from fedzo.data.encode import Example
    from fedzo.models.loaded import LoadedModel
    from fedzo.records.metrics import Score
    from fedzo.system import OnProgress


@dataclass(kw_only=True, slots=True)
class LengthsConfig(EvaluatorConfig):
    """Mean number of characters that the model writes after a prompt."""

    max_new_tokens: int = 4
    """Longest answer in tokens."""

    def problems(self, run: RunSettings) -> Iterator[Problem]:
        yield from at_least("evaluators.lengths.max_new_tokens", self.max_new_tokens, 1, "It counts tokens.")


@EVALUATORS.register("lengths", LengthsConfig)
@dataclass(frozen=True, slots=True)
class Lengths:
    config: LengthsConfig

    def measure(self, task: TaskConfig) -> Measure:
        return Measure(metric="characters", high=1e6, lower_is_better=True, numbers=("empty",))

    def evaluate(
        self,
        loaded: LoadedModel,
        examples: Sequence[Example],
        task: TaskConfig,
        *,
        tokens_per_batch: int,
        on_batch: OnProgress | None = None,
    ) -> Score:
        answers = generate(
            loaded,
            [example.prompt for example in examples],
            max_new_tokens=self.config.max_new_tokens,
            tokens_per_batch=tokens_per_batch,
            on_batch=on_batch,
        )
        sizes = np.array([len(answer) for answer in answers])
        numbers = {"empty": float((sizes == 0).mean())}
        return self.measure(task).score(float(sizes.mean()), num_examples=len(sizes), numbers=numbers)
