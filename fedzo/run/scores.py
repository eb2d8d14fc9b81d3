"""What is scored, by which evaluators, after which rounds, and each of it once, also in a run that is resumed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fedzo.data.encode import Example
from fedzo.errors import FedzoError, ProtocolError, printable
from fedzo.evaluate import evaluate, merge_scores, scores_of_peer
from fedzo.fl.clip import LARGE_LOSS, far_off
from fedzo.fl.exchange import Traffic
from fedzo.fl.log_store import RunStore
from fedzo.fl.replica import Workspace
from fedzo.fl.server.rounds import Server, Sink
from fedzo.records.metrics import CentralScore, ClientScore, FederatedScore, Split, WorstClient
from fedzo.records.scores import PartialScore
from fedzo.report.sinks import ProgressSink
from fedzo.run.server_context import ServerContext

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Scores:
    """The scores of one run: of the server's own rows (``score``), and of the clients' (``federated_score``).

    Attributes:
        context: The server's rows.
        workspace: The server's model.
        store: Where the scores that were taken before are found.
        sink: Where new ones go.
        elapsed: Seconds since the run started.
    """

    context: ServerContext
    workspace: Workspace
    store: RunStore
    sink: Sink
    progress: ProgressSink
    elapsed: Callable[[], float]

    def planned(self) -> list[tuple[int, list[Example]]]:
        """How often which examples will be scored at the server in the whole run."""
        config, times = self.context.peer.config, len(self.context.peer.evaluators)
        if not config.evaluation.central or not times:
            return []
        dev = sum(
            _is_due(done, config.evaluation.every_rounds, config.fl.rounds) for done in range(1, config.fl.rounds + 1)
        )
        test = 2 if config.evaluation.test else 0
        return [(times * (1 + dev), self.context.examples("dev")), (times * test, self.context.examples("test"))]

    def take(self, split: Split, *, rounds: int) -> None:
        """Score the server's model, which must be at ``rounds``, on the server's rows, if there are any."""
        assert self.workspace.replica.position == rounds, (
            f"the model is at round {self.workspace.replica.position}, not {rounds}"
        )
        config = self.context.peer.config
        is_asked = config.evaluation.central and (config.evaluation.test or split != "test")
        if not is_asked or not (examples := self.context.examples(split)):
            return  # with split.num_dev = 0 or split.num_test = 0 there are none
        for name, evaluator in self.context.peer.evaluators.items():
            if self.find(split, rounds, evaluator=name):
                continue
            by = f" by {name}" if len(self.context.peer.evaluators) > 1 else ""
            try:
                with self.progress.phase(f"scoring {split}{by}", len(examples)) as advance:
                    score = evaluate(
                        name,
                        evaluator,
                        self.workspace.loaded,
                        examples,
                        config.task,
                        tokens_per_batch=self.workspace.tokens_per_batch,
                        on_batch=advance,
                    )
            except FedzoError as error:
                if rounds == 0:
                    raise  # the evaluator is at fault, and no work is lost
                log.warning("after round %d: %s was not scored by %s: %s", rounds, split, name, printable(str(error)))
                continue  # a run that has diverged goes on
            seconds = self.elapsed()
            self.sink.write(
                CentralScore(seconds=seconds, evaluator=name, split=split, round=rounds, **score.as_fields())
            )

    def take_due(self, server: Server) -> None:
        """Take the scores that the rounds until now call for, by ``evaluation``."""
        config = self.context.peer.config
        done, total, evaluation = server.round, config.fl.rounds, config.evaluation
        if _is_due(done, evaluation.every_rounds, total):
            self.take("dev", rounds=done)
        if evaluation.federated_every_rounds >= 0 and _is_due(done, evaluation.federated_every_rounds, total):
            self._ask_clients(server)

    def find(self, split: Split, rounds: int, *, evaluator: str | None) -> CentralScore | None:
        """An evaluator's score of a split after so many rounds; None where there is none."""
        wanted = (evaluator, split, rounds)
        taken = self.store.metrics_of(CentralScore)
        return next((score for score in taken if (score.evaluator, score.split, score.round) == wanted), None)

    def worst_client(self, *, evaluator: str | None) -> WorstClient | None:
        """The client that an evaluator found worst on its own held-out rows, when they were scored last."""
        taken = [score for score in self.store.metrics_of(FederatedScore) if score.evaluator == evaluator]
        last = max(taken, key=lambda score: score.round, default=None)
        if last is None or not last.worst_first:
            return None
        client, value = last.worst_first[0]
        rows = next(score.num_examples for score in last.clients if score.client == client)
        return WorstClient(client=client, metric=last.metric, value=value, round=last.round, num_examples=rows)

    def _ask_clients(self, server: Server) -> None:
        """Every connected client scores the present model on its own held-out rows, by each evaluator."""
        peer = self.context.peer
        taken = {score.evaluator for score in self.store.metrics_of(FederatedScore) if score.round == server.round}
        due = [name for name in peer.evaluators if name not in taken]
        if not due:
            return
        most, answers = peer.config.evaluation.federated_max_rows, server.federated_scores()
        scored: dict[str, dict[int, PartialScore]] = {name: {} for name in peer.evaluators}
        clients = server.client_registry.clients
        for client, reply in sorted(answers.replies.items()):
            held = min(most, clients[client].num_heldout)
            try:
                scores = scores_of_peer(reply.scores, peer.evaluators, peer.config.task, max_examples=held)
            except ProtocolError as error:  # a bad reply never ends a run
                log.warning("client %d was not scored: %s", client, printable(str(error)))
                continue
            for name, score in scores.items():
                scored[name][client] = score
        traffic = answers.traffic
        for name in due:
            _leave_out_far_off(scored[name])
            if scored[name]:
                self._write(name, scored[name], server.round, traffic)
                traffic = Traffic()  # the first record counts the messages, which the evaluators share

    def _write(self, evaluator: str, scored: Mapping[int, PartialScore], rounds: int, traffic: Traffic) -> None:
        merged = merge_scores([*scored.values()])
        values = [score.value for score in scored.values() if score.value is not None]
        self.sink.write(
            FederatedScore(
                seconds=self.elapsed(),
                evaluator=evaluator,
                round=rounds,
                **merged.as_fields(),
                message_up_bytes=traffic.up_bytes,
                message_down_bytes=traffic.down_bytes,
                worst_client=(max if merged.lower_is_better else min)(values, default=None),
                clients=tuple(ClientScore(client=client, **score.as_fields()) for client, score in scored.items()),
            )
        )


def _leave_out_far_off(scored: dict[int, PartialScore]) -> None:
    """Drop scores whose losses would decide the mean, as the round loop drops such replies."""
    losses = {client: abs(score.loss) for client, score in scored.items() if score.loss is not None}
    for client, most in far_off(losses, least=LARGE_LOSS).items():
        log.warning(
            "client %d was not scored: |loss| must be at most %g, by the other clients, got %g",
            client,
            most,
            losses[client],
        )
        del scored[client]


def _is_due(done: int, every: int, rounds: int) -> bool:
    return done == rounds or (every > 0 and done % every == 0)
