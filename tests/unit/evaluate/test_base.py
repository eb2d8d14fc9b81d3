"""What is asked of scores, whoever gives them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import pytest

from fedzo.data.config import Loss, TaskConfig, TaskKind
from fedzo.data.encode import Example
from fedzo.errors import ConfigError, PluginError, ProtocolError
from fedzo.evaluate import AnswersConfig, Evaluator, Measure, evaluate, merge_scores, scores_of_peer
from fedzo.evaluate.answers import Answers
from fedzo.evaluate.base import loss_name, value_as_loss
from fedzo.records.decode import encode
from fedzo.records.scores import PartialScore, Score
from fedzo.testing.tiny_models import tiny_loaded

TASK = TaskConfig(candidates=[" bad", " good"])
ROWS = [Example((1 + i, 5), ((7,), (8,)), i % 2) for i in range(6)]
LENGTHS = Measure(metric="length", low=0, high=100, lower_is_better=True, numbers=("empty",))


class Lengths:
    """Gives whatever score it is told to."""

    def __init__(self, score: Score | None = None) -> None:
        self.score = score

    def measure(self, task: TaskConfig) -> Measure:
        return LENGTHS

    def evaluate(self, loaded: Any, examples: Sequence[Example], task: TaskConfig, **limits: Any) -> Score:
        assert self.score is not None
        return self.score


EVALUATORS: dict[str, Evaluator] = {"answers": Answers(AnswersConfig()), "lengths": Lengths()}
RIGHT: dict[str, Any] = {
    "answers": encode(Score("accuracy", 0.5, 0.7, 4, {0: (1, 2), 1: (1, 2)})),
    "lengths": encode(LENGTHS.score(3.5, num_examples=4, numbers={"empty": 0.25})),
}


def test_a_record_is_what_the_run_folder_holds() -> None:
    record = encode(Score("accuracy", 0.5, 0.7, 4, {0: (1, 2), 1: (1, 2)}, 0.625, 0.75))

    assert record == {
        "metric": "accuracy",
        "value": 0.5,
        "loss": 0.7,
        "num_examples": 4,
        "per_class": {"0": [1, 2], "1": [1, 2]},
        "auc": 0.625,
        "best_threshold_accuracy": 0.75,
    }
    assert RIGHT["lengths"] == {
        "metric": "length",
        "value": 3.5,
        "loss": None,
        "num_examples": 4,
        "per_class": {},
        "auc": None,
        "best_threshold_accuracy": None,
        "numbers": {"empty": 0.25},
        "lower_is_better": True,
    }


def test_a_part_without_a_loss_leaves_that_of_the_others() -> None:
    parts = [Score("accuracy", 0.5, 2.0, 4), Score("accuracy", 1.0, None, 4), Score("accuracy", 0.5, 1.0, 2)]

    assert merge_scores(parts).loss == pytest.approx((2.0 * 4 + 1.0 * 2) / 6)
    assert merge_scores(parts[1:2]).loss is None


def test_each_number_is_averaged_over_the_parts_that_tell_it() -> None:
    parts = [
        PartialScore("length", None, 2.0, 4, numbers={"empty": 0.5}),
        PartialScore("length", 3.0, None, 2),
        PartialScore("length", 6.0, None, 1),
    ]

    merged = merge_scores(parts)

    assert merged.value == pytest.approx((3.0 * 2 + 6.0) / 3)
    assert (merged.loss, merged.numbers, merged.num_examples) == (2.0, {"empty": 0.5}, 7)
    nothing = merge_scores(parts[:1])
    assert (nothing.value, nothing.loss) == (None, 2.0)


def test_numbers_are_averaged_over_examples() -> None:
    parts = [LENGTHS.score(v, num_examples=n, numbers={"empty": e}) for v, n, e in ((1.0, 1, 0.0), (4.0, 3, 1.0))]

    merged = merge_scores(parts)

    assert (merged.value, merged.numbers, merged.num_examples) == (13 / 4, {"empty": 3 / 4}, 4)
    assert merged.lower_is_better


def test_scores_to_merge_are_of_one_metric() -> None:
    with pytest.raises(ConfigError, match="must share one metric, got none"):
        merge_scores([])
    with pytest.raises(ConfigError, match=r"must share one metric, got \['accuracy', 'rouge_l'\]"):
        merge_scores([Score("accuracy", 0.0, 0.0, 1), Score("rouge_l", 0.0, 0.0, 1)])


@pytest.mark.parametrize(
    ("evaluator", "changes"),
    [
        ("answers", {"loss": "inf"}),
        ("answers", {"loss": float("nan")}),
        ("answers", {"loss": -1.1e6}),
        ("answers", {"loss": 1.1e6}),
        ("answers", {"value": 1.5}),
        ("answers", {"num_examples": 9}),
        ("answers", {"metric": "rouge_l"}),
        ("answers", {"per_class": {"2": [0, 1]}}),
        ("answers", {"per_class": {"-1": [0, 1]}}),
        ("answers", {"per_class": {"0": [1, 4], "1": [0, 1]}}),
        ("answers", {"per_class": {"0": [2, 1]}}),
        ("answers", {"per_class": [1]}),
        ("answers", {"num_examples": 0}),
        ("answers", {"num_examples": 2}),
        ("answers", {"num_examples": float("inf")}),
        ("answers", {"num_examples": 10**400}),
        ("answers", {"surprise": 1}),
        ("answers", {"numbers": {"empty": 0.5}}),
        ("answers", {"lower_is_better": True}),
        ("lengths", {"value": -0.5}),
        ("lengths", {"value": 100.5}),
        ("lengths", {"numbers": {"empty": 0.5, "full": 0.5}}),
        ("lengths", {"numbers": {"empty": 1e300}}),
        ("lengths", {"numbers": {"empty": "0.5"}}),
        ("lengths", {"lower_is_better": False}),
    ],
)
def test_what_a_peer_sends_must_be_a_score_of_each_evaluator(evaluator: str, changes: dict[str, object]) -> None:
    def read(**changed: object) -> dict[str, Score]:
        text = json.dumps({**RIGHT, evaluator: {**RIGHT[evaluator], **changed}})
        return scores_of_peer(text, EVALUATORS, TASK, max_examples=8)

    good = read(loss=None)

    assert list(good) == ["answers", "lengths"]
    assert good[evaluator].loss is None
    with pytest.raises(ProtocolError, match=f"a score of {evaluator}|scores: must be JSON"):
        read(**changes)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '{"answers": {}}',
        '{"answers": {"metric": "accuracy"}}',
        json.dumps({**RIGHT, "more": RIGHT["answers"]}),
        "nan",
        "not json",
    ],
)
def test_a_peer_sends_scores_of_the_evaluators_that_it_answers_and_of_no_other(text: str) -> None:
    assert scores_of_peer("{}", EVALUATORS, TASK, max_examples=8) == {}  # a peer without rows
    told = scores_of_peer(json.dumps({"lengths": RIGHT["lengths"]}), EVALUATORS, TASK, max_examples=8)
    assert list(told) == ["lengths"]
    with pytest.raises(ProtocolError, match="score"):
        scores_of_peer(text, EVALUATORS, TASK, max_examples=8)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (LENGTHS.score(float("nan"), num_examples=6, numbers={"empty": 0}), "a value of 0 to 100, got nan"),
        (
            LENGTHS.score(1.0, num_examples=6, numbers={"empty": float("inf")}),
            r"empty of -1e\+15 to 1e\+15, got inf",
        ),
        (LENGTHS.score(1.0, num_examples=6), "report the numbers empty, got none"),
        (LENGTHS.score(1.0, num_examples=7, numbers={"empty": 0}), "be of 1 to 6 examples, got 7"),
        (Measure(metric="size").score(1.0, num_examples=6), "be of length, got size"),
    ],
)
def test_an_evaluator_is_held_to_its_measure(score: Score, message: str) -> None:
    with pytest.raises(ConfigError, match=f"evaluators.lengths must (have )?{message}"):
        evaluate("lengths", Lengths(score), tiny_loaded(), ROWS, TASK, tokens_per_batch=8)


def test_nothing_to_score_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"evaluators\.lengths needs at least one example, got none"):
        evaluate("lengths", Lengths(), tiny_loaded(), [], TASK, tokens_per_batch=8)


@pytest.mark.parametrize("number", [-0.1, 1.1, 1e6])
def test_a_number_of_a_peer_stays_within_its_range(number: float) -> None:
    """So that one client moves their mean by no more than its share of the rows."""
    task = TaskConfig(kind=TaskKind.generation, loss=Loss.lm)
    evaluators: dict[str, Evaluator] = {"answers": Answers(AnswersConfig())}

    def read(exact: float) -> dict[str, PartialScore]:
        score = Score("token_f1", 0.5, 0.7, 4, numbers={"exact_match": exact})
        return scores_of_peer(json.dumps({"answers": encode(score)}), evaluators, task, max_examples=8)

    assert [read(exact)["answers"].numbers for exact in (0.0, 1.0)] == [{"exact_match": 0.0}, {"exact_match": 1.0}]
    with pytest.raises(ProtocolError, match=f"a score of answers must have exact_match of 0 to 1, got {number}"):
        read(number)


def test_ranges_of_numbers_are_named_or_wide() -> None:
    named = Measure(metric="size", high=9, numbers={"empty": (0.0, 1.0), "change": (-2.0, 2.0)})

    assert [*named.numbers] == ["empty", "change"]
    assert [named.range_of(name) for name in named.numbers] == [(0.0, 1.0), (-2.0, 2.0)]
    assert LENGTHS.range_of("empty") == (-1e15, 1e15)


@pytest.mark.parametrize(
    "wrong",
    [
        {"low": 1.0},
        {"high": float("inf")},
        {"numbers": ("a", "a")},
        {"numbers": {"a": (0.0, 1.0), "b": (1.0, 1.0)}},
        {"numbers": {"a": (0.0, float("inf"))}},
        {"numbers": {"size": (0.0, 1.0)}},
    ],
)
def test_a_measure_is_bounded(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a measure must"):
        Measure(metric="size", **wrong)


@pytest.mark.parametrize("name", ["label_counts", "loss", "none", "per_class", "stages"])
def test_a_measure_has_no_name_that_a_sites_file_has_for_something_else(name: str) -> None:
    with pytest.raises(ValueError, match=f"a measure must not use the names .*, got {name}"):
        Measure(metric=name)
    with pytest.raises(ValueError, match=f"a measure must not use the names .*, got {name}"):
        Measure(metric="size", numbers=(name,))


def test_a_measure_names_no_number_as_its_metric() -> None:
    with pytest.raises(ValueError, match="a measure must name no number as its metric, got size"):
        Measure(metric="size", numbers=("size",))


class Sizes(Lengths):
    """Gives the score that it is told, of a measure that it is told, too."""

    def __init__(self, value: Any, *, lower_is_better: bool = False) -> None:
        self.size = Measure(metric="size", high=9.0, lower_is_better=lower_is_better)
        super().__init__(value if value is None else self.size.score(value, num_examples=6))

    def measure(self, task: TaskConfig) -> Measure:
        return self.size


@pytest.mark.parametrize(
    ("value", "lower_is_better", "loss"),
    [
        (2.5, False, -2.5),
        (2.5, True, 2.5),
        (9.0, False, -9.0),
        (0.0, False, 0.0),  # and not -0
        (9.5, True, math.nan),
        (-0.5, False, math.nan),
        (math.nan, False, math.nan),
    ],
)
def test_a_value_that_is_trained_is_lower_where_it_is_better(value: float, lower_is_better: bool, loss: float) -> None:
    evaluator = Sizes(value, lower_is_better=lower_is_better)

    assert str(value_as_loss(evaluator, tiny_loaded(), ROWS, TASK, tokens_per_batch=8)) == str(loss)


def test_what_is_no_score_cannot_be_trained() -> None:
    class Silent(Sizes):
        def evaluate(self, *given: Any, **limits: Any) -> Any:
            return 0.5

    with pytest.raises(PluginError, match=r"Silent\.evaluate must give a fedzo\.records\.scores\.Score, got 0\.5"):
        value_as_loss(Silent(None), tiny_loaded(), ROWS, TASK, tokens_per_batch=8)


def test_the_losses_of_a_run_are_named_after_the_value_that_it_trains() -> None:
    large, small = Sizes(1.0), Sizes(1.0, lower_is_better=True)
    task = TaskConfig(loss=Loss.score)

    assert loss_name(TASK, {"large": large}) == loss_name(TASK, {}) == "loss"
    assert loss_name(task, {"large": large, "small": small}) == "loss (-size)"
    assert loss_name(task, {"small": small, "large": large}) == "loss (size)"
