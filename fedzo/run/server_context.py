"""What the server of a run needs: the peer's model, and dev and test rows if it has any; it reads no training row.

In a simulation the server's machine holds all rows. What only a simulation can know (who has which labels, training
prompts, a run's cost) is asked of ``simulation``; a real federation has none. ``trial_rows`` come from elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from fedzo.data.encode import Example
from fedzo.data.kept_digests import KeptDigests
from fedzo.data.rows import SimulatedRows, client_rows
from fedzo.fl.log_store import RunStore
from fedzo.fl.server.step_policy import STEP_POLICIES, StepPolicy
from fedzo.report import ReportConfig
from fedzo.report.trackers import TrackerConfig
from fedzo.run.peer import Peer, TrialRows
from fedzo.trainers import Prepared


@dataclass(frozen=True)
class Launched:
    """What a process knows of a run because it launched it.

    Attributes:
        prepared: What the trainer prepared.
        report: How the run is told of.
        trackers: Where else the run is told of.
        takes_turns: Whether the clients work one after another, so that no deadline applies.
        has_sites: Whether the clients are sites of their own, which outlive a start of the run's server.
        store: The run's logs, which the launcher opened and closes; None where the run is only looked at.
        prepare_seconds: What the trainer's preparation took.
    """

    prepared: Prepared
    report: ReportConfig
    trackers: dict[str, TrackerConfig]
    takes_turns: bool
    has_sites: bool
    store: RunStore | None
    prepare_seconds: float


@dataclass
class ServerContext:
    """The server's part of a run.

    Attributes:
        peer: The model and the space.
        simulation: All rows, where this is a simulation.
        trial_rows: Gives some rows, where this process has any: without them ``model.dtype=auto`` stays float32.
        kept: What this machine remembers of its rows.
    """

    peer: Peer
    simulation: SimulatedRows | None = None
    trial_rows: TrialRows | None = None
    kept: KeptDigests | None = None
    _encoded: dict[str, list[Example]] = field(default_factory=dict)

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
        if self.simulation is None or self.kept is None:
            return
        for split in ("dev", "test"):
            self.kept.register(getattr(self.simulation.splits, split), whose=split, run=self.peer.run_id, begun=begun)

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
