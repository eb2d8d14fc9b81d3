"""What a user can say about tasks and files."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class TaskKind(StrEnum):
    """How a row becomes a prompt and how an answer is judged."""

    candidates = "candidates"
    """Choose one of the candidates; accuracy."""
    generation = "generation"
    """Write a short answer; token F1 and exact match (SQuAD's)."""
    instruction = "instruction"
    """Answer through the model's chat template; ROUGE-L."""


class Loss(StrEnum):
    """The training loss."""

    candidates = "candidates"
    """Cross-entropy over the length-normalised log-likelihoods of the candidates."""
    lm = "lm"
    """Next-token cross-entropy on the right answer's tokens: the mean over the tokens of a row, then over rows. MeZO
    takes the mean over all tokens of a batch."""
    score = "score"
    """The value of the first evaluator on the batch, with a minus where higher is better. A score has no gradient,
    so ``estimator=backprop`` is refused."""


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
    """The answers, in the order of the labels. Answers may hold columns (``{choice1}``). A single one stands for each
    value that its column lists: rows then have candidates of their own, whose numbers are no labels."""
    label: str = "label"
    """Column of the right answer: index of a candidate, or a value of ``labels``."""
    labels: list[str] = field(default_factory=list)
    """Values of the label column in the order of ``candidates``. Empty if the column holds indices."""
    answer: str = ""
    """Template of the right answer (generation, instruction). A column in it may list several: the first is trained on,
    and a score counts the one that is nearest to the model's. ``{answers.text}`` is the field ``text`` of an object in
    the column ``answers``, or of each object in a list."""
    messages: str = ""
    """Column of whole conversations (instruction), in the place of ``template`` and ``answer``: lists of objects with
    ``role`` (``system``, ``user`` or ``assistant``) and ``content``. The last message is the assistant's and the right
    answer; all before it are the prompt."""
    system: str = ""
    """The system message before a row's question (instruction), which may hold columns. Empty = none, but for one that
    the chat template writes by itself."""
    derive: str | None = None
    """Built-in fields made of a row's columns (``alpaca``, ``boolq``, ``copa``, ``wsc``), for what a template cannot
    express."""
    common_shift: float = 1.0
    """Factor on the mean of the candidates' scores over a client's batch, in the training loss, also as logged; dev and
    test scores do not change. Below 1, the bias towards an answer is trained more slowly, so larger learning rates can
    be stable. Each row is part of this mean: in batches of few rows, or of one label, differences between rows are
    damped, too. 1 leaves the loss as it is."""
    max_length: int = 512
    """Longest sequence in tokens. A longer prompt loses its beginning, but keeps a system message."""
    max_new_tokens: int = 32
    """Longest generated answer in tokens."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Where this machine's rows are."""

    path: str | None = None
    """A folder with ``train.*`` and optionally ``dev.*``/``validation.*`` and ``test.*`` (jsonl, json, csv, tsv,
    parquet), or one file; ``null`` is the embedded set of the task (Rotten Tomatoes)."""


@dataclass(kw_only=True, slots=True)
class SplitConfig:
    """How many rows are used for what. Train, dev and test rows never overlap."""

    num_train: int = 0
    """Rows kept for training, 0 = all."""
    num_dev: int = 256
    """Rows for choosing the best round, 0 = none; without a dev file drawn from train (a quarter of it at most)."""
    num_test: int = 1024
    """Rows of the final score, 0 = none; without a test file drawn from train (a quarter of it at most). To choose
    settings, write ``evaluation.test=false`` instead: 0 would turn test rows into dev rows."""
    seed: int = 0
    """Seed of the split; apart from the run seed, so that runs share their test rows."""
