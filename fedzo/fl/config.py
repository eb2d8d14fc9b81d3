"""What a user can say about the federation."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np

from fedzo.zo.directions import SHARED
from fedzo.zo.keys import OWN

if TYPE_CHECKING:
    from fedzo.config.schema import RunSettings


class Directions(StrEnum):
    """Whose directions a step has."""

    shared = "shared"
    """All clients of a round use the same direction for a step. The downlink is smallest."""
    per_client = "per_client"
    """Each client has directions of its own: K directions a step, and K times as many scalars down."""
    pool = "pool"
    """As per_client, but each direction is drawn from the ``fl.pool_size`` directions of the run (FedKSeed)."""


class Transport(StrEnum):
    """What brings a client from the end of its last round to that of the next."""

    scalars = "scalars"
    """A client gets the log records that it lacks and replays them."""
    values = "values"
    """Every client gets the trained values in every round, as float32."""


@dataclass(kw_only=True, slots=True)
class FlConfig:
    """Clients, rounds, steps."""

    num_clients: int = 8
    """K: number of clients of the run."""
    rounds: int = 75
    """Number of synchronisations of the run."""
    local_steps: int = 1
    """T: local steps of a client between two synchronisations."""
    batch_size: int = 2
    """Rows a client uses for one step."""
    directions: Directions = Directions.shared
    pool_size: int = 4096
    """Number of directions for ``fl.directions=pool``."""
    transport: Transport = Transport.scalars
    label_counts: bool = False
    """At registration, clients declare their number of training rows of each label."""
    hash_every: int = 25
    """Number of rounds after which the SHA-256 of the trained values is compared. In between, a 4-byte checksum is
    compared."""


def directions_of(fl: FlConfig) -> int:
    """Whose directions the clients step along, as ``fedzo.zo.keys`` numbers it."""
    return {Directions.shared: SHARED, Directions.per_client: OWN, Directions.pool: fl.pool_size}[fl.directions]


def keeps_columns(run: RunSettings) -> bool:
    """Whether the log keeps each client's scalars: along directions of its own, or as the optimizer walks its path."""
    return run.fl.directions != Directions.shared or run.server_optimizer.traits.walks_clients


class Weighting(StrEnum):
    """Weights of the clients in the mean."""

    uniform = "uniform"
    size = "size"
    """By the number of training rows declared at registration, up to ``strategy.size_cap``."""


class Aggregation(StrEnum):
    """How the clients' scalars of a probe become one."""

    mean = "mean"
    """Mean weighted by ``strategy.weighting``."""
    median = "median"
    """Unweighted median. The result stays within the honest scalars while fewer than half of the clients that took a
    step are hostile."""
    trimmed_mean = "trimmed_mean"
    """Unweighted mean without the ``strategy.trim_share`` largest and smallest."""
    majority_sign = "majority_sign"
    """A client sends and steps with the sign of g, one bit a probe. The majority decides (FeedSign)."""


@dataclass(kw_only=True, slots=True)
class StrategyConfig:
    """How the server runs a round."""

    weighting: Weighting = Weighting.uniform
    size_cap: float = 10.0
    """Upper limit of a client's rows in the weights, as a multiple of the median over clients. 0 = no limit."""
    aggregation: Aggregation = Aggregation.mean
    trim_share: float = 0.2
    """Share of the round's clients that the trimmed mean cuts off at each end, rounded down to at least one client."""
    clients_per_round: int = 0
    """Clients sampled a round. 0 = all. Other clients replace sampled clients that are not connected."""
    min_replies: int = 1
    """Minimum of usable replies in a round. With fewer, the server also asks clients that were not sampled."""
    deadline_s: float = 600.0
    """Seconds in which clients must reply. If too few do, others are asked, with the same limit. There is no limit
    with ``runtime=inline``, where clients run one after another."""
    startup_s: float = 300.0
    """Seconds for ``fl.num_clients`` clients to register. A silent site may still work on an earlier request: if the
    run needs it, the server waits up to ``deadline_s``, if that is longer. If fewer than ``min_replies`` clients can
    be asked, a round waits ``startup_s`` in all for others to return."""
    max_abs_g: float = 1e6
    """Bound on |g|: clients clip to it, a reply beyond it is refused. So is a vector if its norm / (learning rate x
    steps) is larger."""
    clip_factor: float = 100.0
    """Clients clip |g| to this multiple of the median |g| of the last rounds. A reply beyond it is refused. Replies
    whose |g|, loss or vector is 100 times the median of the round are refused, too. This protects rounds of three or
    more clients, of which fewer than half are hostile. 0 = off."""
    clip_rounds: int = 10
    """Number of rounds over whose scalars the median for clipping is taken."""

    @property
    def scalar_bound(self) -> float:
        """``max_abs_g`` of scalars, which travel as float32: clients clip to it, and the server compares with it."""
        return float(np.float32(min(self.max_abs_g, float(np.finfo(np.float32).max))))


class BestBy(StrEnum):
    """What makes a round the best."""

    loss = "loss"
    """The lowest dev loss, which has less noise than an accuracy over a few hundred rows."""
    value = "value"
    """The best dev value: the highest accuracy, F1 or ROUGE-L."""


@dataclass(kw_only=True, slots=True)
class EvaluationConfig:
    """What is scored, how often, and which round is the best."""

    every_rounds: int = 25
    """Number of rounds between two scores on the dev rows. 0 = only at the end."""
    best_by: BestBy = BestBy.loss
    """The dev score that chooses the best round, whose model is tested and exported. The score is that of the first
    evaluator in ``evaluators``. With ``task.loss=score``, the value chooses."""
    central: bool = True
    """Whether the server scores the dev and test rows. Write false for ``partition=own``, where the server has
    none."""
    test: bool = True
    """Whether test rows are scored. Write false to choose settings: the split of the rows stays the same."""
    federated_every_rounds: int = 0
    """Number of rounds between two scores of clients on their held-out rows. 0 = only at the end, -1 = never."""
    federated_max_rows: int = 64
    """Maximum of held-out rows that a client scores."""


@dataclass(kw_only=True, slots=True)
class SiteLimitsConfig:
    """What a site takes part in, how much it does at once, and which numbers leave it. The limits stay at the site."""

    tasks: list[str] = field(default_factory=list)
    """Values of ``task.name`` that the site takes part in. Empty = any."""
    trainers: list[str] = field(default_factory=list)
    """Trainers that the site takes part in, by name. Empty = any."""
    estimators: list[str] = field(default_factory=list)
    """Estimators that the site takes part in, by name. Empty = any."""
    stages: list[str] = field(default_factory=list)
    """Preprocess stages that may change the site's training rows, by name. Empty = any."""
    base_digest: str = ""
    """SHA-256 of the base weights that the site accepts: ``base.weights_digest`` of the run. The site's model folder
    must have it, too. Empty = any."""
    max_steps: int = 0
    """Maximum of local steps in a round. 0 = no limit."""
    max_rows: int = 0
    """Maximum of training rows that a request uses: local steps times rows of a step. 0 = no limit."""
    max_probes: int = 0
    """Maximum of probes in a local step. As many as there are trained values tell the whole gradient of the step's
    rows. 0 = no limit."""
    step_limit_s: float = 3600.0
    """Seconds that the site may work on one request, loading the model included. Then the site gives the request
    up and restarts its executor. Each round that the site replays has this time anew. ``fedzo client up`` reads it
    when it starts."""
    answers: list[str] = field(default_factory=list)
    """Numbers that may leave the site: ``loss`` (also of local steps), an evaluator's metric or other number by its
    name, ``per_class``, ``label_counts``, ``stages`` (what preprocess stages report). Empty = all, ``[none]`` = none
    of them. ``per_class`` leaves only with the metric, which can be computed from it. So do the losses of local steps
    with ``task.loss=score``."""
    min_rows: int = 0
    """Minimum of rows behind a score or a count that leaves the site. Scalars of training steps are not limited."""
    vectors: bool = False
    """Whether update vectors may leave the site, which ``estimator=backprop`` needs. The vector of one local step with
    SGD is, up to a factor, the gradient of its rows, from which their text can be rebuilt."""
    several_clients: bool = False
    """Whether the site may be several clients of one run on the same rows, as in a simulation. Otherwise the site
    refuses every client index but the first that it was given."""


@dataclass(kw_only=True, slots=True)
class FaultsConfig:
    """Planned faults, for tests of a federation. Faults are part of the hash of the configuration."""

    absent: list[str] = field(default_factory=list)
    """``"<client>@<round>"``: this client fails in this round."""
    shuffle_replies: bool = False
    """Handle the replies of each round in a shuffled order (the result must not change)."""
