"""Who takes part: registration of clients by their index, never by Flower's random node ids.

The rules: a node that does not belong to the run is named and ignored, and ends nothing. An index belongs to the first
node that registers for it, until that node leaves or lets a deadline pass; only then the next that claims it takes its
place. Nobody waits for a node that does not answer: greetings are under way beside the rounds, and a client that let a
deadline pass is asked again after 1, 2, 4, ... rounds.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedzo.errors import ConfigError, ProtocolError, printable
from fedzo.fl.client.worker import Identity
from fedzo.fl.exchange import Grid, Outbox, Question, Traffic, message_of, read
from fedzo.fl.messages import PROTOCOL, Hello, HelloReply
from fedzo.records.decode import decode_json
from fedzo.records.fields import LabelCounts
from fedzo.records.metrics import ClientSetup

log = logging.getLogger(__name__)
RETRY_S = 10.0  # after which a node whose greeting failed is greeted again; twice as long after each further failure
LOOK_S = 1.0  # how often new nodes are looked for beside a round
MOST_REASONS = 8  # told of in one error


@dataclass(slots=True)
class _Mute:
    """A client that let deadlines pass: since which round, how often, and the round that asks it again."""

    since: int
    times: int
    again: int


@dataclass(slots=True)
class ClientRegistry:
    """The clients that have registered.

    Attributes:
        nodes: Flower node id of each client that is connected; it changes only in ``wait`` and ``refresh``.
        hellos: Registration of each client, also of those that left.
        num_labels: Labels of the task; 0 where it has none.
    """

    num_clients: int
    identity: Identity
    num_labels: int = 0
    nodes: dict[int, int] = field(default_factory=dict)
    hellos: dict[int, HelloReply] = field(default_factory=dict)
    _present: set[int] = field(default_factory=set)
    _greeted: set[int] = field(default_factory=set)
    _seen: set[int] = field(default_factory=set)
    _outbox: Outbox[int] = field(default_factory=Outbox)
    _arrived: dict[int, HelloReply] = field(default_factory=dict)
    _claims: dict[int, dict[int, HelloReply]] = field(default_factory=dict)
    _unable: dict[int, tuple[int, str]] = field(default_factory=dict)
    _reasons: dict[int, str] = field(default_factory=dict)
    _retries: dict[int, tuple[float, float]] = field(default_factory=dict)
    _mute: dict[int, _Mute] = field(default_factory=dict)
    _next_look: float = 0.0
    _begun: bool = False

    def recall(self, clients: Sequence[ClientSetup]) -> None:
        """Take the registrations of a run that is resumed from its record: they hold to its end."""
        self._begun = True
        for row in clients:
            self.hellos[row.client] = HelloReply(
                client=row.client,
                num_train=row.num_train,
                num_heldout=row.num_heldout,
                rows_digest=row.rows_digest,
                label_counts=json.dumps(row.label_counts if self.num_labels else {}),  # else a simulation's own
            )

    def wait(self, grid: Grid, *, timeout_s: float, fewest: int | None = None) -> None:
        """Register until all clients are here.

        Args:
            grid: Flower's grid.
            timeout_s: How long.
            fewest: Of a run that has begun: with so many it goes on when time is up. A run begins with all its clients.

        Raises:
            ConfigError: Each client that is missing has said that it cannot take part.
            ProtocolError: Too many are missing when time is up.
        """
        ends = time.monotonic() + timeout_s
        while True:
            self.refresh(grid)
            missing = sorted(set(range(self.num_clients)) - set(self.nodes))
            if not missing:
                self._begun = True
                return
            hopeless = set(missing) <= set(self._unable)
            if not hopeless and time.monotonic() <= ends:
                time.sleep(0.1)
                continue
            if fewest is not None and len(self.nodes) >= fewest:
                log.warning("the run continues although clients %s did not register within %g s", missing, timeout_s)
                return
            if hopeless:
                raise ConfigError("; ".join(self._unable[client][1] for client in missing[:MOST_REASONS]))
            told = [self._reasons[node] for node in sorted(self._reasons)]
            more = [f"and {len(told) - MOST_REASONS} more"] if len(told) > MOST_REASONS else []
            reasons = "; ".join([*told[:MOST_REASONS], *more])
            lower = ", raise strategy.startup_s, or lower fl.num_clients" if fewest is None else ""
            raise ProtocolError(
                f"strategy.startup_s: {self.num_clients} clients must register within {timeout_s:g} s, but clients "
                f"{missing} did not{f' ({reasons})' if reasons else ''}. Start them{lower}."
            )

    def refresh(self, grid: Grid, *, fewest: int = 0, timeout_s: float = 0.0) -> list[int]:
        """Between rounds: forget nodes that left, let in those that have answered (who comes back has a new node id).

        Args:
            grid: Flower's grid.
            fewest: With fewer clients than that, newcomers are waited for.
            timeout_s: How long.

        Returns:
            The clients that registered anew.
        """
        ends, joined = time.monotonic() + timeout_s, []
        while True:
            self._greet(grid)
            self.nodes = {client: node for client, node in self.nodes.items() if node in self._present}
            joined += self._let_in()
            if len(self.nodes) >= fewest or time.monotonic() >= ends:
                return joined
            time.sleep(0.1)

    def beside(self, grid: Grid) -> None:
        """While a round waits for replies: greet new nodes and hear what they answer; nobody is let in yet."""
        if time.monotonic() >= self._next_look:
            self._greet(grid)
            self._next_look = time.monotonic() + LOOK_S

    def note(self, *, mute: set[int], heard: set[int], round: int) -> None:
        """After clients were asked: remember who let the deadline pass."""
        for client in heard:
            self._mute.pop(client, None)
        for client in mute:
            before = self._mute.get(client)
            times, since = (before.times + 1, before.since) if before else (1, round)
            self._mute[client] = _Mute(since, times, round + 2 ** (times - 1))

    def resting(self, round: int) -> Mapping[int, str]:
        """The clients that are not asked in a round unless it needs them, and why."""
        return {
            client: f"no reply since round {mute.since}; it is asked again in round {mute.again}"
            for client, mute in self._mute.items()
            if round < mute.again and client in self.nodes
        }

    def label_counts(self, client: int) -> dict[str, int]:
        """Label counts that a client declared."""
        return _label_counts(self.hellos[client].label_counts)

    def _greet(self, grid: Grid) -> None:
        """Ask nodes that have not been asked who they are, and take the answers that are there."""
        self._look(grid)
        now = time.monotonic()
        due = {node for node, (when, _) in self._retries.items() if when <= now}
        new = sorted(self._present - self._greeted | due)
        hello, traffic = Hello(config_hash=self.identity.config_hash, begun=self._begun), Traffic()
        question = Question("query.hello", hello, HelloReply)
        self._greeted.update(new)
        for node in due:
            self._retries[node] = (float("inf"), self._retries[node][1])
        messages = {node: message_of(question, node=node, traffic=traffic) for node in new}
        for node in self._outbox.push(grid, messages):
            self._failed(node, "not connected")
        while got := self._outbox.pull(grid):
            for node, message in got:
                try:
                    self._arrived[node] = read(message, HelloReply, traffic)
                except ProtocolError as error:
                    self._failed(node, str(error))

    def _look(self, grid: Grid) -> None:
        """See who is there; of a node that left nothing is kept, so that it may come back mended."""
        self._present = {int(node) for node in grid.get_node_ids()}  # type: ignore[attr-defined]
        gone = {*self._greeted, *self._reasons} - self._present
        if not gone:
            return
        self._greeted -= gone
        self._outbox.forget(gone.__contains__)
        self._arrived = {node: reply for node, reply in self._arrived.items() if node not in gone}
        self._reasons = {node: reason for node, reason in self._reasons.items() if node not in gone}
        self._retries = {node: retry for node, retry in self._retries.items() if node not in gone}
        for client, claims in self._claims.items():
            self._claims[client] = {node: reply for node, reply in claims.items() if node not in gone}
        self._unable = {client: why for client, why in self._unable.items() if why[0] not in gone}

    def _failed(self, node: int, reason: str) -> None:
        """A greeting that came to nothing is repeated, less and less often."""
        pause = 2 * self._retries[node][1] if node in self._retries else RETRY_S
        self._retries[node] = (time.monotonic() + pause, pause)
        self._refuse(node, f"node {node} did not register: {reason}")

    def _refuse(self, node: int, reason: str) -> None:
        self._reasons[node] = printable(reason)
        log.warning("%s", self._reasons[node])

    def _let_in(self) -> list[int]:
        """Give every index that is free to the first node that claims it."""
        joined = []
        arrived, self._arrived = sorted(self._arrived.items(), key=lambda item: (item[1].client, item[0])), {}
        for node, reply in arrived:
            self._retries.pop(node, None)
            self._reasons.pop(node, None)
            if problem := self._problem(reply):
                self._refuse(node, f"node {node} is refused: {problem}")
            elif reply.refusal:
                why = f"client {reply.client} cannot take part: {reply.refusal.sentence}"
                self._unable[reply.client] = (node, why)
                self._refuse(node, why)
            else:
                self._claims.setdefault(reply.client, {})[node] = reply
        for client, claims in sorted(self._claims.items()):
            for node, reply in list(claims.items()):
                if problem := self._problem(reply):  # another has registered since it came
                    self._refuse(node, f"node {node} is refused: {problem}")
                    del claims[node]
            owner = self.nodes.get(client)
            if not claims or (owner is not None and client not in self._mute):
                continue
            node, reply = next(iter(claims.items()))
            del claims[node]
            if owner is not None:
                claims[owner] = self.hellos[client]  # it may be back when the other falls silent
                self._refuse(owner, f"client {client} did not answer as node {owner}; node {node} takes its place")
            elif client in self._seen:
                log.warning("client %d came back as another node", client)
            self._reasons.pop(node, None)
            self._unable.pop(client, None)
            self._mute.pop(client, None)
            self.hellos[client], self.nodes[client] = reply, node
            self._seen.add(client)
            joined.append(client)
        for node, reply in arrived:
            if node in self._claims.get(reply.client, {}):
                told = f"node {node} says that it is client {reply.client}, which node {self.nodes[reply.client]} is"
                self._refuse(node, f"{told}; it waits until that one leaves or does not answer")
        return joined

    def _problem(self, reply: HelloReply) -> str:
        """Why this node does not belong to the run, or an empty string: all peers must mean the same run."""
        mine = self.identity
        peers = [
            ("protocol", str(PROTOCOL), str(reply.protocol)),
            ("configuration", mine.config_hash, reply.config_hash),
        ]
        if not reply.refusal:  # which says nothing of what the client holds
            peers += [
                ("base weights", mine.base_digest, reply.base_digest),
                ("tokenizer", mine.tokenizer_digest, reply.tokenizer_digest),
                ("task", mine.task_digest, reply.task_digest),
            ]
        for what, ours, theirs in peers:
            if ours != theirs:
                return (
                    f"client {reply.client}: its {what} must be the server's ({ours[:12]}), got {theirs[:12]}. "
                    "Give both sides the same model, task and configuration."
                )
        if not 0 <= reply.client < self.num_clients:
            return (
                f"client index must be in 0..{self.num_clients - 1}, got {reply.client}. Check the site's partition-id."
            )
        if reply.refusal:
            return ""
        if reply.num_train < 1:
            return f"client {reply.client}: it must have at least one training row, got {reply.num_train}."
        if reply.num_train_cut > reply.num_train or reply.num_heldout_cut > reply.num_heldout:
            return f"client {reply.client}: no more of its rows can be cut than it has."
        try:
            counts = _label_counts(reply.label_counts)
        except ProtocolError:
            return (
                f"client {reply.client}: label_counts must be a JSON object of counts, got {reply.label_counts!r:.80}."
            )
        labels = {str(label) for label in range(self.num_labels)}
        if not labels.issuperset(counts) or sum(counts.values()) != (reply.num_train if labels else 0):
            return (
                f"client {reply.client}: label_counts must count its {reply.num_train} training rows by label (0 to "
                f"{self.num_labels - 1}), or be empty where the task has none, got {reply.label_counts!r:.80}."
            )
        first = self.hellos.get(reply.client, reply)
        if (reply.num_train, counts) != (first.num_train, _label_counts(first.label_counts)):
            return (
                f"client {reply.client}: it must hold the rows that it registered with ({first.num_train} to train), "
                f"got {reply.num_train}. Its weight and its data position depend on them."
            )
        if first.rows_digest != reply.rows_digest:
            return (
                f"client {reply.client}: the digest of its rows must be the one that it registered with, got another. "
                "Put its rows, and the secret with which its site makes the digest, back."
            )
        return ""


def _label_counts(text: str) -> dict[str, int]:
    counts: dict[str, int] = decode_json(LabelCounts, text, where="label_counts", error=ProtocolError)
    return counts
