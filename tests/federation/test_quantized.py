"""Adapters over a base whose weights are packed: ``model.quantization``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig

from fedzo.bench.step import open_bench
from fedzo.cli import main
from fedzo.commands.replay import replay_run
from fedzo.commands.train import start_run
from fedzo.config.load import load
from fedzo.errors import ConfigError
from fedzo.models import load as loading
from fedzo.models import source
from fedzo.models.config import ModelConfig, Quantization
from fedzo.models.load import load_model
from fedzo.models.memory import num_weights, scratch_bytes, weights_bytes
from fedzo.run.start import open_run
from fedzo.testing.tiny_models import byte_tokenizer, tiny_model_from

Lines = Callable[[Path, str], list[dict[str, Any]]]
Overrides = Callable[..., list[str]]
Run = Callable[..., Path]
PACKED = [kind for kind in Quantization if kind is not Quantization.none]
SMALL = ["trainer=lora", "fl.rounds=2", "fl.local_steps=2", "task.max_length=256"]
pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own


@pytest.fixture(scope="module")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for blocks of 64 weights."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokenizer, folder = byte_tokenizer(), tmp_path_factory.mktemp("models") / "wide"
    model = tiny_model_from(LlamaConfig(**sizes, vocab_size=512, initializer_range=0.1, tie_word_embeddings=True))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def num_bytes(tensor: Any) -> int:
    """Bytes of a tensor, or of the tensors that it is packed from."""
    if flatten := getattr(tensor, "__tensor_flatten__", None):
        return sum(num_bytes(getattr(tensor, name)) for name in flatten()[0])
    return tensor.numel() * tensor.element_size()


def g_of(lines: Lines, folder: Path) -> np.ndarray:
    return np.array([entry["g"] for line in lines(folder, "audit.jsonl") for entry in line["clients"]])


@pytest.mark.parametrize("kind", PACKED)
def test_an_adapter_is_trained_over_packed_weights_and_replayed(kind: Quantization, run: Run, lines: Lines) -> None:
    plain, packed = run(*SMALL), run(*SMALL, f"model.quantization={kind}")

    scalars = g_of(lines, plain), g_of(lines, packed)
    assert np.abs(scalars[0] - scalars[1]).max() > 0
    assert np.corrcoef(scalars[0].ravel(), scalars[1].ravel())[0, 1] > 0.8
    assert replay_run(packed)["digest"] == lines(packed, "public.jsonl")[-1]["digest"]


@pytest.mark.parametrize("kind", PACKED)
def test_packed_weights_take_less_memory(kind: Quantization, overrides: Overrides, tmp_path: Path) -> None:
    launches = (load(overrides("trainer=lora", f"model.quantization={each}")) for each in ("none", kind))
    plain, packed = (open_run(launch, tmp_path).peer.loaded for launch in launches)

    assert packed.base_digest == plain.base_digest
    assert packed.architecture_digest == plain.architecture_digest
    assert num_weights(packed.model) == num_weights(plain.model)
    linear = [site.model.model.layers[0].mlp.up_proj.weight for site in (plain, packed)]
    assert num_bytes(linear[1]) < 0.3 * num_bytes(linear[0])


def test_the_estimate_of_four_bits_counts_scales_and_the_largest_layer_unpacked(
    overrides: Overrides, tmp_path: Path
) -> None:
    model = open_run(load(overrides("trainer=lora", "model.quantization=nf4")), tmp_path).peer.loaded.model

    # of 2 layers of 64 by 128 with 4 heads: q, k, v, o; gate, up, down; half a byte a weight, a scale a block of 64
    num_packed = 2 * (4 * 64 * 64 + 3 * 64 * 128)
    packed = [each for each in model.parameters() if hasattr(each, "quant_state")]
    others = sum(each.nbytes for each in model.parameters() if not hasattr(each, "quant_state"))
    assert sum(each.nbytes for each in packed) == num_packed // 2
    scales = [each.quant_state.absmax for each in packed]  # in float32, or in bfloat16 where the CPU computes so
    assert sum(each.numel() for each in scales) == num_packed // 64
    assert weights_bytes(model) == others + num_packed // 2 + scales[0].element_size() * num_packed // 64
    assert scratch_bytes(model) == 4 * 64 * 128


def test_a_site_that_packs_its_weights_belongs_to_the_same_run(overrides: Overrides, tmp_path: Path) -> None:
    from fedzo.config.travel import to_json

    runs = []
    for number, site in enumerate([[], ["model.quantization=nf4"]]):
        (tmp_path / str(number)).mkdir()
        runs.append(to_json(open_run(load(overrides(*SMALL, *site)), tmp_path / str(number)).peer.config))

    assert runs[0] == runs[1]


@pytest.mark.parametrize("trainer", ["mezo", "meerkat"])
def test_weights_that_are_trained_cannot_be_packed(trainer: str, overrides: Overrides) -> None:
    with pytest.raises(
        ConfigError, match=r"model\.quantization must be none where the model's own weights are trained"
    ):
        load(overrides(f"trainer={trainer}", "model.quantization=int8"))


@pytest.fixture(scope="module")
def stored_packed(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose own config.json says that it is packed."""
    folder = tmp_path_factory.mktemp("packed")
    packed = load_model(ModelConfig(name=str(tiny_model_dir), quantization=Quantization.nf4), device="cpu")
    assert packed.packed_as == "bitsandbytes"
    packed.model.save_pretrained(folder)
    packed.tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("trainer", ["mezo", "meerkat", "norms"])
def test_weights_that_are_stored_packed_are_not_trained(
    trainer: str, stored_packed: Path, overrides: Overrides, tmp_path: Path
) -> None:
    config = load(overrides(f"trainer={trainer}", f"model={stored_packed}", "task.max_length=256"))

    with pytest.raises(
        ConfigError, match=r"trainer must leave the weights of .* as they are, .* stored packed \(quant_method=bitsandb"
    ):
        open_run(config, tmp_path)


def test_an_adapter_is_trained_over_weights_that_are_stored_packed(
    stored_packed: Path, run: Run, lines: Lines, overrides: Overrides
) -> None:
    folder = run(*SMALL, f"model={stored_packed}")

    assert replay_run(folder)["digest"] == lines(folder, "public.jsonl")[-1]["digest"]
    with pytest.raises(ConfigError, match=r"bench step: model\.name must be a model of dense weights or a sketch"):
        open_bench(load(overrides(*SMALL, f"model={stored_packed}")), shape=None, rows=1, tokens=8)


def test_packed_weights_that_cannot_be_computed_with_are_told(
    overrides: Overrides, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(model: Any) -> bool:
        raise RuntimeError("blocks of 64 do not fit")

    monkeypatch.setattr(loading, "check_head", fail)
    with pytest.raises(ConfigError, match=r"model\.quantization=nf4 must be a quantization .* blocks of 64 do not fit"):
        open_run(load(overrides(*SMALL, "model.quantization=nf4")), tmp_path)
    with pytest.raises(
        ConfigError, match=r"a forward of LlamaForCausalLM fails: blocks of 64 do not fit\. Take another"
    ):
        open_run(load(overrides(*SMALL)), tmp_path)


def test_a_bench_of_packed_weights_is_refused(overrides: Overrides) -> None:
    with pytest.raises(ConfigError, match=r"model\.quantization must be none, got int8"):
        open_bench(load(overrides(*SMALL, "model.quantization=int8")), shape="opt-125m", rows=1, tokens=8)


@pytest.mark.parametrize(("kind", "library"), [("nf4", "bitsandbytes"), ("torchao_int8", "torchao")])
def test_a_missing_library_is_named(
    kind: str, library: str, overrides: Overrides, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(source, "find_spec", lambda name: None if name == library else name)
    with pytest.raises(ConfigError, match=r"pip install 'fedzo\[quantized\]'"):
        start_run(load(overrides(*SMALL, f"model.quantization={kind}")), tmp_path / "run", overrides=[])


@pytest.mark.parametrize("kind", PACKED)
def test_jobs_of_a_sweep_over_packed_weights_are_the_runs_that_they_are_alone(
    kind: Quantization, overrides: Overrides, run: Run, tmp_path: Path
) -> None:
    """The second one is given the model of the first."""
    words, folder = [*SMALL, f"model.quantization={kind}"], tmp_path / "sweep"
    where = [f"hydra.sweep.dir={folder}", "hydra.sweep.subdir=job${hydra:job.num}"]

    assert main(["train", "-m", *overrides(*words, "seed=0,1", *where)]) == 0

    logs = [(folder / f"job{seed}" / "public.jsonl").read_bytes() for seed in (0, 1)]
    assert logs == [(run(*words, f"seed={seed}") / "public.jsonl").read_bytes() for seed in (0, 1)]
