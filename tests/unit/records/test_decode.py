"""The strict decoder: every kind of field at the ends of its range, beyond them, and in any JSON that there is."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedzo.errors import ProtocolError, RunFolderError
from fedzo.records.codec import codec_of
from fedzo.records.decode import decode, decode_json, encode, parse_json, read_record, to_json
from fedzo.records.fields import ArrayShape, LabelCounts, Length, Matching, OmitDefault, Within
from fedzo.records.log import VectorLine, decode_audit, decode_public
from fedzo.records.metrics import METRIC_KINDS, decode_metric
from fedzo.records.scores import Score
from fedzo.testing.logs import audit_line


class Colour(StrEnum):
    red = "red"
    blue = "blue"


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    share: Annotated[float, Within(0.0, 1.0)]
    note: Annotated[str, Length(0, 5)] = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outer:
    kind: ClassVar[str] = "outer"
    first: ClassVar[tuple[str, ...]] = ("flag",)
    count: Annotated[int, Within(-2, 9)]
    flag: bool
    known: Annotated[float, Within(-10.0, 10.0)] | None
    inner: Inner | None
    rows: Annotated[tuple[Inner, ...], Length(1, 2)]
    span: tuple[Annotated[int, Within(0, 9)], Annotated[int, Within(0, 9)]]
    owner: Annotated[int, Within(0, 9)] | Literal["shared"]
    by_number: Annotated[dict[Annotated[int, Within(0, 99)], Annotated[str, Length(1, 3)]], Length(0, 2)]
    by_name: Annotated[dict[Annotated[str, Length(1, 3)], bool], Length(0, 2)]
    code: Annotated[str, Matching(re.compile("[a-f]+"), "letters a to f")]
    colour: Colour
    raw: Annotated[bytes, Length(0, 3)] = b""
    left_out: Annotated[Annotated[int, Within(0, 9)], OmitDefault()] = 0

    def __post_init__(self) -> None:
        if self.span[0] > self.span[1]:
            raise ValueError("hold a span that ends after it begins")


PLAIN: dict[str, Any] = {
    "kind": "outer",
    "flag": True,
    "count": 9,
    "known": None,
    "inner": {"share": 0.0},
    "rows": [{"share": 1.0, "note": "hi"}],
    "span": [0, 9],
    "owner": "shared",
    "by_number": {"0": "a", "99": "b"},
    "by_name": {"x": False},
    "code": "abc",
    "colour": "blue",
}
RECORD = Outer(
    count=9,
    flag=True,
    known=None,
    inner=Inner(share=0.0),
    rows=(Inner(share=1.0, note="hi"),),
    span=(0, 9),
    owner="shared",
    by_number={0: "a", 99: "b"},
    by_name={"x": False},
    code="abc",
    colour=Colour.blue,
)


def read(**changes: Any) -> Outer:
    return decode(Outer, {**PLAIN, **changes}, where="here", error=RunFolderError, remedy="Mend it.")


def test_a_record_is_read_and_written_in_the_declared_order() -> None:
    written = encode(RECORD)

    assert read() == RECORD
    assert read(raw=b"abc", left_out=3) == Outer(
        **{name: getattr(RECORD, name) for name in RECORD.__slots__ if name not in ("raw", "left_out")},
        raw=b"abc",
        left_out=3,
    )
    assert written == {**PLAIN, "inner": {"share": 0.0, "note": ""}, "raw": b""}
    assert list(written)[:3] == ["kind", "flag", "count"]
    assert "left_out" not in written


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 10}, "count must be a whole number of -2 to 9, got 10"),
        ({"count": -3}, "count must be a whole number of -2 to 9, got -3"),
        ({"count": True}, "count must be a whole number of -2 to 9, got True"),
        ({"count": 1.0}, "count must be a whole number of -2 to 9, got 1.0"),
        ({"count": 10**5000}, "count must be a whole number of -2 to 9, got a whole number of 16610 bits"),
        ({"flag": 1}, "flag must be true or false, got 1"),
        ({"known": 1}, "known must be a float of -10 to 10 or null, got 1"),
        ({"known": math.nan}, "known must be a float of -10 to 10 or null, got nan"),
        ({"known": math.inf}, "known must be a float of -10 to 10 or null, got inf"),
        ({"known": True}, "known must be a float of -10 to 10 or null, got True"),
        ({"inner": []}, "inner must be an object or null, got []"),
        ({"inner": {"share": 1.5}}, "inner.share must be a float of 0 to 1, got 1.5"),
        ({"inner": {}}, "inner.share must be a float of 0 to 1, got nothing"),
        ({"inner": {"share": 0.5, "odd": [1]}}, "inner.odd must be left out: Inner has no such field, got [1]"),
        ({"rows": []}, "rows must be a list of 1 to 2, got []"),
        ({"rows": [{"share": 0.0}] * 3}, "rows must be a list of 1 to 2, got [{'share': 0.0}"),
        ({"rows": {"share": 0.0}}, "rows must be a list of 1 to 2, got {'share': 0.0}"),
        ({"rows": [{"share": 0.0}, {"share": 0.0, "note": "toolong"}]}, "rows[1].note must be text of 0 to 5"),
        ({"span": [0]}, "span must be [a whole number of 0 to 9, a whole number of 0 to 9], got [0]"),
        ({"span": [0, "x"]}, "span[1] must be a whole number of 0 to 9, got 'x'"),
        ({"span": [5, 4]}, "here: must hold a span that ends after it begins, got {'by_name'"),
        ({"owner": "all"}, "owner must be a whole number of 0 to 9 or 'shared', got 'all'"),
        ({"by_number": {"01": "a"}}, "by_number must have keys that are a whole number of 0 to 99, got '01'"),
        ({"by_number": {"100": "a"}}, "by_number must have keys that are a whole number of 0 to 99, got '100'"),
        ({"by_number": {"-1": "a"}}, "by_number must have keys that are a whole number of 0 to 99, got '-1'"),
        ({"by_number": {"1": "long"}}, "by_number[1] must be text of 1 to 3 characters, got 'long'"),
        ({"by_number": {"1": "a", "2": "b", "3": "c"}}, "by_number must be an object of 0 to 2 entries, got {'1'"),
        ({"by_name": {"long": True}}, "by_name must have keys that are text of 1 to 3 characters, got 'long'"),
        ({"by_name": {"x": 0}}, "by_name['x'] must be true or false, got 0"),
        ({"code": "abcx"}, "code must be letters a to f, got 'abcx'"),
        ({"code": "\ud800"}, "code must be letters a to f, got '\\ud800'"),
        ({"colour": "green"}, "colour must be 'red' or 'blue', got 'green'"),
        ({"colour": ["red"]}, "colour must be 'red' or 'blue', got ['red']"),
        ({"raw": "abc"}, "raw must be 0 to 3 bytes, got 'abc'"),
        ({"raw": b"x" * 10**6}, "raw must be 0 to 3 bytes, got b'xxxxxx"),
        ({"kind": "inner"}, "kind must be 'outer', got 'inner'"),
        ({"surprise": 1}, "surprise must be left out: Outer has no such field, got 1"),
        ({"a\x1b[2J\n": 1}, "a [2J  must be left out: Outer has no such field, got 1"),
    ],
)
def test_a_bad_value_is_named_with_its_place_its_rule_and_itself(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RunFolderError) as caught:
        read(**changes)

    text = str(caught.value)
    assert message in text
    assert text.startswith("here: ")
    assert text.endswith(". Mend it.")
    assert len(text) < 300


def test_a_field_without_a_default_must_be_there() -> None:
    plain = {name: value for name, value in PLAIN.items() if name != "known"}

    with pytest.raises(ProtocolError, match="known must be a float of -10 to 10 or null, got nothing"):
        decode(Outer, plain, where="here", error=ProtocolError)
    with pytest.raises(ProtocolError, match="kind must be 'outer', got nothing"):
        decode(Outer, {"count": 1}, where="here", error=ProtocolError)


@pytest.mark.parametrize("value", [None, 1, "outer", [PLAIN], True, 0.5])
def test_what_is_no_object_is_no_record(value: Any) -> None:
    with pytest.raises(RunFolderError, match="here: must be an object of the kind 'outer', got"):
        decode(Outer, value, where="here", error=RunFolderError)


@dataclass(frozen=True, slots=True)
class Numbers:
    known: Annotated[float, Within(0.0, 9.0)] | None
    sure: Annotated[float, Within(0.0, 9.0)] = 1.0


def test_a_number_that_is_not_finite_is_written_as_null_where_null_is_allowed_and_refused_elsewhere() -> None:
    assert [encode(Numbers(value))["known"] for value in (math.nan, math.inf, None, 2)] == [None, None, None, 2.0]
    assert encode(Numbers(np.float64(2.0), np.float32(0.5))) == {"known": 2.0, "sure": 0.5}
    with pytest.raises(ValueError, match="Numbers: sure must be a float of 0 to 9, got nan"):
        encode(Numbers(None, math.nan))
    with pytest.raises(ValueError, match=r"Numbers: known must be a float of 0 to 9 or null, got 10\.0"):
        encode(Numbers(10.0))
    with pytest.raises(ValueError, match=r"Numbers: sure must be .*, got '1'"):
        encode(Numbers(None, "1"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "hint", [int, float, str, bytes, tuple[bool, ...], dict[str, bool], npt.NDArray[np.float32], object, list[int]]
)
def test_a_field_without_a_range_cannot_be_declared(hint: Any) -> None:
    with pytest.raises(TypeError, match=r"must be annotated with one|cannot be of type"):
        codec_of(hint)


# --- arrays


@dataclass(frozen=True, slots=True, eq=False)
class Arrays:
    sure: Annotated[npt.NDArray[np.float32], ArrayShape("float32", (3, 2))]
    unknown: Annotated[npt.NDArray[np.float64], ArrayShape("float64", (3,), unknown=True)]
    flags: Annotated[npt.NDArray[np.bool_], ArrayShape("bool", (1, 1, 2))]


def arrays(sure: Any = ((0.5, 1.0),), unknown: Any = (None, 2.0), flags: Any = (((True, False),),)) -> Arrays:
    plain = json.loads(json.dumps({"sure": sure, "unknown": unknown, "flags": flags}))
    return decode(Arrays, plain, where="here", error=RunFolderError)


def test_the_file_of_a_record_is_there_whole_or_told_of(tmp_path: Path) -> None:
    assert read_record(Inner, tmp_path, "a.json", error=ProtocolError) is None
    file = tmp_path / "a.json"
    file.write_text(to_json(Inner(share=0.5), indent=2))
    assert file.read_text() == '{\n  "share": 0.5,\n  "note": ""\n}'
    assert read_record(Inner, tmp_path, "a.json", error=ProtocolError) == Inner(share=0.5)

    (tmp_path / "link.json").symlink_to(file)
    with pytest.raises(RunFolderError, match=r"link\.json: it must lie in its folder itself, got a link to"):
        read_record(Inner, tmp_path, "link.json", error=ProtocolError)
    with pytest.raises(ProtocolError, match=r"a\.json/b: it must be readable, got 'Not a directory'\. Look\.$"):
        read_record(Inner, file, "b", error=ProtocolError, remedy="Look.")
    file.write_text('{"share": 2.0}')
    with pytest.raises(ProtocolError, match=r"a\.json: share .*\. Look\.$"):
        read_record(Inner, tmp_path, "a.json", error=ProtocolError, remedy="Look.")


def test_arrays_have_their_shape_and_dtype_and_come_back_bit_for_bit() -> None:
    third = float(np.float32(1 / 3))

    found = arrays(sure=[[third, -0.0], [1e-45, 3.4e38]])

    assert (found.sure.dtype, found.sure.shape) == (np.float32, (2, 2))
    assert (found.unknown.dtype, found.unknown.shape) == (np.float64, (2,))
    assert (found.flags.dtype, found.flags.shape) == (np.bool_, (1, 1, 2))
    assert found.sure.tobytes() == np.array([[1 / 3, -0.0], [1e-45, 3.4e38]], np.float32).tobytes()
    assert np.isnan(found.unknown).tolist() == [True, False]
    again = decode_json(Arrays, to_json(found), where="here", error=RunFolderError)
    assert again.sure.tobytes() == found.sure.tobytes()
    assert encode(again) == encode(found)
    assert encode(found)["unknown"] == [None, 2.0]


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"sure": []}, "sure"),
        ({"sure": [[]]}, "sure"),
        ({"sure": [0.5]}, "sure"),
        ({"sure": [[0.5], [0.5, 1.0]]}, "sure"),
        ({"sure": [[0.5], 1.0]}, "sure"),
        ({"sure": [[[0.5]]]}, "sure"),
        ({"sure": [[0.5]] * 4}, "sure"),
        ({"sure": [[0.5] * 3]}, "sure"),
        ({"sure": [[True]]}, "sure"),
        ({"sure": [[1]]}, "sure"),
        ({"sure": [["0.5"]]}, "sure"),
        ({"sure": [[None]]}, "sure"),
        ({"sure": [[1e39]]}, "sure"),  # no float32
        ({"sure": [{"0": 1.0}]}, "sure"),
        ({"sure": None}, "sure"),
        ({"unknown": [True]}, "unknown"),
        ({"flags": [[[1.0]]]}, "flags"),
        ({"flags": [[[None]]]}, "flags"),
    ],
)
def test_lists_that_are_no_such_array_are_refused(changes: dict[str, Any], path: str) -> None:
    with pytest.raises(RunFolderError, match=f"here: {path} must be "):
        arrays(**changes)


def test_an_array_that_its_field_does_not_hold_is_not_written() -> None:
    good = arrays()
    for sure in (np.ones((1, 1)), np.ones((1, 1, 1), np.float32), np.full((1, 1), np.nan, np.float32)):
        with pytest.raises(ValueError, match="Arrays: sure must be"):
            encode(Arrays(sure=sure, unknown=good.unknown, flags=good.flags))


# --- any JSON


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
READERS: dict[str, Callable[[Any], object]] = {
    "outer": lambda value: decode(Outer, value, where="x", error=RunFolderError),
    "arrays": lambda value: decode(Arrays, value, where="x", error=RunFolderError),
    "public": lambda value: decode_public(value, where="x", error=RunFolderError),
    "audit": lambda value: decode_audit(value, where="x", error=RunFolderError),
    "metrics": lambda value: decode_metric(value, where="x", error=RunFolderError),
    "score": lambda value: decode(Score, value, where="x", error=RunFolderError),
    "labels": lambda value: decode(LabelCounts, value, where="x", error=RunFolderError),
}


@pytest.mark.parametrize("name", READERS)
@given(value=JSON)
def test_any_json_is_a_record_or_the_callers_error(name: str, value: Any) -> None:
    try:
        READERS[name](value)
    except RunFolderError as error:
        assert len(str(error)) < 1000  # noqa: PT017


HASH = "ab" * 32
GOOD: dict[str, Any] = {
    "outer": PLAIN,
    "audit": encode(audit_line({0: [[0.5], [1.0]], 3: [[2.0]]}, xi=[[[1.0]], [[None]]])),
    "score": encode(Score("accuracy", 0.5, None, 4, {0: (1, 2), 1: (1, 2)})),
    "public": encode(
        VectorLine(round=1, lr=0.5, size=3, vector=HASH, attendance=(0, 2), chain=HASH, check=7, digest=None)
    ),
}


@pytest.mark.parametrize("name", GOOD)
@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_a_good_record_with_one_part_exchanged_is_a_record_or_the_callers_error(name: str, data: st.DataObject) -> None:
    value = json.loads(json.dumps(GOOD[name]))
    READERS[name](value)
    node = value
    while True:
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        inner = node[key]
        if not isinstance(inner, dict | list) or not inner or data.draw(st.booleans()):
            break
        node = inner
    node[key] = data.draw(JSON)
    with contextlib.suppress(RunFolderError):
        READERS[name](value)


@given(st.text(max_size=20) | st.binary(max_size=20))
def test_any_text_is_json_or_the_callers_error(text: str | bytes) -> None:
    try:
        parse_json(text, where="x", error=ProtocolError)
    except ProtocolError as error:
        assert str(error).startswith("x: must be JSON, got ")  # noqa: PT017


def test_a_metric_record_of_no_kind_names_the_kinds() -> None:
    with pytest.raises(
        RunFolderError, match="kind must be one of setup, extension, round, step_policy, score, federated_score, su"
    ):
        decode_metric({"kind": ["round"]}, where="x", error=RunFolderError)
    assert list(METRIC_KINDS) == ["setup", "extension", "round", "step_policy", "score", "federated_score", "summary"]
