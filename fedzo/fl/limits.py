"""What a server may ask of a client: what the run's configuration announced and the site allows, nothing beyond it.

A client knows the run's settings, so every number of a request has a range that follows from them. Outside of it the
request is a ``ProtocolError``, before memory or time is spent on it. What the site's own file rules out is a
``SiteError``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedzo.data.kept_digests import KeptDigests
from fedzo.errors import ProtocolError
from fedzo.fl.config import directions_of, keeps_columns
from fedzo.fl.messages import Refusal, Sync, TrainRequest
from fedzo.fl.site_limits import SiteError, check_work
from fedzo.zo.directions import SHARED
from fedzo.zo.log import LogRecord, ScalarRecord, unpack

if TYPE_CHECKING:
    from fedzo.config.schema import RunConfig, SiteFile


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The ranges of one run.

    Attributes:
        run: What its peers agreed on.
        site: The site's own file.
        takes_values: Whether a server may send the trained values in place of the log, unasked.
        kept: Where the site keeps which client of the run it is; None where it may be several.
    """

    run: RunConfig
    site: SiteFile
    takes_values: bool = False
    kept: KeptDigests | None = None

    @property
    def max_steps(self) -> int:
        """Most local steps of a client in one round."""
        return self.run.step_policy.max_steps(self.run.fl)

    def check_client(self, client: int) -> None:
        """Refuse to be a client that the run does not have, or another one than before."""
        _within("client", client, 0, self.run.fl.num_clients - 1)
        if self.kept is not None and (own := self.kept.claim(client)) != client:
            raise SiteError(
                Refusal.client,
                f"the site is client {own} of this run, and client {client} is asked. If the server's list was wrong "
                f"before, delete {self.kept.claim_file} and restart the site",
            )

    def check_artifact(self, digest: str) -> None:
        """Refuse any artifact but the run's, so that no server fills a site's disk."""
        if digest != self.run.artifact:
            raise ProtocolError(
                f"artifact: it must be the run's ({self.run.artifact[:12]}), got {digest[:12] or 'none'}. "
                "Start server and clients with the same configuration."
            )

    def check_artifact_size(self, size: int) -> None:
        """Refuse an artifact that is too large for the site."""
        if size > (most := self.site.artifact_max_bytes):
            raise SiteError(Refusal.artifact, f"artifact_max_bytes is {most}, and the artifact has {size}")

    def check_state(self, request: Sync, *, asked_values: bool = False) -> list[LogRecord]:
        """Refuse a state that the run cannot have, or a way to it that no round of the run can be.

        Args:
            request: Names the state.
            asked_values: Whether the client's replay of the log led elsewhere, so that it needs the values.

        Returns:
            The records of its log, read once.
        """
        self.check_artifact(request.space_id)
        if request.values and not (self.takes_values or asked_values):
            raise ProtocolError(
                "values must be left out: in this run a client replays the log, and this one did not ask for values. "
                "Does the server run the same fedzo?"
            )
        _within("round", request.round, 0, self.run.fl.rounds)
        _within("from_round", request.from_round, 0, request.round)
        if len(request.chain) != 64:
            raise ProtocolError("chain must be 64 hexadecimal digits, got none")
        records: list[LogRecord] = []
        for number, record in enumerate(unpack(request.log), start=request.from_round):
            _within("log: the round of a record", record.round, number, number)
            self._check_record(record)
            records.append(record)
        return records

    def check_steps(self, request: TrainRequest) -> None:
        """Refuse work that the run did not announce."""
        check_work(self.site.limits, steps=request.steps, step_rows=self.run.fl.batch_size)
        _within("round", request.round, 0, self.run.fl.rounds - 1)
        _within("steps", request.steps, 1, self.max_steps)
        _within("used", request.used, 0, request.round * self.max_steps)
        _within("lr", request.lr, 0.0, self._lr)
        _within("max_abs_g", request.max_abs_g, 0.0, self.run.strategy.scalar_bound)

    @property
    def _lr(self) -> float:
        return float(np.float32(self.run.server_optimizer.base_lr))

    def _check_record(self, record: LogRecord) -> None:
        what, run = f"log, round {record.round}:", self.run
        _within(f"{what} lr", record.lr, 0.0, self._lr)
        if isinstance(record, ScalarRecord) is run.estimator.sends_vectors:
            raise ProtocolError(f"{what} it must hold {'a vector' if run.estimator.sends_vectors else 'scalars'}")
        if not isinstance(record, ScalarRecord):
            return  # its size is compared with the space's
        steps, probes, owners = record.coefficients.shape
        planned = run.estimator.probes_per_step
        _within(f"{what} the number of steps", steps, 1, self.max_steps)
        _within(f"{what} the number of probes", probes, planned, planned)
        _within(f"{what} the number of owners", owners, 1, run.fl.num_clients)
        has_columns = keeps_columns(run)
        if (record.owners == (SHARED,)) is has_columns:
            raise ProtocolError(f"{what} it must hold scalars {'of each client' if has_columns else 'of all together'}")
        if has_columns:
            ascending = all(one < other for one, other in zip(record.owners, record.owners[1:], strict=False))
            if not ascending or record.owners[-1] >= run.fl.num_clients:
                raise ProtocolError(f"{what} owners must be clients of 0 to {run.fl.num_clients - 1}, ascending")
            if record.directions != (directions := directions_of(run.fl)):
                raise ProtocolError(f"{what} directions must be {directions}, got {record.directions}")


def _within(what: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ProtocolError(f"{what} must be {low:g} to {high:g} in this run, got {value:g}")
