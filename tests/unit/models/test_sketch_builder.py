"""Sketching a whole model: beside a slow twin, killed and resumed, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama.configuration_llama import LlamaConfig

from fedzo.errors import ConfigError
from fedzo.models.sketched.builder import layers_to_sketch, left_dense, sketch_model
from fedzo.models.sketched.layers import dense_layers, weight_of
from fedzo.models.sketched.walk import start_walk
from fedzo.sketch import SketchLinear, SketchSettings, decode, sketch_matrix, sketched_layers
from fedzo.testing.tiny_models import SKETCHED, tiny_model, tiny_model_from, tiny_sketch

WINDOWS = [torch.randint(3, 500, (24,), generator=torch.Generator().manual_seed(i)) for i in range(6)]
STAGES = {
    "llama": [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ],
    "opt": [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.out_proj"], ["fc1"], ["fc2"]],
    "qwen2": [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ],
    "gpt2": [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]],
}
PREFIX = {"llama": "model.layers", "qwen2": "model.layers", "opt": "model.decoder.layers", "gpt2": "transformer.h"}


def without_cache(family: str) -> Any:
    """With biases of Qwen2 that are not zero."""
    model, generator = tiny_model(family), torch.Generator().manual_seed(0)
    model.config.use_cache = False
    for layer in dense_layers(model).values() if family == "qwen2" else ():
        if layer.bias is not None:
            layer.bias.normal_(0, 0.1, generator=generator)
    return model


def hessian_of(model: nn.Module, name: str) -> torch.Tensor:
    """(2 / n) sum x x^T of one layer, one window and one whole forward at a time."""
    total, count = torch.zeros(()), 0

    def add(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        nonlocal total, count
        for x in args[0].reshape(-1, args[0].shape[-1]).double():
            total = total + 2 * torch.outer(x, x)
            count += 1

    hook = model.get_submodule(name).register_forward_pre_hook(add)
    with torch.no_grad():
        for window in WINDOWS:
            model(window[None])
    hook.remove()
    return total / count


@pytest.mark.parametrize("family", STAGES)
def test_each_stage_sees_what_the_sketched_layers_before_it_give(family: str, tmp_path: Path) -> None:
    model, twin, settings = without_cache(family), without_cache(family), SketchSettings(bits=3, groups_per_row=2)

    sketch_model(model, WINDOWS, settings, kept=tmp_path)

    for number in range(2):
        for stage in STAGES[family]:
            names = [f"{PREFIX[family]}.{number}.{name}" for name in stage]
            hessian = hessian_of(twin, names[0])
            for name in names:
                layer: Any = twin.get_submodule(name)
                sketch = sketch_matrix(weight_of(layer), hessian, settings)
                sketched = SketchLinear.of(sketch.codes, sketch.tables, sketch.num_columns, layer.bias)
                twin.set_submodule(name, sketched)
                built: Any = model.get_submodule(name)
                shape = layer.weight.T.shape if family == "gpt2" else layer.weight.shape
                ours, theirs = (decode(of.codes, of.tables, torch.empty(shape)) for of in (built, sketch))
                assert torch.equal(built.tables, sketch.tables.float()), name  # up to last bits of the Hessian
                assert (ours != theirs).float().mean() < 5e-3, name
                assert (built.bias is None) == (layer.bias is None)
                if layer.bias is not None:
                    assert family != "qwen2" or layer.bias.any()
                    assert torch.equal(built.bias, layer.bias)


def test_without_sequence_every_hessian_is_the_dense_models(tmp_path: Path) -> None:
    model, dense = without_cache("llama"), without_cache("llama")

    sketch_model(model, WINDOWS, SketchSettings(), sequential=False, kept=tmp_path)

    for name in ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"):
        layer: Any = dense.get_submodule(name)
        sketch = sketch_matrix(layer.weight, hessian_of(dense, name), SketchSettings())
        built: Any = model.get_submodule(name)
        theirs = decode(sketch.codes, sketch.tables, torch.empty(layer.weight.shape))
        assert (built.weight != theirs).float().mean() < 5e-3


@pytest.mark.parametrize("family", SKETCHED)
def test_a_walk_gives_the_states_of_a_forward(family: str) -> None:
    model = without_cache(family)
    seen: list[torch.Tensor] = []
    windows = [*WINDOWS, *(window.flip(0) for window in WINDOWS[:4])]  # 4, 4 and 2: one call serves two batches
    with torch.no_grad():
        walk = start_walk(model, windows)
        hook = walk.blocks[-1].register_forward_hook(
            lambda _, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        for window in windows:
            model(window[None])
        hook.remove()
        for number in range(len(walk.blocks)):
            walk.advance(number)

    torch.testing.assert_close(torch.cat(walk.states), torch.cat(seen), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", SKETCHED)
def test_no_logits_are_made(family: str, tmp_path: Path) -> None:
    model = without_cache(family)
    positions: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _, args, out: positions.append(out[..., 0].numel()))

    sketch_model(model, WINDOWS, SketchSettings(), kept=tmp_path)

    assert not positions


@pytest.mark.parametrize("family", SKETCHED)
def test_head_embeddings_and_norms_stay_and_the_rest_computes_alike(family: str, tmp_path: Path) -> None:
    model, dense = without_cache(family), without_cache(family)

    results = sketch_model(model, WINDOWS, SketchSettings(), kept=tmp_path).layers

    assert set(results) == set(sketched_layers(model)) == layers_to_sketch(dense, 1, [])
    assert not any(name.endswith("lm_head") for name in results)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (dense.get_input_embeddings().weight is dense.get_output_embeddings().weight)
    with torch.no_grad():
        ours, theirs = model(WINDOWS[0][None]).logits, dense(WINDOWS[0][None]).logits
    assert 0 < float(((ours - theirs) ** 2).mean() / (theirs**2).mean()) < 0.03
    assert all(0 < layer.relative_error < 0.01 for layer in results.values())


def test_what_is_left_dense_is_listed_with_fused_experts(tmp_path: Path) -> None:
    model = without_cache("mixtral")
    sketch_model(model, WINDOWS, SketchSettings(), kept=tmp_path)

    left = left_dense(model)

    assert left["model.layers.*.mlp.experts.gate_up_proj"] == (2, 2 * 4 * 128 * 32)
    assert left["lm_head.weight"] == (1, 512 * 32)
    assert not any("proj.weight" in name or "tables" in name for name in left)


def test_skipped_layers_stay_dense(tmp_path: Path) -> None:
    model = without_cache("llama")

    results = sketch_model(
        model, WINDOWS, SketchSettings(), skip=["down_proj", "0.self_attn.q_proj"], kept=tmp_path
    ).layers

    dense = {name for name in dense_layers(model) if name != "lm_head"}
    assert dense == {f"model.layers.{i}.mlp.down_proj" for i in (0, 1)} | {"model.layers.0.self_attn.q_proj"}
    assert len(results) == 14 - 3


@pytest.mark.parametrize("finished", range(0, 14, 3))
def test_a_killed_build_ends_with_the_same_bytes(finished: int, tmp_path: Path) -> None:
    model, again = without_cache("llama"), without_cache("llama")
    sketch_model(model, WINDOWS, SketchSettings(), kept=tmp_path / "whole")

    class Killed(Exception):
        pass

    def kill(done: int, total: int) -> None:
        assert total == 14
        if done > finished:
            raise Killed

    with pytest.raises(Killed):
        sketch_model(without_cache("llama"), WINDOWS, SketchSettings(), kept=tmp_path / "part", advance=kill)
    files = list((tmp_path / "part").iterdir())
    assert len(files) == finished + 1
    files[0].write_bytes(files[0].read_bytes()[:-40])  # damaged: made anew
    times = {file: file.stat().st_mtime_ns for file in files[1:]}

    sketch_model(again, WINDOWS, SketchSettings(), kept=tmp_path / "part")

    assert times == {file: file.stat().st_mtime_ns for file in files[1:]}  # none of the finished ones
    for (name, one), (_, other) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(one, other), name


def test_progress_ends_at_all_layers_where_some_are_not_reached(tmp_path: Path) -> None:
    model = without_cache("llama")
    model.model.layers[0].mlp.spare = nn.Linear(8, 8, bias=False)
    told: list[tuple[int, int]] = []

    results = sketch_model(
        model, WINDOWS, SketchSettings(), kept=tmp_path, advance=lambda done, total: told.append((done, total))
    ).layers

    assert told[-1] == (14, 14)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert "model.layers.0.mlp.spare" not in results
    assert "model.layers.0.mlp.spare" in dense_layers(model)


class Between(nn.Module):
    """A decoder that changes the states between two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace()
        self.embed = nn.Embedding(500, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self.embed(input_ids)
        for block in self.blocks:
            states = 2 * block(states)
        return states


class Adds(nn.Module):
    """A block that adds what it makes of something else than the states, which may lie in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, states: torch.Tensor, other: Any, leaves: bool = False) -> torch.Tensor:
        if leaves:
            other["states"] = states
        added: torch.Tensor = self.linear(other["states"] if isinstance(other, dict) else other)
        return states + added


class Hands(Between):
    """A decoder that hands each block the embedded text, too, as Zamba does."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Adds() for _ in range(2))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self.embed(input_ids)
        embedded = states
        for block in self.blocks:
            states = block(states, embedded)
        return states


class Leaves(Hands):
    """A decoder whose first block leaves its states for the second, in a dict, as Gemma 4 does with keys and values."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self.embed(input_ids)
        left: dict[str, torch.Tensor] = {}
        for number, block in enumerate(self.blocks):
            states = block(states, left, leaves=number == 0)
        return states


@pytest.mark.parametrize(
    ("make", "groups", "skip", "expected"),
    [
        (lambda: tiny_sketch("llama"), 1, [], "must be dense, but is a sketch already (14 layers, such as"),
        (
            lambda: tiny_model("llama"),
            3,
            [],
            "'model.layers.0.self_attn.q_proj' must be a multiple of groups_per_row=3",
        ),
        (lambda: tiny_model("llama"), 1, ["q_prj"], "--skip must name linear layers (down_proj, gate_proj"),
        (
            lambda: tiny_model("llama"),
            1,
            [f"{name}_proj" for name in ("q", "k", "v", "o", "up", "gate", "down")],
            "at least one linear layer must be left to sketch",
        ),
        (lambda: Between(), 1, [], "its blocks exchange more than hidden states"),
        (lambda: Hands(), 1, [], "its blocks exchange more than hidden states"),
        (lambda: Leaves(), 1, [], "its blocks exchange more than hidden states"),
    ],
)
def test_what_cannot_be_sketched_is_refused_before_anything_is_changed(
    make: Callable[[], Any], groups: int, skip: list[str], expected: str, tmp_path: Path
) -> None:
    model = make()
    model.config.use_cache = False
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    with pytest.raises(ConfigError, match=re.escape(expected)):
        sketch_model(model, WINDOWS, SketchSettings(groups_per_row=groups), skip=skip, kept=tmp_path)

    assert not list(tmp_path.iterdir())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_states_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = without_cache("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")

    with pytest.raises(ConfigError, match="states of the calibration text must be finite"):
        sketch_model(model, WINDOWS, SketchSettings(), kept=tmp_path)


def test_a_model_without_blocks_of_linear_layers_is_refused() -> None:
    bare = tiny_model_from(LlamaConfig(vocab_size=32, hidden_size=8, num_hidden_layers=0, num_attention_heads=2))

    with pytest.raises(ConfigError, match="must be a decoder whose blocks hold linear layers"):
        layers_to_sketch(bare, 1, [])
