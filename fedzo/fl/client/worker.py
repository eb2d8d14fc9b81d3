"""A client's work: (state, request) -> reply. One worker a process plays any number of clients on one model."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from fedzo.data.encode import Example
from fedzo.data.kept_digests import RowsChangedError
from fedzo.data.preprocess import Progress
from fedzo.data.preprocess.backend import EndpointError, RecipeError
from fedzo.data.tasks import num_labels
from fedzo.errors import FedzoError, ProtocolError, printable
from fedzo.evaluate import Evaluator, evaluate
from fedzo.evaluate.base import LOSS, trained
from fedzo.fl.artifact_transfer import receive
from fedzo.fl.client.local_update import LocalUpdate
from fedzo.fl.config import SiteLimitsConfig
from fedzo.fl.limits import Limits
from fedzo.fl.messages import (
    ArtifactPiece,
    ArtifactReply,
    EvaluateReply,
    EvaluateRequest,
    Hello,
    HelloReply,
    Identity,
    Refusal,
    Status,
    Sync,
    TrainRequest,
    scalars_to_bytes,
)
from fedzo.fl.replica import Workspace
from fedzo.fl.site_limits import (
    SiteError,
    answers_any,
    check_rows,
    leaves,
    leaving,
    leaving_count,
    leaving_figures,
)
from fedzo.records.decode import encode
from fedzo.records.scores import PartialScore
from fedzo.trainers.artifacts import Artifact, ArtifactStore

log, part = logging.getLogger(__name__), logging.getLogger("fedzo.part")
part.setLevel(logging.CRITICAL)  # a site with a log of its own turns it on: what it is told of its part in a run
MAX_LOGGED = 4000


@dataclass(frozen=True, slots=True)
class ClientData:
    """One client's rows, encoded.

    Attributes:
        heldout: In an order that the seed draws (``ClientRows``): the first of them are scored.
        figures: What the stages tell of its training rows.
    """

    train: list[Example]
    heldout: list[Example]
    label_counts: Mapping[str, int]
    figures: Mapping[str, float] = field(default_factory=dict)


class Clients(Protocol):
    """The clients that a process plays, each by its index, and the model that they share."""

    @property
    def identity(self) -> Identity:
        """Digests of what the process holds. Rows of one set are dealt for it, which may fail as reading them may."""
        ...

    def register(self, client: int, *, begun: bool) -> str | Progress:
        """The digest of all rows of a client (``KeptDigests``), or how far its stages are.

        Rows that are too few for the site raise ``SiteError`` before any stage begins.
        """
        ...

    def progress(self, client: int) -> Progress | None:
        """How far the stages of a client are; None where its rows are ready."""
        ...

    def data(self, client: int) -> ClientData:
        """A client's rows."""
        ...

    def workspace(self, artifact: Artifact, *, asked: int) -> Workspace:
        """The model with the space on it, from the artifact of the run, for the client that is asked first."""
        ...


class ClientWorker:
    """Answers requests for the clients that this process plays.

    Args:
        config_hash: Of the run, by which requests name it.
        update: Takes local steps.
        clients: Their rows and their model.
        limits: The run, the site's file, and what a server may ask by them.
        evaluators: How the model is scored on held-out rows, by name.
        artifacts: Where this process finds the artifact, or keeps it when the server sends it.
    """

    def __init__(
        self,
        config_hash: str,
        update: LocalUpdate,
        clients: Clients,
        *,
        limits: Limits,
        evaluators: Mapping[str, Evaluator],
        artifacts: ArtifactStore,
    ) -> None:
        self.config_hash = config_hash
        self.update = update
        self._workspace: Workspace | None = None
        self._asked_values: set[int] = set()
        self._part: dict[int, str] = {}
        self._clients = clients
        self._limits = limits
        self._run = limits.run
        self._site = limits.site.limits
        self._evaluators = evaluators
        scored = trained(limits.run.task, evaluators)
        self._losses_tell = [LOSS] if scored is None else [LOSS, scored.measure(limits.run.task).metric]
        self._artifacts = artifacts
        self._absent = parse_absent(limits.run.faults.absent)

    def hello(self, request: Hello) -> HelloReply:
        """Register: digests, sizes and label counts of this client. Rows that cannot be used are told of for good.

        Stages may work on its rows for hours: until they are done, each greeting is answered by how far they are.

        Raises:
            SiteError: The site's limits rule it out.
        """
        self._limits.check_client(request.client)
        if request.why:
            self._tell(request.client, f"not registered as client {request.client}: {printable(request.why)}")
        if self._artifacts.find(self._run.artifact) is None:
            self._limits.check_artifact_size(request.artifact_bytes)
        try:
            identity = asdict(self._clients.identity)
            registered = self._clients.register(request.client, begun=request.begun)
            if isinstance(registered, Progress):
                return HelloReply(preparing=registered.total, prepared=registered.done, **identity)
            data = self._clients.data(request.client)
        except SiteError:
            raise
        except Exception as error:  # whatever a reader, a template or a tokenizer raises, the rows stay as they are
            log_failure(request.client, error)
            return HelloReply(config_hash=self.config_hash, refusal=_refusal(error))
        site, labels = self._site, num_labels(self._run.task)
        check_rows(site, num_train=len(data.train), label_counts=data.label_counts, num_labels=labels)
        if not request.why:
            self._tell(request.client, f"registering as client {request.client}")
        told = data.heldout if len(data.heldout) >= site.min_rows else []
        return HelloReply(
            num_train=len(data.train),
            num_heldout=len(told),
            num_train_cut=_leaving_cut(site, [example.cut for example in data.train]),
            num_heldout_cut=_leaving_cut(site, [example.scored_cut for example in told]),
            rows_digest=registered,
            label_counts=json.dumps(dict(data.label_counts)),
            stages=json.dumps(leaving_figures(site, data.figures, num_train=len(data.train))),
            **identity,
        )

    def receive(self, piece: ArtifactPiece) -> ArtifactReply:
        """Keep a piece of the artifact that this process lacks."""
        self._check_part(piece.client)
        self._limits.check_artifact(piece.digest)
        if self._artifacts.find(piece.digest) is None:
            self._limits.check_artifact_size(piece.size)
        return receive(piece, self._artifacts)

    def train(self, request: TrainRequest) -> Any:
        """Take the local steps of a request and answer with what they make; the model is left at the round's start."""
        self._check_part(request.client)
        if (request.client, request.round) in self._absent:
            raise SiteError(Refusal.absent)
        self._limits.check_steps(request)
        self._must_be_ready(request.client)
        workspace, status = self._reach(request)
        if workspace is None or status is not Status.ok:
            return self.update.reply_type(status=status, position=workspace.replica.position if workspace else 0)
        reply = self.update.make(workspace, request)
        if all(leaves(self._site, name) for name in self._losses_tell):
            return reply
        unknown = np.full(len(reply.loss) // 4, np.nan, np.float32)  # as many, and none of them a number
        return replace(reply, loss=scalars_to_bytes(unknown))

    def look_ahead(self, requests: Mapping[int, TrainRequest]) -> None:
        """Let these clients take the steps of one round together (``LocalUpdate.look_ahead``), before ``train``.

        Requests that cannot be met are left for ``train`` to answer.
        """
        able: dict[int, TrainRequest] = {}
        for client, request in requests.items():
            with suppress(ProtocolError, SiteError):
                self._limits.check_client(client)
                self._limits.check_steps(request)
                if (client, request.round) not in self._absent and self._reach(request)[1] is Status.ok:
                    able[client] = request
        if self._workspace is not None:
            self.update.look_ahead(self._workspace, able)

    def evaluate(self, request: EvaluateRequest) -> EvaluateReply:
        """Score the model of the request's round on the client's held-out rows, and tell what the site lets out."""
        self._check_part(request.client)
        self._must_be_ready(request.client)
        workspace, status = self._reach(request)
        if workspace is None or status is not Status.ok:
            return EvaluateReply(status=status, position=workspace.replica.position if workspace else 0)
        rows = self._clients.data(request.client).heldout[: self._run.evaluation.federated_max_rows]
        plain: dict[str, Any] = {}
        faults: list[Exception] = []
        for name, evaluator in self._evaluators.items():
            try:
                told = self._score(name, evaluator, workspace, rows)
            except Exception as error:  # whatever an evaluator raises, the others' scores are told
                faults.append(error)
                continue
            if told is not None:
                plain[name] = _averageable(encode(told))
        if faults and not plain:
            raise faults[0]  # the server is told why there is no score
        for fault in faults:
            log_failure(request.client, fault)
        return EvaluateReply(position=workspace.replica.position, scores=json.dumps(plain))

    def _check_part(self, client: int) -> None:
        """Refuse to be another client than the site is; who is asked for more than its name is registered."""
        self._limits.check_client(client)
        self._tell(client, f"registered as client {client}")

    def _tell(self, client: int, text: str) -> None:
        """What a client's part in the run is, to the site alone: once, as long as it stays the same."""
        if self._part.get(client) != text:
            self._part[client] = text
            part.info("%s", text)

    def _score(self, name: str, evaluator: Evaluator, workspace: Workspace, rows: list[Example]) -> PartialScore | None:
        """What an evaluator finds on the rows, as far as it may leave the site."""
        task, site = self._run.task, self._site
        measure = evaluator.measure(task)
        if not rows or not answers_any(site, [measure.metric, LOSS, *measure.numbers], num_rows=len(rows)):
            return None
        score = evaluate(name, evaluator, workspace.loaded, rows, task, tokens_per_batch=workspace.tokens_per_batch)
        return leaving(site, score, num_labels=num_labels(task))

    def _must_be_ready(self, client: int) -> None:
        """Within a round nobody waits for stages: a process that was started again finds their result, or says so."""
        try:
            ready = self._clients.progress(client) is None
        except RowsChangedError as error:
            raise SiteError(Refusal.changed, str(error)) from error
        if not ready:
            raise SiteError(Refusal.preparing)

    def _reach(self, request: Sync) -> tuple[Workspace | None, Status]:
        """Bring this process to the state that the request names."""
        if request.config_hash != self.config_hash:
            raise ProtocolError(
                f"config hash must be {self.config_hash[:12]}, got {request.config_hash[:12]}. "
                "Start server and clients with the same configuration."
            )
        records = self._limits.check_state(request, asked_values=request.client in self._asked_values)
        if self._workspace is None:
            if (artifact := self._artifacts.find(request.space_id)) is None:
                return None, Status.bare
            self._workspace = self._clients.workspace(artifact, asked=request.client)
        status = self._workspace.replica.sync(request, records)
        if status is Status.mismatch:
            self._asked_values.add(request.client)
        elif status is Status.ok and request.log:  # not by values, whose request may come twice
            self._asked_values.discard(request.client)
        return self._workspace, status


def _refusal(error: Exception) -> Refusal:
    """What a server is told of rows that could not be got ready."""
    if isinstance(error, RowsChangedError):
        return Refusal.changed
    return Refusal.rewriter if isinstance(error, EndpointError | RecipeError) else Refusal.rows


def _leaving_cut(limits: SiteLimitsConfig, cut: list[bool]) -> int:
    return leaving_count(limits, sum(cut), of=len(cut))


def log_failure(client: int | None, error: BaseException) -> None:
    """Tell the site in full what the server is told in a sentence; a traceback only of what nobody foresaw.

    Args:
        client: Who was asked; None where the request does not say so.
        error: What came of it.
    """
    foreseen = isinstance(error, FedzoError)
    what = str(error) if foreseen else f"{type(error).__name__}: {error}"
    if isinstance(error, SiteError):
        what = f"refusal {error.refusal}, {error.refusal.sentence}: {error.details}"
    told = printable(what, most=MAX_LOGGED)  # some of it are a server's words
    log.error("client %s: %s", "?" if client is None else client, told, exc_info=None if foreseen else error)


def _averageable(score: dict[str, Any]) -> dict[str, Any]:
    """Counts and means alone: what the score of all clients together is made of."""
    return {name: value for name, value in score.items() if name not in {"auc", "best_threshold_accuracy"}}


def parse_absent(entries: list[str]) -> frozenset[tuple[int, int]]:
    """``["3@2"]`` -> {(3, 2)}: client 3 in round 2."""
    pairs = (entry.split("@") for entry in entries)
    return frozenset((int(client), int(round)) for client, round in pairs)
