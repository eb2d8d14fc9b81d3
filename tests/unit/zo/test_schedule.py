"""Learning rates against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedzo.zo.server_optimizer import Schedule, ServerOptimizerConfig, learning_rate


def course(rounds: int, **settings: object) -> list[float]:
    config = ServerOptimizerConfig(lr=8.0, **settings)  # type: ignore[arg-type]
    return [learning_rate(config, round=round, rounds=rounds) for round in range(rounds)]


@pytest.mark.parametrize(
    ("rounds", "settings", "expected"),
    [
        (3, {}, [8, 8, 8]),
        (4, {"warmup_rounds": 3}, [2, 4, 6, 8]),
        (5, {"schedule": Schedule.linear, "final_lr_share": 0.5}, [8, 7, 6, 5, 4]),
        (5, {"schedule": Schedule.linear, "final_lr_share": 0.0, "warmup_rounds": 2}, [8 / 3, 16 / 3, 8, 4, 0]),
        (5, {"schedule": Schedule.cosine, "final_lr_share": 0.0}, [8, 4 + 4 * math.sqrt(0.5), 4, 4 - math.sqrt(8), 0]),
        (4, {"schedule": Schedule.cosine, "final_lr_share": 0.25}, [8, 6.5, 3.5, 2]),
        (1, {"schedule": Schedule.cosine, "final_lr_share": 0.0}, [8]),  # a single round is not wasted
        (2, {"schedule": Schedule.linear, "warmup_rounds": 1}, [4, 8]),
        (3, {"schedule": Schedule.linear, "final_lr_share": 1.0}, [8, 8, 8]),
    ],
)
def test_the_course_of_the_learning_rate(rounds: int, settings: dict[str, object], expected: list[float]) -> None:
    assert course(rounds, **settings) == pytest.approx(expected, rel=1e-7, abs=1e-7)


def test_it_is_a_float32_value_rounded_once() -> None:
    config = ServerOptimizerConfig(lr=2e-4, schedule=Schedule.linear, final_lr_share=0.1)

    values = [learning_rate(config, round=round, rounds=7) for round in range(7)]

    assert values == [float(np.float32(2e-4 * (0.1 + 0.9 * (1 - r / 6)))) for r in range(7)]
