"""Scores of answers: token F1, exact match, ROUGE-L, area under the ROC curve, accuracy at the best threshold."""

from __future__ import annotations

import re
import string
from collections import Counter
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from fedzo.data.words import BETWEEN, UNSPACED

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WORD = re.compile(rf"[{UNSPACED}]|[^{BETWEEN}{UNSPACED}]+")
_LONE = re.compile(f"[{UNSPACED}]")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """SQuAD's normalisation: lower case, no punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def token_f1(prediction: str, reference: str) -> float:
    """SQuAD's F1 over the normalised words, as bags; two empty answers agree (1), one empty answer does not (0).

    Deviation: SQuAD parts words at spaces alone. Where a text has signs of a script that writes none, each such sign is
    a word, and punctuation of any script is left out.
    """
    predicted, wanted = _words(prediction), _words(reference)
    if not predicted or not wanted:
        return float(predicted == wanted)
    shared = sum((Counter(predicted) & Counter(wanted)).values())
    return 2 * shared / (len(predicted) + len(wanted))


def exact_match(prediction: str, reference: str) -> float:
    """SQuAD's exact match: 1 where the words of ``token_f1`` are the same in the same order, else 0."""
    return float(_words(prediction) == _words(reference))


def _words(text: str) -> list[str]:
    text = normalize_answer(text)
    return _WORD.findall(text) if _LONE.search(text) else text.split()


def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L's F-measure over words (the ``rouge-score`` package, no stemming), 0 to 1.

    Deviation: the package takes whatever is no letter or digit of ASCII for space, and so has no word of most
    languages. Here words are those of any script; where a script writes no spaces, each sign is a word.
    """
    return float(_rouge_scorer().score(reference, prediction)["rougeL"].fmeasure)


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # here, because it imports nltk

    return RougeScorer(["rougeL"], tokenizer=_Words())


class _Words:
    """The ``rouge-score`` package's interface of a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text.lower())


def auc(scores: npt.ArrayLike, labels: npt.ArrayLike) -> float | None:
    """Area under the ROC curve: the chance that a row of label 1 scores above one of label 0, ties counting one half.

    Args:
        scores: Score of label 1 over label 0, [num_examples].
        labels: 0 or 1, [num_examples].

    Returns:
        0 to 1; ``None`` if a label is absent or a score is NaN.
    """
    values, positive = np.asarray(scores, dtype=np.float64), np.asarray(labels) == 1
    num_positive, num_negative = int(positive.sum()), int((~positive).sum())
    if num_positive == 0 or num_negative == 0 or bool(np.isnan(values).any()):
        return None
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # equal scores share their mean rank, from 1
    above = float(ranks[positive].sum()) - num_positive * (num_positive + 1) / 2
    return above / (num_positive * num_negative)


def best_threshold_accuracy(scores: npt.ArrayLike, labels: npt.ArrayLike) -> float | None:
    """The best accuracy of "label 1 where score > t" over all t: what calibration alone could give.

    The threshold is chosen on these very rows, so the figure flatters a little.

    Args:
        scores: Score of label 1 over label 0, [num_examples].
        labels: 0 or 1, [num_examples].

    Returns:
        0 to 1; ``None`` if there is no row or a score is NaN.
    """
    values, positive = np.asarray(scores, dtype=np.float64), np.asarray(labels) == 1
    if values.size == 0 or bool(np.isnan(values).any()):
        return None
    order = np.argsort(values, kind="stable")
    ranked, hits = values[order], positive[order]
    # with the first k rows called 0: right are the zeros among them and the ones after them
    right = np.concatenate(([0], np.cumsum(~hits))) + hits.sum() - np.concatenate(([0], np.cumsum(hits)))
    between = np.concatenate(([True], ranked[1:] != ranked[:-1], [True]))  # a threshold cannot part equal scores
    return float(right[between].max()) / values.size
