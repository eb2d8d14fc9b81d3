"""Evaluators: how a model is scored on rows."""

from fedzo.evaluate.answers import AnswersConfig as AnswersConfig
from fedzo.evaluate.base import EVALUATORS as EVALUATORS
from fedzo.evaluate.base import Evaluator as Evaluator
from fedzo.evaluate.base import EvaluatorConfig as EvaluatorConfig
from fedzo.evaluate.base import Measure as Measure
from fedzo.evaluate.base import evaluate as evaluate
from fedzo.evaluate.base import merge_scores as merge_scores
from fedzo.evaluate.base import scores_of_peer as scores_of_peer
