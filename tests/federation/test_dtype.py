"""``model.dtype=auto``: decided once a site, by measurement; the trained values are the same either way."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedzo.commands.replay import replay_run
from fedzo.commands.run_folder import rebuild
from fedzo.config.load import load
from fedzo.errors import ConfigError
from fedzo.evaluate import answers
from fedzo.fl.client import scalar_update
from fedzo.fl.messages import TrainRequest
from fedzo.models import auto_dtype, captured
from fedzo.models.auto_dtype import NUM_DIRECTIONS
from fedzo.models.config import DType, ModelConfig
from fedzo.models.products import RoundedProducts
from fedzo.run import peer
from fedzo.run.client_context import ClientContext
from fedzo.run.peer import Peer
from fedzo.run.start import open_run
from fedzo.trainers import TrainerContext
from fedzo.zo.estimator import TwoPoint
from fedzo.zo.log import EMPTY_CHAIN
from fedzo.zo.spaces.base import Space

Run = Callable[..., Path]
Lines = Callable[[Path, str], list[dict[str, Any]]]


@pytest.fixture
def dtypes(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Dtypes in which the federation's site holds its model, one entry each time a replica is built."""
    seen: list[torch.dtype] = []
    original = Peer._make_workspace

    def spy(self: Peer, *args: Any) -> Any:
        workspace = original(self, *args)
        assert workspace.loaded is self.loaded
        seen.append(self.loaded.model.get_input_embeddings().weight.dtype)
        return workspace

    monkeypatch.setattr(Peer, "_make_workspace", spy)
    return seen


@pytest.fixture(autouse=True)
def no_rounded_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this machine's processor, which may have some."""
    monkeypatch.setattr(peer, "rounded_products", lambda device: None)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "model.dtype=auto" in record.getMessage()]


def forwards_of(metrics: list[dict[str, Any]]) -> tuple[str, str]:
    """In what the server's process computes, as the run tells it."""
    (told,) = (line["forwards"] for line in metrics if line["kind"] == "setup")
    return told["dtype"], told["products"]


def test_an_unfaithful_bfloat16_leaves_the_run_of_float32(
    run: Run, dtypes: list[torch.dtype], caplog: pytest.LogCaptureFixture
) -> None:
    auto = run("model.dtype=auto")
    (line,) = said(caplog)
    plain = run("model.dtype=float32")

    assert "float32 is chosen" in line
    assert dtypes == [torch.float32, torch.float32]
    assert (auto / "public.jsonl").read_bytes() == (plain / "public.jsonl").read_bytes()


def test_a_process_that_is_started_again_within_a_run_decides_by_rows_of_the_client_that_is_asked(
    overrides: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be the site of one client, which has no rows of any other."""
    process = open_run(load(overrides("model.dtype=auto")), tmp_path)
    context = TrainerContext(folder=tmp_path, seed=0, texts=list)
    artifact = process.peer.trainer.prepare(process.peer.loaded, context).artifact
    known, read = process.client.data, []
    monkeypatch.setattr(ClientContext, "data", lambda _, client: read.append(client) or known(client))

    request = TrainRequest(
        client=3,
        config_hash=process.client.worker.config_hash,
        space_id=artifact.digest,
        chain=EMPTY_CHAIN.hex(),
        steps=1,
    )
    process.client.worker.train(request)

    assert set(read) == {3}


@pytest.mark.parametrize("trainer", ["meerkat", "lora", "tables"])
def test_where_bfloat16_is_taken_the_trained_values_start_from_float32s(
    run: Run,
    lines: Lines,
    dtypes: list[torch.dtype],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    trainer: str,
) -> None:
    monkeypatch.setattr(auto_dtype, "_LARGEST_ERROR", math.inf)
    monkeypatch.setattr(auto_dtype, "_LARGEST_TIME", math.inf)
    settings = (f"trainer={trainer}", "fl.local_steps=2", "server_optimizer.lr=1e-4")

    auto, plain = run("model.dtype=auto", *settings), run("model.dtype=float32", *settings)

    assert [line for line in said(caplog) if "bfloat16 is chosen" in line] == said(caplog)
    assert len(said(caplog)) == 1
    assert dtypes == [torch.bfloat16, torch.float32]
    assert [forwards_of(lines(folder, "metrics.jsonl")) for folder in (auto, plain)] == [
        ("bfloat16", ""),
        ("float32", ""),
    ]
    scalars = [[line["c"] for line in lines(folder, "public.jsonl")] for folder in (auto, plain)]
    assert not np.array_equal(*scalars)
    start = [rebuild(folder, rounds=0).replica.space.digest() for folder in (auto, plain)]
    assert start[0] == start[1]
    assert replay_run(auto)["digest"] == lines(auto, "public.jsonl")[-1]["digest"]
    assert dtypes[2:] == [torch.float32] * 3  # what is rebuilt is not measured again


@pytest.mark.parametrize("short", ["fitting_tokens_per_batch", "coarseness_warning"])
def test_a_site_whose_memory_was_too_small_at_first_keeps_its_choice_and_float32s_values(
    short: str,
    overrides: Callable[..., list[str]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The next request finds memory; what bfloat16 has rounded must not be what is trained then."""
    monkeypatch.setattr(auto_dtype, "_LARGEST_ERROR", math.inf)
    monkeypatch.setattr(auto_dtype, "_LARGEST_TIME", math.inf)
    asked = ("float32", "auto")
    plain, process = (open_run(load(overrides(f"model.dtype={dtype}")), tmp_path / dtype) for dtype in asked)
    assert plain.launched is not None
    artifact, rows = plain.launched.prepared.artifact, process.server.trial_rows
    start = plain.peer.workspace(artifact).replica.space.digest()
    fitting = getattr(peer, short)

    def refuses(*_: Any, **__: Any) -> Any:
        raise ConfigError("not even one sequence fits")

    monkeypatch.setattr(peer, short, refuses)
    with pytest.raises(ConfigError, match="not even one sequence"):
        process.peer.workspace(artifact, trial_rows=rows)
    monkeypatch.setattr(peer, short, fitting)
    replica = process.peer.workspace(artifact, trial_rows=rows).replica

    assert process.peer.loaded.model.get_input_embeddings().weight.dtype is torch.bfloat16
    assert len([line for line in said(caplog) if "bfloat16 is chosen" in line]) == 1
    assert replica.space.digest() == start
    replica.reset()
    assert replica.space.digest() == start


def test_rounded_products_make_the_steps_losses_where_they_are_true_and_nothing_else(
    run: Run, lines: Lines, dtypes: list[torch.dtype], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered = RoundedProducts("float32 with TF32 products", "high")  # a CPU's are float32's with that permission
    monkeypatch.setattr(peer, "rounded_products", lambda device: offered)
    monkeypatch.setattr(auto_dtype, "_LARGEST_TIME", math.inf)
    before, of_steps, of_scores = torch.get_float32_matmul_precision(), set(), set()

    def spied(module: Any, name: str, seen: set[str]) -> None:
        original = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            seen.add(torch.get_float32_matmul_precision())
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    spied(scalar_update, "example_losses", of_steps)
    spied(answers, "candidate_scores", of_scores)
    folder = run("model.dtype=auto")

    (line,) = said(caplog)
    assert "float32 with TF32 products is chosen" in line
    assert forwards_of(lines(folder, "metrics.jsonl")) == ("float32", "float32 with TF32 products")
    assert dtypes == [torch.float32]
    assert of_steps == {"high"}
    assert of_scores == {before}
    assert torch.get_float32_matmul_precision() == before
    assert replay_run(folder)["digest"] == lines(folder, "public.jsonl")[-1]["digest"]


@pytest.mark.parametrize("rounded", [None, RoundedProducts("float32 with TF32 products", "high")])
def test_a_second_model_that_has_no_room_beside_float32s_is_not_tried(
    run: Run,
    dtypes: list[torch.dtype],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    rounded: RoundedProducts | None,
) -> None:
    monkeypatch.setattr(peer, "available_memory_bytes", lambda device: 0)
    monkeypatch.setattr(peer, "rounded_products", lambda device: rounded)
    monkeypatch.setattr(auto_dtype, "_LARGEST_ERROR", math.inf)
    monkeypatch.setattr(auto_dtype, "_LARGEST_TIME", math.inf)

    run("model.dtype=auto", "fl.rounds=1")

    warning, *chosen = said(caplog)
    assert "bfloat16 is not tried" in warning
    assert "Write model.dtype=bfloat16 to hold it alone" in warning
    names = [line.removeprefix("model.dtype=auto: ").partition(" is chosen")[0] for line in chosen]
    assert names == ([rounded.name] if rounded else [])
    assert dtypes == [torch.float32]


@pytest.mark.parametrize("where", ["its load", "bfloat16", "float32"])
def test_what_fails_when_it_is_tried_is_not_chosen_and_float32_runs(
    where: str, run: Run, dtypes: list[torch.dtype], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a card where a second model finds room, but no forward beside it."""
    load_model, try_out = peer.load_model, peer.try_out

    def loads(config: ModelConfig, **how: Any) -> Any:
        if where == "its load" and config.dtype is DType.bfloat16:
            raise ConfigError("the memory of cuda must hold the weights,\nbut does not")
        return load_model(config, **how)

    def tries(space: Space, *how: Any) -> Any:
        if f"torch.{where}" == str(space.parameters[0].dtype):
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")
        return try_out(space, *how)

    monkeypatch.setattr(peer, "load_model", loads)
    monkeypatch.setattr(peer, "try_out", tries)
    auto = run("model.dtype=auto", "fl.rounds=1")
    (line,) = said(caplog)
    plain = run("model.dtype=float32", "fl.rounds=1")

    name = "float32" if where == "float32" else "bfloat16"
    assert line.startswith(f"model.dtype=auto: {name} cannot be tried: ")
    assert "memory" in line
    assert "\n" not in line
    assert dtypes == [torch.float32, torch.float32]
    assert (auto / "public.jsonl").read_bytes() == (plain / "public.jsonl").read_bytes()


def test_where_bfloat16_fails_rounded_products_are_tried(
    run: Run, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    try_out, offered = peer.try_out, RoundedProducts("float32 with TF32 products", "high")

    def tries(space: Space, *how: Any) -> Any:
        if space.parameters[0].dtype is torch.bfloat16:
            raise RuntimeError("\"addmm_impl\" not implemented for 'BFloat16'")
        return try_out(space, *how)

    monkeypatch.setattr(peer, "try_out", tries)
    monkeypatch.setattr(peer, "rounded_products", lambda device: offered)
    monkeypatch.setattr(auto_dtype, "_LARGEST_TIME", math.inf)

    run("model.dtype=auto", "fl.rounds=1")

    failed, chosen = said(caplog)
    assert 'bfloat16 cannot be tried: "addmm_impl" not implemented' in failed
    assert "float32 with TF32 products is chosen" in chosen


@pytest.mark.parametrize("trainer", ["meerkat", "lora", "prompt", "prefix"])
@pytest.mark.parametrize(("chosen", "largest_time"), [(torch.float32, 0.0), (torch.bfloat16, math.inf)])
def test_the_model_that_was_not_chosen_is_gone_before_memory_is_measured(
    run: Run, monkeypatch: pytest.MonkeyPatch, trainer: str, chosen: torch.dtype, largest_time: float
) -> None:
    monkeypatch.setattr(auto_dtype, "_LARGEST_ERROR", math.inf)
    monkeypatch.setattr(auto_dtype, "_LARGEST_TIME", largest_time)
    load_model, fitting = peer.load_model, peer.fitting_tokens_per_batch
    models: dict[torch.dtype, weakref.ref[torch.nn.Module]] = {}
    alive: list[set[torch.dtype]] = []

    def loads(config: ModelConfig, **how: Any) -> Any:
        loaded = load_model(config, **how)
        models[loaded.model.get_input_embeddings().weight.dtype] = weakref.ref(loaded.model)
        return loaded

    def fits(*given: Any, **how: Any) -> int:
        alive.append({dtype for dtype, each in models.items() if each() is not None})
        return fitting(*given, **how)

    monkeypatch.setattr(peer, "load_model", loads)
    monkeypatch.setattr(peer, "fitting_tokens_per_batch", fits)
    gc.disable()
    try:
        run("model.dtype=auto", f"trainer={trainer}", "task.max_length=64", "fl.rounds=1")
    finally:
        gc.enable()

    assert {*models} == {torch.float32, torch.bfloat16}
    assert alive == [{chosen}]


def test_graphs_are_timed_where_the_run_has_them(
    run: Run, graphs_on_cpu: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that counts is a replay: what a graph's first runs are compared with takes the time of an eager forward."""
    try_out, done, ends = peer.try_out, list[str](), list[list[str]]()

    def spied(owner: Any, name: str, what: str) -> None:
        own = getattr(owner, name)

        def call(*given: Any) -> Any:
            done.append(what)
            return own(*given)

        monkeypatch.setattr(owner, name, call)

    def tries(*given: Any) -> Any:
        trial = try_out(*given)
        ends.append(done[-4 * NUM_DIRECTIONS :])
        return trial

    spied(captured.Captures, "run", "a forward")
    spied(captured._Captured, "run", "its replay")
    spied(captured, "_compare", "a comparison")
    monkeypatch.setattr(peer, "try_out", tries)
    run("model.dtype=auto", "model.cuda_graphs=true", "task.candidates=[b,g]", "fl.rounds=1")

    assert ends == [["a forward", "its replay"] * 2 * NUM_DIRECTIONS] * 2


@pytest.mark.parametrize(("num_probes", "asked"), [(1, [1, 4]), (2, [2, 4]), (6, [6, 6])])
def test_an_estimator_is_tried_with_no_fewer_probes_than_a_step_has(
    run: Run, monkeypatch: pytest.MonkeyPatch, num_probes: int, asked: list[int]
) -> None:
    """It may have nothing to compare one direction with, and then say so."""
    estimate, numbers = TwoPoint.estimate, list[int]()

    def noted(self: TwoPoint, space: Space, loss_fn: Any, keys: Any) -> Any:
        numbers.append(len(keys))
        return estimate(self, space, loss_fn, keys)

    monkeypatch.setattr(TwoPoint, "estimate", noted)
    run("model.dtype=auto", f"estimator.num_probes={num_probes}", "fl.rounds=1")

    assert numbers[:4] == [*asked, *asked]  # in float32, and in bfloat16
    assert {*numbers[4:]} == {num_probes}


def test_all_weights_of_a_16_bit_model_are_warned_of_where_probes_vanish(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    run("trainer=mezo", "model.dtype=bfloat16", "trainer.rounding=stochastic", "fl.rounds=1")
    run("trainer=mezo", "fl.rounds=1")

    warned = [record.getMessage() for record in caplog.records if "half the spacing" in record.getMessage()]

    assert len(warned) == 1
    assert "5 tensors" in warned[0]  # the norms, all ones; two a layer and the last
    assert "norm.weight" in warned[0]
