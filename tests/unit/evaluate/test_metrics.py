"""Scores against hand computations and slow twins."""

from __future__ import annotations

import string

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from fedzo.evaluate.metrics import auc, best_threshold_accuracy, exact_match, normalize_answer, rouge_l, token_f1

SCORED = st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 1)), min_size=1, max_size=30)


def test_answers_are_normalised_as_squad_does() -> None:
    assert normalize_answer(" The  U.S.-based\nAnt, and a theatre!") == "usbased ant and theatre"


@pytest.mark.parametrize(
    ("prediction", "reference", "f1"),
    [
        ("The cat.", "cat", 1.0),
        ("a black cat", "the cat", 2 / 3),  # precision 1/2, recall 1
        ("cat cat", "cat dog", 0.5),  # one of two words shared each way: bags, not sets
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("cat", "the", 0.0),
        ("the", "a", 1.0),
        ("", "", 1.0),  # both say nothing, as SQuAD 2.0 has it
        ("北京", "北京\u3002", 1.0),
        ("北京", "北平", 0.5),
        ("北京 2008", "in 北京", 2 / 3),  # both signs are shared, of three words each
    ],
)
def test_token_f1_by_hand(prediction: str, reference: str, f1: float) -> None:
    assert token_f1(prediction, reference) == pytest.approx(f1)
    assert token_f1(reference, prediction) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("prediction", "reference", "match"),
    [
        ("The Cat!", "cat", 1.0),
        (" an  ice-cream\t", "icecream", 1.0),
        ("black cat", "cat black", 0.0),  # the words are the same, their order is not
        ("cat cat", "cat", 0.0),
        ("athe cat", "cat", 0.0),  # an article is a whole word
        ("U.S.", "us", 1.0),
        ("", "the", 1.0),
        ("", "cat", 0.0),
        ("北京\u3002", "北京", 1.0),
        ("京北", "北京", 0.0),
    ],
)
def test_exact_match_by_hand(prediction: str, reference: str, match: float) -> None:
    assert exact_match(prediction, reference) == exact_match(reference, prediction) == match


def as_squad(text: str) -> list[str]:
    """SQuAD's normalisation, one rule after another: signs are dropped before words are seen."""
    kept = "".join(sign for sign in text.lower() if sign not in set(string.punctuation))
    return [word for word in kept.split() if word not in ("a", "an", "the")]


ANSWER = st.lists(st.sampled_from(["a", "The", "an", "cat", "Cat.", "the-cat", "x", "3.5", "!", " "]), max_size=5)


@given(ANSWER, ANSWER)
def test_written_answers_are_measured_as_by_squads_script(said: list[str], right: list[str]) -> None:
    prediction, reference = " ".join(said), " ".join(right)
    left, shared = as_squad(reference), 0
    for word in as_squad(prediction):
        if word in left:
            left.remove(word)
            shared += 1
    precision, recall = (shared / max(1, len(as_squad(text))) for text in (prediction, reference))
    f1 = 2 * precision * recall / (precision + recall) if shared else float(as_squad(prediction) == as_squad(reference))

    assert exact_match(prediction, reference) == float(as_squad(prediction) == as_squad(reference))
    assert token_f1(prediction, reference) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("prediction", "reference", "value"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("the cat sat", "the dog sat", 2 / 3),
        ("sat cat", "cat sat", 0.5),  # the longest common subsequence is one word
        ("police killed the gunman", "police kill the gunman", 0.75),  # no stemming
        ("", "cat", 0.0),
        ("Кот сидел.", "кот сидел", 1.0),
        ("北京是首都", "北京是首都", 1.0),
        ("北京", "北平", 0.5),
        ("नमस्ते दुनिया", "नमस्ते", 2 / 3),
        ("यह दिल्ली है\u0964", "यह दिल्ली है", 1.0),  # a sentence ends otherwise in each script
        ("यह दिल्ली है\u0964", "यह दिल्ली था", 2 / 3),
        ("هل هذا صحيح\u061f نعم\u060c هذا", "هل هذا صحيح نعم هذا", 1.0),
        ("یہ سچ ہے\u06d4", "یہ سچ ہے", 1.0),
        ("ճիշտ է\u0589", "ճիշտ է", 1.0),
        ("זה נכון\u05c3", "זה נכון", 1.0),
        ("ይህ እውነት ነው\u1362", "ይህ እውነት ነው", 1.0),
        ("ရန်ကုန်\u104b", "ရန်ကုန်", 1.0),
        ("ភ្នំពេញ\u17d4", "ភ្នំពេញ", 1.0),
        ("une tasse de café", "une tasse de cafe", 0.75),
    ],
)
def test_rouge_l_by_hand(prediction: str, reference: str, value: float) -> None:
    assert rouge_l(prediction, reference) == pytest.approx(value)


@given(st.lists(st.sampled_from(["a", "cat", "Cat2", "it's", "x_y", "-", "3.5", "\n", "#tag", "e-mail"]), max_size=12))
def test_rouge_l_of_ascii_is_the_packages_own(words: list[str]) -> None:
    reference = "a cat, it's 3.5: x_y e-mail #tag Cat2"
    theirs = RougeScorer(["rougeL"]).score(reference, " ".join(words))["rougeL"].fmeasure

    assert rouge_l(" ".join(words), reference) == theirs


def test_auc_by_hand() -> None:
    assert auc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]) == 0.75
    assert auc([1.0, 1.0], [0, 1]) == 0.5
    assert auc([2.0, 1.0], [0, 1]) == 0.0


@given(SCORED)
def test_auc_is_the_share_of_pairs_in_order(scored: list[tuple[int, int]]) -> None:
    positive, negative = ([score for score, label in scored if label == wanted] for wanted in (1, 0))

    value = auc([score for score, _ in scored], [label for _, label in scored])

    if not positive or not negative:
        assert value is None
    else:
        pairs = [(p > n) + (p == n) / 2 for p in positive for n in negative]
        assert value == pytest.approx(sum(pairs) / len(pairs))


@given(SCORED)
def test_best_threshold_accuracy_is_the_best_of_all_thresholds(scored: list[tuple[int, int]]) -> None:
    scores, labels = zip(*scored, strict=True)
    thresholds = [-4.5 + step for step in range(10)]  # one between any two scores, one below, one above

    slow = max(sum((score > t) == bool(label) for score, label in scored) for t in thresholds) / len(scored)

    assert best_threshold_accuracy(scores, labels) == pytest.approx(slow)


def test_infinite_scores_keep_their_order() -> None:
    assert auc([-np.inf, 0.0, np.inf], [0, 1, 1]) == 1.0
    assert best_threshold_accuracy([-np.inf, 0.0, np.inf], [0, 1, 1]) == 1.0


def test_scores_that_are_not_numbers_give_none() -> None:
    assert auc([np.nan, 1.0], [0, 1]) is None
    assert best_threshold_accuracy([np.nan, 1.0], [0, 1]) is None
    assert best_threshold_accuracy([], []) is None


def test_float32_arrays_are_fine() -> None:
    scores = np.array([0.5, -0.5, 0.25], dtype=np.float32)

    assert auc(scores, np.array([1, 0, 0])) == 1.0
