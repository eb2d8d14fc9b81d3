"""What a user can say about tasks, files and partitions."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class TaskKind(StrEnum):
    """How a row becomes a prompt and how an answer is judged."""

    candidates = "candidates"
    """Choose one of the candidates; accuracy."""
    generation = "generation"
    """Write a short answer; token F1 (SQuAD's normalisation)."""
    instruction = "instruction"
    """Answer through the model's chat template; ROUGE-L."""


class Loss(StrEnum):
    """The training loss."""

    candidates = "candidates"
    """Cross-entropy over the length-normalised log-likelihoods of the candidates."""
    lm = "lm"
    """Mean next-token cross-entropy on the right answer's tokens."""


@dataclass(kw_only=True, slots=True)
class TaskConfig:
    """A task as data: templates with ``{column}`` fields, filled from each row."""

    name: str = "custom"
    """The name of the task in reports."""
    kind: TaskKind = TaskKind.candidates
    loss: Loss = Loss.candidates
    template: str = ""
    """The prompt. ``{column}`` is replaced by the value of the row, without outer whitespace."""
    candidates: list[str] = field(default_factory=list)
    """The answers, in the order of the labels. Answers may hold columns (``{choice1}``)."""
    label: str = "label"
    """Column of the right answer: index of a candidate, or a value of ``labels``."""
    labels: list[str] = field(default_factory=list)
    """Values of the label column in the order of ``candidates``. Empty if the column holds indices."""
    answer: str = ""
    """Template of the reference answer (generation, instruction)."""
    prepare: str | None = None
    """A built-in row preparation (``alpaca``, ``boolq``, ``copa``, ``wsc``), for what a template cannot express."""
    max_new_tokens: int = 32
    """Longest generated answer in tokens."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Where the rows are and how many are used. Train, dev and test rows never overlap."""

    path: str | None = None
    """A folder with ``train.*`` and optionally ``dev.*``/``validation.*`` and ``test.*`` (jsonl, json, csv, tsv,
    parquet), or one file; ``None`` is the embedded set of the task (Rotten Tomatoes)."""
    num_train: int = 0
    """Rows kept for training, 0 = all."""
    num_dev: int = 256
    """Rows for choosing the best round, 0 = none; without a dev file drawn from train (a quarter of it at most)."""
    num_test: int = 1024
    """Rows of the final score, 0 = none; without a test file drawn from train (a quarter of it at most)."""
    split_seed: int = 0
    """Seed of the split; apart from the run seed, so that runs share their test rows."""


@dataclass(kw_only=True, slots=True)
class PartitionConfig:
    """How the training rows are split among the clients."""

    min_rows: int = 1
    """Fewest rows a client may have."""
    holdout: float = 0.1
    """Share of each client's rows kept for federated evaluation, never trained on."""


@dataclass(kw_only=True, slots=True)
class IidConfig(PartitionConfig):
    """Rows are split among the clients uniformly."""


@dataclass(kw_only=True, slots=True)
class OwnConfig(PartitionConfig):
    """No partition: every client reads its own file (``data.path``, in which ``{client}`` is the client's index)."""


@dataclass(kw_only=True, slots=True)
class DirichletConfig(PartitionConfig):
    """The rows of each class are split among the clients by shares drawn from Dirichlet(alpha)."""

    alpha: float = 0.5
    """Concentration. A smaller value makes clients less alike."""


@dataclass(kw_only=True, slots=True)
class DirichletEqualConfig(PartitionConfig):
    """Clients have equal sizes. The label mix of each client is drawn from Dirichlet(alpha)."""

    alpha: float = 0.5
    """Concentration; smaller is less IID."""
    num_extreme: int = 0
    """Number of clients (the last indices) with rows of a single label."""


@dataclass(kw_only=True, slots=True)
class ShardsConfig(PartitionConfig):
    """Rows are sorted by label and cut into shards. Each client gets some shards."""

    shards_per_client: int = 2
    """Number of shards of a client."""


@dataclass(kw_only=True, slots=True)
class ExtremeConfig(PartitionConfig):
    """Some clients hold a single label, the others are IID."""

    num_extreme: int = 2
    """How many clients (the last indices) hold rows of one label only."""


@dataclass(kw_only=True, slots=True)
class NaturalConfig(PartitionConfig):
    """One client per value of a column (a site, an author, a domain)."""

    column: str = ""
    """Name of the column; its number of values must be ``fl.num_clients``."""
