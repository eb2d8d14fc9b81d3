"""A mask whose sums are made in groups is the one whose sums were made at once, bit for bit."""

from __future__ import annotations

import logging
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig

from fedzo.errors import ConfigError
from fedzo.masks import Granularity, Mask, eligible_parameters, grouped, select_mask, sensitivity
from fedzo.masks.grouped import plan_groups
from fedzo.models.memory import calibration_memory_bytes, weights_bytes
from fedzo.testing.tiny_models import tiny_model

WINDOWS = [torch.randint(0, 256, (12,), generator=torch.Generator().manual_seed(i)) for i in range(3)]


def mask_of(model: nn.Module, **settings: Any) -> Mask:
    return select_mask(model, density=0.02, windows=WINDOWS, **settings)


def must_be_same(found: Mask, expected: Mask) -> None:
    assert found.digest() == expected.digest()
    assert found.gradient is not None
    assert expected.gradient is not None
    assert list(found.gradient) == list(expected.gradient)
    assert all(torch.equal(found.gradient[name], each) for name, each in expected.gradient.items())
    assert found.manifest == expected.manifest


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "mixtral"])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.3])
def test_the_mask_of_groups_is_that_of_one_pass(family: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family)
    sizes = [parameter.numel() for parameter in eligible_parameters(model).values()]
    memory_bytes = max(4 * max(sizes), share * 4 * sum(sizes))
    whole = mask_of(model)
    made: list[int] = []
    zeros = sensitivity._zeros

    def noted(parameters: Any) -> Any:
        made.append(4 * sum(each.numel() for each in parameters.values()))
        return zeros(parameters)

    monkeypatch.setattr(sensitivity, "_zeros", noted)

    must_be_same(mask_of(model, memory_bytes=memory_bytes), whole)

    assert max(made) <= memory_bytes  # a group's squared sums are all that is held
    assert sum(made) == 4 * (sum(sizes) + whole.size)  # and signed sums at the chosen places alone


def test_sums_that_are_made_alone_are_those_that_are_made_together() -> None:
    model = tiny_model()
    parameters = eligible_parameters(model)
    gradients = sensitivity.WindowGradients(model, WINDOWS, sensitivity.next_token_loss)
    places = {name: torch.arange(0, parameter.numel(), 7) for name, parameter in parameters.items()}

    both = gradients.sums(parameters)
    squares, signed = gradients.sums(parameters, signed=False), gradients.sums(parameters, squares=False)
    some = gradients.sums(parameters, squares=False, places=places)

    assert (squares.signed, signed.squares, some.squares) == ({}, {}, {})
    for name in parameters:
        assert torch.equal(squares.squares[name], both.squares[name])
        assert torch.equal(signed.signed[name], both.signed[name])
        assert torch.equal(some.signed[name], both.signed[name][places[name]])


def test_tensors_that_compete_in_groups_give_the_mask_of_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "_is_cpu", lambda parameters: False)  # as on a GPU, whose squared sums wait here
    model = tiny_model("llama")

    found = mask_of(model, granularity=Granularity.everywhere, memory_bytes=4 * 32 * 64)

    must_be_same(found, mask_of(model, granularity=Granularity.everywhere))


def test_each_pass_counts_in_the_progress_and_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    model, told = tiny_model("llama"), []
    with caplog.at_level(logging.WARNING):
        mask_of(model, memory_bytes=4 * 32 * 64, on_window=lambda done, total: told.append((done, total)))

    # 2 layers of q, o [32, 32], k, v [16, 32], gate, up, down [64, 32]: half a tensor of the last, each of the others
    num_passes = 2 * (2 + 3) + 1
    assert told == [(done, num_passes * 3) for done in range(1, num_passes * 3 + 1)]
    assert [record.getMessage() for record in caplog.records] == [
        f"mask: the sums of 14 tensors do not fit into 0 MiB at once, so calibration passes over its text {num_passes} "
        "times"
    ]


def test_a_group_is_gone_when_the_next_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most, zeros = [0], sensitivity._zeros

    def noted(parameters: Any) -> Any:
        made = zeros(parameters)
        alive.extend(weakref.ref(each) for each in made.values())
        held = [each for each in (reference() for reference in alive) if each is not None]
        most[0] = max(most[0], sum(4 * each.numel() for each in held))
        return made

    monkeypatch.setattr(sensitivity, "_zeros", noted)
    mask_of(tiny_model("llama"), memory_bytes=4 * 32 * 64)

    assert most == [4 * 32 * 64]


def test_where_both_sums_fit_one_pass_makes_them(caplog: pytest.LogCaptureFixture) -> None:
    model, told = tiny_model("llama"), []
    enough = 8 * sum(parameter.numel() for parameter in eligible_parameters(model).values())

    with caplog.at_level(logging.INFO, logger="fedzo"):
        mask_of(model, memory_bytes=enough, on_window=lambda done, total: told.append(total))
    (said,) = caplog.messages
    mask_of(model, memory_bytes=enough - 1, on_window=lambda done, total: told.append(total))

    assert told == [3] * 3 + [6] * 6
    assert said == "mask: the sums of 14 tensors take 0 MiB, so calibration passes over its text once"


def test_what_does_not_fit_is_refused_before_any_pass() -> None:
    def fail(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a pass began")

    model = tiny_model("llama")
    with pytest.raises(ConfigError, match=r"of 'model.layers.0.mlp.gate_proj.weight' must fit .* trainer.selector=mag"):
        mask_of(model, memory_bytes=4 * 32 * 64 - 1, loss_fn=fail)
    with pytest.raises(ConfigError, match=r"of all eligible weights must fit .* write trainer.granularity=per_tensor"):
        mask_of(model, memory_bytes=4 * 32 * 64, granularity=Granularity.everywhere, loss_fn=fail)
    with pytest.raises(ConfigError, match=r"need 0 MiB, left are 0 MiB"):
        mask_of(model, memory_bytes=-1e9, loss_fn=fail)
    with pytest.raises(ConfigError, match=r"of the chosen weights must fit .* a lower trainer.density"):
        select_mask(model, density=1.0, windows=WINDOWS, memory_bytes=4 * 32 * 64, loss_fn=fail)


def test_sums_that_wait_must_fit_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "_is_cpu", lambda parameters: False)
    with pytest.raises(ConfigError, match=r"of all eligible weights must fit .* trainer.granularity=per_tensor"):
        mask_of(tiny_model("llama"), granularity=Granularity.everywhere, memory_bytes=4 * 32 * 64, host_bytes=4 * 18431)


def test_a_part_without_eligible_weights_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"got none of the 14 tensors that do. Lower trainer.first_layer."):
        mask_of(tiny_model("llama"), among=["model.norm.weight"])


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(0, 300))
def test_groups_hold_all_tensors_in_their_order_and_are_full(sizes: list[int], spare: int) -> None:
    named, memory_bytes = {str(i): size for i, size in enumerate(sizes)}, 4 * max(sizes) + spare

    groups = plan_groups(named, memory_bytes)

    assert [name for group in groups for name in group] == list(named)
    held = [4 * sum(named[name] for name in group) for group in groups]
    assert max(held) <= memory_bytes
    assert all(held[i] + 4 * named[groups[i + 1][0]] > memory_bytes for i in range(len(groups) - 1))


@pytest.mark.parametrize(
    ("config", "available_gib", "num_groups"),
    [
        (LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32), 24, 3),
        (
            OPTConfig(hidden_size=5120, ffn_dim=20480, num_hidden_layers=40, num_attention_heads=40, vocab_size=50272),
            40,
            4,
        ),
    ],
    ids=["Llama-2-7B", "OPT-13B"],
)
def test_large_models_fit_in_a_few_groups(config: Any, available_gib: int, num_groups: int) -> None:
    """By shapes alone: bfloat16 weights, windows of 256 tokens."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    sizes = {name: parameter.numel() for name, parameter in eligible_parameters(model).items()}
    left = (available_gib << 30) - weights_bytes(model)

    memory_bytes = calibration_memory_bytes(model, num_tokens=256, available_bytes=left)

    assert 0 < memory_bytes < 0.9 * left
    assert len(plan_groups(sizes, memory_bytes)) == num_groups


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_the_mask_of_groups_is_that_of_one_pass_but_for_its_edge(dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype=dtype).cuda()
    sizes = [parameter.numel() for parameter in eligible_parameters(model).values()]
    windows = [torch.randint(0, 256, (256,), generator=torch.Generator().manual_seed(i)) for i in range(3)]

    whole, groups = (
        select_mask(model, density=0.02, windows=windows, memory_bytes=memory_bytes)
        for memory_bytes in (float("inf"), 4 * max(sizes))
    )

    shared = sum(int(torch.isin(flat, groups.indices[name]).sum()) for name, flat in whole.indices.items())
    assert groups.size == whole.size
    assert shared >= 0.95 * whole.size
