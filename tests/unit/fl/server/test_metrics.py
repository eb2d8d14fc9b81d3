"""The bytes that a round's metrics count: against what a grid counted, and what clients were sent."""

from __future__ import annotations

import pytest
from scripted import Federation

from fedzo.fl.config import Directions
from fedzo.records.decode import encode as encode_record
from fedzo.zo.log import unpack


def test_wire_bytes_of_a_round_are_those_since_the_round_before(federation: Federation) -> None:
    server, _, grid = federation()
    server.run_round()
    grid.wire = (1000, 5000)
    server.run_round()  # the count begins here
    grid.wire = (1700, 5100)
    server.run_round()

    told = [(line.wire_up_bytes, line.wire_down_bytes) for line in server.sink.records]
    assert told == [(None, None), (None, None), (700, 100)]
    assert "wire_up_bytes" not in encode_record(server.sink.records[0])


@pytest.mark.parametrize("directions", [Directions.shared, Directions.per_client])
def test_what_a_client_missed_counts_where_it_is_sent(federation: Federation, directions: Directions) -> None:
    """One of three clients a round: a record that a client is sent counts once, though a restart sends it again.

    The restart that matters is the server's, which then knows from its log alone how far each client had come.
    """
    server, clients, _ = federation(directions=directions, clients_per_round=1)
    told = []
    for _ in range(2):
        server.run_round()
    told += server.sink.records
    server.store.close()
    server, restarted, _ = federation(directions=directions, clients_per_round=1)
    server.catch_up()
    for _ in range(8):
        server.run_round()
    told += server.sink.records

    sizes = [record.coefficients.nbytes for record in server.store.records]
    last_rounds = {line.clients[0].client: round for round, line in enumerate(server.store.audit)}
    assert len(set(last_rounds.values())) == 3, "a test of nothing"
    expected = 0
    for client, last_round in last_rounds.items():
        requests = [*clients[client].requests, *restarted[client].requests]
        missed_rounds = {record.round for request in requests for record in unpack(request.log)}
        assert missed_rounds == set(range(last_round))
        expected += sum(sizes[round] for round in missed_rounds | {last_round})  # its last round's own record, too
    assert sum(line.payload_down_bytes for line in told) == expected
