"""What the server of a run tells ``fedzo status``: who takes part at the moment, and why it ended too early."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fedzo.records.decode import to_json
from fedzo.records.fields import MAX_CLIENTS, Client, Length, Matching, OmitDefault, RoundNumber, Seconds, Words
from fedzo.records.folder import PRESENCE, replace_file

PRESENCE_S = 2.0
OUTCOME = "logs/outcome.json"
"""The file of an ``Outcome``; the next start of the run removes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientPresence:
    """One client.

    Attributes:
        client: Its index.
        state: ``ready``: it has registered and is asked. ``silent``: it let a deadline pass. ``connected``: it has not
            registered yet. ``preparing``: its stages work on its rows. ``refused``: it cannot take part. ``away``: no
            node of it is connected.
        why: More on that; of one that is ready, since when it has been asked, or how long its last answer took.
        version: Its fedzo; empty where it has not said.
        last_round: The last round that it took part in; None where there is none.
    """

    client: Client
    state: Annotated[str, Matching(re.compile("ready|silent|connected|preparing|refused|away"), "a state")]
    why: Words = ""
    version: Annotated[str, Length(0, 64)] = ""
    last_round: Annotated[RoundNumber | None, OmitDefault()] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Presence:
    """All clients of a run.

    Attributes:
        round: The one that is under way, or comes next.
        clients: In the order of their indices.
        round_seconds: What the last round took; None before the first.
    """

    round: RoundNumber
    clients: Annotated[tuple[ClientPresence, ...], Length(0, MAX_CLIENTS)]
    round_seconds: Annotated[Seconds | None, OmitDefault()] = None


class PresenceFile:
    """The file of a run, written every few seconds at most, and where a round has ended.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / PRESENCE
        self._next = 0.0

    def write(self, presence: Callable[[], Presence], *, at_once: bool = False) -> None:
        """Write who is here, if it was not written just before, or at once."""
        now = time.monotonic()
        if now < self._next and not at_once:
            return
        self._next = now + PRESENCE_S
        with suppress(OSError):  # a full disk ends the run where the log cannot be written, and not here
            replace_file(self._file, to_json(presence()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """An error that ended the server before its run.

    Attributes:
        error: Name of its class.
        text: Its message.
    """

    error: Annotated[str, Length(1, 100)]
    text: Annotated[str, Length(0, 1 << 20)]
