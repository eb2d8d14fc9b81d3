"""The file of answers: what is in it, what is damaged in it, and what decides that two requests are the same."""

from __future__ import annotations

import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedzo.data.preprocess.backend import Completion, Message
from fedzo.data.preprocess.rephrase.store import FILE, Store, request_key
from fedzo.errors import RunFolderError

Make = Callable[..., Any]
ANSWER = Completion("Grüße\n\x00", False, "m-1", 3, 4)


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """A store of three answers."""
    with Store(tmp_path / "store") as store:
        for digit in "abc":
            store.put(digit * 64, ANSWER)
    return tmp_path / "store"


def test_what_is_kept_is_there_again_and_its_owners_alone(filled: Path) -> None:
    with Store(filled) as store:
        assert len(store) == 3
        assert store.get("b" * 64) == ANSWER
        assert store.get("d" * 64) is None
    assert stat.S_IMODE((filled / FILE).stat().st_mode) == 0o600
    assert len((filled / FILE).read_bytes().split(b"\n")) == 1 + 3 + 1


@pytest.mark.parametrize("answer", [replace(ANSWER, truncated=True), replace(ANSWER, text=" \n")])
def test_what_is_no_answer_is_not_kept(answer: Completion, filled: Path) -> None:
    """Cut off or blank: it is asked for again, also where an earlier fedzo had kept it."""
    before = (filled / FILE).read_bytes()
    with Store(filled) as store:
        store.put("d" * 64, answer)
        assert store.get("d" * 64) is None
    assert (filled / FILE).read_bytes() == before

    line = before.split(b"\n")[1].decode().replace("a" * 64, "d" * 64).replace('"truncated":false', '"truncated":true')
    (filled / FILE).write_bytes(before + line.encode() + b"\n")
    with Store(filled) as store:
        assert (len(store), store.get("d" * 64)) == (3, None)


def test_thoughts_that_an_earlier_fedzo_kept_are_no_part_of_the_answer(filled: Path) -> None:
    lines = (filled / FILE).read_bytes().split(b"\n")
    for number, thought in ((1, b"<think>Hm.</think> "), (2, b"<think>Hm. ")):
        lines[number] = lines[number].replace(b'"text":"', b'"text":"' + thought)
    (filled / FILE).write_bytes(b"\n".join(lines))

    with Store(filled) as store:
        found = [store.get(digit * 64) for digit in "abc"]

    assert found == [ANSWER, None, ANSWER]


def test_every_torn_last_line_is_dropped_and_overwritten(filled: Path) -> None:
    whole = (filled / FILE).read_bytes()
    last = whole[:-1].rfind(b"\n") + 1
    for size in [*range(0, last, 17), *range(last, len(whole), 5)]:
        (filled / FILE).write_bytes(whole[:size])
        with Store(filled) as store:
            num_whole = max(0, whole[:size].count(b"\n") - 1)
            assert len(store) == num_whole
            for digit in "abc":
                store.put(digit * 64, ANSWER)
        assert (filled / FILE).read_bytes() == whole


@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff", b"[1]", b'{"key": "a"}', b"null"])
def test_another_damaged_line_is_named(damage: bytes, filled: Path) -> None:
    lines = (filled / FILE).read_bytes().split(b"\n")
    lines[2] = damage
    (filled / FILE).write_bytes(b"\n".join(lines))

    with pytest.raises(RunFolderError, match=rf"{filled / FILE}, line 3: .*Delete the line \(its call is made again\)"):
        Store(filled)

    assert (filled / FILE).read_bytes() == b"\n".join(lines)


@pytest.mark.parametrize("content", [b"notes of mine", b"notes of mine\n", b'{"kind":"fedzo_answers"}\n', b"\n"])
def test_a_file_of_something_else_is_left_alone(content: bytes, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(content)

    with pytest.raises(RunFolderError, match=rf"{tmp_path / FILE}, line 1: .*Move the file away"):
        Store(tmp_path)

    assert (tmp_path / FILE).read_bytes() == content


def test_a_file_of_another_version_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b'{"kind":"fedzo_answers","version":2}\n')

    with pytest.raises(RunFolderError, match=r"line 1: version must be 1, got 2. Use the fedzo that wrote the file"):
        Store(tmp_path)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("")
    (tmp_path / FILE).symlink_to(tmp_path / "elsewhere")

    with pytest.raises(RunFolderError, match="got a link"):
        Store(tmp_path)


def test_an_answer_after_the_end_is_let_go(filled: Path) -> None:
    store = Store(filled)
    store.close()
    store.put("d" * 64, ANSWER)
    with Store(filled) as again:
        assert len(again) == 3


def test_all_that_decides_an_answer_decides_the_key(ask: Make) -> None:
    request = ask()
    changed = [
        replace(request, temperature=0.5),
        replace(request, temperature=0.5, seed=1),
        replace(request, schema={}),
        replace(request, schema={"type": "object"}),
        replace(request, messages=(Message("system", "Hello"),)),
        replace(request, messages=(*request.messages, Message("user", ""))),
        replace(request, messages=(Message("user", "\ud800"),)),
    ]
    keys = [request_key(each, model="m") for each in [request, *changed]] + [request_key(request, model="n")]

    assert len(set(keys)) == len(keys)
    assert request_key(replace(request, seed=1), model="m") == keys[0]  # at temperature 0 no seed is told
    assert request_key(replace(request, max_tokens=17), model="m") == keys[0]  # a whole answer did not reach it
