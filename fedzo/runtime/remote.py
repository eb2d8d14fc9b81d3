"""A federation with sites on machines of their own: its server joins the SuperLink that ``fedzo server up`` keeps.

The run's server is a process of its own, which goes on when the terminal that started it closes. The command that
started it shows what it says until it ends.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TextIO

from fedzo.errors import ConfigError, shell
from fedzo.fl.log_store import has_begun
from fedzo.records.folder import CONFIG, make_folder, open_file
from fedzo.runtime.config import RemoteConfig
from fedzo.runtime.net.addresses import accepts
from fedzo.runtime.net.key_registry import RegisteredClient
from fedzo.runtime.net.server_folder import ServerFolder
from fedzo.runtime.net.server_process import SERVER_LOG, ServerProcess

log = logging.getLogger(__name__)


def run_remote(*, num_clients: int, run_dir: Path, config: RemoteConfig) -> None:
    """Run a federation with the sites of a server; what its server raises, this raises.

    Args:
        num_clients: Number of clients; a run begins when those with the indices below it are registered, and goes on
            without those whose keys were revoked later.
        run_dir: The run folder, which says what the run is.
        config: Names the server's folder.

    Raises:
        ConfigError: The server is not up or serves another run, or a client is not registered.
        RunFolderError: Its log in the run folder, or the log's folder, is a link.
        SystemExit: The terminal was closed; the run goes on.
    """
    server = ServerFolder(Path(config.server))
    if begun := has_begun(run_dir):
        _refuse_gone(server, run_dir)
    server.check()
    _check_registered(server, num_clients, begun=begun)
    if served := server.served:
        raise ConfigError(f"server folder {server.path}: it serves one run at a time, and serves {served} now.")
    if not accepts(server.listening.control):
        raise ConfigError(
            f"server folder {server.path}: its SuperLink must be up, but nobody listens at {server.listening.control}. "
            f"Start it: `{shell('fedzo server up', server.path)}`."
        )
    make_folder(run_dir / "logs")
    log_file = open_file(run_dir, SERVER_LOG, os.O_RDONLY | os.O_CREAT)
    with os.fdopen(log_file, encoding="utf-8", errors="replace") as said, _left_by_hangup():
        said.seek(0, 2)
        process = ServerProcess(run_dir, server.path, detached=True)
        print(
            f"The run's server is process {process.pid}. It goes on when this terminal closes.\n"
            f"`{shell('fedzo status', run_dir)}` shows it, `{shell('fedzo stop', run_dir)}` ends it between rounds.",
            flush=True,
        )
        try:
            process.wait(lambda: _show(said))
        finally:
            _show(said)


def _refuse_gone(server: ServerFolder, run_dir: Path) -> None:
    """Refuse a run whose server has gone; no site trusts a new one in its place."""
    with suppress(PermissionError):  # which the check of the folder tells of
        if not server.path.is_dir():
            raise ConfigError(
                f"runtime.server: the run began with the server's folder {server.path}, but there is none. If it was "
                f"moved, move it back, or write where it is now as runtime.server into {run_dir / CONFIG}."
            )


def _check_registered(server: ServerFolder, num_clients: int, *, begun: bool) -> None:
    """Refuse a run that begins without one of its clients, or has begun and has none any more."""
    clients = server.registry.clients
    missing = sorted(set(range(num_clients)) - {client.index for client in clients})
    if begun and 0 < len(missing) < num_clients:
        log.warning("clients %s are not registered in %s: the run goes on without them", missing, server.path)
    elif missing:
        lower = "" if begun else ", or lower fl.num_clients"
        spare = [] if begun else [client for client in clients if client.index >= num_clients]
        raise ConfigError(
            f"fl.num_clients={num_clients}: clients 0 to {num_clients - 1} must be registered in {server.path}, but "
            f"{missing} are not. Register them with `fedzo server add-client`{lower}."
            f"{_how_to_move(spare[-1], missing[0], server) if spare else ''}"
        )


def _how_to_move(client: RegisteredClient, index: int, server: ServerFolder) -> str:
    arguments = (client.name, "--index", index, "--key", client.key, "--dir", server.path)
    command = shell("fedzo server add-client", *arguments)
    return f" Client {client.name} has index {client.index}. To give it {index}: `{command}`."


def _show(said: TextIO) -> None:
    """Pass on what the server has written since."""
    if text := said.read():
        sys.stdout.write(text)
        sys.stdout.flush()


@contextmanager
def _left_by_hangup() -> Iterator[None]:
    """End this process, and not the run, when its terminal closes, unless it was made deaf to that (``nohup``)."""
    deaf = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    if deaf or threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(0)

    before = signal.signal(signal.SIGHUP, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)
