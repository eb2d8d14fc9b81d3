"""The log: round trips and the chain."""

from __future__ import annotations

import struct
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedzo.errors import ProtocolError, RunFolderError
from fedzo.records.decode import decode_json, to_json
from fedzo.records.log import Proof, ScalarLine
from fedzo.zo.directions import SHARED
from fedzo.zo.keys import OWN
from fedzo.zo.log import EMPTY_CHAIN, ScalarRecord, extend_chain, pack, unpack


def record(round: int, c: object, *, lr: float = 0.5, owners: tuple[int, ...] = (SHARED,)) -> ScalarRecord:
    return ScalarRecord(round=round, lr=float(np.float32(lr)), owners=owners, coefficients=np.asarray(c, np.float32))


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(
    round=st.integers(0, 2**32 - 1),
    lr=st.floats(0, width=32, allow_infinity=False),
    owners=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=3),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    directions=st.sampled_from([OWN, SHARED, 1, 4096]),
    data=st.data(),
)
@settings(max_examples=50, deadline=None)
def test_records_survive_bytes_and_json_bit_for_bit(
    round: int, lr: float, owners: list[int], shape: tuple[int, int], directions: int, data: st.DataObject
) -> None:
    size = shape[0] * shape[1] * len(owners)
    scalars = data.draw(st.lists(finite, min_size=size, max_size=size))
    coefficients = np.array(scalars, np.float32).reshape(*shape, len(owners))
    original = replace(record(round, coefficients, lr=lr, owners=tuple(owners)), directions=directions)

    (by_wire,) = unpack(original.to_bytes())
    proof = Proof(chain="a" * 64, check=1, digest=None)
    text = to_json(original.to_line(attendance=[0], proof=proof))
    by_json = ScalarRecord.from_line(decode_json(ScalarLine, text, where="line", error=RunFolderError))

    assert by_wire.directions == by_json.directions == directions
    assert by_wire.owners == by_json.owners == tuple(owners)
    assert by_wire.to_bytes() == by_json.to_bytes() == original.to_bytes()


def test_the_chain_depends_on_every_record_and_its_order() -> None:
    a, b = record(0, [[[1.0]]]), record(1, [[[2.0]]])

    chains = {extend_chain(extend_chain(EMPTY_CHAIN, x), y) for x, y in ((a, b), (b, a), (a, a), (b, b))}

    assert len(chains) == 4


def test_a_record_costs_4_bytes_a_scalar_and_18_of_frame() -> None:
    assert len(record(0, np.ones((10, 2, 1))).to_bytes()) == 18 + 4 * 20


@pytest.mark.parametrize("cut", range(1, 22))
def test_bytes_that_end_within_a_record_are_refused(cut: int) -> None:
    data = pack([record(0, [[[1.0]]])])
    assert len(data) == 22

    with pytest.raises(ProtocolError, match="do not end with a whole record"):
        list(unpack(data[:cut] if cut < 22 else data))


def test_a_scalar_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ProtocolError, match="round 3 holds a number that is not finite"):
        list(unpack(record(3, [[[np.inf]]]).to_bytes()))


@pytest.mark.parametrize(("lr", "steps", "probes", "owners"), [
    (0.5, 0, 1, 1), (0.5, 1, 0, 1), (0.5, 0xFFFF, 0xFFFF, 0), (-0.5, 1, 1, 1), (np.inf, 1, 1, 1), (np.nan, 1, 1, 1),
])  # fmt: skip
def test_a_header_that_announces_nothing_or_no_learning_rate_is_refused(
    lr: float, steps: int, probes: int, owners: int
) -> None:
    data = struct.pack("<IfHHH", 7, lr, steps, probes, owners) + bytes(100)

    with pytest.raises(ProtocolError, match="record of round 7 must hold at least one step"):
        list(unpack(data))


def test_what_a_header_announces_takes_no_memory_before_it_is_there() -> None:
    data = struct.pack("<IfHHH", 0, 0.5, 0xFFFF, 0xFFFF, 0xFFFF) + bytes(100)  # 562 TB

    with pytest.raises(ProtocolError, match="114 bytes do not end with a whole record"):
        list(unpack(data))
