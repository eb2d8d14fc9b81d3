"""Evaluators: how a model is scored on rows."""

from fedzo.evaluate.answers import AnswersConfig
from fedzo.evaluate.base import EVALUATORS, Evaluator, EvaluatorConfig, Measure, evaluate, merge_scores, scores_of_peer

__all__ = [
    "AnswersConfig",
    "EVALUATORS",
    "Evaluator",
    "EvaluatorConfig",
    "Measure",
    "evaluate",
    "merge_scores",
    "scores_of_peer",
]
