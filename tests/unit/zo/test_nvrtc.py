"""Kernels are compiled for the device at hand and started from any thread: what NVIDIA's bindings are asked for.

The bindings are stand-ins in which everything succeeds; whether a device does what they are asked a GPU must show.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum
from threading import get_ident
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from fedzo.system import is_out_of_memory

CONTEXT = 77


class Status(IntEnum):
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_BINARY_FOR_GPU = 209
    NVRTC_ERROR_OUT_OF_MEMORY = 1


class Variant(NamedTuple):
    dtype: int


class Bindings(ModuleType):
    """``cuda.bindings``, which keep what they were asked.

    Attributes:
        known: What NVRTC can compile for.
        options: Of the programs that it compiled.
        contexts: The current context of each thread that has one.
        launched: Contexts that kernels were started in.
    """

    def __init__(self) -> None:
        super().__init__("cuda.bindings")
        self.known = [90, 100, 120]
        self.options: list[list[bytes]] = []
        self.contexts: dict[int, int] = {}
        self.launched: list[int | None] = []
        self.nvrtc = SimpleNamespace(
            nvrtcGetSupportedArchs=lambda: (0, self.known),
            nvrtcCreateProgram=lambda *args: (0, "program"),
            nvrtcCompileProgram=lambda program, count, options: (self.options.append(options) or 0,),
            nvrtcGetCUBINSize=lambda program: (0, 4),
            nvrtcGetCUBIN=lambda program, binary: (0,),
            nvrtcDestroyProgram=lambda program: (0,),
        )
        self.driver = SimpleNamespace(
            CUfunction_attribute=SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8),
            cuCtxGetCurrent=lambda: (0, self.contexts.get(get_ident(), 0)),
            cuCtxSetCurrent=lambda context: (self.contexts.update({get_ident(): context}) or 0,),
            cuDevicePrimaryCtxRetain=lambda index: (0, CONTEXT + index),
            cuModuleLoadData=lambda binary: (0, "module"),
            cuModuleGetFunction=lambda module, name: (0, "function"),
            cuFuncSetAttribute=lambda *args: (0,),
            cuLaunchKernel=lambda *args: (self.launched.append(self.contexts.get(get_ident())) or 0,),
        )


@pytest.fixture
def bindings(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bindings]:
    made, own = Bindings(), sys.modules.pop("fedzo.zo.nvrtc", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings", made)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    yield made
    sys.modules.pop("fedzo.zo.nvrtc", None)
    if own is not None:
        sys.modules["fedzo.zo.nvrtc"] = own


def launch_of() -> Any:
    return importlib.import_module("fedzo.zo.nvrtc").Compiler("source", torch.device("cuda", 0)).launch


def start(launch: Any) -> None:
    launch("add", Variant(0), ctypes.c_int(0), blocks=1, threads=1024, shared_bytes=0)


@pytest.mark.parametrize(
    ("capability", "known", "compiled"),
    [
        ((9, 0), [90, 100, 120], b"sm_90"),
        ((10, 0), [90, 100, 103, 120], b"sm_100"),
        ((10, 3), [90, 100, 103, 120], b"sm_103"),
        ((10, 3), [90, 100, 120], b"sm_100"),  # a B300 beside CUDA 12.8
        ((12, 1), [90, 100, 120], b"sm_120"),  # a GB10
        ((10, 0), [90, 103], b"sm_100"),  # what NVRTC will refuse: no other runs there
        ((7, 0), [75, 80], b"sm_70"),
    ],
)
def test_a_device_that_nvrtc_does_not_know_gets_what_its_whole_family_runs(
    capability: tuple[int, int],
    known: list[int],
    compiled: bytes,
    bindings: Bindings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bindings.known = known
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    start(launch_of())

    (options,) = bindings.options
    assert [each for each in options if b"architecture" in each] == [b"--gpu-architecture=" + compiled]
    assert b"--fmad=false" in options


def test_a_kernel_starts_in_the_devices_context_in_every_thread(bindings: Bindings) -> None:
    launch = launch_of()
    bindings.contexts[get_ident()] = 5  # as torch has made it

    start(launch)
    with ThreadPoolExecutor(1) as threads:
        for _ in range(2):
            threads.submit(start, launch).result()

    assert bindings.launched == [5, CONTEXT, CONTEXT]
    assert len(bindings.options) == 1


@pytest.fixture
def emptied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An entry each time that torch gives back what it keeps."""
    times: list[int] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: times.append(1))
    return times


def test_a_compiler_that_lacks_memory_is_not_told_as_a_fault_of_the_kernels(
    bindings: Bindings, emptied: list[int]
) -> None:
    bindings.nvrtc.nvrtcCompileProgram = lambda *given: (Status.NVRTC_ERROR_OUT_OF_MEMORY,)

    with pytest.raises(torch.OutOfMemoryError, match=r"failed: NVRTC_ERROR_OUT_OF_MEMORY$"):
        start(launch_of())


@pytest.mark.parametrize("name", ["cuModuleLoadData", "cuModuleGetFunction", "cuLaunchKernel"])
def test_where_the_driver_lacks_memory_torch_gives_back_what_it_keeps(
    name: str, bindings: Bindings, emptied: list[int]
) -> None:
    own = getattr(bindings.driver, name)

    def short(*given: Any) -> Any:
        return own(*given) if emptied else (Status.CUDA_ERROR_OUT_OF_MEMORY, None)

    setattr(bindings.driver, name, short)

    start(launch_of())

    assert (len(emptied), len(bindings.launched)) == (1, 1)


@pytest.mark.parametrize("status", list(Status))
def test_what_fails_for_want_of_memory_says_so(status: Status, bindings: Bindings, emptied: list[int]) -> None:
    bindings.driver.cuModuleLoadData = lambda binary: (status, None)

    with pytest.raises(RuntimeError, match=f"failed: {status.name}") as told:
        start(launch_of())

    is_short = status != Status.CUDA_ERROR_NO_BINARY_FOR_GPU
    assert is_out_of_memory(told.value) is is_short
    assert len(emptied) == is_short
