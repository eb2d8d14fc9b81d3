"""What the server of a run needs: the peer's model, and dev and test rows if it has any; it reads no training row.

In a simulation the server's machine holds all rows. What only a simulation can know (who has which labels, training
prompts, a run's cost) is asked of ``simulation``; a real federation has none. ``trial_rows`` may be a client's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from fedzo.data.encode import Example
from fedzo.data.rows import SimulatedRows, client_rows
from fedzo.fl.log_store import RunStore
from fedzo.fl.server.step_policy import STEP_POLICIES, StepPolicy
from fedzo.models.config import DType
from fedzo.run.peer import Peer, TrialRows
from fedzo.trainers import Prepared

if TYPE_CHECKING:
    from fedzo.config.schema import LaunchConfig
    from fedzo.run.process import Process
    from fedzo.runtime.config import RuntimeTraits


@dataclass(frozen=True)
class Launched:
    """What a process knows of a run because it launched it.

    Attributes:
        config: The command line.
        prepared: What the trainer prepared.
        store: The run's logs, which the launcher opened and closes; None where the run is only looked at.
        prepare_seconds: What the trainer's preparation took.
    """

    config: LaunchConfig
    prepared: Prepared
    store: RunStore | None
    prepare_seconds: float

    @property
    def runtime(self) -> RuntimeTraits:
        """What must be known of where the clients run."""
        return self.config.runtime.traits


@dataclass
class ServerContext:
    """The server's part of a run, in the process that plays it."""

    process: Process
    _encoded: dict[str, list[Example]] = field(default_factory=dict)

    @property
    def peer(self) -> Peer:
        """The model and the space."""
        return self.process.peer

    @property
    def simulation(self) -> SimulatedRows | None:
        """All rows, where this is a simulation."""
        return self.process.source if isinstance(self.process.source, SimulatedRows) else None

    @property
    def trial_rows(self) -> TrialRows | None:
        """Gives some rows, where this process has any: without them ``model.dtype=auto`` stays float32.

        They are a simulation's, or the first client's where server and clients share one model.
        """
        source, launched, size = self.process.source, self.process.launched, self.peer.config.fl.batch_size
        if isinstance(source, SimulatedRows):
            return lambda: source.splits.train[:size]
        shares = launched is not None and launched.runtime.takes_turns
        is_open = self.peer.site.model.dtype is DType.auto
        return (lambda: source.rows_for(0)[:size]) if shares and is_open else None

    @cached_property
    def step_policy(self) -> StepPolicy:
        """The run's step policy plugin."""
        config = self.peer.config
        return STEP_POLICIES.build(
            config.step_policy,
            num_clients=config.fl.num_clients,
            local_steps=config.fl.local_steps,
            run_seed=config.seed,
        )

    def check_rows(self, *, begun: bool) -> None:
        """Remember dev and test rows when a run begins; when it goes on they must be the same.

        Raises:
            RowsChangedError: They are others; says which.
        """
        if self.simulation is None:
            return
        for split in ("dev", "test"):
            rows = getattr(self.simulation.splits, split)
            self.process.kept.register(rows, whose=split, begun=begun)

    def examples(self, split: str) -> list[Example]:
        """The server's own ``dev`` or ``test`` rows as token ids; read once."""
        if split not in self._encoded:
            rows = getattr(self.simulation.splits, split) if self.simulation else []
            self._encoded[split] = self.peer.encode(rows)
        return self._encoded[split]

    @cached_property
    def label_counts(self) -> Mapping[int, Mapping[str, int]] | None:
        """Training rows by label of each client, as a simulation knows them; None where only clients know."""
        if self.simulation is None:
            return None
        config = self.peer.config
        return {
            client: client_rows(self.simulation, client, share=config.partition.holdout, seed=config.seed).label_counts(
                config.task
            )
            for client in range(config.fl.num_clients)
        }
