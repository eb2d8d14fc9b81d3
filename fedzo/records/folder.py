"""Files of a run folder: their names, no link is followed, and a file is replaced whole or not at all.

A run folder may come from somebody else. What lies in it must not lead a command to files elsewhere.
"""

from __future__ import annotations

import fcntl
import logging
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from fedzo.errors import FedzoError, FolderInUseError, RunFolderError

log = logging.getLogger(__name__)
PUBLIC, AUDIT, METRICS = "public.jsonl", "audit.jsonl", "metrics.jsonl"
"""The logs of a run."""
CONFIG, CONFIG_YAML, OVERRIDES, ENVIRONMENT = "config.json", "config.yaml", "overrides.yaml", "environment.json"
"""How the run was launched on this machine: read by fedzo, for people, the words of the command line, the versions."""
RUN_FILE, SITE_FILE = "run.json", "site.json"
"""What all peers of the run agree on, and what is this machine's own."""
PRESENCE = "presence.json"
"""Who takes part at the moment, for ``fedzo status``."""
STOP = "stop"
"""An empty file that asks whoever runs the run to end it between two rounds."""
FAILED = "failed.json"
"""Why a sweep's job failed; its next start removes it."""
MULTIRUN = "multirun.yaml"
"""In a sweep's folder, by which it is known: the words of its command line."""
REPORT, LOG, CLIENTS_LOG = "report.html", "fedzo.log", "logs/clients.log"
"""The page, warnings of the run, and what clients in processes of their own, on the server's machine, tell."""
LOCK = ".lock"
"""In a folder that a process has to itself: the empty file that it has locked."""
_LOOK_S = 0.05
_NOBODY = 65534  # as whom a container shows a user of its host that has no number in it


@contextmanager
def raised_as(kind: type[FedzoError], rule: str, remedy: str = "") -> Iterator[None]:
    """Raise an error of the system as one of fedzo's; what is fedzo's already is let through as it is.

    Args:
        kind: The error to raise.
        rule: Where, and what must hold, such as ``mask file x: it must be writable``.
        remedy: What to do; ends the message.
    """
    try:
        yield
    except FedzoError:  # one on a run folder is an OSError, too
        raise
    except OSError as error:
        raise kind(f"{rule}, got {error.strerror or str(error)!r}. {remedy}".rstrip()) from error


def open_file(folder: Path, name: str, flags: int = os.O_RDONLY, *, mode: int = 0o666) -> int:
    """A descriptor of a regular file below a folder; the folder itself may be reached by a link.

    A file that root makes belongs to the owner of the folder that it lies in.

    Args:
        folder: The run folder.
        name: Of the file in it, such as ``vectors/ab12``.
        flags: As for ``os.open``.
        mode: Who may do what with a file that is made, less what the process's umask takes away.

    Raises:
        RunFolderError: The file, or a folder on the way to it, is a link, or it is no regular file.
        OSError: It cannot be opened.
    """
    *rooms, last = Path(name).parts
    room = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for inner in rooms:
            outer, room = room, os.open(inner, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=room)
            os.close(outer)
        # without waiting: a pipe would never open
        opened = _open_in(room, last, flags | os.O_NOFOLLOW | os.O_NONBLOCK, mode)
    except OSError as error:
        error.filename = str(folder / name)  # not its last name alone
        for depth in range(len(rooms) + 1):
            refuse_link(folder.joinpath(*rooms[:depth], [*rooms, last][depth]))
        raise
    finally:
        os.close(room)
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise RunFolderError(f"{folder / name}: it must be a regular file, but is none. Restore the file from a copy.")
    return opened


def _open_in(room: int, name: str, flags: int, mode: int) -> int:
    while flags & os.O_CREAT:
        with suppress(FileExistsError):
            made = os.open(name, flags | os.O_EXCL, mode, dir_fd=room)
            keep_owner(made, os.fstat(room))
            return made
        with suppress(FileNotFoundError):  # another process has just removed it
            return os.open(name, flags & ~os.O_CREAT, dir_fd=room)
    return os.open(name, flags, dir_fd=room)


def read_file(folder: Path, name: str) -> bytes:
    """All of a file of a run folder; errors as in ``open_file``."""
    with os.fdopen(open_file(folder, name), "rb") as file:
        return file.read()


def replace_file(path: Path, content: str | bytes, *, durable: bool = False, mode: int = 0o666) -> None:
    """Write a file: all of it, or what was there stays. A link in its place is replaced, not followed.

    A file that root replaces keeps its owner, and a new one belongs to the owner of its folder.

    Args:
        path: The file.
        content: A text is written as UTF-8.
        durable: Return only when it is on the disk.
        mode: Who may do what with it, less what the process's umask takes away.

    Raises:
        OSError: It cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.unlink(missing_ok=True)
        opened = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)  # never what lies there already
        with os.fdopen(opened, "wb") as file:
            replaced = None
            with suppress(FileNotFoundError):
                replaced = path.lstat()
            keep_owner(opened, path.parent.stat(), replaced)
            file.write(content.encode() if isinstance(content, str) else content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        part.replace(path)
    finally:
        if part.exists():
            part.unlink()
    if durable:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Have the names of a folder's files on the disk, too."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def make_folder(folder: Path, *, mode: int = 0o777) -> Path:
    """A folder to write into, made if it is not there; one that root makes belongs to the owner of the folder above it.

    So do folders above it that are missing, too.

    Args:
        folder: The folder.
        mode: Who may do what with it if it is made, less what the process's umask takes away.

    Raises:
        RunFolderError: It is a link.
        OSError: It cannot be made.
    """
    refuse_link(folder)
    if not folder.parent.exists():
        make_folder(folder.parent)
    try:
        folder.mkdir(mode)
    except OSError:  # a read-only file system may say so of a folder that is there
        if not folder.is_dir():
            raise
        return folder
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        keep_owner(opened, folder.parent.stat())
    finally:
        os.close(opened)
    return folder


def keep_owner(opened: int, folder: os.stat_result, replaced: os.stat_result | None = None) -> None:
    """Have what root has made belong to the owner of what it replaces, or else of its folder.

    A service, which is another user, can then read its own files, also when somebody has called a command by ``sudo``.
    In a folder that everybody may write into, anybody may have put there what is replaced: nothing is given away. A
    group that may write into it is trusted.

    Args:
        opened: What was made.
        folder: In which it lies.
        replaced: What had its name before, if anything.
    """
    owner = replaced or folder
    if os.geteuid() != 0 or folder.st_mode & stat.S_IWOTH or owner.st_uid in (0, _NOBODY):
        return
    with suppress(OSError):  # of a file system that knows no owners
        os.fchown(opened, owner.st_uid, owner.st_gid)


@contextmanager
def folder_of_one_process(folder: Path, what: str = "run folder") -> Iterator[None]:
    """Have a folder to oneself, among those who ask by this.

    Args:
        folder: The folder.
        what: It is, for the message.

    Raises:
        FolderInUseError: Another process has it.
        RunFolderError: A link has the name of the file that is locked.
        OSError: That file cannot be made.
    """
    # a file that is open for writing: NFS locks a folder for one machine alone, and no file that is only read
    opened = open_file(folder, LOCK, os.O_RDWR | os.O_CREAT)
    try:
        lock_file(opened, folder, what)
        yield
    finally:
        os.close(opened)


def lock_file(opened: int, folder: Path, what: str = "run folder") -> None:
    """Lock an open file, for as long as it is open; ``FolderInUseError`` if another process has it.

    A file system that knows no locks lets everybody in; a warning says so.
    """
    for wait_s in (_LOOK_S, None):  # another process may only be looking whether somebody has it
        try:
            return fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if wait_s is None:
                text = f"{what} {folder}: another process is using it. Wait for it, or end it."
                raise FolderInUseError(text) from error
            time.sleep(wait_s)
        except OSError as error:
            return _tell_of_no_lock(folder.resolve(), what, error.strerror)


@cache  # once a folder
def _tell_of_no_lock(folder: Path, what: str, reason: object) -> None:
    log.warning("%s %s: it cannot be locked (%s). Let no other process use it meanwhile.", what, folder, reason)


def is_locked(file: Path) -> bool | None:
    """Whether another process has locked a file; one that is not there is not. None where nobody can know.

    Raises:
        RunFolderError: It is a link, or no regular file.
        OSError: It cannot be opened.
    """
    try:
        opened = open_file(file.parent, file.name)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # its file system knows no locks
        return None
    finally:
        os.close(opened)
    return False


def refuse_link(path: Path) -> None:
    """Raise ``RunFolderError`` where a path is a link."""
    if path.is_symlink():
        raise RunFolderError(
            f"{path}: it must lie in its folder itself, got a link to {path.readlink()}. Links there are not "
            "followed. Put a copy of what it leads to in its place."
        )
