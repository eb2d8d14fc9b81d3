"""Adapters against PEFT's own model, hand counts, and deep copies that are moved by plain tensor expressions."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import peft
import pytest
import torch
from torch import nn
from transformers import Qwen3MoeConfig, xLSTMConfig

from fedzo.data.config import Loss
from fedzo.data.encode import Example
from fedzo.errors import ConfigError
from fedzo.models.adapters import remove
from fedzo.models.auto_dtype import too_coarse
from fedzo.models.blocks import find_blocks
from fedzo.models.generate import generate, generate_tokens
from fedzo.models.head import check_head
from fedzo.models.load import wrap_model
from fedzo.models.loaded import LoadedModel
from fedzo.models.scoring import mean_loss
from fedzo.models.virtual_tokens import attach, check_answer_length, detach, longest_sequence
from fedzo.testing.tiny_models import FAMILIES, byte_tokenizer, tiny_loaded, tiny_model, tiny_model_from
from fedzo.trainers import TRAINERS, Built, TrainerContext
from fedzo.trainers.adapters import (
    AdapterTrainer,
    Ia3TrainerConfig,
    LoraTrainerConfig,
    PrefixTrainerConfig,
    PromptTrainerConfig,
)
from fedzo.trainers.artifacts import ArtifactStore
from fedzo.trainers.base import TrainerConfig
from fedzo.zo.config import Distribution
from fedzo.zo.directions import direction
from fedzo.zo.estimator import TwoPoint
from fedzo.zo.steps import apply_steps

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # by PEFT, of transformers

MOE = Qwen3MoeConfig(
    vocab_size=512,
    hidden_size=32,
    intermediate_size=64,
    moe_intermediate_size=16,
    mlp_only_layers=[0],
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts=4,
    num_experts_per_tok=2,
)
IDS = torch.arange(24).reshape(2, 12) * 7 % 256
EXAMPLES = [Example((5, 6, 7, 8), ((9,), (10,)), 1), Example((30, 31), ((9, 12), (10, 14, 15)), 0)]
INJECTED = [LoraTrainerConfig(), Ia3TrainerConfig()]
VIRTUAL = [PrefixTrainerConfig(init_std=0.3), PromptTrainerConfig(init_std=0.3)]
EVERY = [*INJECTED, *VIRTUAL]
# two layers of a hidden width of 32; k and v are 16 wide in models with two key-value heads, c_attn is 96
LORA_SIZE = {
    **dict.fromkeys(FAMILIES, 2 * 8 * ((32 + 32) + (32 + 16))),
    "opt": 2 * 8 * ((32 + 32) + (32 + 32)),
    "gpt2": 2 * 8 * (32 + 96),
}
# k, v and what enters the last layer of the MLP; mixtral's experts are no linear layers
IA3_SIZE = {
    **dict.fromkeys(FAMILIES, 2 * (16 + 16 + 64)),
    "opt": 2 * (32 + 32 + 64),
    "gpt2": 2 * (96 + 128),
    "mixtral": 2 * (16 + 16),
}


# keys and values of two layers, as wide as those of the model; OPT's embeddings are 16 wide
PREFIX_SIZE = {**dict.fromkeys(FAMILIES, 5 * 2 * 2 * 16), "opt": 5 * 2 * 2 * 32, "gpt2": 5 * 2 * 2 * 32}
PROMPT_SIZE = {**dict.fromkeys(FAMILIES, 5 * 32), "opt": 5 * 16}


def name_of(config: TrainerConfig) -> str:
    return type(config).__name__


def build(loaded: LoadedModel, config: TrainerConfig, *, seed: int = 7) -> Built:
    trainer = TRAINERS.build(config)
    with tempfile.TemporaryDirectory() as folder:
        place = TrainerContext(folder=Path(folder), seed=seed, texts=list)
        return trainer.build(loaded, trainer.prepare(loaded, place).artifact, distribution=Distribution.gaussian)


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if ".lora_" in name or ".ia3_" in name]


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=ids).logits


def loss_of(loaded: LoadedModel) -> float:
    return mean_loss(loaded, EXAMPLES, loss=Loss.candidates, tokens_per_batch=4096)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_number_of_trained_values_is_the_hand_count(family: str) -> None:
    loaded = tiny_loaded(family)

    assert build(loaded, LoraTrainerConfig()).space.size == LORA_SIZE[family]
    assert build(loaded, LoraTrainerConfig(rank=2)).space.size == LORA_SIZE[family] // 4
    assert build(loaded, Ia3TrainerConfig()).space.size == IA3_SIZE[family]
    assert build(loaded, PrefixTrainerConfig()).space.size == PREFIX_SIZE[family]
    assert build(loaded, PromptTrainerConfig()).space.size == PROMPT_SIZE[family]
    assert build(loaded, PromptTrainerConfig(num_virtual_tokens=2)).space.size == PROMPT_SIZE[family] // 5 * 2


@pytest.mark.parametrize("config", INJECTED, ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_of_a_probe_are_those_of_a_copy_moved_by_hand(
    family: str, dtype: torch.dtype, config: TrainerConfig
) -> None:
    loaded = tiny_loaded(family, dtype=dtype)
    space = build(loaded, config).space
    space.step(0.05, key=4)  # B is no longer zero
    twin = copy.deepcopy(loaded.model)
    start = [parameter.clone() for parameter in adapter_parameters(twin)]
    z = torch.from_numpy(direction(9, space.size)).split([parameter.numel() for parameter in start])

    def moved_by_hand(eps: float) -> float:
        for parameter, before, part in zip(adapter_parameters(twin), start, z, strict=True):
            parameter.data.copy_(before + part.view(before.shape) * torch.tensor(eps))
        return loss_of(dataclasses.replace(loaded, model=twin))

    found = []
    for eps in (0.0625, -0.0625):
        with space.probe(eps, key=9):
            found.append(loss_of(loaded))

    assert found == [moved_by_hand(0.0625), moved_by_hand(-0.0625)]
    assert abs(found[0] - found[1]) > 1e-4


@pytest.mark.parametrize("config", INJECTED, ids=name_of)
def test_a_projected_gradient_is_that_of_backpropagation(config: TrainerConfig) -> None:
    loaded = tiny_loaded()
    space = build(loaded, config).space
    space.step(0.05, key=4)
    twin = copy.deepcopy(loaded.model)
    trained = [parameter.requires_grad_() for parameter in adapter_parameters(twin)]
    prompt, answer = torch.tensor([[5, 6, 7, 8]]), 10

    (projection,) = TwoPoint(eps=1e-3).estimate(
        space,
        lambda: -float(logits(loaded.model, prompt)[0, -1].double().log_softmax(-1)[answer]),
        [9],
    )

    loss = -twin(input_ids=prompt).logits[0, -1].log_softmax(-1)[answer]
    gradient = torch.cat([part.reshape(-1) for part in torch.autograd.grad(loss, trained)])
    slope = float(gradient @ torch.from_numpy(direction(9, space.size)))
    assert projection.g == pytest.approx(slope, rel=1e-2, abs=1e-3)
    assert abs(slope) > 0.05


def test_an_adapted_head_is_applied_whole() -> None:
    loaded = tiny_loaded("qwen3")
    build(loaded, LoraTrainerConfig(target_modules=["lm_head"])).space.step(0.1, key=5)

    slow = dataclasses.replace(loaded, direct_head=False)

    assert check_head(loaded.model)
    assert loss_of(loaded) == pytest.approx(loss_of(slow), abs=1e-5)


@pytest.mark.parametrize("config", EVERY, ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_step_with_lr_0_leaves_every_parameter_bit_identical(dtype: torch.dtype, config: TrainerConfig) -> None:
    loaded = tiny_loaded(dtype=dtype)
    space = build(loaded, config).space
    values = space.values()
    before = {name: parameter.clone() for name, parameter in loaded.model.named_parameters()}

    (projection,) = TwoPoint(eps=1e-2).estimate(space, lambda: loss_of(loaded), [11])
    apply_steps(space, [(projection.g, 11)], lr=0.0)

    after = dict(loaded.model.named_parameters())
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert values.view(np.uint32).tolist() == space.values().view(np.uint32).tolist()
    assert {parameter.dtype for parameter in adapter_parameters(loaded.model)} <= {torch.float32}
    assert not any(parameter.requires_grad for parameter in after.values())
    assert projection.g != 0


def test_another_run_seed_gives_other_values_of_a_and_the_law_of_peft() -> None:
    loaded = tiny_loaded()
    first = build(loaded, LoraTrainerConfig(rank=64)).space.values()
    names = [name for name, _ in loaded.model.named_parameters() if ".lora_" in name]
    parts = dict(zip(names, adapter_parameters(loaded.model), strict=True))
    a = torch.cat([part.view(-1) for name, part in parts.items() if "lora_A" in name])
    b = torch.cat([part.view(-1) for name, part in parts.items() if "lora_B" in name])
    default = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=64, target_modules=["q_proj"])).base_model.model
    peft_a = default.model.layers[0].self_attn.q_proj.lora_A["default"].weight

    second = build(loaded, LoraTrainerConfig(rank=64), seed=8).space.values()

    assert not b.any()
    assert float(a.std()) == pytest.approx((3 * 32) ** -0.5, rel=0.05)
    assert float(a.std()) == pytest.approx(float(peft_a.detach().std()), rel=0.1)
    assert abs(float(a.mean())) < 0.01
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("config", INJECTED, ids=name_of)
@pytest.mark.parametrize("family", FAMILIES)
def test_before_the_first_step_the_model_is_the_base(family: str, config: TrainerConfig) -> None:
    loaded = tiny_loaded(family)
    base = logits(loaded.model)

    build(loaded, config)

    assert torch.equal(logits(loaded.model), base)


@pytest.mark.parametrize("config", EVERY, ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_adapter_gives_the_same_logits_in_plain_peft(
    tmp_path: Path, family: str, dtype: torch.dtype, config: TrainerConfig
) -> None:
    loaded = tiny_loaded(family, dtype=dtype)
    base = logits(loaded.model)
    built = build(loaded, config)
    built.space.step(0.1, key=5)
    assert built.save is not None

    built.save(tmp_path / "out")

    plain = logits(peft.PeftModel.from_pretrained(tiny_model(family, dtype=dtype), tmp_path / "out"))[:, -12:]
    assert torch.equal(plain, logits(loaded.model))
    assert not torch.equal(plain, base)
    assert {file.name for file in (tmp_path / "out").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize("config", EVERY, ids=name_of)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_can_still_be_applied_apart(family: str, config: TrainerConfig) -> None:
    loaded = tiny_loaded(family)
    build(loaded, config).space.step(0.1, key=5)

    assert check_head(loaded.model)


@pytest.mark.parametrize("config", VIRTUAL, ids=name_of)
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_text_with_virtual_tokens_are_those_of_plain_peft_moved_by_hand(
    tmp_path: Path, family: str, config: TrainerConfig
) -> None:
    loaded = tiny_loaded(family)
    built = build(loaded, config)
    assert built.save is not None
    built.save(tmp_path / "out")
    plain = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path / "out")
    learned = plain.prompt_encoder["default"].embedding.weight
    start = learned.detach().clone()
    z = torch.from_numpy(direction(9, built.space.size)).view(start.shape)

    def last_logits(ids: list[int]) -> torch.Tensor:
        return logits(plain, torch.tensor([ids]))[0, -len(ids) :]

    def slow_loss() -> float:
        losses = []
        for example in EXAMPLES:
            scores = []
            for answer in example.candidates:
                logp = last_logits([*example.prompt, *answer]).log_softmax(-1)[len(example.prompt) - 1 :]
                scores.append(torch.stack([logp[i, token] for i, token in enumerate(answer)]).mean())
            losses.append(-torch.stack(scores).log_softmax(0)[example.label].item())
        return float(np.mean(losses))

    for eps in (0.0625, -0.0625):
        learned.data.copy_(start + z * torch.tensor(eps))
        with built.space.probe(eps, key=9):
            assert loss_of(loaded) == pytest.approx(slow_loss(), abs=2e-6)
    built.space.step(-0.0625, key=9)
    learned.data.copy_(start + z * torch.tensor(0.0625))
    prompts = [[65, 66, 67], [70], list(range(80, 97)), [71, 72, 73]]
    answers = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(4):
            ids.append(int(last_logits(ids)[-1].argmax()))
        answers.append(loaded.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip())
    assert generate(loaded, prompts, max_new_tokens=4, tokens_per_batch=4096) == answers


def test_a_prefix_of_a_forward_without_cache_keeps_no_layer_s_keys() -> None:
    loaded = tiny_loaded()
    build(loaded, PrefixTrainerConfig())
    caches: list[Any] = []
    loaded.model.get_decoder().register_forward_hook(lambda module, args, output: caches.append(output.past_key_values))

    logits(loaded.model)

    assert [layer.keys.shape[-2] for layer in caches[0].layers] == [5, 5]


@pytest.mark.parametrize("config", EVERY, ids=name_of)
def test_probes_vanish_in_virtual_tokens_which_the_model_rounds(config: TrainerConfig) -> None:
    """Half the spacing of bfloat16 is 2^-10 at 0.3."""
    loaded = tiny_loaded(dtype=torch.bfloat16)
    space = build(loaded, config).space

    names = too_coarse(loaded.model, space, 1e-4)

    assert names == (["virtual tokens"] if config in VIRTUAL else [])
    assert too_coarse(loaded.model, space, 1e-2) == []


def test_virtual_tokens_take_positions() -> None:
    loaded = tiny_loaded("gpt2")  # 512 positions
    build(loaded, PromptTrainerConfig())

    assert longest_sequence(loaded.model, 507) == 512
    with pytest.raises(ConfigError, match=r"task\.max_length must be <= 507, since 5 of 512 positions"):
        longest_sequence(loaded.model, 508)
    prompt = [i % 250 for i in range(503)]
    assert len(generate(loaded, [prompt], max_new_tokens=4, tokens_per_batch=600)) == 1
    with pytest.raises(ConfigError, match=r"together with 4 tokens of an answer and 5 virtual ones, got 504 tokens"):
        generate(loaded, [[*prompt, 3]], max_new_tokens=4, tokens_per_batch=600)
    remove(loaded.model)
    assert longest_sequence(loaded.model, 512) == 512


def test_answers_must_fit_behind_half_of_the_longest_text() -> None:
    loaded = tiny_loaded("gpt2")  # 512 positions

    check_answer_length(loaded.model, 512, 256)
    with pytest.raises(ConfigError, match=r"task\.max_new_tokens must be <= 256, since the model has 512 positions"):
        check_answer_length(loaded.model, 512, 257)

    build(loaded, PromptTrainerConfig())  # 5 virtual tokens
    check_answer_length(loaded.model, 507, 254)
    with pytest.raises(ConfigError, match=r"task\.max_new_tokens must be <= 254, .* 5 virtual tokens and 253"):
        check_answer_length(loaded.model, 507, 255)


def test_building_again_replaces_the_adapter_and_removal_leaves_the_base() -> None:
    loaded = tiny_loaded()
    before = {name: (parameter, parameter.clone()) for name, parameter in loaded.model.named_parameters()}
    names = [name for name, _ in loaded.model.named_modules()]

    first = build(loaded, LoraTrainerConfig())
    first.space.step(0.1, key=1)
    for config in (*EVERY, *reversed(EVERY)):
        build(loaded, config)
    again = build(loaded, LoraTrainerConfig())

    assert sum(parameter.numel() for parameter in adapter_parameters(loaded.model)) == LORA_SIZE["llama"]
    assert not any("base_layer.base_layer" in name for name, _ in loaded.model.named_modules())
    assert again.space.digest() == build(tiny_loaded(), LoraTrainerConfig()).space.digest()
    again.space.step(0.1, key=1)
    assert again.space.digest() == first.space.digest()
    base = logits(tiny_model())
    remove(loaded.model)
    assert torch.equal(logits(loaded.model), base)
    assert [name for name, _ in loaded.model.named_modules()] == names
    for name, parameter in loaded.model.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])


@pytest.mark.parametrize("config", EVERY, ids=name_of)
def test_reset_brings_the_initial_values_back(config: TrainerConfig) -> None:
    built = build(tiny_loaded(), config)
    digest = built.space.digest()

    built.space.step(0.1, key=1)
    built.reset()

    assert built.space.digest() == digest


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", EVERY, ids=name_of)
def test_a_base_of_packed_integers_is_left_alone_and_carries_an_adapter(config: TrainerConfig) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao, which packs the weights, is not here")
    loaded = tiny_loaded()
    quantization.quantize_(loaded.model, quantization.Int8WeightOnlyConfig())
    base = logits(loaded.model)
    space = build(loaded, config).space
    at_rest = logits(loaded.model)

    with space.probe(0.1, key=3):
        moved = logits(loaded.model)

    assert torch.equal(at_rest, logits(loaded.model))
    assert not torch.equal(at_rest, moved)
    remove(loaded.model)
    assert torch.equal(logits(loaded.model), base)


def test_an_earlier_adapters_own_layers_are_not_offered() -> None:
    loaded, wrong = tiny_loaded(), LoraTrainerConfig(target_modules=["c_attn"])
    with pytest.raises(ConfigError, match="must name linear layers") as of_the_base:
        build(loaded, wrong)
    build(loaded, LoraTrainerConfig())

    with pytest.raises(ConfigError) as again:
        build(loaded, wrong)

    assert str(again.value) == str(of_the_base.value)


def test_layers_that_are_not_there_are_named_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.target_modules must name linear layers.*k_proj.*got c_attn"):
        build(tiny_loaded(), LoraTrainerConfig(target_modules=["q_proj", "c_attn"]))
    with pytest.raises(ConfigError, match=r"trainer\.feedforward_modules must name linear layers.*got embed_tokens"):
        build(tiny_loaded(), Ia3TrainerConfig(feedforward_modules=["embed_tokens"]))
    odd = dataclasses.replace(tiny_loaded(), model=nn.Sequential(nn.Embedding(2, 2), nn.Linear(2, 2)))
    with pytest.raises(ConfigError, match=r"must be given for a Sequential.*Choose from 1"):
        build(odd, LoraTrainerConfig())


@pytest.mark.parametrize("first_layer", [0, 1])
@pytest.mark.parametrize("config", [LoraTrainerConfig, Ia3TrainerConfig])
def test_layers_are_found_in_one_forward(config: Any, first_layer: int) -> None:
    loaded, trainer = tiny_loaded(), cast(AdapterTrainer, TRAINERS.build(config(first_layer=first_layer)))
    runs: list[object] = []
    loaded.model.register_forward_pre_hook(lambda *given: runs.append(given))

    trainer.configure(loaded.model)

    assert len(runs) == 1


def test_layers_in_whose_place_peft_adapts_experts_are_refused_and_the_model_is_left_as_it_was() -> None:
    loaded = wrap_model(tiny_model_from(MOE), byte_tokenizer())
    names = [name for name, _ in loaded.model.named_modules()]
    base = logits(loaded.model)

    for modules in (["down_proj"], ["gate_proj", "up_proj", "down_proj"]):
        with pytest.raises(ConfigError, match=r"that PEFT adapts as they are, got .*down_proj.*: PEFT would adapt the"):
            build(loaded, LoraTrainerConfig(target_modules=modules))
        loaded.model.eval()

    assert [name for name, _ in loaded.model.named_modules()] == names
    assert torch.equal(logits(loaded.model), base)


def with_states(family: str) -> LoadedModel:
    if family != "xlstm":
        return tiny_loaded(family)
    config = xLSTMConfig(vocab_size=512, hidden_size=128, num_hidden_layers=2, num_heads=4)
    return wrap_model(tiny_model_from(config), byte_tokenizer())


@pytest.mark.parametrize("family", ["mamba2", "xlstm"])  # PEFT has no prompts for the others
def test_virtual_tokens_come_once_before_a_text_that_a_model_with_states_goes_on_with(family: str) -> None:
    """Each family has its states under a name and in a class of its own; a whole forward has none."""
    loaded = with_states(family)
    build(loaded, PromptTrainerConfig(init_std=0.3))
    widths: list[int] = []
    seen = find_blocks(loaded.model)[1][0].register_forward_hook(
        lambda module, args, output: widths.append(args[0].shape[1])
    )

    (answer,) = generate_tokens(loaded, [[65, 66, 67]], ends=set(), max_new_tokens=4, tokens_per_batch=4096)

    assert widths == [5 + 3, 1, 1, 1]
    seen.remove()
    ids = [65, 66, 67]
    for _ in range(4):
        ids.append(int(logits(loaded.model, torch.tensor([ids]))[0, -1].argmax()))
    assert answer == ids[3:]


def test_prompts_of_a_model_that_reads_token_ids_beside_embeddings_are_refused() -> None:
    """As Gemma 3n does. A prefix leaves the text's ids as they are."""

    def beside(decoder: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if kwargs.get("input_ids") is not None:
            output.last_hidden_state += 1

    loaded: Any = tiny_loaded()
    loaded.model.get_decoder().register_forward_hook(beside, with_kwargs=True)

    build(loaded, PrefixTrainerConfig(init_std=0.3))
    with pytest.raises(ConfigError, match="cannot: it computes otherwise from embeddings than from token ids"):
        build(loaded, PromptTrainerConfig(init_std=0.3))


def test_why_a_forward_with_virtual_tokens_fails_is_told_and_memory_that_is_full_is_no_reason() -> None:
    loaded: Any = tiny_loaded()
    errors = [RuntimeError("shape of the mask\nand more"), torch.OutOfMemoryError("out of memory")]

    def fails(decoder: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if kwargs.get("inputs_embeds") is not None:
            raise errors.pop(0)

    loaded.model.get_decoder().register_forward_hook(fails, with_kwargs=True)

    with pytest.raises(ConfigError, match=r"virtual tokens fails \(RuntimeError: shape of the mask\)\. Choose another"):
        build(loaded, PromptTrainerConfig())
    with pytest.raises(torch.OutOfMemoryError):
        build(loaded, PromptTrainerConfig())


def test_an_artifact_that_is_no_seed_is_refused(tmp_path: Path) -> None:
    artifact = ArtifactStore(tmp_path).put(b"abc")

    with pytest.raises(ConfigError, match="seed of 8 bytes, got 3"):
        TRAINERS.build(LoraTrainerConfig()).build(tiny_loaded(), artifact, distribution=Distribution.gaussian)


def test_the_numbers_of_virtual_tokens_lie_where_the_model_is() -> None:
    model, held = tiny_model("llama").to("meta"), SimpleNamespace(prompt_tokens={"default": torch.arange(3)})

    attach(model, held)  # type: ignore[arg-type]
    detach(model)

    assert held.prompt_tokens["default"].device.type == "meta"
