"""Answers that were paid for, one JSON line each: what is here is never asked for again.

A line is written by one call to the operating system when its answer has come, so the end of the process, by any
signal, loses the calls in flight and nothing else. What a crash of the machine loses is at most what the system had
not written by itself, some seconds of answers: a wait for the disk after each would cost more than it saves.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from fedzo.data.preprocess.backend import Completion, Request
from fedzo.data.preprocess.rephrase.answers import AnswerText, ModelName, TokenCount, without_thought
from fedzo.errors import FolderInUseError, RunFolderError
from fedzo.records.decode import decode_json, to_json
from fedzo.records.fields import Hash, Within
from fedzo.records.folder import lock_file, make_folder, open_file

FILE = "answers.jsonl"
VERSION = 1


@dataclass(frozen=True, slots=True)
class _Header:
    """The first line."""

    kind: ClassVar[str] = "fedzo_answers"
    version: Annotated[int, Within(0, 1 << 31)]


@dataclass(frozen=True, slots=True)
class _Line:
    """An answer, by the digest of what was asked."""

    key: Hash
    text: AnswerText
    truncated: bool
    model: ModelName
    prompt_tokens: TokenCount
    completion_tokens: TokenCount


def request_key(request: Request, *, model: str) -> str:
    """SHA-256 of all that decides a whole answer: the model, the sampling, the chat and the schema.

    The limit of tokens is no part of it: only whole answers are kept, and those did not reach it.

    Args:
        request: The request. Its seed counts only where something is sampled.
        model: ``Backend.fingerprint`` of its model.
    """
    asked = {
        "model": model,
        "temperature": float(request.temperature),
        "seed": request.seed if request.temperature > 0 else None,
        "messages": [[message.role, message.content] for message in request.messages],
        "schema": request.schema,
    }
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


class Store:
    """The answers in one folder; the process has them to itself until ``close``. Threads may share it.

    Args:
        folder: Made if it is not there. ``answers.jsonl`` in it holds clients' text: only its owner may read it.

    Raises:
        FolderInUseError: Another process has it.
        RunFolderError: A line other than a torn last one cannot be read, or another fedzo wrote the file.
        OSError: It cannot be read or written.
    """

    def __init__(self, folder: Path) -> None:
        self._path = make_folder(folder) / FILE
        self._lock = threading.Lock()
        self._answers: dict[str, Completion] = {}
        self._size = 0
        self._file: int | None = open_file(folder, FILE, os.O_RDWR | os.O_CREAT, mode=0o600)
        try:
            self._take()
            self._load()
        except BaseException:
            os.close(self._file)
            raise

    def get(self, key: str) -> Completion | None:
        """The answer to a request, None if there is none yet."""
        return self._answers.get(key)

    def put(self, key: str, answer: Completion) -> None:
        """Keep an answer; after ``close`` it is let go, and so is one that is cut off or blank: it is asked for again.

        Raises:
            OSError: It cannot be written, such as on a full disk; the file is then as it was before.
        """
        with self._lock:
            if self._file is not None and answer.whole and key not in self._answers:
                self._append(to_json(_Line(key=key, **asdict(answer))))
                self._answers[key] = answer

    def __len__(self) -> int:
        return len(self._answers)

    def close(self) -> None:
        """Have all on the disk, and let other processes in."""
        with self._lock:
            if self._file is not None:
                os.fsync(self._file)
                os.close(self._file)
                self._file = None

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self) -> None:
        assert self._file is not None
        try:
            lock_file(self._file, self._path.parent)
        except FolderInUseError as error:
            raise FolderInUseError(
                f"{self._path}: another process is writing to it. Wait for it, or end it, or set rewriter.store to "
                "another folder, which begins without its answers."
            ) from error

    def _load(self) -> None:
        """Read all lines, and cut the file to the whole ones."""
        assert self._file is not None
        with os.fdopen(os.dup(self._file), "rb") as file:
            content = file.read()
        whole = content.rfind(b"\n") + 1  # behind it is what a process that was killed could not finish
        lines = content[:whole].split(b"\n")[:-1]
        first = to_json(_Header(version=VERSION))
        if not lines and not first.encode().startswith(content):
            lines = [content]  # no torn first line of ours, so it is refused
        for number, line in enumerate(lines, 1):
            self._read(line, number)
        os.ftruncate(self._file, whole)
        self._size = whole
        if not lines:
            self._append(first)

    def _read(self, line: bytes, number: int) -> None:
        where, remedy = f"{self._path}, line {number}", "Delete the line (its call is made again), or the file."
        if number == 1:
            header = decode_json(_Header, line, where=where, error=RunFolderError, remedy="Move the file away.")
            if header.version != VERSION:
                raise RunFolderError(
                    f"{where}: version must be {VERSION}, got {header.version}. Use the fedzo that wrote the file, or "
                    "set rewriter.store to another folder."
                )
            return
        read = decode_json(_Line, line, where=where, error=RunFolderError, remedy=remedy)
        answer = Completion(
            text=read.text,
            truncated=read.truncated,
            model=read.model,
            prompt_tokens=read.prompt_tokens,
            completion_tokens=read.completion_tokens,
        )
        answer = without_thought(answer)
        if answer.whole:  # earlier versions of fedzo kept thoughts, and what was cut off
            self._answers[read.key] = answer

    def _append(self, line: str) -> None:
        assert self._file is not None
        data = line.encode() + b"\n"
        try:
            written = os.pwrite(self._file, data, self._size)
            while written < len(data):
                written += os.pwrite(self._file, data[written:], self._size + written)
        except OSError:
            os.ftruncate(self._file, self._size)  # no torn line in the middle
            raise
        self._size += len(data)
