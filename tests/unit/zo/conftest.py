"""The CUDA kernels without a GPU: the same text, compiled by the C++ compiler of the machine."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fedzo.zo
from fedzo.zo.directions import gaussian_table
from fedzo.zo.directions_cuda import CudaDirections, Variant

HERE = Path(__file__).parent


class CpuLaunch:
    """Runs a kernel of ``directions.cu`` on the CPU, block after block, and keeps the names of those it ran."""

    def __init__(self, folder: Path) -> None:
        self.launched: list[str] = []
        self._folder = folder
        self._libraries: dict[tuple[str, ...], ctypes.CDLL] = {}

    def __call__(
        self, name: str, variant: Variant, arguments: ctypes.Structure, *, blocks: int, threads: int, shared_bytes: int
    ) -> None:
        self.launched.append(name)
        options = tuple(f"-D{key.upper()}={int(value)}" for key, value in variant._asdict().items())
        if options not in self._libraries:
            library = self._folder / f"{len(self._libraries)}.so"
            command = ["g++", "-O1", "-std=c++17", "-ffp-contract=off", "-shared", "-fPIC", *options, "-I"]
            command += [str(Path(fedzo.zo.__file__).parent), "-o", str(library), str(HERE / "cuda_on_cpu.cpp")]
            subprocess.run(command, check=True, capture_output=True, timeout=120)
            self._libraries[options] = ctypes.CDLL(str(library))
        getattr(self._libraries[options], f"run_{name}")(ctypes.byref(arguments), blocks)


@pytest.fixture(scope="session")
def cpu_launch(tmp_path_factory: pytest.TempPathFactory) -> CpuLaunch:
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler to run the CUDA kernels with")
    return CpuLaunch(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(params=[1 << 18, 100 << 10], ids=["shared", "global"])
def kernels(request: pytest.FixtureRequest, cpu_launch: CpuLaunch) -> CudaDirections:
    """On a device whose shared memory holds the table, and on one whose does not; three blocks at most a wave."""
    table = torch.from_numpy(gaussian_table()[1 << 15 :].copy())
    cpu_launch.launched.clear()
    return CudaDirections(cpu_launch, table, processors=3, shared_bytes=request.param)


@pytest.fixture
def as_on_a_gpu(
    kernels: CudaDirections, cpu_launch: CpuLaunch, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], list[str]]:
    """Call it, and everything takes the path of a GPU; it gives the names of the kernels that are started."""

    def switch() -> list[str]:
        for module in ("directions", "spaces.masked", "perturb", "rounding", "together"):
            monkeypatch.setattr(f"fedzo.zo.{module}.fused", lambda device: kernels)
        return cpu_launch.launched

    return switch
