"""A server folder whose disk is full: what its people are told, and how often."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedzo.runtime.net import serve, server_folder
from fedzo.runtime.net.server_folder import MIN_FREE_BYTES, ServerFolder


@pytest.mark.slow
def test_a_full_disk_is_told_once_until_there_was_room_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk = SimpleNamespace(free=MIN_FREE_BYTES)
    monkeypatch.setattr(server_folder.shutil, "disk_usage", lambda path: disk)
    full = serve._Full(ServerFolder(tmp_path))

    with caplog.at_level(logging.WARNING, logger="fedzo"):
        for free in (MIN_FREE_BYTES, 0, 0, MIN_FREE_BYTES, MIN_FREE_BYTES - 1):
            disk.free = free
            full.tell()

    words = f"The disk of {tmp_path} is full: the SuperLink cannot keep what it is sent. Make room."
    assert [record.getMessage() for record in caplog.records] == [words, words]
