"""The decoder as CUDA graphs: its kernels are recorded once a shape, and started again together, without Python.

A model's weights are read where they lie, so a graph sees what a space writes in place. Where a probe makes perturbed
weights on their way into the forward (``fedzo.zo.perturb``), the kernels that make them are in the graph, too, and read
key and scale from the device's memory. The kernels are those of the eager forward, so unlike with ``torch.compile``
there is nothing to wait for.
"""

from __future__ import annotations

import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch._C import DisableTorchFunctionSubclass

from fedzo.models.attention import whole_texts
from fedzo.models.checks import mismatch
from fedzo.models.kept_rows import Output
from fedzo.models.loaded import LoadedModel
from fedzo.models.lower_layers import LowerLayers
from fedzo.models.memory import GRAPH_BYTES, MAX_GRAPHS
from fedzo.models.plan import bucketed_width
from fedzo.sketch.linear import scratch_in_use
from fedzo.system import is_out_of_memory, warn_once
from fedzo.zo.perturb import PerturbedWeights, probe_of

log = logging.getLogger(__name__)

_NUM_COMPARED = 3  # runs of a graph, which count as eager ones: with the forward before it, they are two whole probes
NUM_EAGER = 1 + _NUM_COMPARED
"""Forwards of a shape that run eagerly, all or beside its graph, before its graph runs alone."""
_LARGE = 0.05  # a scale at which no perturbed weight is missed: that of a run moves states by less than rounding does

Work = Callable[..., torch.Tensor]


class Graph(Protocol):
    """Records kernels: ``CudaGraph``, or a test's stand-in."""

    def capture(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Record the kernels that ``work`` starts; they do not run. What it returns is where a replay leaves it."""
        ...

    def replay(self) -> None:
        """Run the kernels again, on the memory that they were recorded with."""
        ...


class CudaGraphs:
    """Makes CUDA graphs that share memory for what lies between their kernels.

    Args:
        device: Where.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = cast(Any, torch.cuda).Stream(device)
        self._live: weakref.WeakSet[CudaGraph] = weakref.WeakSet()

    def __call__(self) -> CudaGraph:
        pool: Any = next((each.pool for each in self._live), None)  # which graphs alone hold, so it goes with the last
        if pool is None:  # what is left of a pool without graphs, such as a library's workspace, hinders new ones
            with torch.cuda.device(self.device):
                pool = torch.cuda.MemPool()
        graph = CudaGraph(self, pool)
        self._live.add(graph)
        return graph

    def forget(self) -> None:
        """The next graph has a pool of its own."""
        self._live.clear()


class CudaGraph:
    """One of them, with nothing in it yet; ``pool`` is a ``torch.cuda.MemPool``."""

    def __init__(self, graphs: CudaGraphs, pool: Any) -> None:
        self._graphs = graphs
        self.pool = pool
        self._graph = torch.cuda.CUDAGraph()

    def __del__(self) -> None:
        self._graph.reset()  # before the pool, which some versions of torch do not let go while a graph has it

    def capture(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        at, num_users = self._graphs, self.pool.use_count()
        # cuBLAS's workspace is made in the pool, and torch keeps it for the stream: the pool would not go with its last
        # graph, or the workspace would go with any; so none is kept, as by torch's own graphs (cudagraph_trees)
        drop_workspaces = cast(Any, torch._C)._cuda_clearCublasWorkspaces
        drop_workspaces()
        # the outer stream comes back even where the end of a capture raises; relaxed: a kernel may be loaded meanwhile
        try:
            with (
                torch.cuda.device(at.device),
                torch.cuda.stream(torch.cuda.current_stream(at.device)),
                torch.cuda.graph(self._graph, pool=self.pool.id, stream=at.stream, capture_error_mode="relaxed"),
            ):
                return work()
        except Exception:
            self._release(num_users)
            raise
        finally:
            drop_workspaces()

    def _release(self, num_users: int) -> None:
        """After a capture that broke off: no memory is taken for it any more, and the pool has its users of before."""
        index = self._graphs.device.index
        index = torch.cuda.current_device() if index is None else index
        self._graphs.forget()
        of_torch: Any = torch._C  # before version 2.8 it has the other name
        end = getattr(of_torch, "_cuda_endAllocateToPool", None) or of_torch._cuda_endAllocateCurrentStreamToPool
        with suppress(RuntimeError):  # in some versions of torch its end has done so
            end(index, self.pool.id)
        self._graph.reset()  # in some it is no user from here on
        if self.pool.use_count() > num_users:
            of_torch._cuda_releasePool(index, self.pool.id)

    def replay(self) -> None:
        with torch.cuda.device(self._graphs.device):
            self._graph.replay()


@dataclass(slots=True)
class _Captured:
    """A graph, and where its inputs and what it makes of them lie."""

    graph: Graph
    inputs: list[torch.Tensor]
    output: torch.Tensor
    kept: object
    """What its kernels read and write beside the model."""
    num_compared: int = 0

    @property
    def nbytes(self) -> int:
        """Of what it has for itself: what lies between kernels is shared."""
        return sum(each.nbytes for each in (*self.inputs, self.output))

    def run(self, inputs: Sequence[torch.Tensor], probe: PerturbedWeights | None) -> torch.Tensor:
        for held, given in zip(self.inputs, inputs, strict=True):
            held.copy_(given)
        if probe:
            probe.write_draw()
        self.graph.replay()
        return self.output


class Captures:
    """Forwards as graphs, one for each shape of their inputs from its second use on.

    A graph's first runs are compared with the eager forward, whose result they give; one of perturbed weights also at a
    scale at which none can be missed. Where a forward cannot be captured, comes out otherwise, or has no memory beside
    the graphs, these go and all are eager from then on, after one warning. A forward with gradients always is.

    Memory: what lies between kernels, once for all graphs; of each its inputs and its output, of which at most
    ``GRAPH_BYTES`` are kept, those used last; and an eager forward beside them.

    Args:
        module: What the forwards compute with. Its modules must stay as they are; its values may change in place.
        new_graph: Makes an empty graph.

    Attributes:
        gave_up: Whether all forwards are eager.
    """

    def __init__(self, module: torch.nn.Module, new_graph: Callable[[], Graph]) -> None:
        self.gave_up = False
        self._name = type(module).__name__
        self._tensors = [*module.parameters(), *module.buffers()]
        self._new_graph = new_graph
        self._addresses: list[int] = []
        self._graphs: OrderedDict[Hashable, _Captured] = OrderedDict()
        self._seen: set[Hashable] = set()

    def run(self, name: str, work: Work, *inputs: torch.Tensor) -> torch.Tensor:
        """``work(*inputs)``, which the next call overwrites; ``name`` is that of the work, whose settings are fixed."""
        if not (self.gave_up or torch.is_grad_enabled()):
            try:
                if (captured := self._captured(name, work, inputs)) is not None:
                    return captured
            except Exception as error:  # a model may do anything that cannot be recorded, and CUDA raises what it likes
                self._give_up(error)
        try:
            return work(*inputs)
        except (RuntimeError, MemoryError) as error:
            if not (self._graphs and is_out_of_memory(error)):
                raise
            self._give_up(error)
        return work(*inputs)  # in the memory that they had

    def _captured(self, name: str, work: Work, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor | None:
        """From a graph; None where a shape is seen first."""
        with DisableTorchFunctionSubclass():
            addresses = [tensor.data_ptr() for tensor in self._tensors]
        if addresses != self._addresses:
            self._graphs.clear()
            self._seen.clear()  # a shape begins anew: else its first forwards would not be whole probes
            self._addresses = addresses
        probe = probe_of(self._tensors)
        shapes = tuple((each.shape, each.dtype) for each in inputs)
        key = name, shapes, id(probe.groups) if probe else None, torch.get_float32_matmul_precision()
        if key not in self._seen:
            self._seen.add(key)
            return None
        if key not in self._graphs:
            self._graphs[key] = captured = self._capture(work, inputs, probe)
            if probe:
                with probe.afresh(_LARGE):
                    _compare(captured.run(inputs, probe), work(*inputs))
            while len(self._graphs) > MAX_GRAPHS or (len(self._graphs) > 1 and self._num_bytes() > GRAPH_BYTES):
                self._seen.discard(self._graphs.popitem(last=False)[0])
        captured = self._graphs[key]
        self._graphs.move_to_end(key)
        output = captured.run(inputs, probe)
        if captured.num_compared < _NUM_COMPARED:
            captured.num_compared += 1
            eager = work(*inputs)
            _compare(output, eager)
            return eager  # of one probe both sides should be computed alike
        return output

    def _capture(self, work: Work, inputs: tuple[torch.Tensor, ...], probe: PerturbedWeights | None) -> _Captured:
        with torch.inference_mode(False):
            held = [torch.zeros_like(each) for each in inputs]  # a graph that depended on its inputs' values would show
        graph, run = self._new_graph(), partial(work, *held)
        if probe is None:
            run()  # compiles kernels and makes tables, which cannot be recorded
            with whole_texts():
                output = graph.capture(run)
        elif probe.kernels is None:
            raise NotImplementedError("perturbed weights are not made by kernels that can be recorded")
        else:
            probe.write_draw()
            with probe.kernels.reading_later():
                with probe.afresh():
                    run()
                with probe.afresh(), whole_texts():  # afresh: or what the run before has made would be in the graph
                    output = graph.capture(run)
        return _Captured(graph, held, output, kept=(probe and probe.groups, scratch_in_use()))

    def _num_bytes(self) -> int:
        return sum(each.nbytes for each in self._graphs.values())

    def _give_up(self, error: Exception) -> None:
        self.gave_up = True
        self._graphs.clear()
        cause = error.__context__ or error  # where a capture fails, its end fails, too
        what = f"{type(cause).__name__}: {' '.join(str(cause).split())[:400]}"
        # once, though a run that chooses its dtype captures the same model several times
        warn_once(log, f"{self._name} cannot run as CUDA graphs, its kernels are started one by one: {what}")


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
        return bucketed_width(length, longest=self._longest)

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
        new_graph: Makes an empty graph; by default a ``CudaGraphs``.
    """
    if not loaded.direct_head:
        warn_once(log, f"{loaded.source}: its LM head cannot be applied apart, so there are no CUDA graphs")
        return loaded, lower
    new_graph = new_graph or CudaGraphs(loaded.device)
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
    if problem := mismatch(ours, own, equal_nan=True):
        raise RuntimeError(f"a replay is {problem}")
