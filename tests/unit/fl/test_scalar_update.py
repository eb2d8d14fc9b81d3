"""What a client's estimator gives is what a step is taken with: a projection for each key, or the step is refused."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from fedzo.config.schema import RunSettings
from fedzo.data.config import Loss, TaskConfig
from fedzo.errors import PluginError
from fedzo.evaluate import Measure
from fedzo.fl.client.scalar_update import ScalarUpdate
from fedzo.fl.client.vector_update import VectorUpdate
from fedzo.fl.clip import NO_BOUND
from fedzo.fl.config import StrategyConfig
from fedzo.fl.messages import TrainRequest
from fedzo.testing.tiny_models import tiny_loaded
from fedzo.testing.vector_space import VectorSpace
from fedzo.zo.directions import direction, stream_key
from fedzo.zo.estimator import Projection, TwoPoint, TwoPointConfig


class Given:
    """Stands for an estimator; what it gives is handed to ``as_sent`` by the test."""


def sent(
    projections: list[Any], *, num_probes: int, announced: float = float("inf"), max_abs_g: float = NO_BOUND
) -> list[float]:
    config = RunSettings(estimator=TwoPointConfig(num_probes=num_probes), strategy=StrategyConfig(max_abs_g=max_abs_g))
    update = ScalarUpdate(config, batches=cast(Any, None), estimator=cast(Any, Given()))
    return update.as_sent(projections, cast(Any, type("Request", (), {"max_abs_g": announced})))[0].tolist()


@pytest.mark.parametrize(
    ("announced", "max_abs_g", "clipped"), [(NO_BOUND, 5.0, 5.0), (3.0, 5.0, 3.0), (NO_BOUND, NO_BOUND, 8.0)]
)
def test_scalars_are_clipped_to_the_settings_bound_where_none_is_announced(
    announced: float, max_abs_g: float, clipped: float
) -> None:
    """Else the server, which has the same settings, would refuse them."""
    assert sent([projection(-8.0)], num_probes=1, announced=announced, max_abs_g=max_abs_g) == [-clipped]


def projection(g: float) -> Projection:
    return Projection(g=np.float32(g), loss=1.0, dropped=False)


def test_each_key_has_its_own_scalar() -> None:
    assert sent([projection(0.5), projection(-2.0)], num_probes=2) == [0.5, -2.0]


@pytest.mark.parametrize("number", [0, 1, 3])
def test_another_number_of_projections_is_refused_and_none_is_given_to_several_keys(number: int) -> None:
    with pytest.raises(PluginError, match=rf"Given.estimate must give a projection for each of 2 keys, got {number}\."):
        sent([projection(0.5)] * number, num_probes=2)


def test_what_is_no_projection_is_named_with_its_plugin() -> None:
    expected = r"test_scalar_update\.Given\.estimate must give a fedzo\.zo\.\S*\.Projection, got 0\.5 \(float\)"
    with pytest.raises(PluginError, match=expected):
        sent([0.5, 0.5], num_probes=2)


def test_an_estimator_that_forgets_to_return_is_named() -> None:
    with pytest.raises(PluginError, match=r"test_scalar_update\.Given\.estimate must give a .*list, got None"):
        sent(cast(Any, None), num_probes=2)
    with pytest.raises(PluginError, match=r"test_scalar_update\.Given\.estimate must give a .*list, .*\(generator\)"):
        sent(cast(Any, (projection(0.5) for _ in range(2))), num_probes=2)


@pytest.mark.parametrize(
    ("losses", "rule"),
    [
        (None, "must give a builtins.list, got None"),
        ([0.5], r"must give a loss for each of 2 steps, got 1\."),
        ([0.5] * 3, r"must give a loss for each of 2 steps, got 3\."),
    ],
)
def test_a_gradient_estimator_gives_a_loss_for_each_step(losses: Any, rule: str) -> None:
    """Else the server would refuse the client, and nobody would be told of the plugin."""

    class Descent:
        def descend(self, space: Any, losses_of_steps: Any, *, lr: float) -> Any:
            space.load(np.ones(3, np.float32))
            return losses

    space = VectorSpace(np.zeros(3, np.float32))
    at = SimpleNamespace(replica=SimpleNamespace(space=space, position=0))
    update = VectorUpdate(cast(Any, None), TaskConfig(), Descent())

    with pytest.raises(PluginError, match=rf"Descent\.descend {rule}"):
        update.make(cast(Any, at), TrainRequest(client=0, steps=2, lr=0.5))
    assert space.values().tolist() == [0, 0, 0]


@pytest.mark.parametrize(("lower_is_better", "sign"), [(False, -1), (True, 1)])
def test_a_value_is_measured_on_the_rows_of_the_step_and_falls_where_it_gets_better(
    lower_is_better: bool, sign: int
) -> None:
    """g is the slope of a linear value along each direction, which is the sum of the direction's numbers."""
    space, rows, asked = VectorSpace(np.array([1, 2, 3], np.float32)), [object()] * 4, list[Any]()
    update, workspace = scoring(space, rows, asked, lower_is_better=lower_is_better)
    request = TrainRequest(client=0, round=5, steps=1, lr=0.5)
    update.look_ahead(workspace, {0: request, 1: request})  # no rows of two clients make one value

    found = update.estimate(workspace, request, step=0)

    slopes = [direction(stream_key(3, round=5, probe=probe), 3).astype(float).sum() for probe in range(2)]
    assert [float(each.g) for each in found] == pytest.approx([sign * slope for slope in slopes], rel=1e-4)
    assert [each.loss for each in found] == pytest.approx([sign * 6.0] * 2, rel=1e-4)
    assert asked == [(4, 77, False)] * 4  # no prompt is shared: bits would differ between processes
    assert space.theta.tolist() == [1, 2, 3]


def test_a_value_outside_of_its_measure_drops_the_probe() -> None:
    space = VectorSpace(np.array([1, 2, 3], np.float32))
    update, workspace = scoring(space, [object()], [], high=6.0)  # which one side of each probe exceeds

    found = update.estimate(workspace, TrainRequest(client=0, steps=1, lr=0.5), step=0)

    assert [(float(each.g), each.dropped) for each in found] == [(0.0, True)] * 2


def scoring(
    space: VectorSpace, rows: list[Any], asked: list[Any], *, high: float = 100.0, lower_is_better: bool = False
) -> tuple[ScalarUpdate, Any]:
    """An update that trains the sum of theta, and what it runs on."""

    class Total:
        def measure(self, task: TaskConfig) -> Measure:
            return Measure(metric="total", low=-100.0, high=high, lower_is_better=lower_is_better)

        def evaluate(self, loaded: Any, examples: Any, task: TaskConfig, *, tokens_per_batch: int) -> Any:
            asked.append((len(examples), tokens_per_batch, loaded.shared_prompts))
            return self.measure(task).score(float(space.theta.sum(dtype=float)), num_examples=len(examples))

    config = RunSettings(task=TaskConfig(loss=Loss.score), estimator=TwoPointConfig(num_probes=2))
    batches: Any = SimpleNamespace(run_seed=3, of=lambda request, step: rows)
    update = ScalarUpdate(config, batches, TwoPoint(eps=0.5), cast(Any, Total()))
    loaded = replace(tiny_loaded(), shared_prompts=True)
    return update, SimpleNamespace(replica=SimpleNamespace(space=space), loaded=loaded, tokens_per_batch=77)
