"""``fedzo client``: a site's folder, and its SuperNode and executor as long as they are up."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path

from fedzo.commands.server import IMAGE, fill, template
from fedzo.errors import ConfigError, printable, shell, without_escapes
from fedzo.records.folder import LOCK, folder_of_one_process, is_locked, replace_file
from fedzo.runtime.net.client_folder import AUTHORITY, PUBLIC_KEY, SITE, ClientFolder, read_invitation
from fedzo.runtime.net.credentials import keep_private, plain_pem
from fedzo.runtime.net.daemons import CONNECTED, HEARD, LATE, REFUSED, SILENT, STARTED
from fedzo.runtime.net.processes import COLOURS, Processes, Tail

SERVICES = {
    "fedzo-client.service": "fedzo-client.service",
    "client.sbatch": "client.sbatch",
    "compose.yaml": "client-compose.yaml",
} | IMAGE
LOOK_S = 0.5
MAX_SHOWN = 5  # lines of a site's log
NO_LOCKS = "the file system has no locks"
LOST = re.compile(r"Failed to (send|receive) message \w+: (.*)")
"""How a SuperNode tells that it gave a message up. The server waits for the reply until the round's deadline."""


def init(path: Path, *, server: str | None, invitation: Path | None, authority: Path | None) -> Iterator[str]:
    """Make a site's folder, or what is missing of it; yields lines for people.

    Args:
        path: The folder.
        server: ``host:port`` of the server; an invitation holds it, too.
        invitation: File that the server handed over.
        authority: File with the server's certificate authority, where there is no invitation.
    """
    if invitation and authority:
        raise ConfigError("--ca must not be given beside --invitation, which holds the authority. Leave --ca out.")
    invited = read_invitation(invitation) if invitation else None
    address = server or (invited.address if invited else None)
    if address is None:
        raise ConfigError("--server must be given, or --invitation FILE, which holds it. Write --server HOST:PORT.")
    certificate = None if authority is None else _read_authority(authority, path / AUTHORITY)
    folder = ClientFolder.make(path, address=address, site=template(SITE), invitation=invited)
    if certificate is not None:
        replace_file(folder.file(AUTHORITY), certificate)
    yield f"client folder: {path}, of the server {folder.address}"
    if not (invited and invited.key):
        yield f"public key, for `fedzo server add-client NAME --index K --key ...`: {folder.public_key}"
        yield f"(the same in {folder.file(PUBLIC_KEY)})"
    if not folder.file(AUTHORITY).exists():
        yield f"still needed: the server's ca.crt, as {folder.file(AUTHORITY)}"
    yield fill(folder.path, SERVICES)
    yield f"next: edit {folder.file(SITE)} (rows, model, limits), and {shell('fedzo client up', path)}"


def _read_authority(given: Path, kept: Path) -> bytes:
    """A certificate's file; refused where the site has another authority: it trusts no two."""
    new = plain_pem(given.read_bytes(), given)
    if kept.exists() and plain_pem(kept.read_bytes(), kept) != new:
        raise ConfigError(f"--ca {given}: {kept} must be of the same authority, but is another. Remove it first.")
    return new


def up(folder: ClientFolder) -> Iterator[str]:
    """Keep a site's SuperNode and executor until this process is told to end; yields lines for people.

    Raises:
        ConfigError: The folder is not whole, or the site file is wrong.
    """
    from fedzo.config.travel import load_site  # here, since it takes seconds that `fedzo client init` need not take
    from fedzo.runtime.net.launch import Site, environment, start_executor, start_supernode

    folder.check()
    _make_plain(folder.file(AUTHORITY))
    own = load_site(folder.file(SITE))
    variables = {**environment(), "FLWR_HOME": str(folder.file("flower").resolve())}
    log_file = folder.file("logs").resolve() / "site.log"
    with (
        folder_of_one_process(folder.path, "client folder"),
        Processes(folder.file("logs"), environment=variables) as processes,
    ):
        if told := keep_private(folder.file("logs")):  # they may name rows
            yield told
        site_file, limit_s = folder.file(SITE).resolve(), own.limits.step_limit_s
        site = Site(folder=folder, site_file=site_file, log_file=log_file, step_limit_s=limit_s)
        start_executor(processes, site)
        start_supernode(processes, site)
        yield f"SuperNode and executor started for {folder.address}, logs in {folder.file('logs')}"
        supernode, site_log = Tail(processes.log_path("supernode")), Tail(log_file)
        words = _Words(folder.address)
        if told := _lack_of_rows(own.data.path):
            yield f"a run that needs this site's rows will be refused: {told}"
        while True:
            processes.check()
            for line in supernode.new():
                yield from map(printable, words.of(line))  # some of it are the server's words
            yield from map(without_escapes, site_log.new())
            time.sleep(LOOK_S)


def _lack_of_rows(path: str | None) -> str:
    """Why there are no rows where a site's file says, if so. They may come before a run does."""
    from fedzo.data.sources import own_files  # here, as in ``up``

    if path is None:
        return f"data.path of {SITE} must name their file"
    try:
        own_files(path)
    except (ConfigError, OSError) as error:  # the latter of a disk
        return without_escapes(error)
    return ""


def status(folder: ClientFolder) -> Generator[str, None, bool]:
    """Whether a site is up and connected, and the end of its log; yields lines for people.

    Returns:
        Whether it is, as far as anybody can know.

    Raises:
        ConfigError: The folder is not whole.
    """
    folder.check()
    is_up, words, logs = is_locked(folder.file(LOCK)), _Words(folder.address), folder.file("logs")
    going = {True: "up", False: "down", None: f"perhaps up ({NO_LOCKS})"}
    yield f"site of {folder.address}: {going[is_up]}"
    if is_up is not False:
        for line in _lines(logs / "supernode.log"):
            for _ in words.of(line):
                pass
        unknown = f"connected or not: {logs / 'supernode.log'} does not say"
        yield printable(words.connection) or unknown
    site_log = logs / "site.log"
    if last := deque(_lines(site_log), maxlen=MAX_SHOWN):
        yield f"the end of {site_log}:"
        yield from map(without_escapes, last)
    return is_up is not False and words.is_connected is not False


def _lines(log: Path) -> Iterator[str]:
    """The lines of a log, which may be long, or not be there."""
    with suppress(FileNotFoundError), log.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            yield COLOURS.sub("", line)


class _Words:
    """What a line of a SuperNode's log says to people.

    Args:
        address: Of the server.

    Attributes:
        connection: What the last line said that tells of the connection; empty until one does.
        is_connected: Whether the site was connected by that line; None until there is one.
    """

    def __init__(self, address: str) -> None:
        self.connection = ""
        self.is_connected: bool | None = None
        self._address = address
        self._reason_is_next = False

    def of(self, line: str) -> Iterator[str]:
        """What the next line says, if anything."""
        if self._reason_is_next:  # with a code in front it is the server's word
            who = REFUSED if line.startswith("[code:") else "cannot connect"
            yield self._now(f"{who}: {line.strip()}", is_connected=False)
        elif STARTED in line:
            if self.is_connected is not False:  # else why it was not tells more
                self.connection, self.is_connected = f"connecting to {self._address}", False
        elif CONNECTED in line:
            yield self._now(f"connected to {self._address}", is_connected=True)
        elif REFUSED in line:
            yield self._now(line[line.index(REFUSED) :].strip(), is_connected=LATE in line)
        elif SILENT in line:
            why = line.partition(SILENT)[2].rstrip()
            yield self._now(f"{self._address} does not answer{why}; retrying", is_connected=False)
        elif HEARD in line:
            yield self._now(f"{self._address} answers again", is_connected=True)
        elif lost := LOST.search(line):
            what = "reply to the server" if lost[1] == "send" else "request of the server"
            yield f"a {what} is lost: {lost[2].strip()}"
        self._reason_is_next = "Failed to initialize" in line

    def _now(self, told: str, *, is_connected: bool) -> str:
        self.connection, self.is_connected = told, is_connected
        return told


def _make_plain(authority: Path) -> None:
    """Mend a copy that Flower cannot read, such as one with a byte order mark."""
    content = authority.read_bytes()
    if (plain := plain_pem(content, authority)) != content:
        replace_file(authority, plain)
