"""What a space needs beside the model, as files that are named by their SHA-256: Meerkat's mask, an adapter's seed.

A file gets its name only when all of it is on the disk and its digest is right. A file that an earlier process left is
hashed once, when it is first asked for.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from fedzo.errors import ProtocolError
from fedzo.models.digest import file_digest
from fedzo.records.fields import HASH
from fedzo.records.folder import keep_owner, make_folder, open_file, refuse_link

log = logging.getLogger(__name__)
ARTIFACTS = "artifacts"
"""The store's name within a run folder."""
PIECE_BYTES = 4 << 20
"""What travels at a time; the last piece of an artifact may be shorter."""
MAX_BYTES = 2 << 30
"""Of an artifact that a site takes from a peer, where it does not say otherwise."""


@dataclass(frozen=True, slots=True)
class Artifact:
    """A checked file of a store.

    Attributes:
        digest: SHA-256 of the content, hexadecimal.
        size: Bytes.
        path: The file, which never changes. Map it into memory where a copy would be too large.
    """

    digest: str
    size: int
    path: Path

    def read(self) -> bytes:
        """The whole content."""
        return self.path.read_bytes()

    def __str__(self) -> str:
        return name_of(self.digest)


EMPTY = Artifact(digest=hashlib.sha256().hexdigest(), size=0, path=Path(os.devnull))
"""Of a space that the model alone defines. Every store holds it."""


@dataclass(slots=True)
class ArtifactStore:
    """A folder of artifacts. Several processes may use it at the same time.

    Attributes:
        folder: Made when the first artifact comes.
    """

    folder: Path
    _checked: dict[str, Artifact] = field(default_factory=lambda: {EMPTY.digest: EMPTY})
    _spoilt: dict[str, tuple[int, int]] = field(default_factory=dict)
    """The files, by digest, that were hashed and are something else: each is hashed once."""

    def find(self, digest: str) -> Artifact | None:
        """The artifact with this digest, if it is here and whole; looking for it changes nothing.

        A file that is not what its name says is told of, and stays until the right one takes its place: whoever removed
        it might hit the right one, which another process has just put there.

        Raises:
            ProtocolError: No digest; a peer may have sent it, and it must not become a path.
            RunFolderError: It is a link.
        """
        if not HASH.fullmatch(digest):
            raise ProtocolError(f"artifact: its digest must be 64 hexadecimal digits, got {digest!r:.80}.")
        path = self.folder / digest
        if digest not in self._checked and path.is_file():
            refuse_link(self.folder)
            refuse_link(path)
            before = path.stat()
            seen = (before.st_ino, before.st_mtime_ns)
            if self._spoilt.get(digest) == seen:
                return None
            if file_digest(path) == digest:
                self._checked[digest] = Artifact(digest, path.stat().st_size, path)
            else:
                self._spoilt[digest] = seen
                log.warning("%s: its SHA-256 must be its name, got another. It is received again.", path)
        return self._checked.get(digest)

    def put(self, content: bytes | Path) -> Artifact:
        """Keep bytes, or a copy of a file."""
        if not content:
            return EMPTY
        make_folder(self.folder)
        with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".part", delete=False) as file:
            try:
                keep_owner(file.fileno(), self.folder.stat())
                if isinstance(content, bytes):
                    file.write(content)
                    digest = hashlib.sha256(content).hexdigest()
                else:
                    with content.open("rb") as given:
                        shutil.copyfileobj(given, file)
                    digest = file_digest(content)
                file.flush()
                return self._complete(Path(file.name), digest)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise

    def append(self, digest: str, size: int, *, offset: int, data: bytes) -> int:
        """Take the next piece of an artifact from a peer, or none; what was taken stays when the process ends.

        Args:
            digest: Of the whole artifact.
            size: Of the whole artifact.
            offset: Place of the piece. A piece that is not the next one is not taken.
            data: ``PIECE_BYTES``, or less at the artifact's end; empty asks how much is here.

        Returns:
            Bytes from the start that are here now; ``size`` once the artifact is whole.

        Raises:
            ProtocolError: All of it is here and is not what its digest names.
        """
        if self.find(digest):
            return size
        if size < 1:
            raise ProtocolError(f"{name_of(digest)}: it must have at least 1 byte, got {size}.")
        make_folder(self.folder)
        part = self.folder / f"{digest}.part"
        with _open_alone(part) as file:
            if self.find(digest):  # another process was faster
                part.unlink(missing_ok=True)
                return size
            held = file.seek(0, os.SEEK_END)
            held = 0 if held > size else held - held % PIECE_BYTES  # a kill may have torn the last piece
            file.truncate(held)
            if data and offset == held:
                held += file.write(data)
                file.flush()
            if held < size:
                return held
            if (found := file_digest(part)) != digest:
                part.unlink(missing_ok=True)
                raise ProtocolError(f"{name_of(digest)}: its SHA-256 must be {digest}, got {found}. Send it again.")
            self._complete(part, digest)
        return size

    def keep_only(self, digest: str) -> None:
        """Remove other artifacts, whole or in part; what else lies in the folder stays."""
        for path in self.folder.glob("*"):
            if HASH.match(path.name) and not path.name.startswith(digest):
                path.unlink(missing_ok=True)
                self._checked.pop(path.name, None)

    def _complete(self, part: Path, digest: str) -> Artifact:
        """Give a file with the right content its name, once it is on the disk."""
        with part.open("rb") as file:
            os.fsync(file.fileno())
        path = part.replace(self.folder / digest)
        path.chmod(0o644)  # temporary files are private
        self._checked[digest] = Artifact(digest, path.stat().st_size, path)
        return self._checked[digest]


def name_of(digest: str) -> str:
    """An artifact in a message to a person."""
    return f"artifact {digest[:12]}"


@contextmanager
def _open_alone(part: Path) -> Iterator[BinaryIO]:
    """A file to append to, which no other process has opened by this where the file system knows locks."""
    while True:
        opened = open_file(part.parent, part.name, os.O_RDWR | os.O_APPEND | os.O_CREAT)
        with os.fdopen(opened, "a+b") as file:
            with suppress(OSError):  # of a file system without locks: what two processes mix up has another digest
                fcntl.flock(file, fcntl.LOCK_EX)
            try:
                current = os.path.samestat(os.fstat(file.fileno()), part.stat())
            except FileNotFoundError:
                current = False
            if current:  # else the process before this one has renamed or removed it
                yield file
                return
