"""A disk without room, as a process meets it."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager

_MOST_BYTES = 40_000  # a tiny model's weights have more, its other files less


@contextmanager
def no_room_for_a_model() -> Iterator[None]:
    """Within the context the kernel refuses to write a file as long as a tiny model's weights ("File too large")."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (_MOST_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
