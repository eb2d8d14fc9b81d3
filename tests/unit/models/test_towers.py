"""Parts for images and sound, which no text passes: whoever trains leaves them as they are."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import (
    AutoModel,
    Gemma3Config,
    Gemma3nConfig,
    Gemma3nForConditionalGeneration,
    Phi4MultimodalConfig,
    PreTrainedConfig,
)

from fedzo.errors import ConfigError
from fedzo.masks import eligible_parameters
from fedzo.models.blocks import find_blocks, norms_from, parameters_from, text_parameters
from fedzo.models.load import wrap_model
from fedzo.models.loaded import LoadedModel
from fedzo.testing.tiny_models import (
    SKETCHED,
    WITHOUT_ATTENTION,
    byte_tokenizer,
    tiny_model,
    tiny_model_from,
    tiny_sketch,
)
from fedzo.trainers import TRAINERS, Built, TrainerContext
from fedzo.trainers.adapters import Ia3TrainerConfig, LoraTrainerConfig
from fedzo.trainers.base import TrainerConfig
from fedzo.trainers.calibration import CalibrationSource
from fedzo.trainers.meerkat import Granularity, MeerkatConfig, Selector
from fedzo.trainers.mezo import MezoConfig
from fedzo.zo.config import Distribution

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # by PEFT, of transformers

TOWERS = {
    "gemma3": ("model.vision_tower.", "model.multi_modal_projector."),
    "phi4_multimodal": ("model.embed_tokens_extend.",),
}
"""Which parts of a family no text passes, by the names in its code."""
BLOCKS = {"gemma3": "model.language_model.layers", "phi4_multimodal": "model.layers"}
TEXTS = [f"Document {i}: the quick brown fox jumps over {i} lazy dogs." * 2 for i in range(12)]
SMALL: dict[str, Any] = {"calibration": CalibrationSource.train, "calibration_docs": 3, "calibration_tokens": 20}
IDS = torch.arange(24).reshape(2, 12) * 7 % 256
_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT |= {"num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 512}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_IMAGES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 8, "num_attention_heads": 2}
_IMAGES |= {"image_size": 28, "patch_size": 14}
_SOUND = {"hidden_size": 16, "intermediate_size": 32, "num_blocks": 2, "num_attention_heads": 2}
_SOUND |= {"ext_pw_out_channel": 16, "depthwise_separable_out_channel": 16, "nemo_conv_channels": 8}


def config_of(kind: str) -> PreTrainedConfig:
    """With a vision tower that is larger than the text's blocks."""
    if kind == "gemma3":
        text = {**_TEXT, **_IDS, "head_dim": 8}
        return Gemma3Config(text_config=text, vision_config=_IMAGES, mm_tokens_per_image=1)
    images = {**_IMAGES, "crop_size": 28}
    return Phi4MultimodalConfig(
        **_TEXT, **_IDS, original_max_position_embeddings=512, vision_config=images, audio_config=_SOUND
    )


def made_of(kind: str) -> LoadedModel:
    return wrap_model(tiny_model_from(config_of(kind)), byte_tokenizer())


def build(loaded: LoadedModel, config: TrainerConfig) -> Built:
    trainer = TRAINERS.build(config)
    with tempfile.TemporaryDirectory() as folder:
        place = TrainerContext(folder=Path(folder), seed=7, texts=lambda: TEXTS)
        return trainer.build(loaded, trainer.prepare(loaded, place).artifact, distribution=Distribution.gaussian)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("kind", TOWERS)
def test_a_text_is_computed_with_what_its_logits_have_gradients_in(kind: str) -> None:
    model: Any = made_of(kind).model
    named = dict(model.named_parameters())

    found = text_parameters(model)

    assert list(found) == [name for name in named if not name.startswith(TOWERS[kind])] != list(named)
    assert all(found[name] is named[name] for name in found)
    model.requires_grad_(True)
    total = model(input_ids=IDS).logits.square().sum()
    gradients = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    assert list(found) == [name for name, gradient in zip(named, gradients, strict=True) if gradient is not None]


@pytest.mark.parametrize("family", [*SKETCHED, *WITHOUT_ATTENTION])
def test_a_model_of_text_alone_is_trained_whole_and_in_its_order(family: str) -> None:
    model = tiny_model(family)

    found = parameters_from(model, 0)

    assert [(name, id(each)) for name, each in found.items()] == [
        (name, id(each)) for name, each in model.named_parameters()
    ]


def test_all_tables_of_a_sketch_are_a_texts() -> None:
    sketch = tiny_sketch()

    assert list(text_parameters(sketch)) == [name for name, _ in sketch.named_parameters()]


class Unusual(nn.Module):
    """One of three experts is taken, a head's weight is read though nobody calls it, a tower's dtype is looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.images = nn.ModuleList([nn.Linear(4, 4)])
        self.embed = nn.Embedding(8, 4)
        self.blocks = nn.ModuleList([nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(4, 4) for _ in range(3))})])
        self.head = nn.Linear(4, 8, bias=False)
        self.turned = nn.Linear(8, 8, bias=False)
        self.sound = nn.Linear(4, 4)
        self.sound.weight = self.blocks[0]["experts"][0].weight

    def forward(self, input_ids: torch.Tensor) -> Any:
        states = self.blocks[0]["experts"][0](self.embed(input_ids).to(self.images[0].weight.dtype))
        return SimpleNamespace(logits=F.linear(states, self.head.weight) @ self.turned.weight.T)


def test_what_is_read_without_a_call_and_what_another_text_may_take_is_a_texts() -> None:
    model = Unusual()
    names = [name for name, _ in model.named_parameters()]

    assert list(text_parameters(model)) == [name for name in names if not name.startswith(("images.", "sound."))]
    assert names[:2] == ["images.0.weight", "images.0.bias"]
    assert find_blocks(model) == ("blocks", list(model.blocks))


class Both(nn.Linear):
    """Gives two things."""

    def forward(self, states: torch.Tensor) -> Any:
        return super().forward(states), states


class Discarding(nn.Module):
    """Embeds every text as images, too, and throws that away; a tower is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Linear(4, 4)
        self.embed = nn.Embedding(8, 4)
        self.images = nn.ModuleDict({"norm": nn.LayerNorm(4), "turn": nn.Linear(4, 4), "mix": nn.Linear(4, 4)})
        self.blocks = nn.ModuleList([nn.Linear(4, 4)])
        self.mix = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.both = Both(4, 4)
        self.images["turn"].weight = self.blocks[0].weight
        self.images["mix"].weight = self.mix.weight

    def forward(self, input_ids: torch.Tensor) -> Any:
        states = self.embed(input_ids)
        images = self.images["mix"](self.images["turn"](self.images["norm"](states)))
        states = torch.where((input_ids < 0)[..., None], self.both(images)[0], states)
        return SimpleNamespace(logits=self.norm(self.mix(self.blocks[0](states).relu())))


def test_what_a_text_is_embedded_with_in_vain_is_none_of_its_parts() -> None:
    """A weight that is shared with what has an effect is one, and what gives no single tensor is taken for one."""
    model = Discarding()
    named = dict(model.named_parameters())
    before = model(IDS % 8).logits

    found = text_parameters(model)

    gradients = torch.autograd.grad(before.square().sum(), list(named.values()), allow_unused=True)
    moved = [name for name, each in zip(named, gradients, strict=True) if each is not None and each.any()]
    assert [name for name in found if not name.startswith("both.")] == moved
    biases = {"images.norm.bias", "images.turn.bias", "images.mix.bias"}
    assert {*named} - {*found} == {"tower.weight", "tower.bias", "images.norm.weight", *biases}
    assert list(norms_from(model, 0)) == ["norm.weight", "norm.bias"]
    assert torch.equal(model(IDS % 8).logits, before)


def test_gemma_3n_embeds_images_and_sound_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"hidden_size": 16, "vocab_size": 8}
    text = {**_TEXT, **_IDS, "head_dim": 8, "vocab_size_per_layer_input": 496, "hidden_size_per_layer_input": 8}
    text |= {"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0, "laurel_rank": 4}
    text |= {"altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 2}
    sound = {"conf_num_hidden_layers": 1, "conf_num_attention_heads": 2, "sscp_conv_channel_size": [4, 4]}
    config = Gemma3nConfig(
        text_config=text,
        vision_config={**small, "vocab_offset": 496},
        audio_config={**small, **sound, "vocab_offset": 504, "input_feat_size": 16},
    )
    made, vision = AutoModel.from_config, config.vision_config
    tower = nn.Linear(4, 4)  # its own needs a package
    monkeypatch.setattr(AutoModel, "from_config", lambda config: tower if config is vision else made(config))
    model = Gemma3nForConditionalGeneration(config).eval()

    left_out = {name for name, _ in model.named_parameters()} - {*text_parameters(model)}

    towers = ("model.vision_tower.", "model.audio_tower.")
    embedders = ("model.embed_vision.", "model.embed_audio.")
    assert left_out == {name for name, _ in model.named_parameters() if name.startswith(towers + embedders)}
    assert find_blocks(model)[0] == "model.language_model.layers"


def test_blocks_are_those_that_a_text_passes_though_a_tower_is_larger() -> None:
    for kind, where in BLOCKS.items():
        model = made_of(kind).model
        sizes = {
            name: sum(each.numel() for each in blocks.parameters())
            for name, blocks in model.named_modules()
            if isinstance(blocks, nn.ModuleList)
        }

        name, blocks = find_blocks(model)

        assert (name, blocks) == (where, list(model.get_submodule(where).children()))
        assert max(sizes.values()) > 2 * sizes[where]
        assert all(each.startswith(f"{where}.1.") for each in parameters_from(model, 1))


@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize(
    "config",
    [
        MezoConfig(),
        MeerkatConfig(density=0.05, **SMALL),
        MeerkatConfig(density=0.05, selector=Selector.random),
        MeerkatConfig(density=0.5, selector=Selector.magnitude, granularity=Granularity.everywhere),
    ],
    ids=["mezo", "sensitivity", "random", "magnitude"],
)
def test_a_step_leaves_towers_as_they_are(kind: str, config: TrainerConfig) -> None:
    loaded = made_of(kind)
    before = {name: each.clone() for name, each in loaded.model.named_parameters()}
    candidates = before if isinstance(config, MezoConfig) else eligible_parameters(loaded.model)
    assert any(name.startswith(TOWERS[kind]) for name in candidates)

    built = build(loaded, config)
    built.space.step(0.5, key=3)

    moved = [name for name, each in loaded.model.named_parameters() if not torch.equal(each, before[name])]
    assert moved == [name for name in candidates if not name.startswith(TOWERS[kind])]
    built.reset()
    assert all(torch.equal(each, before[name]) for name, each in loaded.model.named_parameters())


LORA_SIZE = {"gemma3": 2 * 8 * ((32 + 32) + (32 + 16)), "phi4_multimodal": 2 * 8 * (32 + 64)}  # its qkv_proj is fused
# keys and values, or all three, and what enters the last layer of the MLP
IA3_SIZE = {"gemma3": 2 * (16 + 16 + 64), "phi4_multimodal": 2 * (64 + 64)}


@pytest.mark.parametrize("kind", TOWERS)
def test_an_adapter_sits_on_layers_of_the_text(kind: str) -> None:
    loaded = made_of(kind)
    base = logits(loaded.model)

    for config, size in (
        (LoraTrainerConfig(), LORA_SIZE[kind]),
        (LoraTrainerConfig(first_layer=1), LORA_SIZE[kind] // 2),
        (Ia3TrainerConfig(), IA3_SIZE[kind]),
    ):
        built = build(loaded, config)
        layers = [name for name, each in loaded.model.named_modules() if isinstance(each, BaseTunerLayer)]

        assert built.space.size == size
        assert all(name.startswith(f"{BLOCKS[kind]}.") for name in layers)
        assert torch.equal(logits(loaded.model), base)
        built.space.step(0.5, key=3)
        assert not torch.equal(logits(loaded.model), base)


@pytest.mark.parametrize("kind", TOWERS)
def test_a_saved_adapter_of_the_text_is_read_by_peft(kind: str, tmp_path: Path) -> None:
    loaded = made_of(kind)
    built = build(loaded, LoraTrainerConfig())
    built.space.step(0.5, key=3)
    assert built.save is not None

    built.save(tmp_path / "adapter")

    theirs = peft.PeftModel.from_pretrained(tiny_model_from(config_of(kind)), str(tmp_path / "adapter"))
    np.testing.assert_array_equal(logits(theirs), logits(loaded.model))


def test_layers_that_are_in_towers_alone_are_refused() -> None:
    message = r"trainer\.target_modules must name linear layers that a text passes \(.*qkv_proj\), got q_proj, v_proj\."
    with pytest.raises(ConfigError, match=message):
        build(made_of("phi4_multimodal"), LoraTrainerConfig(target_modules=["q_proj", "v_proj"]))
