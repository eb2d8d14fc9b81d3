"""What a user can say about tasks, files and partitions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from fedzo.errors import Problem, at_least, positive, problem
from fedzo.registry import PluginConfig

if TYPE_CHECKING:
    from fedzo.config.schema import RunConfig


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
    """What reports call it."""
    kind: TaskKind = TaskKind.candidates
    loss: Loss = Loss.candidates
    template: str = ""
    """The prompt; ``{column}`` is replaced by the row's value, stripped of outer white space."""
    candidates: list[str] = field(default_factory=list)
    """The answers, in the order of the labels; templates too (``{choice1}``)."""
    label: str = "label"
    """Column of the right answer: index of a candidate, or a value of ``labels``."""
    labels: list[str] = field(default_factory=list)
    """Values of the label column in the order of ``candidates``; empty when the column holds indices."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionTraits:
    """What the rules on other parts of a run must know of a partition.

    Attributes:
        by_label: Whether rows are dealt by their labels, which a task of written answers does not have.
        own_rows: Whether clients read rows of their own, so that the server has none.
    """

    by_label: bool = False
    own_rows: bool = False


@dataclass(kw_only=True, slots=True)
class PartitionConfig(PluginConfig):
    """How the training rows are dealt to clients."""

    min_rows: int = 1
    """Fewest rows a client may have."""
    holdout: float = 0.1
    """Share of each client's rows kept for federated evaluation, never trained on."""

    @property
    def traits(self) -> PartitionTraits:
        """What other parts of a run must know of this partition."""
        return PartitionTraits()

    def problems(self, run: RunConfig) -> Iterator[Problem]:
        yield from at_least("partition.min_rows", self.min_rows, 1, "Every client needs a row.")
        if not 0 <= self.holdout < 1:
            remedy = "It is the share of rows kept from training; 0 keeps none."
            yield problem("partition.holdout", "be >= 0 and < 1", self.holdout, remedy)


@dataclass(kw_only=True, slots=True)
class ByLabelConfig(PartitionConfig):
    """A partition that goes by the rows' labels."""

    @property
    def traits(self) -> PartitionTraits:
        return PartitionTraits(by_label=True)


@dataclass(kw_only=True, slots=True)
class IidConfig(PartitionConfig):
    """Rows dealt uniformly."""


@dataclass(kw_only=True, slots=True)
class OwnConfig(PartitionConfig):
    """No partition: every client reads its own file (``data.path``, in which ``{client}`` is the client's index)."""

    @property
    def traits(self) -> PartitionTraits:
        return PartitionTraits(own_rows=True)

    def problems(self, run: RunConfig) -> Iterator[Problem]:
        if run.data.path is None:
            remedy = "Write data.path=<file or folder>, in which {client} stands for the client's index."
            yield problem("data.path", "be given for partition=own", None, remedy)


@dataclass(kw_only=True, slots=True)
class DirichletConfig(ByLabelConfig):
    """Per class, shares over clients drawn from Dirichlet(alpha)."""

    alpha: float = 0.5
    """Concentration; smaller is less IID."""

    def problems(self, run: RunConfig) -> Iterator[Problem]:
        yield from positive("partition.alpha", self.alpha, "Smaller is less IID; 0.5 is usual.")


@dataclass(kw_only=True, slots=True)
class DirichletEqualConfig(ByLabelConfig):
    """Clients of equal size; each client's mix of labels drawn from Dirichlet(alpha)."""

    alpha: float = 0.5
    """Concentration; smaller is less IID."""
    num_extreme: int = 0
    """How many clients (the last indices) hold rows of one label only."""

    def problems(self, run: RunConfig) -> Iterator[Problem]:
        yield from _num_extreme(self.num_extreme, run)
        yield from positive("partition.alpha", self.alpha, "Smaller is less IID; 0.5 is usual.")


@dataclass(kw_only=True, slots=True)
class ShardsConfig(ByLabelConfig):
    """Rows sorted by label, cut into shards, each client given some."""

    shards_per_client: int = 2
    """How many shards a client gets."""

    def problems(self, run: RunConfig) -> Iterator[Problem]:
        yield from at_least("partition.shards_per_client", self.shards_per_client, 1, "2 is usual.")


@dataclass(kw_only=True, slots=True)
class ExtremeConfig(ByLabelConfig):
    """Some clients hold a single label, the others are IID."""

    num_extreme: int = 2
    """How many clients (the last indices) hold rows of one label only."""

    def problems(self, run: RunConfig) -> Iterator[Problem]:
        yield from _num_extreme(self.num_extreme, run)


@dataclass(kw_only=True, slots=True)
class NaturalConfig(PartitionConfig):
    """One client per value of a column (a site, an author, a domain)."""

    column: str = ""
    """Name of the column; its number of values must be ``fl.num_clients``."""

    def problems(self, run: RunConfig) -> Iterator[Problem]:
        if not self.column:
            remedy = "Write partition.column=<column>."
            yield problem("partition.column", "name the column that tells clients apart", self.column, remedy)


def _num_extreme(num_extreme: int, run: RunConfig) -> Iterator[Problem]:
    if not 0 <= num_extreme <= run.fl.num_clients:
        rule = f"be between 0 and fl.num_clients ({run.fl.num_clients})"
        yield problem("partition.num_extreme", rule, num_extreme, "Lower it or add clients.")
