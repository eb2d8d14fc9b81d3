"""How far the registration of a client is, and whether what it declares is of the run and as it was at first.

Also how long it takes for its answers, which is shown beside that, and what is said of those that have not come.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fedzo.errors import ConfigError, FedzoError, ProtocolError, some_reasons
from fedzo.fl.messages import HelloReply, Identity
from fedzo.records.decode import decode_json
from fedzo.records.fields import Figures, LabelCounts
from fedzo.records.metrics import ClientSetup


@dataclass(slots=True)
class Silence:
    """What a client owes that let deadlines pass: since which round, how often, and the first round to ask it again."""

    since: int
    times: int
    again: int

    def __str__(self) -> str:
        return f"no reply since round {self.since}; it is asked again"


@dataclass(slots=True)
class StagingProgress:
    """How far a client is whose stages work on its rows, by its own words."""

    done: int
    total: int
    version: str
    logged: float  # when the log said so last, by time.monotonic

    def __str__(self) -> str:
        return f"preparing, {self.done} of {self.total} rows"


@dataclass(slots=True)
class Place:
    """The connected node that is a client, and how far its registration is. Nothing of it outlasts the connection."""

    node: int
    due: float = 0.0  # when it is greeted, by time.monotonic
    greetings: int = 0
    reply: HelloReply | None = None  # until refresh judges it
    unable: bool = False  # it has said that it cannot take part
    registered: bool = False
    preparing: StagingProgress | None = None
    silence: Silence | None = None  # until it answers what it is asked, which a greeting is not

    def fall_silent(self, round: int) -> None:
        """It let the deadline of a round pass: it is asked again after 1, 2, 4, ... rounds."""
        times, since = (self.silence.times + 1, self.silence.since) if self.silence else (1, round)
        self.silence = Silence(since, times, round + 2 ** (times - 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortage:
    """The clients that are not here when a start waits no longer; as a text, for a run that goes on without them.

    Attributes:
        late: Those that may come yet.
        unable: Those that have said that they cannot take part, and how the log tells of it.
        gone: Those whose keys the server has no more.
        busy: Those of ``late`` that may still work on a request from before the start.
        waited_s: How long they were waited for.
    """

    late: list[int]
    unable: Mapping[int, str]
    gone: list[int]
    busy: list[int]
    waited_s: float

    def __str__(self) -> str:
        missing = sorted([*self.late, *self.unable])
        told = [f"clients {missing} did not register within {self.waited_s:.0f} s"] if missing else []
        return some_reasons([*told, *self._left])

    def error(self, reasons: Sequence[str], *, num_clients: int, fewest: int | None) -> FedzoError:
        """Why the run does not go on, and what to do.

        Args:
            reasons: What the server knows of nodes that do not take part.
            num_clients: Of the run.
            fewest: So many of them must be here; None where all must be.
        """
        away = sorted([*self.late, *self.unable, *self.gone])
        again = "again (`fedzo server add-client`), and restart `fedzo server up`."
        register = f" Register the keys of clients {self.gone} {again}" if self.gone else ""
        if not self.late:
            why = some_reasons([*self.unable.values(), *self._left])
            if fewest is not None:
                few = f"of {num_clients} clients at least {fewest} must take part, but clients {away} cannot"
                why = f"strategy.min_replies: {few} ({why}).{register}"
            return ConfigError(why)
        if fewest is None:
            needed, lower = f"{num_clients} clients", ", raise strategy.startup_s, or lower fl.num_clients"
        else:
            needed, lower = f"at least {fewest} of {num_clients} clients (strategy.min_replies)", ""
        busy = [f"client {k} has not answered, and may still work on an earlier request" for k in self.busy]
        known = some_reasons([*self._left, *reasons, *busy])
        whom = "them" if self.late == away else f"clients {self.late}"
        return ProtocolError(
            f"strategy.startup_s: {needed} must register, but within {self.waited_s:.0f} s clients {away} did not"
            f"{f' ({known})' if known else ''}. {'Wait for' if self.late == self.busy else 'Start'} {whom}{lower}."
            f"{register}"
        )

    @property
    def _left(self) -> list[str]:
        return [f"client {k} is not registered with this server any more" for k in self.gone]


@dataclass(slots=True)
class Pace:
    """Since when each client has been asked for a round's work or a score, and how long it took for its last answer."""

    _asked: dict[int, float] = field(default_factory=dict)  # when, by time.monotonic; until a client has answered
    _took: dict[int, float] = field(default_factory=dict)  # seconds

    def asked(self, clients: Iterable[int]) -> None:
        """These are asked, and the others no more."""
        self._asked = dict.fromkeys(clients, time.monotonic())

    def answered(self, seconds: Mapping[int, float]) -> None:
        """Some of them have answered, each after so many seconds."""
        self._took.update(seconds)
        for client in seconds:
            self._asked.pop(client, None)

    def of(self, client: int) -> str:
        """What there is to say of a client, maybe nothing."""
        if client in self._asked:
            return f"asked {time.monotonic() - self._asked[client]:.0f} s ago"
        return f"answered in {self._took[client]:.1f} s" if client in self._took else ""


def setup_of(client: int, reply: HelloReply) -> ClientSetup:
    """What a client registers with, as the run keeps it; ``ProtocolError`` for counts or figures that are none."""
    return ClientSetup(
        client=client,
        num_train=reply.num_train,
        num_heldout=reply.num_heldout,
        rows_digest=reply.rows_digest,
        label_counts=decode_json(LabelCounts, reply.label_counts, where="label_counts", error=ProtocolError),
        stages=decode_json(Figures, reply.stages, where="stages", error=ProtocolError),
    )


def registration_problem(
    client: int, reply: HelloReply, *, identity: Identity, num_labels: int, first: ClientSetup | None
) -> str:
    """Why a client does not belong to the run, or an empty string: all peers must mean the same run.

    Args:
        client: Its index.
        reply: What it answers to a greeting.
        identity: What the server holds.
        num_labels: Labels of the task; 0 where clients tell no counts.
        first: What the client registered with before; None where it has not.
    """
    peers = {"configuration": (identity.config_hash, reply.config_hash)}
    if not reply.refusal:  # which says nothing of what the client holds
        peers |= {
            "base weights": (identity.base_digest, reply.base_digest),
            "config.json": (identity.architecture_digest, reply.architecture_digest),
            "tokenizer": (identity.tokenizer_digest, reply.tokenizer_digest),
            "task": (identity.task_digest, reply.task_digest),
        }
    for what, (ours, theirs) in peers.items():
        if ours != theirs:
            told = f"its {what} must be the server's ({ours[:12]}), got {theirs[:12]}"
            return f"{told}. Give both sides the same model, task and configuration."
    if reply.refusal:
        return ""
    if identity.partition_digest != reply.partition_digest:
        ours, theirs = (each.partition_digest[:12] or "none" for each in (identity, reply))
        return (
            f"its partition of the rows must be the server's ({ours}), got {theirs}. Give both sides the same rows, "
            "numpy, flwr-datasets and plugins. A partition plugin must deal alike in every process "
            "(fedzo.testing.check_partition)."
        )
    if reply.prepared > reply.preparing:
        return f"no more rows can be prepared than the {reply.preparing} that it prepares, got {reply.prepared}."
    return "" if reply.preparing else _rows_problem(client, reply, num_labels=num_labels, first=first)


def _rows_problem(client: int, reply: HelloReply, *, num_labels: int, first: ClientSetup | None) -> str:
    if reply.num_train < 1:
        return f"it must have at least one training row, got {reply.num_train}."
    if reply.num_train_cut > reply.num_train or reply.num_heldout_cut > reply.num_heldout:
        return "no more of its rows can be cut than it has."
    try:
        now = setup_of(client, reply)
    except ProtocolError as error:
        return str(error)
    labels = {str(label) for label in range(num_labels)}
    if not labels.issuperset(now.label_counts) or sum(now.label_counts.values()) != (now.num_train if labels else 0):
        return (
            f"label_counts must count its {reply.num_train} training rows by label (0 to {num_labels - 1}), or be "
            f"empty where the task has none, got {reply.label_counts!r:.80}."
        )
    if first is None:
        return ""
    counts = first.label_counts if labels else {}  # where clients tell none, a simulation's record has the server's own
    if (now.num_train, now.label_counts) != (first.num_train, counts):
        return (
            f"it must hold the rows that it registered with ({first.num_train} to train), "
            f"got {now.num_train}. Its weight and its data position depend on them."
        )
    if first.rows_digest != now.rows_digest:
        return (
            "the digest of its rows must be the one that it registered with, got another. "
            "Put its rows, what its stages made of them, and the secret with which its site makes the digest "
            "(`rows/secret`), back, and restart the site."
        )
    return ""
