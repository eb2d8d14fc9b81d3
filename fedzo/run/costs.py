"""What a run will need: memory and time, told before it starts; and batches small enough to fit."""

from __future__ import annotations

import logging
import math
import mmap
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, cast

import torch

from fedzo.data.encode import Example
from fedzo.errors import ConfigError
from fedzo.fl.replica import Workspace
from fedzo.models.available import available_memory_bytes, held_bytes, mapped_bytes
from fedzo.models.captured import CapturedDecoder
from fedzo.models.config import ModelConfig
from fedzo.models.load import resolve_device
from fedzo.models.loaded import LoadedModel
from fedzo.models.memory import (
    cache_tokens,
    fit_tokens_per_batch,
    server_optimizer_bytes,
    state_bytes,
    step_memory,
    time_forwards,
)
from fedzo.models.source import find_source
from fedzo.records.metrics import Estimate
from fedzo.report.format import bytes_text
from fedzo.system import device_text
from fedzo.zo.spaces.base import Space

log = logging.getLogger(__name__)
_TIMED_TOKENS = 2048  # of a GPU, where a forward of few costs as much (``fedzo.models.plan.forward_cost``)
_TIMED_ON_CPU = 256  # enough there, and more would delay the start


def fitting_tokens_per_batch(
    loaded: LoadedModel,
    space: Space,
    *,
    wanted: int,
    longest: int,
    local_steps: int,
    num_moments: int,
    kept_bytes: int = 0,
    head_share: float = 0.0,
) -> int:
    """``wanted``, or fewer tokens a forward where a step would not fit into the memory that is left.

    Raises:
        ConfigError: What the server optimizer remembers does not fit, or not even one sequence beside it.
    """
    kept, host = server_optimizer_bytes(space.size, num_moments), available_memory_bytes(torch.device("cpu"))
    if loaded.device.type == "cpu":
        host = max(0, host - _copied_on_write(space, host))
    if kept > host:
        raise ConfigError(
            f"server_optimizer: its state must fit in memory, but has {num_moments} float32 numbers for each of "
            f"{space.size:,} trained values ({kept / 2**20:.0f} MiB), and {host / 2**20:.0f} MiB are free. Use "
            "server_optimizer=sgd, train fewer values or, with scaffold and feddyn, have fewer clients."
        )
    available = available_memory_bytes(loaded.device) if loaded.device.type == "cuda" else host - kept
    fitting = fit_tokens_per_batch(
        loaded.model,
        wanted=wanted,
        longest=longest,
        available_bytes=available,
        trained_bytes=trained_bytes(loaded, space, local_steps, reads_head=head_share > 0) + kept_bytes,
        head_share=head_share,
        captured=_is_captured(loaded),
    )
    if fitting < wanted:
        log.warning(
            "model.tokens_per_batch: %d do not fit in the %.0f MiB that are free, so %d are used. This changes the "
            "last bits of losses: set the key to that number to make runs repeatable.",
            wanted,
            available / 2**20,
            fitting,
        )
    return fitting


def warn_of_copies(config: ModelConfig, *, device: str, num_copies: int, are_written: bool) -> None:
    """Say so where processes of this machine, of which each holds the model, take more memory than is free.

    On a CPU they share weights that stay in their files, unless these are trained.
    """
    where = resolve_device(device)
    if where.type == "cuda":  # whose memory cannot be asked for without taking some
        return
    held = None
    with suppress(ConfigError):  # the processes tell it
        held = held_bytes(config, find_source(config).files)
    free = available_memory_bytes(where)
    if held is None:
        return
    own = held.total if are_written or where.type != "cpu" else held.copied
    if (needed := num_copies * own + held.total - own) > free:
        log.warning(
            "runtime=local: the server and each client load a model of their own, %d in all, which take %s, but %s are "
            "free. Write runtime=inline, where all share one, or lower fl.num_clients",
            num_copies,
            bytes_text(needed),
            bytes_text(free),
        )


def trained_bytes(loaded: LoadedModel, space: Space, local_steps: int, *, reads_head: bool) -> int:
    """Bytes that a step takes for the trained values; ``reads_head`` says whether forwards read all of the LM head."""
    taken = space.step_bytes(local_steps)
    if not space.perturbs_weights:
        return taken
    outputs: Any = cast(Any, loaded.model).get_output_embeddings() if reads_head else None
    head: torch.Tensor | None = getattr(outputs, "weight", None)
    taken += sum(each.nbytes for each in space.parameters if each is head)
    return taken + (space.step_bytes(1) if _is_captured(loaded) else 0)  # which the graphs make in their pool, too


def _is_captured(loaded: LoadedModel) -> bool:
    return isinstance(loaded.decoder, CapturedDecoder)


def _copied_on_write(space: Space, host: int) -> int:
    """Bytes of mapped weights that the first probe makes memory of this process: pages that a trained value lies in.

    Values are taken to lie at random, which a mask's do; of a space of whole weights each page has one. Weights of less
    than a hundredth of the host's memory are none: to look takes a tenth of a second.
    """
    weights = sum(parameter.nbytes for parameter in space.parameters)
    if 100 * weights < host:
        return 0
    touched = -math.expm1(-space.size * mmap.PAGESIZE / weights) if weights else 0.0
    return int(min(weights, mapped_bytes()) * touched)


def head_share(examples: Iterable[Example]) -> float:
    """Most tokens of a row that pay for the whole LM head, as a share: none where all answers are single tokens."""
    return max((_head_rows(example) / _num_tokens(example) for example in examples), default=0.0)


def estimate_run(
    workspace: Workspace,
    *,
    train: list[Example],
    scored: list[tuple[int, list[Example]]],
    rows_per_step: int,
    steps: int,
    forwards_per_step: float,
    num_rows: int,
    local_steps: int,
    new_tokens: int = 0,
    gradient_bytes: int = 0,
) -> Estimate:
    """Estimate from timed forwards, all of them eager; clients that share forwards are taken to have their own.

    Args:
        workspace: What the run measures with.
        train: Some training rows; their mean length stands for all.
        scored: How often each list of rows is scored.
        rows_per_step: Rows of one client's step.
        steps: Local steps of all clients in all rounds to come.
        forwards_per_step: What one step costs, in forwards of the whole model.
        num_rows: Training rows of all clients.
        local_steps: T.
        new_tokens: Most tokens that a score writes for each row, a forward after the other; 0 where it writes none.
        gradient_bytes: What gradients take (``fedzo.models.memory``), in a run that computes them; 0 in others.
    """
    loaded, space, lower = workspace.loaded, workspace.replica.space, workspace.lower
    visits = steps * rows_per_step
    longest = max((_num_tokens(example) for example in train), default=0)
    step_tokens = rows_per_step * longest
    batch_tokens = min(workspace.tokens_per_batch, step_tokens)
    token_bytes, kept_bytes = state_bytes(loaded.model), 0
    if lower is not None:
        row_bytes = token_bytes * _mean(_num_reads if lower.reads_alone else _num_tokens, train)
        kept = lower.kept_share(visits, num_rows, row_bytes=row_bytes)
        forwards_per_step = lower.whole_forwards(forwards_per_step, kept=kept)
        kept_bytes = lower.kept_bytes(batch_tokens, token_bytes=token_bytes)
    timed = _TIMED_ON_CPU if loaded.device.type == "cpu" else _TIMED_TOKENS
    cost = time_forwards(loaded, num_tokens=min(workspace.tokens_per_batch, timed))

    def seconds(times: float, tokens: float) -> float:
        return times * (math.ceil(tokens / workspace.tokens_per_batch) * cost.each + tokens * cost.token)

    taken = seconds(steps * forwards_per_step, rows_per_step * _mean(_num_tokens, train))
    for times, part in scored:
        taken += seconds(times * _score_forwards(loaded, times, part), sum(map(_num_tokens, part)))
        if new_tokens:
            written = sum(len(example.generation_prompt) + new_tokens for example in part)
            batches = math.ceil(written * max(1.0, cache_tokens(loaded.model)) / workspace.tokens_per_batch)
            taken += times * (batches * new_tokens * cost.each + written * cost.token)
    head_rows = rows_per_step * max(map(_head_rows, train), default=0)
    step = step_memory(
        loaded.model,
        batch_tokens=step_tokens if gradient_bytes else batch_tokens,
        head_rows=head_rows,
        trained_bytes=trained_bytes(loaded, space, local_steps, reads_head=head_rows > 0) + gradient_bytes,
        backward=gradient_bytes > 0,
        captured=_is_captured(loaded),
    )
    remembered_bytes = server_optimizer_bytes(space.size, len(workspace.replica.moments))
    parts = {
        "weights": step.weights,
        "activations": step.activations,
        "LM head": step.head,
        "trained values": step.trained,
        "lower blocks' states": kept_bytes,
        "CUDA graphs": step.graphs,
        "server optimizer": 0 if loaded.device.type == "cuda" else remembered_bytes,  # which the machine holds
    }
    return Estimate(
        memory_bytes=sum(parts.values()),
        seconds=taken,
        parts={name: num_bytes for name, num_bytes in parts.items() if num_bytes},
        device=device_text(loaded.device),
        free_bytes=available_memory_bytes(loaded.device),
    )


def _num_tokens(example: Example) -> int:
    """Most tokens the example takes: one prompt for single-token candidates, else a sequence for each candidate."""
    if example.one_token:
        return len(example.prompt)
    return sum(len(example.prompt) + len(candidate) for candidate in example.candidates)


def _head_rows(example: Example) -> int:
    """Positions whose logits are made over the whole vocabulary."""
    return 0 if example.one_token else _num_reads(example)


def _score_forwards(loaded: LoadedModel, times: int, examples: list[Example]) -> float:
    """Whole forwards that one of so many scores of these rows costs a row."""
    lower, reads = loaded.kept, [_num_reads(example) for example in examples]
    if lower is None or not (lower.reads_alone or max(reads, default=1) == 1):  # prompts are shared, and nothing kept
        return 1.0
    row_bytes = state_bytes(loaded.model) * _mean(_num_reads if lower.reads_alone else _num_tokens, examples)
    kept = lower.kept_share(times * len(examples), len(examples), row_bytes=row_bytes)
    return lower.whole_forwards(1, kept=kept)


def _num_reads(example: Example) -> int:
    """Positions that predict an answer's token."""
    return 1 if example.one_token else sum(map(len, example.candidates))


def _mean(num: Callable[[Example], int], examples: list[Example]) -> float:
    return sum(map(num, examples)) / len(examples) if examples else 0.0
