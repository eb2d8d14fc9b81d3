"""What a user can say about the federation."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from fedzo.zo.directions import SHARED
from fedzo.zo.seeds import OWN


class Seeds(StrEnum):
    """Who shares a step's directions."""

    shared = "shared"
    """All clients of a round: one direction a step, tiny downlink."""
    per_client = "per_client"
    """Each client its own: K directions a step, K times the downlink scalars."""
    pool = "pool"
    """As per_client, but each is drawn from ``fl.pool_size`` directions that serve the whole run (FedKSeed)."""


class Transport(StrEnum):
    """What brings a client from the end of its last round to that of the next."""

    scalars = "scalars"
    """The log in between, which it replays."""
    values = "values"
    """The trained values themselves, float32: every client in every round."""


@dataclass(kw_only=True, slots=True)
class FlConfig:
    """The federation's rounds."""

    num_clients: int = 8
    """K: clients of the run, each with an index of its own."""
    rounds: int = 75
    """Synchronisations of the whole run."""
    local_steps: int = 1
    """T: steps a client makes between two synchronisations."""
    batch_size: int = 2
    """Rows a client uses for one step."""
    seeds: Seeds = Seeds.shared
    pool_size: int = 4096
    """Directions that there are for ``fl.seeds=pool``."""
    transport: Transport = Transport.scalars
    label_counts: bool = False
    """Clients say at registration how many training rows of each label they have."""
    hash_every: int = 25
    """Every so many rounds the full SHA-256 of the trained values is compared, a 4-byte check in between."""


def directions_of(fl: FlConfig) -> int:
    """Whose directions the clients step along, as ``fedzo.zo.seeds`` numbers it."""
    return {Seeds.shared: SHARED, Seeds.per_client: OWN, Seeds.pool: fl.pool_size}[fl.seeds]


class Weighting(StrEnum):
    """Weights of the clients in the mean."""

    uniform = "uniform"
    size = "size"
    """By the number of training rows declared at registration, within ``strategy.size_cap``."""


class Aggregation(StrEnum):
    """How the clients' scalars of a probe become one."""

    mean = "mean"
    """Weighted by ``strategy.weighting``."""
    median = "median"
    """Unweighted; fewer than half of the clients that took a step cannot move it beyond what the others sent."""
    trimmed_mean = "trimmed_mean"
    """Unweighted mean without the ``strategy.trim_share`` largest and smallest."""
    majority_sign = "majority_sign"
    """A client sends and steps with the sign of g alone, one bit a probe; the majority wins (FeedSign)."""


@dataclass(kw_only=True, slots=True)
class StrategyConfig:
    """How the server runs a round."""

    weighting: Weighting = Weighting.uniform
    size_cap: float = 10.0
    """A client's rows count at most so many times the median of all clients' rows, whatever it declares; 0 = no cap."""
    aggregation: Aggregation = Aggregation.mean
    trim_share: float = 0.2
    """Share of the round's clients that the trimmed mean cuts off at each end, rounded down to at least one client."""
    clients_per_round: int = 0
    """Clients sampled a round, 0 = all; those that are not connected give their place to others."""
    min_replies: int = 1
    """Fewest good replies for a round to count; with fewer, clients that were not sampled are asked too."""
    deadline_s: float = 600.0
    """Clients that are asked answer within this time; without end with ``runtime=inline``, where they take turns."""
    startup_s: float = 300.0
    """How long the server waits for ``fl.num_clients`` clients to register."""
    max_abs_g: float = 1e6
    """A reply with a larger |g| is refused."""
    clip_factor: float = 0.0
    """Clients clip |g| to this many medians of the |g| of the last rounds; 0 = off."""
    clip_rounds: int = 10
    """Rounds whose scalars the clip's median is taken over."""


class BestBy(StrEnum):
    """What makes a round the best."""

    loss = "loss"
    """The lowest dev loss: steadier than a share of a few hundred rows."""
    value = "value"
    """The highest dev accuracy, F1 or ROUGE-L."""


@dataclass(kw_only=True, slots=True)
class EvaluationConfig:
    """What is scored, how often, and which round is the best."""

    every_rounds: int = 25
    """Central score on the dev rows every so many rounds, 0 = only at the end."""
    best_by: BestBy = BestBy.loss
    """Which dev score chooses the round that is tested, exported and used."""
    central: bool = True
    """Whether the server holds dev and test rows (a real federation's server may hold none)."""
    federated_every_rounds: int = 0
    """Clients score their own held-out rows every so many rounds; 0 = only at the end, -1 = never."""
    federated_max_rows: int = 64
    """Most held-out rows a client scores."""


@dataclass(kw_only=True, slots=True)
class FaultsConfig:
    """Planned faults, to rehearse a federation before it is real. They are part of the run's identity."""

    absent: list[str] = field(default_factory=list)
    """``"<client>@<round>"``: this client fails in this round."""
    shuffle_replies: bool = False
    """Handle the replies of each round in a shuffled order (the result must not change)."""
