"""Our own plugins keep the contracts of their kinds."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedzo.data.config import Loss, TaskConfig, TaskKind
from fedzo.data.encode import Example
from fedzo.data.partition import PARTITIONERS
from fedzo.data.preprocess import STAGES, Stage, StageContext
from fedzo.data.preprocess.backend import REWRITERS, Completion, Request, RewriterConfig, RowFault
from fedzo.evaluate import EVALUATORS
from fedzo.models.blocks import parameters_from
from fedzo.testing import (
    check_estimator,
    check_evaluator,
    check_partition,
    check_server_optimizer,
    check_space,
    check_stage,
    check_trainer,
)
from fedzo.testing.tiny_models import tiny_loaded, tiny_model
from fedzo.testing.vector_space import VectorSpace
from fedzo.trainers import TRAINERS
from fedzo.zo.config import Distribution
from fedzo.zo.directions import direction
from fedzo.zo.estimator import ESTIMATORS, Baseline, ZerothOrderConfig
from fedzo.zo.server_optimizer import SERVER_OPTIMIZERS
from fedzo.zo.spaces.base import MasterSpace, Space
from fedzo.zo.spaces.dense import DenseSpace
from fedzo.zo.spaces.full import FullSpace
from fedzo.zo.spaces.masked import MaskedSpace

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IDS = torch.arange(24).reshape(2, 12) * 7 % 256
CONFIGS: dict[str, dict[str, Any]] = {
    registry.kind: dict(registry)
    for registry in (TRAINERS, ESTIMATORS, SERVER_OPTIMIZERS, PARTITIONERS, STAGES, EVALUATORS)
}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS, use_cache=False).logits


# --- spaces -----------------------------------------------------------------------------------------------------------


def masked(model: nn.Module, law: Distribution) -> Space:
    indices = {
        name: torch.arange(3, parameter.numel(), 17)
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and "embed" not in name and "wte" not in name
    }
    return MaskedSpace(model, indices, distribution=law)


def full(model: nn.Module, law: Distribution) -> Space:
    return FullSpace(model, distribution=law)


def upper(model: nn.Module, law: Distribution) -> Space:
    return FullSpace(model, parameters=parameters_from(model, 1), distribution=law)


def dense(model: nn.Module, law: Distribution) -> Space:
    return DenseSpace([p for name, p in model.named_parameters() if "norm" in name or "ln_" in name], distribution=law)


@pytest.mark.parametrize("law", list(Distribution))
@pytest.mark.parametrize(
    ("make", "dtype"),
    [*((make, dtype) for make in (masked, full, upper) for dtype in DTYPES), (dense, torch.float32)],
    ids=lambda value: value.__name__ if callable(value) else str(value),
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_spaces_of_a_model(
    family: str, make: Callable[[nn.Module, Distribution], Space], dtype: torch.dtype, law: Distribution
) -> None:
    check_space(
        lambda model: make(model, law),
        lambda: tiny_model(family, dtype=dtype),
        outputs=logits,
        held_in=dtype if make in (full, upper) else torch.float32,
        distribution=law,
    )


class Weights(nn.Module):
    """Holds a space that has no model of its own."""

    space: Any

    def make(self, space: Space) -> Space:
        self.space = space
        return space


class Written(MasterSpace):
    """The bare master, whose values enter a tensor."""

    def write(self, values: torch.Tensor) -> None:
        self.theta = values.clone()


@pytest.mark.parametrize("law", list(Distribution))
def test_spaces_of_no_model(law: Distribution) -> None:
    start = direction(3, 300)

    def vector(model: nn.Module) -> Space:
        return model.make(VectorSpace(start, distribution=law))  # type: ignore[operator]

    def master(model: nn.Module) -> Space:
        return model.make(Written(torch.from_numpy(start.copy()), law))  # type: ignore[operator]

    for make in (vector, master):
        check_space(
            make,
            Weights,
            outputs=lambda model: torch.as_tensor(getattr(model.space, "theta", start)),  # type: ignore[union-attr]
            distribution=law,
        )


# --- trainers ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # by PEFT, of transformers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS["trainer"])
def test_trainers(name: str, dtype: torch.dtype) -> None:
    config = CONFIGS["trainer"][name]()

    check_trainer(
        lambda: TRAINERS.build(config),
        lambda: tiny_loaded("llama", dtype=dtype, sketched=bool(config.traits.cannot_train_dense)),
        held_in=torch.float32 if config.traits.float32_master else dtype,
    )


# --- estimators -------------------------------------------------------------------------------------------------------

Numbers = np.ndarray


def less_the_mean(slopes: Numbers) -> Numbers:
    return slopes - slopes.mean()


def less_the_others(slopes: Numbers) -> Numbers:
    return np.array([own - np.delete(slopes, p).mean() for p, own in enumerate(slopes)])


def over_the_deviation(slopes: Numbers) -> Numbers:
    return slopes / np.std(slopes, ddof=1)


ESTIMATES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("two_point", {}, {"order": 2}),
    ("one_sided", {"baseline": Baseline.center}, {"order": 1}),
    ("one_sided", {"baseline": Baseline.mean}, {"order": 1, "on_linear": less_the_mean, "share": 3 / 4}),
    ("one_sided", {"baseline": Baseline.leave_one_out}, {"order": 1, "on_linear": less_the_others}),
    ("fzoo", {}, {"order": 1, "on_linear": over_the_deviation, "share": None}),
]


@pytest.mark.parametrize(("name", "settings", "promises"), ESTIMATES)
def test_estimators(name: str, settings: dict[str, Any], promises: dict[str, Any]) -> None:
    check_estimator(
        lambda eps: ESTIMATORS.build(CONFIGS["estimator"][name](eps=eps, **settings)), num_probes=4, **promises
    )


# --- server optimizers ------------------------------------------------------------------------------------------------

Rounds = Sequence[tuple[float, Numbers]]


def sgd(theta: Numbers, rounds: Rounds, *, weight_decay: float = 0.0) -> Numbers:
    for lr, u in rounds:
        theta = theta * (1 - lr * weight_decay) - lr * u
    return theta


def momentum(
    theta: Numbers, rounds: Rounds, *, momentum: float = 0.9, nesterov: bool = False, weight_decay: float = 0.0
) -> Numbers:
    m = np.zeros_like(theta)
    for lr, u in rounds:
        m = momentum * m + u
        theta = theta * (1 - lr * weight_decay) - lr * (u + momentum * m if nesterov else m)
    return theta


def adam(
    theta: Numbers,
    rounds: Rounds,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Numbers:
    m, v = np.zeros_like(theta), np.zeros_like(theta)
    for t, (lr, u) in enumerate(rounds, start=1):
        m, v = beta1 * m + (1 - beta1) * u, beta2 * v + (1 - beta2) * u * u
        step = (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)
        theta = theta * (1 - lr * weight_decay) - lr * step
    return theta


FORMULAS = {"sgd": sgd, "momentum": momentum, "adam": adam}
RULES: list[tuple[str, dict[str, Any]]] = [
    ("sgd", {}),
    ("sgd", {"weight_decay": 0.3}),
    ("momentum", {"momentum": 0.75}),
    ("momentum", {"momentum": 0.6, "nesterov": True, "weight_decay": 0.2}),
    ("momentum", {"momentum": 0.0}),
    ("adam", {}),
    ("adam", {"beta1": 0.5, "beta2": 0.75, "eps": 1e-2, "weight_decay": 0.4}),
    ("scaffold", {}),
    ("feddyn", {"alpha": 2.0}),
    ("feddyn", {"lr": 1e-4}),
]


@pytest.mark.parametrize(("name", "settings"), RULES, ids=str)
def test_server_optimizers(name: str, settings: dict[str, Any]) -> None:
    config = CONFIGS["server_optimizer"][name](**settings)
    formula = FORMULAS.get(name)

    check_server_optimizer(
        lambda: SERVER_OPTIMIZERS.build(config, local_steps=1),
        formula=formula and (lambda theta, rounds: formula(theta, rounds, **settings)),
        rests_at_zero="weight_decay" not in settings,
    )


# --- partitions -------------------------------------------------------------------------------------------------------

DEALT: dict[str, dict[str, Any]] = {
    "dirichlet": {"alpha": 1.0},
    "dirichlet_equal": {"alpha": 1.0, "num_extreme": 1},
    "extreme": {},
    "iid": {},
    "natural": {"column": "site"},
    "shards": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DEALT)
def test_partitions(name: str) -> None:
    rows = [{"text": str(i), "label": i * i % 3, "site": f"s{i % 4}"} for i in range(120)]
    task = TaskConfig(name="mine", template="{text}", candidates=["a", "b", "c"])

    check_partition(CONFIGS["partition"][name](**DEALT[name]), rows, task, num_clients=4)


# --- stages -----------------------------------------------------------------------------------------------------------


class Rewriter:
    """A backend that exchanges one word, and a judge who agrees."""

    batch_size = concurrency = 1

    def fingerprint(self, model: str) -> str:
        return model

    def room(self, model: str) -> int | None:
        return None

    def count_tokens(self, request: Request) -> int:
        return 100

    def complete(self, requests: Sequence[Request]) -> list[Completion | RowFault]:
        return [Completion(self._text(request), False, "m", 1, 1) for request in requests]

    def close(self) -> None:
        """Nothing to let go."""

    def _text(self, request: Request) -> str:
        if request.schema is not None:
            return "same"
        asked = [line for line in request.messages[-1].content.splitlines() if line.startswith("text: ")][-1]
        return str(json.loads(asked.removeprefix("text: "))).replace("was", "seemed")


@pytest.mark.parametrize("name", CONFIGS["preprocess"])
def test_stages(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(REWRITERS, "build", lambda config: Rewriter())
    rows = [{"text": f"Film {i} was long.", "label": i % 2, "id": i} for i in range(5)]
    task = TaskConfig(name="sst2", template="{text} It was", candidates=[" terrible", " great"])
    given = {"gate": False} if name == "oat_rephrase" else {}
    config = CONFIGS["preprocess"][name](**given).filled(task)
    folders = (tmp_path / str(number) for number in itertools.count())  # so that a new stage finds nothing made

    def make() -> Stage:
        return STAGES.build(config, context=StageContext(task, RewriterConfig(), next(folders)))

    check_stage(make, rows)

    if name == "oat_rephrase":
        made = make().apply(copy.deepcopy(rows), client=0, on_progress=lambda done, total: None)
        assert [row["text"] for row in made] == [f"Film {i} seemed long." for i in range(5)]


# --- evaluators -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(TaskKind))
@pytest.mark.parametrize("name", CONFIGS["evaluators"])
def test_evaluators(name: str, kind: TaskKind) -> None:
    choices = [Example((65 + i, 5, 9), ((70, 71), (72 + i,)), i % 2) for i in range(5)]
    texts = [Example((65 + i, 66, 67), ((70, 71),), 0, references=("fg", "f")) for i in range(5)]
    loss = Loss.candidates if kind is TaskKind.candidates else Loss.lm
    task = TaskConfig(kind=kind, loss=loss, candidates=["a", "b"], max_new_tokens=4)

    check_evaluator(
        lambda: EVALUATORS.build(CONFIGS["evaluators"][name]()),
        tiny_loaded(),
        choices if kind is TaskKind.candidates else texts,
        task,
    )


def test_every_plugin_is_checked() -> None:
    scalars = {name for name, config_class in ESTIMATORS if issubclass(config_class, ZerothOrderConfig)}
    assert {name for name, *_ in ESTIMATES} == scalars
    assert {name for name, _ in RULES} == set(CONFIGS["server_optimizer"])
    assert set(DEALT) == set(CONFIGS["partition"]) - {"own"}  # which deals nothing
