"""Shipped test helpers: tiny models, a slow twin of spaces, and conformance checks for plugins.

A check takes a function that makes a fresh plugin, so that nothing a plugin keeps to itself can matter; of a partition,
which is a function itself, it takes the config. It raises ``AssertionError`` with what must hold and what was seen, and
returns nothing.
"""

from fedzo.testing.conformance.estimator import check_estimator
from fedzo.testing.conformance.evaluator import check_evaluator
from fedzo.testing.conformance.partition import check_partition
from fedzo.testing.conformance.server_optimizer import check_server_optimizer
from fedzo.testing.conformance.space import check_space
from fedzo.testing.conformance.stage import check_stage
from fedzo.testing.conformance.step_policy import check_step_policy
from fedzo.testing.conformance.trainer import check_trainer

__all__ = [
    "check_space",
    "check_estimator",
    "check_trainer",
    "check_server_optimizer",
    "check_partition",
    "check_stage",
    "check_step_policy",
    "check_evaluator",
]
