"""Scores, from hand-made numbers and from tiny models."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedzo.data.config import Loss, TaskConfig, TaskKind
from fedzo.data.encode import Example
from fedzo.data.encode import encode as encode_rows
from fedzo.evaluate.answers import Answers, AnswersConfig, score_candidates
from fedzo.evaluate.base import evaluate, merge_scores
from fedzo.models.generate import generate
from fedzo.models.scoring import candidate_scores, mean_loss
from fedzo.records.decode import encode
from fedzo.system import warn_once
from fedzo.testing.tiny_models import FAMILIES, tiny_loaded

ANSWERS = Answers(AnswersConfig())
CHOICES = [Example((1 + i, 5, 9), ((7,), (8 + i,)), i % 2) for i in range(6)]
TEXTS = [Example((65 + i, 66, 67), ((70, 71),), 0, references=("fg",)) for i in range(3)]


def test_a_score_by_hand() -> None:
    scores = np.array([[0.0, -1.0], [0.0, -1.0], [-2.0, 0.0], [-1.0, 0.0]], dtype=np.float32)

    score = score_candidates(scores, [0, 1, 1, 0], loss=Loss.candidates)

    assert (score.metric, score.value, score.num_examples) == ("accuracy", 0.5, 4)
    assert score.per_class == {0: (1, 2), 1: (1, 2)}
    wrong, right_one, right_two = (math.log(1 + math.exp(x)) for x in (1, -1, -2))
    assert score.loss == pytest.approx((2 * wrong + right_one + right_two) / 4, abs=1e-6)
    assert score.auc == 0.625  # margins -1, -1, 2, 1 of labels 0, 1, 1, 0: 2 pairs right, 1 tied, 1 wrong
    assert score.best_threshold_accuracy == 0.75


@pytest.mark.parametrize("loss", list(Loss))
def test_of_equal_scores_the_first_candidate_is_the_answer(loss: Loss) -> None:
    """As in numpy's argmax, by which others score; an area under the curve counts a tie one half."""
    score = score_candidates(np.full((2, 2), -1.0, np.float32), [0, 1], loss=loss)

    assert (score.value, score.per_class, score.auc) == (0.5, {0: (1, 1), 1: (0, 1)}, 0.5)


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


@pytest.mark.parametrize("loss", [Loss.candidates, Loss.lm])
@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_agrees_with_scores_and_training_loss(family: str, loss: Loss) -> None:
    loaded = tiny_loaded(family)
    best = candidate_scores(loaded, CHOICES, tokens_per_batch=256).argmax(axis=1)

    score = ANSWERS.evaluate(loaded, CHOICES, TaskConfig(loss=loss), tokens_per_batch=16)

    assert score.value == np.mean(best == [example.label for example in CHOICES])
    assert score.loss == pytest.approx(mean_loss(loaded, CHOICES, loss=loss, tokens_per_batch=256), abs=1e-5)
    assert sum(total for _, total in score.per_class.values()) == 6


@pytest.mark.parametrize("loss", [Loss.candidates, Loss.lm])
def test_rows_that_list_their_own_candidates_are_scored_without_classes(loss: Loss) -> None:
    """The oracle reads each sequence alone, and knows neither padding nor shared prompts."""
    task = TaskConfig(template="{q}:", candidates=[" {c}"], label="a", loss=loss)
    rows: list[dict[str, Any]] = [
        {"q": "one", "c": ["ab", "c", "def"], "a": 2},
        {"q": "another", "c": ["g", "hi", "jkl", "m"], "a": 1},
        {"q": "third", "c": ["n", "op"], "a": 0},
    ]
    loaded = tiny_loaded()
    examples = encode_rows(rows, task, tokenizer=loaded.tokenizer, max_length=64)
    losses, right = [], []
    for row in rows:
        start, scores = len(row["q"]) + 1, []  # a token is a byte
        for choice in row["c"]:
            ids = loaded.tokenizer(f"{row['q']}: {choice}")["input_ids"]
            with torch.no_grad():
                logprobs = loaded.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            scores.append(np.mean([float(logprobs[at - 1, ids[at]]) for at in range(start, len(ids))]))
        normaliser = np.log(np.exp(scores).sum()) if loss is Loss.candidates else 0.0
        losses.append(normaliser - scores[row["a"]])
        right.append(int(np.argmax(scores)) == row["a"])

    score = evaluate("answers", ANSWERS, loaded, examples, task, tokens_per_batch=64)

    assert score.value == pytest.approx(np.mean(right))
    assert score.loss == pytest.approx(np.mean(losses), abs=1e-5)
    assert score.per_class == {}


def test_two_answers_that_mean_something_else_in_each_row_have_no_auc() -> None:
    scores = np.array([[0.0, -1.0], [0.0, -1.0], [-2.0, 0.0], [-1.0, 0.0]], dtype=np.float32)

    by_label, alone = (score_candidates(scores, [0, 1, 1, 0], loss=Loss.lm, by_label=each) for each in (True, False))

    assert alone == replace(by_label, per_class={}, auc=None, best_threshold_accuracy=None)
    assert by_label.auc is not None


@pytest.mark.parametrize(("kind", "metric"), [(TaskKind.generation, "token_f1"), (TaskKind.instruction, "rouge_l")])
def test_written_answers_are_compared_with_the_reference(kind: TaskKind, metric: str) -> None:
    loaded = tiny_loaded()
    prompts = [example.prompt for example in TEXTS]
    answers = generate(
        loaded, prompts, max_new_tokens=5, tokens_per_batch=64, stop_at_newline=kind is TaskKind.generation
    )
    told = [Example(e.prompt, e.candidates, 0, references=(a,)) for e, a in zip(TEXTS, answers, strict=True)]
    task = TaskConfig(kind=kind, loss=Loss.lm, max_new_tokens=5)

    score = ANSWERS.evaluate(loaded, [*told[:1], *TEXTS[1:]], task, tokens_per_batch=64)
    alone = ANSWERS.evaluate(loaded, TEXTS[1:], task, tokens_per_batch=64)

    assert score.metric == metric
    assert score.loss == pytest.approx(mean_loss(loaded, TEXTS, loss=Loss.lm, tokens_per_batch=64), abs=1e-5)
    own = ANSWERS.evaluate(loaded, told[:1], task, tokens_per_batch=64).value
    assert score.value == pytest.approx((own + 2 * alone.value) / 3)


def test_where_the_value_is_trained_no_forward_is_spent_on_another_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedzo.models.generate.generate", lambda *given, **limits: ["fg", "fg", "x"])
    loaded, task = tiny_loaded(), TaskConfig(kind=TaskKind.generation, loss=Loss.score, max_new_tokens=5)
    before = loaded.counter.num_forwards

    score = evaluate("answers", ANSWERS, loaded, TEXTS, task, tokens_per_batch=64)

    assert (score.value, score.loss) == (pytest.approx(2 / 3), None)
    assert loaded.counter.num_forwards == before
    choices = ANSWERS.evaluate(loaded, CHOICES, TaskConfig(loss=Loss.score), tokens_per_batch=64)
    own = mean_loss(loaded, CHOICES, loss=Loss.candidates, tokens_per_batch=256)
    assert choices.loss == pytest.approx(own, abs=1e-5)  # which costs nothing


def test_an_answer_is_written_from_the_generation_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is another than the loss's where the right answer is long."""
    asked: list[tuple[int, ...]] = []

    def written(loaded: object, prompts: list[tuple[int, ...]], **limits: object) -> list[str]:
        asked.extend(prompts)
        return ["fg"] * len(prompts)

    monkeypatch.setattr("fedzo.models.generate.generate", written)
    rows = [TEXTS[0], Example((67,), ((70, 71),), 0, references=("fg",), written_from=(66, 67))]
    task = TaskConfig(kind=TaskKind.generation, loss=Loss.lm, max_new_tokens=5)

    score = ANSWERS.evaluate(tiny_loaded(), rows, task, tokens_per_batch=64)

    assert asked == [(65, 66, 67), (66, 67)]
    assert score.value == 1.0


@pytest.mark.parametrize(
    ("kind", "value", "numbers"),
    [
        (TaskKind.generation, (0.8 + 1) / 2, {"exact_match": 0.5}),
        (TaskKind.instruction, (2 / 3 + 1) / 2, {}),
    ],
)
def test_of_several_right_answers_the_nearest_counts(
    kind: TaskKind, value: float, numbers: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of "the black cat" and "black cat sat" F1 is 4/5, without the article, and ROUGE-L 2/3, with it."""
    monkeypatch.setattr("fedzo.models.generate.generate", lambda *given, **limits: ["the black cat", "Oslo."])
    right = [("dog", "black cat sat", "black bird"), ("in Oslo", "Oslo", "Bergen")]
    rows = [Example((65 + i, 66), ((70, 71),), 0, references=texts) for i, texts in enumerate(right)]
    task = TaskConfig(kind=kind, loss=Loss.lm, max_new_tokens=5)

    score = evaluate("answers", ANSWERS, tiny_loaded(), rows, task, tokens_per_batch=64)
    last = evaluate(
        "answers", ANSWERS, tiny_loaded(), [replace(rows[0], references=("dog",)), rows[1]], task, tokens_per_batch=64
    )

    assert score.value == pytest.approx(value)
    assert score.numbers == pytest.approx(numbers)
    assert last.value == 0.5
    assert score.loss == last.loss  # of the first answer alone, which is the example's candidate


@pytest.mark.parametrize(
    ("kind", "num_tokens", "references", "told"),
    [
        (TaskKind.generation, 6, ("a b",), None),  # 5 tokens, and the one of the line's end
        (TaskKind.generation, 7, ("a b",), None),  # and the one that this tokenizer puts behind every text
        (TaskKind.generation, 6, ("a\nb", "ab"), None),
        (TaskKind.generation, 6, ("a\nb", "b\na"), "the score of task.kind=generation reads one line"),
        (TaskKind.generation, 8, ("a b", "b"), None),  # the shorter one can be written
        (TaskKind.generation, 8, ("a b",), r"more tokens than may be written \(task\.max_new_tokens=5\)"),
        (TaskKind.instruction, 7, ("a\nb",), None),  # as chat templates have it that write a blank before the end
        (TaskKind.instruction, 8, ("a\nb",), r"more tokens than may be written \(task\.max_new_tokens=5\)"),
    ],
)
def test_right_answers_that_nothing_can_match_are_told_of_once(
    kind: TaskKind,
    num_tokens: int,
    references: tuple[str, ...],
    told: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("fedzo.models.generate.generate", lambda loaded, prompts, **limits: ["x"] * len(prompts))
    rows = [TEXTS[0], Example((65, 66), (tuple(range(70, 70 + num_tokens)),), 0, references=references)]
    task = TaskConfig(name="mine", kind=kind, loss=Loss.lm, max_new_tokens=5)
    warn_once.cache_clear()

    for _ in range(2):
        ANSWERS.evaluate(tiny_loaded(), rows, task, tokens_per_batch=64)

    assert len(caplog.messages) == (told is not None)
    assert all(re.match(f"task 'mine': .*{told}", message) for message in caplog.messages)


@pytest.mark.parametrize("answer", ["fg", "<think>\n\n</think>\n\nfg", "Hm, gf?\n</think>\nfg"])
def test_what_stands_behind_a_thought_is_judged(answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[object] = []

    def written(loaded: object, prompts: list[tuple[int, ...]], **limits: object) -> list[str]:
        ends.append(limits["ends"])
        return [answer] * len(prompts)

    monkeypatch.setattr("fedzo.models.generate.generate", written)
    task = TaskConfig(kind=TaskKind.instruction, loss=Loss.lm, max_new_tokens=5)

    assert ANSWERS.evaluate(tiny_loaded(), TEXTS, task, tokens_per_batch=64).value == 1.0
    assert ends == [{2}]  # the end of a turn in the chat template


def test_scores_of_clients_merge_to_the_score_of_all_examples() -> None:
    loaded = tiny_loaded()
    task = TaskConfig()
    whole = ANSWERS.evaluate(loaded, CHOICES, task, tokens_per_batch=64)

    parts = [
        ANSWERS.evaluate(loaded, part, task, tokens_per_batch=64) for part in (CHOICES[:1], CHOICES[1:4], CHOICES[4:])
    ]
    merged = merge_scores(parts)

    assert merged.value == pytest.approx(whole.value)
    assert merged.loss == pytest.approx(whole.loss, abs=1e-6)
    assert (merged.num_examples, merged.per_class) == (6, whole.per_class)
    assert (merged.auc, merged.best_threshold_accuracy) == (None, None)


def test_progress_reaches_the_end() -> None:
    calls: list[tuple[int, int]] = []

    ANSWERS.evaluate(tiny_loaded(), CHOICES, TaskConfig(), tokens_per_batch=6, on_batch=lambda *at: calls.append(at))

    assert calls[-1] == (6, 6)
    assert len(calls) >= 3
