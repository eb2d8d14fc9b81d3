"""The store of artifacts: a file has its name only when it is whole, whatever was there before."""

from __future__ import annotations

import errno
import fcntl
import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest

from fedzo.errors import ProtocolError
from fedzo.trainers import artifacts
from fedzo.trainers.artifacts import EMPTY, PIECE_BYTES, ArtifactStore

CONTENT = np.random.default_rng(0).bytes(2 * PIECE_BYTES + 5)
SIZE = len(CONTENT)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "store")


def names(store: ArtifactStore) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir())


def append(store: ArtifactStore, number: int, content: bytes = CONTENT) -> int:
    offset = number * PIECE_BYTES
    return store.append(DIGEST, SIZE, offset=offset, data=content[offset : offset + PIECE_BYTES])


def test_bytes_and_a_file_of_the_same_content_are_one_artifact(store: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "given").write_bytes(CONTENT)

    first, second = store.put(CONTENT), store.put(tmp_path / "given")

    assert first == second == ArtifactStore(store.folder).find(DIGEST)
    assert (first.digest, first.size, first.read()) == (DIGEST, SIZE, CONTENT)
    assert names(store) == [DIGEST]


def test_the_empty_artifact_is_in_every_store_and_takes_no_file(store: ArtifactStore) -> None:
    assert store.put(b"") == store.find(hashlib.sha256(b"").hexdigest()) == EMPTY
    assert EMPTY.read() == b""
    assert not store.folder.exists()


def test_a_file_with_another_content_is_named_once_and_stays_until_the_right_one_comes(
    store: ArtifactStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.put(CONTENT)
    (store.folder / DIGEST).write_bytes(CONTENT[:-1])  # of the right name, and torn
    after = ArtifactStore(store.folder)

    assert after.find(DIGEST) is after.find(DIGEST) is None

    assert caplog.text.count(f"{DIGEST}: its SHA-256 must be its name, got another. It is received again.") == 1
    assert names(store) == [DIGEST]
    assert [append(after, number) for number in range(3)] == [PIECE_BYTES, 2 * PIECE_BYTES, SIZE]
    assert (store.folder / DIGEST).read_bytes() == CONTENT
    assert names(store) == [DIGEST]


def test_who_finds_another_content_leaves_the_right_one_that_comes_meanwhile(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.folder.mkdir()
    (store.folder / DIGEST).write_bytes(b"torn")
    original = artifacts.file_digest

    def slow(path: Path) -> str:
        found = original(path)
        monkeypatch.setattr(artifacts, "file_digest", original)
        ArtifactStore(store.folder).put(CONTENT)  # another process
        return found

    monkeypatch.setattr(artifacts, "file_digest", slow)

    assert store.append(DIGEST, SIZE, offset=0, data=b"") == SIZE

    assert (store.folder / DIGEST).read_bytes() == CONTENT


def test_a_file_is_hashed_once_a_process_and_not_when_it_has_just_been_written(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []
    original = artifacts.file_digest
    monkeypatch.setattr(artifacts, "file_digest", lambda path: hashed.append(path) or original(path))
    store.put(CONTENT)
    another = ArtifactStore(store.folder)

    for _ in range(3):
        assert store.find(DIGEST)
        assert another.find(DIGEST)

    assert hashed == [store.folder / DIGEST]


def test_what_root_keeps_for_another_user_is_that_users_also_in_part(
    tmp_path: Path, given_by_root: Callable[[], set[Path]]
) -> None:
    store = ArtifactStore(tmp_path / "new" / "store")

    whole = store.put(b"of another run")
    append(store, 0)

    assert given_by_root() == {*tmp_path.rglob("*")}
    assert names(store) == sorted([whole.digest, f"{DIGEST}.part"])
    assert [append(store, number) for number in (1, 2)] == [2 * PIECE_BYTES, SIZE]
    assert given_by_root() == {*tmp_path.rglob("*")}


def test_a_failed_write_leaves_nothing(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)

    with pytest.raises(OSError, match="No space"):
        store.put(CONTENT)

    assert names(store) == []
    assert store.find(DIGEST) is None


def test_writers_of_the_same_content_do_not_disturb_each_other(store: ArtifactStore) -> None:
    stores = [ArtifactStore(store.folder) for _ in range(8)]

    with ThreadPoolExecutor(8) as pool:
        put = list(pool.map(lambda each: each.put(CONTENT).digest, stores))

    assert put == [DIGEST] * 8
    assert names(store) == [DIGEST]
    assert (store.folder / DIGEST).read_bytes() == CONTENT


@pytest.mark.parametrize("digest", ["", "../../etc/passwd", DIGEST.upper(), DIGEST + "\n", DIGEST[:-1], "é" * 64])
def test_what_is_no_digest_never_becomes_a_path(store: ArtifactStore, digest: str) -> None:
    with pytest.raises(ProtocolError, match="its digest must be 64 hexadecimal digits"):
        store.append(digest, SIZE, offset=0, data=b"1")

    assert not store.folder.exists()


# --- pieces ---


def test_pieces_become_the_artifact_with_the_last_of_them(store: ArtifactStore) -> None:
    assert store.append(DIGEST, SIZE, offset=0, data=b"") == 0
    assert [append(store, 0), append(store, 1)] == [PIECE_BYTES, 2 * PIECE_BYTES]
    assert store.find(DIGEST) is None

    assert append(store, 2) == SIZE

    artifact = store.find(DIGEST)
    assert artifact is not None
    assert artifact.read() == CONTENT
    assert names(store) == [DIGEST]
    assert append(store, 0) == SIZE  # nothing more is needed


def test_a_piece_that_is_not_the_next_one_is_not_taken(store: ArtifactStore) -> None:
    assert append(store, 1) == 0
    assert append(store, 0) == append(store, 0) == PIECE_BYTES


def test_another_process_goes_on_after_the_last_whole_piece(store: ArtifactStore) -> None:
    append(store, 0)
    with (store.folder / f"{DIGEST}.part").open("ab") as part:
        part.write(b"torn by a kill")
    after = ArtifactStore(store.folder)

    assert after.append(DIGEST, SIZE, offset=0, data=b"") == PIECE_BYTES
    assert [append(after, 1), append(after, 2)] == [2 * PIECE_BYTES, SIZE]
    assert (store.folder / DIGEST).read_bytes() == CONTENT


def test_processes_that_receive_the_same_artifact_at_the_same_time_share_its_pieces(store: ArtifactStore) -> None:
    stores = [ArtifactStore(store.folder) for _ in range(4)]

    def receive(each: ArtifactStore) -> int:
        held, messages = each.append(DIGEST, SIZE, offset=0, data=b""), 0
        while held < SIZE:
            held, messages = append(each, held // PIECE_BYTES), messages + 1
        return messages

    with ThreadPoolExecutor(4) as pool:
        messages = list(pool.map(receive, stores))

    assert 3 <= sum(messages) <= 4 * 3
    assert names(store) == [DIGEST]
    assert (store.folder / DIGEST).read_bytes() == CONTENT


def test_who_waited_for_a_part_that_is_gone_begins_another(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(store, 0)
    flock = fcntl.flock

    def wait(file: BinaryIO, operation: int) -> None:
        monkeypatch.setattr("fcntl.flock", flock)
        (store.folder / f"{DIGEST}.part").unlink()  # by the process that held the lock
        flock(file, operation)

    monkeypatch.setattr("fcntl.flock", wait)

    assert append(store, 1) == 0  # not one more piece than a file that nobody finds holds
    assert [append(store, number) for number in range(3)][-1] == SIZE


def test_a_whole_that_is_not_what_its_digest_names_is_dropped(store: ArtifactStore) -> None:
    wrong = bytearray(CONTENT)
    wrong[PIECE_BYTES + 7] ^= 1
    append(store, 0)
    append(store, 1, bytes(wrong))

    with pytest.raises(ProtocolError, match=rf"artifact {DIGEST[:12]}: its SHA-256 must be {DIGEST}, got "):
        append(store, 2)

    assert names(store) == []
    assert [append(store, number) for number in range(3)][-1] == SIZE


def test_all_that_came_stays_where_the_process_ends_while_the_whole_is_hashed(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM is a SystemExit in an executor."""

    def ends(path: Path) -> str:
        raise SystemExit(0)

    append(store, 0)
    append(store, 1)
    original = artifacts.file_digest
    monkeypatch.setattr(artifacts, "file_digest", ends)
    with pytest.raises(SystemExit):
        append(store, 2)
    monkeypatch.setattr(artifacts, "file_digest", original)
    after = ArtifactStore(store.folder)

    assert after.append(DIGEST, SIZE, offset=0, data=b"") == 2 * PIECE_BYTES  # the last piece is a short one
    assert append(after, 2) == SIZE
    assert (store.folder / DIGEST).read_bytes() == CONTENT


@pytest.mark.parametrize("size", [-1, 0])
def test_a_size_that_is_none_is_refused_before_anything_is_written(store: ArtifactStore, size: int) -> None:
    with pytest.raises(ProtocolError, match=rf"must have at least 1 byte, got {size}"):
        store.append(DIGEST, size, offset=0, data=CONTENT[:PIECE_BYTES])

    assert not store.folder.exists()


def test_what_other_artifacts_left_goes_and_what_is_no_artifact_stays(store: ArtifactStore) -> None:
    ArtifactStore(store.folder).keep_only(DIGEST)  # of a folder that is not there
    store.put(b"of another run")
    for name in (f"{'a' * 64}.part", f"{DIGEST}.part", "README"):
        (store.folder / name).touch()

    store.put(CONTENT)
    store.keep_only(DIGEST)

    assert names(store) == sorted(["README", DIGEST, f"{DIGEST}.part"])
    assert store.find(hashlib.sha256(b"of another run").hexdigest()) is None


def test_an_artifact_comes_also_where_the_file_system_knows_no_locks(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(file: BinaryIO, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(artifacts.fcntl, "flock", refused)

    assert [append(store, number) for number in range(3)] == [PIECE_BYTES, 2 * PIECE_BYTES, SIZE]
    assert names(store) == [DIGEST]
