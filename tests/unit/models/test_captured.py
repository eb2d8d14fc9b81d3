"""``model.cuda_graphs``: what a graph gives is the eager forward at every probe, or there is no graph.

The graphs are tapes (``conftest``), which know what they were recorded with and nothing else.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedzo.config.load import load
from fedzo.data.config import Loss
from fedzo.data.encode import Example
from fedzo.models import captured
from fedzo.models.arithmetic import DIFFERENTIABLE
from fedzo.models.blocks import parameters_from
from fedzo.models.captured import CapturedDecoder, Captures, CudaGraphs, capture
from fedzo.models.forwards import Planning, lower_layers_of
from fedzo.models.loaded import LoadedModel
from fedzo.models.lower_layers import StepStates
from fedzo.models.products import RoundedProducts, use_products
from fedzo.models.scoring import candidate_scores, example_losses
from fedzo.system import warn_once
from fedzo.testing.tiny_models import FAMILIES, tiny_loaded, tiny_tokens
from fedzo.trainers import TRAINERS, TrainerContext
from fedzo.zo.config import Distribution
from fedzo.zo.perturb import PerturbedWeights
from fedzo.zo.spaces.base import Space
from fedzo.zo.spaces.full import FullSpace
from fedzo.zo.spaces.masked import MaskedSpace

MANY = 4096
NewGraph = Callable[[], Any]
Switch = Callable[[], list[str]]


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    warn_once.cache_clear()


SHORT = [Example(tiny_tokens(i, length), ((7,), (250,)), i % 2) for i, length in enumerate((12, 5, 9))]
LONG = [Example(tiny_tokens(4, 9), (tiny_tokens(5, 3), tiny_tokens(6, 1), tiny_tokens(7, 4)), 0)]


def all_weights(loaded: LoadedModel) -> Space:
    return FullSpace(loaded.model)


def upper_weights(loaded: LoadedModel) -> Space:
    return FullSpace(loaded.model, parameters=parameters_from(loaded.model, 1))


def some_weights(loaded: LoadedModel) -> Space:
    names = ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight")
    return MaskedSpace(loaded.model, {name: torch.arange(0, 1024, 3) for name in names})


def adapter(loaded: LoadedModel, *changes: str) -> Space:
    trainer = TRAINERS.build(load(["trainer=lora", *changes]).trainer)
    context = TrainerContext(folder=Path(), seed=0, texts=list)
    artifact = trainer.prepare(loaded, context).artifact
    return trainer.build(loaded, artifact, distribution=Distribution.gaussian).space


def upper_adapter(loaded: LoadedModel) -> Space:
    return adapter(loaded, "trainer.first_layer=1")


def losses(
    loaded: LoadedModel, rows: list[Example], loss: Loss = Loss.candidates, *, lower: StepStates | None = None
) -> np.ndarray:
    return example_losses(loaded, rows, Planning(MANY, lower=lower), loss=loss)


@pytest.fixture(params=[None, 1 << 20, 50_000, 3_000], ids=lambda size: f"groups of {size}")
def groups(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model's weights are all small ones, or in one group, in two, or in many, as a larger model's are."""
    if request.param:
        monkeypatch.setattr("fedzo.zo.tensor_group._SMALL", 100)
        monkeypatch.setattr("fedzo.zo.tensor_group._GROUP_BYTES", request.param)


def graphs_of(loaded: LoadedModel) -> dict[Any, Any]:
    assert isinstance(loaded.decoder, CapturedDecoder)
    return loaded.decoder.captures._graphs


@pytest.mark.parametrize("make", [all_weights, upper_weights, some_weights, adapter])
def test_losses_are_those_of_the_eager_forward_wherever_a_space_is(
    make: Callable[[LoadedModel], Space], groups: None, new_tape: NewGraph, as_on_a_gpu: Switch
) -> None:
    as_on_a_gpu()
    loaded = tiny_loaded()
    space = make(loaded)
    ours, _ = capture(loaded, None, longest=16, new_graph=new_tape)
    seen: list[np.ndarray] = []

    def compare() -> None:
        for rows, loss in ((SHORT, Loss.candidates), (SHORT, Loss.lm), (LONG, Loss.candidates)):
            want = losses(loaded, rows, loss)
            np.testing.assert_allclose(losses(ours, rows, loss), want, rtol=0, atol=1e-5)
        seen.append(want)

    compare()
    for number in range(4):  # of each graph three runs are compared by itself; those after them only here
        for scale in (0.2, -0.2):
            with space.probe(scale, key=2**40 + number):
                compare()
        space.step(0.2, key=2**63 + number)
        compare()

    everything = np.concatenate(seen)
    assert len(np.unique(everything)) == len(everything)
    assert not ours.decoder.captures.gave_up
    shapes = len({graph.inputs[0].shape for graph in graphs_of(ours).values()})
    assert len(graphs_of(ours)) == shapes * (2 if isinstance(space, FullSpace) else 1)


@pytest.mark.parametrize("cache_mb", [0, 1])
@pytest.mark.parametrize("make", [upper_weights, upper_adapter])
def test_what_a_step_keeps_of_the_lower_blocks_enters_the_graphs(
    cache_mb: int, make: Callable[[LoadedModel], Space], new_tape: NewGraph, as_on_a_gpu: Switch
) -> None:
    as_on_a_gpu()
    loaded = tiny_loaded()
    space = make(loaded)
    ours, lower = capture(loaded, lower_layers_of(loaded, space, cache_mb=cache_mb), longest=16, new_graph=new_tape)
    assert lower is not None

    for number in range(6):
        step = lower.of_step()
        for scale in (0.2, -0.2):
            with space.probe(scale, key=number):
                for rows in (SHORT, SHORT[1:], LONG):
                    want = losses(loaded, rows)
                    np.testing.assert_allclose(losses(ours, rows, lower=step), want, rtol=0, atol=1e-5)
        space.step(0.2, key=9 + number)

    names = {key[0] for key in graphs_of(ours)}
    assert names == ({"upper"} if cache_mb else {"lower", "upper"})
    assert lower.given == []


def test_scores_share_graphs_with_losses(new_tape: NewGraph) -> None:
    loaded = tiny_loaded()
    ours, _ = capture(loaded, None, longest=16, new_graph=new_tape)

    replayed(ours)
    found = candidate_scores(ours, SHORT, tokens_per_batch=MANY)

    assert np.allclose(found, candidate_scores(loaded, SHORT, tokens_per_batch=MANY), rtol=0, atol=1e-5)
    assert len(graphs_of(ours)) == 1


def replayed(loaded: LoadedModel) -> np.ndarray:
    """A shape that is seen for the first time is eager, and so is what the compared runs give."""
    for _ in range(4):
        losses(loaded, SHORT)
    return losses(loaded, SHORT)


def test_weights_that_lie_elsewhere_and_other_products_have_graphs_of_their_own(new_tape: NewGraph) -> None:
    loaded = tiny_loaded()
    ours, _ = capture(loaded, None, longest=16, new_graph=new_tape)

    replayed(ours)
    with use_products(RoundedProducts("", "high")):
        replayed(ours)
    assert len(graphs_of(ours)) == 2
    weight = loaded.model.get_parameter("model.layers.0.self_attn.q_proj.weight")
    weight.data = weight.data * 2
    want = losses(loaded, SHORT)

    np.testing.assert_allclose(replayed(ours), want, rtol=0, atol=1e-5)
    assert len(graphs_of(ours)) == 1


def test_the_graphs_used_last_are_kept(new_tape: NewGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured, "MAX_GRAPHS", 2)
    ours, _ = capture(tiny_loaded(), None, longest=64, new_graph=new_tape)

    for length in (4, 4, 8, 8, 4, 16, 16):
        losses(ours, [Example(tiny_tokens(1, length), ((7,), (250,)), 0)])

    assert [key[1][0][0][1] for key in graphs_of(ours)] == [4, 16]


@pytest.mark.parametrize(
    ("spare", "kept"), [(0, [4, 16]), (-1, [16]), (8 * (4 * 32 + 8), [8, 4, 16]), (-(10**6), [16])]
)
def test_graphs_take_no_more_than_their_bytes_but_for_the_one_that_runs(
    spare: int, kept: list[int], new_tape: NewGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each token its id and 32 numbers of its states."""
    monkeypatch.setattr(captured, "GRAPH_BYTES", (4 + 16) * (4 * 32 + 8) + spare)
    ours, _ = capture(tiny_loaded(), None, longest=64, new_graph=new_tape)

    for length in (4, 4, 8, 8, 4, 16, 16):
        losses(ours, [Example(tiny_tokens(1, length), ((7,), (250,)), 0)])

    assert [key[1][0][0][1] for key in graphs_of(ours)] == kept


CAPTURED = {"gemma2", "gpt2", "llama", "mixtral", "opt", "qwen3"}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_losses_of_any_family_are_the_eager_ones(
    family: str, new_tape: NewGraph, as_on_a_gpu: Switch, caplog: pytest.LogCaptureFixture
) -> None:
    as_on_a_gpu()
    loaded = tiny_loaded(family)
    space = FullSpace(loaded.model)
    ours, _ = capture(loaded, None, longest=16, new_graph=new_tape)

    with caplog.at_level(logging.WARNING):
        for key in range(6):
            with space.probe(0.05, key=key):
                np.testing.assert_allclose(losses(ours, SHORT), losses(loaded, SHORT), rtol=0, atol=1e-5)

    assert ("cannot run as CUDA graphs" not in caplog.text) == (family in CAPTURED)


@pytest.mark.parametrize("family", sorted(CAPTURED - {"gemma2"}))  # which attends without a kernel of its own
def test_attention_is_called_as_in_the_eager_forward(
    family: str, new_tape: NewGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder: Any = tiny_loaded(family).model.get_decoder()
    calls: list[tuple[bool, bool]] = []
    own = F.scaled_dot_product_attention

    def attention(*args: Any, **how: Any) -> torch.Tensor:
        calls.append((how.get("attn_mask") is None, how["is_causal"]))
        return own(*args, **how)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    captures = Captures(decoder, new_tape)
    ids = torch.arange(32).view(2, 16)

    with torch.inference_mode():
        runs = [captures.run("whole", lambda ids: decoder(input_ids=ids).last_hidden_state, ids) for _ in range(5)]

    assert {True} == {*sum(calls, ())}  # no mask, and causal
    assert len(calls) == 6 * decoder.config.num_hidden_layers  # seen first, warmed up, recorded, compared three times
    assert torch.equal(runs[0], runs[-1])


class Rounded:
    """A graph that differs from the eager forward by rounding."""

    def capture(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        self.work, self.output = work, work()
        return self.output

    def replay(self) -> None:
        self.output.copy_(self.work() * (1 + 1e-6))


@pytest.mark.parametrize("then", ["its graph goes", "weights lie elsewhere"])
def test_both_sides_of_a_probe_are_computed_alike(then: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two probes are eager, those after them are replays; so again where a graph is recorded anew."""
    monkeypatch.setattr(captured, "MAX_GRAPHS", 1)
    module, given = nn.Linear(4, 4), torch.arange(8.0).view(2, 4)
    captures = Captures(module, Rounded)

    def sides(rows: torch.Tensor, times: int) -> list[bool]:
        with torch.inference_mode():
            return [torch.equal(captures.run("whole", module, rows), module(rows)) for _ in range(times)]

    first = sides(given, 8)
    if then == "its graph goes":
        sides(given[:1], 2)  # the second records
    else:
        module.weight.data = module.weight.data.clone()
    second = sides(given, 8)

    assert first == second == [True] * 4 + [False] * 4
    assert not captures.gave_up


def test_a_forward_that_lacks_memory_beside_graphs_has_theirs(caplog: pytest.LogCaptureFixture) -> None:
    module, given = nn.Linear(4, 4), torch.arange(8.0).view(2, 4)
    captures = Captures(module, Rounded)

    def work(rows: torch.Tensor) -> torch.Tensor:
        if len(rows) == 1 and captures._graphs:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")
        return module(rows)

    def lacking(rows: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with torch.inference_mode(), caplog.at_level(logging.WARNING):
        for _ in range(2):
            captures.run("whole", work, given)
        assert len(captures._graphs) == 1
        found = captures.run("whole", work, given[:1])
        assert torch.equal(found, module(given[:1]))
        with pytest.raises(torch.OutOfMemoryError):  # there is nothing more to be had
            captures.run("other", lacking, given)

    assert captures.gave_up
    assert not captures._graphs
    assert len(caplog.messages) == 1
    assert caplog.messages[0].endswith("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_what_fails_beside_graphs_for_another_reason_fails() -> None:
    module, given = nn.Linear(4, 4), torch.arange(8.0).view(2, 4)
    captures = Captures(module, Rounded)

    def broken_work(rows: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with torch.inference_mode():
        for _ in range(2):
            captures.run("whole", module, given)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            captures.run("other", broken_work, given)

    assert len(captures._graphs) == 1


def broken(loaded: LoadedModel, change: Callable[[torch.Tensor], torch.Tensor]) -> LoadedModel:
    """Its last layer norm's output changed."""
    norm = loaded.model.get_decoder().norm
    own = norm.forward
    norm.forward = lambda states: change(own(states))
    return loaded


def test_a_graph_that_misses_perturbed_weights_is_found_out_where_rounding_hides_it(
    new_tape: NewGraph, as_on_a_gpu: Switch, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In bfloat16 a probe at eps moves states by less than a tolerance lets by."""
    as_on_a_gpu()
    monkeypatch.setattr("fedzo.zo.tensor_group._SMALL", 100)
    made = tiny_loaded()
    loaded = replace(made, model=made.model.bfloat16())
    ours, _ = capture(loaded, None, longest=16, new_graph=new_tape)
    afresh = PerturbedWeights.afresh

    def at_a_scale_only(probe: PerturbedWeights, scale: float | None = None) -> AbstractContextManager[None]:
        return afresh(probe, scale) if scale else nullcontext()

    monkeypatch.setattr(PerturbedWeights, "afresh", at_a_scale_only)
    with FullSpace(loaded.model).probe(1e-3, key=3), caplog.at_level(logging.WARNING):
        replayed(ours)

    assert "cannot run as CUDA graphs" in caplog.text


def read(states: torch.Tensor) -> torch.Tensor:
    return states * float(states.sum() > -1e9)


def counted() -> Callable[[torch.Tensor], torch.Tensor]:
    calls = []

    def change(states: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return states * len(calls)

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [(read, "RuntimeError: operation not permitted"), (counted(), "RuntimeError: a replay is off by")],
    ids=["reads the device", "counts its calls"],
)
def test_a_forward_that_cannot_be_captured_is_eager_after_one_warning(
    change: Callable[[torch.Tensor], torch.Tensor],
    reason: str,
    new_tape: NewGraph,
    caplog: pytest.LogCaptureFixture,
) -> None:
    ours, _ = capture(broken(tiny_loaded(), change), None, longest=16, new_graph=new_tape)

    with caplog.at_level(logging.WARNING):
        found = [replayed(ours), replayed(ours)]

    assert all(np.isfinite(each).all() for each in found)
    assert len(caplog.messages) == 1
    assert f"LlamaModel cannot run as CUDA graphs, its kernels are started one by one: {reason}" in caplog.messages[0]
    assert not graphs_of(ours)


def test_perturbed_weights_without_kernels_are_not_captured(
    new_tape: NewGraph, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = tiny_loaded()
    ours, _ = capture(loaded, None, longest=16, new_graph=new_tape)

    with caplog.at_level(logging.WARNING), FullSpace(loaded.model).probe(0.2, key=3):
        np.testing.assert_allclose(replayed(ours), losses(loaded, SHORT), rtol=0, atol=1e-5)

    assert "NotImplementedError: perturbed weights" in caplog.text


def test_a_model_whose_numbers_are_not_finite_is_no_broken_graph(
    new_tape: NewGraph, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = tiny_loaded()
    nn.init.constant_(loaded.model.get_decoder().norm.weight, torch.nan)
    ours, _ = capture(loaded, None, longest=16, new_graph=new_tape)

    with caplog.at_level(logging.WARNING):
        assert np.isnan(replayed(ours)).all()

    assert not caplog.messages
    assert graphs_of(ours)


def test_a_forward_with_gradients_is_eager(new_tape: NewGraph) -> None:
    ours, _ = capture(tiny_loaded(), None, longest=16, new_graph=new_tape)
    weight = ours.model.get_decoder().norm.weight.requires_grad_(True)

    planning = Planning(MANY, arithmetic=DIFFERENTIABLE)
    example_losses(ours, SHORT, planning, loss=Loss.candidates).mean().backward()

    assert weight.grad is not None
    assert not graphs_of(ours)


def test_a_model_whose_head_cannot_be_applied_apart_has_no_graphs(
    new_tape: NewGraph, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = replace(tiny_loaded(), direct_head=False)

    assert capture(loaded, None, longest=16, new_graph=new_tape) == (loaded, None)
    assert "its LM head cannot be applied apart" in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("make", [all_weights, upper_weights, some_weights, adapter])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_graphs_give_the_eager_losses(
    make: Callable[[LoadedModel], Space], dtype: torch.dtype, groups: None, caplog: pytest.LogCaptureFixture
) -> None:
    made = tiny_loaded()
    loaded = replace(made, model=made.model.to(dtype).cuda(), device=torch.device("cuda", 0))
    space = make(loaded)
    ours, lower = capture(loaded, lower_layers_of(loaded, space), longest=16)

    with caplog.at_level(logging.WARNING):
        for number in range(6):
            step = lower.of_step() if lower else None
            for scale in (0.2, -0.2):
                with space.probe(scale, key=number):
                    for rows in (SHORT, LONG):
                        want = losses(loaded, rows)
                        atol = 1e-4 if dtype == torch.float32 else 0.1
                        np.testing.assert_allclose(losses(ours, rows, lower=step), want, rtol=0, atol=atol)
            space.step(0.2, key=9 + number)

    assert not caplog.messages
    assert graphs_of(ours)


class Allocator:
    """CUDA's allocator and its graphs as far as they count who takes memory from a pool.

    Args:
        end_name: torch's name for what stops taking memory.
        ends: Whether the end of a capture stops taking memory for it where it fails, too.
        resets: Whether a graph whose capture failed is no user of its pool any more when it is reset.
    """

    def __init__(self, end_name: str, *, ends: bool, resets: bool) -> None:
        self.end_name, self.ends, self.resets = end_name, ends, resets
        self.users: dict[int, int] = {}
        self.users_at_end: list[int] = []
        self.taking: set[int] = set()
        self.workspace: int | None = 0  # the pool that it lies in, 0 for that of eager forwards

    def end(self, device: int, pool: int) -> None:
        if pool not in self.taking:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.taking.remove(pool)

    def release(self, device: int, pool: int) -> None:
        self.users[pool] -= 1
        assert self.users[pool] >= 0, "in a destructor this ends the process"

    def drop_workspace(self) -> None:
        self.workspace = None

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, stand_in in {
            "MemPool": partial(AllocatedPool, self),
            "CUDAGraph": partial(AllocatedGraph, self),
            "graph": AllocatedCapture,
            "Stream": lambda device: None,
            "current_stream": lambda device: None,
            "stream": lambda stream: nullcontext(),
            "device": lambda device: nullcontext(),
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.delattr(torch._C, "_cuda_endAllocateToPool", raising=False)
        monkeypatch.setattr(torch._C, self.end_name, self.end, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", self.release, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", self.drop_workspace, raising=False)


class AllocatedPool:
    """As ``torch.cuda.MemPool``."""

    def __init__(self, allocator: Allocator) -> None:
        self._allocator = allocator
        self.id = len(allocator.users) + 1
        allocator.users[self.id] = 1

    def use_count(self) -> int:
        return self._allocator.users[self.id]

    def __del__(self) -> None:
        self._allocator.users_at_end.append(self.use_count())
        self._allocator.release(0, self.id)


class AllocatedGraph:
    """As ``torch.cuda.CUDAGraph``."""

    def __init__(self, allocator: Allocator) -> None:
        self.allocator = allocator
        self.pool: int | None = None
        self.ended = False

    def reset(self) -> None:
        if self.pool is not None and (self.ended or self.allocator.resets):
            self.allocator.release(0, self.pool)
            self.pool = None

    __del__ = reset


class AllocatedCapture:
    """As ``torch.cuda.graph``: a ``RuntimeError`` has broken off what is recorded."""

    def __init__(self, graph: AllocatedGraph, *, pool: int, stream: Any, capture_error_mode: str) -> None:
        self._graph = graph
        self._pool = pool

    def __enter__(self) -> None:
        allocator, self._graph.pool = self._graph.allocator, self._pool
        allocator.users[self._pool] += 1
        allocator.taking.add(self._pool)
        assert allocator.workspace is None, "kernels would have the address of a workspace that is not their pool's"
        allocator.workspace = self._pool  # a product takes one, and torch keeps it

    def __exit__(self, kind: type[BaseException] | None, *args: object) -> None:
        allocator, fails = self._graph.allocator, kind is not None and issubclass(kind, RuntimeError)
        if not fails or allocator.ends:
            allocator.end(0, self._pool)
        if fails:
            raise RuntimeError("operation failed due to a previous error during capture")
        self._graph.ended = True


@pytest.mark.parametrize("error", [RuntimeError, KeyError])
@pytest.mark.parametrize(
    ("end_name", "ends", "resets"),
    [
        ("_cuda_endAllocateCurrentStreamToPool", False, False),
        ("_cuda_endAllocateToPool", False, False),
        ("_cuda_endAllocateToPool", True, False),
        ("_cuda_endAllocateToPool", True, True),
    ],
    ids=["torch 2.6", "torch 2.8", "torch 2.13", "later"],
)
def test_what_torch_holds_for_a_capture_that_broke_off_is_given_back_once(
    end_name: str, ends: bool, resets: bool, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks() -> torch.Tensor:
        raise error("in the work")

    allocator = Allocator(end_name, ends=ends, resets=resets)
    allocator.patch(monkeypatch)
    graphs = CudaGraphs(torch.device("cuda", 0))
    first, broken = graphs(), graphs()
    first.capture(lambda: torch.zeros(1))
    assert (allocator.users, allocator.workspace) == ({1: 2}, None)

    with pytest.raises(error):
        broken.capture(breaks)

    assert (allocator.users, allocator.taking) == ({1: 2}, set())  # the pool itself and the first graph
    assert allocator.workspace is None
    del broken
    gc.collect()
    assert allocator.users == {1: 2}
    second = graphs()
    second.capture(lambda: torch.zeros(1))
    assert allocator.users == {1: 2, 2: 2}
    del first
    gc.collect()
    assert allocator.users == {1: 0, 2: 2}
    del second
    gc.collect()
    assert allocator.users == {1: 0, 2: 0}, "what makes graphs keeps a pool without graphs"
    assert allocator.users_at_end == [1, 1], "a pool ended before its graphs, which older versions of torch do not bear"


@pytest.mark.gpu
def test_the_memory_of_graphs_goes_with_the_last_of_them() -> None:
    graphs, given = CudaGraphs(torch.device("cuda")), torch.ones(4, 4, device="cuda")
    torch.mm(given, given)  # makes what cuBLAS has but once
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()

    graph = graphs()
    graph.capture(lambda: torch.mm(given, given) * torch.empty(1 << 28, dtype=torch.uint8, device="cuda")[:4])
    assert torch.cuda.memory_reserved() >= before + (1 << 28)
    del graph
    gc.collect()
    torch.cuda.empty_cache()

    assert torch.cuda.memory_reserved() <= before
    assert graphs.device.type == "cuda"  # it lives on


@pytest.mark.gpu
def test_a_capture_that_breaks_off_is_no_harm_to_the_next() -> None:
    graphs, given = CudaGraphs(torch.device("cuda")), torch.ones(4, device="cuda")
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    first, broken = graphs(), graphs()

    def large() -> torch.Tensor:
        return given * torch.empty(1 << 28, dtype=torch.uint8, device="cuda")[:4]

    first.capture(large)
    with pytest.raises(RuntimeError, match="captur"):  # not memory that ran out
        broken.capture(lambda: given * large().sum().item())
    del first, broken
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before
    graph = graphs()

    output = graph.capture(lambda: 2 * given)
    graph.replay()

    assert output.tolist() == [2.0] * 4
    free = torch.cuda.mem_get_info()[0]
    for share in (0.6, 0.8):  # the second fits only where torch gives back what it keeps, which a recording prevents
        torch.empty(int(share * free), dtype=torch.uint8, device="cuda")
