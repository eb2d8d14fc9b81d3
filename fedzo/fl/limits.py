"""What a server may ask of a client: what the run's configuration announced and the site allows, nothing beyond it.

A client knows the run's settings, so every number of a request has a range that follows from them. Outside of it the
request is a ``ProtocolError``, before memory or time is spent on it. What the site's own file rules out is a
``SiteError``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from fedzo.errors import ProtocolError
from fedzo.fl.config import SiteLimitsConfig
from fedzo.fl.messages import Refusal, Sync, TrainRequest
from fedzo.fl.site_limits import SiteError, check_work
from fedzo.trainers.artifacts import MAX_BYTES
from fedzo.zo.directions import SHARED
from fedzo.zo.log import LogRecord, RoundRecord, unpack


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The ranges of one run.

    Attributes:
        rounds: Rounds of the run.
        most_steps: Most local steps of a client in one round.
        num_clients: K.
        num_probes: P; 0 where clients send vectors.
        directions: Along which directions the columns of a record lie (``fedzo.zo.seeds``).
        lr: The highest learning rate of a round.
        max_abs_g: The highest bound that a request may announce.
        artifact: SHA-256 of the run's artifact, hexadecimal.
        step_rows: Rows of a local step.
        site: The site's own limits.
        artifact_max_bytes: Of the largest artifact that the site takes.
        takes_values: Whether a server may send the trained values in place of the log, unasked.
        own_client: Gives the index that the site has in the run, by the one that is asked; None where it may have
            several.
        own_client_file: Where the site keeps it.
    """

    rounds: int
    most_steps: int
    num_clients: int
    num_probes: int
    directions: int
    lr: float
    max_abs_g: float
    artifact: str
    step_rows: int = 0
    site: SiteLimitsConfig = field(default_factory=SiteLimitsConfig)
    artifact_max_bytes: int = MAX_BYTES
    takes_values: bool = False
    own_client: Callable[[int], int] | None = None
    own_client_file: str = ""

    def check_client(self, client: int) -> None:
        """Refuse to be a client that the run does not have, or another one than before."""
        _within("client", client, 0, self.num_clients - 1)
        if self.own_client is not None and (own := self.own_client(client)) != client:
            raise SiteError(
                Refusal.client,
                f"the site is client {own} of this run, and client {client} is asked. If the server's list was wrong "
                f"before, delete {self.own_client_file} and restart the site",
            )

    def check_artifact(self, digest: str) -> None:
        """Refuse any artifact but the run's, so that no server fills a site's disk."""
        if digest != self.artifact:
            raise ProtocolError(
                f"artifact: it must be the run's ({self.artifact[:12]}), got {digest[:12] or 'none'}. "
                "Start server and clients with the same configuration."
            )

    def check_artifact_size(self, size: int) -> None:
        """Refuse an artifact that is too large for the site."""
        if size > self.artifact_max_bytes:
            raise SiteError(
                Refusal.artifact, f"artifact_max_bytes is {self.artifact_max_bytes}, and the artifact has {size}"
            )

    def check_state(self, request: Sync, *, asked_values: bool = False) -> None:
        """Refuse a state that the run cannot have, or a way to it that no round of the run can be.

        Args:
            request: Names the state.
            asked_values: Whether the client's replay of the log led elsewhere, so that it needs the values.
        """
        self.check_artifact(request.space_id)
        if request.values and not (self.takes_values or asked_values):
            raise ProtocolError(
                "values must be left out: in this run a client replays the log, and this one did not ask for values. "
                "Does the server run the same fedzo?"
            )
        _within("round", request.round, 0, self.rounds)
        _within("from_round", request.from_round, 0, request.round)
        if len(request.chain) != 64:
            raise ProtocolError("chain must be 64 hexadecimal digits, got none")
        for number, record in enumerate(unpack(request.log), start=request.from_round):
            _within("log: the round of a record", record.round, number, number)
            self._check_record(record)

    def check_steps(self, request: TrainRequest) -> None:
        """Refuse work that the run did not announce."""
        check_work(self.site, steps=request.steps, step_rows=self.step_rows)
        _within("round", request.round, 0, self.rounds - 1)
        _within("steps", request.steps, 1, self.most_steps)
        _within("used", request.used, 0, request.round * self.most_steps)
        _within("lr", request.lr, 0.0, self._lr)
        _within("max_abs_g", request.max_abs_g, 0.0, self.max_abs_g)

    @property
    def _lr(self) -> float:
        return float(np.float32(self.lr))

    def _check_record(self, record: LogRecord) -> None:
        what = f"log, round {record.round}:"
        _within(f"{what} lr", record.lr, 0.0, self._lr)
        if not isinstance(record, RoundRecord):
            return  # its size is compared with the space's
        steps, probes, owners = record.coefficients.shape
        _within(f"{what} the number of steps", steps, 1, self.most_steps)
        _within(f"{what} the number of probes", probes, self.num_probes, self.num_probes)
        _within(f"{what} the number of owners", owners, 1, self.num_clients)
        if record.owners != (SHARED,):
            ascending = all(one < other for one, other in zip(record.owners, record.owners[1:], strict=False))
            if not ascending or record.owners[-1] >= self.num_clients:
                raise ProtocolError(f"{what} owners must be clients of 0 to {self.num_clients - 1}, ascending")
            if record.directions != self.directions:
                raise ProtocolError(f"{what} directions must be {self.directions}, got {record.directions}")


def _within(what: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ProtocolError(f"{what} must be {low:g} to {high:g} in this run, got {value:g}")
