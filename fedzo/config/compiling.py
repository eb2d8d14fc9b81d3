"""Rules on ``model.compile``."""

from __future__ import annotations

from collections.abc import Iterator

from fedzo.config.problem import Problem, problem
from fedzo.config.schema import RunConfig
from fedzo.trainers.config import MezoConfig


def compile_problems(config: RunConfig) -> Iterator[Problem]:
    """What a compiled forward cannot do."""
    if not config.model.compile:
        return
    remedy = "Write model.compile=false."
    if isinstance(config.trainer, MezoConfig):
        rule = (
            "be false for trainer=mezo: its probes hand each operation a perturbed weight, made by kernels outside of "
            "torch, which cannot be traced"
        )
        yield problem("model.compile", rule, True, f"{remedy[:-1]}, or train fewer values, as trainer=meerkat does.")
    if config.estimator.freeze_routing:
        rule = (
            "be false with estimator.freeze_routing: the choices of one forward would lie in memory that the next "
            "replay of its CUDA graph overwrites"
        )
        yield problem("model.compile", rule, True, remedy)
