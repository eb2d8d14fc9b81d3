"""The tiny models that other tests stand on."""

from __future__ import annotations

import pytest
import torch

from fedzo.testing.tiny_models import FAMILIES, tiny_loaded, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_seed_names_the_weights_and_the_global_generator_is_left_alone(family: str) -> None:
    before = torch.random.get_rng_state()
    first, again, other = (tiny_model(family, seed=seed).state_dict() for seed in (0, 0, 1))

    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_families_have_what_they_are_there_for() -> None:
    shapes = {family: {n: tuple(p.shape) for n, p in tiny_model(family).named_parameters()} for family in FAMILIES}

    assert "lm_head.weight" in shapes["qwen3"]
    assert "lm_head.weight" not in shapes["llama"]
    assert any("project_out" in name for name in shapes["opt"])
    assert any(len(shape) == 3 for shape in shapes["mixtral"].values())
    assert shapes["gpt2"]["transformer.h.0.mlp.c_fc.weight"] == (32, 128)  # Conv1D: inputs first


def test_token_ids_of_the_byte_tokenizer_fit_every_model() -> None:
    loaded = tiny_loaded("gpt2", vocab_size=300)

    assert loaded.model.get_input_embeddings().num_embeddings == 300
    assert max(loaded.tokenizer.get_vocab().values()) < 300
    assert loaded.model.config.pad_token_id == loaded.tokenizer.pad_token_id
