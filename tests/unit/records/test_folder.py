"""Who has a run folder, and who only looks."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedzo.errors import FolderInUseError
from fedzo.records import folder
from fedzo.records.folder import is_locked, lock_file


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[tuple[int, int]]:
    """One file, opened by two."""
    (tmp_path / "log").touch()
    both = os.open(tmp_path / "log", os.O_RDONLY), os.open(tmp_path / "log", os.O_RDONLY)
    yield both
    for each in both:
        os.close(each)


def test_a_look_at_the_same_instant_does_not_take_the_lock_from_who_needs_it(
    opened: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, needs = opened
    fcntl.flock(looks, fcntl.LOCK_SH)  # as `fedzo status` does for an instant
    monkeypatch.setattr(folder.time, "sleep", lambda seconds: fcntl.flock(looks, fcntl.LOCK_UN))

    lock_file(needs, tmp_path)

    assert is_locked(tmp_path / "log")


def test_whoever_keeps_it_is_told_of(opened: tuple[int, int], tmp_path: Path) -> None:
    has, needs = opened
    assert not is_locked(tmp_path / "log")
    lock_file(has, tmp_path)

    with pytest.raises(FolderInUseError, match="another process is using it"):
        lock_file(needs, tmp_path)


def test_a_file_on_a_file_system_without_locks_is_not_known_to_be_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(opened: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    (tmp_path / "log").touch()
    monkeypatch.setattr(folder.fcntl, "flock", refused)

    assert not is_locked(tmp_path / "log")
