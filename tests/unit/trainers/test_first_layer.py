"""``trainer.first_layer``: what is trained lies in the blocks from there on, as it would beside the rest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import nn
from transformers import BloomConfig

from fedzo.config.load import load
from fedzo.config.rules import launch_problems
from fedzo.errors import ConfigError
from fedzo.masks.mask import Mask
from fedzo.masks.mask_file import save_mask
from fedzo.models.adapters import remove
from fedzo.models.blocks import norms_from
from fedzo.models.loaded import LoadedModel
from fedzo.testing.tiny_models import tiny_loaded, tiny_model, tiny_model_from
from fedzo.trainers import TRAINERS, TrainerContext
from fedzo.trainers.adapters import Ia3TrainerConfig, LoraTrainerConfig
from fedzo.trainers.base import LayeredConfig
from fedzo.trainers.calibration import CalibrationSource
from fedzo.trainers.meerkat import Granularity, MeerkatConfig, Selector, choose_mask
from fedzo.trainers.mezo import MezoConfig
from fedzo.trainers.norms import NormsConfig
from fedzo.trainers.tables import TablesConfig
from fedzo.zo.config import Distribution

TEXTS = [f"Document {i}: the quick brown fox jumps over {i} lazy dogs." * 2 for i in range(12)]
SMALL: dict[str, Any] = {"calibration": CalibrationSource.train, "calibration_docs": 3, "calibration_tokens": 20}
LAW = Distribution.gaussian


@pytest.fixture
def place(tmp_path: Path) -> TrainerContext:
    return TrainerContext(folder=tmp_path, seed=3, texts=lambda: TEXTS)


def moved(loaded: LoadedModel, config: LayeredConfig, place: TrainerContext) -> set[str]:
    """Names of the parameters that a step moves; the reset must put all of them back."""
    trainer = TRAINERS.build(config)
    built = trainer.build(loaded, trainer.prepare(loaded, place).artifact, distribution=LAW)
    before = {name: parameter.detach().clone() for name, parameter in loaded.model.named_parameters()}
    built.space.step(0.5, key=3)
    changed = {name for name, parameter in loaded.model.named_parameters() if not torch.equal(parameter, before[name])}
    built.reset()
    assert all(torch.equal(parameter, before[name]) for name, parameter in loaded.model.named_parameters())
    return changed


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "qwen2", "gemma2"])
@pytest.mark.parametrize(
    "config",
    [MezoConfig(), MeerkatConfig(density=0.05, **SMALL), LoraTrainerConfig(), Ia3TrainerConfig()],
    ids=lambda config: type(config).__name__,
)
def test_steps_move_the_upper_blocks_alone(config: LayeredConfig, family: str, place: TrainerContext) -> None:
    whole, upper = tiny_loaded(family), tiny_loaded(family)
    blocks = {"opt": "model.decoder.layers", "gpt2": "transformer.h"}.get(family, "model.layers")

    everywhere = moved(whole, config, place)
    found = moved(upper, replace(config, first_layer=1), replace(place, folder=place.folder / "upper"))

    assert found == {name for name in everywhere if name.startswith(f"{blocks}.1.")}
    assert any(name.startswith(f"{blocks}.0.") for name in everywhere)


NORMS = {
    "llama": ["model.norm.weight"],
    "opt": ["model.decoder.final_layer_norm.weight", "model.decoder.final_layer_norm.bias"],
    "gpt2": ["transformer.ln_f.weight", "transformer.ln_f.bias"],
    "qwen3": ["model.norm.weight"],
    "gemma2": ["model.norm.weight"],
}


@pytest.mark.parametrize("family", NORMS)
def test_norms_are_those_of_the_upper_blocks_and_behind_them(family: str, place: TrainerContext) -> None:
    blocks = {"opt": "model.decoder.layers", "gpt2": "transformer.h"}.get(family, "model.layers")
    found = [moved(tiny_loaded(family), NormsConfig(first_layer=first), place) for first in range(3)]

    assert found[2] == set(NORMS[family])
    for names, first in zip(found, range(2), strict=False):
        vectors = [name for name, each in tiny_loaded(family).model.named_parameters() if each.ndim == 1]
        inner = {name for name in vectors if ("norm" in name or "ln_" in name) and name.startswith(blocks)}
        assert names == found[2] | {name for name in inner if int(name[len(blocks) + 1]) >= first}


def test_a_norm_of_the_embeddings_lies_before_the_blocks(place: TrainerContext) -> None:
    model = tiny_model_from(BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=64))

    assert [name for name in norms_from(model, 0) if "embed" in name] == [
        "transformer.word_embeddings_layernorm.weight",
        "transformer.word_embeddings_layernorm.bias",
    ]
    assert set(norms_from(model, 2)) == {"transformer.ln_f.weight", "transformer.ln_f.bias"}


class NormedEmbedding(nn.Embedding):
    """Named like a norm."""


def test_what_is_only_named_like_a_norm_or_no_text_passes_is_left_out() -> None:
    model = tiny_model("llama")
    inner = model.model
    inner.vision = nn.LayerNorm(8)  # of a tower that texts do not pass
    inner.embed_tokens.__class__ = NormedEmbedding
    inner.layers[0].norms = nn.Sequential(nn.LayerNorm(8))

    assert set(norms_from(model, 2)) == {"model.norm.weight"}
    assert all(each.ndim == 1 for each in norms_from(model, 0).values())
    assert not any("vision" in name or ".norms." in name for name in norms_from(model, 0))


def test_norms_that_are_not_there_are_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match=r"trainer.first_layer must be <= 2 for trainer=norms, the number of"):
        norms_from(model, 3)
    model.model.norm = torch.nn.Identity()
    with pytest.raises(ConfigError, match=r"trainer=norms must find norms with weights from block 2 of this LlamaFor"):
        norms_from(model, 2)


def test_tables_of_the_upper_blocks_and_their_part_of_the_gradient(place: TrainerContext) -> None:
    config = TablesConfig(**SMALL)
    whole, upper = tiny_loaded(sketched=True), tiny_loaded(sketched=True)
    gradient = TRAINERS.build(config).prepare(whole, place).gradient
    trainer = TRAINERS.build(replace(config, first_layer=1))

    prepared = trainer.prepare(upper, replace(place, resumed=False))
    space = trainer.build(upper, prepared.artifact, distribution=LAW).space

    named = [(name, p) for name, p in whole.model.named_parameters() if name.endswith(".tables")]
    chosen = [p.numel() for name, p in named if name.startswith("model.layers.1.")]
    assert space.size == sum(chosen) < sum(p.numel() for _, p in named)
    assert gradient is not None
    assert torch.equal(prepared.gradient, gradient[-space.size :])  # type: ignore[arg-type]
    assert moved(upper, replace(config, first_layer=1), place) == {
        n for n, _ in named if n.startswith("model.layers.1.")
    }


@pytest.mark.parametrize("selector", Selector)
def test_a_mask_of_the_upper_blocks_is_the_whole_masks_part(selector: Selector, place: TrainerContext) -> None:
    config = MeerkatConfig(density=0.05, selector=selector, **SMALL)
    loaded = tiny_loaded("llama")

    whole, upper = choose_mask(config, loaded, place), choose_mask(replace(config, first_layer=1), loaded, place)

    part = [name for name in whole.indices if name.startswith("model.layers.1.")]
    assert list(upper.indices) == part != list(whole.indices)
    assert all(torch.equal(upper.indices[name], whole.indices[name]) for name in part)
    if upper.gradient is not None:
        assert all(torch.equal(upper.gradient[name], whole.gradient[name]) for name in part)  # type: ignore[index]
    assert (whole.manifest.get("first_layer"), upper.manifest["first_layer"]) == (None, "1")


def test_the_share_of_all_together_is_of_the_upper_blocks(place: TrainerContext) -> None:
    config = MeerkatConfig(density=0.05, selector=Selector.magnitude, granularity=Granularity.everywhere, first_layer=1)
    loaded = tiny_loaded("llama")

    mask = choose_mask(config, loaded, place)

    eligible = [p for n, p in loaded.model.named_parameters() if n.startswith("model.layers.1.") and p.ndim == 2]
    assert mask.size == int(0.05 * sum(p.numel() for p in eligible))


def test_a_mask_that_is_given_tells_its_first_layer(place: TrainerContext, tmp_path: Path) -> None:
    config = MeerkatConfig(density=0.05, selector=Selector.magnitude, first_layer=1)
    mask: Mask = choose_mask(config, tiny_loaded("llama"), place)
    save_mask(mask, tmp_path / "given.safetensors")

    assert MeerkatConfig().recipe_of(tmp_path / "given.safetensors").first_layer == 1
    with pytest.raises(ConfigError, match=r"trainer\.first_layer must be 1 as for the mask .*, got 2\."):
        MeerkatConfig(first_layer=2).recipe_of(tmp_path / "given.safetensors")


def test_a_mask_of_all_blocks_does_not_pass_for_one_of_the_upper(place: TrainerContext, tmp_path: Path) -> None:
    mask = choose_mask(MeerkatConfig(density=0.05, selector=Selector.magnitude), tiny_loaded("llama"), place)
    save_mask(mask, tmp_path / "given.safetensors")

    with pytest.raises(ConfigError, match=r"trainer\.first_layer must be 0 as for the mask .*, got 1\."):
        MeerkatConfig(first_layer=1).recipe_of(tmp_path / "given.safetensors")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # by PEFT, of transformers
@pytest.mark.parametrize("config", [LoraTrainerConfig(first_layer=1), Ia3TrainerConfig(first_layer=1)])
def test_a_saved_adapter_of_the_upper_blocks_is_read_by_peft(
    config: Any, place: TrainerContext, tmp_path: Path
) -> None:
    loaded, ids = tiny_loaded("llama"), torch.arange(24).reshape(2, 12) * 7 % 256
    trainer = TRAINERS.build(config)
    built = trainer.build(loaded, trainer.prepare(loaded, place).artifact, distribution=LAW)
    built.space.step(0.5, key=3)
    assert built.save is not None
    built.save(tmp_path / "adapter")
    with torch.inference_mode():
        ours = loaded.model(input_ids=ids).logits
    remove(loaded.model)

    theirs = peft.PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path / "adapter"))

    with torch.inference_mode():
        np.testing.assert_array_equal(theirs(input_ids=ids).logits, ours)
        assert not torch.equal(ours, loaded.model(input_ids=ids).logits)


@pytest.mark.parametrize(
    "config",
    [MezoConfig(first_layer=2), MeerkatConfig(first_layer=2, **SMALL), LoraTrainerConfig(first_layer=2)],
    ids=lambda config: type(config).__name__,
)
def test_a_first_layer_that_the_model_lacks_is_refused(config: LayeredConfig, place: TrainerContext) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.first_layer must be < 2, the number of blocks .*, got 2\. Lower"):
        moved(tiny_loaded("llama"), config, place)


def test_a_layer_of_which_no_upper_block_has_one_is_refused(place: TrainerContext) -> None:
    config = LoraTrainerConfig(first_layer=1, target_modules=["layers.0.self_attn.q_proj"])
    with pytest.raises(ConfigError, match=r"trainer\.target_modules must name layers in the blocks from .*=1 on"):
        TRAINERS.build(config).build(tiny_loaded("llama"), place.artifacts.put(bytes(8)), distribution=LAW)


def test_a_negative_first_layer_is_refused_with_the_other_problems() -> None:
    config = load(["trainer=lora"])
    config.trainer = LoraTrainerConfig(first_layer=-1)

    assert [problem.key for problem in launch_problems(config)] == ["trainer.first_layer"]


def test_each_layer_that_the_user_names_must_be_in_an_upper_block(place: TrainerContext) -> None:
    """Also where another of the names is in one."""
    config = LoraTrainerConfig(first_layer=1, target_modules=["q_proj", "lm_head"])
    with pytest.raises(ConfigError, match=r"trainer\.target_modules must name layers .*=1 on, which have no lm_head\."):
        TRAINERS.build(config).build(tiny_loaded("qwen3"), place.artifacts.put(bytes(8)), distribution=LAW)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # by PEFT, of transformers
def test_layers_of_the_default_that_no_upper_block_has_are_left_out(place: TrainerContext) -> None:
    loaded: Any = tiny_loaded("llama")
    loaded.model.model.layers[1].mlp = nn.Identity()
    config = Ia3TrainerConfig(first_layer=1)

    built = TRAINERS.build(config).build(loaded, place.artifacts.put(bytes(8)), distribution=LAW)

    assert built.space.size == 16 + 16  # keys and values


def test_upper_blocks_of_another_kind_have_no_layer_of_the_default(place: TrainerContext) -> None:
    """As those of hybrids, whose attention is in some blocks alone."""

    class Mixer(nn.Module):
        def forward(self, *, hidden_states: Any, **others: Any) -> tuple[Any, None]:
            return hidden_states, None

    loaded: Any = tiny_loaded("llama")
    loaded.model.model.layers[1].self_attn = Mixer()

    with pytest.raises(ConfigError, match=r"in the blocks from trainer\.first_layer=1 on, got none\. Lower"):
        TRAINERS.build(LoraTrainerConfig(first_layer=1)).build(loaded, place.artifacts.put(bytes(8)), distribution=LAW)
