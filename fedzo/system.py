"""What a process depends on beside the code: versions, machine, commit, threads, and what its libraries say."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fedzo
from fedzo.errors import ConfigError

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

MAX_THREADS = 1024  # with very many OpenMP ends the process without a word
COMMAND_ENV = "FEDZO_COMMAND"
"""Environment variable with the user's command (a JSON list), for processes that it starts."""
SITE_ENV = "FEDZO_SITE"
"""Environment variable with the path of a client site's own configuration (YAML)."""
SITE_LOG_ENV = "FEDZO_SITE_LOG"
"""Environment variable with the path of a file to which a client's process writes its errors and its part in a run."""
SITE_ARTIFACTS_ENV = "FEDZO_SITE_ARTIFACTS"
"""Environment variable with the path of the folder in which a site keeps the artifact of its run."""
OnProgress = Callable[[int, int], None]
"""What long work calls as it goes on: how much is done, and of how much."""
CODE = ("fedzo", "conf", "clients", "server", "experiments/*.py", "pyproject.toml", "constraints.txt")
"""What a run is computed by, of a source tree; of experiments/ the scripts, whose results are no code."""
COMMIT_ENV = "FEDZO_GIT_COMMIT"
"""Environment variable with the commit of a source tree that was copied without its .git."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
PACKAGES = ("torch", "transformers", "peft", "flwr", "numpy", "numba", "hydra-core")
CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")

_LIBRARIES = (
    *("accelerate", "alembic", "bitsandbytes", "datasets", "filelock", "fsspec", "httpx", "huggingface_hub"),
    *("matplotlib", "numba", "numexpr", "peft", "tensorboard", "tensorflow", "torch.utils._pytree", "torchao"),
    *("transformers", "triton", "urllib3"),
)
_VERBOSITY_VARIABLES = ("DATASETS_VERBOSITY", "HF_HUB_VERBOSITY", "TRANSFORMERS_VERBOSITY")
_PACKAGE = Path(__file__).resolve().parent
_OUT_OF_MEMORY = (
    "out of memory",
    "DefaultCPUAllocator",
    "ALLOC_FAILED",
    "ALLOCATION_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
)
"""How torch, its libraries and Triton say it in a plain RuntimeError; the last, as a rule, of a new cuBLAS handle."""


def no_progress(done: int, total: int) -> None:
    """The ``OnProgress`` of work that nobody watches."""


def consecutive(sizes: Sequence[int], *, most: float) -> list[range]:
    """Cut indices into runs whose sizes come to ``most`` at most; one that is larger goes alone.

    Example:
        >>> consecutive([2, 2, 3, 9, 1], most=5)
        [range(0, 2), range(2, 3), range(3, 4), range(4, 5)]
    """
    begins, total = [0], 0
    for index, size in enumerate(sizes):
        if total + size > most and index > begins[-1]:
            begins.append(index)
            total = 0
        total += size
    return [range(begin, end) for begin, end in pairwise([*begins, len(sizes)]) if begin < end]


def quiet_libraries() -> None:
    """Let the libraries below fedzo say only what went wrong, before they are imported.

    Terminal and fedzo.log are for lines that a user can act on: fedzo's own, Flower's, a plugin's, and any library's
    errors. What libraries warn of (kernels that are not installed, calls that will change) is for who writes code;
    what of it matters to a run, such as weights that were not used, fedzo says itself. A variable such as
    ``TRANSFORMERS_VERBOSITY=warning`` brings a library's warnings back.
    """
    for variable in _VERBOSITY_VARIABLES:  # these libraries set their level again when they are imported
        os.environ.setdefault(variable, "error")
    for name in _LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)


def keep_loopback_direct(variables: MutableMapping[str, str]) -> None:
    """Ask no proxy for what is on this machine, whatever proxies these environment variables name."""
    hosts = variables.get("no_proxy", variables.get("NO_PROXY", "")).split(",")
    without = ",".join(dict.fromkeys([*(host.strip() for host in hosts if host.strip()), *LOOPBACK]))
    variables["NO_PROXY"] = variables["no_proxy"] = without


@contextmanager
def environment_variable(name: str, value: str) -> Iterator[None]:
    """Set for what runs meanwhile, and for the processes that it starts."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """What this process computes with, beside its settings, as plain JSON values; ``device`` if one is known."""
    import torch  # here, as in use_threads

    return {
        "fedzo": code_version(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": usable_cpus(),
        **({} if device is None else {"device": device_text(device)}),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "git_commit": _git_commit(),
    }


def device_text(device: torch.device) -> str:
    """A device, with its name if it is a GPU: ``cpu``, ``cuda:1, NVIDIA H200``."""
    import torch  # here, as in use_threads

    return f"{device}, {torch.cuda.get_device_name(device)}" if device.type == "cuda" else str(device)


def device_is_lost() -> bool:
    """Whether a GPU that holds memory of this process answers nothing more, as after an illegal access or a sleep.

    CUDA then repeats the error at whatever it is asked, until the process ends.
    """
    import torch  # here, as in use_threads

    cuda: Any = torch.cuda  # not all of it has types
    if not cuda.is_initialized():
        return False
    try:
        for index in range(cuda.device_count()):
            if cuda.memory_reserved(index):
                cuda.synchronize(index)
    except RuntimeError:
        return True
    return False


def on_device(numbers: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """The numbers on a device; on a CPU they are not copied.

    Nobody waits for a copy to a GPU: torch keeps the page-locked memory that it comes from until it is done. From other
    memory the copy would first wait for all that the GPU has to do.
    """
    import torch  # here, as in use_threads

    host = torch.from_numpy(numbers).contiguous()
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def command() -> list[str]:
    """The command that the user gave, also in a process that it started."""
    given = os.environ.get(COMMAND_ENV)
    return list(json.loads(given)) if given else [Path(sys.argv[0]).name, *sys.argv[1:]]


def cache_root() -> Path:
    """``$FEDZO_CACHE``, by default ``~/.cache/fedzo``.

    Raises:
        ConfigError: This user has no home.
    """
    try:
        return Path(os.environ.get("FEDZO_CACHE") or Path.home() / ".cache" / "fedzo").expanduser()
    except RuntimeError as error:
        raise ConfigError("the cache must have a folder, but this user has no home. Set FEDZO_CACHE to one.") from error


def control_groups() -> Iterator[Path]:
    """Folders of the process's control group and of those around it (version 2), from the inside; none elsewhere."""
    try:
        lines = OWN_CGROUP.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for path in (line[3:] for line in lines if line.startswith("0::")):
        own = CGROUPS / path.lstrip("/")
        for folder in (own, *own.parents):
            yield folder
            if folder == CGROUPS:
                break


def usable_cpus() -> int:
    """CPUs that this process may use: fewer than the machine's where a scheduler or a container gave it some.

    Of a container's quota there are as many as it has time of, rounded up: more threads would only wait for each other.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in control_groups():
        with suppress(OSError, ValueError):  # without a quota there is no file, or it says ``max``
            quota, period = map(int, (folder / "cpu.max").read_text(encoding="ascii").split())
            cpus = min(cpus, math.ceil(quota / period))
    return cpus


def default_threads() -> int:
    """What OMP_NUM_THREADS says, as for every OpenMP program; without it, one thread a usable CPU.

    Ray tells its actors so how many CPUs they were given, and ``runtime=local`` tells its clients.
    """
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return min(int(first), MAX_THREADS) if first.isdecimal() and int(first) > 0 else usable_cpus()


def use_threads(count: int) -> None:
    """Let torch and Numba compute with so many threads; 0 takes ``default_threads``."""
    import numba  # here: a command that computes nothing waits for neither
    import torch

    count = count or default_threads()
    torch.set_num_threads(count)
    numba.set_num_threads(min(count, int(getattr(numba.config, "NUMBA_NUM_THREADS", count))))


def package_version(name: str) -> str | None:
    """Version of an installed package; None if it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def package_problems() -> dict[str, str]:
    """What is wrong with the packages that fedzo's own metadata asks for, by name; those of its extras left out."""
    from packaging.requirements import Requirement  # here, for a command starts without it

    try:
        needed = [Requirement(text) for text in requires("fedzo") or ()]
    except PackageNotFoundError:  # a source tree on the path
        return {}
    found = {}
    for each in needed:
        installed = package_version(each.name)
        if each.marker is None and not (installed and each.specifier.contains(installed, prereleases=True)):
            remedy = f"Run: pip install '{each.name}{each.specifier}'"
            found[each.name] = f"it must be {each.specifier}, got {installed or 'none'}. {remedy}"
    return found


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, says that memory could not be taken, on a GPU or elsewhere."""
    import torch  # here, as in use_threads

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY):
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)


@cache
def warn_once(log: logging.Logger, text: str) -> None:
    """Log a warning, the first time that this process has it to say."""
    log.warning("%s", text)


@cache
def code_version(package: Path = _PACKAGE) -> str:
    """The version of a fedzo, and a digest of its Python code, since two checkouts of one version may differ.

    A wheel has that of the source tree that it was made of. A process keeps what its files held at the first call.
    """
    digest = hashlib.sha256()
    for name in sorted(file.relative_to(package).as_posix() for file in package.rglob("*.py") if file.is_file()):
        code = (package / name).read_bytes().replace(b"\r\n", b"\n")  # as a checkout may write them
        digest.update(f"{name} {len(code)}\n".encode() + code)
    return f"{fedzo.__version__}+{digest.hexdigest()[:12]}"


def _git_commit() -> str | None:
    """Commit of the source tree that fedzo runs from, without a repository that of ``COMMIT_ENV``; None for a wheel."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "pyproject.toml").is_file():  # of a wheel in an environment, which may lie in somebody's repository
        return None
    return _commit_of(root) or os.environ.get(COMMIT_ENV)


@cache
def _commit_of(root: Path) -> str | None:
    """Commit of a source tree, ending in ``-dirty`` where code was changed or is new (a study writes its results)."""
    commit = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "status", "--porcelain", "--untracked-files=all", "--", *CODE)
    return f"{commit}-dirty" if commit and changes else commit


def _git(root: Path, *words: str) -> str | None:
    """What git answers about a source tree, None where it cannot; without a lock in the way of somebody's commit."""
    try:
        result = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(root), *words], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
