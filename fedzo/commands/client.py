"""``fedzo client``: a site's folder, and its SuperNode and executor as long as they are up."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from fedzo.commands.server import IMAGE, fill, template
from fedzo.errors import ConfigError
from fedzo.records.folder import folder_of_one_process
from fedzo.runtime.net.client_folder import AUTHORITY, PUBLIC_KEY, SITE, ClientFolder, read_invitation
from fedzo.runtime.net.credentials import read_certificate
from fedzo.runtime.net.daemons import CONNECTED, REFUSED
from fedzo.runtime.net.parts import Site, environment, start_site
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
    if authority is not None:
        _check_authority(authority, path / AUTHORITY)
    folder = ClientFolder.make(path, address=address, site=template(SITE), invitation=invited)
    if authority is not None:
        folder.file(AUTHORITY).write_bytes(authority.read_bytes())
    yield f"client folder: {path}, of the server {folder.address}"
    if not (invited and invited.key):
        yield f"public key, for `fedzo server add-client NAME --index K --key ...`: {folder.public_key}"
        yield f"(the same in {folder.file(PUBLIC_KEY)})"
    if not folder.file(AUTHORITY).exists():
        yield f"still needed: the server's ca.crt, as {folder.file(AUTHORITY)}"
    yield fill(folder.path, SERVICES)
    yield f"next: edit {folder.file(SITE)} (rows, model, limits), and fedzo client up {path}"


def _check_authority(given: Path, kept: Path) -> None:
    """Refuse what is no certificate, or another authority than the site has: it trusts no two."""
    new = given.read_bytes()
    read_certificate(given)
    if kept.exists() and kept.read_bytes() != new:
        raise ConfigError(f"--ca {given}: {kept} must be of the same authority, but is another. Remove it first.")


def up(folder: ClientFolder) -> Iterator[str]:
    """Keep a site's SuperNode and executor until this process is told to end; yields lines for people.

    Raises:
        ConfigError: The folder is not whole, or the site file is wrong.
    """
    from fedzo.config.travel import load_site  # here, since it takes seconds that `fedzo client init` need not take

    folder.check()
    step_limit_s = load_site(folder.file(SITE)).limits.step_limit_s
    variables = {**environment(), "FLWR_HOME": str(folder.file("flower").resolve())}
    log_file = folder.file("logs").resolve() / "site.log"
    with (
        folder_of_one_process(folder.path, "client folder"),
        Processes(folder.file("logs"), environment=variables) as processes,
    ):
        site_file = folder.file(SITE).resolve()
        start_site(processes, Site(folder=folder, site_file=site_file, log_file=log_file, step_limit_s=step_limit_s))
        yield f"SuperNode and executor started for {folder.address}, logs in {folder.file('logs')}"
        watched = {"supernode": Tail(processes.log_path("supernode")), "site": Tail(log_file)}
        while True:
            processes.check()
            for line in watched["supernode"].new():
                if CONNECTED in line:
                    yield f"connected to {folder.address}"
                elif REFUSED in line:
                    yield line[line.index(REFUSED) :].strip()
                elif "Failed to initialize" in line or "[code:" in line:
                    yield f"{REFUSED}: {line.strip()}"
            yield from watched["site"].new()
            time.sleep(LOOK_S)
