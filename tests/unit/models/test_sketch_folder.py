"""The folder of a sketch: what lies in it, what reads it, and what is refused."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fedzo.errors import ConfigError
from fedzo.models.config import ModelConfig
from fedzo.models.load import load_model
from fedzo.models.sketched.builder import sketch_model
from fedzo.models.sketched.folder import read_manifest, write_sketch
from fedzo.models.sketched.layers import dense_layers
from fedzo.records.sketch import SketchRecipe
from fedzo.sketch import SketchSettings, sketched_layers, unpack
from fedzo.testing.tiny_models import byte_tokenizer, save_tiny_sketch, tiny_model

FAMILIES = ["llama", "opt", "gpt2", "qwen2", "qwen3"]
IDS = torch.arange(10, 40)[None]


def recipe(bits: int = 4, groups_per_row: int = 1) -> SketchRecipe:
    return SketchRecipe(
        bits=bits,
        groups_per_row=groups_per_row,
        importance_power=4.0,
        damping=0.1,
        act_order=True,
        compensate=True,
        sequential=True,
        source="tiny",
        source_digest="0" * 64,
        calibration_digest="1" * 64,
        num_windows=2,
        num_tokens=24,
        skipped=(),
    )


def build(folder: Path, family: str = "llama", *, bits: int = 4, groups_per_row: int = 1) -> Any:
    """A sketch on the disk, and in memory as it was built."""
    model = tiny_model(family)
    model.config.use_cache = False
    for layer in dense_layers(model).values():
        if layer.bias is not None:
            layer.bias.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    windows = [torch.arange(24) + 7 * i for i in range(2)]
    settings = SketchSettings(bits=bits, groups_per_row=groups_per_row)
    layers = sketch_model(model, windows, settings, kept=folder.with_name("kept")).layers
    write_sketch(model, byte_tokenizer(), recipe(bits, groups_per_row), layers, folder)
    return model


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sketches") / "llama"
    build(folder)
    return folder


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "any name"))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_is_read_to_the_bit(family: str, bits: int, tmp_path: Path) -> None:
    model = build(tmp_path / "sk", family, bits=bits, groups_per_row=2)

    loaded = load_model(ModelConfig(name=str(tmp_path / "sk")))

    with torch.no_grad():
        assert torch.equal(loaded.model(IDS).logits, model(IDS).logits)
    layers = sketched_layers(loaded.model)
    assert layers.keys() == sketched_layers(model).keys()
    assert {(layer.bits, layer.groups_per_row) for layer in layers.values()} == {(bits, 2)}
    tied = loaded.model.get_input_embeddings().weight is loaded.model.get_output_embeddings().weight
    assert tied == model.config.tie_word_embeddings


def test_codes_are_packed_tables_have_16_bits_and_the_rest_is_as_narrow_as_it_was(tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    model.config.use_cache = False
    model.lm_head.weight.data = model.lm_head.weight.data.bfloat16().float()
    settings = SketchSettings(bits=3)
    layers = sketch_model(model, [torch.arange(24)] * 2, settings, kept=tmp_path / "kept").layers
    manifest = write_sketch(model, byte_tokenizer(), recipe(3), layers, tmp_path / "sk")

    stored = load_file(tmp_path / "sk" / "model.safetensors")

    assert stored["model.layers.0.mlp.down_proj.codes"].shape == (32, 64 * 3 // 8)
    assert {each.dtype for name, each in stored.items() if name.endswith(".codes")} == {torch.uint8}
    assert {each.dtype for name, each in stored.items() if name.endswith(".tables")} == {torch.bfloat16}
    assert stored["lm_head.weight"].dtype == torch.bfloat16
    assert stored["model.embed_tokens.weight"].dtype == torch.float32  # 16 bits would change it
    assert torch.equal(stored["model.embed_tokens.weight"], model.model.embed_tokens.weight)
    config = json.loads((tmp_path / "sk" / "config.json").read_text())["quantization_config"]
    assert config == {
        "quant_method": "fedzo_sketch",
        "bits": 3,
        "groups_per_row": 1,
        "modules_to_not_convert": ["lm_head"],
    }
    for name, tensor in stored.items():
        data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        assert manifest.tensors[name].sha256 == hashlib.sha256(data).hexdigest()
    assert read_manifest(tmp_path / "sk" / "sketch.json") == manifest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tables_are_float32_in_a_model_of_any_dtype(folder: Path, dtype: torch.dtype) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)

    held = {name.rpartition(".")[2]: tensor.dtype for name, tensor in model.state_dict().items()}

    assert (held["tables"], held["codes"], held["weight"]) == (torch.float32, torch.uint8, dtype)
    moved = {name: tensor.clone() for name, tensor in model.to(torch.bfloat16).state_dict().items()}
    assert moved["model.layers.0.mlp.up_proj.tables"].dtype == torch.float32
    assert moved["model.norm.weight"].dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("imports", ["import fedzo, transformers", "import transformers, fedzo"])
def test_plain_transformers_reads_a_sketch_once_fedzo_is_imported(imports: str, folder: Path) -> None:
    load = f"model = transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})"
    tell = "print(type(model.model.layers[0].mlp.up_proj).__name__, 'fedzo.config' in sys.modules)"

    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {imports}; {load}; {tell}"], capture_output=True, text=True, check=True
    )

    assert done.stdout.split() == ["SketchLinear", "False"]


def test_what_save_pretrained_writes_is_read_again_with_float32_tables(folder: Path, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    layer = model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        layer.tables += 1e-5  # a trained value has no 16 bits

    model.save_pretrained(tmp_path / "again")

    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert (
        load_file(tmp_path / "again" / "model.safetensors")["model.layers.0.mlp.up_proj.tables"].dtype == torch.float32
    )
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert not (tmp_path / "again" / "sketch.json").exists()


def test_what_was_not_trained_is_written_as_it_was_read(folder: Path, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    model.save_pretrained(tmp_path / "again")

    ours, theirs = (load_file(each / "model.safetensors") for each in (tmp_path / "again", folder))
    assert {name: (each.dtype, each.sum()) for name, each in ours.items()} == {
        name: (each.dtype, each.sum()) for name, each in theirs.items()
    }


def test_a_sketch_is_known_by_its_content_whatever_its_folder(folder: Path, built: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    build(other, bits=3)

    digests = [load_model(ModelConfig(name=str(each))).base_digest for each in (folder, built, other)]

    assert digests[0] == digests[1] != digests[2]


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def swap(tensors: dict[str, torch.Tensor]) -> None:
    one, other = (f"model.layers.{i}.mlp.up_proj.codes" for i in (0, 1))
    tensors[one], tensors[other] = tensors[other], tensors[one]


def flip(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.codes"][3, 4] ^= 1


def cut(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.1.mlp.up_proj.codes"
    tensors[name] = tensors[name][:, :-1].contiguous()


def lose(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.mlp.up_proj.codes"]


def poison(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.tables"][0, 0, 0] = float("nan")


@pytest.mark.parametrize("with_manifest", [True, False])
@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (cut, "shapes of its config.json, but they hold model.layers.1.mlp.up_proj.codes [64, 15] (config: [64, 16])"),
        (lose, "must hold every parameter of LlamaForCausalLM, but model.layers.1.mlp.up_proj.codes is in no file"),
        (poison, "NaN or infinity stands in model.layers.1.mlp.up_proj.tables in model.safetensors"),
    ],
)
def test_damaged_tensors_are_named(
    edit: Callable[[dict[str, torch.Tensor]], None], expected: str, with_manifest: bool, folder: Path
) -> None:
    change(folder, edit)
    if not with_manifest:
        (folder / "sketch.json").unlink()

    with pytest.raises(ConfigError, match=re.escape(expected)):
        load_model(ModelConfig(name=str(folder)))


@pytest.mark.parametrize(("edit", "how_many"), [(swap, 2), (flip, 1)])
def test_changed_codes_are_refused_by_their_digest(
    edit: Callable[[dict[str, torch.Tensor]], None], how_many: int, folder: Path
) -> None:
    change(folder, edit)

    expected = rf"SHA-256 that sketch\.json names, but 'model\.layers\.\d\.mlp\.up_proj\.codes' has not \({how_many} in"
    with pytest.raises(ConfigError, match=expected):
        load_model(ModelConfig(name=str(folder)))


def test_codes_of_another_packing_are_refused(folder: Path) -> None:
    """Nibbles of 3-bit codes, as the released checkpoints hold them."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["bits"] = 3
    (folder / "config.json").write_text(json.dumps(config))

    with pytest.raises(ConfigError, match=r"shapes of its config\.json, but they hold .*codes \[\d+, 16\] \(config: "):
        load_model(ModelConfig(name=str(folder)))


def test_truncated_files_are_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])

    with pytest.raises(ConfigError, match=r"must hold whole safetensors files"):
        load_model(ModelConfig(name=str(folder)))


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"version": 2}', "nonsense"])
def test_a_manifest_that_is_none_is_refused(text: str, folder: Path) -> None:
    (folder / "sketch.json").write_text(text)

    with pytest.raises(ConfigError, match=r"sketch\.json.*Copy the folder again, or build the sketch anew"):
        load_model(ModelConfig(name=str(folder)))


ABSENT = object()


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        *(("bits", value, "bits must be 2, 3 or 4, got ") for value in (1, 5, "4", 4.0, True, None, ABSENT)),
        *(
            ("groups_per_row", value, "groups_per_row must be a whole number from 1 on, got ")
            for value in (0, "2", 1.0, None, ABSENT)
        ),
        *(
            ("modules_to_not_convert", value, "modules_to_not_convert must be a list of names of layers, got ")
            for value in (5, "lm_head", [5], None, ABSENT)
        ),
        ("packing", "nibbles", "there must be no other settings, got ['packing']"),
    ],
)
def test_a_config_of_no_sketch_is_refused(key: str, value: object, expected: str, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].pop(key, None)
    if value is not ABSENT:
        config["quantization_config"][key] = value
    (folder / "config.json").write_text(json.dumps(config))

    with pytest.raises(ConfigError, match=re.escape(f"quantization_config of a sketch: {expected}")) as refused:
        load_model(ModelConfig(name=str(folder)))

    assert str(refused.value).endswith("Copy the folder's config.json again, or build the sketch anew.")


def test_tiny_sketches_have_the_codes_of_their_layers(tmp_path: Path) -> None:
    loaded = load_model(ModelConfig(name=str(save_tiny_sketch(tmp_path / "sk", "gpt2", bits=2))))

    for layer in sketched_layers(loaded.model).values():
        assert int(unpack(layer.codes, 2, layer.in_features).max()) == 3
        assert layer.bias is not None
