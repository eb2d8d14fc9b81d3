"""The GPU kernels of a sketch where triton is installed: by its interpreter on any machine, and on a CUDA device."""

from __future__ import annotations

import importlib
import os
from typing import Any, NamedTuple

import pytest
import torch

from fedzo.sketch.gpu import kernels_for


class OnDevice(NamedTuple):
    kernels: Any
    device: torch.device


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def on_device(request: pytest.FixtureRequest) -> OnDevice:
    """The kernels and where their tensors lie. Triton interprets or compiles for all of a process, by the variable."""
    pytest.importorskip("triton", reason="triton is not installed: pip install triton; torch for CUDA brings it")
    interprets = os.environ.get("TRITON_INTERPRET") == "1"
    if interprets != (request.param == "interpreter"):
        pytest.skip("TRITON_INTERPRET=1 runs the kernels on a CPU, and without it they need a CUDA device")
    if interprets:
        return OnDevice(importlib.import_module("fedzo.sketch.triton_kernels").Kernels(4), torch.device("cpu"))
    device = torch.device("cuda", torch.cuda.current_device())
    kernels = kernels_for(torch.empty(0, device=device), 4)
    assert kernels is not None
    return OnDevice(kernels, device)
