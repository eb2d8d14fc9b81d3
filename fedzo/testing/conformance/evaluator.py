"""What every way to score a model must do."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fedzo.data.config import TaskConfig
from fedzo.data.encode import Example
from fedzo.errors import ConfigError
from fedzo.evaluate.base import Evaluator, evaluate, merge_scores
from fedzo.models.loaded import LoadedModel
from fedzo.records.decode import decode, encode
from fedzo.records.scores import PartialScore, Score
from fedzo.testing.conformance.bits import global_generators, model_bits, must, must_be_same_model

TOLERANCE = 1e-4
"""Relative, and absolute below 1: batches of other lengths have other last bits."""


def check_evaluator(
    make: Callable[[], Evaluator],
    loaded: LoadedModel,
    examples: Sequence[Example],
    task: TaskConfig,
    *,
    tokens_per_batch: int = 256,
) -> None:
    """Check that an evaluator keeps the contract of ``fedzo.evaluate.Evaluator``.

    - Its score is of its measure: metric, range and names of numbers, and can be written and read back.
    - The same examples give the same score, whatever it scored before, and in a new evaluator.
    - Value, loss and numbers are means over examples: the scores of parts average to that of all.
    - Neither the order of the examples nor the size of batches matters, but for last bits.
    - The model is left as it is.
    - The global random generators are neither used nor needed.

    Args:
        make: Makes the evaluator.
        loaded: A model.
        examples: At least two that differ.
        task: What the examples were made by.
        tokens_per_batch: Most tokens in one forward; one example must fit in half of it.

    Raises:
        AssertionError: The first rule that does not hold, with what was seen.
    """
    must(len(examples) >= 2, f"examples must be at least two, or no part can be scored, got {len(examples)}")
    rows = list(examples)
    before, training = model_bits(loaded.model), loaded.model.training

    def score(evaluator: Evaluator, part: Sequence[Example], limit: int = tokens_per_batch) -> Score:
        try:
            return evaluate("checked", evaluator, loaded, part, task, tokens_per_batch=limit)
        except ConfigError as error:
            raise AssertionError(str(error)) from error

    with global_generators(1):
        evaluator = make()
        whole = score(evaluator, rows)
        plain = encode(whole)
        must(
            decode(Score, plain, where="a score", error=ConfigError) == whole, f"a score must be plain numbers: {plain}"
        )
        parts = [score(evaluator, rows[:1]), score(evaluator, rows[1:])]
        again = score(evaluator, rows)
        must(again == whole, f"the score must not depend on what was scored before, got {again} after {whole}")
    with global_generators(2):
        fresh = make()
        must(fresh.measure(task) == evaluator.measure(task), "the measure of a new evaluator must be the same")
        _must_agree(score(fresh, rows[::-1]), whole, "in another order must be the same")
        must(score(fresh, rows) == whole, f"the score by a new evaluator must be {whole}")
        _must_agree(score(fresh, rows, tokens_per_batch // 2), whole, "in smaller batches must be the same")
    _must_agree(merge_scores(parts), whole, "must be the mean of the scores of its parts")
    must_be_same_model(model_bits(loaded.model), before, "the model must be left as it is")
    must(loaded.model.training is training, f"the model must be left with training={training}")


def _must_agree(found: PartialScore, expected: Score, rule: str) -> None:
    pairs = {"value": (found.value, expected.value), "loss": (found.loss, expected.loss)}
    pairs |= {name: (found.numbers.get(name), expected.numbers[name]) for name in expected.numbers}
    for name, (got, wanted) in pairs.items():
        near = got == wanted or (
            got is not None and wanted is not None and abs(got - wanted) <= TOLERANCE * max(1.0, abs(wanted))
        )
        must(near, f"the {name} of all examples {rule}, {wanted}, got {got}")
    must(found.num_examples == expected.num_examples, f"the number of examples {rule}, got {found.num_examples}")
    must(found.per_class == expected.per_class, f"the classes of all examples {rule}, got {found.per_class}")
