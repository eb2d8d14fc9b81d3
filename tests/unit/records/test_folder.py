"""Who has a run folder, and who only looks; how an error of the system on a file is told."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedzo.errors import ConfigError, FolderInUseError, RunFolderError
from fedzo.records import folder
from fedzo.records.folder import (
    LOCK,
    folder_of_one_process,
    is_locked,
    lock_file,
    make_folder,
    open_file,
    raised_as,
    read_file,
    replace_file,
)


@pytest.mark.parametrize(
    ("error", "got"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "mask"), "No space left on device"),
        (OSError("a library's own words"), "a library's own words"),
    ],
)
def test_an_error_of_the_system_is_told_with_the_rule_and_the_remedy(error: OSError, got: str) -> None:
    with pytest.raises(ConfigError) as told, raised_as(ConfigError, "mask file x: it must be writable", "Make room."):
        raise error

    assert str(told.value) == f"mask file x: it must be writable, got {got!r}. Make room."
    assert told.value.__cause__ is error


def test_what_fedzo_says_of_a_file_is_not_told_as_another_error(tmp_path: Path) -> None:
    """A link's error is an OSError, too, of which the system has no words."""
    (tmp_path / "log").symlink_to(tmp_path / "elsewhere")

    words = "log: it must lie in its folder itself, got a link to"
    with pytest.raises(RunFolderError, match=words), raised_as(ConfigError, "log: it must be readable"):
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


def test_what_is_locked_of_a_folder_is_a_file_that_is_open_for_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS locks a folder for one machine alone, and no file for one process that only reads it."""
    flock, locked = fcntl.flock, list[tuple[bool, int]]()

    def lock(opened: int, how: int) -> None:
        locked.append((stat.S_ISREG(os.fstat(opened).st_mode), fcntl.fcntl(opened, fcntl.F_GETFL) & os.O_RDWR))
        flock(opened, how)

    monkeypatch.setattr(folder.fcntl, "flock", lock)
    with folder_of_one_process(tmp_path):
        assert is_locked(tmp_path / LOCK)
    assert not is_locked(tmp_path / LOCK)

    assert locked[0] == (True, os.O_RDWR)


def test_a_link_in_place_of_the_file_that_is_locked_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / LOCK).symlink_to(tmp_path / "elsewhere")

    with pytest.raises(RunFolderError, match="must lie in its folder itself"), folder_of_one_process(tmp_path):
        pass

    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    "make", [lambda file: file.symlink_to(file.with_name("elsewhere")), os.mkfifo], ids=["a link", "a pipe"]
)
def test_who_looks_whether_somebody_has_a_file_follows_no_link_and_waits_at_no_pipe(
    make: Callable[[Path], None], tmp_path: Path
) -> None:
    """The folder may come from somebody else, and a pipe that nobody writes to would never open."""
    (tmp_path / "elsewhere").touch()
    make(tmp_path / LOCK)

    with pytest.raises(RunFolderError, match=r"it must (lie in its folder itself|be a regular file)"):
        is_locked(tmp_path / LOCK)


def test_an_error_of_the_system_names_all_of_the_files_path(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()

    with pytest.raises(FileNotFoundError) as told:
        open_file(tmp_path / "run", "logs/one")

    assert told.value.filename == str(tmp_path / "run" / "logs" / "one")


# --- whose is what root makes


def append(path: Path) -> None:
    """As a log is opened, or a file that is locked."""
    os.close(open_file(path.parent, path.name, os.O_RDWR | os.O_APPEND | os.O_CREAT))


MAKE: dict[str, Callable[[Path], object]] = {
    "file": lambda path: replace_file(path, "x"),
    "folder": make_folder,
    "log": append,
}


def owner(path: Path) -> tuple[int, int]:
    return path.lstat().st_uid, path.lstat().st_gid


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Whom root gives what it makes in this folder, which is another user's."""
    if os.geteuid() == 0:
        os.chown(tmp_path, 1001, 1002)
    told: list[tuple[int, ...]] = []
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "fchown", lambda opened, *to: told.append(to))
    return told


@pytest.mark.parametrize("what", MAKE)
def test_what_root_makes_is_the_owners_of_the_folder(what: str, tmp_path: Path, given: list[tuple[int, ...]]) -> None:
    MAKE[what](tmp_path / "new")

    assert given == [owner(tmp_path)]


@pytest.mark.parametrize("what", ["folder", "log"])
def test_what_is_there_stays_whose_it_is(what: str, tmp_path: Path, given: list[tuple[int, ...]]) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "log").touch()

    MAKE[what](tmp_path / what)

    assert given == []


@pytest.mark.parametrize("what", MAKE)
def test_in_a_folder_that_everybody_may_write_into_root_gives_nothing_away(
    what: str, tmp_path: Path, given: list[tuple[int, ...]]
) -> None:
    """Anybody may have put a file of this name there, to be given what root writes."""
    tmp_path.chmod(0o777)

    MAKE[what](tmp_path / "new")

    assert given == []


@pytest.mark.parametrize("what", MAKE)
def test_no_other_user_gives_anything_away(
    what: str, tmp_path: Path, given: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)

    MAKE[what](tmp_path / "new")

    assert given == []


@pytest.mark.parametrize("what", MAKE)
def test_where_a_file_system_knows_no_owners_files_are_written_all_the_same(
    what: str, tmp_path: Path, given: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(opened: int, *to: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "fchown", refused)

    MAKE[what](tmp_path / "new")

    assert (tmp_path / "new").exists()


def test_of_several_new_folders_each_is_given_away_and_the_mode_is_the_last_ones(
    tmp_path: Path, given_by_root: Callable[[], set[Path]]
) -> None:
    (tmp_path / "old").mkdir()
    mode = stat.S_IMODE((tmp_path / "old").stat().st_mode)

    last = make_folder(tmp_path / "a" / "b" / "c", mode=0o700)

    made = last, last.parent, last.parent.parent
    assert given_by_root() == {*made}
    assert [stat.S_IMODE(each.stat().st_mode) for each in made] == [0o700, mode, mode]


def test_a_file_in_the_way_of_a_folder_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    for way in ("file", "file/folder"):
        with pytest.raises(OSError, match=r"File exists|Not a directory"):
            make_folder(tmp_path / way)


def test_a_file_that_another_process_removes_while_it_is_opened_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "log").touch()
    opens = os.open

    def slow(name: object, flags: int, *mode: int, **where: int | None) -> int:
        if name == "log" and not flags & os.O_CREAT:
            (tmp_path / "log").unlink()
        return opens(name, flags, *mode, **where)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", slow)

    append(tmp_path / "log")

    assert (tmp_path / "log").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
@pytest.mark.parametrize(
    ("of_folder", "of_file", "new"),
    [
        ((1001, 1002), (1003, 1004), (1003, 1004)),
        ((1001, 1002), None, (1001, 1002)),
        ((0, 1002), (1003, 1004), (1003, 1004)),  # as on a volume of Kubernetes
        ((0, 0), None, (0, 0)),
        ((65534, 65534), None, (0, 0)),  # a user of the host that this container has no number for
    ],
)
def test_a_file_that_root_replaces_keeps_its_owner(
    of_folder: tuple[int, int], of_file: tuple[int, int] | None, new: tuple[int, int], tmp_path: Path
) -> None:
    os.chown(tmp_path, *of_folder)
    if of_file:
        (tmp_path / "file").touch()
        os.chown(tmp_path / "file", *of_file)

    replace_file(tmp_path / "file", "x", durable=True, mode=0o600)

    assert owner(tmp_path / "file") == new
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "file").read_text() == "x"
