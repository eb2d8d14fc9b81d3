"""Peak memory of a piece of work: the allocator's own count on a GPU, the kernel's count of resident pages on Linux."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import torch

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def resident_bytes() -> int:
    """Memory that this process holds now."""
    return int(psutil.Process().memory_info().rss)


def measure_peak_bytes(work: Callable[[], object], device: torch.device) -> int | None:
    """Most memory in use while ``work`` runs; None where the machine cannot tell.

    On the CPU it is all of the process, in steps of pages; set ``MALLOC_MMAP_THRESHOLD_`` low before the process
    starts, so that freed tensors go back to the system at once.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device))
    try:
        _CLEAR.write_text("5")  # the peak becomes the present size
    except OSError:
        return None
    work()
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
