"""What a site remembers of its rows: the same rows prove themselves, others are named, and nothing can be guessed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedzo.data.kept_digests import KeptDigests, RowsChangedError
from fedzo.errors import ConfigError

RUN = "c" * 16
ROWS: list[dict[str, Any]] = [{"text": f"row {n}", "label": n % 2} for n in range(30)]


def register(folder: Path, rows: list[dict[str, Any]], *, begun: bool, whose: str = "client 3") -> str:
    return KeptDigests(folder, RUN).register(rows, whose=whose, begun=begun)


def test_the_same_rows_give_the_same_digest_when_the_run_goes_on(tmp_path: Path) -> None:
    first = register(tmp_path, ROWS, begun=False)

    assert register(tmp_path, [dict(reversed(row.items())) for row in ROWS], begun=True) == first
    assert len(first) == 64


def test_the_secret_is_on_the_disk_before_the_digests_that_depend_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr("os.fsync", lambda opened: synced.append(os.fstat(opened).st_ino) or fsync(opened))

    register(tmp_path, ROWS, begun=False)

    inodes = [file.stat().st_ino for file in (tmp_path / "secret", tmp_path)]
    assert [inode for inode in synced if inode in inodes][:2] == inodes


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{**ROWS[0], "text": "else"}, *ROWS[1:]], "the 30 rows that the run began with, got 30; others now .* 0. Put"),
        ([*ROWS[:4], {**ROWS[4], "label": 1}, *ROWS[5:]], r"others now \(from 0\): 4\. "),
        ([*ROWS[:4], {"text": "row 4"}, *ROWS[5:]], r"others now \(from 0\): 4\. "),
        (ROWS[:-1], r"got 29\. Put"),
        ([*ROWS, ROWS[0]], r"got 31\. Put"),
        ([*ROWS[:7], ROWS[8], ROWS[7], *ROWS[9:]], r"others now \(from 0\): 7, 8\. "),
        (ROWS[::-1], r"0, 1, 2, .*, 19, \.\.\.\. Put"),
    ],
)
def test_other_rows_are_named(tmp_path: Path, rows: list[dict[str, Any]], told: str) -> None:
    """Counts alone would not tell."""
    register(tmp_path, ROWS, begun=False)

    with pytest.raises(RowsChangedError, match=f"rows of client 3: they must be .*{told}"):
        register(tmp_path, rows, begun=True)
    assert register(tmp_path, rows, begun=False)  # another run may have them


def test_without_the_sites_secret_the_digest_tells_nothing(tmp_path: Path) -> None:
    """Two sites with the same rows register unlike digests, so a dictionary of rows is of no use to a server."""
    one, other = (register(tmp_path / name, ROWS[:1], begun=False) for name in ("a", "b"))

    assert one != other
    plain = json.dumps(ROWS[0], sort_keys=True, separators=(",", ":")).encode()
    assert hashlib.blake2b(plain, digest_size=32).hexdigest() not in (one, other)
    secret = tmp_path / "a" / "secret"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert len(secret.read_bytes()) == 32


def test_a_folder_that_cannot_be_used_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"digests of the rows must be kept there, but: .*Make the folder writable"):
        register(tmp_path / "file", ROWS, begun=False)
    register(tmp_path, ROWS, begun=False)
    (tmp_path / "secret").write_bytes(b"short")
    with pytest.raises(ConfigError, match="it must hold 32 bytes, got 5"):
        register(tmp_path, ROWS, begun=True)


def test_rows_and_index_are_remembered_also_where_the_file_system_knows_no_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(source: Path, target: Path) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr("os.link", refused)

    first = register(tmp_path, ROWS, begun=False)

    assert register(tmp_path, ROWS, begun=True) == first
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600
    assert [KeptDigests(tmp_path, RUN).claim(client) for client in (3, 1)] == [3, 3]
    assert list(tmp_path.glob("*.part")) == []


def test_what_root_remembers_for_a_site_is_the_sites(tmp_path: Path, given_by_root: Callable[[], set[Path]]) -> None:
    """Who could not read the secret would refuse every run."""
    kept = KeptDigests(tmp_path / "new" / "rows", RUN)

    kept.register(ROWS, whose="client 3", begun=False)
    kept.claim(3)

    assert given_by_root() == {*tmp_path.rglob("*")}
    assert sorted(path.name for path in kept.folder.iterdir()) == [f"client-3-{RUN}.json", f"client-of-{RUN}", "secret"]
    assert stat.S_IMODE((kept.folder / "secret").stat().st_mode) == 0o600


def test_a_site_stays_the_client_of_a_run_that_it_was_first(tmp_path: Path) -> None:
    """Also for a process that starts later; another run has another index."""
    assert KeptDigests(tmp_path / "rows", "a" * 16).claim(3) == 3
    assert KeptDigests(tmp_path / "rows", "a" * 16).claim(1) == 3
    assert KeptDigests(tmp_path / "rows", "b" * 16).claim(1) == 1
    (file,) = (tmp_path / "rows").glob(f"*{'a' * 16}")

    file.write_text("three")

    with pytest.raises(ConfigError, match=r"client-of-a{16}: the site's index in the run must be kept there"):
        KeptDigests(tmp_path / "rows", "a" * 16).claim(3)
