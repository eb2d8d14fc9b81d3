"""What an evaluator is, and what is asked of the scores that evaluators give and peers send."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedzo.data.config import TaskConfig
from fedzo.data.encode import Example
from fedzo.data.tasks import num_labels
from fedzo.errors import ConfigError, FedzoError, ProtocolError
from fedzo.models.forwards import OnBatch
from fedzo.models.load import LoadedModel
from fedzo.records.decode import decode, parse_json
from fedzo.records.fields import MOST_READING
from fedzo.records.metrics import MOST_NUMBERS, Score, known
from fedzo.registry import PluginConfig, Registry


@dataclass(kw_only=True, slots=True)
class EvaluatorConfig(PluginConfig):
    """A way to score a model on rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """What an evaluator's scores of a task are.

    Attributes:
        metric: What the value measures.
        low: The least that the value can be.
        high: The most.
        lower_is_better: Of the value.
        numbers: Names of the other numbers; none is beyond 1e15.

    Raises:
        ValueError: The range is none, or there are more than 100 numbers.
    """

    metric: str
    low: float = 0.0
    high: float = 1.0
    lower_is_better: bool = False
    numbers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not -MOST_READING <= self.low < self.high <= MOST_READING:
            raise ValueError(f"a measure must have -1e15 <= low < high <= 1e15, got {self.low} and {self.high}")
        if len({*self.numbers}) < len(self.numbers) or len(self.numbers) > MOST_NUMBERS:
            raise ValueError(f"a measure must name at most {MOST_NUMBERS} numbers, each once, got {self.numbers}")

    def score(
        self, value: float, *, num_examples: int, loss: float | None = None, numbers: Mapping[str, float] | None = None
    ) -> Score:
        """A score of this measure; a loss that is not finite is left out."""
        return Score(
            metric=self.metric,
            value=float(value),
            loss=None if loss is None else known(loss),
            num_examples=num_examples,
            numbers=dict(numbers or {}),
            lower_is_better=self.lower_is_better,
        )


class Evaluator(Protocol):
    """Scores a model on rows. Value, loss and numbers are means over examples, so clients' scores can be averaged."""

    def measure(self, task: TaskConfig) -> Measure:
        """What the scores of a task are; the same on every peer."""
        ...

    def evaluate(
        self,
        loaded: LoadedModel,
        examples: Sequence[Example],
        task: TaskConfig,
        *,
        tokens_per_batch: int,
        on_batch: OnBatch | None = None,
    ) -> Score:
        """The score of a model, which is left as it is.

        Args:
            loaded: The model.
            examples: At least one.
            task: What the examples were made by.
            tokens_per_batch: Most tokens in one forward.
            on_batch: Called with sequences done and in total.
        """
        ...


EVALUATORS: Registry[Evaluator] = Registry("evaluators", base=EvaluatorConfig)
"""Factories ``(config) -> Evaluator``."""


def evaluate(
    name: str,
    evaluator: Evaluator,
    loaded: LoadedModel,
    examples: Sequence[Example],
    task: TaskConfig,
    *,
    tokens_per_batch: int,
    on_batch: OnBatch | None = None,
) -> Score:
    """An evaluator's score, which is of its measure; arguments as ``Evaluator.evaluate``.

    Raises:
        ConfigError: There is no example, or the score is none of what the evaluator promises.
    """
    where = f"evaluators.{name}"
    if not examples:
        raise ConfigError(f"{where} needs at least one example, got none. Check the split's size.")
    score = evaluator.evaluate(loaded, examples, task, tokens_per_batch=tokens_per_batch, on_batch=on_batch)
    _check(score, evaluator, task, most_examples=len(examples), where=where, error=ConfigError)
    return score


def scores_of_peer(
    text: str, evaluators: Mapping[str, Evaluator], task: TaskConfig, *, most_examples: int
) -> dict[str, Score]:
    """The scores that a peer sent as JSON, one an evaluator; none for the empty object of a peer without rows.

    Args:
        text: The JSON; nothing in it is trusted.
        evaluators: By name: what the peer was asked for.
        task: Of the run.
        most_examples: How many rows the peer was asked to score at most.

    Raises:
        ProtocolError: These are no scores, or none of what the peer was asked for.
    """
    plain = parse_json(text, where="scores", error=ProtocolError)
    if plain == {}:
        return {}
    if not isinstance(plain, dict) or plain.keys() != evaluators.keys():
        got = ", ".join(map(str, plain))[:80] if isinstance(plain, dict) else type(plain).__name__
        raise ProtocolError(f"scores must be of {', '.join(evaluators)}, got {got}")
    scores = {}
    for name, evaluator in evaluators.items():
        where = f"a score of {name}"
        scores[name] = decode(Score, plain[name], where=where, error=ProtocolError)
        _check(scores[name], evaluator, task, most_examples=most_examples, where=where, error=ProtocolError)
    return scores


def _check(
    score: Score, evaluator: Evaluator, task: TaskConfig, *, most_examples: int, where: str, error: type[FedzoError]
) -> None:
    """Refuse what is not of the evaluator's measure, and so what could not be averaged or written."""
    measure = evaluator.measure(task)
    if score.metric != measure.metric or score.lower_is_better != measure.lower_is_better:
        raise error(f"{where} must be of {measure.metric}, got {score.metric:.80}")
    if not 1 <= score.num_examples <= most_examples:
        raise error(f"{where} must be of 1 to {most_examples} examples, got {score.num_examples}")
    if not measure.low <= score.value <= measure.high:
        raise error(f"{where} must have a value of {measure.low:g} to {measure.high:g}, got {score.value}")
    if score.numbers.keys() != {*measure.numbers}:
        got = ", ".join(score.numbers)[:80]
        raise error(f"{where} must report the numbers {', '.join(measure.numbers) or 'none'}, got {got or 'none'}")
    for name, number in score.numbers.items():
        if not abs(number) <= MOST_READING:  # nan is in no range
            raise error(f"{where} must have a finite {name} of at most 1e15, got {number}")
    if stray := [label for label in score.per_class if not 0 <= label < num_labels(task)]:
        raise error(f"{where} must have classes of {num_labels(task)} labels, got {stray[0]}")


def merge_scores(scores: Sequence[Score]) -> Score:
    """The score of all examples together, from the parts that clients report; AUC and best threshold are ``None``.

    The loss is that of the parts that have one.

    Raises:
        ConfigError: There is no score, or they are of different metrics.
    """
    metrics = {score.metric for score in scores}
    if len(metrics) != 1:
        raise ConfigError(f"scores to merge must share one metric, got {sorted(metrics) or 'none'}.")
    counts = [score.num_examples for score in scores]
    losses = {index: score.loss for index, score in enumerate(scores) if score.loss is not None}
    per_class: dict[int, tuple[int, int]] = {}
    for score in scores:
        for label, (right, total) in score.per_class.items():
            before = per_class.get(label, (0, 0))
            per_class[label] = (before[0] + right, before[1] + total)
    return Score(
        metric=metrics.pop(),
        value=_mean([score.value for score in scores], counts),
        loss=_mean([*losses.values()], [counts[index] for index in losses]) if losses else None,
        num_examples=sum(counts),
        per_class=dict(sorted(per_class.items())),
        numbers={name: _mean([score.numbers[name] for score in scores], counts) for name in scores[0].numbers},
        lower_is_better=scores[0].lower_is_better,
    )


def _mean(values: Sequence[float], counts: Sequence[int]) -> float:
    weights = np.asarray(counts, dtype=np.float64)
    return float(np.dot(weights, np.asarray(values, dtype=np.float64)) / weights.sum())
