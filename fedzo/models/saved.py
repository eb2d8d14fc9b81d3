"""Writing a model's folder: whole or not at all, and ``OSError`` for whatever the disk refuses."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fedzo.records.folder import sync_folder

_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # as Rust writes it
_LAST = ("config.json", "adapter_config.json")  # a folder without it is read by nobody


@contextmanager
def disk_errors() -> Iterator[None]:
    """Have safetensors' failures to write raised as ``OSError``: it has a class of its own for a full disk."""
    try:
        yield
    except SafetensorError as error:
        if (found := _OS_ERROR.search(str(error))) is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number)) from error


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which is flushed to the disk and becomes ``out`` at the end of the context.

    After an error nothing of it is left. An ``out`` that is there and empty stays the folder it is, since it may be a
    mount or the place where somebody stands: the files are written below it, then moved up.

    Args:
        out: A new or empty folder.

    Raises:
        OSError: It cannot be written.
    """
    is_new = not out.exists()
    name = f".{out.name}.{os.getpid()}.part"
    part = out.with_name(name) if is_new else out / name
    part.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(part, ignore_errors=True)  # of a process of this number that was killed
    part.mkdir()
    try:
        with disk_errors():
            yield part
        sync_files(part)
        if is_new:
            part.rename(out)
        else:
            for file in sorted(part.iterdir(), key=lambda file: (file.name in _LAST, file.name)):
                file.rename(out / file.name)
            part.rmdir()
            sync_folder(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    sync_folder(out.parent)


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write both as transformers does; ``config.json`` allows the cache of generation, which fedzo's forwards lack.

    Raises:
        OSError: It cannot be written.
    """
    settings = {id(each): each for each in (model.config, model.config.get_text_config())}.values()
    before = [getattr(each, "use_cache", True) for each in settings]
    for each in settings:
        each.use_cache = True
    try:
        with disk_errors():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    finally:
        for each, used in zip(settings, before, strict=True):
            each.use_cache = used


def sync_files(folder: Path) -> None:
    """Have a folder's files and their names on the disk."""
    for file in folder.iterdir():
        if file.is_file():
            with file.open("rb") as written:
                os.fsync(written.fileno())
    sync_folder(folder)
