"""What is scored at the server, after which rounds, and each of it once, also in a run that is resumed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from fedzo.data.example import Example
from fedzo.data.tasks import num_labels
from fedzo.errors import ProtocolError
from fedzo.evaluate.answers import evaluate, merge_scores, metric_of, score_of_peer
from fedzo.fl.client.local_update import Workspace
from fedzo.fl.exchange import Traffic
from fedzo.fl.log_store import RunStore
from fedzo.fl.server.rounds import Server, Sink
from fedzo.records.metrics import CentralScore, ClientScore, FederatedScore, Score, Split, WorstClient
from fedzo.report.sinks import ProgressSink
from fedzo.run.server_context import ServerContext

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Scores:
    """The scores of one run: of the server's own rows (``score``), and of the clients' (``federated_score``).

    Attributes:
        context: The server's rows.
        at: The server's model.
        store: Where the scores that were taken before are found.
        sink: Where new ones go.
        elapsed: Seconds since the run started.
    """

    context: ServerContext
    at: Workspace
    store: RunStore
    sink: Sink
    progress: ProgressSink
    elapsed: Callable[[], float]

    def planned(self) -> list[tuple[int, list[Example]]]:
        """How often which examples will be scored at the server in the whole run."""
        config = self.context.peer.config
        if not config.evaluation.central:
            return []
        dev = sum(
            _is_due(done, config.evaluation.every_rounds, config.fl.rounds) for done in range(1, config.fl.rounds + 1)
        )
        return [(1 + dev, self.context.examples("dev")), (2, self.context.examples("test"))]

    def take(self, split: Split, *, rounds: int) -> None:
        """Score the server's model, which must be at ``rounds``, on the server's rows, if there are any."""
        config = self.context.peer.config
        if not config.evaluation.central or self.find(split, rounds):
            return
        if not (examples := self.context.examples(split)):
            return  # split.num_dev = 0, or split.num_test = 0
        with self.progress.phase(f"scoring {split}", len(examples)) as advance:
            score = evaluate(
                self.at.loaded,
                examples,
                config.task,
                tokens_per_batch=self.at.tokens_per_batch,
                on_batch=advance,
            )
        self.sink.write(CentralScore(seconds=self.elapsed(), split=split, round=rounds, **score.numbers()))

    def take_due(self, server: Server) -> None:
        """Take the scores that the rounds until now call for, by ``evaluation``."""
        config = self.context.peer.config
        done, total, evaluation = server.round, config.fl.rounds, config.evaluation
        if _is_due(done, evaluation.every_rounds, total):
            self.take("dev", rounds=done)
        if evaluation.federated_every_rounds >= 0 and _is_due(done, evaluation.federated_every_rounds, total):
            self._ask_clients(server)

    def find(self, split: Split, rounds: int) -> CentralScore | None:
        """The score of a split after so many rounds; None where there is none."""
        taken = self.store.told(CentralScore)
        return next((score for score in taken if score.split == split and score.round == rounds), None)

    def worst_client(self) -> WorstClient | None:
        """The client with the lowest score on its own held-out rows, when they were scored last."""
        last = max(self.store.told(FederatedScore), key=lambda score: score.round, default=None)
        if last is None:
            return None
        worst = min(last.clients, key=lambda score: score.value)
        return WorstClient(client=worst.client, metric=worst.metric, value=worst.value, round=last.round)

    def _ask_clients(self, server: Server) -> None:
        """Every connected client scores the present model on its own held-out rows."""
        config = self.context.peer.config
        if any(score.round == server.round for score in self.store.told(FederatedScore)):
            return
        most = config.evaluation.federated_max_rows
        scored: dict[int, Score] = {}
        traffic = Traffic()
        for client, reply in sorted(server.federated_scores(max_rows=most, traffic=traffic).items()):
            try:
                score = score_of_peer(
                    reply.score,
                    metric=metric_of(config.task.kind),
                    most_examples=most,
                    num_labels=num_labels(config.task),
                )
            except ProtocolError as error:  # a bad reply never ends a run
                log.warning("client %d was not scored: %s", client, error)
                continue
            if score is not None:
                scored[client] = score
        if not scored:
            return
        self.sink.write(
            FederatedScore(
                seconds=self.elapsed(),
                round=server.round,
                **merge_scores(list(scored.values())).numbers(),
                message_up_bytes=traffic.up_bytes,
                message_down_bytes=traffic.down_bytes,
                worst_client=min(score.value for score in scored.values()),
                clients=tuple(ClientScore(client=client, **score.numbers()) for client, score in scored.items()),
            )
        )


def _is_due(done: int, every: int, rounds: int) -> bool:
    return done == rounds or (every > 0 and done % every == 0)
