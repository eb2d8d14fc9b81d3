"""What transformers is told of attention: to ask torch for groups only where it has a fused kernel for them."""

from __future__ import annotations

import inspect
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, masking_utils
from transformers.integrations import sdpa_attention

from fedzo.data.config import Loss
from fedzo.data.encode import Example
from fedzo.models import attention, forwards, load, scoring
from fedzo.models.attention import has_groups, repeat_keys
from fedzo.models.compiled import CompiledDecoder, compile_decoder
from fedzo.models.forwards import Planning
from fedzo.models.head import hidden_at
from fedzo.models.memory import step_memory
from fedzo.models.scoring import example_losses
from fedzo.testing.tiny_models import tiny_loaded, tiny_model, tiny_model_from

ANSWER = object()


@pytest.fixture
def note(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``repeat_keys`` leaves transformers, for one test."""
    monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", sdpa_attention.use_gqa_in_sdpa)
    repeat_keys.__wrapped__()


@pytest.mark.parametrize(
    ("device", "dtype", "major", "whether"),
    [
        ("cpu", torch.float32, 0, True),
        ("cpu", torch.bfloat16, 0, True),
        ("mps", torch.float16, 0, True),
        ("cuda", torch.float32, 7, False),
        ("cuda", torch.float32, 9, False),
        ("cuda", torch.float16, 7, False),  # a T4
        ("cuda", torch.float16, 8, True),
        ("cuda", torch.bfloat16, 12, True),
    ],
)
def test_a_gpus_fused_kernels_have_groups_in_16_bits_from_ampere_on(
    device: str, dtype: torch.dtype, major: int, whether: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))

    assert has_groups(torch.device(device), dtype) is whether


def test_transformers_asks_the_function_that_the_note_replaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name of transformers' that it does not promise."""
    assert list(inspect.signature(sdpa_attention.use_gqa_in_sdpa).parameters) == ["attention_mask", "key", "value"]
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", lambda *given: asked.append(given))

    model = tiny_model("llama")
    with torch.inference_mode():
        model.get_decoder()(input_ids=torch.arange(16).view(2, 8))

    assert len(asked) == model.config.num_hidden_layers
    for mask, key, value in asked:
        assert mask is None
        assert key.shape == value.shape == (2, model.config.num_key_value_heads, 8, model.config.head_dim)


def test_what_transformers_answers_where_there_are_groups_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", lambda attention_mask, key, value: ANSWER)
    repeat_keys.__wrapped__()
    key = torch.zeros(1, 1, 4, 8)

    assert sdpa_attention.use_gqa_in_sdpa(None, key, key) is ANSWER
    monkeypatch.setattr(attention, "has_groups", lambda device, dtype: False)
    assert sdpa_attention.use_gqa_in_sdpa(None, key, key) is False


def test_keys_are_repeated_where_there_are_no_groups_and_the_states_are_the_same(
    note: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, ids, own = tiny_model("llama").get_decoder(), torch.arange(16).view(2, 8), F.scaled_dot_product_attention
    calls: list[tuple[bool, bool]] = []

    def spied(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **how: Any) -> torch.Tensor:
        calls.append((how.get("enable_gqa", False), key.shape[1] == query.shape[1]))
        return own(query, key, value, **how)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spied)
    found = []
    with torch.inference_mode():
        for whether in (True, False):
            monkeypatch.setattr(attention, "has_groups", lambda device, dtype, whether=whether: whether)
            found.append(decoder(input_ids=ids).last_hidden_state)

    layers = decoder.config.num_hidden_layers
    assert calls == [(True, False)] * layers + [(False, True)] * layers
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(("device", "times"), [("cpu", 0), ("mps", 0), ("cuda", 1), ("cuda:1", 1)])
def test_transformers_is_told_before_the_first_forward_of_a_model_on_a_gpu_alone(
    device: str, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr(load, "repeat_keys", lambda: done.append("told"))
    given = tiny_loaded()
    given.model.get_decoder().register_forward_pre_hook(lambda *_: done.append("a forward"))

    load._wrap(given.model, given.tokenizer, device=torch.device(device), digest="", source="here", read_weights=list)

    assert done[:times] == ["told"] * times
    assert {*done[times:]} == {"a forward"}


@pytest.mark.parametrize(
    ("device", "is_compiled", "looks"), [("cpu", False, True), ("cuda", False, False), ("cuda", True, True)]
)
def test_on_a_gpu_transformers_does_not_look_whether_texts_are_packed(
    device: str, is_compiled: bool, looks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look waits for the GPU. A compiled decoder is traced as it was when it was checked."""
    seen: list[int] = []
    own = masking_utils.find_packed_sequence_indices

    def look(position_ids: torch.Tensor) -> torch.Tensor | None:
        seen.append(1)
        return own(position_ids)

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", look)
    monkeypatch.setattr(attention, "_LOOK", look)
    for module in (forwards, scoring):
        monkeypatch.setattr(module, "on_device", lambda numbers, device: torch.from_numpy(numbers))
    loaded = tiny_loaded()
    decoder = CompiledDecoder(loaded.model.get_decoder(), longest=16) if is_compiled else None
    rows = [Example(tuple(range(length)), ((7,), (250,)), 0) for length in (5, 9)]
    there = replace(loaded, device=torch.device(device), decoder=decoder)
    seen.clear()  # of what is checked when a model is loaded

    found = example_losses(there, rows, Planning(4096), loss=Loss.candidates)

    assert bool(seen) is looks
    np.testing.assert_allclose(found, example_losses(loaded, rows, Planning(4096), loss=Loss.candidates), atol=1e-5)


@pytest.mark.gpu
def test_a_long_forward_of_shared_keys_keeps_to_the_estimate(note: None) -> None:
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    )
    model = tiny_model_from(config).cuda()
    at = torch.zeros(1, dtype=torch.int64, device="cuda")

    def forward(num_tokens: int) -> None:
        with torch.inference_mode():
            hidden_at(model, torch.ones(2, num_tokens, dtype=torch.int64, device="cuda"), at, at)

    forward(16)  # libraries take memory of their own
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    forward(2048)

    step = step_memory(model, batch_tokens=2 * 2048, trained_bytes=0)
    assert torch.cuda.max_memory_allocated() - before <= sum(step) - step.weights


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_decoder_is_one_graph_all_the_same(note: None, dtype: torch.dtype) -> None:
    compile_decoder(tiny_model("llama", dtype=dtype).cuda(), longest=16)
