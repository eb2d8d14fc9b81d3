"""Who takes part: registration of clients by their index, never by Flower's random node ids."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from fedzo.errors import ProtocolError
from fedzo.fl.client.worker import Identity
from fedzo.fl.exchange import Grid, Question, Traffic, ask
from fedzo.fl.messages import PROTOCOL, Hello, HelloReply
from fedzo.records.decode import decode_json
from fedzo.records.fields import LabelCounts
from fedzo.records.metrics import ClientSetup

log = logging.getLogger(__name__)
RETRY_S = 10.0  # after which a node that could not register is asked again, at the soonest
REST = 10  # times as long as it was waited for


@dataclass(slots=True)
class ClientRegistry:
    """The clients that have registered.

    Attributes:
        nodes: Flower node id of each client that is connected.
        hellos: Registration of each client, also of those that left.
        num_labels: Labels of the task; 0 where it has none.
    """

    num_clients: int
    identity: Identity
    num_labels: int = 0
    nodes: dict[int, int] = field(default_factory=dict)
    hellos: dict[int, HelloReply] = field(default_factory=dict)
    _rejected: set[int] = field(default_factory=set)
    _failed: dict[int, tuple[float, str]] = field(default_factory=dict)

    def recall(self, clients: Sequence[ClientSetup]) -> None:
        """Take the registrations of a run that is resumed from its record: they hold to its end."""
        for row in clients:
            self.hellos[row.client] = HelloReply(
                client=row.client,
                num_train=row.num_train,
                num_heldout=row.num_heldout,
                label_counts=json.dumps(row.label_counts if self.num_labels else {}),  # else a simulation's own
            )

    def wait(self, grid: Grid, *, timeout_s: float, fewest: int | None = None) -> None:
        """Register until all clients are here.

        Args:
            grid: Flower's grid.
            timeout_s: How long.
            fewest: Of a run that has begun: with so many it goes on when time is up, and a node that does not belong to
                it is not let in. A run begins with all its clients and no other node.

        Raises:
            ProtocolError: A client does not mean the same run, or too many are missing when time is up.
        """
        ends = time.monotonic() + timeout_s
        while len(self.nodes) < self.num_clients:
            self._register(grid, timeout_s=max(1.0, ends - time.monotonic()), strict=fewest is None)
            missing = sorted(set(range(self.num_clients)) - set(self.nodes))
            if missing and time.monotonic() > ends:
                reasons = "; ".join(sorted({reason for _, reason in self._failed.values()}))
                who = f"clients {missing} did not{f' ({reasons})' if reasons else ''}"
                if fewest is not None and len(self.nodes) >= fewest:
                    log.warning("the run continues although %s register within %g s", who, timeout_s)
                    return
                lower = ", raise strategy.startup_s, or lower fl.num_clients" if fewest is None else ""
                raise ProtocolError(
                    f"strategy.startup_s: {self.num_clients} clients must register within {timeout_s:g} s, but {who}. "
                    f"Start them{lower}."
                )
            if missing:
                time.sleep(0.1)

    def refresh(self, grid: Grid, *, timeout_s: float) -> list[int]:
        """Between rounds: forget nodes that left, register new ones (a client that comes back has a new node id).

        Returns:
            The clients that registered anew.
        """
        present = _node_ids(grid)
        self.nodes = {client: node for client, node in self.nodes.items() if node in present}
        self._rejected &= present  # one that went away may come back mended
        return self._register(grid, timeout_s=timeout_s, strict=False)

    def label_counts(self, client: int) -> dict[str, int]:
        """Label counts that a client declared."""
        return _label_counts(self.hellos[client].label_counts)

    def _register(self, grid: Grid, *, timeout_s: float, strict: bool) -> list[int]:
        began = time.monotonic()
        resting = {node for node, (until, _) in self._failed.items() if began < until}
        new = sorted(_node_ids(grid) - set(self.nodes.values()) - self._rejected - resting)
        # before a node has said who it is, its node id stands in for its index
        answers = ask(
            grid,
            dict.fromkeys(new, Question("query.hello", Hello(config_hash=self.identity.config_hash), HelloReply)),
            nodes={node: node for node in new},
            deadline_s=timeout_s,
            traffic=Traffic(),
        )
        joined = []
        for node, reply in sorted(answers.replies.items(), key=lambda item: item[1].client):
            problem = self._problem(reply, taken=strict and reply.client in self.nodes)
            if problem and strict:
                raise ProtocolError(problem)
            if problem:
                log.warning("node %d is refused: %s", node, problem)
                self._rejected.add(node)
                continue
            if reply.client in self.nodes:  # its old node stays listed for a while after it died
                log.warning("client %d came back as another node", reply.client)
                self._rejected.add(self.nodes[reply.client])
            self.hellos[reply.client] = reply
            self.nodes[reply.client] = node
            self._failed.pop(node, None)
            joined.append(reply.client)
        now = time.monotonic()
        for node, reason in answers.refused.items():
            self._failed[node] = (now + max(RETRY_S, REST * (now - began)), reason)
            log.warning("node %d did not register: %s", node, reason)
        return joined

    def _problem(self, reply: HelloReply, *, taken: bool) -> str:
        """Why this client cannot take part, or an empty string: all peers must mean the same run."""
        mine = self.identity
        for what, ours, theirs in (
            ("protocol", str(PROTOCOL), str(reply.protocol)),
            ("configuration", mine.config_hash, reply.config_hash),
            ("base weights", mine.base_digest, reply.base_digest),
            ("tokenizer", mine.tokenizer_digest, reply.tokenizer_digest),
            ("task", mine.task_digest, reply.task_digest),
        ):
            if ours != theirs:
                return (
                    f"client {reply.client}: its {what} must be the server's ({ours[:12]}), got {theirs[:12]}. "
                    "Give both sides the same model, task and configuration."
                )
        if not 0 <= reply.client < self.num_clients:
            return (
                f"client index must be in 0..{self.num_clients - 1}, got {reply.client}. Check the site's partition-id."
            )
        if reply.num_train < 1:
            return f"client {reply.client}: it must have at least one training row, got {reply.num_train}."
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
        if taken:
            return f"client index {reply.client} is taken twice. Give each site its own partition-id."
        return ""


def _label_counts(text: str) -> dict[str, int]:
    counts: dict[str, int] = decode_json(LabelCounts, text, where="label_counts", error=ProtocolError)
    return counts


def _node_ids(grid: Grid) -> set[int]:
    return {int(node) for node in grid.get_node_ids()}  # type: ignore[attr-defined]
