"""The lines of ``metrics.jsonl``: what a run measured, in the order in which it happened.

Whoever writes a line makes one of these records, and whoever reads one gets the same: the store, the sinks, the report
and the table of a sweep.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal, get_args

from fedzo.errors import FedzoError
from fedzo.records.decode import decode
from fedzo.records.fields import (
    MAX_CLIENTS,
    Client,
    Clients,
    Count,
    Figures,
    Hash,
    HashOrEmpty,
    LabelCounts,
    Length,
    Magnitude,
    Name,
    OmitDefault,
    PluginName,
    Reading,
    Real,
    RoundNumber,
    Seconds,
    Series,
    Steps,
    Words,
)
from fedzo.records.scores import PartialScore, Score

Split = Literal["dev", "test"]
WireCount = Annotated[Count | None, OmitDefault()]
"""Bytes; None where nothing went over a network."""
ANSWERS = "answers"
"""The evaluator of records from before a run had several."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSetup:
    """One client's rows; ``rows_digest`` is keyed by a secret of its site, ``stages`` tell what they did."""

    client: Client
    num_train: Count
    num_heldout: Count
    label_counts: LabelCounts
    rows_digest: Annotated[HashOrEmpty, OmitDefault()] = ""
    stages: Annotated[Figures, OmitDefault()] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Estimated needs of a run.

    Attributes:
        memory_bytes: Peak of one step on ``device``, weights included: the sum of ``parts``, where these are told.
        seconds: All forwards of rounds and scores, one process.
        free_bytes: On the device, beside the weights.
    """

    memory_bytes: Count
    seconds: Seconds
    parts: Annotated[dict[Name, Count], Length(0, 10), OmitDefault()] = field(default_factory=dict)
    device: Annotated[Words, OmitDefault()] = ""
    free_bytes: Annotated[Count | None, OmitDefault()] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Forwards:
    """What decides the bits of the server's forwards, beside versions and machine, which ``environment.json`` tells.

    Where clients are processes of their own, each has chosen for itself.

    Attributes:
        dtype: Of the model's weights.
        products: How steps multiply matrices, where they are rounded; empty where not.
        tokens_per_batch: Most tokens of one.
    """

    dtype: Name
    products: Words
    tokens_per_batch: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is known before the first round.

    Attributes:
        setup_down_bytes: What each client needs beside the model.
        estimate: Of a simulation; None where the server has no rows to estimate from.
        cut_rows: By split (``train`` and ``heldout`` of all clients, ``dev``, ``test``): rows that ``task.max_length``
            cuts, and all rows.
        forwards_per_step: What a local step costs, where a backward pass counts as two, and a score that is trained as
            one; None in older records.
        prepare_seconds: What the trainer's preparation took (a mask, the gradient of a sketch's tables) in the process
            that began the run; None in older records.
        forwards: In the process that began the run; None in older records.
    """

    kind: ClassVar[str] = "setup"
    seconds: Seconds
    trainer: Name
    num_params: Count
    space_size: Count
    setup_down_bytes: Count
    estimate: Estimate | None
    clients: Annotated[tuple[ClientSetup, ...], Length(0, MAX_CLIENTS)]
    cut_rows: Annotated[dict[Name, tuple[Count, Count]], Length(0, 4), OmitDefault()] = field(default_factory=dict)
    forwards_per_step: Annotated[Count | None, OmitDefault()] = None
    prepare_seconds: Annotated[Seconds | None, OmitDefault()] = None
    forwards: Annotated[Forwards | None, OmitDefault()] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSignals:
    """One client's local steps of a round, one number a step, and means over all its steps so far."""

    grad_ip: Series
    abs_g: Series
    loss: Series
    cosine: Series
    mean_abs_grad_ip: Magnitude | None
    mean_abs_g: Magnitude | None

    def __post_init__(self) -> None:
        if len({len(self.grad_ip), len(self.abs_g), len(self.loss), len(self.cosine)}) > 1:
            raise ValueError("hold as many numbers in grad_ip, abs_g, loss and cosine")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientRound:
    """What one client measured in one round: means over its ``steps`` local steps, and each of these."""

    client: Client
    loss: Real | None
    abs_g: Magnitude | None
    steps: Steps
    signals: StepSignals

    def __post_init__(self) -> None:
        if len(self.signals.abs_g) != self.steps:
            raise ValueError(f"hold signals of steps = {self.steps} steps, not of {len(self.signals.abs_g)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One round; ``round`` counts from 0, bytes are sums over the clients.

    Payload is the algorithm's numbers, message bytes are contents as Flower counts them, and wire bytes are all HTTP
    within TLS since the round before, also what clients send to ask for work.

    Attributes:
        seconds: Since the run started.
        calibration: Whether the round only measured; its losses are of paths that were given up.
        round_seconds: From the choice of clients to the mean of their answers; the model is moved after that.
        clip_bound: The announced bound of |g|; None = none.
        clipped: Scalars that lie on the bound.
        absent: Clients that sent nothing usable, or rested when all are asked; ``reasons`` says why.
        clients: Empty where the store holds the record, as are ``reasons``: the file alone has them.
    """

    kind: ClassVar[str] = "round"
    seconds: Seconds
    round: RoundNumber
    calibration: bool
    loss: Real | None
    mean_abs_g: Magnitude | None
    payload_up_bytes: Count
    payload_down_bytes: Count
    message_up_bytes: Count
    message_down_bytes: Count
    round_seconds: Seconds
    dropped_probes: Count
    clip_bound: Magnitude | None
    clipped: Count
    absent: Clients
    reasons: Annotated[dict[Client, Words], Length(0, MAX_CLIENTS)]
    clients: Annotated[tuple[ClientRound, ...], Length(0, MAX_CLIENTS)]
    wire_up_bytes: WireCount = None
    wire_down_bytes: WireCount = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientVerdict:
    """Whether one client is taken for extreme, what that rests on, and its local steps a round from then on."""

    client: Client
    flagged: bool
    steps: Steps
    statistics: Annotated[dict[Name, Real | None], Length(0, 100)]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDecision:
    """A decision on who stops early; ``windows`` are the steps [first, end) of the first round that were compared."""

    kind: ClassVar[str] = "step_policy"
    seconds: Seconds
    round: RoundNumber
    windows: Annotated[dict[Name, tuple[Count, Count]], Length(0, 100)] | None
    clients: Annotated[tuple[ClientVerdict, ...], Length(0, MAX_CLIENTS)]
    fallback: bool


@dataclass(frozen=True, slots=True)
class CentralScore(Score):
    """An evaluator's score of the model on the server's rows after ``round`` rounds (0 = before training)."""

    kind: ClassVar[str] = "score"
    first: ClassVar[tuple[str, ...]] = ("seconds", "evaluator", "split", "round")
    seconds: Seconds = field(kw_only=True)
    evaluator: PluginName = field(default=ANSWERS, kw_only=True)
    split: Split = field(kw_only=True)
    round: RoundNumber = field(kw_only=True)


@dataclass(frozen=True, slots=True)
class ClientScore(PartialScore):
    """What one client tells of its score on its own held-out rows."""

    first: ClassVar[tuple[str, ...]] = ("client",)
    client: Client = field(kw_only=True)


@dataclass(frozen=True, slots=True)
class FederatedScore(PartialScore):
    """An evaluator's score of the clients' held-out rows after ``round`` rounds, and of each client's.

    A client scores at most ``evaluation.federated_max_rows`` of its rows, and each scored row counts alike. Each number
    is that of the clients that tell it; ``clients`` has those that tell any.

    Attributes:
        message_up_bytes: Of the messages that brought it; 0 where another evaluator's record counts these.
        message_down_bytes: As ``message_up_bytes``.
        worst_client: The value of the client that did worst; None where no client tells its value.
    """

    kind: ClassVar[str] = "federated_score"
    first: ClassVar[tuple[str, ...]] = ("seconds", "evaluator", "round")
    seconds: Seconds = field(kw_only=True)
    evaluator: PluginName = field(default=ANSWERS, kw_only=True)
    round: RoundNumber = field(kw_only=True)
    message_up_bytes: Count = field(default=0, kw_only=True)
    message_down_bytes: Count = field(default=0, kw_only=True)
    worst_client: Reading | None = field(kw_only=True)
    clients: Annotated[tuple[ClientScore, ...], Length(1, MAX_CLIENTS)] = field(kw_only=True)

    @property
    def worst_first(self) -> tuple[tuple[int, float], ...]:
        """The clients that tell their value, and it, from the worst to the best."""
        told = [(score.client, score.value) for score in self.clients if score.value is not None]
        return tuple(sorted(told, key=lambda entry: entry[1], reverse=self.lower_is_better))

    def num_told(self, number: Literal["value", "loss"]) -> int:
        """How many clients tell a number."""
        return sum(getattr(score, number) is not None for score in self.clients)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorstClient:
    """The worst score of a client on its own held-out rows by the first evaluator, when they were last scored."""

    client: Client
    metric: Name
    value: Reading
    round: RoundNumber
    num_examples: Annotated[Count | None, OmitDefault()] = None
    """Rows that it scored; None in records from before a run told of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FlaggedClient:
    """A client that the last decision flagged, and its local steps a round."""

    client: Client
    steps: Steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Flagged:
    """Whom the last decision on who stops early flagged; ``fallback``: too many, so that none of them does."""

    flagged: Annotated[tuple[FlaggedClient, ...], Length(0, MAX_CLIENTS)]
    fallback: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The end of a finished run; bytes are sums over rounds and clients.

    Attributes:
        before: The first evaluator's score of the test rows before training.
        after: Its score of the test rows at the best round.
        dev: Its score of the dev rows by which that round was chosen; None without one, and in older records.
    """

    kind: ClassVar[str] = "summary"
    seconds: Seconds
    rounds: RoundNumber
    best_round: RoundNumber
    before: CentralScore | None
    after: CentralScore | None
    worst_client: WorstClient | None
    step_policy: Flagged | None
    final_digest: Hash | None
    dropped_probes: Count
    payload_up_bytes: Count
    payload_down_bytes: Count
    message_up_bytes: Count
    message_down_bytes: Count
    wire_up_bytes: WireCount = None
    wire_down_bytes: WireCount = None
    dev: Annotated[CentralScore | None, OmitDefault()] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Extension:
    """A run is made longer than it was begun: the rounds from ``round`` on belong to another total.

    Attributes:
        round: Rounds that were committed by then.
        before: ``fl.rounds`` until then.
        rounds: ``fl.rounds`` from then on.
    """

    kind: ClassVar[str] = "extension"
    seconds: Seconds
    round: RoundNumber
    before: RoundNumber
    rounds: RoundNumber


MetricRecord = Setup | Extension | Round | StepDecision | CentralScore | FederatedScore | Summary
METRIC_KINDS: dict[str, type[MetricRecord]] = {each.kind: each for each in get_args(MetricRecord)}


def decode_metric(value: object, *, where: str, error: type[FedzoError], remedy: str = "") -> MetricRecord:
    """A line of ``metrics.jsonl`` as the record of its kind."""
    kind = value.get("kind") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in METRIC_KINDS:
        raise error(f"{where}: kind must be one of {', '.join(METRIC_KINDS)}, got {kind!r:.80}. {remedy}".rstrip())
    return decode(METRIC_KINDS[kind], value, where=where, error=error, remedy=remedy)
