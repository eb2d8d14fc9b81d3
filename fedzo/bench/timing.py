"""Timing pieces of work against each other: in turn, so that what slows the machine slows all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)
_WARM_UPS = 2


def interleaved(
    work: Mapping[Key, Callable[[], object]],
    *,
    repeats: int,
    on_repeat: Callable[[int, int], None] = lambda done, total: None,
) -> dict[Key, list[float]]:
    """Seconds of each repeat of each piece, after two rounds that warm up caches and compilers.

    Args:
        work: What to time; a piece that leaves work on a GPU must wait for it.
        repeats: Timed rounds.
        on_repeat: Progress: (done, total).
    """
    seconds: dict[Key, list[float]] = {name: [] for name in work}
    for repeat in range(_WARM_UPS + repeats):
        for name, run in work.items():
            begin = time.perf_counter()
            run()
            if repeat >= _WARM_UPS:
                seconds[name].append(time.perf_counter() - begin)
        on_repeat(max(0, repeat + 1 - _WARM_UPS), repeats)
    return seconds
