"""``model.compile``: the losses of the eager forward, weights read where they lie, few graphs; or a clear refusal."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.utils import counters

from fedzo.config.load import load
from fedzo.data.config import Loss
from fedzo.data.encode import Example
from fedzo.errors import ConfigError
from fedzo.models.forwards import Planning, run_texts
from fedzo.models.kept_rows import Read
from fedzo.models.load import compile_loaded
from fedzo.models.loaded import LoadedModel
from fedzo.models.plan import FEW_FORWARDS, bucket, plan_batches
from fedzo.models.scoring import candidate_scores, example_losses
from fedzo.testing.tiny_models import tiny_loaded, tiny_tokens
from fedzo.trainers import TRAINERS, TrainerContext
from fedzo.zo.config import Distribution
from fedzo.zo.spaces.full import FullSpace
from fedzo.zo.spaces.masked import MaskedSpace

MANY = 4096
needs_a_compiler = pytest.mark.skipif(
    not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")),
    reason="torch.compile needs a C++ compiler on the CPU, and there is none",
)


SHORT = [Example(tiny_tokens(i, length), ((7,), (250,)), i % 2) for i, length in enumerate((12, 5, 9))]
LONG = [Example(tiny_tokens(4, 9), (tiny_tokens(5, 3), tiny_tokens(6, 1), tiny_tokens(7, 4)), 0)]


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that torch.compile does but the code: graphs are run as they were traced, bit for bit, in no time."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


def eager(loaded: LoadedModel) -> LoadedModel:
    twin = tiny_loaded()
    twin.model.load_state_dict(loaded.model.state_dict())
    return twin


def hidden(loaded: LoadedModel, texts: list[Read], *, tokens_per_batch: int = MANY) -> list[torch.Tensor]:
    """Hidden state of each text's end."""
    found: dict[int, torch.Tensor] = {}
    for batch, rows in run_texts(loaded, texts, Planning(tokens_per_batch, forward_cost_tokens=32)):
        found.update(zip(batch, rows, strict=True))
    return [found[i] for i in range(len(texts))]


@given(st.integers(1, 5000))
def test_a_bucket_is_the_next_of_two_sizes_an_octave(size: int) -> None:
    sizes = sorted({2**k for k in range(14)} | {3 * 2**k for k in range(13)})

    assert bucket(size) == next(each for each in sizes if each >= size)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(40, 200))
def test_rows_that_are_padded_to_a_bucket_stay_within_the_tokens_of_a_batch(lengths: list[int], most: int) -> None:
    batches = plan_batches(lengths, tokens_per_batch=most, forward_cost_tokens=FEW_FORWARDS, bucketed=True)

    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or bucket(len(batch)) * max(lengths[i] for i in batch) <= most


@pytest.mark.slow
@needs_a_compiler
def test_losses_are_those_of_the_eager_forward_and_in_place_changes_are_seen() -> None:
    loaded = compile_loaded(tiny_loaded(), longest=12)
    assert loaded.decoder is not None
    flat = torch.arange(0, 1024, 3)
    names = ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight")
    space = MaskedSpace(loaded.model, {name: flat[:8] if "norm" in name else flat for name in names})
    start = space.values()

    def compare() -> np.ndarray:
        kinds = ((SHORT, Loss.candidates), (SHORT, Loss.lm), (LONG, Loss.candidates))
        ours = [example_losses(loaded, rows, Planning(MANY), loss=loss) for rows, loss in kinds]
        own = [example_losses(eager(loaded), rows, Planning(MANY), loss=loss) for rows, loss in kinds]
        np.testing.assert_allclose(np.concatenate(ours), np.concatenate(own), rtol=0, atol=1e-5)
        return np.concatenate(ours)

    before = compare()
    with space.probe(0.3, key=5):
        probed = compare()
    space.step(0.3, key=5)
    stepped = compare()
    space.load(start)

    assert np.abs(probed - before).min() > 1e-3
    assert np.abs(stepped - before).min() > 1e-3
    assert np.array_equal(compare(), before)


@pytest.mark.slow
def test_there_is_one_graph_for_each_bucket_however_many_batches_come(traced: None) -> None:
    plain = tiny_loaded()
    loaded = compile_loaded(tiny_loaded(), longest=20)
    shapes = {(2, 8)}  # of the comparison that compiling begins with
    for number in range(14):
        lengths = [1 + (number * 7 + i * 5) % 20 for i in range(1 + number % 6)]
        texts = [Read(tiny_tokens(number + i, length), 1) for i, length in enumerate(lengths)]
        before = loaded.counter.num_tokens
        ours = hidden(loaded, texts)
        shape = (bucket(len(texts)), min(20, bucket(max(lengths))))
        shapes.add(shape)

        assert loaded.counter.num_tokens - before == shape[0] * shape[1]
        torch.testing.assert_close(torch.stack(ours), torch.stack(hidden(plain, texts)), rtol=0, atol=1e-5)

    assert len(shapes) > 8  # where torch would give up by default
    assert counters["stats"]["unique_graphs"] == len(shapes)


@pytest.mark.slow
def test_a_text_beyond_the_longest_bucket_runs_at_its_own_length(traced: None) -> None:
    loaded = compile_loaded(tiny_loaded(), longest=9)

    for length, columns in ((9, 9), (7, 8), (11, 11)):
        before = loaded.counter.num_tokens
        hidden(loaded, [Read(tiny_tokens(1, length), 1)])
        assert loaded.counter.num_tokens - before == columns


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "ia3", "prefix", "prompt"])
def test_adapters_are_compiled_along_and_seen_to_change(name: str, traced: None, tmp_path: Path) -> None:
    loaded = compile_loaded(tiny_loaded(), longest=16)
    trainer = TRAINERS.build(load([f"trainer={name}"]).trainer)
    context = TrainerContext(folder=tmp_path, seed=0, texts=list)
    artifact = trainer.prepare(loaded, context).artifact
    space = trainer.build(loaded, artifact, distribution=Distribution.gaussian).space
    start = space.values()
    plain = LoadedModel(**{**fields_of(loaded), "decoder": None})

    seen = []
    for number, shift in enumerate((0.0, 0.25, 0.5)):
        space.load(start + np.float32(shift))
        ours = example_losses(loaded, SHORT, Planning(MANY), loss=Loss.candidates)
        own = example_losses(plain, SHORT, Planning(MANY), loss=Loss.candidates)
        np.testing.assert_allclose(ours, own, rtol=0, atol=1e-5)
        seen.append(ours)
        if number == 0:
            graphs = counters["stats"]["unique_graphs"]

    assert np.abs(seen[1] - seen[0]).min() > 1e-4
    assert np.abs(seen[2] - seen[1]).min() > 1e-4
    assert counters["stats"]["unique_graphs"] == graphs


def fields_of(loaded: LoadedModel) -> dict[str, Any]:
    return {name: getattr(loaded, name) for name in LoadedModel.__dataclass_fields__}


@pytest.mark.slow
def test_weights_that_are_perturbed_on_the_fly_are_refused_and_never_missed(traced: None) -> None:
    loaded = compile_loaded(tiny_loaded(), longest=16)
    space = FullSpace(loaded.model)

    with (
        warnings.catch_warnings(action="ignore"),
        space.probe(0.1, key=5),
        pytest.raises(torch._dynamo.exc.TorchDynamoException),
    ):
        example_losses(loaded, SHORT, Planning(MANY), loss=Loss.candidates)


@pytest.mark.slow
def test_a_decoder_that_cannot_be_traced_is_refused(traced: None, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny_loaded()
    norm = loaded.model.get_decoder().norm
    own = norm.forward

    def broken(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return own(x)

    monkeypatch.setattr(norm, "forward", broken)

    with pytest.raises(ConfigError, match=r"model.compile must be false for a LlamaForCausalLM on this machine: torch"):
        compile_loaded(loaded, longest=16)


def off_by(change: float) -> Callable[..., Any]:
    def wrong(decoder: Any, **settings: Any) -> Any:
        def run(input_ids: torch.Tensor) -> Any:
            output = decoder(input_ids=input_ids)
            output.last_hidden_state = output.last_hidden_state + change
            return output

        return run

    return wrong


@pytest.mark.parametrize("change", [0.01, float("nan")])
def test_a_compiler_that_computes_something_else_is_refused(change: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", off_by(1e-6))
    assert compile_loaded(tiny_loaded(), longest=16).decoder is not None

    monkeypatch.setattr(torch, "compile", off_by(change))
    with pytest.raises(ConfigError, match="its forward is off by"):
        compile_loaded(tiny_loaded(), longest=16)


def test_graphs_that_would_copy_the_weights_are_refused() -> None:
    with torch._inductor.config.patch(freezing=True), pytest.raises(ConfigError, match="TORCHINDUCTOR_FREEZING=1"):
        compile_loaded(tiny_loaded(), longest=16)


def test_a_model_whose_head_cannot_be_applied_apart_is_refused() -> None:
    loaded = LoadedModel(**{**fields_of(tiny_loaded()), "direct_head": False})

    with pytest.raises(ConfigError, match=r"model\.compile must be false for 'tiny-llama': its LM head"):
        compile_loaded(loaded, longest=16)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device, and there is none")
def test_cuda_graphs_give_the_eager_losses_and_read_weights_where_they_lie() -> None:
    plain = tiny_loaded(device="cuda")
    loaded = compile_loaded(plain, longest=12)
    space = MaskedSpace(plain.model, {"model.layers.1.mlp.down_proj.weight": torch.arange(0, 2048, 3)})

    def losses(of: LoadedModel) -> np.ndarray:
        scores = candidate_scores(of, LONG, tokens_per_batch=MANY).ravel()
        return np.concatenate([example_losses(of, SHORT, Planning(MANY), loss=Loss.candidates), scores])

    seen = []
    for _ in range(4):  # a graph is run, then recorded, then replayed
        seen.append(losses(loaded))
        np.testing.assert_allclose(seen[-1], losses(plain), rtol=0, atol=1e-4)
        space.step(0.3, key=5)

    assert all(np.abs(after - before).max() > 1e-3 for before, after in pairwise(seen))
