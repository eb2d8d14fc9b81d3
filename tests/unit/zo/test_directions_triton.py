"""The fused CUDA kernel: interpreted on the CPU, compiled for a GPU that need not be there, and run on one that is."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fedzo.zo.config import Distribution
from fedzo.zo.directions import _fused, add_direction, direction

CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed; CUDA builds of torch bring it"
)

INTERPRET = """
import numpy as np
import torch
from fedzo.zo.config import Distribution
from fedzo.zo.directions import _table_on, add_direction, stream_key
from fedzo.zo.directions_triton import add_direction_fused

for law in Distribution:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for start, n in ((0, 1), (0, 1024), (1, 17), (5, 3000), (2**35 - 1000, 3001), (2**40 + 3, 130)):
            for seed in (0, 2**63 + 5):
                key = stream_key(seed, round=1)
                base = torch.linspace(-1, 1, n).to(dtype)
                base[:1] = torch.inf
                want = add_direction(base, key, scale=1e-3, start=start, distribution=law)
                settings = dict(scale=float(np.float32(1e-3)), start=start, table=_table_on(base.device))
                padded = torch.full((n + 2,), 7.0, dtype=dtype)
                add_direction_fused(base, key, out=padded[1:-1], distribution=law, **settings)
                assert torch.equal(padded[1:-1], want), (law, dtype, start, n)
                assert padded[0] == padded[-1] == 7, "written beyond the end"
                add_direction_fused(base, key, out=base, distribution=law, **settings)
                assert torch.equal(base, want), "in place"
"""

COMPILE = """
import re

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fedzo.zo.directions_triton import _add_kernel

for dtype in ("fp32", "bf16", "fp16"):
    for width, start in ((8, "i32"), (128, "i64")):
        types = dict(base="*" + dtype, out="*" + dtype, table="*fp32", scale="fp32", start=start, numel="i64",
                     k0="i32", k1="i32", WIDTH="constexpr", BLOCKS="constexpr")
        source = ASTSource(fn=_add_kernel, signature=types, constexprs={"WIDTH": width, "BLOCKS": 1024 // width})
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False}).asm["ptx"]
        assert all(re.search(name + r"(\\.rn)?\\.f32", ptx) for name in ("mul", "add")), "else this proves nothing"
        assert "fma" not in ptx and "ftz" not in ptx
"""


@needs_triton
@pytest.mark.parametrize(("code", "interpret"), [(INTERPRET, "1"), (COMPILE, "0")], ids=["interpreted", "compiled"])
def test_the_kernel_equals_the_cpus_bits_and_fuses_nothing(code: str, interpret: str, tmp_path: Path) -> None:
    """In processes of their own: triton reads the switch when it is imported, and keeps what it compiles."""
    script = tmp_path / "check.py"  # a file, since triton reads the source of its kernels
    script.write_text(code)

    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "TRITON_INTERPRET": interpret, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )

    assert done.returncode == 0, done.stderr


def test_without_triton_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "fedzo.zo.directions_triton", raising=False)

    assert _fused.__wrapped__(CPU) is None


@pytest.mark.parametrize("fault", [None, "bits", "compiler"])
def test_a_kernel_is_used_only_if_it_makes_the_specified_bits(
    fault: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def kernel(base: torch.Tensor, key: int, *, out: torch.Tensor, table: torch.Tensor, **settings: Any) -> None:
        if fault == "compiler":
            raise RuntimeError("Failed to find C compiler")
        add_direction(base, key, out=out, **settings)
        if fault == "bits":
            out[7] = torch.nextafter(out[7], torch.tensor(9.0))

    module = ModuleType("fedzo.zo.directions_triton")
    module.add_direction_fused = kernel
    monkeypatch.setitem(sys.modules, "fedzo.zo.directions_triton", module)

    found = _fused.__wrapped__(CPU)

    assert found is (None if fault else kernel)
    assert len(caplog.records) == (fault is not None)


@pytest.mark.gpu
@pytest.mark.parametrize("law", list(Distribution))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fused", [True, False])
def test_cuda_makes_the_cpus_bits_on_both_paths(
    law: Distribution, dtype: torch.dtype, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fused:
        monkeypatch.setattr("fedzo.zo.directions._fused", lambda device: None)
    elif find_spec("triton") is not None:
        assert _fused(torch.device("cuda", 0)) is not None
    n, start = 3_000_001, 2**35 - 1_000_003
    base = torch.from_numpy(direction(1, n)).to(dtype)

    there = add_direction(base.cuda(), 9, scale=1e-3, start=start, distribution=law)

    assert torch.equal(there.cpu(), add_direction(base, 9, scale=1e-3, start=start, distribution=law))
