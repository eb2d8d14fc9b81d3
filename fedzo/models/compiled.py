"""The decoder through ``torch.compile``: one graph for each of the few shapes up to which batches are padded.

Weights are inputs of the graphs and are read where they lie, so what a space writes in place is seen by the next
forward. On CUDA each graph is replayed as a CUDA graph, from the same memory every time: callers copy what they keep.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from fedzo.errors import ConfigError
from fedzo.models.checks import mismatch, some_ids
from fedzo.models.plan import bucketed_width

_MAX_GRAPHS = 1 << 10  # torch gives up after 8 by default; lengths and rows have a few dozen buckets together


@dataclass(frozen=True, slots=True)
class CompiledDecoder:
    """A compiled decoder and the lengths that it is called with.

    Attributes:
        run: Called like the decoder.
        longest: The last bucket of lengths, in tokens.
    """

    run: Any
    longest: int

    def width(self, length: int) -> int:
        return bucketed_width(length, longest=self.longest)

    def __call__(self, *, input_ids: torch.Tensor) -> Any:
        """The decoder's output for ids int64 [B, T]; a new shape is compiled first, which takes seconds to minutes."""
        limits = {"recompile_limit": _MAX_GRAPHS, "accumulated_recompile_limit": _MAX_GRAPHS}
        with cast(Any, torch)._dynamo.config.patch(**limits):
            return self.run(input_ids=input_ids)


def compile_decoder(model: nn.Module, *, longest: int) -> CompiledDecoder:
    """Compile a model's decoder and compare one forward of it with the eager one.

    The whole decoder must be one graph (``fullgraph``): what cannot be traced is refused, never run half compiled.

    Args:
        model: A causal language model.
        longest: Tokens of the longest text.

    Raises:
        ConfigError: There is no compiler on this machine, the decoder cannot be traced, it computes something else, or
            torch is set to copy weights into graphs.
    """
    if cast(Any, torch)._inductor.config.freezing:
        raise _refused(
            model, "TORCHINDUCTOR_FREEZING=1 copies the weights into the graphs, so training does not change them"
        )
    decoder = cast(Any, model).get_decoder()
    device = next(model.parameters()).device
    mode = "reduce-overhead" if device.type == "cuda" else None  # CUDA graphs
    compiled = CompiledDecoder(torch.compile(decoder, fullgraph=True, dynamic=False, mode=mode), longest)
    ids = some_ids(model, 2, 8)  # no inference tensor, which has graphs of its own
    try:
        with torch.inference_mode():
            own, ours = (run(input_ids=ids).last_hidden_state for run in (decoder, compiled))
    except RuntimeError as error:  # what torch's compilers raise
        raise _refused(model, f"torch.compile says: {' '.join(str(error).split())[:400]}") from error
    if problem := mismatch(ours, own):
        raise _refused(model, f"its forward is {problem}")
    return compiled


def _refused(model: nn.Module, reason: str) -> ConfigError:
    return ConfigError(
        f"model.compile must be false for a {type(model).__name__} on this machine: {reason}. "
        "Write model.compile=false."
    )
