"""Estimates made before a run starts: memory of a step, tokens that fit in one forward, seconds.

The memory of a forward-only step, in bytes (w = bytes of a weight):

    weights      every parameter once, and the buffers that belong to the model's state, as a sketch's codes do
    scratch      of a sketch: one decoded layer, the largest; in float32 where a backward pass is taken, on a GPU beside
                 the forward pass's. Of weights in four bits: the largest, unpacked
    activations  tokens * w * (6 * hidden + k * intermediate), one layer's at a time: there is no backward pass. k is
                 the tensors of an activation that there are at a time, and one more with a gate: mostly 2 + 1
    attention    2 * heads * 512 * tokens * 4, only where attention writes its scores down: "eager" (Gemma 2), or
                 bfloat16 on a GPU before Ampere
    states       tokens * 4 * (4 * inner * state) of a state space layer; where it pairs the tokens of a chunk (Mamba 2)
                 tokens * 4 * (8 * heads * (chunk + state)) * chunk / 32, since every text is padded to whole chunks
    head         head_rows * vocabulary * 8, logits and their logarithms in float32; without a backward pass they are
                 made in parts of at most 256 MiB
    cache        keys and values of shared prompts: counted in ``tokens_per_batch`` when forwards are planned
    trained      what the space says (``Space.step_bytes``): masters, directions, scratch, marks; and the head where a
                 probe makes all of it
    gradient     where a backward pass is taken: tokens * w * (10 * hidden + k * intermediate) and attention of all
                 layers at a time, k being the tensors that an activation keeps, and two more with a gate: mostly 2 + 2;
                 12 bytes for the head's 8; all weights once more where dense ones are trained; and 8 float32 vectors
                 of the trained values
    graphs       of CUDA graphs: the activations once more, in their pool, and what each of them keeps
    moments      space_size * 4 * (num_moments + 10) in the machine's memory, if the server optimizer has any: these
                 numbers, and what a round's update holds beside them for a while (3 vectors of n, 10 with a drift)

It is meant to be an upper estimate. Of the steps and windows that ``tests/unit/models/test_memory.py`` measures with
dense models, it is a tenth above the peak at most. Sequences are taken to be 32 tokens at least and 512 at most.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from fedzo.errors import ConfigError
from fedzo.masks.eligible import eligible_parameters
from fedzo.models.available import attends_plainly
from fedzo.models.blocks import find_blocks
from fedzo.models.checks import text_config
from fedzo.models.head import hidden_at
from fedzo.models.loaded import LoadedModel
from fedzo.sketch import sketched_layers, tables_of

TOKENS_PER_BATCH, TOKENS_ON_GPU = 1 << 12, 1 << 14
"""What ``model.tokens_per_batch=0`` stands for; on a GPU, where its memory holds so many."""
MAX_GRAPHS, GRAPH_BYTES = 64, 1 << 30
"""CUDA graphs that are kept, and what their inputs and outputs may take together."""
_ACTIVATIONS = {"ReLU": (2, 1), "ReLUSquaredActivation": (3, 2), "BloomGelu": (5, 2)}
_ACTIVATIONS |= {"NewGELUActivation": (4, 5), "FastGELUActivation": (5, 8)}
"""Tensors of an activation, input and output included: at a time, and kept for a backward pass. Of others (2, 2)."""
_LOGITS_BYTES = 256 << 20
_UPDATE_VECTORS = 10
_GRADIENT_VECTORS = 8  # start, theta, gradient, change, the local optimizer's two moments and scratch
_SEQUENCE_TOKENS = 512
_SHORT_TOKENS = 32
_TIMED_ROW = 32  # tokens
_SHARE = 0.9  # of what is available: allocators keep some


def num_weights(model: nn.Module) -> int:
    """Weights of the model as if none were sketched or packed, tied ones once."""
    tables = {id(each) for each in tables_of(model).values()}
    decoded = sum(layer.in_features * layer.out_features for layer in sketched_layers(model).values())
    return decoded + sum(_num_unpacked(each) for each in model.parameters() if id(each) not in tables)


def weights_bytes(model: nn.Module) -> int:
    """Bytes of all stored tensors, tied ones once, codes as well as tables; works on the meta device, too.

    Of weights in four bits with their scales, which are neither parameters nor buffers.
    """
    stored = (  # codes, but no positions; `state_dict` would bring what bitsandbytes has packed into another order
        buffer
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    )
    buffers = {id(buffer): buffer for buffer in stored}.values()
    scales = [parameter.quant_state.absmax for parameter in model.parameters() if hasattr(parameter, "quant_state")]
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *buffers, *scales))


def scratch_bytes(model: nn.Module, *, backward: bool = False) -> int:
    """Bytes of the largest layer of a sketch, decoded, or of four bits a weight, unpacked; 0 for a dense model."""
    first = next(model.parameters())
    width = decoded_width = first.element_size()
    if backward:  # which on a GPU runs in a thread of its own, with a scratch of its own
        decoded_width = 4 + width * (first.device.type == "cuda")
    decoded = (layer.in_features * layer.out_features for layer in sketched_layers(model).values())
    unpacked = (_num_unpacked(each) for each in model.parameters() if hasattr(each, "quant_state"))
    return max(decoded_width * max(decoded, default=0), width * max(unpacked, default=0))


def state_bytes(model: nn.Module) -> int:
    """Bytes of one token's states between two blocks."""
    return next(model.parameters()).element_size() * _hidden(text_config(model))


def server_optimizer_bytes(space_size: int, num_moments: int) -> int:
    """Bytes that a server optimizer takes, in the machine's memory whatever the model's device."""
    return 4 * space_size * (num_moments + _UPDATE_VECTORS) if num_moments else 0


def gradient_bytes(model: nn.Module, space_size: int, *, trains_base_weights: bool) -> int:
    """Bytes that a step by backpropagation takes for gradients and the local optimizer."""
    return 4 * _GRADIENT_VECTORS * space_size + (weights_bytes(model) if trains_base_weights else 0)


class StepMemory(NamedTuple):
    """Most bytes that a step takes, by what takes them; their sum is its peak.

    Attributes:
        weights: The model.
        activations: What a forward makes of its tokens, scratch included; with a backward pass, what is kept for it.
        head: Logits.
        trained: What the trained values take, and what is kept beside them.
        graphs: What CUDA graphs hold.
    """

    weights: int
    activations: int
    head: int
    trained: int
    graphs: int


def step_memory(
    model: nn.Module,
    *,
    batch_tokens: int,
    trained_bytes: int,
    head_rows: int = 0,
    backward: bool = False,
    captured: bool = False,
) -> StepMemory:
    """What a step takes, by the formula above.

    Args:
        model: A causal language model, loaded or on the meta device.
        batch_tokens: Padded tokens of one forward.
        trained_bytes: What a step takes for the trained values (``Space.step_bytes``), and what is kept beside them.
        head_rows: Positions that pay for the whole LM head; 0 where candidates are single tokens.
        backward: Whether activations are kept for a backward pass.
        captured: Whether forwards are CUDA graphs.
    """
    first, config = next(model.parameters()), text_config(model)
    wide = _num_wide(model, backward=backward) * _intermediate(config)
    activations = batch_tokens * first.element_size() * ((10 if backward else 6) * _hidden(config) + wide)
    if getattr(config, "_attn_implementation", None) == "eager" or attends_plainly(first.device, first.dtype):
        activations += 2 * 4 * _SEQUENCE_TOKENS * batch_tokens * _heads(config)
    activations += 4 * batch_tokens * _states(model)
    activations *= int(config.num_hidden_layers) if backward else 1
    activations += scratch_bytes(model, backward=backward)
    logits = 4 * head_rows * int(getattr(config, "vocab_size", 0))
    head = 3 * logits if backward else 2 * min(logits, _LOGITS_BYTES)
    kept = min(MAX_GRAPHS * batch_tokens * (2 * state_bytes(model) + 8), GRAPH_BYTES)  # states in and out, and ids
    return StepMemory(weights_bytes(model), activations, head, trained_bytes, captured * (activations + kept))


def calibration_window_bytes(model: nn.Module, *, num_tokens: int) -> int:
    """Bytes beside the weights while a window of text passes forth and back, without sums of its gradients.

    One tensor's gradient is there at a time, in its dtype and in float32.
    """
    eligible = eligible_parameters(model).values()
    gradient = max(each.numel() * (4 if each.element_size() == 4 else each.element_size() + 4) for each in eligible)
    window = step_memory(model, batch_tokens=num_tokens, trained_bytes=gradient, head_rows=num_tokens, backward=True)
    return sum(window) - window.weights


def calibration_memory_bytes(model: nn.Module, *, num_tokens: int, available_bytes: int) -> float:
    """Bytes that are left for sums of gradients while windows of text pass through the model, forth and back.

    Args:
        model: The loaded model.
        num_tokens: Of a window.
        available_bytes: What can still be taken beside the model; nine tenths of it are used.
    """
    return _SHARE * available_bytes - calibration_window_bytes(model, num_tokens=num_tokens)


def cache_tokens(model: nn.Module) -> float:
    """Memory of one position's keys and values in all layers, in tokens of a gated model's forward (same dtype)."""
    config = text_config(model)
    heads = max(1, _heads(config))
    keys = int(getattr(config, "num_key_value_heads", None) or heads)
    width = int(getattr(config, "head_dim", None) or _hidden(config) // heads)
    return 2 * int(config.num_hidden_layers) * keys * width / _gated_width(config)


def most_tokens(wanted: int, device: torch.device, *, longest: int) -> int:
    """``model.tokens_per_batch``, or what its default 0 stands for: most tokens of a forward, if memory holds them.

    Args:
        wanted: ``model.tokens_per_batch``.
        device: The model's.
        longest: Tokens of the longest sequence, which cannot be split.
    """
    return wanted or max(longest, TOKENS_ON_GPU if device.type == "cuda" else TOKENS_PER_BATCH)


def fit_tokens_per_batch(
    model: nn.Module,
    *,
    wanted: int,
    longest: int,
    available_bytes: int,
    trained_bytes: int,
    head_share: float = 0.0,
    captured: bool = False,
) -> int:
    """The largest ``wanted / 2**k`` tokens a forward whose step fits beside the weights that are there already.

    So does a score's forward of as many tokens, where keys and values that it keeps count (``cache_tokens``).

    Args:
        model: The loaded model.
        wanted: Most of them (``most_tokens``).
        longest: Tokens of the longest sequence, which cannot be split.
        available_bytes: What can still be taken; nine tenths of it are used.
        trained_bytes: What a step takes for the trained values.
        head_share: Share of the tokens that pay for the whole LM head.
        captured: Whether forwards are CUDA graphs.

    Returns:
        Tokens per batch, at least ``min(wanted, longest)``.

    Raises:
        ConfigError: Not even one sequence fits.
    """
    token_bytes = next(model.parameters()).element_size() * _gated_width(text_config(model))

    def needed(tokens: int) -> int:
        head_rows = math.ceil(tokens * head_share)
        step = step_memory(
            model, batch_tokens=tokens, trained_bytes=trained_bytes, head_rows=head_rows, captured=captured
        )
        return sum(step) - step.weights + max(0, tokens * token_bytes - step.activations)

    least, tokens = min(wanted, longest), wanted
    while needed(tokens) > _SHARE * available_bytes:
        if tokens == least:
            raise ConfigError(
                f"a step must fit in memory: one sequence of {longest} tokens needs {needed(tokens) / 2**20:.0f} MiB "
                f"beside the weights, available are {available_bytes / 2**20:.0f} MiB. Lower task.max_length, use a "
                f"smaller model.dtype or a masked trainer{', or write model.cuda_graphs=false' * captured}."
            )
        tokens = max(tokens // 2, least)
    return tokens


class ForwardSeconds(NamedTuple):
    """What forwards take without the LM head.

    Attributes:
        each: Of a forward, however small: on a GPU Python starts every kernel, and the card may wait for it.
        token: Of a token.
    """

    each: float
    token: float


def time_forwards(loaded: LoadedModel, *, num_tokens: int) -> ForwardSeconds:
    """Time forwards of one row and of ``num_tokens``, at least two rows, of 32 tokens each: a warm-up and one timed."""
    rows = max(2, num_tokens // _TIMED_ROW)
    small, large = (_seconds_of(loaded, count) for count in (1, rows))
    each = min(max(0.0, (rows * small - large) / (rows - 1)), large)
    return ForwardSeconds(each, (large - each) / (rows * _TIMED_ROW))


def _seconds_of(loaded: LoadedModel, rows: int) -> float:
    ids = torch.full((rows, _TIMED_ROW), loaded.tokenizer.eos_token_id or 0, device=loaded.device)
    at = torch.zeros(1, dtype=torch.int64, device=loaded.device)
    seconds = 0.0
    for _ in range(2):
        begin = time.perf_counter()
        with torch.inference_mode():
            hidden_at(loaded.model, ids, at, at).sum().item()  # item waits for the device
        seconds = time.perf_counter() - begin
    return seconds


def _num_unpacked(parameter: nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)  # of bitsandbytes, which packs two weights of 4 bits into a byte
    return parameter.numel() if state is None else int(math.prod(state.shape))


def _heads(config: Any) -> int:
    """Attention heads; 0 in a model without attention (Mamba, RWKV)."""
    return int(getattr(config, "num_attention_heads", None) or 0)


def _states(model: nn.Module) -> int:
    """Float32 numbers a token that the scan of a state space layer writes down without a kernel of its own.

    The layers are asked: configs have a name for each family, and numbers where no layer is of this kind, as well.
    """
    layers: Iterable[Any] = (each for each in model.modules() if hasattr(each, "ssm_state_size"))
    return max((_scanned(each) for each in layers), default=0)


def _scanned(layer: Any) -> int:
    if not hasattr(layer, "chunk_size"):
        return int(4 * layer.intermediate_size * layer.ssm_state_size)
    padding = max(1, layer.chunk_size // _SHORT_TOKENS)
    return int(8 * layer.num_heads * (layer.chunk_size + layer.ssm_state_size) * padding)


def _num_wide(model: nn.Module, *, backward: bool) -> int:
    """How many tensors of the feed-forward layer's width there are at a time, or are kept for a backward pass.

    With a gate these are its activation, what that is multiplied with, and their product. A layer has none if just two
    matrices lead to that width and back; one of another form is taken to have one.
    """
    _, blocks = find_blocks(model)
    block, config = blocks[0] if blocks else nn.Identity(), text_config(model)
    up = _intermediate(config), _hidden(config)
    found = [shape for each in block.parameters() if (shape := tuple(each.shape)) in (up, up[::-1])]
    is_gated = sorted(found) != sorted([up, up[::-1]])
    kinds = (type(module).__name__ for module in block.modules())
    at_a_time, kept = next((_ACTIVATIONS[kind] for kind in kinds if kind in _ACTIVATIONS), (2, 2))
    return kept + 2 * is_gated if backward else at_a_time + is_gated


def _gated_width(config: Any) -> int:
    """Numbers of a token in a gated model's forward, in which kept keys and values are counted for any model."""
    return 6 * _hidden(config) + 3 * _intermediate(config)


def _hidden(config: Any) -> int:
    return int(config.hidden_size)


def _intermediate(config: Any) -> int:
    """Width of the feed-forward layer as one token sees it."""
    names = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
    width = next(
        (value for name in names if isinstance(value := getattr(config, name, None), int)), 4 * _hidden(config)
    )
    return width * max(1, int(getattr(config, "num_experts_per_tok", 1) or 1))
