"""What memory there is, and what weights will take of it."""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fedzo import system
from fedzo.errors import ConfigError
from fedzo.models import available
from fedzo.models.available import (
    Held,
    attends_plainly,
    available_memory_bytes,
    held_bytes,
    mapped_bytes,
    max_memory_bytes,
)
from fedzo.models.config import DType, ModelConfig, Quantization
from fedzo.models.load import load_model
from fedzo.models.memory import weights_bytes
from fedzo.run import costs
from fedzo.system import is_out_of_memory
from fedzo.testing.tiny_models import tiny_loaded
from fedzo.testing.vector_space import VectorSpace

GIB = 1 << 30
CPU = torch.device("cpu")
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says of memory")


@pytest.fixture
def mapped(tmp_path: Path) -> Iterator[torch.Tensor]:
    """64 MiB of bfloat16, as transformers reads them where nothing is cast."""
    save_file({"w": torch.ones(32 << 20, dtype=torch.bfloat16)}, tmp_path / "w.safetensors")
    with safe_open(tmp_path / "w.safetensors", framework="pt") as stored:
        yield stored.get_slice("w")[...]


def files_of(folder: Path) -> list[Path]:
    return [folder / "model.safetensors"]


@pytest.mark.parametrize("dtype", [DType.float32, DType.bfloat16, DType.float16, DType.auto])
def test_the_headers_tell_what_a_model_takes_once_it_is_loaded(dtype: DType, folder: Path) -> None:
    config = ModelConfig(name=str(folder), dtype=dtype)
    held = held_bytes(config, files_of(folder))

    assert held is not None
    assert held.total == weights_bytes(load_model(config, device="cpu").model)
    assert (held.copied == 0) == (dtype in (DType.float32, DType.auto))  # as it is stored
    assert 0 in held


@pytest.mark.parametrize(("kind", "width"), [(Quantization.nf4, 0.5625), (Quantization.int8, 1.0)])
def test_packed_weights_count_packed_and_embeddings_and_norms_do_not(
    kind: Quantization, width: float, folder: Path
) -> None:
    linear = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32)  # of 2 layers: q, o; k, v; gate, up, down
    others = 34_976 - linear

    def held(dtype: DType) -> Held | None:
        return held_bytes(ModelConfig(quantization=kind, dtype=dtype), files_of(folder))

    assert held(DType.float32) == Held(int(width * linear), 4 * others)
    assert held(DType.bfloat16) == Held(int(width * linear) + 2 * others, 0)


def test_codes_are_held_as_they_are_stored(tmp_path: Path) -> None:
    stored = {"a.codes": torch.zeros(30, dtype=torch.uint8), "a.table": torch.zeros(7, dtype=torch.bfloat16)}
    save_file(stored, tmp_path / "model.safetensors")

    assert held_bytes(ModelConfig(), files_of(tmp_path)) == Held(4 * 7, 30)


@pytest.mark.parametrize(("gpu", "expected"), [(False, Held(2 * (100 + 10 + 2 * 30), 4)), (True, Held(0, 144))])
def test_what_is_unpacked_where_there_is_no_gpu_counts_unpacked(
    gpu: bool, expected: Held, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    stored = {
        "q_proj.weight": torch.zeros(100, dtype=torch.float8_e4m3fn),
        "k_proj.weight": torch.zeros(10, dtype=torch.float8_e5m2),
        "experts.down_proj_blocks": torch.zeros(30, dtype=torch.uint8),
        "experts.down_proj_scales": torch.zeros(4, dtype=torch.uint8),
    }
    save_file(stored, tmp_path / "model.safetensors")

    assert held_bytes(ModelConfig(dtype=DType.bfloat16), files_of(tmp_path)) == expected


@pytest.mark.parametrize(
    "content", [b"", b"GGUF\3\0\0\0" + bytes(40), b"\2\0\0\0\0\0\0\0[]", b"version https://git-lfs"]
)
def test_of_another_file_nothing_is_said(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)

    assert held_bytes(ModelConfig(), files_of(tmp_path)) is None
    assert held_bytes(ModelConfig(), [tmp_path / "none"]) is None


def test_weights_that_no_memory_can_hold_are_refused_before_they_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*args: object, **kwargs: object) -> None:
        raise AssertionError

    monkeypatch.setattr(available, "max_memory_bytes", lambda: 34_976 * 2 - 1)
    monkeypatch.setattr("fedzo.models.load.read_model", read)

    with pytest.raises(
        ConfigError, match=r"memory of cpu must hold the weights in bfloat16, which take 0 MiB, but has"
    ) as told:
        load_model(ModelConfig(name=str(folder), dtype=DType.bfloat16), device="cpu")

    assert is_out_of_memory(told.value)


def test_weights_that_just_fit_or_stay_in_their_files_are_not_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(available, "max_memory_bytes", lambda: 34_976 * 2)

    load_model(ModelConfig(name=str(folder), dtype=DType.bfloat16), device="cpu")
    load_model(ModelConfig(name=str(folder)), device="cpu")
    assert not caplog.records

    monkeypatch.setattr(available, "available_memory_bytes", lambda device: 34_976 * 4 - 1)
    load_model(ModelConfig(name=str(folder)), device="cpu")
    assert "of the memory of cpu are free. Free some, write model.dtype=bfloat16" in caplog.text


@pytest.mark.parametrize(
    ("config", "ways"),
    [
        (ModelConfig(), "Free some, write model.dtype=bfloat16, train an adapter with model.quantization=nf4, or take"),
        (ModelConfig(dtype=DType.bfloat16), "Free some, train an adapter with model.quantization=nf4, or take a"),
        (ModelConfig(dtype=DType.float16, quantization=Quantization.nf4), "Free some, or take a sketch or a smaller"),
    ],
)
def test_no_remedy_is_what_is_so_already(config: ModelConfig, ways: str) -> None:
    assert available.ways_to_fit(config, CPU).startswith(ways)


@pytest.mark.parametrize(
    ("device", "dtype", "major", "plainly"),
    [
        ("cuda", torch.bfloat16, 7, True),  # a T4
        ("cuda", torch.bfloat16, 8, False),
        ("cuda", torch.float16, 7, False),
        ("cuda", torch.float32, 7, False),
        ("cpu", torch.bfloat16, 0, False),
        ("mps", torch.bfloat16, 0, False),
    ],
)
def test_a_gpu_before_ampere_has_no_fused_attention_in_bfloat16_which_is_no_remedy_there(
    device: str, dtype: torch.dtype, major: int, plainly: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))
    where = torch.device(device)

    assert attends_plainly(where, dtype) is plainly
    narrow = "float16" if (device, major) == ("cuda", 7) else "bfloat16"
    assert f"write model.dtype={narrow}," in available.ways_to_fit(ModelConfig(), where)


def test_a_large_file_of_another_format_is_not_read_as_a_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first bytes of a GGUF file, as a length, are 13 GiB."""
    file, asked = tmp_path / "model.gguf", []
    with file.open("wb") as opened:
        opened.write(b"GGUF\3\0\0\0")
        opened.truncate(20 << 30)
    monkeypatch.setattr(available.json, "loads", lambda text: asked.append(len(text)) or {})

    held_bytes(ModelConfig(), [file])

    assert asked == [0]


def test_a_system_that_tells_of_no_mapped_pages_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """As psutil is where there is no /proc/PID/smaps."""
    monkeypatch.delattr(psutil.Process, "memory_maps", raising=False)

    assert mapped_bytes() == 0


def cgroup(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("_", ".")).write_text(f"{content}\n")


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A process in the group ``site/run`` of a machine with 64 GiB, of which 60 are available, and 2 of swap."""
    monkeypatch.setattr(system, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(system, "OWN_CGROUP", tmp_path / "own")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * GIB, available=60 * GIB))
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(total=2 * GIB))
    (tmp_path / "own").write_text("4:memory:/other\n0::/site/run\n")
    return tmp_path / "cgroup"


@linux
def test_limits_of_groups_around_the_process_count(groups: Path) -> None:
    assert (available_memory_bytes(CPU), max_memory_bytes()) == (60 * GIB, 66 * GIB)

    stat = f"anon {GIB}\ninactive_file {GIB}\nactive_file {2 * GIB}"
    cgroup(groups / "site", memory_max=8 * GIB, memory_current=5 * GIB, memory_stat=stat)
    cgroup(groups / "site" / "run", memory_max="max", memory_current=4 * GIB, memory_stat=stat)
    cgroup(groups / "site" / "other", memory_max=1)
    assert (available_memory_bytes(CPU), max_memory_bytes()) == (6 * GIB, 10 * GIB)

    cgroup(groups / "site" / "run", memory_max=6 * GIB, memory_swap_max=0)
    assert (available_memory_bytes(CPU), max_memory_bytes()) == (5 * GIB, 6 * GIB)


@linux
def test_a_container_sees_its_limit_at_the_root(groups: Path) -> None:
    """Docker mounts the container's own group there, whatever its path outside."""
    cgroup(groups, memory_max=3 * GIB, memory_current=4 * GIB)

    assert available_memory_bytes(CPU) == 0


def test_memory_of_a_gpu_that_torch_keeps_and_nobody_uses_can_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20)

    assert available_memory_bytes(torch.device("cuda", 0)) == 130


def test_the_machine_has_some_memory() -> None:
    assert 1 << 20 < available_memory_bytes(CPU) < max_memory_bytes()


@linux
def test_weights_that_are_mapped_count_until_they_are_written_to(mapped: torch.Tensor) -> None:
    before = mapped_bytes()
    assert before >= 64 << 20
    assert mapped.float().sum() == 32 << 20  # a read leaves them in their file
    assert abs(mapped_bytes() - before) < 4 << 20

    mapped[: 16 << 20] = 2

    assert abs(before - mapped_bytes() - (32 << 20)) < 4 << 20


@linux
def test_what_a_probe_will_copy_is_the_pages_of_trained_values(mapped: torch.Tensor) -> None:
    def copied(size: int, *parameters: torch.Tensor) -> int:
        space: Any = SimpleNamespace(size=size, parameters=parameters)
        return costs._copied_on_write(space, 0)

    values_a_page = mmap.PAGESIZE // 2

    assert copied(32 << 20, mapped) == 64 << 20
    assert copied(32 << 20, mapped[: 16 << 20]) == 32 << 20
    expected = 1 - (1 - 1e-3) ** values_a_page
    assert math.isclose(copied((32 << 20) // 1000, mapped), expected * (64 << 20), rel_tol=1e-3)
    assert copied(3, mapped) <= 3 * mmap.PAGESIZE
    assert copied(3) == 0
    mapped.fill_(2)
    assert copied(32 << 20, mapped) < 8 << 20  # taken already, so no longer free
    space: Any = SimpleNamespace(size=mapped.numel(), parameters=[mapped])
    assert costs._copied_on_write(space, 200 * mapped.nbytes) == 0  # too few to look


@linux
def test_batches_leave_room_for_mapped_weights_that_are_trained(
    mapped: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Mapped(VectorSpace):
        parameters = (torch.nn.Parameter(mapped, requires_grad=False),)

        @property
        def size(self) -> int:
            return 32 << 20

        def step_bytes(self, local_steps: int) -> int:
            return 20 << 20

    def fit(space: Any) -> int:
        return costs.fitting_tokens_per_batch(
            tiny_loaded(), space, wanted=4096, longest=100, local_steps=1, num_moments=0
        )

    monkeypatch.setattr(costs, "available_memory_bytes", lambda device: 92 << 20)

    assert fit(VectorSpace(np.zeros(1 << 20, np.float32))) == 4096
    assert fit(Mapped(np.zeros(1, np.float32))) == 2048


@pytest.mark.parametrize(("free", "warned"), [(9 * 34_976 * 4, False), (9 * 34_976 * 4 - 1, True)])
def test_a_model_for_each_process_is_warned_of(
    free: int, warned: bool, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(costs, "available_memory_bytes", lambda device: free)

    costs.warn_of_copies(ModelConfig(name=str(folder)), device="cpu", num_copies=9, are_written=True)

    assert ("9 in all, which take 1.3 MB, but 1.3 MB are free. Write runtime=inline" in caplog.text) == warned
    caplog.clear()

    costs.warn_of_copies(ModelConfig(name=str(folder)), device="cpu", num_copies=9, are_written=False)

    assert not caplog.records  # all share the pages of the file


def test_a_model_that_is_not_there_is_not_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    costs.warn_of_copies(ModelConfig(name=str(tmp_path / "none")), device="cpu", num_copies=9, are_written=True)

    assert not caplog.records
