"""What a site remembers of its rows and of whose they are, so that a run goes on with those that it began with.

A row's digest is keyed by a secret that never leaves the site: a server can compare what a client registers with what
it registered before, but cannot guess the rows, however few or short they are.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

from fedzo.data.files import Row
from fedzo.errors import ConfigError
from fedzo.records.folder import make_folder, open_file, replace_file, sync_folder

KEPT_ROWS = "rows"
"""Folder of the digests, beside a site's configuration or in a run folder."""
_SECRET = "secret"
_MAX_NAMED = 20


class RowsChangedError(ConfigError):
    """Rows are not those that a run began with."""


@dataclass(slots=True)
class KeptDigests:
    """The digests of one site for a run.

    Attributes:
        folder: Where they are kept; made when rows are first registered. Its ``secret`` is this user's alone.
        run: Names the run.
    """

    folder: Path
    run: str
    _claimed: int | None = field(default=None, init=False, compare=False)

    def register(self, rows: Sequence[Row], *, whose: str, begun: bool, stages: Sequence[str] = ()) -> str:
        """Remember rows when a run begins, and prove them when it goes on.

        Args:
            rows: As they were read, or with ``stages`` as these made them.
            whose: Names them: a client and its part.
            begun: Whether the run has begun, so that the rows must be those that are remembered.
            stages: What made the rows.

        Returns:
            Digest of all rows in their order, 64 hexadecimal digits, keyed by the site's secret.

        Raises:
            RowsChangedError: The run began with other rows; says which.
            ConfigError: The folder cannot be used.
        """
        try:
            secret = self._secret()
            digests = [_digest(row, secret) for row in rows]
            name = f"{whose} prepared" if stages else whose
            file = self.folder / f"{name.replace(' ', '-')}-{self.run}.json"
            if not begun:
                replace_file(file, json.dumps(digests), durable=True)
            elif file.exists():
                self._compare(json.loads(file.read_bytes()), digests, whose, stages)
        except (OSError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"{self.folder}: digests of the rows must be kept there, but: {error}. Make the folder writable."
            ) from error
        return blake2b("".join(digests).encode(), key=secret, digest_size=32).hexdigest()

    @property
    def claim_file(self) -> Path:
        """Where it is kept which client of the run the site is."""
        return self.folder / f"client-of-{self.run}"

    def claim(self, client: int) -> int:
        """Remember which client of the run the site is.

        Args:
            client: Index that the server gives it now.

        Returns:
            The first index that it was given in the run, by whichever of its processes.

        Raises:
            ConfigError: The folder cannot be used.
        """
        file = self.claim_file
        try:
            if self._claimed is None:
                if not file.exists():
                    self._make(file, str(client).encode())
                self._claimed = int(file.read_bytes())
            return self._claimed
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{file}: the site's index in the run must be kept there, but: {error}. Make the folder writable, and "
                "delete the file if it is damaged."
            ) from error

    def _compare(self, before: list[str], now: list[str], whose: str, stages: Sequence[str]) -> None:
        if before == now:
            return
        changed = [number for number, pair in enumerate(zip(before, now, strict=False)) if pair[0] != pair[1]]
        named = ", ".join(map(str, changed[:_MAX_NAMED])) + (", ..." if len(changed) > _MAX_NAMED else "")
        which = f"; others now (from 0): {named}" if changed else ""
        if stages:
            raise RowsChangedError(
                f"rows of {whose} after preprocess={','.join(stages)}: they must be the {len(before)} rows that the "
                f"run began with, got {len(now)}{which}. A stage gave other text. Put back what it kept at that time "
                "(rewriter.store), or start a new run."
            )
        raise RowsChangedError(
            f"rows of {whose}: they must be the {len(before)} rows that the run began with, got {len(now)}{which}. "
            "Put the files of that time back, or start a new run."
        )

    def _secret(self) -> bytes:
        """The site's secret; whoever asks first makes it."""
        file = self.folder / _SECRET
        if not file.exists():
            self._make(file, secrets.token_bytes(32))
        secret = file.read_bytes()
        if len(secret) != 32:
            raise ConfigError(f"{file}: it must hold 32 bytes, got {len(secret)}. Restore the file from a copy.")
        return secret

    def _make(self, file: Path, data: bytes) -> None:
        """Write a file of this user's alone, once: of processes that do it together, the first one's stays."""
        if not self.folder.exists():
            make_folder(self.folder)
        own = file.with_name(f"{file.name}.{os.getpid()}.part")
        opened = open_file(self.folder, own.name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode=0o600)
        with os.fdopen(opened, "wb") as written:
            written.write(data)
            written.flush()
            os.fsync(written.fileno())  # as what depends on it is
        try:
            os.link(own, file)
        except FileExistsError:
            return
        except OSError:  # its file system knows no links: of processes that do it at one instant, the last one's stays
            if not file.exists():
                own.replace(file)
        finally:
            own.unlink(missing_ok=True)
        sync_folder(self.folder)


def _digest(row: Row, secret: bytes) -> str:
    plain = json.dumps(row, sort_keys=True, separators=(",", ":"), default=str)
    return blake2b(plain.encode(), key=secret, digest_size=16).hexdigest()
