"""CUDA C++ compiled at run time and launched on torch's stream, through NVIDIA's own bindings.

CUDA builds of torch bring NVRTC and, since torch 2.10, ``cuda-bindings``; no toolkit and no C++ compiler is needed.
"""

from __future__ import annotations

import ctypes
from typing import Any, Protocol

import torch
from cuda.bindings import driver, nvrtc

_OUT_OF_MEMORY = "ERROR_OUT_OF_MEMORY"
"""The end of its name in the driver and in NVRTC."""


class Macros(Protocol):
    """A named tuple of integers."""

    def _asdict(self) -> dict[str, int]: ...


class Compiler:
    """The kernels of one CUDA source on one device, each variant compiled when it is first asked for.

    Args:
        source: CUDA C++ whose kernels take one structure by value.
        device: A CUDA device, with its index.
    """

    def __init__(self, source: str, device: torch.device) -> None:
        self._source = source
        self._device = device
        self._modules: dict[Macros, Any] = {}
        self._functions: dict[tuple[str, Macros], Any] = {}

    def launch(
        self, name: str, variant: Macros, arguments: ctypes.Structure, *, blocks: int, threads: int, shared_bytes: int
    ) -> None:
        """Start a kernel on torch's current stream.

        Args:
            name: Of the kernel.
            variant: A named tuple of integers: macros that the source is compiled with, in capitals.
            arguments: The kernel's structure.
            blocks: Size of the grid.
            threads: Threads of a block.
            shared_bytes: Dynamic shared memory of a block.
        """
        if torch.cuda.current_device() != self._device.index:
            with torch.cuda.device(self._device):
                self.launch(name, variant, arguments, blocks=blocks, threads=threads, shared_bytes=shared_bytes)
            return
        if not int(_call(driver.cuCtxGetCurrent)):  # in a thread that has given this device no work yet
            _call(driver.cuCtxSetCurrent, _call(driver.cuDevicePrimaryCtxRetain, self._device.index))
        function = self._functions.get((name, variant)) or self._function(name, variant, shared_bytes)
        stream = torch.cuda.current_stream().cuda_stream
        pointer = ctypes.c_void_p(ctypes.addressof(arguments))
        address = ctypes.addressof(pointer)
        _call(driver.cuLaunchKernel, function, blocks, 1, 1, threads, 1, 1, shared_bytes, stream, address, 0)

    def _function(self, name: str, variant: Macros, shared_bytes: int) -> Any:
        if variant not in self._modules:
            self._modules[variant] = _call(driver.cuModuleLoadData, self._compile(variant))
        function = _call(driver.cuModuleGetFunction, self._modules[variant], name.encode())
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _call(driver.cuFuncSetAttribute, function, limit, shared_bytes)
        self._functions[name, variant] = function
        return function

    def _compile(self, variant: Macros) -> bytes:
        major, minor = torch.cuda.get_device_capability(self._device)
        own, known = 10 * major + minor, _call(nvrtc.nvrtcGetSupportedArchs)
        # of a device that is newer than this NVRTC: what runs on all of its family
        arch = max((each for each in known if 10 * major <= each <= own), default=own)
        # no product may be fused into a sum: it would round once where the specification rounds twice
        options = [f"--gpu-architecture=sm_{arch}", "--fmad=false"]
        options += [f"-D{name.upper()}={int(value)}" for name, value in variant._asdict().items()]
        program = _call(nvrtc.nvrtcCreateProgram, self._source.encode(), b"directions.cu", 0, [], [])
        try:
            _call(nvrtc.nvrtcCompileProgram, program, len(options), [option.encode() for option in options])
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            log = b" " * _call(nvrtc.nvrtcGetProgramLogSize, program)
            _call(nvrtc.nvrtcGetProgramLog, program, log)
            raise RuntimeError(f"{error}: {log.decode(errors='replace')}") from error
        binary: bytes = b" " * _call(nvrtc.nvrtcGetCUBINSize, program)
        _call(nvrtc.nvrtcGetCUBIN, program, binary)
        _call(nvrtc.nvrtcDestroyProgram, program)
        return binary


def shared_memory_of_a_block(device: torch.device) -> int:
    """Most bytes of shared memory that a kernel can ask for."""
    attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    return int(_call(driver.cuDeviceGetAttribute, attribute, device.index))


def _call(function: Any, *arguments: Any) -> Any:
    """What a function of the bindings returns beside its status, which is checked.

    Raises:
        OutOfMemoryError: There is no memory for it, though torch gave back what it does not use.
        RuntimeError: It failed otherwise.
    """
    status, *values = function(*arguments)
    if int(status) != 0 and status.name.endswith(_OUT_OF_MEMORY):  # the driver takes memory beside torch's allocator
        torch.cuda.empty_cache()
        status, *values = function(*arguments)
    if int(status) != 0:
        kind = torch.OutOfMemoryError if status.name.endswith(_OUT_OF_MEMORY) else RuntimeError
        raise kind(f"{function.__name__} failed: {status.name}")
    return values[0] if values else None
