"""Who has a run folder, and who only looks; how an error of the system on a file is told."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedzo.errors import ConfigError, FolderInUseError, RunFolderError
from fedzo.records import folder
from fedzo.records.folder import folder_of_one_process, is_locked, lock_file, read_file, told_as


@pytest.mark.parametrize(
    ("error", "got"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "mask"), "No space left on device"),
        (OSError("a library's own words"), "a library's own words"),
    ],
)
def test_an_error_of_the_system_is_told_with_the_rule_and_the_remedy(error: OSError, got: str) -> None:
    with pytest.raises(ConfigError) as told, told_as(ConfigError, "mask file x: it must be writable", "Make room."):
        raise error

    assert str(told.value) == f"mask file x: it must be writable, got {got!r}. Make room."
    assert told.value.__cause__ is error


def test_what_fedzo_says_of_a_file_is_not_told_as_another_error(tmp_path: Path) -> None:
    """A link's error is an OSError, too, of which the system has no words."""
    (tmp_path / "log").symlink_to(tmp_path / "elsewhere")

    words = "log: it must lie in the run folder itself, got a link to"
    with pytest.raises(RunFolderError, match=words), told_as(ConfigError, "log: it must be readable"):
        read_file(tmp_path, "log")


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


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file system knows none."""

    def refused(opened: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(folder.fcntl, "flock", refused)


@pytest.mark.usefixtures("no_locks")
def test_of_a_file_on_a_file_system_without_locks_nobody_knows_whether_it_is_locked(tmp_path: Path) -> None:
    (tmp_path / "log").touch()

    assert is_locked(tmp_path / "log") is None
    assert is_locked(tmp_path / "none") is False


@pytest.mark.usefixtures("no_locks")
def test_a_file_system_without_locks_lets_everybody_in_and_is_told_of_once(
    opened: tuple[int, int], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path.parent)
    for each, path in zip(opened, (tmp_path, Path(tmp_path.name)), strict=True):
        lock_file(each, path)
    with folder_of_one_process(tmp_path / ".." / tmp_path.name):
        pass

    told = "it cannot be locked (No locks available). Let no other process use it meanwhile."
    assert [record.getMessage() for record in caplog.records] == [f"run folder {tmp_path}: {told}"]
