"""Why the server of a run ended before its run did, as it leaves word of it in the run folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fedzo.records.fields import Length

OUTCOME = "logs/outcome.json"
"""The file; the next start of the run removes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """An error.

    Attributes:
        error: Name of its class.
        text: Its message.
    """

    error: Annotated[str, Length(1, 100)]
    text: Annotated[str, Length(0, 1 << 20)]
