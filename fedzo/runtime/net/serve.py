"""A run's server at a SuperLink of this machine: it submits the run and plays its ServerApp in this process."""

from __future__ import annotations

import logging
import ssl
import time
from collections.abc import Mapping

import httpx
from flwr.app import Message
from flwr.serverapp import ServerApp

from fedzo.errors import ProtocolError
from fedzo.run.apps import RUN_DIR_KEY
from fedzo.runtime._flower import SUPERLINK_NODE_ID, ErrorCode, one_federation, quiet_flower
from fedzo.runtime.config import STARTUP_S
from fedzo.runtime.net._flower_control import control
from fedzo.runtime.net._flower_grid import ServerGrid, server_task
from fedzo.runtime.net._flower_http import RunNotRunningException, RuntimeApi, TaskType
from fedzo.runtime.net.addresses import accepts
from fedzo.runtime.net.bundle import build_bundle
from fedzo.runtime.net.gate import WIRE
from fedzo.runtime.net.server_folder import ServerFolder

log = logging.getLogger(__name__)
POLL_S = 0.1
LOOK_S = 1.0
"""How often the server looks whether its SuperLink was started again."""
NODES_PAUSE, MAX_PAUSE_S = 20, 5.0
"""A look at the connected nodes holds for so many times its length, since one at hundreds takes long, but not longer
than that: it takes longer still while the SuperLink is started again."""
TASK_S = 30.0
"""How long the SuperLink may take to hand out the task of a run that it has accepted."""


def serve(
    server_app: ServerApp, *, folder: ServerFolder, run_config: Mapping[str, str], startup_s: float = STARTUP_S
) -> None:
    """Run a federation with the nodes that are registered at a server; what the server raises, this raises.

    Runs that an ended process of this server left behind are ended first: a server serves one run at a time.

    Args:
        server_app: Runs in this process.
        folder: The server's, whose SuperLink is up or starting; ``folder.serving`` is held by whoever calls this.
        run_config: Given to both apps; the run folder stays here.
        startup_s: How long to wait for the SuperLink.

    Raises:
        ConfigError: Another federation runs in this process.
        ProtocolError: The SuperLink does not answer, or somebody has stopped the run.
    """
    server = folder.endpoint
    with one_federation(), quiet_flower():
        _wait_for(server.address, startup_s)
        try:
            with control(server) as flower:
                for left in flower.running():
                    flower.stop_run(left)
                travels = {key: value for key, value in run_config.items() if key != RUN_DIR_KEY}
                flower.start_run(build_bundle(), travels)
            grid = KeyedGrid(folder, _take_task(folder))
            with server_task(grid, not_taken=_Full(folder).tell) as context:
                context.run_config = dict(run_config)
                server_app(grid=grid, context=context)
        except httpx.HTTPError as error:
            raise ProtocolError(
                f"SuperLink {server.address}: it must answer, but: {error}. Is `fedzo server up` running? "
                f"Its log is in {folder.file('logs')}."
            ) from error
        except RunNotRunningException as error:
            raise ProtocolError(
                "SuperLink: the run must be running, but somebody has stopped it, or its server was not heard of for a "
                f"minute, as where its machine slept. {folder.disk_problem}".rstrip()
            ) from error


class KeyedGrid(ServerGrid):
    """Flower's grid, with the clients of the server's registry by their keys."""

    def __init__(self, folder: ServerFolder, token: str) -> None:
        server = folder.endpoint
        super().__init__(server.address, root_certificates=server.authority.read_bytes(), token=token)
        self._folder = folder
        self._clients: dict[int, int] = {}
        self._nodes, self._next_nodes = list[int](), 0.0
        self._link = httpx.Client(
            base_url=f"https://{server.address}",
            verify=ssl.create_default_context(cafile=server.authority),
            trust_env=False,
        )
        self._start, self._restarts, self._next_look = "", 0, 0.0
        self._counted, self._before = (0, 0), (0, 0)
        self._ask_gate()

    def get_node_ids(self) -> list[int]:
        """Nodes that are connected, also such that the registry does not know any more."""
        if (began := time.monotonic()) < self._next_nodes:
            return self._nodes
        nodes, known = list(self.get_nodes()), self._folder.registry.by_key()
        self._clients = {node.node_id: known[node.public_key].index for node in nodes if node.public_key in known}
        self._nodes, ended = [node.node_id for node in nodes], time.monotonic()
        self._next_nodes = ended + min(NODES_PAUSE * (ended - began), MAX_PAUSE_S)
        return self._nodes

    def client_of(self, node: int) -> int | None:
        """The index of the client that a node of ``get_node_ids`` plays; None where none is registered for its key."""
        return self._clients.get(node)

    def registered(self, clients: set[int]) -> set[int]:
        """Those of these clients whose key is in the registry."""
        return clients & {client.index for client in self._folder.registry.by_key().values()}

    def wire_bytes(self) -> tuple[int, int]:
        """Bytes that registered clients sent and got, by the SuperLink's gate, which counts anew after a restart."""
        self._ask_gate()
        return self._before[0] + self._counted[0], self._before[1] + self._counted[1]

    def restarts(self) -> int:
        """How often the SuperLink was started again, as of a second ago."""
        if time.monotonic() >= self._next_look:
            self._ask_gate()
        return self._restarts

    def lost(self, reply: Message) -> bool:
        """Whether the SuperLink does not know a question any more, whose reply it has handed to nobody."""
        return _is_of_superlink(reply, ErrorCode.MESSAGE_UNAVAILABLE)

    def unreachable(self, reply: Message) -> bool:
        """Whether the SuperLink answers for a node that it has not heard of for the time of its lease."""
        return _is_of_superlink(reply, ErrorCode.NODE_UNAVAILABLE)

    def _ask_gate(self) -> None:
        """What it has counted, and whether it is the one that was asked before."""
        self._next_look = time.monotonic() + LOOK_S
        try:
            start, up, down = self._link.get(WIRE).raise_for_status().json()
        except httpx.HTTPError:  # it is being started again: what it carries until then is told later, or lost
            return
        if self._start not in ("", start):
            self._restarts += 1
            self._before = self._before[0] + self._counted[0], self._before[1] + self._counted[1]
            log.warning("the SuperLink was restarted: pending requests are sent again")
        self._start, self._counted = start, (int(up), int(down))


class _Full:
    """Tells that the SuperLink has no room for what it is sent, once for each time that its disk is full."""

    def __init__(self, folder: ServerFolder) -> None:
        self._folder = folder
        self._told = ""

    def tell(self) -> None:
        """Look, and say so."""
        problem = self._folder.disk_problem
        if problem and not self._told:
            log.warning("%s", problem)
        self._told = problem


def _is_of_superlink(reply: Message, code: int) -> bool:
    """Whether a reply is this error and the SuperLink's own: a client may put any code into its reply."""
    return bool(reply.has_error() and reply.metadata.src_node_id == SUPERLINK_NODE_ID and reply.error.code == code)


def _wait_for(address: str, startup_s: float) -> None:
    ends = time.monotonic() + startup_s
    while not accepts(address):
        if time.monotonic() > ends:
            raise ProtocolError(
                f"SuperLink {address}: it must listen within {startup_s:g} s, but does not. "
                "Start it with `fedzo server up`, or see its log."
            )
        time.sleep(POLL_S)


def _take_task(folder: ServerFolder) -> str:
    server = folder.endpoint
    api = RuntimeApi(server.address, server.secret or b"", server.authority.read_bytes())
    ends = time.monotonic() + TASK_S
    with api.tasks(TaskType.SERVER_APP) as take:
        while (token := take()) is None:
            if time.monotonic() > ends:
                raise ProtocolError(f"SuperLink {server.address}: it must have a task for the run, but has none.")
            time.sleep(POLL_S)
    return token
