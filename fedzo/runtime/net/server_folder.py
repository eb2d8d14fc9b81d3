"""The folder of a federation's server: where it listens, its credentials, and the registry of its clients.

The registry says which SuperNode key is which client. It is the only thing that does: what a node says of itself
counts for nothing.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fedzo.errors import ConfigError, FolderInUseError, shell
from fedzo.records.decode import decode_json, encode, to_json
from fedzo.records.fields import MOST_CLIENTS, Client, Length, Matching, Name, Within
from fedzo.records.folder import folder_of_one_process, is_locked, lock_file, make_folder, replace_file, told_as
from fedzo.runtime.net.addresses import Address, is_loopback, split_address
from fedzo.runtime.net.credentials import (
    Endpoint,
    check_names,
    keep_private,
    make_authority,
    make_certificate,
    make_secret,
    missing_files,
    pem_of,
    read_public_key,
)

log = logging.getLogger(__name__)
AUTHORITY = ("ca.crt", "ca.key")
FILES = ("server.json", "clients.json", *AUTHORITY, "server.crt", "server.key", "secret")
LEAST_FREE_BYTES = 1 << 20  # with less the disk of a server's folder counts as full
CLIENT_NAME = Matching(re.compile("[A-Za-z0-9][A-Za-z0-9._-]{0,62}"), "letters, digits and . _ -")


@dataclass(frozen=True, slots=True, kw_only=True)
class Listening:
    """Where a server is reached, the content of ``server.json``.

    Attributes:
        address: Where sites connect to; its host is a name of the certificate.
        listen: Where the SuperLink listens for sites; only the Fleet API answers there.
        control: Where it listens for this machine, all APIs; on the loopback interface.
    """

    address: Address
    listen: Address
    control: Address


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisteredClient:
    """A client of the registry.

    Attributes:
        index: Of the client in a run, from 0.
        name: For people.
        key: Public key of its SuperNode, one line.
        added: Date of its registration.
    """

    index: Client
    name: Annotated[str, CLIENT_NAME]
    key: Annotated[str, Length(1, 500)]
    added: Name


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """The run that a server serves, or was the last to serve.

    Attributes:
        run: Its folder.
        pid: The process that serves it.
    """

    run: Annotated[str, Length(1, 4096)]
    pid: Annotated[int, Within(1, 1 << 31)]

    def __str__(self) -> str:
        return f"{self.run} (process {self.pid})"


class ServerFolder:
    """A server's folder; its files are read when they are asked for, since other commands change them meanwhile.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._by_key: tuple[tuple[int, int], Mapping[bytes, RegisteredClient]] | None = None

    @classmethod
    def make(cls, path: Path, listening: Listening, *, names: Sequence[str], days: int) -> ServerFolder:
        """Write what is missing of a server's folder; what is there stays.

        Args:
            path: The folder; made if it is not there, for this user only.
            listening: Where the server is reached.
            names: Host names and addresses for its certificate.
            days: How long the certificate is valid.

        Raises:
            ConfigError: A file of the authority is missing that sites trust already.
        """
        check_names(names)
        path.mkdir(parents=True, mode=0o700, exist_ok=True)
        keep_private(make_folder(path / "logs"))  # the folder may have been there, open to others
        folder = cls(path)
        if missing := [name for name in AUTHORITY if not folder.file(name).exists()]:
            folder._check_unused(missing)
            make_authority(folder.file("ca.crt"), folder.file("ca.key"))
        if not (folder.file("server.crt").exists() and folder.file("server.key").exists()):
            folder.renew(names=names, days=days)
        if not folder.file("secret").exists():
            make_secret(folder.file("secret"))
        if not folder.file("clients.json").exists():
            folder._write_clients([])
        if not folder.file("server.json").exists():
            replace_file(folder.file("server.json"), to_json(listening, indent=2) + "\n")
        return folder

    @staticmethod
    def is_one(path: Path) -> bool:
        """Whether a folder is a server's, perhaps not whole."""
        return (path / "ca.key").exists() or (path / "clients.json").exists()

    def file(self, name: str) -> Path:
        """Where a file of the folder lies."""
        return self.path / name

    def check(self) -> None:
        """Refuse a folder in which something is missing.

        Raises:
            ConfigError: It is no server's folder, not whole, or cannot be read.
        """
        if missing := missing_files(self.path, FILES, "server folder"):
            self._check_unused([name for name in AUTHORITY if name in missing])
            raise ConfigError(
                f"server folder {self.path}: it must hold what `fedzo server init` writes, but has no "
                f"{', '.join(missing)}. Call `{shell('fedzo server init', self.path)}`, which keeps what is there."
            )
        _ = self.listening, self.clients

    def _check_unused(self, missing: list[str]) -> None:
        """Refuse to do without files of an authority that has signed: no site would trust another one."""
        if missing and self.file("server.crt").exists():
            raise ConfigError(
                f"server folder {self.path}: it must hold {' and '.join(AUTHORITY)}, which all sites trust, but has no "
                f"{', '.join(missing)}. Put a copy back. Another authority needs another folder, and sites its ca.crt."
            )

    @property
    def listening(self) -> Listening:
        """Where the server is reached."""
        found: Listening = self._read("server.json", Listening)
        for key in ("listen", "control"):
            host, port = split_address(getattr(found, key))
            if not 1 <= port <= 65535:
                raise ConfigError(f"{self.file('server.json')}: {key} must have a port of 1 to 65535, got {port}.")
            if key == "control" and (":" in host or not is_loopback(host)):  # the certificate names no IPv6 address
                raise ConfigError(
                    f"{self.file('server.json')}: control must be on the loopback interface (127.0.0.1:PORT), since "
                    f"Flower authenticates nobody there, got {found.control!r}."
                )
        return found

    @property
    def endpoint(self) -> Endpoint:
        """The SuperLink for processes of this machine."""
        return Endpoint(self.listening.control, self.file("ca.crt"), self.file("secret").read_bytes())

    @contextmanager
    def serving(self, run_dir: str) -> Iterator[None]:
        """Serve one run at a time: a site holds the model and the space of one.

        Raises:
            ConfigError: Another run is served.
        """
        opened = os.open(self.file("serving.json"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            lock_file(opened, self.path)
        except FolderInUseError as error:
            raise ConfigError(
                f"server folder {self.path}: it serves one run at a time, and serves {self.served} now. Wait for it, "
                "or end it with `fedzo stop`."
            ) from error
        try:
            os.truncate(opened, 0)
            os.write(opened, json.dumps(encode(Serving(run=run_dir, pid=os.getpid()))).encode())
            yield
        finally:
            os.close(opened)

    @property
    def is_serving(self) -> bool | None:
        """Whether a run is served; None where the file system knows no locks."""
        return is_locked(self.file("serving.json"))

    @property
    def served(self) -> Serving | None:
        """The run that is known to be served; None where there is none."""
        return self.last_served if self.is_serving else None

    @property
    def last_served(self) -> Serving | None:
        """The run that is served, or was the last to be; None where there was none."""
        file = self.file("serving.json")
        if not file.exists() or not (text := file.read_bytes()):
            return None
        return decode_json(Serving, text, where=str(file), error=ConfigError)

    # --- the registry

    @property
    def clients(self) -> list[RegisteredClient]:
        """All registered clients, by index."""
        found: tuple[RegisteredClient, ...] = self._read(
            "clients.json", Annotated[tuple[RegisteredClient, ...], Length(0, MOST_CLIENTS)]
        )
        for what in ("index", "name", "key"):
            (most, times), *_ = Counter(getattr(client, what) for client in found).most_common(1) or [(None, 0)]
            if times > 1:
                raise ConfigError(f"{self.file('clients.json')}: no two clients may have the {what} {most!s:.60}.")
        return sorted(found, key=lambda client: client.index)

    @property
    def disk_problem(self) -> str:
        """That there is no room for what the SuperLink keeps, or that nobody can tell; else an empty string."""
        try:
            full = shutil.disk_usage(self.path).free < LEAST_FREE_BYTES
        except OSError as error:  # a network disk may be away for a moment
            return f"The disk of {self.path} does not answer ({error.strerror})."
        return f"The disk of {self.path} is full: the SuperLink cannot keep what it is sent. Make room." if full else ""

    def by_key(self) -> Mapping[bytes, RegisteredClient]:
        """Clients by public key, in the form in which Flower keeps it; read again only when the file is another.

        A file that is spoilt later is told of once; what it held before counts until it is mended.

        Raises:
            ConfigError: The file cannot be read, and has not been before.
        """
        file = self.file("clients.json")
        try:
            version = (state := file.stat()).st_mtime_ns, state.st_ino
        except OSError:
            version = 0, 0
        if self._by_key is None or self._by_key[0] != version:
            try:
                self._by_key = version, {pem_of(client.key): client for client in self.clients}
            except ConfigError as error:
                if self._by_key is None:
                    raise ConfigError(f"{file}: {error}") from error
                log.warning("%s: %s Until then the old client list is used.", file, error)
                self._by_key = version, self._by_key[1]
        return self._by_key[1]

    def add_client(self, name: str, *, index: int | None, key: str) -> RegisteredClient:
        """Register a client; one that is registered so already is left alone.

        Args:
            name: For people.
            index: Of the client; None for the lowest that is free.
            key: Its public key, one line.

        Raises:
            ConfigError: The name is none, or name, index or key belong to another.
        """
        self.check_name(name)
        with folder_of_one_process(self.path):
            clients, key = self.clients, read_public_key(key)
            if index is None:
                own = [client.index for client in clients if client.key == key]
                free = {*range(len(clients) + 1)} - {client.index for client in clients}
                index = own[0] if own else min(free)
            new = RegisteredClient(index=index, name=name, key=key, added=datetime.date.today().isoformat())
            for client in clients:
                alike = [what for what in ("index", "name", "key") if getattr(client, what) == getattr(new, what)]
                if len(alike) == 3:
                    return client
                if alike:
                    again = " Then restart `fedzo server up` while no run is served: it takes no removed key before."
                    raise ConfigError(
                        f"client {name}: its {alike[0]} must be its own, but client {client.name} has it (index "
                        f"{client.index}). Choose another, or remove that client: "
                        f"`{shell('fedzo server remove-client', client.name, '--dir', self.path)}`."
                        f"{again if 'key' in alike else ''}"
                    )
            self._write_clients([*clients, new])
        return new

    @staticmethod
    def check_name(name: str) -> None:
        """Refuse what is no client's name; ``ConfigError``."""
        if not CLIENT_NAME.pattern.fullmatch(name):
            raise ConfigError(
                f"NAME must be at most 63 {CLIENT_NAME.says}, the first a letter or digit, got {name!r:.80}. "
                "Choose another name."
            )

    def remove_client(self, name: str) -> RegisteredClient:
        """Take a client out of the registry; its key opens nothing any more.

        Raises:
            ConfigError: There is none of this name.
        """
        with folder_of_one_process(self.path):
            clients = self.clients
            found = next((client for client in clients if client.name == name), None)
            if found is None:
                known = ", ".join(client.name for client in clients) or "none"
                raise ConfigError(f"client {name}: it must be registered ({known}). Check the name.")
            self._write_clients([client for client in clients if client is not found])
        return found

    def renew(self, *, names: Sequence[str], days: int) -> None:
        """Write a new certificate; a SuperLink that runs takes it up, and sites need nothing new."""
        check_names(names)
        make_certificate(
            self.file("server.crt"),
            self.file("server.key"),
            authority=self.file("ca.crt"),
            authority_key=self.file("ca.key"),
            names=list(dict.fromkeys([*names, "localhost", "127.0.0.1"])),
            days=days,
        )

    def _write_clients(self, clients: Sequence[RegisteredClient]) -> None:
        plain = [encode(client) for client in sorted(clients, key=lambda client: client.index)]
        replace_file(self.file("clients.json"), json.dumps(plain, indent=2) + "\n", durable=True, mode=0o600)

    def _read(self, name: str, kind: object) -> Any:
        rule = f"server folder {self.path}: {name} must be a readable file"
        with told_as(ConfigError, rule, f"Call `{shell('fedzo server init', self.path)}`."):
            text = self.file(name).read_bytes()
        return decode_json(kind, text, where=str(self.file(name)), error=ConfigError, remedy="Restore it from a copy.")
