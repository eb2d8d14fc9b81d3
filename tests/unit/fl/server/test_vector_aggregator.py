"""Vectors at the server: what is refused, means against slow twins, what log and metrics tell, and whole rounds."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
from scripted import BASE, Client, Federation, new_replica, reason_for

from fedzo.config.schema import RunSettings
from fedzo.errors import ProtocolError, RunFolderError
from fedzo.fl import log_store
from fedzo.fl.config import Aggregation, StrategyConfig
from fedzo.fl.exchange import Traffic
from fedzo.fl.log_files import read_vector
from fedzo.fl.messages import TrainRequest, VectorReply, scalars_to_bytes
from fedzo.fl.server import vector_aggregator
from fedzo.fl.server.aggregator import Replies
from fedzo.fl.server.metrics import round_metrics
from fedzo.fl.server.rounds import Server
from fedzo.fl.server.step_policy.baselines import OracleConfig
from fedzo.fl.server.vector_aggregator import VectorAggregator, VectorResult
from fedzo.records.decode import parse_json, to_json
from fedzo.records.log import VectorAuditLine, decode_audit
from fedzo.records.metrics import Round
from fedzo.zo.log import pack, unpack

SIZE = 5
REQUEST = TrainRequest(client=0, steps=2, lr=0.5)


def aggregator(**strategy: Any) -> VectorAggregator:
    return VectorAggregator(SIZE, RunSettings(strategy=StrategyConfig(**strategy)))


def replies(results: dict[int, VectorResult], weights: dict[int, float], **asked: Any) -> Replies[VectorResult]:
    facts: dict[str, Any] = {"round": 0, "lr": 0.5, "used": dict.fromkeys(results, 0), "refused": {}, **asked}
    return Replies(bound=0.0, measures_only=False, weights=weights, results=results, traffic=Traffic(), **facts)


def reply(change: Any = (3, 4, 0, 0, 0), loss: Any = (0.5, 0.25)) -> VectorReply:
    numbers = [scalars_to_bytes(np.array(each, np.float32)) for each in (change, loss)]
    return VectorReply(change=numbers[0], loss=numbers[1])


def test_a_good_reply_is_its_numbers() -> None:
    sent = reply(loss=[0.5, np.nan])
    result = aggregator().check(sent, REQUEST)

    assert result.change.tolist() == [3, 4, 0, 0, 0]
    assert np.shares_memory(result.change, np.frombuffer(sent.change, np.uint8))  # a server holds each once
    assert result.dropped.tolist() == [False, True]
    assert result.payload_bytes == 4 * SIZE
    assert result.norm == 5.0 / (0.5 * 2)


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (reply(change=[1, 2, 3]), r"change must hold 20 bytes \(float32 \[5\]\), got 12"),
        (reply(change=[1] * 6), "change must hold 20 bytes"),
        (reply(loss=[1, 2, 3]), r"loss must hold 8 bytes \(float32 \[2\]\), got 12"),
        (reply(change=[np.nan, 0, 0, 0, 0]), "change must be finite"),
        (reply(change=[0, np.inf, 0, 0, 0]), "change must be finite"),
        (reply(change=[30, 40, 0, 0, 0]), r"the norm of change must be at most .* = 10 times .*, 10, got 50"),
        (reply(loss=[3e38, 0]), r"\|loss\| must be at most 1e\+06, and nan where it is not finite, got 3e\+38"),
        (reply(loss=[np.inf, 0]), r"\|loss\| must be at most 1e\+06"),
        (reply(change=[3e38] * 5), "the norm of change must be at most"),
        (reply(loss=[np.nan, np.nan]), "a client that took no step must send a change of zeros"),
    ],
)
def test_a_reply_that_cannot_be_used_is_refused_with_the_reason(bad: VectorReply, match: str) -> None:
    with pytest.raises(ProtocolError, match=match):
        aggregator(max_abs_g=10.0).check(bad, REQUEST)


def test_a_client_that_took_no_step_counts_as_one_that_did_not_move() -> None:
    still = aggregator().check(reply(change=[0] * 5, loss=[np.nan, np.nan]), REQUEST)

    assert still.dropped.all()
    assert still.norm == 0


def test_clients_that_took_no_step_are_in_no_median_of_norms() -> None:
    """Their norm of 0 would make the bound 0, which is none."""
    still = aggregator().check(reply(change=[0] * 5, loss=[np.nan, np.nan]), REQUEST)
    honest, hostile = (aggregator().check(reply(change=(3 * k, 4 * k, 0, 0, 0)), REQUEST) for k in (1, 1e5))
    results = {**dict.fromkeys(range(4), still), 4: honest, 5: honest, 6: hostile}

    (refused,) = aggregator().far_off(results).items()

    assert refused[0] == 6
    assert "must be at most 500, by the round's other clients, got 500000" in refused[1]


def drawn(count: int, size: int) -> dict[int, VectorResult]:
    draw = np.random.default_rng(3)
    return {
        client: VectorResult(draw.standard_normal(size).astype(np.float32), np.ones(2, np.float32), 1.0)
        for client in draw.permutation(count).tolist()
    }


def trimmed(values: list[float], cut: int) -> float:
    kept = sorted(values)[cut : len(values) - cut]
    return sum(kept) / len(kept)


@pytest.mark.parametrize("piece", [2, 1 << 16])
@pytest.mark.parametrize("count", [1, 2, 5, 6])
@pytest.mark.parametrize("aggregation", [Aggregation.mean, Aggregation.median, Aggregation.trimmed_mean])
def test_a_mean_is_its_slow_twin(
    monkeypatch: pytest.MonkeyPatch, aggregation: Aggregation, count: int, piece: int
) -> None:
    monkeypatch.setattr(vector_aggregator, "_PIECE", piece)
    results, weights = drawn(count, SIZE), {client: 1.0 + client for client in range(9)}
    cut = min(max(1, int(0.34 * count)), (count - 1) // 2)
    twin = {
        Aggregation.mean: lambda at: (
            sum(weights[c] * float(r.change[at]) for c, r in results.items()) / sum(weights[c] for c in results)
        ),
        Aggregation.median: lambda at: median(float(r.change[at]) for r in results.values()),
        Aggregation.trimmed_mean: lambda at: trimmed([float(r.change[at]) for r in results.values()], cut),
    }[aggregation]

    record = aggregator(aggregation=aggregation, trim_share=0.34).combine(replies(results, weights, round=4))

    assert record.read() == pytest.approx([twin(at) for at in range(SIZE)], rel=1e-6)
    assert (record.round, record.lr, record.size) == (4, 0.5, SIZE)


def test_normalised_shares_make_up_for_unequal_steps() -> None:
    rng = np.random.default_rng(5)
    steps, weights = {0: 4, 2: 1, 5: 2}, {0: 1.0, 2: 2.0, 5: 1.0}
    results = {
        k: VectorResult(rng.normal(size=SIZE).astype(np.float32), np.ones(n, np.float32), 1.0) for k, n in steps.items()
    }
    mean = (1 * 4 + 2 * 1 + 1 * 2) / 4

    config = RunSettings(step_policy=OracleConfig(normalise=True))
    record = VectorAggregator(SIZE, config).combine(replies(results, weights))

    by_hand = sum(weights[k] / 4 * mean * results[k].change.astype(float) / steps[k] for k in steps)
    assert record.read() == pytest.approx(by_hand, rel=1e-6)


def test_one_hostile_client_cannot_leave_the_range_of_the_honest() -> None:
    results = drawn(5, SIZE)
    results[2] = VectorResult(np.full(SIZE, 1e30, np.float32), np.ones(2, np.float32), 1.0)
    honest = np.stack([result.change for client, result in results.items() if client != 2])
    for aggregation in (Aggregation.median, Aggregation.trimmed_mean):
        record = aggregator(aggregation=aggregation).combine(replies(results, dict.fromkeys(range(5), 1.0)))
        assert (record.read() >= honest.min(0)).all()
        assert (record.read() <= honest.max(0)).all()


def test_the_order_of_arrival_changes_no_bit_and_equal_vectors_give_themselves() -> None:
    results, weights = drawn(6, SIZE), {client: 0.1 * (client + 1) for client in range(6)}
    made = [aggregator().combine(replies(given, weights)).digest for given in (results, dict(sorted(results.items())))]
    same = dict.fromkeys(range(3), results[0])

    assert made[0] == made[1]
    assert aggregator().combine(replies(same, weights)).read() == pytest.approx(results[0].change, rel=1e-7)


def line() -> VectorAuditLine:
    results = {3: aggregator().check(reply(loss=[0.5, np.nan]), REQUEST), 1: aggregator().check(reply(), REQUEST)}
    got = replies(results, {1: 1.0, 3: 2.0}, round=6, used={1: 0, 3: 8}, refused={2: "late"})
    return aggregator().audit(aggregator().combine(got), got)


def test_the_audit_line_holds_digests_norms_and_losses() -> None:
    told = json.loads(to_json(line()))

    sent = hashlib.sha256(np.array([3, 4, 0, 0, 0], "<f4").tobytes()).hexdigest()
    assert told == {
        "kind": "vectors",
        "round": 6,
        "lr": 0.5,
        "clients": [
            {"client": 1, "vector": sent, "norm": 5.0, "loss": [0.5, 0.25], "steps": 2, "used": 0, "weight": 1.0},
            {"client": 3, "vector": sent, "norm": 5.0, "loss": [0.5, None], "steps": 2, "used": 8, "weight": 2.0},
        ],
        "refused": [2],
    }
    back = decode_audit(parse_json(to_json(line()), where="x", error=RunFolderError), where="x", error=RunFolderError)
    assert to_json(back) == to_json(line())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"steps": 3}, r"clients\[0\] must hold a loss of each of steps = 3, not 2"),
        ({"vector": "00"}, r"clients\[0\].vector must be 64 hexadecimal digits"),
        ({"norm": -1.0}, r"clients\[0\].norm must be a float of 0 to"),
        ({"g": [[1.0]]}, r"clients\[0\].g must be left out"),
    ],
)
def test_an_audit_line_out_of_its_ranges_is_refused(change: dict[str, Any], match: str) -> None:
    told = json.loads(to_json(line()))
    told["clients"][0].update(change)

    with pytest.raises(RunFolderError, match=match):
        decode_audit(told, where="x", error=RunFolderError)


def test_metrics_tell_losses_and_no_g() -> None:
    results = {3: aggregator().check(reply(loss=[0.5, np.nan]), REQUEST), 1: aggregator().check(reply(), REQUEST)}
    got = replies(results, {1: 1.0, 3: 2.0}, round=6)
    record = aggregator().combine(got)
    audit = aggregator().audit(record, got)
    unused: dict[str, Any] = {"clipped": 0, "wire": None, "down_bytes": 0, "seconds": 0.0, "round_seconds": 0.0}

    told = round_metrics(record, got, audit, aggregator().signals(record, audit), **unused)

    rows = [(row.client, row.loss, row.abs_g, row.steps, row.signals.loss) for row in told.clients]
    assert rows == [(1, 0.375, None, 2, (0.5, 0.25)), (3, 0.5, None, 2, (0.5, None))]
    assert all(row.signals.grad_ip == row.signals.abs_g == (None, None) for row in told.clients)
    assert (told.loss, told.mean_abs_g) == (0.4375, None)


# --- rounds ---


def make_vectors(server: Server, clients: list[Client]) -> None:
    """Let all send vectors: a client moves each value by its index plus one, a step."""

    def train(client: Client, request: TrainRequest) -> Any:
        client.requests.append(request)
        client.replica = client.replica or new_replica()
        status = client.replica.sync(request, [*unpack(request.log)])
        change = np.full(len(BASE), (client.index + 1) * request.steps, np.float32)
        loss = np.ones(request.steps, np.float32)
        return VectorReply(
            status=status,
            position=client.replica.position,
            change=scalars_to_bytes(change),
            loss=scalars_to_bytes(loss),
        )

    server.aggregator = VectorAggregator(len(BASE), server.config)
    for client in clients:
        client.train = partial(train, client)  # type: ignore[method-assign]


def test_vectors_are_followed_record_by_record_and_a_late_client_gets_the_values(federation: Federation) -> None:
    server, clients, grid = federation()
    make_vectors(server, clients)
    node = next(name for name, client in grid.nodes.items() if client is clients[2])
    grid.nodes[node] = None  # listed, but it does not answer
    for _ in range(3):
        server.run_round()
    grid.nodes[node] = clients[2]
    clients[1].replica = None  # a process that was started again, and that the server does not know of

    server.run_round()

    vector = 4 * len(BASE)
    assert [len(request.log) for request in clients[0].requests] == [0, *[54 + vector] * 3]
    assert {len(request.values) for request in clients[0].requests} == {0}
    late = clients[2].requests[-1]
    assert (len(late.log), len(late.values), late.from_round) == (0, vector, 3)
    assert [len(request.values) for request in clients[1].requests[-2:]] == [0, vector]  # first behind, then helped
    expected = BASE - np.float32(3 * 2 * (1 + 2) / 2 + 2 * (1 + 2 + 3) / 3)
    assert server.replica.space.values() == pytest.approx(expected, rel=1e-6)
    rounds = [record for record in server.sink.records if isinstance(record, Round)]
    assert [record.payload_up_bytes for record in rounds] == [2 * vector] * 3 + [3 * vector]
    assert [record.payload_down_bytes for record in rounds] == [2 * vector] * 3 + [(1 + 1 + 2) * vector]


def test_a_round_reads_the_vector_that_it_sends_once(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many clients are sent it."""
    reads: list[int] = []

    def counted(folder: Path, digest: str, round: int, size: int) -> Any:
        reads.append(round)
        return read_vector(folder, digest, round, size)

    monkeypatch.setattr(log_store, "read_vector", counted)
    server, clients, _ = federation()
    make_vectors(server, clients)

    for _ in range(3):
        server.run_round()

    assert reads == [0, 1]
    assert clients[0].requests[2].log == clients[1].requests[2].log == pack(server.store.records[1:2])


def test_a_vector_that_cannot_be_used_is_excluded_and_named(federation: Federation) -> None:
    server, clients, _ = federation()
    make_vectors(server, clients)
    clients[1].train = lambda request: VectorReply(change=b"1234", loss=bytes(8))

    server.run_round()

    assert reason_for(server, 0, 1) == "change must hold 36 bytes (float32 [9]), got 4"
    assert server.replica.space.values() == pytest.approx(BASE - np.float32(2 * (1 + 3) / 2), rel=1e-6)


def test_vectors_far_beyond_the_others_are_refused(federation: Federation) -> None:
    server, clients, _ = federation()
    make_vectors(server, clients)
    honest = clients[2].train
    clients[2].train = lambda request: replace(honest(request), change=scalars_to_bytes(np.full(9, 3e5, np.float32)))

    server.run_round()

    assert server.store.public[0].attendance == (0, 1)
    assert "the norm of change over learning rate and steps must be at most" in reason_for(server, 0, 2)
