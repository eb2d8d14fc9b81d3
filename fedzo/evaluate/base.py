"""What an evaluator is, and what is asked of the scores that evaluators give and peers send."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedzo.data.config import Loss, TaskConfig, TaskKind
from fedzo.data.encode import Example
from fedzo.data.tasks import num_labels
from fedzo.errors import ConfigError, FedzoError, ProtocolError
from fedzo.models.loaded import LoadedModel
from fedzo.records.decode import decode, parse_json
from fedzo.records.fields import MAX_READING
from fedzo.records.scores import MAX_LOSS, MAX_NUMBERS, PartialScore, Score, known, lowered
from fedzo.registry import PluginConfig, Registry, returned
from fedzo.system import OnProgress


@dataclass(kw_only=True, slots=True)
class EvaluatorConfig(PluginConfig):
    """A way to score a model on rows."""


LOSS, PER_CLASS, LABEL_COUNTS, STAGE_FIGURES, NONE = "loss", "per_class", "label_counts", "stages", "none"
RESERVED = (LOSS, PER_CLASS, LABEL_COUNTS, STAGE_FIGURES, NONE)
"""Names in a site's ``limits.answers`` that no evaluator may give to a number of its own (``fedzo.fl.site_limits``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """What an evaluator's scores of a task are.

    Attributes:
        metric: What the value measures.
        low: The least that the value can be.
        high: The most.
        lower_is_better: Of the value.
        numbers: Names of the other numbers, or by name the least and the most that each can be; by default 1e15.

    Raises:
        ValueError: A range is none, there are more than 100 numbers, or a name is reserved or stands for two numbers.
    """

    metric: str
    low: float = 0.0
    high: float = 1.0
    lower_is_better: bool = False
    numbers: tuple[str, ...] | Mapping[str, tuple[float, float]] = ()

    def __post_init__(self) -> None:
        for low, high in ((self.low, self.high), *map(self.range_of, self.numbers)):
            if not -MAX_READING <= low < high <= MAX_READING:
                raise ValueError(f"a measure must have -1e15 <= low < high <= 1e15, got {low} and {high}")
        if len({*self.numbers}) < len(self.numbers) or len(self.numbers) > MAX_NUMBERS:
            raise ValueError(f"a measure must name at most {MAX_NUMBERS} numbers, each once, got {self.numbers}")
        if self.metric in self.numbers:
            raise ValueError(f"a measure must name no number as its metric, got {self.metric}")
        if taken := sorted({*RESERVED} & {self.metric, *self.numbers}):
            raise ValueError(f"a measure must not use the names {', '.join(sorted(RESERVED))}, got {', '.join(taken)}")

    def range_of(self, number: str) -> tuple[float, float]:
        """The least and the most that one of the other numbers can be."""
        return self.numbers[number] if isinstance(self.numbers, Mapping) else (-MAX_READING, MAX_READING)

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
        on_batch: OnProgress | None = None,
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
    on_batch: OnProgress | None = None,
) -> Score:
    """An evaluator's score, which is of its measure; arguments as ``Evaluator.evaluate``.

    Raises:
        ConfigError: There is no example, or the score is none of what the evaluator promises.
        PluginError: It is no score.
    """
    where = f"evaluators.{name}"
    if not examples:
        raise ConfigError(f"{where} needs at least one example, got none. Check the split's size.")
    given = evaluator.evaluate(loaded, examples, task, tokens_per_batch=tokens_per_batch, on_batch=on_batch)
    score = returned(given, Score, by=evaluator, method="evaluate")
    _check(score, evaluator, task, max_examples=len(examples), where=where, error=ConfigError)
    if score.numbers.keys() != {*(wanted := evaluator.measure(task).numbers)}:
        got = ", ".join(score.numbers)[:80]
        raise ConfigError(f"{where} must report the numbers {', '.join(wanted) or 'none'}, got {got or 'none'}")
    return score


def trained(task: TaskConfig, evaluators: Mapping[str, Evaluator]) -> Evaluator | None:
    """The evaluator whose value is the loss: the first, with ``task.loss=score``."""
    return next(iter(evaluators.values())) if task.loss is Loss.score else None


def loss_name(task: TaskConfig, evaluators: Mapping[str, Evaluator]) -> str:
    """What the losses of a run's steps are called: ``loss``, or ``loss (-token_f1)`` where a value is one."""
    if (evaluator := trained(task, evaluators)) is None:
        return LOSS
    measure = evaluator.measure(task)
    return f"{LOSS} ({lowered(measure.metric, lower_is_better=measure.lower_is_better)})"


def value_as_loss(
    evaluator: Evaluator,
    loaded: LoadedModel,
    examples: Sequence[Example],
    task: TaskConfig,
    *,
    tokens_per_batch: int,
) -> float:
    """An evaluator's value with a minus where higher is better; NaN outside of its measure.

    Raises:
        PluginError: It gives no score.
    """
    given = evaluator.evaluate(loaded, examples, task, tokens_per_batch=tokens_per_batch)
    value, measure = returned(given, Score, by=evaluator, method="evaluate").value, evaluator.measure(task)
    if not measure.low <= value <= measure.high:
        return math.nan
    return value if measure.lower_is_better else 0.0 - value  # a value of 0 is no loss of -0


def scores_of_peer(
    text: str, evaluators: Mapping[str, Evaluator], task: TaskConfig, *, max_examples: int
) -> dict[str, PartialScore]:
    """What a peer told of its scores, as JSON by evaluator: perhaps not of all, and not all of each.

    Args:
        text: The JSON; nothing in it is trusted.
        evaluators: By name: what the peer was asked for.
        task: Of the run.
        max_examples: How many rows the peer was asked to score at most.

    Raises:
        ProtocolError: These are no scores, or none of what the peer was asked for.
    """
    plain = parse_json(text, where="scores", error=ProtocolError)
    if not isinstance(plain, dict) or not plain.keys() <= evaluators.keys():
        got = ", ".join(map(str, plain))[:80] if isinstance(plain, dict) else type(plain).__name__
        raise ProtocolError(f"scores must be of {', '.join(evaluators) or 'nothing'}, got {got}")
    scores = {}
    for name, evaluator in ((name, evaluator) for name, evaluator in evaluators.items() if name in plain):
        where = f"a score of {name}"
        scores[name] = decode(PartialScore, plain[name], where=where, error=ProtocolError)
        _check(scores[name], evaluator, task, max_examples=max_examples, where=where, error=ProtocolError)
        if not abs(scores[name].loss or 0.0) <= MAX_LOSS:
            raise ProtocolError(f"{where} must have a |loss| of at most {MAX_LOSS:g}, got {scores[name].loss:g}")
    return scores


def _check(
    score: PartialScore,
    evaluator: Evaluator,
    task: TaskConfig,
    *,
    max_examples: int,
    where: str,
    error: type[FedzoError],
) -> None:
    """Refuse what is not of the evaluator's measure, and so what could not be averaged or written."""
    measure = evaluator.measure(task)
    if score.metric != measure.metric or score.lower_is_better != measure.lower_is_better:
        raise error(f"{where} must be of {measure.metric}, got {score.metric:.80}")
    if not 1 <= score.num_examples <= max_examples:
        raise error(f"{where} must be of 1 to {max_examples} examples, got {score.num_examples}")
    if score.value is not None and not measure.low <= score.value <= measure.high:
        raise error(f"{where} must have a value of {measure.low:g} to {measure.high:g}, got {score.value}")
    if stray_numbers := [name for name in score.numbers if name not in measure.numbers]:
        got = ", ".join(stray_numbers)[:80]
        raise error(f"{where} must report the numbers {', '.join(measure.numbers) or 'none'}, got {got}")
    for name, number in score.numbers.items():
        low, high = measure.range_of(name)
        if not low <= number <= high:  # nan is in no range
            raise error(f"{where} must have {name} of {low:g} to {high:g}, got {number}")
    if stray := [label for label in score.per_class if not 0 <= label < num_labels(task)]:
        raise error(f"{where} must have classes of {num_labels(task)} labels, got {stray[0]}")


def merge_scores(scores: Sequence[PartialScore]) -> PartialScore:
    """The score of all examples together, from the parts that clients report; AUC and best threshold are ``None``.

    Each number is the mean over the examples of the parts that have it, and None or missing where none has.

    Raises:
        ConfigError: There is no score, or they are of different metrics.
    """
    metrics = {score.metric for score in scores}
    if len(metrics) != 1:
        raise ConfigError(f"scores to merge must share one metric, got {sorted(metrics) or 'none'}.")
    per_class: dict[int, tuple[int, int]] = {}
    for score in scores:
        for label, (right, total) in score.per_class.items():
            before = per_class.get(label, (0, 0))
            per_class[label] = (before[0] + right, before[1] + total)
    names = dict.fromkeys(name for score in scores for name in score.numbers)
    means = {name: _mean([(score.numbers.get(name), score.num_examples) for score in scores]) for name in names}
    return PartialScore(
        metric=metrics.pop(),
        value=_mean([(score.value, score.num_examples) for score in scores]),
        loss=_mean([(score.loss, score.num_examples) for score in scores]),
        num_examples=sum(score.num_examples for score in scores),
        per_class=dict(sorted(per_class.items())),
        numbers={name: mean for name, mean in means.items() if mean is not None},
        lower_is_better=scores[0].lower_is_better,
    )


def _mean(parts: Sequence[tuple[float | None, int]]) -> float | None:
    """Of the values that are told, each weighted by its examples."""
    told = [(value, count) for value, count in parts if value is not None]
    if not told:
        return None
    values, weights = (np.asarray(column, dtype=np.float64) for column in zip(*told, strict=True))
    return float(np.dot(weights, values) / weights.sum())


def metric_names() -> tuple[list[str], bool]:
    """What evaluators, with their defaults, call the numbers that they report on tasks of any kind.

    Returns:
        The names, and whether every evaluator told its own: one that no run uses may be unable to.
    """
    names, all_told = set[str](), True
    for _, make in EVALUATORS:
        try:
            evaluator = EVALUATORS.build(make())
            for kind in TaskKind:
                measure = evaluator.measure(TaskConfig(kind=kind))
                names.update((measure.metric, *measure.numbers))
        except Exception:  # somebody else's code, and perhaps without a key that it requires: whatever it raises
            all_told = False
    return sorted(names), all_told
