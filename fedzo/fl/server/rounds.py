"""The server's round loop.

::

    server                                                   client k
    ------                                                   --------
    sample clients of round r
    TrainRequest {r, T, lr, used rows, log suffix,       ->  replay the suffix, compare hashes
                  hash chain, check}                         T times: estimate and clip g on the next rows
                                                         <-  ScalarReply {T x P scalars, losses, flags}
    refuse what cannot be used; c = weighted mean of g
    commit to the log (fsync); move theta by the server optimizer

Where clients compute gradients, a VectorReply holds n numbers instead. Only the ``Aggregator`` knows the difference.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from fedzo.errors import FedzoError, ProtocolError, printable, some_reasons
from fedzo.fl.config import Transport, Weighting
from fedzo.fl.exchange import Answers, Grid, Traffic
from fedzo.fl.log_store import RunStore
from fedzo.fl.messages import EvaluateReply, EvaluateRequest, TrainRequest
from fedzo.fl.replica import Replica
from fedzo.fl.server.aggregator import Aggregator, Replies, Result
from fedzo.fl.server.client_registry import ClientRegistry
from fedzo.fl.server.metrics import round_metrics
from fedzo.fl.server.shares import client_weights
from fedzo.fl.server.step_policy.plan import Plan, StepPolicy, checked_plan, news
from fedzo.fl.server.sync import StateSync
from fedzo.fl.server.turnout import Turnout
from fedzo.records.log import AuditLine, ScalarAuditLine
from fedzo.records.metrics import MetricRecord, Round, StepDecision
from fedzo.records.presence import Presence
from fedzo.system import OnProgress, no_progress
from fedzo.trainers.artifacts import Artifact
from fedzo.zo.log import LogRecord
from fedzo.zo.server_optimizer import learning_rate

if TYPE_CHECKING:
    from fedzo.config.schema import RunSettings

log = logging.getLogger(__name__)


class FederationError(FedzoError):
    """The federation cannot go on; what was committed is kept."""


class Sink(Protocol):
    """Takes metric records."""

    def write(self, record: MetricRecord) -> None: ...


@dataclass(slots=True)
class Server:
    """One run at the server: its log, its replica and what it knows of the clients.

    Attributes:
        replica: The server's own copy of the model, always at the end of the log between rounds.
        artifact: What clients need beside the model to build the space.
        aggregator: What is done with replies, by the kind of local update.
        step_policy: Says how many local steps each client takes in a round.
        label_counts: Training rows by label of every client, where the server knows them without being told.
        sink: Where metric records go.
        elapsed: Seconds since the run started.
        beside: Called again and again while replies are awaited.
        while_waiting: Called again and again while too few clients are there; what it raises ends the run.
    """

    grid: Grid
    client_registry: ClientRegistry
    replica: Replica
    store: RunStore
    artifact: Artifact
    config: RunSettings
    aggregator: Aggregator[Any]
    step_policy: StepPolicy
    sink: Sink
    elapsed: Callable[[], float]
    label_counts: Mapping[int, Mapping[str, int]] | None = None
    beside: Callable[[], None] = lambda: None
    while_waiting: Callable[[], None] = lambda: None
    _used: dict[int, int] = field(default_factory=dict)
    _followed: dict[int, int] = field(default_factory=dict)
    _payload_bytes: list[int] = field(default_factory=list)  # of the first 0, 1, 2, ... records together
    _wire: tuple[int, int] | None = None
    _decision: StepDecision | None = None  # the last that was told
    _lost: bool = False
    _round_seconds: float | None = None
    _state_sync: StateSync = field(init=False)
    _turnout: Turnout = field(init=False)

    def __post_init__(self) -> None:
        rounds = []
        for record, audit in zip(self.store.records, self.store.audit, strict=True):
            self._count_steps(audit)
            self.aggregator.note(record, audit)
            rounds.append(audit.round)
        self.store.check_audit(rounds)
        self._state_sync = StateSync(
            grid=self.grid,
            client_registry=self.client_registry,
            replica=self.replica,
            store=self.store,
            artifact=self.artifact,
            config=self.config,
            acked={client: followed - 1 for client, followed in self._followed.items()},
            beside=self.beside,
        )
        self._turnout = Turnout(
            grid=self.grid,
            client_registry=self.client_registry,
            config=self.config,
            joined=self._state_sync.forget,
            while_waiting=self.while_waiting,
        )
        self._wire = self.grid.wire_bytes()
        self._payload_bytes = [*accumulate((record.payload_bytes for record in self.store.records), initial=0)]
        self._decision = next(reversed(self.store.metrics_of(StepDecision)), None)
        measured = (line.round_seconds for line in reversed(self.store.metrics) if isinstance(line, Round))
        self._round_seconds = next(measured, None)

    @property
    def round(self) -> int:
        """Rounds that are committed."""
        return len(self.store.records)

    def catch_up(self, advance: OnProgress = no_progress) -> None:
        """After opening an old log: replay it, and prove the result by its last check."""
        self.replica.goto(self.round, self.store.records, advance)
        if self.store.public:
            self.replica.verify(self.store.public[-1])

    def warn_of_cut_sizes(self) -> None:
        """Once the clients have registered: say whose declared rows do not all count."""
        strategy = self.config.strategy
        if strategy.weighting is Weighting.size:
            clients = self.client_registry.clients
            cut = sorted(client for client, weight in self._weights.items() if weight < clients[client].num_train)
            if cut:
                log.warning(
                    "strategy.size_cap: the rows of clients %s count only as %g times the median of all clients. "
                    "Write 0 to remove the cap if all clients are trusted.",
                    cut,
                    strategy.size_cap,
                )

    def run_round(self) -> LogRecord:
        """One round, from sampling to the committed record.

        Raises:
            FederationError: Fewer than ``strategy.min_replies`` clients gave an answer that can be used.
        """
        started = time.monotonic()
        self._turnout.begin()
        plan = self._plan()
        server_optimizer = self.config.server_optimizer
        lr = learning_rate(server_optimizer, round=self.round, rounds=self.config.fl.rounds)
        if plan.calibration:
            lr = float(np.float32(server_optimizer.base_lr))  # a warm-up would leave nothing to see
        replies = self._ask(plan, lr=lr)
        record = self.aggregator.combine(replies)
        self._warn_if_lost(replies.results)
        audit = self.aggregator.audit(record, replies)
        self.aggregator.note(record, audit)
        self._round_seconds = time.monotonic() - started
        # before the log, which alone makes a round count: what is told of a round that a kill prevents is dropped
        self.sink.write(
            round_metrics(
                record,
                replies,
                audit,
                self.aggregator.signals(record, audit),
                clipped=self.aggregator.num_clipped(replies),
                wire=self._wire_since(),
                down_bytes=self._down_bytes(record, replies.results),
                seconds=self.elapsed(),
                round_seconds=self._round_seconds,
            )
        )
        self._commit(record, audit)
        return record

    @property
    def known_label_counts(self) -> Mapping[int, Mapping[str, int]]:
        """Training rows of the clients by label, as far as the server knows them."""
        if self.label_counts is None:
            return {client: row.label_counts for client, row in self.client_registry.clients.items()}
        return self.label_counts

    def presence(self) -> Presence:
        """Who takes part at the moment, for people."""
        last_rounds = {client: followed - 1 for client, followed in self._followed.items()}
        return self.client_registry.presence(self.round, last_rounds, self._round_seconds)

    def report_step_policy(self) -> None:
        """After the last round: tell what a calibration found that no round has followed; again after a kill."""
        if self._decision is None:
            self._plan()

    def federated_scores(self) -> Answers[EvaluateReply]:
        """Every connected client's score of the present model on its own held-out rows."""
        awake = set(self.client_registry.nodes) - set(self.client_registry.resting(self.round))
        requests = {client: EvaluateRequest(client=client) for client in sorted(awake)}
        answers = self._state_sync.ask(requests, EvaluateReply)
        for client, reason in answers.refused.items():
            log.warning("client %d was not scored: %s", client, reason)
        return answers

    def _ask(self, plan: Plan, *, lr: float) -> Replies[Result]:
        """What the round's clients (``Turnout.groups``) are asked, and what they answer."""
        bound, weights, strategy = self.aggregator.bound(), self._weights, self.config.strategy
        self.grid.limit_replies(self.aggregator.reply_bytes(max(plan.steps.values())))
        results: dict[int, Result] = {}
        refused: dict[int, str] = {}
        traffic = Traffic()
        for group in self._turnout.groups(self.round, everyone=plan.calibration, results=results, refused=refused):
            requests = {
                client: TrainRequest(
                    client=client, steps=plan.steps[client], used=self._used.get(client, 0), lr=lr, max_abs_g=bound
                )
                for client in group
            }
            answers = self._state_sync.ask(requests, self.aggregator.reply_type)
            traffic += answers.traffic
            for client in answers.replies:
                refused.pop(client, None)
            refused |= answers.refused
            results |= self._usable(answers.replies, requests, refused)
            far_off = self.aggregator.far_off(results) if strategy.clip_factor else {}
            for client, reason in far_off.items():
                self._refuse(client, reason, refused)
                del results[client]
            if len(results) >= strategy.min_replies:
                return Replies(
                    round=self.round,
                    lr=lr,
                    bound=bound,
                    measures_only=plan.calibration,
                    weights=weights,
                    results=results,
                    used={client: self._used.get(client, 0) for client in results},
                    refused=refused,
                    traffic=traffic,
                )
        why = some_reasons([f"client {client}: {reason}" for client, reason in sorted(refused.items())])
        raise FederationError(
            f"round {self.round}: strategy.min_replies = {strategy.min_replies} usable replies are needed, got "
            f"{len(results)} ({why}). The log is kept. Repair the clients and continue with `fedzo resume`."
        )

    def _usable(
        self, replies: Mapping[int, Any], requests: Mapping[int, TrainRequest], refused: dict[int, str]
    ) -> dict[int, Result]:
        """The replies as numbers; why one cannot be used is added to ``refused``."""
        results: dict[int, Result] = {}
        for client, reply in replies.items():
            try:
                results[client] = self.aggregator.check(reply, requests[client])
            except ProtocolError as error:
                self._refuse(client, str(error), refused)
        return results

    def _refuse(self, client: int, reason: str, refused: dict[int, str]) -> None:
        refused[client] = printable(reason)
        log.warning("round %d, client %d: reply refused: %s", self.round, client, refused[client])

    def _warn_if_lost(self, results: Mapping[int, Result]) -> None:
        """A run that has diverged goes on without learning anything: say so in the first of such rounds."""
        lost = all(result.dropped.all() for result in results.values())
        if lost and not self._lost:
            what = "no client had a finite loss, so the round measured nothing. The model has probably diverged: lower "
            what += "trainer.lr or strategy.clip_factor, and start again."
            if any(np.isfinite(result.loss).any() for result in results.values()):  # signs: 0 has none
                what = "no probe of any client changed its loss, so the round measured nothing. Raise estimator.eps, "
                what += "or use a model.dtype of higher precision, and start again."
            log.warning("round %d: %s", self.round, what)
        self._lost = lost

    def coming_plan(self) -> Plan:
        """What the coming round asks of each client."""
        audit = cast(Sequence[ScalarAuditLine], self.store.audit)  # who reads scalars is refused where there are none
        counts, fl = self.known_label_counts, self.config.fl
        most = self.config.step_policy.max_steps(fl)
        return checked_plan(self.step_policy, audit, counts, num_clients=fl.num_clients, max_steps=most)

    def _plan(self) -> Plan:
        """The coming plan; a new decision is told."""
        plan, fl = self.coming_plan(), self.config.fl
        last = self.round + 1 == fl.rounds
        record = news(
            plan, self._decision, round=self.round, last=last, seconds=self.elapsed(), local_steps=fl.local_steps
        )
        if record:
            self._decision = record
            self.sink.write(record)
        return plan

    @property
    def _weights(self) -> Mapping[int, float]:
        """Fixed at registration, never taken from a reply."""
        rows = {client: row.num_train for client, row in self.client_registry.clients.items()}
        strategy = self.config.strategy
        return client_weights(rows, strategy.weighting, size_cap=strategy.size_cap)

    def _commit(self, record: LogRecord, audit: AuditLine) -> None:
        # the replica moves first, since the line carries its check; it is rebuilt from the log if the line is not
        # written
        self.replica.advance([record])
        done, fl = record.round + 1, self.config.fl
        proof = self.replica.proof(digest=done == fl.rounds or done % fl.hash_every == 0)
        self.store.commit(record, attendance=[entry.client for entry in audit.clients], proof=proof, audit=audit)
        self._count_steps(audit)
        self._payload_bytes.append(self._payload_bytes[-1] + record.payload_bytes)

    def _wire_since(self) -> Traffic | None:
        """What went over the wire since this was asked last, or since the server began."""
        before, self._wire = self._wire, self.grid.wire_bytes()
        if before is None or self._wire is None:
            return None
        return Traffic(self._wire[0] - before[0], self._wire[1] - before[1])

    def _down_bytes(self, record: LogRecord, clients: Collection[int]) -> int:
        """Payload that brings clients from the end of their last round to that of a new one: records, or values."""
        if self.config.fl.transport is Transport.values:
            return self.replica.snapshot_bytes * len(clients)
        total = record.payload_bytes * len(clients)
        for client in clients:
            first = self._followed.get(client, 0)
            shorter = self.replica.is_shorter_than(self.store.records[first:])
            total += self.replica.snapshot_bytes if shorter else self._payload_bytes[-1] - self._payload_bytes[first]
        return total

    def _count_steps(self, audit: AuditLine) -> None:
        for entry in audit.clients:
            self._used[entry.client] = entry.used + entry.steps
            self._followed[entry.client] = audit.round + 1
