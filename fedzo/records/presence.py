"""Who takes part in a run at the moment, as its server tells ``fedzo status``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from fedzo.records.fields import MOST_CLIENTS, Client, Length, Matching, RoundNumber, Words


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientPresence:
    """One client.

    Attributes:
        client: Its index.
        state: ``ready``: it has registered and is asked. ``silent``: it let a deadline pass. ``connected``: it has not
            registered yet. ``preparing``: its stages work on its rows. ``refused``: it cannot take part. ``away``: no
            node of it is connected.
        why: More on that.
        version: Its fedzo; empty where it has not said.
    """

    client: Client
    state: Annotated[str, Matching(re.compile("ready|silent|connected|preparing|refused|away"), "a state")]
    why: Words = ""
    version: Annotated[str, Length(0, 64)] = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Presence:
    """All clients of a run, before a round."""

    round: RoundNumber
    clients: Annotated[tuple[ClientPresence, ...], Length(0, MOST_CLIENTS)]
