"""Standard output of the commands: results are shown on it, and none fails for it."""

from __future__ import annotations

import errno
import io
import json
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fedzo.errors import ConfigError, FedzoError


class Output:
    """Standard output that no command fails for: what a terminal cannot show is replaced, what nobody reads is lost.

    A run goes on when its output ends in a pipe that was closed (``| head``) or at a terminal that is gone. Other
    failures, such as a full disk, are told once, and the command ends with 1.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.lost = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As a stream's."""
        try:
            self._stream.write(text)
        except OSError as error:
            self._drop(error)
        return len(text)

    def flush(self) -> None:
        """As a stream's."""
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        opened = self._stream.fileno()
        hung_up = error.errno == errno.EIO and stat.S_ISCHR(os.fstat(opened).st_mode)
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), opened)
        if not (hung_up or isinstance(error, BrokenPipeError)):
            self.lost = True
            told = f"fedzo: standard output must be writable, got {error.strerror}. Write elsewhere."
            with suppress(OSError):  # it may lead to the same place
                print(told, file=sys.stderr)


@contextmanager
def forgiving_output() -> Iterator[Output]:
    """Let ``Output`` stand for standard output."""
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        given = sys.stdout
        stream: Any = given or nowhere  # None where it was closed before the start
        output, before = Output(stream), getattr(stream, "errors", None)
        strict = before in {"strict", "surrogateescape"} and isinstance(stream, io.TextIOWrapper)
        if strict:
            stream.reconfigure(errors="replace")
        sys.stdout = output
        try:
            yield output
        finally:
            output.flush()
            sys.stdout = given
            if strict:
                stream.reconfigure(errors=before)


def print_lines(lines: Iterable[str]) -> None:
    """Show lines as they come; a file that cannot be read or written is named."""
    kind: type[FedzoError] = ConfigError
    try:
        for line in lines:
            print(line, flush=True)
            kind = FedzoError  # for something was done
    except OSError as error:
        if isinstance(error, FedzoError):
            raise
        file = error.filename or "a file"
        if isinstance(error, FileNotFoundError):
            raise kind(f"{file}: there is no such file or folder. Check the path.") from error
        raise kind(f"{file}: it must be readable and writable, got {error.strerror!r}.") from error


def print_json(record: object) -> None:
    """Show a result that a program may read, too."""
    print(json.dumps(record, indent=2))
