"""Scores, from hand-made numbers and from tiny models."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from fedzo.data.config import Loss, TaskConfig, TaskKind
from fedzo.data.example import Example
from fedzo.errors import ConfigError, ProtocolError
from fedzo.evaluate.answers import evaluate, merge_scores, score_candidates, score_of_peer
from fedzo.models.generate import generate
from fedzo.models.scoring import candidate_scores, mean_loss
from fedzo.records.decode import encode
from fedzo.records.metrics import Score
from fedzo.testing.tiny_models import FAMILIES, tiny_loaded

CHOICES = [Example((1 + i, 5, 9), ((7,), (8 + i,)), i % 2) for i in range(6)]
TEXTS = [Example((65 + i, 66, 67), ((70, 71),), 0, reference="fg") for i in range(3)]


def test_a_score_by_hand() -> None:
    scores = np.array([[0.0, -1.0], [0.0, -1.0], [-2.0, 0.0], [-1.0, 0.0]], dtype=np.float32)

    score = score_candidates(scores, [0, 1, 1, 0], loss=Loss.candidates)

    assert (score.metric, score.value, score.num_examples) == ("accuracy", 0.5, 4)
    assert score.per_class == {0: (1, 2), 1: (1, 2)}
    wrong, right_one, right_two = (math.log(1 + math.exp(x)) for x in (1, -1, -2))
    assert score.loss == pytest.approx((2 * wrong + right_one + right_two) / 4, abs=1e-6)
    assert score.auc == 0.625  # margins -1, -1, 2, 1 of labels 0, 1, 1, 0: 2 pairs right, 1 tied, 1 wrong
    assert score.best_threshold_accuracy == 0.75


def test_the_lm_loss_is_that_of_the_right_answer() -> None:
    scores = np.array([[-3.0, -1.0, -np.inf], [-2.0, -4.0, -5.0]], dtype=np.float32)

    score = score_candidates(scores, [1, 2], loss=Loss.lm)

    assert (score.loss, score.value) == (3.0, 0.5)
    assert (score.auc, score.best_threshold_accuracy) == (None, None)


def test_numbers_that_are_not_finite_are_never_right_and_travel_as_null() -> None:
    scores = np.full((2, 2), np.nan, dtype=np.float32)

    record = encode(score_candidates(scores, [0, 1], loss=Loss.candidates))

    assert record == json.loads(json.dumps(record, allow_nan=False))
    assert (record["value"], record["loss"], record["auc"]) == (0.0, None, None)


@pytest.mark.parametrize("loss", list(Loss))
@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_agrees_with_scores_and_training_loss(family: str, loss: Loss) -> None:
    loaded = tiny_loaded(family)
    best = candidate_scores(loaded, CHOICES, tokens_per_batch=256).argmax(axis=1)

    score = evaluate(loaded, CHOICES, TaskConfig(loss=loss), tokens_per_batch=16)

    assert score.value == np.mean(best == [example.label for example in CHOICES])
    assert score.loss == pytest.approx(mean_loss(loaded, CHOICES, loss=loss, tokens_per_batch=256), abs=1e-5)
    assert sum(total for _, total in score.per_class.values()) == 6


@pytest.mark.parametrize(("kind", "metric"), [(TaskKind.generation, "token_f1"), (TaskKind.instruction, "rouge_l")])
def test_written_answers_are_compared_with_the_reference(kind: TaskKind, metric: str) -> None:
    loaded = tiny_loaded()
    prompts = [example.prompt for example in TEXTS]
    answers = generate(
        loaded, prompts, max_new_tokens=5, tokens_per_batch=64, stop_at_newline=kind is TaskKind.generation
    )
    told = [Example(e.prompt, e.candidates, 0, reference=a) for e, a in zip(TEXTS, answers, strict=True)]
    task = TaskConfig(kind=kind, loss=Loss.lm, max_new_tokens=5)

    score = evaluate(loaded, [*told[:1], *TEXTS[1:]], task, tokens_per_batch=64)
    alone = evaluate(loaded, TEXTS[1:], task, tokens_per_batch=64)

    assert score.metric == metric
    assert score.loss == pytest.approx(mean_loss(loaded, TEXTS, loss=Loss.lm, tokens_per_batch=64), abs=1e-5)
    own = evaluate(loaded, told[:1], task, tokens_per_batch=64).value
    assert score.value == pytest.approx((own + 2 * alone.value) / 3)


def test_scores_of_clients_merge_to_the_score_of_all_examples() -> None:
    loaded = tiny_loaded()
    task = TaskConfig()
    whole = evaluate(loaded, CHOICES, task, tokens_per_batch=64)

    parts = [evaluate(loaded, part, task, tokens_per_batch=64) for part in (CHOICES[:1], CHOICES[1:4], CHOICES[4:])]
    merged = merge_scores(parts)

    assert merged.value == pytest.approx(whole.value)
    assert merged.loss == pytest.approx(whole.loss, abs=1e-6)
    assert (merged.num_examples, merged.per_class) == (6, whole.per_class)
    assert (merged.auc, merged.best_threshold_accuracy) == (None, None)


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


def test_a_part_without_a_loss_leaves_that_of_the_others() -> None:
    parts = [Score("accuracy", 0.5, 2.0, 4), Score("accuracy", 1.0, None, 4), Score("accuracy", 0.5, 1.0, 2)]

    assert merge_scores(parts).loss == pytest.approx((2.0 * 4 + 1.0 * 2) / 6)
    assert merge_scores(parts[1:2]).loss is None


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "inf"},
        {"loss": float("nan")},
        {"value": 1.5},
        {"num_examples": 9},
        {"metric": "rouge_l"},
        {"per_class": {"2": [0, 1]}},
        {"per_class": {"-1": [0, 1]}},
        {"per_class": {"0": [1, 4], "1": [0, 1]}},
        {"per_class": {"0": [2, 1]}},
        {"per_class": [1]},
        {"value": None},
        {"num_examples": 0},
        {"num_examples": 2},
        {"surprise": 1},
    ],
)
def test_what_a_peer_sends_must_be_a_score(changes: dict[str, object]) -> None:
    def read(**changed: object) -> Score | None:
        text = json.dumps({**encode(Score("accuracy", 0.5, 0.7, 4, {0: (1, 2), 1: (1, 2)})), **changed})
        return score_of_peer(text, metric="accuracy", most_examples=8, num_labels=2)

    good = read(loss=None)

    assert good is not None
    assert good.loss is None
    with pytest.raises(ProtocolError, match="a score"):
        read(**changes)


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(ConfigError, match="evaluate needs at least one example, got none"):
        evaluate(tiny_loaded(), [], TaskConfig(), tokens_per_batch=8)
    with pytest.raises(ConfigError, match="must share one metric, got none"):
        merge_scores([])
    with pytest.raises(ConfigError, match=r"must share one metric, got \['accuracy', 'rouge_l'\]"):
        merge_scores([Score("accuracy", 0.0, 0.0, 1), Score("rouge_l", 0.0, 0.0, 1)])


def test_progress_reaches_the_end() -> None:
    calls: list[tuple[int, int]] = []

    evaluate(tiny_loaded(), CHOICES, TaskConfig(), tokens_per_batch=6, on_batch=lambda *at: calls.append(at))

    assert calls[-1] == (6, 6)
    assert len(calls) >= 3
