"""Folders of models appear whole or not at all, and a disk that refuses is an ``OSError``."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fedzo.models.saved import disk_errors, whole_folder


def test_what_the_disk_refuses_safetensors_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as refused, disk_errors():
        save_file({"a": torch.zeros(3)}, tmp_path / "absent" / "f")

    assert (refused.value.errno, refused.value.strerror) == (errno.ENOENT, "No such file or directory")


def test_other_errors_of_safetensors_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"no header")

    with pytest.raises(SafetensorError), disk_errors(), safe_open(tmp_path / "f", framework="pt"):
        pass


def write_and_fail(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    raise ZeroDivisionError


@pytest.mark.parametrize("is_there", [False, True])
def test_a_folder_is_whole_or_not_there(is_there: bool, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    build = tmp_path / "new" / "out.part"  # of a sketch that is being built: not ours
    build.mkdir(parents=True)
    if is_there:
        out.mkdir()

    with pytest.raises(ZeroDivisionError), whole_folder(out) as part:
        write_and_fail(part)
    assert sorted(each.name for each in out.parent.iterdir()) == (["out", "out.part"] if is_there else ["out.part"])
    assert not (is_there and list(out.iterdir()))

    with whole_folder(out) as part:
        (part / "config.json").write_text("{}")
        (part / "sub").mkdir()
        (part / "sub" / "f").write_text("f")
        assert not (out / "config.json").exists()

    assert sorted(each.name for each in out.parent.iterdir()) == ["out", "out.part"]
    assert (out / "config.json").read_text() == "{}"
    assert (out / "sub" / "f").read_text() == "f"


def test_what_a_killed_process_of_the_same_number_left_is_in_nobodys_way(tmp_path: Path) -> None:
    left = tmp_path / f".out.{os.getpid()}.part"  # in a container a command often has the number of the one before
    left.mkdir()
    (left / "model.safetensors").write_text("half")

    with whole_folder(tmp_path / "out") as part:
        (part / "config.json").write_text("{}")

    assert [each.name for each in tmp_path.rglob("*")] == ["out", "config.json"]


def test_a_link_to_an_empty_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")

    with whole_folder(tmp_path / "out") as part:
        (part / "config.json").write_text("{}")

    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "config.json").exists()
