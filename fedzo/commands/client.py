"""``fedzo client``: a site's folder, and its SuperNode and executor as long as they are up."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from fedzo.commands.server import IMAGE, fill, template
from fedzo.errors import ConfigError, printable, shell, without_escapes
from fedzo.records.folder import folder_of_one_process, replace_file
from fedzo.runtime.net.client_folder import AUTHORITY, PUBLIC_KEY, SITE, ClientFolder, read_invitation
from fedzo.runtime.net.credentials import keep_private, plain_pem
from fedzo.runtime.net.daemons import CONNECTED, HEARD, REFUSED, SILENT
from fedzo.runtime.net.processes import Processes, Tail

SERVICES = {
    "fedzo-client.service": "fedzo-client.service",
    "client.sbatch": "client.sbatch",
    "compose.yaml": "client-compose.yaml",
} | IMAGE
LOOK_S = 0.5


def init(path: Path, *, server: str | None, invitation: Path | None, authority: Path | None) -> Iterator[str]:
    """Make a site's folder, or what is missing of it; yields lines for people.

    Args:
        path: The folder.
        server: ``host:port`` of the server; an invitation holds it, too.
        invitation: File that the server handed over.
        authority: File with the server's certificate authority, where there is no invitation.
    """
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
    from fedzo.runtime.net.parts import Site, environment, start_site

    folder.check()
    _make_plain(folder.file(AUTHORITY))
    step_limit_s = load_site(folder.file(SITE)).limits.step_limit_s
    variables = {**environment(), "FLWR_HOME": str(folder.file("flower").resolve())}
    log_file = folder.file("logs").resolve() / "site.log"
    with (
        folder_of_one_process(folder.path, "client folder"),
        Processes(folder.file("logs"), environment=variables) as processes,
    ):
        if told := keep_private(folder.file("logs")):  # they may name rows
            yield told
        site_file = folder.file(SITE).resolve()
        start_site(processes, Site(folder=folder, site_file=site_file, log_file=log_file, step_limit_s=step_limit_s))
        yield f"SuperNode and executor started for {folder.address}, logs in {folder.file('logs')}"
        supernode, site = Tail(processes.log_path("supernode")), Tail(log_file)
        words = _Words(folder.address)
        while True:
            processes.check()
            for line in supernode.new():
                yield from map(printable, words.of(line))  # some of it are the server's words
            yield from map(without_escapes, site.new())
            time.sleep(LOOK_S)


class _Words:
    """What a line of a SuperNode's log says to people.

    Args:
        address: Of the server.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._reason_is_next = False

    def of(self, line: str) -> Iterator[str]:
        """What the next line says, if anything."""
        if self._reason_is_next:  # with a code in front it is the server's word
            yield f"{REFUSED if line.startswith('[code:') else 'cannot connect'}: {line.strip()}"
        elif CONNECTED in line:
            yield f"connected to {self._address}"
        elif REFUSED in line:
            yield line[line.index(REFUSED) :].strip()
        elif SILENT in line:
            yield f"{self._address} does not answer{line.partition(SILENT)[2].rstrip()}; retrying"
        elif HEARD in line:
            yield f"{self._address} answers again"
        self._reason_is_next = "Failed to initialize" in line


def _make_plain(authority: Path) -> None:
    """Mend a copy that Flower cannot read, such as one with a byte order mark."""
    content = authority.read_bytes()
    if (plain := plain_pem(content, authority)) != content:
        replace_file(authority, plain)
