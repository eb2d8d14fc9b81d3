"""Blocks that nothing is trained in or below: counted, against whole forwards bit for bit, and by hand."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import CONFIG_MAPPING

from fedzo.config.load import load
from fedzo.data.config import Loss
from fedzo.data.encode import Example
from fedzo.errors import ConfigError
from fedzo.models import lower_layers
from fedzo.models.blocks import find_blocks, first_trained_block, parameters_from, upper_blocks
from fedzo.models.forwards import Planning, lower_layers_of
from fedzo.models.kept_rows import RowStates
from fedzo.models.load import compile_loaded, wrap_model
from fedzo.models.loaded import LoadedModel
from fedzo.models.lower_layers import LowerLayers, StepStates, find_lower_layers
from fedzo.models.scoring import candidate_scores, example_losses
from fedzo.testing.tiny_models import FAMILIES, byte_tokenizer, tiny_loaded, tiny_model_from, tiny_sketch, tiny_tokens
from fedzo.trainers import TRAINERS
from fedzo.trainers.adapters import LoraTrainerConfig
from fedzo.trainers.artifacts import ArtifactStore
from fedzo.trainers.tables import TablesConfig
from fedzo.zo.config import Distribution
from fedzo.zo.estimator import ESTIMATORS, Estimator, OneSidedConfig, TwoPointConfig
from fedzo.zo.spaces.base import Space
from fedzo.zo.spaces.dense import DenseSpace
from fedzo.zo.spaces.full import FullSpace
from fedzo.zo.spaces.masked import MaskedSpace

MANY = 4096


MIXED = [
    Example(tiny_tokens(1, 5), (tiny_tokens(2, 3), tiny_tokens(3, 1), tiny_tokens(4, 2)), 2),
    Example(tiny_tokens(11, 9), ((7,), (250,)), 1),
    Example(tiny_tokens(12, 31), ((250,), (7,), (99,)), 0),
    Example(tiny_tokens(8, 1), (tiny_tokens(9, 6), tiny_tokens(10, 1)), 1),
]


def losses(loaded: LoadedModel, lower: StepStates | None, *, per_batch: int = MANY) -> np.ndarray:
    return example_losses(loaded, MIXED, Planning(per_batch, lower=lower), loss=Loss.candidates)


def count_runs(block: nn.Module) -> list[int]:
    """How many rows each run of a block had."""
    rows: list[int] = []
    inner = block.forward

    def counted(states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        rows.append(len(states))
        return inner(states, *args, **kwargs)

    block.forward = counted  # type: ignore[method-assign]
    return rows


def full(loaded: LoadedModel) -> Space:
    return FullSpace(loaded.model, parameters=parameters_from(loaded.model, 1))


def masked(loaded: LoadedModel) -> Space:
    upper = parameters_from(loaded.model, 1)
    return MaskedSpace(loaded.model, {name: torch.arange(3, p.numel(), 7) for name, p in upper.items() if p.ndim == 2})


def lora(loaded: LoadedModel, folder: Any) -> Space:
    artifact = ArtifactStore(folder).put(bytes(8))
    trainer = TRAINERS.build(LoraTrainerConfig(first_layer=1))
    return trainer.build(loaded, artifact, distribution=Distribution.gaussian).space


def tables(folder: Any) -> tuple[LoadedModel, Space]:
    loaded = wrap_model(tiny_sketch("llama"), byte_tokenizer())
    trainer = TRAINERS.build(TablesConfig(first_layer=1))
    built = trainer.build(loaded, ArtifactStore(folder).put(b""), distribution=Distribution.gaussian)
    return loaded, built.space


# --- by hand ----------------------------------------------------------------------------------------------------------


class Affine(nn.Module):
    """states -> gain * states + 1."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([gain]))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.gain * states + 1


class TwoBlocks(nn.Module):
    """An embedding of the token's number, and two blocks on it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(torch.arange(128.0)[:, None])
        self.layers = nn.ModuleList([Affine(2.0), Affine(10.0)])

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        states = self.embed(input_ids)
        for block in self.layers:
            states = block(states)
        return states


def two_blocks() -> tuple[TwoBlocks, LowerLayers]:
    model = TwoBlocks()
    lower = find_lower_layers(model, [model.layers[1].gain], model)
    assert lower is not None
    return model, lower


@torch.inference_mode()
def test_two_blocks_by_hand() -> None:
    model, lower = two_blocks()
    runs = [count_runs(block) for block in model.layers]
    step, ids, texts = lower.of_step(), torch.tensor([[3, 5]]), [(3, 5)]

    at_ten = step.run(lambda: model(ids), ids, texts)
    model.layers[1].gain.fill_(100.0)  # the trained value moves: nothing that is kept depends on it
    at_hundred = step.run(lambda: model(ids), ids, texts)

    # block 0: 2 * 3 + 1 = 7 and 2 * 5 + 1 = 11; block 1: 10 * 7 + 1, 10 * 11 + 1, then 100 * 7 + 1, 100 * 11 + 1
    assert at_ten.flatten().tolist() == [71, 111]
    assert at_hundred.flatten().tolist() == [701, 1101]
    assert [len(each) for each in runs] == [1, 2]
    assert model(ids).flatten().tolist() == [701, 1101]  # the model is whole again


@pytest.mark.parametrize(("forwards", "whole"), [(1, 1.0), (2, 1.5), (8, 4.5)])
def test_a_steps_cost_in_whole_forwards_with_one_block_of_two_below(forwards: int, whole: float) -> None:
    assert two_blocks()[1].whole_forwards(forwards) == whole


@pytest.mark.parametrize(
    ("visits", "max_bytes", "kept"),
    [
        (40, 1000, 0.75),  # ten rows of 100 bytes, four visits to each: all but the first find their states
        (40, 500, 0.375),  # half of the rows fit
        (10, 1000, 0.0),
        (5, 1000, -1.0),  # all rows run once, twice as many as are visited
        (40, None, 0.0),
    ],
)
def test_rows_that_are_kept_cost_their_lower_blocks_once(visits: int, max_bytes: int | None, kept: float) -> None:
    lower = replace(two_blocks()[1], rows=None if max_bytes is None else RowStates(max_bytes))

    assert lower.kept_share(visits, 10, row_bytes=100) == kept
    assert lower.whole_forwards(2, kept=kept) == 1.5 - kept / 2


def test_no_rows_that_are_known_are_none_that_are_kept() -> None:
    lower = replace(two_blocks()[1], rows=RowStates(1000))

    assert lower.kept_share(40, 0, row_bytes=0.0) == 0.0


@torch.inference_mode()
def test_a_model_whose_forward_fails_is_whole_again() -> None:
    model, lower = two_blocks()
    ids = torch.tensor([[3, 5]])

    def broken() -> torch.Tensor:
        raise MemoryError

    with pytest.raises(MemoryError):
        lower.of_step().run(broken, ids, [(3, 5)])

    assert [block for block in model.layers if "forward" in vars(block)] == []


# --- real models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_batch", [MANY, 40], ids=["one batch", "several"])
@pytest.mark.parametrize("make", [full, masked])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_whole_forwards_bit_for_bit(
    family: str, make: Callable[[LoadedModel], Space], per_batch: int
) -> None:
    loaded = tiny_loaded(family)
    space = make(loaded)
    lower = lower_layers_of(loaded, space)
    assert lower is not None
    step = lower.of_step()

    for key in range(2):
        for scale in (0.25, -0.25):
            with space.probe(scale, key):
                found, whole = losses(loaded, step, per_batch=per_batch), losses(loaded, None, per_batch=per_batch)
            np.testing.assert_array_equal(found, whole)
    assert not np.array_equal(whole, losses(loaded, step, per_batch=per_batch))


def test_losses_of_adapters_and_tables_are_those_of_whole_forwards(tmp_path: Any) -> None:
    adapted = tiny_loaded("llama")
    for loaded, space in ((adapted, lora(adapted, tmp_path)), tables(tmp_path)):
        lower = lower_layers_of(loaded, space)
        assert lower is not None
        step = lower.of_step()
        for scale in (0.25, -0.25):
            with space.probe(scale, 3):
                np.testing.assert_array_equal(losses(loaded, step), losses(loaded, None))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_in_16_bits_are_those_of_whole_forwards(dtype: torch.dtype) -> None:
    loaded = tiny_loaded("llama", dtype=dtype)
    space = masked(loaded)
    lower = lower_layers_of(loaded, space)
    assert lower is not None

    step = lower.of_step()

    np.testing.assert_array_equal(losses(loaded, step), losses(loaded, None))
    np.testing.assert_array_equal(losses(loaded, step), losses(loaded, None))


@pytest.mark.parametrize(
    ("config", "forwards"), [(TwoPointConfig(num_probes=3, eps=0.1), 6), (OneSidedConfig(num_probes=3, eps=0.1), 4)]
)
def test_a_step_runs_the_lower_blocks_once(config: Any, forwards: int) -> None:
    loaded = tiny_loaded("llama")
    space = masked(loaded)
    lower = lower_layers_of(loaded, space)
    assert lower is not None
    runs = [count_runs(block) for block in find_blocks(loaded.model)[1]]
    estimator: Estimator = ESTIMATORS.build(config)  # type: ignore[assignment]
    short = MIXED[1:3]

    def estimate(step: StepStates | None) -> list[Any]:
        def loss_fn() -> float:
            found = example_losses(loaded, short, Planning(MANY, lower=step), loss=Loss.candidates)
            return float(found.mean())

        return estimator.estimate(space, loss_fn, [1, 2, 3])

    kept = estimate(lower.of_step())

    assert [len(each) for each in runs] == [1, forwards]
    assert kept == estimate(None)
    assert [len(each) for each in runs] == [1 + forwards, 2 * forwards]


def test_batches_beyond_a_steps_memory_run_whole_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lower_layers, "MAX_STEP_BYTES", 0)
    loaded = tiny_loaded("llama")
    lower = lower_layers_of(loaded, masked(loaded))
    assert lower is not None
    runs, step = count_runs(find_blocks(loaded.model)[1][0]), lower.of_step()

    first, second = losses(loaded, step), losses(loaded, step)

    np.testing.assert_array_equal(first, second)
    assert len(runs) % 2 == 0
    assert runs[: len(runs) // 2] == runs[len(runs) // 2 :]


# --- rows over many rounds --------------------------------------------------------------------------------------------


def test_where_only_the_last_norm_is_trained_a_row_runs_the_blocks_once_in_a_run() -> None:
    loaded, twin = tiny_loaded("llama"), tiny_loaded("llama")
    space, twins = (MaskedSpace(each.model, {"model.norm.weight": torch.arange(32)}) for each in (loaded, twin))
    lower = lower_layers_of(loaded, space, cache_mb=1)
    assert lower is not None
    assert (len(lower.blocks), len(lower.upper)) == (2, 0)
    runs = count_runs(lower.blocks[0])
    num_texts = sum(1 if all(len(c) == 1 for c in each.candidates) else len(each.candidates) for each in MIXED)

    for number in range(3):
        step = lower.of_step()
        for scale in (0.1, -0.1):
            with space.probe(scale, key=number), twins.probe(scale, key=number):
                np.testing.assert_allclose(losses(loaded, step), losses(twin, None), rtol=0, atol=1e-5)
        for each in (space, twins):
            each.step(0.1, key=number)

    assert sum(runs) == num_texts


def last_norm(loaded: LoadedModel) -> Space:
    return MaskedSpace(loaded.model, {"model.norm.weight": torch.arange(32)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_behind_the_last_block_only_the_positions_that_are_read_are_kept(dtype: torch.dtype) -> None:
    loaded = tiny_loaded("llama", dtype=dtype)
    space = last_norm(loaded)
    lower = lower_layers_of(loaded, space, cache_mb=1)
    assert lower is not None
    assert lower.rows is not None
    assert lower.reads_alone

    with space.probe(0.5, key=1):
        found, whole = losses(loaded, lower.of_step()), losses(loaded, None)

    np.testing.assert_allclose(found, whole, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.05)
    # of MIXED: two rows whose answers are single tokens are read once; the others at each token of each answer
    num_read = 1 + 1 + (3 + 1 + 2) + (6 + 1)
    assert lower.rows.num_bytes == num_read * 32 * dtype.itemsize


def test_without_room_a_step_still_runs_the_lower_blocks_once() -> None:
    loaded = tiny_loaded("llama")
    space = last_norm(loaded)
    lower = lower_layers_of(loaded, space, cache_mb=1)
    assert lower is not None
    assert lower.rows is not None
    lower.rows.max_bytes = 0
    runs = count_runs(lower.blocks[0])

    step = lower.of_step()
    first, second = losses(loaded, step), losses(loaded, step)

    np.testing.assert_array_equal(first, second)
    once = sum(runs)
    losses(loaded, lower.of_step())
    assert sum(runs) == 2 * once


@pytest.mark.parametrize("per_batch", [1, 4, MANY])
def test_positions_that_are_read_alone_come_in_batches_of_the_limit(per_batch: int) -> None:
    loaded = tiny_loaded("llama")
    lower = lower_layers_of(loaded, last_norm(loaded), cache_mb=1)
    assert lower is not None
    step = lower.of_step()
    rows = count_runs(loaded.model.get_submodule("model.norm"))

    for owned in (None, [3, 1, 0, 2]):  # a row's batches may come in any order
        chosen = MIXED if owned is None else [MIXED[i] for i in owned]
        found = example_losses(loaded, chosen, Planning(per_batch, lower=step), loss=Loss.candidates)
        assert max(rows) <= max(per_batch, 6)  # an answer's positions stay together
        np.testing.assert_allclose(found, losses(loaded, None) if owned is None else losses(loaded, None)[owned], 1e-5)
        rows.clear()


def test_what_is_kept_of_a_text_holds_no_whole_batch() -> None:
    loaded = tiny_loaded("llama")
    lower = lower_layers_of(loaded, last_norm(loaded), cache_mb=1)
    assert lower is not None
    assert lower.rows is not None
    own = RowStates.of
    held: list[torch.Tensor] = []

    def watched(self: RowStates, *args: Any) -> list[torch.Tensor]:
        found = own(self, *args)
        held.extend(found)
        return found

    for room in (1 << 20, 0):  # also where there is none, so that texts are held for a step alone
        lower.rows.max_bytes = room
        lower.rows.by_text.clear()
        held.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RowStates, "of", watched)
            losses(loaded, lower.of_step())
        assert all(states.untyped_storage().nbytes() == states.nbytes for states in held)


def test_once_it_is_full_nothing_more_is_kept() -> None:
    rows = RowStates(max_bytes=8)

    for size in (1, 3, 1):
        rows.of([tuple(range(size))] * 2, lambda fresh, size=size: [(index, torch.zeros(size)) for index in fresh])

    assert [*rows.by_text] == [(0,)]
    assert rows.is_full


class SumsBehind(TwoBlocks):
    """What comes behind the blocks adds up positions."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = AffineNorm(1.0)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.norm(super().forward(input_ids)).cumsum(1)


class AffineNorm(Affine):
    pass


def test_where_positions_are_added_up_behind_the_blocks_all_are_kept() -> None:
    model = SumsBehind()
    lower = find_lower_layers(model, [model.norm.gain], model, cache_mb=1)

    assert lower is not None
    assert len(lower.upper) == 0
    assert not lower.reads_alone


def test_scores_find_what_steps_and_earlier_scores_kept() -> None:
    plain = tiny_loaded("llama")
    space = last_norm(plain)
    lower = lower_layers_of(plain, space, cache_mb=1)
    assert lower is not None
    loaded = replace(plain, kept=lower)
    short, done = MIXED[1:3], list[tuple[int, int]]()
    runs = count_runs(lower.blocks[0])

    def scores(model: LoadedModel) -> Any:
        return candidate_scores(model, short, tokens_per_batch=MANY, on_batch=lambda *count: done.append(count))

    example_losses(loaded, short[:1], Planning(MANY, lower=lower.of_step()), loss=Loss.candidates)
    first = scores(loaded)
    space.step(0.5, key=3)
    moved = scores(loaded)

    assert sum(runs) == len(short)
    assert done == [(1, 2), (2, 2), (2, 2)]
    assert not np.array_equal(first, moved)
    np.testing.assert_allclose(moved, scores(plain), rtol=1e-5)


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_kept_rows_give_the_losses_of_whole_forwards_but_for_last_bits(data: st.DataObject) -> None:
    loaded = tiny_loaded("llama")
    space = masked(loaded)
    lower = lower_layers_of(loaded, space, cache_mb=1)
    assert lower is not None
    for key in range(4):
        chosen = data.draw(st.lists(st.sampled_from(MIXED), min_size=1, max_size=5))
        step = lower.of_step()
        with space.probe(0.25, key):
            found, whole = (
                example_losses(loaded, chosen, Planning(MANY, lower=each), loss=Loss.candidates)
                for each in (step, None)
            )
        np.testing.assert_allclose(found, whole, rtol=2e-6)


def test_a_row_runs_the_lower_blocks_once_in_all_rounds_if_it_fits() -> None:
    loaded = tiny_loaded("llama")
    lower = lower_layers_of(loaded, masked(loaded), cache_mb=1)
    assert lower is not None
    assert lower.rows is not None
    runs = count_runs(find_blocks(loaded.model)[1][0])
    rows = [Example(tiny_tokens(i, 6), ((7,), (250,)), 0) for i in range(4)]

    def loss(chosen: list[Example]) -> float:
        planning = Planning(MANY, lower=lower.of_step() if lower else None)
        return float(example_losses(loaded, chosen, planning, loss=Loss.candidates).mean())

    loss(rows[:3])
    loss(rows[1:])
    loss(rows)
    assert runs == [3, 1]
    assert lower.rows.num_bytes == 4 * 6 * 32 * 4  # float32 states, 32 wide, of 6 tokens each

    lower.rows.max_bytes = lower.rows.num_bytes
    loss([Example(tiny_tokens(9, 6), ((7,), (250,)), 0)])
    loss([Example(tiny_tokens(9, 6), ((7,), (250,)), 0)])
    assert runs == [3, 1, 1, 1]


@pytest.mark.parametrize(
    "what",
    ["embedding", "lower weight", "adapter", "another full space", "reloaded weights", "dtype", "upper weight"],
)
def test_kept_rows_are_dropped_when_anything_below_changes_and_only_then(what: str) -> None:
    loaded = tiny_loaded("llama")
    space = masked(loaded)
    lower = lower_layers_of(loaded, space, cache_mb=1)
    assert lower is not None
    model: Any = loaded.model
    losses(loaded, lower.of_step())
    assert lower.rows is not None
    kept = len(lower.rows.by_text)
    assert kept > 0

    with torch.no_grad():
        if what == "embedding":
            model.get_input_embeddings().weight.mul_(2)
        elif what == "lower weight":
            model.model.layers[0].mlp.down_proj.weight.add_(1)
        elif what == "adapter":
            add_adapter_below(model)
        elif what == "another full space":
            FullSpace(model).step(0.1, key=3)
        elif what == "reloaded weights":
            loaded.reload_weights()
        elif what == "dtype":
            model.to(torch.bfloat16)
        else:
            space.step(0.5, key=3)

    step = lower.of_step()
    assert len(lower.rows.by_text) == (kept if what == "upper weight" else 0)
    near = {"atol": 0.05} if what == "dtype" else {"rtol": 2e-6}
    np.testing.assert_allclose(losses(loaded, step), losses(loaded, None), **near)


def add_adapter_below(model: nn.Module) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(target_modules=["layers.0.mlp.down_proj"], init_lora_weights=False), model)


BELOW = ["embedding", "lower weight", "another full space", "adapter", "reloaded weights"]
ABOVE = ["trained values", "another space above"]


@settings(deadline=None, max_examples=25)
@given(changes=st.lists(st.sampled_from(BELOW + ABOVE), min_size=1, max_size=4))
def test_in_any_order_changes_below_drop_kept_rows_and_others_leave_them(changes: list[str]) -> None:
    """By whatever moves the weights: torch, or a space whose kernels write past it."""
    model: Any = tiny_loaded("llama").model
    add_adapter_below(model)
    adapter = DenseSpace([each for name, each in model.named_parameters() if "lora_" in name])
    adapter.load(np.full(adapter.size, 0.1, np.float32))
    loaded = wrap_model(model, byte_tokenizer())
    space = masked(loaded)
    lower = lower_layers_of(loaded, space, cache_mb=1)
    assert lower is not None
    assert lower.rows is not None
    below = FullSpace(model, parameters={"up": model.model.layers[0].mlp.up_proj.weight})
    above = FullSpace(model, parameters=parameters_from(model, 1))
    change: dict[str, Callable[[int], object]] = {
        "embedding": lambda key: model.get_input_embeddings().weight.mul_(0.9),
        "lower weight": lambda key: model.model.layers[0].self_attn.q_proj.weight.mul_(0.9),
        "another full space": lambda key: below.step(0.01, key),
        "adapter": lambda key: adapter.step(0.01, key),
        "reloaded weights": lambda key: loaded.reload_weights(),
        "trained values": lambda key: space.step(0.01, key),
        "another space above": lambda key: above.step(0.01, key),
    }
    losses(loaded, lower.of_step())
    kept = len(lower.rows.by_text)
    assert kept > 0

    for key, what in enumerate(changes):
        change[what](key)

        step = lower.of_step()
        assert len(lower.rows.by_text) == (kept if what in ABOVE else 0)
        np.testing.assert_allclose(losses(loaded, step), losses(loaded, None), rtol=2e-6)


# --- which models and spaces ------------------------------------------------------------------------------------------


def test_nothing_is_left_out_where_something_below_is_trained(tmp_path: Any) -> None:
    loaded = tiny_loaded("llama")
    assert lower_layers_of(loaded, FullSpace(loaded.model)) is None
    embeddings = {"model.embed_tokens.weight": loaded.model.get_parameter("model.embed_tokens.weight")}
    assert lower_layers_of(loaded, FullSpace(loaded.model, parameters=embeddings)) is None
    everywhere = TRAINERS.build(LoraTrainerConfig())
    artifact = ArtifactStore(tmp_path).put(bytes(8))
    space = everywhere.build(loaded, artifact, distribution=Distribution.gaussian).space
    assert lower_layers_of(loaded, space) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_that_is_used_before_the_blocks_as_well_is_found_out(dtype: torch.dtype) -> None:
    """In 16 bits a probe moves no weight of 8, so that losses alone would not tell."""
    loaded = tiny_loaded("llama", dtype=dtype)
    inner = loaded.model.model
    inner.norm.weight.fill_(8)
    inner.embed_tokens.register_forward_hook(lambda module, args, states: inner.norm(states))
    space = MaskedSpace(loaded.model, {"model.norm.weight": torch.arange(32)})

    assert lower_layers_of(loaded, space) is None


@pytest.mark.parametrize("name", ["prefix", "prompt"])
def test_virtual_tokens_lie_before_the_blocks(name: str, tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    loaded = tiny_loaded("llama")
    artifact = ArtifactStore(tmp_path).put(bytes(8))
    trainer = TRAINERS.build(load([f"trainer={name}"]).trainer)
    space = trainer.build(loaded, artifact, distribution=Distribution.gaussian).space

    assert lower_layers_of(loaded, space) is None
    assert not caplog.messages


def test_a_compiled_model_runs_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # all but the code, which takes 20 s
    loaded = compile_loaded(tiny_loaded("llama"), longest=64)
    assert lower_layers_of(loaded, full(loaded)) is None


class Leaving(Affine):
    """Leaves behind what it was given, as a layer does whose keys and values others share."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        self.seen = states
        return super().forward(states)


class Leaky(TwoBlocks):
    """What follows reads what its first block left behind."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[0] = Leaving(2.0)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids) + self.layers[0].seen


class Pair(nn.Module):
    """Gives two things."""

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return states, states


class Pairs(TwoBlocks):
    """Its first block gives more than states."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.layers[1](self.layers[0](self.embed(input_ids))[0])


def test_a_model_that_computes_something_else_without_its_lower_blocks_runs_whole(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, pairs = Leaky(), Pairs()
    pairs.layers[0] = Pair()
    with caplog.at_level(logging.WARNING):
        assert find_lower_layers(model, [model.layers[1].gain], model) is None
        assert find_lower_layers(pairs, [pairs.layers[1].gain], pairs) is None

    assert [record.getMessage() for record in caplog.records] == [
        "Leaky: the blocks below number 1, the first trained one, run in every forward: without them its states are "
        "not the same",
        "Pairs: the blocks below number 1, the first trained one, run in every forward: NotImplementedError: a Pair "
        "gives more than states",
    ]


class WithNone(TwoBlocks):
    """Its first block gives states and, in their tuple, None, as blocks do that could give attention weights."""

    class Block(Affine):
        def forward(self, states: torch.Tensor) -> Any:
            return super().forward(states), None

    def __init__(self) -> None:
        super().__init__()
        self.layers[0] = self.Block(2.0)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        states, none = self.layers[0](self.embed(input_ids))
        assert none is None
        return self.layers[1](states)


@torch.inference_mode()
def test_a_block_may_give_its_states_in_a_tuple_of_nothing_else() -> None:
    model, ids = WithNone(), torch.tensor([[3, 5]])
    lower = find_lower_layers(model, [model.layers[1].gain], model, cache_mb=1)
    assert lower is not None
    step = lower.of_step()

    found = [step.run(lambda: model(ids), ids, [(3, 5)]).flatten().tolist() for _ in range(2)]

    assert found == [[71, 111]] * 2


class Bare(TwoBlocks):
    """Fails without a word where its first block does not run."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        if "forward" in vars(self.layers[0]):
            raise NotImplementedError
        return super().forward(input_ids)


def test_an_error_without_words_is_an_error(caplog: pytest.LogCaptureFixture) -> None:
    model = Bare()
    assert find_lower_layers(model, [model.layers[1].gain], model) is None
    assert "NotImplementedError" in caplog.text


class Closed(TwoBlocks):
    """Its second block lets through what the first left behind, by a gate that is closed at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[0] = Leaving(2.0)
        self.layers[1].gate = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids) + self.layers[1].gate * self.layers[0].seen


def test_what_only_shows_at_other_trained_values_is_seen() -> None:
    model = Closed()

    @contextmanager
    def moved() -> Iterator[None]:
        model.layers[1].gate.data.fill_(0.5)
        yield
        model.layers[1].gate.data.zero_()

    assert find_lower_layers(model, [model.layers[1].gain, model.layers[1].gate], model, moved=moved) is None
    assert find_lower_layers(model, [model.layers[1].gain], model) is not None  # as long as the gate stays closed


def test_a_lack_of_memory_at_the_start_is_no_habit_of_the_model() -> None:
    model = TwoBlocks()

    def forward(ids: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        find_lower_layers(model, [model.layers[1].gain], forward)


_TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
_TINY |= {"num_key_value_heads": 2, "max_position_embeddings": 256, "vocab_size": 512}


def made_of(kind: str, **more: Any) -> LoadedModel:
    return wrap_model(tiny_model_from(CONFIG_MAPPING[kind](**{**_TINY, **more})), byte_tokenizer())


def test_blocks_that_share_keys_and_values_run_whole(caplog: pytest.LogCaptureFixture) -> None:
    loaded = made_of(
        "gemma3n_text",
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=8,
        laurel_rank=4,
        head_dim=8,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=512,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * 4,
    )

    assert lower_layers_of(loaded, FullSpace(loaded.model, parameters=parameters_from(loaded.model, 2))) is None
    assert "run in every forward: KeyError" in caplog.text


@pytest.mark.parametrize(
    ("kind", "rope"),
    [
        ("llama", {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}),
        (
            "phi3",
            {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 4,
                "long_factor": [4.0] * 4,
                "original_max_position_embeddings": 32,
                "factor": 8.0,
            },
        ),
    ],
)
def test_rows_are_not_kept_where_they_depend_on_their_batch(
    kind: str, rope: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    loaded = made_of(kind, rope_parameters=rope, pad_token_id=0)

    lower = lower_layers_of(loaded, full(loaded), cache_mb=1)

    assert lower is not None
    assert lower.rows is None
    assert "has no effect: its positions depend on the longest row of a batch" in caplog.text
    step = lower.of_step()
    np.testing.assert_array_equal(losses(loaded, step), losses(loaded, None))


class TwoLists(TwoBlocks):
    """A list of two blocks before one of three, all of like size."""

    def __init__(self) -> None:
        super().__init__()
        self.more = nn.ModuleList([Affine(2.0), Affine(3.0), Affine(4.0)])

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        states = super().forward(input_ids)
        for block in self.more:
            states = block(states)
        return states


def test_two_lists_of_like_size_are_no_blocks() -> None:
    two = TwoLists()
    assert find_blocks(two) == ("", [])
    with pytest.raises(
        ConfigError, match=r"must be 0 for a TwoLists, which has no single list of blocks, got 1\. Leave"
    ):
        upper_blocks(two, 1)


def test_what_a_lower_block_shares_is_not_trained() -> None:
    model = TwoBlocks()
    model.layers[1].gain = model.layers[0].gain
    model.layers[1].own = nn.Parameter(torch.ones(1))
    assert list(parameters_from(model, 1)) == ["layers.1.own"]


def test_blocks_are_the_list_of_most_parameters_that_is_in_no_other() -> None:
    model = tiny_loaded("mixtral").model
    name, blocks = find_blocks(model)
    assert (name, len(blocks)) == ("model.layers", 2)
    assert find_blocks(nn.Linear(2, 2)) == ("", [])
    inner = model.model
    trained = [[blocks[1].mlp.gate.weight], [inner.norm.weight], [inner.embed_tokens.weight], []]
    assert [first_trained_block(model, each) for each in trained] == [1, 2, 0, 0]
    assert first_trained_block(model, [inner.norm.weight, blocks[1].mlp.gate.weight]) == 1


@pytest.mark.parametrize("first_layer", [2, 40])
def test_a_first_layer_that_is_not_there_is_refused(first_layer: int) -> None:
    with pytest.raises(ConfigError) as caught:
        upper_blocks(tiny_loaded("llama").model, first_layer)
    assert str(caught.value) == (
        f"trainer.first_layer must be < 2, the number of blocks of this LlamaForCausalLM, got {first_layer}. Lower it."
    )
