"""Which parameters are eligible, against lists written out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedzo.errors import ConfigError
from fedzo.masks import eligible_parameters
from fedzo.testing.tiny_models import tiny_model

_LLAMA = [
    *(f"self_attn.{x}_proj.weight" for x in "qkvo"),
    *(f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")),
]
_OPT = [
    *(f"self_attn.{x}.weight" for x in ("k_proj", "v_proj", "q_proj", "out_proj")),
    "fc1.weight",
    "fc2.weight",
]
_GPT2 = [f"{x}.weight" for x in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
_MIXTRAL = [
    *(f"self_attn.{x}_proj.weight" for x in "qkvo"),
    "mlp.gate.weight",
    "mlp.experts.gate_up_proj",
    "mlp.experts.down_proj",
]


@pytest.mark.parametrize(
    ("family", "prefix", "names"),
    [
        ("llama", "model.layers", _LLAMA),
        ("qwen3", "model.layers", _LLAMA),
        ("gemma2", "model.layers", _LLAMA),
        ("gpt2", "transformer.h", _GPT2),
        ("mixtral", "model.layers", _MIXTRAL),
    ],
)
def test_attention_and_mlp_projections_are_eligible(family: str, prefix: str, names: list[str]) -> None:
    model = tiny_model(family)

    found = eligible_parameters(model)

    assert sorted(found) == sorted(f"{prefix}.{layer}.{name}" for layer in (0, 1) for name in names)
    assert list(found) == [name for name, _ in model.named_parameters() if name in found]
    assert all(parameter is model.get_parameter(name) for name, parameter in found.items())


def test_opts_narrow_embedding_projections_count_as_projections() -> None:
    found = eligible_parameters(tiny_model("opt"))

    layers = [f"model.decoder.layers.{layer}.{name}" for layer in (0, 1) for name in _OPT]
    assert sorted(found) == sorted([*layers, "model.decoder.project_in.weight", "model.decoder.project_out.weight"])


class Mixed(nn.Module):
    """One of everything; ``out`` is the head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(6, 4)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.final_norm = nn.Linear(4, 4)
        self.out = nn.Linear(4, 6, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.out


def test_embeddings_heads_norms_and_biases_are_not_eligible_whatever_they_are_called() -> None:
    assert list(eligible_parameters(Mixed())) == ["first.weight", "second.weight"]


def test_a_shared_projection_counts_once() -> None:
    by_identity, by_storage = Mixed(), Mixed()
    by_identity.second.weight = by_identity.first.weight
    by_storage.second.weight = nn.Parameter(by_storage.first.weight.data)

    assert list(eligible_parameters(by_identity)) == ["first.weight"]
    assert list(eligible_parameters(by_storage)) == ["first.weight"]


def test_a_projection_that_an_embedding_shares_is_not_eligible() -> None:
    model = Mixed()
    model.first = nn.Linear(4, 6, bias=False)
    model.first.weight = nn.Parameter(model.tokens.weight.data)
    model.second.weight = model.final_norm.weight

    with pytest.raises(ConfigError, match="must have an eligible weight"):
        eligible_parameters(model)


def test_integer_weights_are_not_eligible() -> None:
    model = Mixed()
    model.first.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)

    assert list(eligible_parameters(model)) == ["second.weight"]


def test_a_model_without_an_eligible_weight_is_refused_with_what_it_has() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.LayerNorm(3))

    with pytest.raises(
        ConfigError, match=r"got none\. Its first parameters: 0\.weight \(5, 3\) torch\.float32, 1\.weight"
    ):
        eligible_parameters(model)


def test_attention_in_a_block_that_is_named_after_norms_is_eligible() -> None:
    """As DBRX names it."""
    block = nn.ModuleDict({"norm_1": nn.LayerNorm(4), "attn": nn.ModuleDict({"Wqkv": nn.Linear(4, 12)})})
    model = nn.ModuleDict({"norm_attn_norm": block, "norm": nn.ModuleDict({"linear": nn.Linear(4, 4)})})

    assert list(eligible_parameters(model)) == ["norm_attn_norm.attn.Wqkv.weight"]
