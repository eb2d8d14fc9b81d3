"""A score of a model on rows, as far as it is told: what evaluators make, clients send and metric records hold."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Annotated, Any

from fedzo.records.fields import Count, Length, Name, OmitDefault, Reading, Real, Share, Within

MAX_NUMBERS = 100
"""Numbers that an evaluator may report beside its value."""
MAX_LOSS = 1e6
"""Nats: a client sends no larger loss, and an answer with one is refused."""
Label = Annotated[int, Within(0, 1 << 16)]


@dataclass(frozen=True, slots=True)
class PartialScore:
    """How a model did on rows, by one evaluator, as far as whoever has the rows tells.

    Attributes:
        metric: What the value measures, such as ``accuracy``, ``token_f1`` or ``rouge_l``.
        value: The metric's mean over examples; None where it is not told.
        loss: The task's loss, mean over examples; None where it is not finite or the evaluator has none.
        num_examples: How many.
        per_class: Of each label: right answers and examples (candidates only).
        auc: Area under the ROC curve (two candidates and both labels there only).
        best_threshold_accuracy: Accuracy at the threshold that suits these examples best (two candidates only).
        numbers: Other means over examples that the evaluator reports, by name.
        lower_is_better: Of the value.
    """

    metric: Name
    value: Reading | None
    loss: Real | None
    num_examples: Annotated[int, Within(1, 1 << 53)]
    per_class: Annotated[dict[Label, tuple[Count, Count]], Length(0, 1 << 16)] = field(default_factory=dict)
    auc: Share | None = None
    best_threshold_accuracy: Share | None = None
    numbers: Annotated[dict[Name, Reading], Length(0, MAX_NUMBERS), OmitDefault()] = field(default_factory=dict)
    lower_is_better: Annotated[bool, OmitDefault()] = False

    def __post_init__(self) -> None:
        counts = self.per_class.values()
        if any(right > total for right, total in counts) or sum(total for _, total in counts) > self.num_examples:
            raise ValueError("hold no more right answers than examples, and no more of a class than of all")

    def as_fields(self) -> dict[str, Any]:
        """The score's fields, for a record that is a score and more."""
        return {each.name: getattr(self, each.name) for each in fields(PartialScore)}


@dataclass(frozen=True, slots=True)
class Score(PartialScore):
    """A score that is told in full."""

    value: Reading

    @property
    def merit(self) -> float:
        """The value, or its negative where lower is better: the higher the better."""
        return -self.value if self.lower_is_better else self.value


def known(value: float) -> float | None:
    """None for a number that is not finite."""
    return float(value) if math.isfinite(value) else None


def lowered(metric: str, *, lower_is_better: bool) -> str:
    """What a value is called where it is a loss: with a minus where higher is better."""
    return metric if lower_is_better else f"-{metric}"
