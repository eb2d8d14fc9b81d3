"""The decoder as CUDA graphs: its kernels are recorded once a shape, and started again together, without Python.

A model's weights are read where they lie, so a graph sees what a space writes in place. Where a probe makes perturbed
weights on their way into the forward (``fedzo.zo.perturb``), the kernels that make them are in the graph, too, and read
key and scale from the device's memory. The kernels are those of the eager forward, so unlike with ``torch.compile``
there is nothing to wait for. Attention's are an exception: a model of transformers may not look at its positions while
it is recorded, and makes an explicit mask.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch._C import DisableTorchFunctionSubclass

from fedzo.models.head import TOLERANCE
from fedzo.models.loaded import LoadedModel
from fedzo.models.lower_layers import LowerLayers, Output
from fedzo.models.plan import bucket
from fedzo.zo.perturb import PerturbedWeights, probe_of

log = logging.getLogger(__name__)

_MOST_GRAPHS = 64
_NUM_COMPARED = 2  # replays of a graph: the two sides of its first probe

Work = Callable[..., torch.Tensor]


class Graph(Protocol):
    """Records kernels: ``CudaGraph``, or a test's stand-in."""

    def capture(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Record the kernels that ``work`` starts; they do not run. What it returns is where a replay leaves it."""
        ...

    def replay(self) -> None:
        """Run the kernels again, on the memory that they were recorded with."""
        ...


class CudaGraph:
    """A CUDA graph.

    Args:
        pool: Memory that graphs share for what lies between their kernels (``torch.cuda.graph_pool_handle``).
    """

    def __init__(self, pool: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._pool = pool

    def capture(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        with torch.cuda.graph(self._graph, pool=self._pool):
            return work()

    def replay(self) -> None:
        self._graph.replay()


@dataclass(slots=True)
class _Captured:
    """A graph, and where its inputs and what it makes of them lie."""

    graph: Graph
    inputs: list[torch.Tensor]
    output: torch.Tensor
    kept: object
    """What its kernels read beside the model."""
    num_compared: int = 0


class Captures:
    """Forwards as graphs, one for each shape of their inputs.

    The first replays of a graph are compared with the eager forward. Where a forward cannot be captured, or comes out
    otherwise, all are eager from then on, after one warning. A forward with gradients always is.

    Memory: what lies between kernels, once for all graphs and as much as the largest of them needs; of each its output.

    Args:
        module: What the forwards compute with. Its modules must stay as they are; its values may change in place.
        new_graph: Makes an empty graph.
    """

    def __init__(self, module: torch.nn.Module, new_graph: Callable[[], Graph]) -> None:
        self._name = type(module).__name__
        self._tensors = [*module.parameters(), *module.buffers()]
        self._new_graph = new_graph
        self._graphs: OrderedDict[Hashable, _Captured] = OrderedDict()
        self._gives_up = False

    def run(self, name: str, work: Work, *inputs: torch.Tensor) -> torch.Tensor:
        """``work(*inputs)``, which the next call overwrites; ``name`` is that of the work, whose settings are fixed."""
        if self._gives_up or torch.is_grad_enabled():
            return work(*inputs)
        try:
            return self._replayed(name, work, inputs)
        except Exception as error:  # a model may do anything that cannot be recorded, and CUDA raises what it likes
            self._gives_up = True
            self._graphs.clear()
            log.warning(
                "%s cannot run as CUDA graphs, its kernels are started one by one: %s: %s",
                self._name,
                type(error).__name__,
                " ".join(str(error).split())[:400],
            )
            return work(*inputs)

    def _replayed(self, name: str, work: Work, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        probe = probe_of(self._tensors)
        with DisableTorchFunctionSubclass():
            addresses = tuple(tensor.data_ptr() for tensor in self._tensors)
        shapes = tuple((each.shape, each.dtype) for each in inputs)
        key = (name, shapes, id(probe.groups) if probe else None, torch.get_float32_matmul_precision(), addresses)
        if key not in self._graphs:
            self._graphs[key] = self._capture(work, inputs, probe)
            if len(self._graphs) > _MOST_GRAPHS:
                self._graphs.popitem(last=False)
        captured = self._graphs[key]
        self._graphs.move_to_end(key)
        for held, given in zip(captured.inputs, inputs, strict=True):
            held.copy_(given)
        if probe:
            probe.write_draw()
        captured.graph.replay()
        if captured.num_compared < _NUM_COMPARED:
            captured.num_compared += 1
            _compare(captured.output, work(*inputs))
        return captured.output

    def _capture(self, work: Work, inputs: tuple[torch.Tensor, ...], probe: PerturbedWeights | None) -> _Captured:
        with torch.inference_mode(False):
            held = [torch.zeros_like(each) for each in inputs]  # a graph that depended on its inputs' values would show
        later: Callable[[], AbstractContextManager[None]] = nullcontext
        if probe:
            if probe.kernels is None:
                raise NotImplementedError("perturbed weights are not made by kernels that can be recorded")
            probe.write_draw()
            later = probe.kernels.reading_later
        with later():
            work(*held)  # compiles kernels and makes tables, which cannot be recorded
            graph = self._new_graph()
            output = graph.capture(partial(work, *held))
        return _Captured(graph, held, output, kept=probe.groups if probe else None)


class Hidden(NamedTuple):
    """What a decoder gives, as far as it is read."""

    last_hidden_state: torch.Tensor


class CapturedDecoder:
    """A model's decoder at few shapes, each of them a graph; a ``BucketedDecoder``.

    Where a step runs the lower blocks once (``fedzo.models.lower_layers``), they are graphs of their own, and so is the
    rest of the decoder.

    Attributes:
        captures: The graphs.
        anew: Makes one without graphs, for the same model while it runs through other modules.

    Args:
        loaded: The model, with all that is trained in it.
        longest: Tokens of the longest text.
        lower: The blocks that a step runs once.
        new_graph: Makes an empty graph.
    """

    def __init__(
        self, loaded: LoadedModel, *, longest: int, lower: LowerLayers | None, new_graph: Callable[[], Graph]
    ) -> None:
        self.anew = partial(CapturedDecoder, loaded, longest=longest, lower=lower, new_graph=new_graph)
        self._decoder = cast(Any, loaded.model).get_decoder()
        self._longest = longest
        self._lower = lower
        self.captures = Captures(self._decoder, new_graph)

    def width(self, length: int) -> int:
        return max(length, min(bucket(length), self._longest))

    def __call__(self, *, input_ids: torch.Tensor) -> Hidden:
        if self._lower is None or not self._lower.given:
            return Hidden(self.captures.run("whole", self._states, input_ids))
        lower, output = self._lower, self._lower.given[-1]

        def upper(ids: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
            with lower.skipped(output._replace(states=states)):
                return self._states(ids)

        return Hidden(self.captures.run("upper", upper, input_ids, output.states))

    def _states(self, ids: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self._decoder(input_ids=ids).last_hidden_state)


def can_capture(device: torch.device) -> bool:
    """Whether there are graphs on a device."""
    return device.type == "cuda"


def capture(
    loaded: LoadedModel, lower: LowerLayers | None, *, longest: int, new_graph: Callable[[], Graph] | None = None
) -> tuple[LoadedModel, LowerLayers | None]:
    """The same model and lower blocks, whose forwards for losses and scores are graphs.

    Args:
        loaded: The model on a CUDA device, with all that is trained in it.
        lower: The blocks that a step runs once.
        longest: Tokens of the longest text.
        new_graph: Makes an empty graph; by default a ``CudaGraph``.
    """
    if not loaded.direct_head:
        log.warning("%s: its LM head cannot be applied apart, so there are no CUDA graphs", loaded.source)
        return loaded, lower
    new_graph = new_graph or partial(CudaGraph, torch.cuda.graph_pool_handle())
    decoder = CapturedDecoder(loaded, longest=longest, lower=lower, new_graph=new_graph)
    loaded = replace(loaded, decoder=decoder)
    if lower is None:
        return loaded, None
    run = lower.run
    with torch.inference_mode():
        form = run(torch.zeros(1, 1, dtype=torch.int64, device=loaded.device))

    def evaluate(ids: torch.Tensor) -> Output:
        states = decoder.captures.run("lower", lambda ids: run(ids).states, ids)
        return form._replace(states=states.clone())

    return loaded, replace(lower, evaluate=evaluate)


def _compare(ours: torch.Tensor, own: torch.Tensor) -> None:
    limit = TOLERANCE.get(own.dtype, 4e-2) * float(own.nan_to_num(0, 0, 0).abs().max())
    if not torch.allclose(ours, own, rtol=0, atol=limit, equal_nan=True):
        raise RuntimeError(f"a replay is off by {float((ours - own).abs().max()):g}, more than {limit:g}")
