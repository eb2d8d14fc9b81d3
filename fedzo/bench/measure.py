"""Time and peak memory of pieces of work.

Pieces are timed in turn, so that what slows the machine slows all of them. Memory is the allocator's own count on a
GPU, with what CUDA graphs keep, and the kernel's count of resident pages on Linux.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import psutil
import torch

from fedzo.system import OnProgress, no_progress

Key = TypeVar("Key", bound=Hashable)
WARM_UPS = 2
_CYCLES = 2e9  # a second of a GPU's clock
_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def interleaved(
    work: Mapping[Key, Callable[[], object]],
    *,
    repeats: int,
    warm_ups: int = WARM_UPS,
    on_repeat: OnProgress = no_progress,
) -> dict[Key, list[float]]:
    """Seconds of each repeat of each piece, after rounds that warm up caches and compilers.

    Args:
        work: What to time; a piece that leaves work on a GPU must wait for it.
        repeats: Timed rounds.
        warm_ups: Rounds before them.
        on_repeat: Progress: (done, total).
    """
    seconds: dict[Key, list[float]] = {name: [] for name in work}
    for repeat in range(warm_ups + repeats):
        for name, run in work.items():
            begin = time.perf_counter()
            run()
            if repeat >= warm_ups:
                seconds[name].append(time.perf_counter() - begin)
        on_repeat(max(0, repeat + 1 - warm_ups), repeats)
    return seconds


def medians_on_gpu(work: Mapping[Key, Callable[[], object]], *, repeats: int = 15, times: int = 5) -> dict[Key, float]:
    """Milliseconds of each piece by the GPU's own clock: medians of repeats in turn, after two that warm up.

    A repeat is several times the work without a pause. The card waits until Python has started all of it, which for
    short kernels takes longer than they do.

    Args:
        work: What to time; it must not wait for the GPU.
        repeats: Timed rounds.
        times: That a round does the work.
    """
    spent: dict[Key, list[float]] = {name: [] for name in work}
    wait_s: dict[Key, float] = {}
    for repeat in range(WARM_UPS + repeats):
        for name, run in work.items():
            begin, end = (cast(Any, torch.cuda.Event)(enable_timing=True) for _ in range(2))
            cast(Any, torch.cuda)._sleep(int(_CYCLES * wait_s.get(name, 0.0)))
            begin.record()
            start = time.perf_counter()
            for _ in range(times):
                run()
            if repeat == WARM_UPS - 1:  # the first has compiled kernels
                wait_s[name] = 2 * (time.perf_counter() - start)
            end.record()
            end.synchronize()
            if repeat >= WARM_UPS:
                spent[name].append(begin.elapsed_time(end) / times)
    return {name: statistics.median(found) for name, found in spent.items()}


def resident_bytes() -> int:
    """Memory that this process holds now."""
    return int(psutil.Process().memory_info().rss)


def measure_peak_bytes(work: Callable[[], object], device: torch.device) -> int | None:
    """Most memory in use while ``work`` runs; None where the machine cannot tell.

    On the CPU it is all of the process, in steps of pages; set ``MALLOC_MMAP_THRESHOLD_`` low before the process
    starts, so that freed tensors go back to the system at once. On a GPU, ``work`` must have run so often that it
    records no CUDA graphs any more.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) + _graphs_bytes(device)
    try:
        _CLEAR.write_text("5")  # the peak becomes the present size
    except OSError:
        return None
    work()
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def free_memory() -> None:
    """Give back what nobody needs any more: a model may be in reference cycles, and torch keeps a GPU's memory."""
    gc.collect()
    torch.cuda.empty_cache()


def _graphs_bytes(device: torch.device) -> int:
    """What CUDA graphs keep on a device for what lies between their kernels: a replay allocates none of it."""
    index = torch.cuda.current_device() if device.index is None else device.index
    segments = [each for each in cast(Any, torch.cuda).memory_snapshot() if each["device"] == index]
    private = (each for each in segments if any(each["segment_pool_id"]))
    return sum(int(each["total_size"]) - int(each["allocated_size"]) for each in private)
