"""The space of a sketch's tables against a plain dense model whose weights are gathered from tables by autograd."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from fedzo.errors import ConfigError
from fedzo.models.load import wrap_model
from fedzo.models.sketched.table_file import write_tables
from fedzo.sketch import sketched_layers, tables_of, unpack
from fedzo.testing.tiny_models import byte_tokenizer, tiny_loaded, tiny_model, tiny_sketch
from fedzo.trainers import TRAINERS, TrainerContext
from fedzo.trainers.artifacts import EMPTY
from fedzo.trainers.calibration import CalibrationSource, calibration_windows
from fedzo.trainers.tables import GRADIENT_FILE, TablesConfig
from fedzo.zo.config import Distribution
from fedzo.zo.directions import direction
from fedzo.zo.estimator import ESTIMATORS
from fedzo.zo.estimator.backprop import BackpropConfig, LocalOptimizer
from fedzo.zo.spaces.dense import DenseSpace

TEXTS = [f"Document {i}: the quick brown fox jumps over {i} lazy dogs." * 2 for i in range(12)]
SMALL: dict[str, Any] = {"calibration": CalibrationSource.train, "calibration_docs": 3, "calibration_tokens": 20}
IDS = torch.arange(24).reshape(2, 12) * 7 % 256


@pytest.fixture
def place(tmp_path: Path) -> Callable[..., TrainerContext]:
    def make(**extra: Any) -> TrainerContext:
        return TrainerContext(folder=tmp_path, seed=3, texts=lambda: TEXTS, **extra)

    return make


def gathered(sketch: nn.Module, tables: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every weight of the dense model by name, W[r, c] = T[r, code[r, c]], differentiable in the tables."""
    weights = {}
    for name, layer in sketched_layers(sketch).items():
        codes = unpack(layer.codes, layer.bits, layer.in_features).long()
        weights[f"{name}.weight"] = tables[name].squeeze(1).gather(1, codes)
    return weights


def table_names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters() if name.endswith(".tables")]


def test_values_are_the_tables_in_the_order_of_named_parameters() -> None:
    loaded = tiny_loaded(sketched=True)
    tables = [each for name, each in loaded.model.named_parameters() if name.endswith(".tables")]
    expected = torch.cat([table.detach().reshape(-1) for table in tables]).numpy().copy()
    # two layers: q, o of 32 rows, k, v of 16, gate and up of 64, down of 32; 16 entries a row
    assert expected.size == 2 * 16 * (32 + 32 + 16 + 16 + 64 + 64 + 32)

    space = TRAINERS.build(TablesConfig()).build(loaded, EMPTY, distribution=Distribution.gaussian).space

    assert isinstance(space, DenseSpace)
    assert np.array_equal(space.values(), expected)
    space.step(0.5, 11)
    moved = torch.cat([table.detach().reshape(-1) for table in tables]).numpy()
    assert np.array_equal(moved, expected - np.float32(0.5) * direction(11, expected.size))


def test_the_gradient_is_autograd_s_in_tables_of_a_dense_model(place: Callable[..., TrainerContext]) -> None:
    loaded, config = tiny_loaded(sketched=True), TablesConfig(**SMALL)

    gradient = TRAINERS.build(config).prepare(loaded, place()).gradient

    dense = tiny_model().double()
    tables = {
        name: layer.tables.detach().double().requires_grad_(True)
        for name, layer in sketched_layers(loaded.model).items()
    }
    windows = calibration_windows(config, loaded, place())
    assert [len(window) for window in windows] == [20] * 3
    for window in windows:
        logits = functional_call(dense, gathered(loaded.model, tables), kwargs={"input_ids": window[None]}).logits[0]
        (F.cross_entropy(logits[:-1], window[1:]) / 3).backward()
    expected = torch.cat([tables[name.removesuffix(".tables")].grad.reshape(-1) for name in table_names(loaded.model)])
    assert gradient is not None
    assert gradient.dtype == torch.float32
    assert float((gradient - expected).abs().max()) < 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(add_bos=True), byte_tokenizer(add_bos=True, add_eos=True)])
def test_a_calibration_window_begins_as_the_tokenizer_begins_a_text(
    tokenizer: Any, place: Callable[..., TrainerContext]
) -> None:
    config = TablesConfig(**SMALL)
    plain = calibration_windows(config, tiny_loaded(), place())
    assert not any(1 in window for window in plain)

    windows = calibration_windows(config, wrap_model(tiny_loaded().model, tokenizer), place())

    assert [window.tolist().count(1) for window in windows] == [1] * len(plain)
    assert [int(window[0]) for window in windows] == [1] * len(plain)
    assert [len(window) for window in windows] == [len(window) for window in plain]


def test_a_calibration_window_is_no_longer_than_the_model_s_positions(tmp_path: Path) -> None:
    place = TrainerContext(folder=tmp_path, seed=3, texts=lambda: ["many words " * 60] * 3)

    def windows(num_tokens: int) -> list[torch.Tensor]:
        return calibration_windows(
            TablesConfig(**SMALL | {"calibration_tokens": num_tokens}), tiny_loaded("gpt2"), place
        )

    assert [len(window) for window in windows(512)] == [512] * 3
    with pytest.raises(
        ConfigError, match=r"trainer\.calibration_tokens must be <= 512, the positions of 'tiny-gpt2', got 513\. Lower"
    ):
        windows(513)


def test_a_resumed_run_goes_on_with_the_gradient_that_was_kept(
    place: Callable[..., TrainerContext], tmp_path: Path
) -> None:
    loaded, trainer = tiny_loaded(sketched=True), TRAINERS.build(TablesConfig(**SMALL))
    first = trainer.prepare(loaded, place()).gradient
    write_tables(
        tmp_path / GRADIENT_FILE,
        {name: torch.full_like(table, 0.5) for name, table in tables_of(loaded.model).items()},
        base_digest=loaded.base_digest,
        content="gradient",
    )

    again = trainer.prepare(loaded, place()).gradient
    anew = trainer.prepare(loaded, place(resumed=False)).gradient

    assert set(again.tolist()) == {0.5}  # type: ignore[union-attr]
    assert torch.equal(anew, first)  # type: ignore[arg-type]


def test_without_a_gradient_no_text_is_read(place: Callable[..., TrainerContext]) -> None:
    config = TablesConfig(gradient=False)

    assert TRAINERS.build(config).prepare(tiny_loaded(sketched=True), place()).gradient is None
    assert not config.traits.gradient
    assert TablesConfig().for_timing() == config


def test_a_model_without_tables_is_named_with_its_remedy(place: Callable[..., TrainerContext]) -> None:
    trainer = TRAINERS.build(TablesConfig())

    for use in (
        lambda loaded: trainer.prepare(loaded, place()),
        lambda loaded: trainer.build(loaded, EMPTY, distribution=Distribution.gaussian),
    ):
        with pytest.raises(
            ConfigError, match=r"'tiny-llama' must be a sketch, .* dense layers\. .*`fedzo sketch --out"
        ):
            use(tiny_loaded())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_small_step_of_adamw_moves_every_entry_as_16_bit_tables_would_not(dtype: torch.dtype) -> None:
    """The trap: at lr 2e-5 about 70 % of tables of a language model's size stay where they are in bfloat16.

    Entries are drawn with the standard deviation of such weights, 0.02. AdamW's first step is lr * sign(gradient).
    """
    model: Any = tiny_sketch(dtype=dtype)
    tables = [layer.tables for layer in sketched_layers(model).values()]
    for number, table in enumerate(tables):
        table.copy_(torch.from_numpy(0.02 * direction(number, table.numel())).view(table.shape))
    space = DenseSpace(tables)
    start = space.values()

    def loss() -> torch.Tensor:
        logits = model(input_ids=IDS).logits.float()
        return F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), IDS[:, 1:].reshape(-1))

    _, gradient = space.gradient(loss)
    ESTIMATORS.build(BackpropConfig(local_optimizer=LocalOptimizer.adamw)).descend(space, [loss], lr=2e-5)

    used = gradient != 0
    now = torch.cat([table.detach().reshape(-1) for table in tables])
    assert {table.dtype for table in tables} == {torch.float32}
    assert int(used.sum()) > 0.9 * space.size
    assert bool((now != torch.from_numpy(start))[used].all())
    narrow = nn.Parameter(torch.from_numpy(start).bfloat16())
    before = narrow.detach().clone()
    narrow.grad = gradient.bfloat16()
    torch.optim.AdamW([narrow], lr=2e-5, weight_decay=0.0).step()
    unmoved = float((narrow.detach() == before)[used].double().mean())
    assert 0.6 < unmoved < 0.8


def test_tables_are_float32_in_a_model_of_16_bits() -> None:
    loaded = tiny_loaded(sketched=True, dtype=torch.bfloat16)

    TRAINERS.build(TablesConfig()).build(loaded, EMPTY, distribution=Distribution.gaussian)

    assert {layer.tables.dtype for layer in sketched_layers(loaded.model).values()} == {torch.float32}
    assert loaded.model.dtype == torch.bfloat16
