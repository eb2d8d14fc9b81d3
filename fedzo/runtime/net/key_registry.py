"""The registry of a federation's server: which SuperNode key is which client.

It is the only thing that says so: what a node says of itself counts for nothing. Who is connected and takes part in a
run is another matter (``fedzo.fl.server.client_registry``).
"""

from __future__ import annotations

import datetime
import json
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fedzo.errors import ConfigError, shell
from fedzo.records.decode import decode_json, encode
from fedzo.records.fields import MAX_CLIENTS, Client, Length, Matching, Name
from fedzo.records.folder import folder_of_one_process, is_locked, raised_as, replace_file
from fedzo.runtime.net.credentials import pem_of, read_public_key

log = logging.getLogger(__name__)
CLIENT_NAME = Matching(re.compile("[A-Za-z0-9][A-Za-z0-9._-]{0,62}"), "letters, digits and . _ -")


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


_Clients = Annotated[tuple[RegisteredClient, ...], Length(0, MAX_CLIENTS)]


class KeyRegistry:
    """The clients in the registry's file, which is read when it is asked for: other commands change it meanwhile.

    Args:
        file: In the server's folder.
        run_lock: A file that is locked as long as a run is served.
    """

    def __init__(self, file: Path, *, run_lock: Path) -> None:
        self._file = file
        self._run_lock = run_lock
        self._by_key: tuple[tuple[int, int], Mapping[bytes, RegisteredClient]] | None = None

    def make(self) -> None:
        """Write a registry without clients, where there is none."""
        if not self._file.exists():
            self._write([])

    @property
    def clients(self) -> list[RegisteredClient]:
        """All registered clients, by index."""
        rule = f"server folder {self._file.parent}: {self._file.name} must be a readable file"
        with raised_as(ConfigError, rule, "Let this user read it, or restore it from a copy."):
            text = self._file.read_bytes()
        where, remedy = str(self._file), "Restore it from a copy."
        found: tuple[RegisteredClient, ...] = decode_json(_Clients, text, where=where, error=ConfigError, remedy=remedy)
        for what in ("index", "name", "key"):
            (most, times), *_ = Counter(getattr(client, what) for client in found).most_common(1) or [(None, 0)]
            if times > 1:
                raise ConfigError(f"{self._file}: no two clients may have the {what} {most!s:.60}.")
        return sorted(found, key=lambda client: client.index)

    def by_key(self) -> Mapping[bytes, RegisteredClient]:
        """Clients by public key, in the form in which Flower keeps it; read again only when the file is another.

        A file that is spoilt later is told of once; what it held before counts until it is mended.

        Raises:
            ConfigError: The file cannot be read, and has not been before.
        """
        try:
            version = (state := self._file.stat()).st_mtime_ns, state.st_ino
        except OSError:
            version = 0, 0
        if self._by_key is None or self._by_key[0] != version:
            try:
                self._by_key = version, {pem_of(client.key): client for client in self.clients}
            except ConfigError as error:
                if self._by_key is None:
                    raise ConfigError(f"{self._file}: {error}") from error
                log.warning("%s: %s Until then the old client list is used.", self._file, error)
                self._by_key = version, self._by_key[1]
        return self._by_key[1]

    def add(self, name: str, *, index: int | None, key: str) -> RegisteredClient:
        """Register a client; one that is registered so already is left alone, and one under another index is moved.

        Args:
            name: For people.
            index: Of the client; None for its own, or the lowest that is free.
            key: Its public key, one line.

        Raises:
            ConfigError: The name is none, or name, index or key belong to another; or a run is served, and it has
                another index.
        """
        self.check_name(name)
        with folder_of_one_process(self._file.parent, "server folder"):
            clients, key = self.clients, read_public_key(key)
            own = [client.index for client in clients if client.key == key]
            free = {*range(len(clients) + 1)} - {client.index for client in clients}
            chosen = index if index is not None else own[0] if own else min(free)
            new = RegisteredClient(index=chosen, name=name, key=key, added=datetime.date.today().isoformat())
            others = []
            for client in clients:
                alike = [what for what in ("index", "name", "key") if getattr(client, what) == getattr(new, what)]
                if len(alike) == 3:
                    return client
                if alike == ["name", "key"]:
                    self._check_movable(client)
                elif alike:
                    raise ConfigError(self._taken(new, client, alike, is_move=index not in (None, client.index)))
                else:
                    others.append(client)
            self._write([*others, new])
        return new

    @staticmethod
    def check_name(name: str) -> None:
        """Refuse what is no client's name; ``ConfigError``."""
        if not CLIENT_NAME.pattern.fullmatch(name):
            raise ConfigError(
                f"NAME must be at most 63 {CLIENT_NAME.says}, the first a letter or digit, got {name!r:.80}. "
                "Choose another name."
            )

    def remove(self, name: str) -> RegisteredClient:
        """Take a client out of the registry; its key opens nothing any more.

        Raises:
            ConfigError: There is none of this name.
        """
        with folder_of_one_process(self._file.parent, "server folder"):
            clients = self.clients
            found = next((client for client in clients if client.name == name), None)
            if found is None:
                known = ", ".join(client.name for client in clients) or "none"
                raise ConfigError(f"client {name}: it must be registered ({known}). Check the name.")
            self._write([client for client in clients if client is not found])
        return found

    def _check_movable(self, client: RegisteredClient) -> None:
        """Refuse another index for a client while a run is served, in which it is the one that it is."""
        if is_locked(self._run_lock):
            raise ConfigError(
                f"client {client.name}: it must keep its index {client.index} while a run is served. Wait for the end "
                "of the run, or end it with `fedzo stop`."
            )

    def _taken(self, new: RegisteredClient, client: RegisteredClient, alike: Sequence[str], *, is_move: bool) -> str:
        """What is wrong where another has something of a new client; ``is_move``: whether another index is wanted."""
        more = ""
        if "key" in alike:
            more = " Then restart `fedzo server up` while no run is served: it takes no removed key before."
        elif "name" in alike:
            more = " Another key is registered under this name."
            if is_move:
                more += f" To move {client.name} to index {new.index}, give that key as --key."
        return (
            f"client {new.name}: its {alike[0]} must be its own, but client {client.name} has it (index "
            f"{client.index}). Choose another, or remove that client: "
            f"`{shell('fedzo server remove-client', client.name, '--dir', self._file.parent)}`.{more}"
        )

    def _write(self, clients: Sequence[RegisteredClient]) -> None:
        plain = [encode(client) for client in sorted(clients, key=lambda client: client.index)]
        replace_file(self._file, json.dumps(plain, indent=2) + "\n", durable=True, mode=0o600)
