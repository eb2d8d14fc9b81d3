"""``fedzo doctor``: whether this machine can take part."""

from __future__ import annotations

import platform
import sys

from fedzo.system import PACKAGES, default_threads, package_version


def doctor() -> list[tuple[str, bool, str]]:
    """Whether this machine can take part: versions, devices, and directions against their golden key."""
    import torch

    from fedzo.zo.directions import direction, stream_key

    checks = [("python", sys.version_info >= (3, 11), platform.python_version())]
    for name in PACKAGES:
        found = package_version(name)
        checks.append((name, found is not None, found or "not installed"))
    checks.append(
        ("flwr is 1.41", (package_version("flwr") or "").startswith("1.41."), "the runtimes use private names of it")
    )
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    checks.append(("device", True, f"{device}, {default_threads()} CPU threads"))
    bits = [f"{word:08x}" for word in direction(stream_key(0, round=0), 4).view("uint32")]
    golden = bits == ["bea7d6d0", "3e5d41d9", "3fd9904a", "401c6450"]
    checks.append(("directions", golden, "golden vector " + ("matches" if golden else f"differs: {bits}")))
    return checks
