"""The evaluator ``answers``: accuracy, token F1 with exact match, or ROUGE-L, as the kind of the task asks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedzo.data.chat import after_thought
from fedzo.data.config import Loss, TaskConfig, TaskKind
from fedzo.data.encode import Example
from fedzo.data.tasks import has_labels
from fedzo.evaluate.base import EVALUATORS, EvaluatorConfig, Measure
from fedzo.evaluate.metrics import auc, best_threshold_accuracy, exact_match, rouge_l, token_f1
from fedzo.models.loaded import LoadedModel
from fedzo.models.plan import forward_cost
from fedzo.models.scoring import candidate_scores, choice_losses, mean_loss
from fedzo.records.scores import Score, known
from fedzo.system import OnProgress, warn_once

log = logging.getLogger(__name__)

_METRICS = {TaskKind.candidates: "accuracy", TaskKind.generation: "token_f1", TaskKind.instruction: "rouge_l"}
_EXACT_MATCH = "exact_match"


@dataclass(kw_only=True, slots=True)
class AnswersConfig(EvaluatorConfig):
    """Accuracy, token F1 with exact match, or ROUGE-L of the answers, by ``task.kind``."""


@EVALUATORS.register("answers", AnswersConfig)
@dataclass(frozen=True, slots=True)
class Answers:
    """Candidates by accuracy, written answers by the first line's token F1, answers to instructions by ROUGE-L.

    Where a row has several right answers, the one that the written one comes nearest to counts, for each measure alone.
    """

    config: AnswersConfig

    def measure(self, task: TaskConfig) -> Measure:
        """The metric of the task's kind, 0 to 1; beside token F1 the share of exact matches."""
        numbers = {_EXACT_MATCH: (0.0, 1.0)} if task.kind is TaskKind.generation else {}
        return Measure(metric=_METRICS[task.kind], numbers=numbers)

    def evaluate(
        self,
        loaded: LoadedModel,
        examples: Sequence[Example],
        task: TaskConfig,
        *,
        tokens_per_batch: int,
        on_batch: OnProgress | None = None,
    ) -> Score:
        """The score, with the task's loss; ``on_batch`` counts answers where they are written.

        Of ``task.loss=score``, candidates have their own loss, and written answers none.
        """
        if task.kind is not TaskKind.candidates:
            return self._written(loaded, examples, task, tokens_per_batch=tokens_per_batch, on_batch=on_batch)
        scores = candidate_scores(
            loaded,
            examples,
            tokens_per_batch=tokens_per_batch,
            full_vocabulary=task.loss is Loss.lm,
            forward_cost_tokens=forward_cost(loaded.device),
            on_batch=on_batch,
        )
        labels = [example.label for example in examples]
        return score_candidates(scores, labels, loss=task.loss, by_label=has_labels(task))

    def _written(
        self,
        loaded: LoadedModel,
        examples: Sequence[Example],
        task: TaskConfig,
        *,
        tokens_per_batch: int,
        on_batch: OnProgress | None,
    ) -> Score:
        from fedzo.models.generate import answer_ends, generate  # slow to import

        _tell_of_unwritable(examples, task)
        written = task.kind is TaskKind.generation
        answers = generate(
            loaded,
            [example.generation_prompt for example in examples],
            max_new_tokens=task.max_new_tokens,
            tokens_per_batch=tokens_per_batch,
            ends=answer_ends(loaded.tokenizer, task.kind),
            stop_at_newline=written,
            on_batch=on_batch,
        )
        judged = [
            (after_thought(answer), [after_thought(right) for right in example.references])
            for answer, example in zip(answers, examples, strict=True)
        ]
        loss: float | None = None
        if task.loss is not Loss.score:  # else the value is the loss, and no forward is spent on another one
            loss = mean_loss(
                loaded,
                examples,
                loss=Loss.lm,
                tokens_per_batch=tokens_per_batch,
                forward_cost_tokens=forward_cost(loaded.device),
            )
        value = _mean_best(token_f1 if written else rouge_l, judged)
        numbers = {_EXACT_MATCH: _mean_best(exact_match, judged)} if written else {}
        return self.measure(task).score(value, loss=loss, num_examples=len(examples), numbers=numbers)


def _tell_of_unwritable(examples: Sequence[Example], task: TaskConfig) -> None:
    """Warn of right answers that no written one can match, since a low score does not tell them from a poor model."""
    if task.kind is TaskKind.generation and any(all("\n" in right for right in row.references) for row in examples):
        warn_once(
            log,
            f"task {task.name!r}: the score of task.kind=generation reads one line, but each right answer of some rows "
            "has several, so nothing can match it. Join the lines, or write task.kind=instruction for a chat model.",
        )
    most = task.max_new_tokens + 2  # beside the line's end and what the tokenizer or the chat template puts behind it
    if any(len(row.references) == 1 and len(row.candidates[0]) > most for row in examples):
        warn_once(
            log,
            f"task {task.name!r}: the right answer of some rows has more tokens than may be written "
            f"(task.max_new_tokens={task.max_new_tokens}), so nothing can match all of it. Raise task.max_new_tokens.",
        )


def _mean_best(measure: Callable[[str, str], float], judged: Sequence[tuple[str, Sequence[str]]]) -> float:
    """The mean over answers, each measured against the right one that it comes nearest to."""
    return float(np.mean([max(measure(answer, right) for right in rights) for answer, rights in judged]))


def score_candidates(
    scores: npt.NDArray[np.float32], labels: Sequence[int], *, loss: Loss, by_label: bool = True
) -> Score:
    """The score of candidate scores [num_examples, candidates] against the right candidates; ties go to the first.

    ``by_label`` is whether a candidate's number means the same in all rows. Otherwise there are no classes and no AUC.
    """
    wanted = np.asarray(labels)
    right = scores.argmax(axis=1) == wanted
    right &= np.isfinite(scores[np.arange(len(wanted)), wanted])
    losses = -scores[np.arange(len(wanted)), wanted] if loss is Loss.lm else choice_losses(scores, labels)
    two = by_label and scores.shape[1] == 2 and bool(np.isfinite(scores).all())
    margin = scores[:, 1] - scores[:, 0] if two else None
    return Score(
        metric=_METRICS[TaskKind.candidates],
        value=float(right.mean()),
        loss=known(float(losses.mean(dtype=np.float64))),
        num_examples=len(wanted),
        per_class={
            int(c): (int(right[wanted == c].sum()), int((wanted == c).sum())) for c in np.unique(wanted) if by_label
        },
        auc=None if margin is None else auc(margin, wanted),
        best_threshold_accuracy=None if margin is None else best_threshold_accuracy(margin, wanted),
    )
