"""Lines of the logs: what their parts must agree on."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pytest

from fedzo.errors import RunFolderError
from fedzo.records.decode import decode, encode, to_json
from fedzo.records.log import ScalarAuditLine, ScalarLine, VectorLine
from fedzo.testing.logs import audit_line


def test_the_entries_of_a_public_line_have_their_order() -> None:
    """A log's bytes do not depend on how the classes of its lines are put together."""
    proof: dict[str, Any] = {"chain": "a" * 64, "check": 7, "digest": None}
    c = np.full((1, 1, 1), 0.5, np.float32)
    scalars = ScalarLine(round=1, lr=0.25, owners=(4,), directions="shared", c=c, attendance=(0, 4), **proof)
    vector = VectorLine(round=1, lr=0.25, size=3, vector="b" * 64, attendance=(0, 4), **proof)

    end = f'"attendance":[0,4],"chain":"{"a" * 64}","check":7,"digest":null}}'
    assert to_json(scalars) == f'{{"round":1,"lr":0.25,"owners":[4],"directions":"shared","c":[[[0.5]]],{end}'
    assert to_json(vector) == f'{{"kind":"vector","round":1,"lr":0.25,"size":3,"vector":"{"b" * 64}",{end}'


def changed(**client: Any) -> dict[str, Any]:
    line = encode(audit_line({0: [[0.5], [1.0]], 3: [[2.0]]}, xi=[[[1.0]], [[2.0]]]))
    line["clients"][0] |= client
    return json.loads(json.dumps(line))


def read(line: dict[str, Any]) -> ScalarAuditLine:
    return decode(ScalarAuditLine, line, where="line", error=RunFolderError)


def test_a_line_keeps_its_clients_scalars_as_arrays() -> None:
    line = read(changed())

    assert [client.g.tolist() for client in line.clients] == [[[0.5], [1.0]], [[2.0]]]
    assert [client.steps for client in line.clients] == [2, 1]
    assert line.xi is not None
    assert line.xi.shape == (2, 1, 1)


@pytest.mark.parametrize(
    "client",
    [
        {"g": [[0.5]]},
        {"loss": [[0.5]]},
        {"dropped": [[False]]},
        {"dropped": [[False, False], [False, False]]},
        {"steps": 3},
    ],
)
def test_the_numbers_of_a_client_have_one_shape(client: dict[str, Any]) -> None:
    with pytest.raises(
        RunFolderError, match=r"line: clients\[0\] must hold g, loss and dropped of steps = . rows each"
    ):
        read(changed(**client))


def test_clients_have_as_many_probes_as_each_other() -> None:
    two = [[0.5, 0.5], [1.0, 1.0]]
    no = [[False, False], [False, False]]

    with pytest.raises(RunFolderError, match=r"line: must hold as many probes of each client, not \[1, 2\]"):
        read(changed(g=two, loss=two, dropped=no))


@pytest.mark.parametrize("xi", [[[[1.0]]], [[[1.0], [1.0]], [[1.0], [1.0]]], [[[1.0] * 3]] * 2])
def test_xi_is_of_the_rounds_steps_probes_and_one_or_all_of_its_clients(xi: list[Any]) -> None:
    with pytest.raises(RunFolderError, match="line: must hold xi of 2 steps or more, 1 probes and"):
        read({**changed(), "xi": xi})

    assert read({**changed(), "xi": [[[1.0, None]], [[2.0, 3.0]]]}).xi is not None


def test_a_line_of_a_thousand_steps_is_read_in_milliseconds() -> None:
    """Twelve clients: about 7 ms; the bound leaves room for a busy machine."""
    scalars = np.linspace(-1, 1, 1000, dtype=np.float32)[:, None]
    line = json.loads(json.dumps(encode(audit_line(dict.fromkeys(range(12), scalars), xi=scalars[:, :, None]))))
    read(line)

    taken = []
    for _ in range(5):
        started = time.process_time()
        read(line)
        taken.append(time.process_time() - started)

    assert min(taken) < 0.1
