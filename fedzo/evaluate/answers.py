"""The evaluator ``answers``: accuracy, token F1 or ROUGE-L of a model's answers, as the kind of the task asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedzo.data.chat import after_thought, chat_end
from fedzo.data.config import Loss, TaskConfig, TaskKind
from fedzo.data.encode import Example
from fedzo.evaluate.base import EVALUATORS, EvaluatorConfig, Measure
from fedzo.evaluate.metrics import auc, best_threshold_accuracy, rouge_l, token_f1
from fedzo.models.loaded import LoadedModel
from fedzo.models.plan import forward_cost
from fedzo.models.scoring import candidate_scores, choice_losses, mean_loss
from fedzo.records.scores import Score, known
from fedzo.system import OnProgress

_METRICS = {TaskKind.candidates: "accuracy", TaskKind.generation: "token_f1", TaskKind.instruction: "rouge_l"}


@dataclass(kw_only=True, slots=True)
class AnswersConfig(EvaluatorConfig):
    """Accuracy, token F1 or ROUGE-L of the answers, by ``task.kind``."""


@EVALUATORS.register("answers", AnswersConfig)
@dataclass(frozen=True, slots=True)
class Answers:
    """Candidates by accuracy, written answers by token F1 of the first line, answers to instructions by ROUGE-L."""

    config: AnswersConfig

    def measure(self, task: TaskConfig) -> Measure:
        """The metric of the task's kind, 0 to 1."""
        return Measure(metric=_METRICS[task.kind])

    def evaluate(
        self,
        loaded: LoadedModel,
        examples: Sequence[Example],
        task: TaskConfig,
        *,
        tokens_per_batch: int,
        on_batch: OnProgress | None = None,
    ) -> Score:
        """The score, with the task's loss; ``on_batch`` counts answers where they are written."""
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
        return score_candidates(scores, [example.label for example in examples], loss=task.loss)

    def _written(
        self,
        loaded: LoadedModel,
        examples: Sequence[Example],
        task: TaskConfig,
        *,
        tokens_per_batch: int,
        on_batch: OnProgress | None,
    ) -> Score:
        from fedzo.models.generate import generate  # slow to import

        written = task.kind is TaskKind.generation
        answers = generate(
            loaded,
            [example.generation_prompt for example in examples],
            max_new_tokens=task.max_new_tokens,
            tokens_per_batch=tokens_per_batch,
            ends=set() if written else chat_end(loaded.tokenizer),
            stop_at_newline=written,
            on_batch=on_batch,
        )
        judge = token_f1 if written else rouge_l
        values = [
            judge(after_thought(answer), after_thought(example.reference))
            for answer, example in zip(answers, examples, strict=True)
        ]
        cost = forward_cost(loaded.device)
        loss = mean_loss(loaded, examples, loss=Loss.lm, tokens_per_batch=tokens_per_batch, forward_cost_tokens=cost)
        return self.measure(task).score(float(np.mean(values)), loss=loss, num_examples=len(examples))


def score_candidates(scores: npt.NDArray[np.float32], labels: Sequence[int], *, loss: Loss) -> Score:
    """The score of candidate scores [num_examples, candidates] against the right candidates; ties go to the first."""
    wanted = np.asarray(labels)
    right = scores.argmax(axis=1) == wanted
    right &= np.isfinite(scores[np.arange(len(wanted)), wanted])
    losses = -scores[np.arange(len(wanted)), wanted] if loss is Loss.lm else choice_losses(scores, labels)
    two = scores.shape[1] == 2 and bool(np.isfinite(scores).all())
    margin = scores[:, 1] - scores[:, 0] if two else None
    return Score(
        metric=_METRICS[TaskKind.candidates],
        value=float(right.mean()),
        loss=known(float(losses.mean(dtype=np.float64))),
        num_examples=len(wanted),
        per_class={int(c): (int(right[wanted == c].sum()), int((wanted == c).sum())) for c in np.unique(wanted)},
        auc=None if margin is None else auc(margin, wanted),
        best_threshold_accuracy=None if margin is None else best_threshold_accuracy(margin, wanted),
    )
