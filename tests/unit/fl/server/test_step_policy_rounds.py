"""Rounds under a step policy: what each client is asked, what is told of a decision, and what a resume selects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripted import BASE, Client, Federation, Grid

from fedzo.errors import PluginError
from fedzo.fl.config import Transport
from fedzo.fl.messages import TrainRequest
from fedzo.fl.server.rounds import Server
from fedzo.fl.server.step_policy.cusum import CusumConfig
from fedzo.fl.server.step_policy.plan import Plan, StepPolicyConfig
from fedzo.fl.server.step_policy.vpcs import VpcsConfig
from fedzo.records.decode import encode as encode_record
from fedzo.records.metrics import ClientVerdict, Round, StepDecision
from fedzo.zo.server_optimizer import AdamConfig, ServerOptimizerConfig, SgdConfig

VPCS = VpcsConfig(calibration_steps=9, initial_steps=3, later_steps=3)


def falling(request: TrainRequest) -> np.ndarray:
    """Dies away along the client's own path, and is 4 in a first step."""
    return 4.0 * 0.25 ** np.arange(request.steps)


def calibrated(federation: Federation, **settings: Any) -> tuple[Server, list[Client], Grid]:
    server, clients, grid = federation(4, step_policy=VPCS, **settings)
    clients[3].g_of = falling
    return server, clients, grid


@pytest.mark.parametrize("transport", list(Transport))
@pytest.mark.parametrize(
    "server_optimizer", [SgdConfig(lr=0.5, weight_decay=0.1), AdamConfig(lr=0.5)], ids=["sgd", "adam"]
)
def test_the_calibration_round_measures_and_leaves_the_model_where_it_was(
    federation: Federation, server_optimizer: ServerOptimizerConfig, transport: Transport
) -> None:
    server, clients, _ = calibrated(
        federation, server_optimizer=server_optimizer, transport=transport, clients_per_round=2
    )

    record = server.run_round()

    assert (record.lr, record.coefficients.shape) == (0.0, (9, 1, 1))
    assert not record.coefficients.any()
    assert server.replica.space.theta.tobytes() == BASE.tobytes()
    assert not server.replica.moments.any()
    (line,) = server.store.audit
    assert line.lr == 0.5
    assert [entry.client for entry in line.clients] == [0, 1, 2, 3]  # all of them, whoever a round samples
    assert line.clients[3].g[:, 0].tolist() == falling(clients[3].requests[0]).tolist()
    assert [(request.steps, request.lr) for request in clients[0].requests] == [(9, 0.5)]
    server.run_round()
    assert server.store.audit[1].refused == ()  # clients arrive at the same state by the log and by values


def test_a_calibration_steps_at_the_full_learning_rate_whatever_the_warm_up(federation: Federation) -> None:
    server, clients, _ = calibrated(federation, server_optimizer=SgdConfig(lr=0.5, warmup_rounds=4))

    server.run_round()
    server.run_round()

    assert [request.lr for request in clients[0].requests] == [0.5, pytest.approx(0.2)]


def test_a_flagged_client_stops_early_and_goes_on_in_its_own_rows(federation: Federation) -> None:
    server, clients, _ = calibrated(federation)

    for _ in range(4):
        server.run_round()

    assert [request.steps for request in clients[0].requests] == [9, 2, 2, 2]
    assert [request.steps for request in clients[3].requests] == [9, 1, 1, 1]
    assert [request.used for request in clients[0].requests] == [0, 9, 11, 13]
    assert [request.used for request in clients[3].requests] == [0, 9, 10, 11]
    record = server.store.records[1]
    assert record.coefficients[:, 0, 0].tolist() == [(1 + 2 + 3 + 4) / 4, (1 + 2 + 3) / 4]
    rounds = [record for record in server.sink.records if isinstance(record, Round)]
    assert [row.steps for row in rounds[1].clients] == [2, 2, 2, 1]
    assert rounds[1].payload_up_bytes == 4 * 7


def test_a_decision_is_told_once_with_what_it_rests_on(federation: Federation) -> None:
    server, _, _ = calibrated(federation)

    for _ in range(5):
        server.run_round()

    (told,) = [record for record in server.sink.records if isinstance(record, StepDecision)]
    assert (told.round, told.fallback, told.windows) == (1, False, {"initial": (0, 3), "later": (6, 9)})
    assert [row.flagged for row in told.clients] == [False, False, False, True]
    assert [row.steps for row in told.clients] == [2, 2, 2, 1]
    assert [row.statistics["ratio"] for row in told.clients] == [1.0, 1.0, 1.0, 4.0**6]
    later = 4 * (4.0**-6 + 4.0**-7 + 4.0**-8) / 3
    assert told.clients[3].statistics["level"] == pytest.approx(2 / later)


def test_where_too_many_are_flagged_all_take_fewer_steps(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    server, clients, _ = federation(4, step_policy=VPCS)
    for client in clients[1:]:
        client.g_of = falling

    server.run_round()
    server.run_round()

    assert [client.requests[1].steps for client in clients] == [1, 1, 1, 1]
    assert [record.fallback for record in server.sink.records if isinstance(record, StepDecision)] == [True]
    assert "flagged: 1, 2, 3; this is more than step_policy.max_share, so all clients take 1 of 2 steps" in caplog.text


def test_a_client_that_was_absent_from_the_calibration_is_not_judged(federation: Federation) -> None:
    server, clients, _ = calibrated(federation)
    clients[3].bend = lambda reply: None
    server.run_round()
    clients[3].bend = lambda reply: reply

    server.run_round()

    assert clients[3].requests[-1].steps == 2
    (told,) = [record for record in server.sink.records if isinstance(record, StepDecision)]
    assert told.clients[3] == ClientVerdict(client=3, flagged=False, steps=2, statistics={})


@pytest.mark.parametrize("step_policy", [VPCS, CusumConfig(threshold=2.0)], ids=["vpcs", "cusum"])
@pytest.mark.parametrize("after", range(1, 5))
def test_a_resumed_server_selects_as_an_unbroken_one(
    federation: Federation, tmp_path: Path, step_policy: StepPolicyConfig, after: int
) -> None:
    def play(rounds: int) -> tuple[Any, list[Client]]:
        server, clients, _ = federation(4, step_policy=step_policy)
        clients[3].g_of = falling if step_policy is VPCS else lambda request: np.full(request.steps, 0.1)
        server.catch_up()
        for _ in range(rounds):
            server.run_round()
        return server, clients

    unbroken, asked = play(5)
    expected = [request.steps for request in asked[3].requests]
    assert expected == ([9, 1, 1, 1, 1] if step_policy is VPCS else [2, 2, 1, 1, 1])
    lines, digest = list(map(encode_record, unbroken.store.public)), unbroken.replica.space.digest()
    unbroken.store.close()
    for file in tmp_path.iterdir():
        file.unlink()
    before, first = play(after)
    before.store.close()

    resumed, then = play(5 - after)

    steps = {request.round: request.steps for client in (first, then) for request in client[3].requests}
    assert [*steps.items()] == [*enumerate(expected)]  # a new process says that it is behind, and is asked again
    assert list(map(encode_record, resumed.store.public)) == lines
    assert resumed.replica.space.digest() == digest


@pytest.mark.parametrize(
    ("plan", "rule"),
    [
        ({0: 1, 1: 1, 2: 1}, "must give a fedzo.fl.server.step_policy.plan.Plan, got"),
        (Plan({0: 1, 1: 1}), r"must give steps of each of the clients 0 to 2, got \{0: 1, 1: 1\}"),
        (Plan({0: 1, 1: 0, 2: 1}), "must give whole numbers of steps from 1 to 2, got"),
        (Plan({0: 1, 1: 3, 2: 1}), "must give whole numbers of steps from 1 to 2, got"),
        (Plan({0: 1, 1: 1.5, 2: 1}), "must give whole numbers of steps from 1 to 2, got"),  # type: ignore[dict-item]
    ],
)
def test_a_step_policy_is_held_to_the_clients_and_steps_of_the_run(
    federation: Federation, plan: Any, rule: str
) -> None:
    server, clients, _ = federation()
    server.step_policy = _Planned(plan)

    with pytest.raises(PluginError, match=rf"_Planned\.plan {rule}"):
        server.run_round()

    assert not any(client.requests for client in clients)


def test_steps_that_a_step_policy_computes_are_sent_as_whole_numbers(federation: Federation) -> None:
    server, clients, _ = federation()
    server.step_policy = _Planned(Plan(dict(zip(range(3), np.array([1, 2, 1]), strict=True))))

    server.run_round()

    assert [[type(request.steps) for request in client.requests] for client in clients] == [[int]] * 3
    assert [client.requests[0].steps for client in clients] == [1, 2, 1]


class _Planned:
    """A step policy that gives whatever it is told to."""

    def __init__(self, given: Any) -> None:
        self.given = given

    def plan(self, audit: Any, label_counts: Any) -> Any:
        return self.given
