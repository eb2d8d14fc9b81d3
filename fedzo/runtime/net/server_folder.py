"""The folder of a federation's server: where it listens, its credentials, and which run it serves."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fedzo.errors import ConfigError, FolderInUseError, shell
from fedzo.records.decode import decode_json, to_json
from fedzo.records.fields import Length, Within
from fedzo.records.folder import is_locked, lock_file, make_folder, open_file, raised_as, replace_file
from fedzo.runtime.net.addresses import Address, is_loopback, split_address
from fedzo.runtime.net.credentials import (
    Endpoint,
    check_names,
    keep_private,
    make_authority,
    make_certificate,
    make_secret,
    missing_files,
)
from fedzo.runtime.net.key_registry import KeyRegistry

AUTHORITY = ("ca.crt", "ca.key")
FILES = ("server.json", "clients.json", *AUTHORITY, "server.crt", "server.key", "secret")
SERVING = "serving.json"
"""A ``Serving``, locked as long as the run is served."""
MIN_FREE_BYTES = 1 << 20  # with less the disk of a server's folder counts as full


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

    Attributes:
        registry: Which key is which client.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.registry = KeyRegistry(self.file("clients.json"), run_lock=self.file(SERVING))

    @classmethod
    def make(cls, path: Path, listening: Listening, *, names: Sequence[str], days: int) -> ServerFolder:
        """Write what is missing of a server's folder; what is there stays.

        Args:
            path: The folder; made if it is not there, for this user only.
            listening: Where the server is reached.
            names: Host names and addresses for its certificate; the first is where sites connect to.
            days: How long the certificate is valid.

        Raises:
            ConfigError: A file of the authority is missing that sites trust already.
        """
        check_names(names)
        if names[0].startswith("*."):
            raise ConfigError(
                f"--host: the first must be a name at which sites reach this machine, got {names[0]!r}. "
                "Give that name first, then the wildcard."
            )
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
        folder.registry.make()
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
        _ = self.listening, self.registry.clients

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
        file = self.file("server.json")
        remedy = f"Let this user read it. If it is missing, call `{shell('fedzo server init', self.path)}`."
        with raised_as(ConfigError, f"server folder {self.path}: {file.name} must be a readable file", remedy):
            text = file.read_bytes()
        found = decode_json(Listening, text, where=str(file), error=ConfigError, remedy="Restore it from a copy.")
        for key in ("listen", "control"):
            host, port = split_address(getattr(found, key))
            if not 1 <= port <= 65535:
                raise ConfigError(f"{file}: {key} must have a port of 1 to 65535, got {port}.")
            if key == "control" and (":" in host or not is_loopback(host)):  # the certificate names no IPv6 address
                raise ConfigError(
                    f"{file}: control must be on the loopback interface (127.0.0.1:PORT), since "
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
        opened = open_file(self.path, SERVING, os.O_RDWR | os.O_CREAT, mode=0o600)
        try:
            lock_file(opened, self.path, "server folder")
        except FolderInUseError as error:
            raise ConfigError(
                f"server folder {self.path}: it serves one run at a time, and serves {self.served} now. Wait for it, "
                "or end it with `fedzo stop`."
            ) from error
        try:
            os.truncate(opened, 0)
            os.write(opened, to_json(Serving(run=run_dir, pid=os.getpid())).encode())
            yield
        finally:
            os.close(opened)

    @property
    def is_serving(self) -> bool | None:
        """Whether a run is served; None where the file system knows no locks."""
        return is_locked(self.file(SERVING))

    @property
    def served(self) -> Serving | None:
        """The run that is known to be served; None where there is none."""
        return self.last_served if self.is_serving else None

    @property
    def last_served(self) -> Serving | None:
        """The run that is served, or was the last to be; None where there was none."""
        file = self.file(SERVING)
        if not file.exists() or not (text := file.read_bytes()):
            return None
        return decode_json(Serving, text, where=str(file), error=ConfigError)

    @property
    def disk_problem(self) -> str:
        """That there is no room for what the SuperLink keeps, or that nobody can tell; else an empty string."""
        try:
            full = shutil.disk_usage(self.path).free < MIN_FREE_BYTES
        except OSError as error:  # a network disk may be away for a moment
            return f"The disk of {self.path} does not answer ({error.strerror})."
        return f"The disk of {self.path} is full: the SuperLink cannot keep what it is sent. Make room." if full else ""

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
