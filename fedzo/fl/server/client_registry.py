"""Who takes part: which connected node is which client of the run, and what each client registered.

The rules: the server's grid says which client a node is (``Grid.client_of``), never the node itself. A node that the
grid does not know, or that does not belong to the run, is named and ignored, and ends nothing. Of two connected nodes
of one index the first keeps it until it leaves. Nobody waits for a node that does not answer: greetings are under way
beside the rounds. A client that lets a deadline pass, or whose node could not be reached, is greeted like a new node,
and is asked for nothing until it has answered; who answers greetings and no more is asked again after 1, 2, 4, ...
rounds. A client whose stages work on its rows is greeted again every few seconds, and the start of a run that needs it
waits for it as long as it gets on. It also waits for a site that is connected and says nothing, which may still work
for the start before: nobody tells a node that its round was lost.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fedzo.errors import ProtocolError, printable, some_reasons
from fedzo.fl.exchange import Grid, Outbox, Question, message_of, read
from fedzo.fl.messages import Hello, HelloReply, Identity
from fedzo.fl.server.registration import Pace, Place, Shortage, StagingProgress, registration_problem, setup_of
from fedzo.records.metrics import ClientSetup
from fedzo.records.presence import ClientPresence, Presence

log = logging.getLogger(__name__)
RETRY_S = 10.0  # after which a node that was not let in is greeted again; twice as long after each further greeting
SILENT_S = 60.0  # the same for a node that has said nothing: it may load its model, or has lost the greeting
MAX_RETRY_S = 600.0  # the longest such pause: who is mended after days need not wait for days more
PREPARING_S = 5.0  # the same for one that prepares its rows, every time
TELL_S = 300.0  # how often the log says how far such a client is
LOOK_S = 1.0  # how often new nodes are looked for beside a round
WAITING_S = 10.0  # after which the log says whom a start waits for; the least time between two such lines


@dataclass(slots=True)
class ClientRegistry:
    """The clients that have registered.

    Attributes:
        nodes: Flower node id of each client that can be asked; it changes only in ``wait``, ``refresh`` and ``note``.
        clients: What each client registered with, also of those that left, or that the run's record tells of.
        hellos: The last registration of each that has registered since the server began.
        pace: How long clients take for their answers.
        num_labels: Labels of the task; 0 where it has none.
        artifact_bytes: Of what the space needs beside the model.
    """

    num_clients: int
    identity: Identity
    num_labels: int = 0
    artifact_bytes: int = 0
    nodes: dict[int, int] = field(default_factory=dict)
    clients: dict[int, ClientSetup] = field(default_factory=dict)
    hellos: dict[int, HelloReply] = field(default_factory=dict)
    pace: Pace = field(default_factory=Pace)
    _places: dict[int, Place] = field(default_factory=dict)
    _outbox: Outbox[int] = field(default_factory=Outbox)
    _reasons: dict[int, str] = field(default_factory=dict)
    _most: dict[int, tuple[int, float]] = field(default_factory=dict)  # prepared rows as never before, and since when
    _last_seen: dict[int, int | None] = field(default_factory=dict)
    _next_look: float = 0.0
    _begun: bool = False

    def recall(self, clients: Sequence[ClientSetup]) -> None:
        """Take the registrations of a run that is resumed from its record: they hold to its end."""
        self._begun, self.clients = True, {row.client: row for row in clients}

    def wait(
        self,
        grid: Grid,
        *,
        timeout_s: float,
        fewest: int | None = None,
        busy_s: float = 0.0,
        beside: Callable[[], None] = lambda: None,
    ) -> None:
        """Register until all clients are here that can come: of a run that has begun, a site may have left for good.

        If so many are needed, time in which a missing client prepares its rows does not count, as long as its count has
        advanced within the last ``timeout_s``; and a connected client that has said nothing has ``busy_s``.

        Args:
            grid: Flower's grid.
            timeout_s: How long.
            fewest: Of a run that has begun: with so many it goes on when time is up. A run begins with all its clients.
            busy_s: How long from now a client may still work on a request from before this start.
            beside: Called again and again.

        Raises:
            ConfigError: Each client that is missing has said that it cannot take part, or is not registered any more.
            ProtocolError: Too many are missing when time is up.
        """
        started = now = time.monotonic()
        ends, tells, told = now + timeout_s, now + WAITING_S, ""
        while True:
            self.refresh(grid)
            beside()
            before, now = now, time.monotonic()
            if not (away := set(range(self.num_clients)) - set(self.nodes)):
                self._begun = True
                return
            is_needed = fewest is None or len(self.nodes) < fewest
            if is_needed and self._gets_on(since=now - timeout_s):
                ends += now - before
            known = grid.registered(away) if self._begun else away  # a new run is refused without all of them
            late = sorted(k for k in known if not (k in self._places and self._places[k].unable))
            busy = self._mute() if busy_s else []
            if not late or (now > ends and not (is_needed and busy and now <= started + busy_s)):
                break
            if now >= tells and (silent := self._silent(late)) not in ("", told):
                log.warning("waiting for %s", silent)
                tells, told = now + WAITING_S, silent
            time.sleep(0.1)
        unable = {k: self._reasons[self._places[k].node] for k in sorted(known.difference(late))}
        shortage = Shortage(late=late, unable=unable, gone=sorted(away - known), busy=busy, waited_s=now - started)
        if is_needed:
            raise shortage.error(self._known_reasons(), num_clients=self.num_clients, fewest=fewest)
        log.warning("the run continues although %s", shortage)

    def refresh(self, grid: Grid) -> list[int]:
        """Between rounds: forget nodes that left, let in those that have answered.

        Returns:
            The clients that registered as new nodes.
        """
        self._greet(grid)
        joined = self._let_in()
        self.nodes = {client: place.node for client, place in self._places.items() if place.registered}
        return joined

    def beside(self, grid: Grid) -> None:
        """In the middle of a round: greet new and silent nodes and hear what they answer; nobody is let in yet."""
        if time.monotonic() >= self._next_look:
            self._greet(grid)
            self._next_look = time.monotonic() + LOOK_S

    def note(self, asked: Iterable[int], *, mute: set[int], gone: set[int], round: int) -> None:
        """After clients were asked: who let the deadline pass, or left, is asked for nothing before it is greeted anew.

        Args:
            asked: All of them.
            mute: Those that let the deadline pass.
            gone: Those whose node was not reached. The grid may go on listing it for a while.
            round: In which they were asked.
        """
        self.pace.asked(())
        for client in asked:
            place = self._places.get(client)
            if not place or place.node != self.nodes.get(client):
                self.nodes.pop(client, None)  # it left meanwhile, or its new node is being greeted
                continue
            if client in mute:
                place.fall_silent(round)
            elif client not in gone:
                place.silence = None
                continue
            place.registered, place.due, place.greetings = False, time.monotonic(), 0
            self._next_look = 0.0
            del self.nodes[client]

    def resting(self, round: int) -> Mapping[int, str]:
        """The connected clients that are not asked in a round, and why; a round in need may ask those in ``nodes``."""
        rests = {}
        for client, place in self._places.items():
            if not place.silence or place.preparing or place.node in self._reasons:
                continue
            if not place.registered:
                rests[client] = f"{place.silence} once it registers"
            elif round < place.silence.again:
                rests[client] = f"{place.silence} in round {place.silence.again}"
        return rests

    def presence(
        self, round: int, last_rounds: Mapping[int, int] | None = None, round_seconds: float | None = None
    ) -> Presence:
        """Who is here, and what is known of the others.

        Args:
            round: The one that is under way, or comes next.
            last_rounds: By client, the last round that it took part in.
            round_seconds: What the last round took.
        """
        resting, rows = self.resting(round), []
        for client in range(self.num_clients):
            place, hello = self._places.get(client), self.hellos.get(client)
            version = hello.version if hello else ""
            if client in resting:
                state, why = "silent", resting[client]
            elif place and place.registered:
                state, why = "ready", self.pace.of(client)
            elif place and place.preparing:
                state, why, version = "preparing", str(place.preparing), place.preparing.version
            else:
                state = "refused" if place and place.node in self._reasons else "connected" if place else "away"
                why = self._reasons.get(place.node, "") if place else ""
            last = (last_rounds or {}).get(client)
            rows.append(ClientPresence(client=client, state=state, why=why, version=version, last_round=last))
        return Presence(round=round, round_seconds=round_seconds, clients=tuple(rows))

    def _greet(self, grid: Grid) -> None:
        """Ask the nodes whose time has come what they hold, and take the answers that are there."""
        self._look(grid)
        now, messages = time.monotonic(), {}
        due = [client for client, place in self._places.items() if not place.registered and now >= place.due]
        for client in sorted(due):
            place = self._places[client]
            hello = Hello(
                client=client,
                config_hash=self.identity.config_hash,
                begun=self._begun,
                artifact_bytes=self.artifact_bytes,
                why=self._why(place),
            )
            messages[client] = message_of(Question(hello, HelloReply), node=place.node)
            place.due = now + _pause_s(RETRY_S if place.silence else SILENT_S, place.greetings)
            place.greetings += 1
        for client in self._outbox.push(grid, messages):
            self._failed(client, f"node {self._places[client].node} did not register: not connected")
        while got := self._outbox.pull(grid):
            for client, message in got:
                try:
                    self._places[client].reply = read(message, HelloReply)
                except ProtocolError as error:
                    self._failed(client, f"node {self._places[client].node} did not register: {error}")

    def _why(self, place: Place) -> str:
        """What a site is told of why it does not take part, unless that is what it said itself."""
        if place.silence:
            return f"{place.silence} once it registers"
        return "" if place.unable else self._reasons.get(place.node, "")

    def _look(self, grid: Grid) -> None:
        """See who is there; of a node that left nothing is kept, so that it may come back mended."""
        nodes = sorted(int(node) for node in grid.get_node_ids())  # type: ignore[attr-defined]
        seen = {node: grid.client_of(node) for node in nodes}
        if seen == self._last_seen:
            return
        self._last_seen = seen
        self._reasons = {node: reason for node, reason in self._reasons.items() if node in seen}
        clients: dict[int, int] = {}
        for node, client in seen.items():
            if client is None:
                self._tell(node, f"node {node} is not registered with this server: it is ignored")
            elif not 0 <= client < self.num_clients:
                last = self.num_clients - 1
                self._tell(node, f"node {node} is client {client}, and the run has clients 0 to {last}: it is ignored")
            else:
                clients[node] = client
        gone = {client for client, place in self._places.items() if clients.get(place.node) != client}
        for client in gone:
            del self._places[client]
        if gone:
            self._outbox.forget(gone.__contains__)
        for node, client in clients.items():
            if client not in self._places:
                self._places[client] = Place(node)
                self._reasons.pop(node, None)
            elif (first := self._places[client].node) != node:
                self._tell(node, f"node {node} is ignored until node {first} leaves: both are client {client}")

    def _failed(self, client: int, reason: str, *, unable: bool = False) -> None:
        """A greeting that did not let a node in is repeated, less and less often."""
        place = self._places[client]
        place.due = time.monotonic() + _pause_s(RETRY_S, place.greetings - 1)
        place.unable, place.preparing = unable, None
        self._tell(place.node, reason)

    def _tell(self, node: int, reason: str) -> None:
        """Why a node does not take part: once in the log, as long as the reason stays the same."""
        reason = printable(reason)
        if self._reasons.get(node) != reason:
            self._reasons[node] = reason
            log.warning("%s", reason)

    def _let_in(self) -> list[int]:
        """Judge what has been answered."""
        joined = []
        for client in sorted(client for client, place in self._places.items() if place.reply):
            place = self._places[client]
            reply, place.reply = place.reply, None
            if reply is None or place.registered:
                continue
            problem = registration_problem(
                client, reply, identity=self.identity, num_labels=self.num_labels, first=self.clients.get(client)
            )
            if problem:
                self._failed(client, f"node {place.node} is refused: client {client}: {problem}")
            elif reply.refusal:
                why = f"client {client} cannot take part: {reply.refusal.text}. Its own log says why"
                self._failed(client, why, unable=True)
            elif reply.preparing:
                self._note_progress(client, reply)
            else:
                if client in self.hellos:
                    log.warning("client %d %s", client, "answers again" if place.silence else "came back")
                self._reasons.pop(place.node, None)
                self.hellos[client], self.clients[client] = reply, setup_of(client, reply)
                place.registered, place.preparing = True, None
                if not place.silence:
                    joined.append(client)
        return joined

    def _note_progress(self, client: int, reply: HelloReply) -> None:
        """A client that prepares its rows is no failure: it is greeted again soon, however often."""
        place, now = self._places[client], time.monotonic()
        place.due, place.greetings, place.unable = now + PREPARING_S, 0, False
        self._reasons.pop(place.node, None)
        logged = place.preparing.logged if place.preparing else now - TELL_S
        place.preparing = StagingProgress(reply.prepared, reply.preparing, reply.version, logged)
        if client not in self._most or reply.prepared > self._most[client][0]:
            self._most[client] = reply.prepared, now
        if now >= logged + TELL_S:
            place.preparing.logged = now
            log.warning("client %d is %s", client, place.preparing)

    def _known_reasons(self) -> list[str]:
        """Why nodes do not take part, or not yet."""
        preparing = [f"client {k} is {at.preparing}" for k, at in sorted(self._places.items()) if at.preparing]
        return [*(self._reasons[node] for node in sorted(self._reasons)), *preparing]

    def _mute(self) -> list[int]:
        """The connected clients of which nothing is known yet."""
        places = sorted(self._places.items())
        return [k for k, at in places if not (at.registered or at.preparing or at.node in self._reasons)]

    def _silent(self, clients: Sequence[int]) -> str:
        """Those of them of whom the log says nothing else, and what they lack."""
        mute = set(self._mute())
        lack = {k: "no answer yet" if k in mute else "not connected" for k in clients}
        return some_reasons([f"client {k} ({what})" for k, what in lack.items() if k in mute or k not in self._places])

    def _gets_on(self, *, since: float) -> bool:
        """Whether a client that is not here yet has prepared more rows since then, whatever became of its node."""
        return any(at.preparing and self._most[client][1] >= since for client, at in self._places.items())


def _pause_s(first_s: float, doublings: int) -> float:
    """Until the next greeting; a run of weeks has more of them than a float has powers of 2."""
    return min(MAX_RETRY_S, first_s * 2.0 ** min(doublings, 10))
