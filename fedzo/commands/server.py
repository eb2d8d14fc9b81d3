"""``fedzo server``: a server's folder and registry, and its SuperLink as long as it is up."""

from __future__ import annotations

import getpass
import logging
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template

import httpx

from fedzo.errors import ConfigError, shell
from fedzo.records.folder import lock_file, make_folder, open_file, replace_file
from fedzo.runtime.net.addresses import split_address
from fedzo.runtime.net.client_folder import Invitation, read_invitation, write_invitation
from fedzo.runtime.net.credentials import (
    FEW_DAYS,
    fingerprint,
    keep_private,
    make_key,
    pem_of,
    public_key_of,
    read_certificate,
    write_private,
)
from fedzo.runtime.net.key_registry import RegisteredClient
from fedzo.runtime.net.processes import Processes, Tail
from fedzo.runtime.net.server_folder import Listening, ServerFolder

log = logging.getLogger(__name__)
INVITATIONS, IMAGE = "invitations", {"image/Containerfile": "Containerfile"}
SERVICES = {
    "fedzo-server.service": "fedzo-server.service",
    "fedzo-run@.service": "fedzo-run@.service",
    "compose.yaml": "server-compose.yaml",
    "nginx.conf": "nginx.conf",
} | IMAGE
"""Files for those who run it, and the templates that they are made of."""
LOOK_S, STARTUP_S = 1.0, 120.0


def init(path: Path, *, hosts: Sequence[str], port: int, control_port: int, days: int) -> Iterator[str]:
    """Make a server's folder, or what is missing of it; yields lines for people.

    Args:
        path: The folder.
        hosts: Names and addresses at which sites reach this machine; the first is told to them.
        port: For sites.
        control_port: For this machine.
        days: How long the certificate is valid.
    """
    if port == control_port:
        raise ConfigError(f"--port and --control-port must differ, got {port}. Change one.")
    bracketed = [f"[{host}]" if ":" in host else host for host in hosts]
    everywhere = "[::]" if any(":" in host for host in hosts) else "0.0.0.0"  # the first takes IPv4, too
    listening = Listening(
        address=f"{bracketed[0]}:{port}", listen=f"{everywhere}:{port}", control=f"127.0.0.1:{control_port}"
    )
    folder = ServerFolder.make(path, listening, names=hosts, days=days)
    folder.check()
    certificate = read_certificate(folder.file("server.crt"))
    yield f"server folder: {path}"
    yield f"sites connect to {folder.listening.address}; change server.json for another address or port"
    yield f"certificate for {', '.join(certificate.names)}, valid for {certificate.days_left:.0f} days"
    (*_, listening_port) = split_address(folder.listening.listen)
    yield fill(folder.path, SERVICES, port=listening_port, public_port=443)
    yield f"next: fedzo server add-client NAME --index 0 {shell('--dir', path)}, and {shell('fedzo server up', path)}"


def add_client(folder: ServerFolder, name: str, *, index: int | None, key: str | None) -> Iterator[str]:
    """Register a client, or move it to another index; without a key of its own, make one and an invitation with it.

    Args:
        folder: The server's.
        name: Of the client, for people.
        index: Of the client in a run; None for the lowest that is free.
        key: Its public key, or a file with it.
    """
    folder.check()
    folder.registry.check_name(name)
    if key is not None:
        client = folder.registry.add(name, index=index, key=_key_line(key))
        yield _registered(client)
        yield f"the site needs {folder.file('ca.crt')} as ca.crt in its folder: send it there"
        return
    room = make_folder(folder.file(INVITATIONS), mode=0o700)
    if told := keep_private(room):
        yield told
    file, private = room / f"{name}.json", room / f"{name}.key"
    is_new = not file.exists()  # else the command is repeated
    if is_new:
        make_key(private)
    else:
        write_private(private, read_invitation(file).key.encode())
    try:
        authority, text = folder.file("ca.crt").read_text(encoding="ascii"), private.read_text(encoding="ascii")
        # before the key is registered: nobody has it but the invitation
        write_invitation(file, Invitation(address=folder.listening.address, authority=authority, key=text))
        try:
            client = folder.registry.add(name, index=index, key=public_key_of(private))
        except BaseException:
            if is_new:
                file.unlink()
            raise
    finally:
        private.unlink()
    yield _registered(client)
    yield f"invitation: {file}. It holds the site's key: send it securely, then delete it here"
    yield f"on the site: fedzo client init DIR --server {folder.listening.address} --invitation {name}.json"


def remove_client(folder: ServerFolder, name: str) -> Iterator[str]:
    """Revoke a client's key; a SuperLink that is up forgets it within seconds."""
    folder.check()
    client = folder.registry.remove(name)
    (folder.file(INVITATIONS) / f"{name}.json").unlink(missing_ok=True)
    yield f"client {client.index} ({client.name}) is not registered any more: its key is refused"


def renew(folder: ServerFolder, *, hosts: Sequence[str], days: int) -> Iterator[str]:
    """Write a new certificate, by default for the names of the old one; sites need nothing new."""
    folder.check()
    folder.renew(names=hosts or read_certificate(folder.file("server.crt")).names, days=days)
    certificate = read_certificate(folder.file("server.crt"))
    yield f"certificate for {', '.join(certificate.names)}, valid for {certificate.days_left:.0f} days"
    yield "a running SuperLink loads it within seconds"


def up(folder: ServerFolder) -> Iterator[str]:
    """Keep the SuperLink until this process is told to end; yields lines for people.

    Raises:
        ConfigError: The folder is not whole, or somebody listens at its ports.
        FolderInUseError: Another process keeps it.
        ProtocolError: The SuperLink does not start.
    """
    folder.check()
    with os.fdopen(open_file(folder.path, "up.lock", os.O_RDWR | os.O_CREAT), "ab") as held:
        lock_file(held.fileno(), folder.path, "server folder")  # before anything is removed that another one uses
        yield from _keep_up(folder)


def _keep_up(folder: ServerFolder) -> Iterator[str]:
    from fedzo.runtime.net import launch  # here, since Flower takes seconds to import, and other commands do without

    if text := launch.listening_problem(folder):
        raise ConfigError(text)
    if folder.is_serving is False:  # no run needs what Flower remembers
        for left in folder.path.glob("superlink.db*"):
            left.unlink()
    variables = {**launch.environment(), "FLWR_HOME": str(folder.file("flower"))}
    with Processes(folder.file("logs"), environment=variables) as processes:
        if told := keep_private(folder.file("logs")):  # they name sites
            yield told
        launch.start_superlink(processes, folder, restarts=None)
        launch.wait_for_superlink(processes, folder, timeout_s=STARTUP_S)
        listening = folder.listening
        yield f"SuperLink up: sites at {listening.address} (listening at {listening.listen})"
        yield f"log: {processes.log_path('superlink')}"
        registered: object = None
        problem = refused = certificate = ""
        said = Tail(processes.log_path("superlink"))
        while True:
            processes.check()
            if (clients := folder.registry.by_key()) is not registered:
                try:
                    count = launch.register_clients(folder)
                except httpx.HTTPError as error:  # of a SuperLink that is started again: at the next look
                    if "certificate" in str(error) and str(error) != refused:
                        refused = str(error)
                        yield f"the clients cannot be registered: {refused}. See `{shell('fedzo doctor', folder.path)}`"
                else:
                    registered, refused = clients, ""
                    yield f"{count} clients are registered"
            if (told := certificate_problem(folder)) != certificate:
                certificate = told
                yield told or "the certificate is renewed"
            yield from (line for line in said.new() if " WARNING refused: " in line)
            if (told := folder.disk_problem) != problem:
                problem = told
                yield told or f"there is room on the disk of {folder.path}"
            time.sleep(LOOK_S)


def certificate_problem(folder: ServerFolder) -> str:
    """What is to be done about the server's certificate, told anew each day before its end; empty while it is good."""
    try:
        days = read_certificate(folder.file("server.crt")).days_left
    except ConfigError as error:  # it may just be written by hand: the SuperLink keeps what it has
        return str(error)
    if days >= FEW_DAYS:
        return ""
    how = f"`{shell('fedzo server renew --dir', folder.path)}`"
    return f"certificate valid for {days:.0f} days. {how}" if days > 0 else f"the certificate expired. {how}"


def template(name: str) -> str:
    """The text of a file that a folder gets."""
    return resources.files("fedzo.commands").joinpath("templates", name).read_text(encoding="utf-8")


def fill(folder: Path, files: Mapping[str, str], **more: object) -> str:
    """Write what is missing of a folder's service files, for this machine, Python and user; a line for people.

    Args:
        folder: The folder.
        files: Names of templates by those of the files.
        more: Further values.
    """
    values = {
        **more,
        "user": _user(),
        "uid": os.getuid(),
        "gid": os.getgid(),
    }
    for name, source in files.items():
        file = folder / name
        if file.parent != folder:
            make_folder(file.parent)
        if not file.exists():
            paths = {"folder": _quoted(str(folder.resolve()), name), "python": _quoted(sys.executable, name)}
            replace_file(file, Template(template(source)).substitute(values, **paths))
    return f"as a service: one of {', '.join(files)}"


def _key_line(key: str) -> str:
    """The text of a file with a key; what holds a blank and names no file is the key itself."""
    try:  # a copy may have got a byte order mark
        return Path(key).read_text(encoding="utf-8-sig", errors="replace")
    except OSError:
        if " " not in key.strip():
            raise
        return key


def _user() -> str:
    """The name of this user; a container's user may have a number alone, which systemd takes as well."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # the latter from Python 3.13 on
        return str(os.getuid())


def _quoted(path: str, name: str) -> str:
    """A path as it stands between double quotes in a file of this name."""
    text = re.sub(r'(["\\])', r"\\\1", path)
    match Path(name).suffix:
        case ".service":
            return text.replace("%", "%%").replace("$", "$$")
        case ".sbatch":
            return re.sub("([$`])", r"\\\1", text)
        case _:
            return text


def _registered(client: RegisteredClient) -> str:
    return f"client {client.index}: {client.name}, key {fingerprint(pem_of(client.key))}, registered {client.added}"
