"""Files of tables, dense models made of sketches, and digests that cover codes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fedzo.errors import ConfigError, RunFolderError
from fedzo.models.config import ModelConfig, Quantization
from fedzo.models.load import compile_loaded, load_model, wrap_model
from fedzo.models.loaded import LoadedModel
from fedzo.models.sketched.layers import make_dense
from fedzo.models.sketched.table_file import GRADIENT, read_tables, write_tables
from fedzo.sketch import SketchLinear, sketched_layers, tables_of, unpack
from fedzo.testing.tiny_models import byte_tokenizer, save_tiny_sketch, tiny_loaded, tiny_sketch

IDS = torch.arange(24).reshape(2, 12) * 7 % 256


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return tiny_loaded(sketched=True)


@pytest.fixture
def written(loaded: LoadedModel, tmp_path: Path) -> Path:
    write_tables(tmp_path / "own.safetensors", tables_of(loaded.model), base_digest=loaded.base_digest)
    return tmp_path / "own.safetensors"


def told_by(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    header_bytes = int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(file.read_bytes()[8 : 8 + header_bytes])
    return load_file(file), json.loads(header["__metadata__"]["fedzo_tables"])


def test_a_table_file_names_its_base_and_the_digest_of_its_values(loaded: LoadedModel, written: Path) -> None:
    tensors, told = told_by(written)

    values = [each.detach().numpy() for name, each in loaded.model.named_parameters() if name.endswith(".tables")]
    digest = hashlib.sha256(np.concatenate([value.reshape(-1) for value in values]).tobytes()).hexdigest()
    assert told == {"format": 1, "content": "tables", "base_digest": loaded.base_digest, "digest": digest}
    canonical = json.dumps(told, sort_keys=True, separators=(",", ":"))  # as every version wrote it
    assert json.dumps({"fedzo_tables": canonical}, separators=(",", ":")).encode() in written.read_bytes()
    assert sum(each.numel() for each in tensors.values()) == sum(value.size for value in values)
    read = read_tables(written, loaded)
    assert list(read) == [name for name, _ in loaded.model.named_parameters() if name.endswith(".tables")]
    assert all(np.array_equal(table.numpy(), value) for table, value in zip(read.values(), values, strict=True))


NAME = "model.layers.0.mlp.up_proj.tables"
Change = Callable[[dict[str, torch.Tensor], dict[str, Any]], None]


def put(name: str, value: Any) -> Change:
    return lambda tensors, told: told.__setitem__(name, value)


def moved(tensors: dict[str, torch.Tensor], told: dict[str, Any]) -> None:
    tensors[NAME][0, 0, 0] += 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("base_digest", "f" * 64), r"must be of the model 'tiny-llama' \(SHA-256 \w{12}\.\.\.\), got .* \(f{12}"),
        (put("format", 2), r"format must be 1, got 2\. Export it again"),
        (put("content", "other"), "content must be 'tables' or 'gradient', got 'other'"),
        (put("digest", 7), "digest must be 64 hexadecimal digits, got 7"),
        (put("content", GRADIENT), "must hold tables, got 'gradient'"),
        (moved, "its values must have the SHA-256 that it tells, got another"),
        (lambda tensors, told: tensors.pop(NAME), rf"but differs in {NAME}\. Export it again"),
        (lambda tensors, told: tensors.update(more=torch.zeros(1)), "but differs in more"),
        (lambda tensors, told: tensors.update({NAME: tensors[NAME][:-1].clone()}), f"but differs in {NAME}"),
        (lambda tensors, told: tensors.update({NAME: tensors[NAME].half()}), f"but differs in {NAME}"),
        (lambda tensors, told: told.pop("format"), "format must be 1, got nothing"),
    ],
    ids=["base", "format", "word", "hash", "content", "value", "missing", "more", "shape", "dtype", "no format"],
)
def test_a_table_file_that_does_not_fit_is_refused(
    change: Change, message: str, loaded: LoadedModel, written: Path
) -> None:
    tensors, told = told_by(written)
    change(tensors, told)
    save_file(tensors, written, metadata={"fedzo_tables": json.dumps(told)})

    with pytest.raises(ConfigError, match=message):
        read_tables(written, loaded)


def test_other_files_and_places_are_named(loaded: LoadedModel, written: Path, tmp_path: Path) -> None:
    data, whole = written.read_bytes(), "must be a whole file that `fedzo export RUN OUT --tables` wrote"
    for content in (b"", b"text", data[:100], data[:-1], data + b"\0"):
        written.write_bytes(content)
        with pytest.raises(ConfigError, match=whole):
            read_tables(written, loaded)
    save_file({"x": torch.zeros(2)}, written)
    with pytest.raises(ConfigError, match=whole):
        read_tables(written, loaded)
    save_file({"x": torch.zeros(2)}, written, metadata={"fedzo_tables": "[1]"})
    with pytest.raises(ConfigError, match=r"table file .*: must be an object, got \[1\]"):
        read_tables(written, loaded)
    with pytest.raises(ConfigError, match=r"table file .*none: it must be readable"):
        read_tables(tmp_path / "none", loaded)
    with pytest.raises(RunFolderError, match=r"table file .*: it must be writable"):
        write_tables(tmp_path / "no" / "folder", tables_of(loaded.model), base_digest="")
    assert not (tmp_path / "no").exists()


@given(data=st.data())
def test_a_damaged_table_file_is_refused_or_gives_the_same_tables(
    data: st.DataObject, loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    write_tables(file, tables_of(loaded.model), base_digest=loaded.base_digest)
    content = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.one_of(st.integers(0, header - 1), st.integers(header, len(content) - 1)))
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(content)

    try:
        tables = read_tables(file, loaded)
    except ConfigError:
        return
    assert all(torch.equal(table, tables_of(loaded.model)[name]) for name, table in tables.items())


def test_tables_that_are_not_finite_are_refused(loaded: LoadedModel, tmp_path: Path) -> None:
    tables = {name: table.detach().clone() for name, table in tables_of(loaded.model).items()}
    tables[NAME][3, 0, 2] = torch.inf
    write_tables(tmp_path / "own", tables, base_digest=loaded.base_digest)

    with pytest.raises(ConfigError, match="its values must be finite, got NaN or infinity"):
        read_tables(tmp_path / "own", loaded)


# --- dense models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mixtral"])
def test_a_sketch_made_dense_computes_the_same_in_plain_transformers(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = save_tiny_sketch(tmp_path / "sketch", family)
    sketch, other = (AutoModelForCausalLM.from_pretrained(folder, dtype=dtype) for _ in range(2))

    make_dense(other)
    other.save_pretrained(tmp_path / "dense")

    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype)
    assert not [each for each in model.modules() if isinstance(each, SketchLinear)]
    with torch.inference_mode():
        expected, logits = (each(input_ids=IDS).logits for each in (sketch, model))
    rounding = 0.0 if family != "gpt2" else 1e-6 if dtype == torch.float32 else 2e-2  # Conv1D adds in another order
    assert float((logits - expected).abs().max()) <= rounding * float(expected.abs().max())
    for name, layer in sketched_layers(sketch).items():
        by_hand = layer.tables.squeeze(1).gather(1, unpack(layer.codes, 4, layer.in_features).long()).to(dtype)
        weight = model.get_submodule(name).weight
        assert torch.equal(weight.T if family == "gpt2" else weight, by_hand)


# --- digests and refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_sketch_in_memory_has_the_digest_of_its_folder(family: str, tmp_path: Path) -> None:
    folder = save_tiny_sketch(tmp_path / "sketch", family)

    in_memory = wrap_model(tiny_sketch(family), byte_tokenizer())
    of_folder = load_model(ModelConfig(name=str(folder)), device="cpu")

    assert in_memory.base_digest == of_folder.base_digest
    assert in_memory.is_sketch
    assert of_folder.is_sketch


def test_codes_are_a_part_of_the_digest(tmp_path: Path) -> None:
    own, other = tiny_sketch(), tiny_sketch()
    other.model.layers[1].mlp.down_proj.codes[0, 0] ^= 1
    renamed = save_tiny_sketch(tmp_path / "another name")
    other.save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")

    assert all(torch.equal(*pair) for pair in zip(own.parameters(), other.parameters(), strict=True))
    digests = [wrap_model(model, byte_tokenizer()).base_digest for model in (own, other)]
    digests += [
        load_model(ModelConfig(name=str(folder)), device="cpu").base_digest for folder in (renamed, tmp_path / "other")
    ]
    assert digests[0] == digests[2]
    assert digests[1] == digests[3] != digests[0]


def test_a_dense_model_in_memory_has_the_digest_that_it_had() -> None:
    assert not tiny_loaded().is_sketch
    assert tiny_loaded().base_digest == tiny_loaded().base_digest != tiny_loaded(seed=1).base_digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda codes: None,
            r"must hold every parameter of \w+, but model\.layers\.0\.mlp\.up_proj\.codes is in no file",
        ),
        (lambda codes: codes[:, :-1].contiguous(), r"up_proj\.codes \[64, 15\] \(config: \[64, 16\]\)"),
    ],
    ids=["missing", "resized"],
)
def test_codes_that_are_missing_or_of_another_size_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    """transformers would draw no codes and go on with zeros."""
    folder = save_tiny_sketch(tmp_path / "sketch")
    tensors, name = load_file(folder / "model.safetensors"), "model.layers.0.mlp.up_proj.codes"
    codes = change(tensors.pop(name))
    save_file({**tensors, **({} if codes is None else {name: codes})}, folder / "model.safetensors", {"format": "pt"})

    with pytest.raises(ConfigError, match=message):
        load_model(ModelConfig(name=str(folder)), device="cpu")


@pytest.mark.parametrize("kind", [kind for kind in Quantization if kind is not Quantization.none])
def test_a_sketch_is_not_packed_once_more(kind: Quantization, tmp_path: Path) -> None:
    folder = save_tiny_sketch(tmp_path / "sketch")

    with pytest.raises(
        ConfigError, match=rf"must be none for .*sketch', .* \(quant_method=fedzo_sketch\), got {kind}\."
    ):
        load_model(ModelConfig(name=str(folder), quantization=kind), device="cpu")


def test_a_sketch_is_not_compiled(tmp_path: Path) -> None:
    folder, message = save_tiny_sketch(tmp_path / "sketch"), r"model\.compile must be false for '.*', which is a sketch"

    with pytest.raises(ConfigError, match=message):
        load_model(ModelConfig(name=str(folder), compile=True), device="cpu")
    with pytest.raises(ConfigError, match=message):
        compile_loaded(tiny_loaded(sketched=True), longest=64)
