"""What numbers and times depend on beside the code: versions, machine, commit, threads."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numba
import torch

import fedzo

MOST_THREADS = 1024  # with very many OpenMP ends the process without a word
PACKAGES = ("torch", "transformers", "peft", "flwr", "numpy", "numba", "hydra-core")


def environment() -> dict[str, Any]:
    """Versions, machine and commit, as plain JSON values."""
    return {
        "fedzo": fedzo.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": usable_cpus(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "git_commit": _git_commit(),
    }


def usable_cpus() -> int:
    """CPUs that this process may run on: fewer than the machine's where a scheduler or a container gave it some."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_threads() -> int:
    """What OMP_NUM_THREADS says, as for every OpenMP program; without it, one thread a usable CPU.

    Ray tells its actors so how many CPUs they were given, and ``runtime=local`` tells its clients.
    """
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return min(int(first), MOST_THREADS) if first.isdecimal() and int(first) > 0 else usable_cpus()


def use_threads(count: int) -> None:
    """Let torch and Numba compute with so many threads; 0 takes ``default_threads``."""
    count = count or default_threads()
    torch.set_num_threads(count)
    numba.set_num_threads(min(count, int(getattr(numba.config, "NUMBA_NUM_THREADS", count))))


def package_version(name: str) -> str | None:
    """Version of an installed package; None if it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Commit of the source tree that fedzo runs from; None for an installed wheel."""
    try:
        result = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
