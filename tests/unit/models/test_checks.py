"""What is refused at load: models that look ahead, weights and logits that are no numbers, tokens without a row."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    CpmAntConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
    RobertaConfig,
    T5Config,
    T5ForConditionalGeneration,
    XLNetConfig,
)

from fedzo.errors import ConfigError
from fedzo.models.checks import check_causal, check_ids
from fedzo.models.config import DType, ModelConfig
from fedzo.models.load import load_model, wrap_model
from fedzo.testing.tiny_models import (
    FAMILIES,
    WITHOUT_ATTENTION,
    byte_tokenizer,
    save_tiny_model,
    tiny_loaded,
    tiny_model,
    tiny_model_from,
)

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 300,
}
AHEAD: dict[str, Callable[[], PreTrainedConfig]] = {
    "bert": lambda: BertConfig(**SHAPE),  # weights of 0.02: attention says little, and it is found all the same
    "roberta": lambda: RobertaConfig(**SHAPE),
    "xlnet": lambda: XLNetConfig(d_model=32, n_layer=2, n_head=4, d_inner=64, vocab_size=300),
    "cpmant": lambda: CpmAntConfig(
        hidden_size=32, num_attention_heads=4, dim_head=8, dim_ff=64, num_hidden_layers=2, vocab_size=300
    ),
    "llama made bidirectional": lambda: LlamaConfig(**SHAPE, is_causal=False),
}


def load(where: Path, **settings: Any) -> Any:
    return load_model(ModelConfig(name=str(where), **settings), device="cpu", max_length=64)


def moved_by_hand(model: Any) -> float:
    """Largest change of the logits at the first five of six positions, whatever the sixth token is."""
    first = torch.tensor([[70, 80, 90, 100, 110, 120]])
    with torch.inference_mode():
        base = model(input_ids=first).logits[:, :5]
        changes = [
            (model(input_ids=torch.cat([first[:, :5], torch.tensor([[last]])], dim=1)).logits[:, :5] - base).abs().max()
            for last in (75, 200)
        ]
    return float(max(changes) / base.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", AHEAD)
def test_a_model_that_looks_ahead_is_refused(family: str, dtype: torch.dtype) -> None:
    model = tiny_model_from(AHEAD[family](), dtype=dtype)
    assert moved_by_hand(tiny_model_from(AHEAD[family]())) > 1e-4

    with pytest.raises(ConfigError, match=r"must be a causal language model, .* so that an answer sees itself\. Take"):
        wrap_model(model, byte_tokenizer())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", [*FAMILIES, *WITHOUT_ATTENTION, "bert as a decoder", "qwen3 experts"])
def test_a_causal_model_is_taken_in_every_dtype(family: str, dtype: torch.dtype) -> None:
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8}
    others: dict[str, PreTrainedConfig] = {
        "bert as a decoder": BertConfig(**SHAPE, is_decoder=True),
        "qwen3 experts": Qwen3MoeConfig(**SHAPE, **experts, num_key_value_heads=2, initializer_range=0.1),
    }
    model = tiny_model_from(others[family], dtype=dtype) if family in others else tiny_model(family, dtype=dtype)
    assert moved_by_hand(model) <= (1e-6 if dtype is torch.float32 else 1e-2)

    check_causal(model, name="here")


def test_a_folder_of_an_encoder_is_refused_with_its_class(tmp_path: Path) -> None:
    tiny_model_from(AHEAD["bert"]()).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)

    with pytest.raises(ConfigError, match=r"a BertLMHeadModel is none .* moves the logits before it by \d"):
        load(tmp_path)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_an_encoder_with_a_decoder_is_named(kind: str, tmp_path: Path) -> None:
    models: dict[str, Callable[[], Any]] = {
        "t5": lambda: T5ForConditionalGeneration(
            T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=300)
        ),
        "bart": lambda: BartForConditionalGeneration(
            BartConfig(d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64, decoder_ffn_dim=64)
        ),
    }
    models[kind]().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)

    with pytest.raises(ConfigError, match=rf"an encoder with a decoder \(model_type={kind}\)"):
        load(tmp_path)


def test_a_model_whose_forward_fails_is_named(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*args: Any, **kwargs: Any) -> None:
        raise KeyError("language")

    monkeypatch.setattr("transformers.LlamaForCausalLM.forward", forward)

    with pytest.raises(ConfigError, match=r"a forward of LlamaForCausalLM fails: KeyError: 'language'\. Take another"):
        load(folder)


def test_a_forward_that_writes_to_weights_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    forward = model.forward

    def writing(*args: Any, **kwargs: Any) -> Any:
        model.model.norm.weight.mul_(1)
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", writing)
    with pytest.raises(ConfigError, match=r"must leave the weights as they are, but writes"):
        check_causal(model, name="here")


def test_the_weights_of_a_deep_rwkv_stay_those_of_its_files(tmp_path: Path) -> None:
    stored = load_file(save_tiny_model(tmp_path, "rwkv") / "model.safetensors")

    loaded = load(tmp_path)

    assert all(torch.equal(held, stored[name]) for name, held in loaded.model.named_parameters())
    assert loaded.model.config.num_hidden_layers > 6


def damage(name: str, number: float, row: int = 1) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        tensors = load_file(file)
        tensors[name].view(-1)[row] = number
        save_file(tensors, file, metadata={"format": "pt"})

    return change


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_no_number_is_named_with_its_file(copied: Path, number: float) -> None:
    (copied / "model.safetensors").unlink()
    tiny_model("llama").save_pretrained(copied, max_shard_size="60KB")
    index = json.loads((copied / "model.safetensors.index.json").read_text())["weight_map"]
    name = "model.layers.1.mlp.up_proj.weight"
    damage(name, number)(copied / index[name])

    with pytest.raises(ConfigError, match=rf"NaN or infinity stands in {name} in {index[name]}\. Copy"):
        load(copied)


def test_a_weight_that_the_dtype_cannot_hold_is_told_apart(copied: Path) -> None:
    damage("model.layers.0.mlp.up_proj.weight", 1e6)(copied / "model.safetensors")

    load(copied, dtype=DType.bfloat16)
    with pytest.raises(ConfigError, match=r"up_proj\.weight holds NaN or infinity in float16\. Write model\.dtype=fl"):
        load(copied, dtype=DType.float16)


def configured(**settings: Any) -> Callable[[Path], None]:
    def change(where: Path) -> None:
        file = where / "config.json"
        given = {**json.loads(file.read_text()), **settings}
        file.write_text(json.dumps({name: value for name, value in given.items() if value is not None}))

    return change


def file(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda where: (where / name).write_bytes(data) and None


def index(data: bytes) -> Callable[[Path], None]:
    """In place of the one file of all weights."""

    def change(where: Path) -> None:
        (where / "model.safetensors").rename(where / "model-00001-of-00001.safetensors")
        (where / "model.safetensors.index.json").write_bytes(data)

    return change


def removed(*names: str) -> Callable[[Path], None]:
    return lambda where: [(where / name).unlink() for name in names] and None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (file("config.json", b'{"model_type": "llama",'), "is not a valid JSON file"),
        (file("config.json", b""), "is not a valid JSON file"),
        (file("config.json", b"[]"), "must be a mapping"),
        (file("config.json", b"3"), "not iterable"),
        (configured(model_type=None), "model_type"),
        (configured(model_type="evil"), "evil"),
        (configured(model_type=["llama"]), "TypeError: unhashable"),
        (configured(model_type="vit"), "Unrecognized configuration class .*ViTConfig.*AutoModelForCausalLM.$"),
        (configured(hidden_size="32"), "hidden_size"),
        (configured(hidden_size=-32), "negative dimension"),
        (configured(hidden_size=None), r"hold model\.embed_tokens\.weight \[512, 32\] \(config: \[512, 4096\]\)"),
        (configured(vocab_size=100), r"hold model\.embed_tokens\.weight \[512, 32\] \(config: \[100, 32\]\)\. Take"),
        (configured(num_attention_heads=0), "modulo by zero"),
        (configured(num_hidden_layers=1), r"every layer of the files must be used, but model\.layers\.1\."),
        (configured(num_hidden_layers=3), r"must hold every parameter .* model\.layers\.2\."),
        (configured(hidden_act="nope"), "KeyError: 'nope'"),
        (configured(dtype="float7", torch_dtype="float7"), "float7"),
        (configured(rms_norm_eps=float("nan")), "the logits of a LlamaForCausalLM must be finite"),
        (configured(is_encoder_decoder=True), "an encoder with a decoder"),
        (configured(quantization_config="x"), "'str' object"),
        (configured(pad_token_id=9999), "Padding_idx"),
        (index(b"{"), "must be JSON whose weight_map gives each weight"),
        (index(b"[]"), "must be JSON whose weight_map gives each weight"),
        (index(b'{"weight_map": {"a": 3}}'), "must be JSON whose weight_map gives each weight"),
        (index(b'{"weight_map": {}}'), "must be JSON whose weight_map gives each weight"),
        (index(b'{"weight_map": {"a": "../x.safetensors"}}'), "the name of a file beside it"),
        (index(b"\xff\xfe"), "must be JSON whose weight_map gives each weight"),
        (removed("tokenizer.json", "tokenizer_config.json"), "tokenizer"),
        (file("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\n"), "Expecting value"),
        (file("tokenizer.json", b"{}"), "a tokenizer that transformers can load"),
        (file("tokenizer_config.json", b"[]"), "a tokenizer that transformers can load"),
        (file("generation_config.json", b"[]"), "not a mapping"),
        (file("model.safetensors", b"\x02\0\0\0\0\0\0\0{}"), "must hold every parameter"),
    ],
)
def test_files_that_are_odd_end_as_one_line(copied: Path, change: Callable[[Path], None], message: str) -> None:
    change(copied)

    with pytest.raises(ConfigError, match=message) as caught:
        load(copied)
    assert "\n" not in str(caught.value)
    assert "model.name" in str(caught.value)


@pytest.mark.parametrize("limit", [0, -1])
def test_positions_that_are_no_limit_limit_nothing(copied: Path, limit: int) -> None:
    configured(max_position_embeddings=limit)(copied)

    assert load(copied).model.config.max_position_embeddings == limit


def weights_beside(where: Path) -> None:
    tensors = load_file(where / "model.safetensors")
    save_file(tensors | {"vision.weight": torch.ones(2)}, where / "model.safetensors", metadata={"format": "pt"})


def test_weights_of_another_part_are_named_and_left(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights_beside(copied)

    load(copied)

    assert "vision.weight in its files is not used" in caplog.text


def with_tokens(where: Path, *, pad: bool = False, in_template: bool = False) -> None:
    """259 tokens, 253 more up to the embedding's 512 rows, and one beyond."""
    tokenizer: Any = AutoTokenizer.from_pretrained(where)
    tokenizer.add_tokens([f"<filler{i}>" for i in range(512 - len(tokenizer))])
    tokenizer.add_tokens(["<beyond>"], special_tokens=True)
    if pad:
        tokenizer.pad_token = "<beyond>"
    if in_template:
        tokenizer.chat_template = "<beyond>{{ messages[0].content }}"
    tokenizer.save_pretrained(where)


@pytest.mark.parametrize("use", ["pad", "in_template"])
def test_a_token_in_use_without_a_row_is_refused(copied: Path, use: str) -> None:
    with_tokens(copied, **{use: True})

    with pytest.raises(
        ConfigError, match=r"has 513 tokens and the embedding 512 rows, so '<beyond>' \(id 512\) has no"
    ):
        load(copied)


def test_a_token_for_images_may_lack_a_row(copied: Path) -> None:
    """Each `*_token` of tokenizer_config.json is special to transformers, as those of a larger model are."""
    with_tokens(copied)
    settings = json.loads((copied / "tokenizer_config.json").read_text())
    (copied / "tokenizer_config.json").write_text(json.dumps(settings | {"image_token": "<beyond>"}))

    loaded = load(copied)

    assert loaded.tokenizer.special_tokens_map["image_token"] == "<beyond>"


def test_a_tokenizer_of_another_model_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"has 259 tokens and the embedding 200 rows, so .* and 56 more has none"):
        wrap_model(tiny_model("llama", vocab_size=200), byte_tokenizer())


def test_a_token_that_nobody_uses_may_lack_a_row_until_a_text_holds_it(copied: Path) -> None:
    with_tokens(copied)

    loaded = load(copied)

    check_ids(loaded.model, loaded.tokenizer("plain text")["input_ids"], where="row 0")
    with pytest.raises(ConfigError, match=r"row 3: every token must have a row .*, which has 512, .* with id 512\."):
        check_ids(loaded.model, loaded.tokenizer("a <beyond>")["input_ids"], where="row 3")


def test_a_check_is_a_few_tokens_and_two_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, shapes = tiny_loaded("llama"), []
    monkeypatch.setattr(
        loaded.model, "forward", lambda input_ids, forward=loaded.model.forward: shapes.append(input_ids.shape)
        or forward(input_ids=input_ids)
    )  # fmt: skip

    check_causal(loaded.model, name="here")

    assert shapes == [(1, 8), (1, 8)]
