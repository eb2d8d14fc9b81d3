"""A GPU's work without a GPU: its kernels, compiled by the C++ compiler of the machine, and its graphs."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._C import DisableTorchFunctionSubclass
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import fedzo.zo
from fedzo.zo.directions import gaussian_table
from fedzo.zo.directions_cuda import CudaDirections, Variant

INDEXING = {torch.ops.aten.index.Tensor}
HERE = Path(__file__).parent / "zo"


class CpuLaunch:
    """Runs a kernel of ``directions.cu`` on the CPU, block after block, and keeps the names of those it ran."""

    def __init__(self, folder: Path) -> None:
        self.launched: list[str] = []
        self.recorders: list[Callable[[Callable[[], object]], None]] = []
        self._folder = folder
        self._libraries: dict[tuple[str, ...], ctypes.CDLL] = {}

    def __call__(
        self, name: str, variant: Variant, arguments: ctypes.Structure, *, blocks: int, threads: int, shared_bytes: int
    ) -> None:
        self.launched.append(name)
        options = tuple(f"-D{key.upper()}={int(value)}" for key, value in variant._asdict().items())
        if options not in self._libraries:
            library = self._folder / f"{''.join(options)}.so"
            if not library.exists():
                part = library.with_suffix(f".{os.getpid()}")  # another worker may be at it, too
                command = ["g++", "-O1", "-std=c++17", "-ffp-contract=off", "-shared", "-fPIC", *options, "-I"]
                command += [str(Path(fedzo.zo.__file__).parent), "-o", str(part), str(HERE / "cuda_on_cpu.cpp")]
                subprocess.run(command, check=True, capture_output=True, timeout=120)
                part.rename(library)
            self._libraries[options] = ctypes.CDLL(str(library))
        run = partial(getattr(self._libraries[options], f"run_{name}"), ctypes.byref(arguments), blocks)
        run()
        for record in self.recorders:
            record(run)


class Tape(TorchDispatchMode):
    """A CUDA graph's slow twin: keeps each operation and kernel with the very tensors and numbers that it had.

    What reads the device while it records is refused, as CUDA refuses it. A tensor from elsewhere must still be there
    when it is replayed.

    Args:
        launch: Starts the kernels that are recorded, too.
    """

    def __init__(self, launch: CpuLaunch | None = None) -> None:
        super().__init__()
        self.work: list[Callable[[], object]] = []
        self._own: dict[int, torch.Tensor] = {}
        self._recorders = [] if launch is None else launch.recorders

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kept = func(*args, **kwargs)
        is_mask = any(isinstance(each, torch.Tensor) and each.dtype == torch.bool for each in tree_leaves(args[1:]))
        shape_is_read = torch.Tag.dynamic_output_shape in func.tags and (func not in INDEXING or is_mask)
        if shape_is_read or any(isinstance(each, bool | int | float) for each in tree_leaves(kept)):
            raise RuntimeError("operation not permitted when stream is capturing")
        given = tree_map_only(torch.Tensor, self._reference, (args, kwargs))
        self._own |= {id(each): each for each in tree_leaves(kept) if isinstance(each, torch.Tensor)}

        def again() -> None:
            args, kwargs = tree_map_only(Address, Address.tensor, given)
            made = func(*args, **kwargs)
            for old, new in zip(tree_leaves(kept), tree_leaves(made), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

        self.work.append(again)
        return kept

    def capture(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        self._recorders.append(self.work.append)
        try:
            with self, pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
                output = work()
        finally:
            self._recorders.remove(self.work.append)
        return output.fill_(torch.nan)  # nothing has run yet

    def replay(self) -> None:
        with DisableTorchFunctionSubclass():  # below it, where kernels are: no probe sees these operations
            for again in self.work:
                again()

    def _reference(self, tensor: torch.Tensor) -> torch.Tensor | Address:
        return tensor if id(tensor) in self._own else Address(tensor)


class Address:
    """A tensor's memory, not kept."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._storage = StorageWeakRef(tensor.untyped_storage())
        self._place = tensor.storage_offset(), tensor.size(), tensor.stride()
        self._dtype = tensor.dtype

    def tensor(self) -> torch.Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        if storage is None:
            raise RuntimeError("an illegal memory access was encountered")
        return torch.empty(0, dtype=self._dtype).set_(storage, *self._place)


@pytest.fixture(scope="session")
def cpu_launch(tmp_path_factory: pytest.TempPathFactory) -> CpuLaunch:
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler to run the CUDA kernels with")
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "kernels"  # for all workers of a session
    folder.mkdir(exist_ok=True)
    return CpuLaunch(folder)


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
        for module in ("directions", "spaces.masked", "perturb", "tensor_group"):
            monkeypatch.setattr(f"fedzo.zo.{module}.fused", lambda device: kernels)
        return cpu_launch.launched

    return switch


@pytest.fixture
def new_tape(cpu_launch: CpuLaunch) -> Callable[[], Tape]:
    """Makes an empty tape."""
    return lambda: Tape(cpu_launch)
