"""The records of ``metrics.jsonl`` as types; ``fedzo.report.parse`` makes them of JSON."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ClientSetup:
    """One client's rows."""

    client: int
    num_train: int
    num_heldout: int
    label_counts: dict[str, int]


@dataclass(frozen=True, slots=True)
class Setup:
    """What is known before the first round."""

    num_params: int
    space_size: int
    clients: tuple[ClientSetup, ...]
    setup_down_bytes: int | None


@dataclass(frozen=True, slots=True)
class Signals:
    """One client's local steps of a round, one number a step; None where unknown."""

    grad_ip: tuple[float | None, ...]
    abs_g: tuple[float | None, ...]
    loss: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class ClientRound:
    """What one client measured in one round."""

    client: int
    loss: float | None
    abs_g: float | None
    signals: Signals | None


@dataclass(frozen=True, slots=True)
class Round:
    """One round; ``round`` counts from 0, bytes are sums over the clients, a calibration left the model as it was."""

    round: int
    calibration: bool
    seconds: float
    loss: float | None
    payload_up_bytes: int
    payload_down_bytes: int
    message_up_bytes: int | None
    message_down_bytes: int | None
    dropped_probes: int
    absent: tuple[int, ...]
    refused: dict[int, str]
    clients: tuple[ClientRound, ...]


@dataclass(frozen=True, slots=True)
class ClientVerdict:
    """Whether one client is taken for extreme, what that rests on, and its local steps a round from then on."""

    client: int
    flagged: bool
    steps: int
    statistics: dict[str, float | None]


@dataclass(frozen=True, slots=True)
class StepDecision:
    """A decision on who stops early; ``windows`` are the steps (first, end) of the first round that were compared."""

    round: int
    windows: dict[str, tuple[int, int]]
    clients: tuple[ClientVerdict, ...]
    fallback: bool


@dataclass(frozen=True, slots=True)
class Score:
    """One score of the whole model after ``round`` rounds (0 = before training)."""

    split: str
    round: int
    metric: str
    value: float
    loss: float | None = None
    num_examples: int | None = None
    auc: float | None = None
    best_threshold_accuracy: float | None = None
    per_class: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ClientScore:
    """One client's score on its own held-out rows."""

    client: int
    value: float | None
    loss: float | None
    num_examples: int


@dataclass(frozen=True, slots=True)
class FederatedScore:
    """The clients' scores on their own held-out rows after ``round`` rounds."""

    round: int
    metric: str
    value: float
    loss: float | None
    worst_client: float | None
    clients: tuple[ClientScore, ...]
    per_class: dict[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Summary:
    """The end of a finished run; bytes are sums over rounds and clients.

    ``worst_client`` is the lowest score of a client on its own held-out rows when they were last scored; ``flagged``
    are the clients of the last decision on who stops early, None where there was none.
    """

    rounds: int
    best_round: int | None
    before: Score | None
    after: Score | None
    worst_client: float | None
    flagged: tuple[int, ...] | None
    final_digest: str
    payload_up_bytes: int
    payload_down_bytes: int
    message_up_bytes: int | None
    message_down_bytes: int | None
    seconds: float


Record = Setup | Round | StepDecision | Score | FederatedScore | Summary
