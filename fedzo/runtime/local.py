"""A federation on this machine as it is deployed: a server's and a site's processes, on the loopback interface only.

What ``runtime=remote`` joins, this one starts itself: a SuperLink, and a SuperNode and an executor a client, with TLS,
keys and secrets that are made for the run and removed at its end. The run's server is a process of its own.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedzo.records.folder import CLIENTS_LOG, SITE_FILE
from fedzo.runtime.config import LocalConfig
from fedzo.runtime.net.addresses import free_ports
from fedzo.runtime.net.client_folder import ClientFolder, Invitation
from fedzo.runtime.net.launch import (
    Site,
    environment,
    start_executor,
    start_superlink,
    start_supernode,
    wait_for_registration,
    wait_for_superlink,
)
from fedzo.runtime.net.processes import Processes
from fedzo.runtime.net.server_folder import Listening, ServerFolder
from fedzo.runtime.net.server_process import ServerProcess
from fedzo.system import usable_cpus

RESTARTS = 3
NETWORK = "network"
"""Folder for credentials, in the run folder."""


def run_local(*, num_clients: int, run_dir: Path, config: LocalConfig) -> None:
    """Run a federation over the network of this machine; what the server raises, this raises.

    Args:
        num_clients: Number of clients.
        run_dir: The run folder, which says what the run is, and in ``site.json`` what all its clients' site is.
        config: Time limits.

    Raises:
        ProtocolError: A process did not start, or ended too often; with the end of its log.
    """
    control, public, *ports = free_ports(2 + num_clients)  # at once: what is let go may be given again
    listening = Listening(address=f"127.0.0.1:{public}", listen=f"127.0.0.1:{public}", control=f"127.0.0.1:{control}")
    with (
        _network(run_dir / NETWORK, num_clients, listening) as (server, clients),
        Processes(run_dir / "logs", environment=environment()) as processes,
    ):
        start_superlink(processes, server, restarts=RESTARTS)
        server_process = ServerProcess(run_dir, server.path)
        try:
            sites = [
                Site(
                    folder=folder,
                    site_file=run_dir / SITE_FILE,
                    log_file=run_dir / CLIENTS_LOG,
                    step_limit_s=config.step_limit_s,
                    restarts=RESTARTS,
                    name=str(index),
                    environment=share_of_cpus(num_clients),
                    port=port,
                )
                for index, (folder, port) in enumerate(zip(clients, ports, strict=True))
            ]
            for site in sites:
                start_executor(processes, site)
            wait_for_superlink(processes, server, timeout_s=config.startup_s, setting="runtime.startup_s")
            wait_for_registration(processes, server, timeout_s=config.startup_s, setting="runtime.startup_s")
            for site in sites:  # not before their keys are known
                start_supernode(processes, site)
        except BaseException:
            server_process.interrupt()
            raise
        server_process.wait(processes.check)


def share_of_cpus(num_clients: int) -> dict[str, str]:
    """The variable that has clients, who work at the same time, share the CPUs, unless the user has set it."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, usable_cpus() // num_clients))
    return {"OMP_NUM_THREADS": threads}


@contextmanager
def _network(folder: Path, num_clients: int, listening: Listening) -> Iterator[tuple[ServerFolder, list[ClientFolder]]]:
    """Throw-away folders of a server and its sites."""
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    folder.mkdir(mode=0o700, parents=True)
    try:
        server = ServerFolder.make(folder / "server", listening, names=["127.0.0.1"], days=30)
        invitation = Invitation(address=listening.address, authority=server.file("ca.crt").read_text())
        clients = []
        for index in range(num_clients):
            client = ClientFolder.make(
                folder / f"client-{index}", address=listening.address, site="", invitation=invitation
            )
            server.registry.add(f"client-{index}", index=index, key=client.public_key)
            clients.append(client)
        yield server, clients
    finally:
        shutil.rmtree(folder, ignore_errors=True)
