"""Settings are compared seed by seed: what a seed does to both is in no difference."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fedzo.fl.config import BestBy
from fedzo.records.metrics import CentralScore
from fedzo.report.over_seeds import Group, best_group, gains, seeds_notes, seeds_table


def group(name: str, dev_loss: float, tests: dict[str, float], settings: dict[str, Any] | None = None) -> Group:
    """A finished job for each seed, with its value on the test rows."""
    return Group(name, (name,), tuple(job(seed, dev_loss, value, settings or {}) for seed, value in tests.items()))


def job(seed: str, dev_loss: float, value: float, settings: dict[str, Any]) -> Any:
    """A finished job as groups ask for it."""

    def scores(split: Any) -> Any:
        score = CentralScore(
            seconds=1.0, split=split, round=5, metric="accuracy", value=value, loss=dev_loss, num_examples=200
        )
        return score, score

    run = SimpleNamespace(setting=lambda *path: settings.get(".".join(path)))
    return SimpleNamespace(seed=seed, summary=SimpleNamespace(), run=run, scores=scores)


def test_a_difference_of_a_point_in_every_seed_is_told_however_far_the_seeds_are_apart() -> None:
    best = group("a", 0.35, {"0": 0.70, "1": 0.80})
    other = group("b", 0.55, {"1": 0.81, "0": 0.71})

    assert best_group([other, best], BestBy.loss) is best
    assert seeds_table([other, best], ["trainer"], BestBy.loss, best) == [
        ["trainer", "seeds", "mean dev loss", "mean test", "test less that of the best dev loss"],
        ["b", "2", "0.550", "76.0 % +- 63.5 points", "+1.0 points +- 0.0"],
        ["a", "2", "0.350", "75.0 % +- 63.5 points", ""],
    ]


@pytest.mark.parametrize(
    ("tests", "differences", "cell"),
    [
        ({"0": 0.71, "2": 0.99}, [0.01], ""),
        ({"0": 0.71, "2": 0.99, "1": 0.82}, [0.01, 0.02], "+1.5 points +- 6.4"),  # 12.706 x 0.005
        ({"2": 0.71, "3": 0.99}, [], ""),
    ],
)
def test_seeds_that_only_one_setting_has_are_in_no_difference(
    tests: dict[str, float], differences: list[float], cell: str
) -> None:
    best, other = group("a", 0.35, {"0": 0.70, "1": 0.80}), group("b", 0.55, tests)

    assert gains(other, best) == pytest.approx(differences)
    assert seeds_table([best, other], ["trainer"], BestBy.loss, best)[2][-1] == cell


@pytest.mark.parametrize(
    ("settings", "is_pair"),
    [
        ({"partition": {"alpha": 0.1}}, False),
        ({"split": {"seed": 1}}, False),
        ({"data.path": "/b"}, False),
        ({"fl.num_clients": 32}, False),
        ({"fl.rounds": 32, "server_optimizer": {"lr": 1.0}}, True),
    ],
)
def test_jobs_whose_clients_have_other_rows_are_no_pair(settings: dict[str, Any], is_pair: bool) -> None:
    best = group("a", 0.35, {"0": 0.70, "1": 0.80})
    other = group("b", 0.55, {"0": 0.71, "1": 0.81}, settings)

    assert gains(other, best) == (pytest.approx([0.01, 0.01]) if is_pair else [])


def test_the_notes_tell_what_an_interval_leaves_out_and_with_whom_the_last_column_compares() -> None:
    best, other = group("a", 0.35, {"0": 0.70, "1": 0.80}), group("b", 0.55, {"0": 0.71, "1": 0.81})
    jobs = [*best.jobs, *other.jobs]

    told = " ".join(seeds_notes([best, other], jobs, best, are_compared=True))

    assert "All seeds of a setting score the same 200 test rows, whose own error is no part of +-." in told
    assert "The last column compares with a, seed by seed" in told
    assert "last column" not in " ".join(seeds_notes([best, other], jobs, None, are_compared=False))
