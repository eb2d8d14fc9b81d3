"""Which key is which client: what the registry takes, what it refuses, and what it says while its file is spoilt."""

from __future__ import annotations

import errno
import fcntl
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedzo.commands.server import add_client
from fedzo.errors import ConfigError, FolderInUseError
from fedzo.records.folder import folder_of_one_process
from fedzo.runtime.net.credentials import make_key, pem_of
from fedzo.runtime.net.key_registry import KeyRegistry
from fedzo.runtime.net.server_folder import Listening, ServerFolder


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A registry's, in a folder of its own, without clients."""
    (tmp_path / "server").mkdir()
    registry_of(tmp_path / "server" / "clients.json").make()
    return tmp_path / "server" / "clients.json"


def registry_of(file: Path) -> KeyRegistry:
    return KeyRegistry(file, run_lock=file.parent / "run")


@pytest.fixture
def registry(file: Path) -> KeyRegistry:
    return registry_of(file)


def keys(tmp_path: Path, count: int) -> list[str]:
    return [make_key(tmp_path / f"key{number}") for number in range(count)]


def test_a_client_is_registered_once_with_an_index_a_name_and_a_key_of_its_own(
    registry: KeyRegistry, tmp_path: Path
) -> None:
    first, second, third = keys(tmp_path, 3)

    registry.add("a", index=3, key=first)
    assert registry.add("a", index=3, key=first + " comment").index == 3  # again: nothing changes
    assert registry.add("b", index=None, key=second).index == 0  # the lowest that is free

    cases: list[tuple[str, int | None, str, str]] = [
        ("a", 5, third, "name"),
        ("a", None, third, "name"),
        ("a", 3, third, "index"),  # as when an invitation is asked for again that was deleted
        ("c", 3, third, "index"),
        ("c", 5, first, "key"),
    ]
    for name, index, key, what in cases:
        with pytest.raises(ConfigError, match=rf"its {what} must be its own, but client") as refused:
            registry.add(name, index=index, key=key)
        said = str(refused.value)
        assert ("Then restart `fedzo server up`" in said) is (key == first)  # which Flower remembers
        assert (" Another key is registered under this name." in said) is (name == "a")
        assert (" To move a to index 5, give that key as --key." in said) is ((name, index) == ("a", 5))
        assert said.count("To move") == ((name, index) == ("a", 5))
    assert [(client.index, client.name) for client in registry.clients] == [(0, "b"), (3, "a")]
    assert {key: client.index for key, client in registry.by_key().items()} == {pem_of(first): 3, pem_of(second): 0}


def test_a_client_takes_the_index_of_one_that_has_left_and_keeps_its_key(
    registry: KeyRegistry, file: Path, tmp_path: Path
) -> None:
    known = keys(tmp_path, 3)
    for index, key in enumerate(known):
        registry.add(f"h{index}", index=index, key=key)
    with pytest.raises(ConfigError, match=r"client h2: its index must be its own, but client h1 has it"):
        registry.add("h2", index=1, key=known[2])
    registry.remove("h1")

    assert registry.add("h2", index=1, key=known[2]).index == 1

    rows = json.loads(file.read_text())
    assert [(row["index"], row["name"], row["key"]) for row in rows] == [(0, "h0", known[0]), (1, "h2", known[2])]
    assert {key: client.index for key, client in registry.by_key().items()} == {
        pem_of(known[0]): 0, pem_of(known[2]): 1,
    }  # fmt: skip


def test_a_client_keeps_its_index_as_long_as_a_run_is_served(registry: KeyRegistry, file: Path, tmp_path: Path) -> None:
    (key,) = keys(tmp_path, 1)
    registry.add("a", index=0, key=key)
    run = file.parent / "run"
    run.touch()
    before = file.read_bytes()

    with run.open() as served:
        fcntl.flock(served, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match=r"client a: it must keep its index 0 while a run is served\. Wait for"):
            registry.add("a", index=1, key=key)

    assert file.read_bytes() == before
    assert registry.add("a", index=1, key=key).index == 1


def test_a_client_is_moved_also_where_the_file_system_knows_no_locks(
    registry: KeyRegistry, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(opened: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    (key,) = keys(tmp_path, 1)
    registry.add("a", index=0, key=key)
    (file.parent / "run").touch()
    monkeypatch.setattr("fcntl.flock", refused)

    assert registry.add("a", index=1, key=key).index == 1


def test_one_command_at_a_time_changes_a_registry(registry: KeyRegistry, file: Path, tmp_path: Path) -> None:
    (key,) = keys(tmp_path, 1)
    registry.add("a", index=0, key=key)
    says = f"^server folder {re.escape(str(file.parent))}: another process is using it"

    with folder_of_one_process(file.parent):
        with pytest.raises(FolderInUseError, match=says):
            registry.add("b", index=None, key=key)
        with pytest.raises(FolderInUseError, match=says):
            registry.remove("a")

    assert [client.name for client in registry.clients] == ["a"]


def test_a_registry_of_many_clients_is_read_in_a_moment(registry: KeyRegistry, file: Path) -> None:
    rows = [{"index": i, "name": f"n{i}", "key": f"k{i}", "added": "2026-01-01"} for i in range(10_000)]
    file.write_text(json.dumps(rows))
    begun = time.process_time()

    assert len(registry.clients) == 10_000
    assert time.process_time() - begun < 2.0


@pytest.mark.parametrize("name", ["two words", "../../evil", "bad/name", "", "x" * 64])
def test_a_name_that_is_none_is_refused_before_any_file_is_made_by_it(tmp_path: Path, name: str) -> None:
    listening = Listening(address="h:1", listen="127.0.0.1:1", control="127.0.0.1:2")
    folder = ServerFolder.make(tmp_path / "s", listening, names=["h"], days=30)
    before = sorted(tmp_path.rglob("*"))

    with pytest.raises(ConfigError, match="NAME must be at most 63 letters, digits"):
        list(add_client(folder, name, index=None, key=None))

    assert sorted(tmp_path.rglob("*")) == before


def test_a_registry_that_is_spoilt_while_it_is_in_use_leaves_the_one_before_in_force(
    registry: KeyRegistry, file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry.add("a", index=0, key=make_key(tmp_path / "key"))
    before, good = registry.by_key(), file.read_text()

    for bad in (good[:-3], "[]x", None):
        caplog.clear()
        file.unlink()
        if bad is not None:
            file.write_text(bad)
        assert [registry.by_key(), registry.by_key()] == [before, before]
        assert caplog.text.count("Until then the old client list is used") == 1

    with pytest.raises(ConfigError, match=r"clients\.json"):
        registry_of(file).by_key()
    file.write_text("[]")
    assert registry.by_key() == {}


def test_a_removed_client_is_nobody_and_its_index_is_free(registry: KeyRegistry, tmp_path: Path) -> None:
    first, second = keys(tmp_path, 2)
    registry.add("a", index=0, key=first)
    assert set(registry.by_key()) == {pem_of(first)}

    registry.remove("a")

    assert registry.by_key() == {}
    assert registry.add("a", index=0, key=second).key == second
    with pytest.raises(ConfigError, match=r"client c: it must be registered \(a\)"):
        registry.remove("c")


@pytest.mark.slow
def test_a_runs_server_sees_at_once_whose_key_was_revoked(registry: KeyRegistry, tmp_path: Path) -> None:
    from fedzo.runtime.net.serve import KeyedGrid

    grid: Any = SimpleNamespace(_folder=SimpleNamespace(registry=registry))
    for index, key in enumerate(keys(tmp_path, 2)):
        registry.add(f"h{index}", index=index, key=key)
    assert KeyedGrid.registered(grid, {0, 1, 2}) == {0, 1}

    registry.remove("h0")

    assert KeyedGrid.registered(grid, {0, 1}) == {1}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"index": -1}, "index"),
        ({"name": "../x"}, "name"),
        ({"added": 7}, "added"),
        ({"more": 1}, "more"),
    ],
)
def test_a_registry_that_somebody_spoiled_is_refused(
    registry: KeyRegistry, file: Path, tmp_path: Path, change: dict[str, object], says: str
) -> None:
    registry.add("a", index=0, key=make_key(tmp_path / "key"))
    (row,) = json.loads(file.read_text())
    file.write_text(json.dumps([{**row, **change}]))

    with pytest.raises(ConfigError, match=rf"clients\.json: .*{says}"):
        _ = registry.clients
