"""What a client tells of itself, and what its log takes over from a server."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedzo.config.schema import RunConfig, SiteFile
from fedzo.data.config import Loss, TaskConfig
from fedzo.data.encode import Example
from fedzo.errors import ProtocolError
from fedzo.evaluate import AnswersConfig
from fedzo.evaluate.answers import Answers
from fedzo.fl.client.worker import ClientData, ClientWorker, log_failure
from fedzo.fl.config import SiteLimitsConfig
from fedzo.fl.limits import Limits
from fedzo.fl.messages import Hello, Identity, ScalarReply, Status, TrainRequest, VectorReply, scalars_to_bytes
from fedzo.fl.replica import Replica
from fedzo.models.config import BaseConfig
from fedzo.testing.vector_space import VectorSpace
from fedzo.zo import log as zo_log
from fedzo.zo.estimator import BackpropConfig
from fedzo.zo.log import VectorRecord, checked_vector, pack
from fedzo.zo.server_optimizer import Sgd, SgdConfig

IDENTITY = Identity(config_hash="a" * 64, base_digest="b" * 64, tokenizer_digest="c" * 64, task_digest="e" * 64)
RUN = RunConfig(
    base=BaseConfig(label="m", weights_digest="", tokenizer_digest="", architecture_digest=""), artifact="e" * 64
)


def test_a_log_of_the_site_shows_a_servers_words_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    log_failure(0, ProtocolError("protocol: version \x1b[2J\nconnected to fed.example.org"))
    log_failure(None, RuntimeError("a\nb"))

    told = [record.getMessage() for record in caplog.records]
    assert told == ["client 0: protocol: version  [2J connected to fed.example.org", "client ?: RuntimeError: a b"]
    assert all(text.isprintable() for text in told)


@pytest.mark.parametrize(("min_rows", "told"), [(0, (2, 1)), (2, (2, 0)), (3, (0, 0))])
def test_how_many_rows_were_cut_is_a_count_as_any_other(min_rows: int, told: tuple[int, int]) -> None:
    """Two of 9 training rows, one of 8 held-out rows, which is cut where an answer is written."""
    whole = Example(prompt=(1,), candidates=((2,), (3,)), label=0)
    data = ClientData(
        train=[replace(whole, cut=number < 2, written_cut=number < 5) for number in range(9)],
        heldout=[replace(whole, written_cut=number < 1) for number in range(8)],
        label_counts={},
    )
    limits = Limits(run=RUN, site=SiteFile(limits=SiteLimitsConfig(min_rows=min_rows)))
    unused: Any = None
    clients: Any = SimpleNamespace(identity=IDENTITY, register=lambda client, begun: "d" * 64, data=lambda client: data)
    artifacts: Any = SimpleNamespace(find=lambda digest: True)
    worker = ClientWorker(IDENTITY.config_hash, unused, clients, limits=limits, evaluators={}, artifacts=artifacts)

    reply = worker.hello(Hello(client=0))

    assert (reply.num_train, reply.num_heldout) == (9, 8)
    assert (reply.num_train_cut, reply.num_heldout_cut) == told


def test_values_are_asked_for_by_the_client_whose_replay_led_elsewhere_until_one_leads_right() -> None:
    asked: list[tuple[int, bool]] = []
    statuses = iter([Status.ok, Status.mismatch, *[Status.ok] * 6])
    workspace: Any = SimpleNamespace(replica=SimpleNamespace(sync=lambda request, records: next(statuses), position=0))
    artifacts: Any = SimpleNamespace(find=lambda digest: True)
    limits: Any = SimpleNamespace(
        run=RUN,
        site=SiteFile(),
        check_client=lambda client: None,
        check_steps=lambda request: None,
        check_state=lambda request, asked_values: asked.append((request.client, asked_values)),
    )
    update: Any = SimpleNamespace(reply_type=ScalarReply, make=lambda at, request: ScalarReply())
    clients: Any = SimpleNamespace(progress=lambda client: None, workspace=lambda artifact, asked: workspace)
    worker = ClientWorker(IDENTITY.config_hash, update, clients, limits=limits, evaluators={}, artifacts=artifacts)

    for client, values, log in (
        *((0, b"", b""), (0, b"", b"log"), (1, b"", b"log")),
        *((0, b"1234", b""), (0, b"1234", b"")),  # the second where the first one's reply was lost
        *((0, b"", b""), (0, b"", b"log"), (0, b"", b"log")),
    ):
        worker.train(TrainRequest(client=client, config_hash="a" * 64, space_id="e" * 64, values=values, log=log))

    assert asked == [
        *((0, False), (0, False), (1, False)),
        *((0, True), (0, True)),
        *((0, True), (0, True), (0, False)),
    ]


def test_a_vector_is_unpacked_and_hashed_once_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []

    def counted(data: Any, *, digest: str, what: str) -> Any:
        hashed.append(what)
        return checked_vector(data, digest=digest, what=what)

    monkeypatch.setattr(zo_log, "checked_vector", counted)
    spaces = [VectorSpace(np.zeros(3, np.float32)) for _ in range(2)]
    server, replica = (Replica(each, server_optimizer=Sgd(), reset=lambda: None, run_seed=1) for each in spaces)
    record = VectorRecord.of(np.array([1, -2, 4], np.float32), round=0, lr=0.5)
    server.advance([record])
    run = replace(RUN, estimator=BackpropConfig(), server_optimizer=SgdConfig(lr=0.5))
    workspace: Any = SimpleNamespace(replica=replica)
    update: Any = SimpleNamespace(reply_type=VectorReply, make=lambda at, request: VectorReply(position=7))
    clients: Any = SimpleNamespace(progress=lambda client: None, workspace=lambda artifact, asked: workspace)
    artifacts: Any = SimpleNamespace(find=lambda digest: True)
    limits = Limits(run=run, site=SiteFile())
    worker = ClientWorker(IDENTITY.config_hash, update, clients, limits=limits, evaluators={}, artifacts=artifacts)

    reply = worker.train(
        TrainRequest(
            client=0,
            config_hash="a" * 64,
            space_id="e" * 64,
            round=1,
            log=pack([record]),
            chain=server.chain.hex(),
            check=server.check(),
            lr=0.5,
        )
    )

    assert reply == VectorReply(position=7)
    assert replica.space.values().tolist() == [-1, 2, -4]
    assert hashed == ["log: the vector of round 0"]


@pytest.mark.parametrize(
    ("loss", "answers", "leave"),
    [
        (Loss.score, [], True),
        (Loss.score, ["loss", "accuracy"], True),
        (Loss.score, ["loss"], False),
        (Loss.score, ["accuracy"], False),
        (Loss.candidates, ["loss"], True),
        (Loss.candidates, ["accuracy"], False),
    ],
)
def test_losses_of_steps_leave_a_site_where_all_that_they_tell_may(loss: Loss, answers: list[str], leave: bool) -> None:
    sent = ScalarReply(g=scalars_to_bytes(np.ones(2, np.float32)), loss=scalars_to_bytes(np.array([-0.5, -1], "f4")))
    limits: Any = SimpleNamespace(
        run=replace(RUN, task=TaskConfig(loss=loss)),
        site=SiteFile(limits=SiteLimitsConfig(answers=answers)),
        check_client=lambda client: None,
        check_steps=lambda request: None,
        check_state=lambda request, asked_values: [],
    )
    workspace: Any = SimpleNamespace(replica=SimpleNamespace(sync=lambda request, records: Status.ok, position=0))
    update: Any = SimpleNamespace(reply_type=ScalarReply, make=lambda at, request: sent)
    clients: Any = SimpleNamespace(progress=lambda client: None, workspace=lambda artifact, asked: workspace)
    artifacts: Any = SimpleNamespace(find=lambda digest: True)
    evaluators = {"answers": Answers(AnswersConfig())}
    worker = ClientWorker(
        IDENTITY.config_hash, update, clients, limits=limits, evaluators=evaluators, artifacts=artifacts
    )

    reply = worker.train(TrainRequest(client=0, config_hash="a" * 64, space_id="e" * 64))

    assert reply.g == sent.g
    told = np.frombuffer(reply.loss, "<f4").tolist()
    assert told == pytest.approx([-0.5, -1.0] if leave else [np.nan] * 2, nan_ok=True)
