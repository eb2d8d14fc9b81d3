"""The folder of a client site: which server it takes part with, its key, and what the site says of itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fedzo.errors import ConfigError, shell
from fedzo.records.decode import decode_json, to_json
from fedzo.records.fields import Length
from fedzo.records.folder import make_folder, raised_as, replace_file
from fedzo.runtime.net.addresses import Address, split_address
from fedzo.runtime.net.credentials import (
    Endpoint,
    keep_private,
    make_key,
    make_secret,
    missing_files,
    plain_pem,
    public_key_of,
    read_certificate,
    write_private,
)

SITE = "site.yaml"
KEY, PUBLIC_KEY, AUTHORITY, SERVER, SECRET = "key", "key.pub", "ca.crt", "server.json", "secret"
ARTIFACTS = "artifacts"
"""Where the site keeps the artifact of its run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """The content of ``server.json``: where the site connects to."""

    address: Address


@dataclass(frozen=True, slots=True, kw_only=True)
class Invitation:
    """What a server hands a site, as one file: all that the site needs to connect.

    Attributes:
        address: Where the site connects to.
        authority: Certificate (PEM) that signs the server's own.
        key: Private key, where the server made it; empty where the site has its own.
    """

    address: Address
    authority: Annotated[str, Length(1, 1 << 16)]
    key: Annotated[str, Length(0, 1 << 14)] = ""


def read_invitation(file: Path) -> Invitation:
    """An invitation's file.

    Raises:
        ConfigError: It is none.
    """
    where, remedy = f"invitation {file}", "Give the file that `fedzo server add-client` wrote."
    with raised_as(ConfigError, f"{where}: it must be a readable file", remedy):
        text = file.read_bytes()
    return decode_json(Invitation, text, where=where, error=ConfigError, remedy=remedy)


def write_invitation(file: Path, invitation: Invitation) -> None:
    """Write an invitation, for this user only: it may hold a private key."""
    write_private(file, (to_json(invitation, indent=2) + "\n").encode())


class ClientFolder:
    """A site's folder.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def make(cls, path: Path, *, address: str, site: str, invitation: Invitation | None = None) -> ClientFolder:
        """Write what is missing of a site's folder; what is there stays.

        Args:
            path: The folder; made if it is not there, for this user only.
            address: The server, ``host:port``.
            site: Text of the site file, where there is none yet.
            invitation: What the server handed over, if anything.

        Raises:
            ConfigError: The folder is another server's, or holds another key than the invitation.
        """
        split_address(address)
        if not path.exists():
            path.mkdir(parents=True, mode=0o700)
        keep_private(make_folder(path / "logs"))  # the folder may have been there, open to others
        folder = cls(path)
        if folder.file(SERVER).exists() and folder.address != address:
            raise ConfigError(
                f"client folder {path}: it must be of one server, but it is of {folder.address}, and you gave "
                f"{address}. Choose another folder, or edit {folder.file(SERVER)}."
            )
        replace_file(folder.file(SERVER), to_json(Server(address=address), indent=2) + "\n")
        if invitation is not None:
            folder._take(invitation)
        if not folder.file(KEY).exists():
            make_key(folder.file(KEY))
        replace_file(folder.file(PUBLIC_KEY), folder.public_key + "\n")
        if not folder.file(SECRET).exists():
            make_secret(folder.file(SECRET))
        if not folder.file(SITE).exists():
            replace_file(folder.file(SITE), site)
        return folder

    def file(self, name: str) -> Path:
        """Where a file of the folder lies."""
        return self.path / name

    def check(self) -> None:
        """Refuse a folder from which a site cannot be started.

        Raises:
            ConfigError: It is no site's folder, cannot be read, or the server's certificate is missing.
        """
        if missing := missing_files(self.path, (SERVER, KEY, SECRET, SITE), "client folder"):
            raise ConfigError(
                f"client folder {self.path}: it must hold what `fedzo client init` writes, but has no "
                f"{', '.join(missing)}. Call `{shell('fedzo client init', self.path)} --server HOST:PORT`."
            )
        if not self.file(AUTHORITY).is_file():
            raise ConfigError(
                f"client folder {self.path}: {AUTHORITY} must be the server's certificate authority, but is missing. "
                "Copy ca.crt of the server's folder here: without it anyone can pose as the server."
            )
        read_certificate(self.file(AUTHORITY))
        public_key_of(self.file(KEY))

    @property
    def address(self) -> str:
        """The server, ``host:port``."""
        text = self.file(SERVER).read_bytes()
        return decode_json(Server, text, where=str(self.file(SERVER)), error=ConfigError).address

    @property
    def endpoint(self) -> Endpoint:
        """The server's SuperLink for this site's SuperNode."""
        return Endpoint(self.address, self.file(AUTHORITY))

    @property
    def public_key(self) -> str:
        """What the server registers, one line."""
        return public_key_of(self.file(KEY))

    def _take(self, invitation: Invitation) -> None:
        kept = self.file(AUTHORITY)
        authority = plain_pem(invitation.authority.encode(), f"{AUTHORITY} of the invitation")
        if kept.exists() and plain_pem(kept.read_bytes(), kept) != authority:
            raise ConfigError(f"client folder {self.path}: its {AUTHORITY} is another server's. Choose another folder.")
        replace_file(kept, authority)
        if not invitation.key:
            return
        if self.file(KEY).exists() and self.file(KEY).read_text() != invitation.key:
            raise ConfigError(
                f"client folder {self.path}: it has a key of its own already. Have that one registered "
                f"({PUBLIC_KEY}), or choose another folder."
            )
        write_private(self.file(KEY), invitation.key.encode())
