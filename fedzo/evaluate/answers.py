"""Scores of a model on examples: accuracy, token F1, ROUGE-L."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedzo.data.config import Loss, TaskConfig, TaskKind
from fedzo.data.example import Example
from fedzo.errors import ConfigError, ProtocolError
from fedzo.evaluate.metrics import auc, best_threshold_accuracy, rouge_l, token_f1
from fedzo.models.forwards import OnBatch
from fedzo.models.generate import generate
from fedzo.models.load import LoadedModel
from fedzo.models.plan import forward_cost
from fedzo.models.scoring import candidate_scores, choice_losses, mean_loss
from fedzo.records.decode import decode, parse_json
from fedzo.records.metrics import Score, known


def score_of_peer(text: str, *, metric: str, most_examples: int, num_labels: int) -> Score | None:
    """The score that a peer sent as JSON; None for the empty object of a peer without rows.

    Args:
        text: The JSON; nothing in it is trusted.
        metric: What the peer was asked for (``metric_of``).
        most_examples: How many rows it was asked to score at most.
        num_labels: How many labels the task has; 0 where it has none.

    Raises:
        ProtocolError: It is no score, or none of what the peer was asked for.
    """
    record = parse_json(text, where="a score", error=ProtocolError)
    if record == {}:
        return None
    score = decode(Score, record, where="a score", error=ProtocolError)
    if score.metric != metric or score.num_examples > most_examples:
        raise ProtocolError(
            f"a score must be of {metric} of 1 to {most_examples} examples, got {score.metric:.80} of "
            f"{score.num_examples}"
        )
    if stray := [label for label in score.per_class if label >= num_labels]:
        raise ProtocolError(f"a score's classes must be of {num_labels} labels, got {stray[0]}")
    return score


def metric_of(kind: TaskKind) -> str:
    """By what answers of this kind are judged."""
    return {TaskKind.candidates: "accuracy", TaskKind.generation: "token_f1", TaskKind.instruction: "rouge_l"}[kind]


def evaluate(
    loaded: LoadedModel,
    examples: Sequence[Example],
    task: TaskConfig,
    *,
    tokens_per_batch: int,
    on_batch: OnBatch | None = None,
) -> Score:
    """Score a model on examples.

    Args:
        loaded: The model.
        examples: At least one.
        task: Says how answers are judged: ``candidates`` by accuracy, ``generation`` by token F1 of the first line that
            the model writes, ``instruction`` by ROUGE-L of its whole answer.
        tokens_per_batch: Most tokens in one forward.
        on_batch: Called with sequences (answers, when they are written) done and in total.

    Returns:
        The score.

    Raises:
        ConfigError: There is no example.
    """
    if not examples:
        raise ConfigError("evaluate needs at least one example, got none. Check the split's size.")
    if task.kind is not TaskKind.candidates:
        return _score_answers(loaded, examples, task, tokens_per_batch=tokens_per_batch, on_batch=on_batch)
    scores = candidate_scores(
        loaded,
        examples,
        tokens_per_batch=tokens_per_batch,
        full_vocabulary=task.loss is Loss.lm,
        forward_cost_tokens=forward_cost(loaded.device),
        on_batch=on_batch,
    )
    return score_candidates(scores, [example.label for example in examples], loss=task.loss)


def score_candidates(scores: npt.NDArray[np.float32], labels: Sequence[int], *, loss: Loss) -> Score:
    """The score of candidate scores [num_examples, candidates] against the right candidates; ties go to the first."""
    wanted = np.asarray(labels)
    right = scores.argmax(axis=1) == wanted
    right &= np.isfinite(scores[np.arange(len(wanted)), wanted])
    losses = -scores[np.arange(len(wanted)), wanted] if loss is Loss.lm else choice_losses(scores, labels)
    two = scores.shape[1] == 2 and bool(np.isfinite(scores).all())
    margin = scores[:, 1] - scores[:, 0] if two else None
    return Score(
        metric=metric_of(TaskKind.candidates),
        value=float(right.mean()),
        loss=known(float(losses.mean(dtype=np.float64))),
        num_examples=len(wanted),
        per_class={int(c): (int(right[wanted == c].sum()), int((wanted == c).sum())) for c in np.unique(wanted)},
        auc=None if margin is None else auc(margin, wanted),
        best_threshold_accuracy=None if margin is None else best_threshold_accuracy(margin, wanted),
    )


def merge_scores(scores: Sequence[Score]) -> Score:
    """The score of all examples together, from the parts that clients report; AUC and best threshold are ``None``.

    The loss is that of the parts that have one.

    Raises:
        ConfigError: There is no score, or they are of different metrics.
    """
    metrics = {score.metric for score in scores}
    if len(metrics) != 1:
        raise ConfigError(f"scores to merge must share one metric, got {sorted(metrics) or 'none'}.")
    weights = np.array([score.num_examples for score in scores], dtype=np.float64)
    losses = [(score.loss, score.num_examples) for score in scores if score.loss is not None]
    per_class: dict[int, tuple[int, int]] = {}
    for score in scores:
        for label, (right, total) in score.per_class.items():
            before = per_class.get(label, (0, 0))
            per_class[label] = (before[0] + right, before[1] + total)
    return Score(
        metric=metrics.pop(),
        value=float(np.dot(weights, [score.value for score in scores]) / weights.sum()),
        loss=_mean(losses),
        num_examples=int(weights.sum()),
        per_class=dict(sorted(per_class.items())),
    )


def _mean(losses: Sequence[tuple[float, int]]) -> float | None:
    if not losses:
        return None
    values, weights = np.array(losses, dtype=np.float64).T.copy()
    return float(np.dot(weights, values) / weights.sum())


def _score_answers(
    loaded: LoadedModel,
    examples: Sequence[Example],
    task: TaskConfig,
    *,
    tokens_per_batch: int,
    on_batch: OnBatch | None,
) -> Score:
    written = task.kind is TaskKind.generation
    answers = generate(
        loaded,
        [example.prompt for example in examples],
        max_new_tokens=task.max_new_tokens,
        tokens_per_batch=tokens_per_batch,
        stop_at_newline=written,
        on_batch=on_batch,
    )
    judge = token_f1 if written else rouge_l
    values = [judge(answer, example.reference) for answer, example in zip(answers, examples, strict=True)]
    cost = forward_cost(loaded.device)
    loss = mean_loss(loaded, examples, loss=Loss.lm, tokens_per_batch=tokens_per_batch, forward_cost_tokens=cost)
    return Score(
        metric=metric_of(task.kind), value=float(np.mean(values)), loss=known(loss), num_examples=len(examples)
    )
