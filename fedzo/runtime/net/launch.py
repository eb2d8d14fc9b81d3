"""The processes of a federation: how a server's SuperLink, and a site's SuperNode and executor, are started.

``runtime=local`` starts them all on one machine; ``fedzo server up`` and ``fedzo client up`` start one side each.
"""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

import httpx

import fedzo
from fedzo.errors import ProtocolError
from fedzo.runtime._flower import ENVIRONMENT
from fedzo.runtime.net._flower_control import Node, control
from fedzo.runtime.net.addresses import accepts, free_ports, split_address
from fedzo.runtime.net.client_folder import ARTIFACTS, KEY, SECRET, ClientFolder
from fedzo.runtime.net.processes import Processes, python
from fedzo.runtime.net.server_folder import ServerFolder
from fedzo.system import SITE_ARTIFACTS_ENV, SITE_ENV, SITE_LOG_ENV, keep_loopback_direct

__all__ = [
    "Node",
    "Site",
    "control",
    "environment",
    "listening_problem",
    "register_clients",
    "start_executor",
    "start_supernode",
    "start_superlink",
    "wait_for_registration",
    "wait_for_superlink",
]
log = logging.getLogger(__name__)
DAEMONS = "fedzo.runtime.net.daemons"
EXECUTOR = python("fedzo.runtime.net.executor")


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One client's site.

    Attributes:
        folder: Its key and server.
        site_file: Its configuration.
        log_file: Where its executor writes its errors and its part in a run.
        step_limit_s: A message that takes longer is given up, and the executor started again.
        restarts: How often in a row its processes are started again; None for ever.
        name: Ends the names of its processes; empty where the machine has one site.
        environment: Variables for its executor.
        port: Of the loopback interface, where the two meet.
    """

    folder: ClientFolder
    site_file: Path
    log_file: Path
    step_limit_s: float
    restarts: int | None = None
    name: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    port: int = field(default_factory=lambda: free_ports(1)[0])

    def process(self, kind: str) -> str:
        """The name of one of its processes."""
        return f"{kind}-{self.name}" if self.name else kind


def environment() -> dict[str, str]:
    """This process's environment for others: this very fedzo first on the path, and no word of Flower to anyone."""
    package = str(Path(fedzo.__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")]))
    variables = {**os.environ, **ENVIRONMENT, "PYTHONPATH": path}
    keep_loopback_direct(variables)
    return variables


def start_superlink(processes: Processes, folder: ServerFolder, *, restarts: int | None) -> None:
    """Start a server's SuperLink."""
    command = [*python(DAEMONS), "superlink", str(os.getpid()), str(folder.path)]
    processes.start("superlink", command, restarts=restarts, ends_last=True)


def start_executor(processes: Processes, site: Site) -> None:
    """Start a site's executor, which loads the site's model meanwhile and waits for its SuperNode."""
    folder = site.folder
    processes.start(
        site.process("executor"),
        [
            *(*EXECUTOR, "--runtime-api-address", f"127.0.0.1:{site.port}"),
            *("--secret-file", str(folder.file(SECRET)), "--parent-pid", str(os.getpid())),
            *("--step-limit-s", str(site.step_limit_s)),
        ],
        environment={
            SITE_ENV: str(site.site_file),
            SITE_LOG_ENV: str(site.log_file),
            SITE_ARTIFACTS_ENV: str(folder.file(ARTIFACTS).resolve()),
            **site.environment,
        },
        restarts=site.restarts,
    )


def start_supernode(processes: Processes, site: Site) -> None:
    """Start a site's SuperNode, which ends, and is started again, as long as its server does not let it in."""
    folder, server = site.folder, site.folder.endpoint
    processes.start(
        site.process("supernode"),
        [
            *(*python(DAEMONS), "supernode", str(os.getpid())),
            *("--superlink", server.address, "--root-certificates", str(server.authority)),
            *("--auth-supernode-private-key", str(folder.file(KEY)), "--host", "127.0.0.1", "--port", str(site.port)),
            *("--isolation", "process", "--superexec-auth-secret-file", str(folder.file(SECRET))),
        ],
        restarts=None,  # for as long as the server takes an old connection of it for alive it is sent away
    )


def wait_for_superlink(processes: Processes, folder: ServerFolder, *, timeout_s: float, setting: str = "") -> None:
    """Wait until a SuperLink listens; ``setting`` is the key of ``timeout_s``, where a user can raise it.

    Raises:
        ProtocolError: It does not, or it ended.
    """
    address = folder.listening.control
    processes.wait_until(
        lambda: accepts(address),
        what="the SuperLink's start",
        timeout_s=timeout_s,
        log_of="superlink",
        setting=setting,
    )


def wait_for_registration(processes: Processes, folder: ServerFolder, *, timeout_s: float, setting: str) -> None:
    """Register the clients as soon as the SuperLink can; ``setting`` is the key of ``timeout_s``.

    Raises:
        ProtocolError: It could not, or a process ended once too often.
    """

    def registered() -> bool:
        with contextlib.suppress(httpx.HTTPError):
            register_clients(folder)
            return True
        return False

    what = "the clients' registration"
    processes.wait_until(registered, what=what, timeout_s=timeout_s, log_of="superlink", setting=setting)


def register_clients(folder: ServerFolder) -> int:
    """Have the SuperLink let in the keys of the registry, and no others; for a key that it refuses, say so.

    Returns:
        Of how many clients it lets the keys in.

    Raises:
        httpx.HTTPError: The SuperLink does not answer, or cannot at the moment.
    """
    with control(folder.endpoint) as flower:
        nodes, clients = {node.public_key: node for node in flower.nodes()}, folder.registry.by_key()
        count = len(clients)
        for key, node in nodes.items():
            if key not in clients:
                flower.unregister(node.node_id)
                log.warning("a key that is not in the registry any more was revoked (node %d)", node.node_id)
        for key, client in clients.items():
            if key not in nodes:
                try:
                    flower.register(key, client.name)
                except ProtocolError as error:
                    count -= 1
                    remedy = "For a key that was revoked before, restart `fedzo server up` while no run is served."
                    log.warning("%s %s", error, remedy)
    return count


def listening_problem(folder: ServerFolder) -> str:
    """Why a SuperLink cannot listen where its folder says, or an empty string."""
    for key in ("control", "listen"):
        address = getattr(folder.listening, key)
        host, port = split_address(address)
        if accepts(f"{host if host not in ('0.0.0.0', '::') else '127.0.0.1'}:{port}"):
            return f"{address}: somebody listens there already. End it, or choose another port in server.json."
    return ""
