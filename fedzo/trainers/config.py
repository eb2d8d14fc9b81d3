"""What a user can say about a trainer: which numbers are trained, and the lr and eps that suit them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from fedzo.zo.config import Rounding


@dataclass(kw_only=True, slots=True)
class TrainerConfig:
    """Which numbers are trained, and the step sizes that suit them."""

    lr: float = 1e-4
    """Learning rate that suits this space; ``server_optimizer.lr`` defaults to it."""
    eps: float = 1e-3
    """Probe size that suits this space; ``estimator.eps`` defaults to it."""


@dataclass(kw_only=True, slots=True)
class MezoConfig(TrainerConfig):
    """MeZO: all weights are trained (arXiv 2305.17333)."""

    lr: float = 1e-6
    rounding: Rounding = Rounding.nearest
    """How steps are rounded where ``model.dtype`` has 16 bits."""


class Selector(StrEnum):
    """How a mask ranks the weights."""

    sensitivity = "sensitivity"
    """Squared gradient on calibration text."""
    magnitude = "magnitude"
    """Absolute value: the largest weights."""
    random = "random"
    """A uniform draw, from the run seed."""


class Granularity(StrEnum):
    """Where the top share is taken."""

    per_tensor = "per_tensor"
    """``density`` of each tensor."""
    everywhere = "everywhere"
    """``density`` of all eligible weights together."""


class Calibration(StrEnum):
    """Source of the unlabelled calibration text."""

    imdb = "imdb"
    """The embedded data package's IMDB reviews, labels dropped."""
    train = "train"
    """The task's own training prompts."""
    file = "file"
    """The file ``calibration_path``: a text file (one document a line) or a table with a ``text`` column."""


@dataclass(kw_only=True, slots=True)
class MeerkatConfig(TrainerConfig):
    """Meerkat: a static mask chosen once from pre-training gradients (arXiv 2506.03337)."""

    lr: float = 2e-4
    density: float = 1e-3
    """Share of the eligible weights that is trained."""
    selector: Selector = Selector.sensitivity
    granularity: Granularity = Granularity.per_tensor
    mask_path: str | None = None
    """A mask made by ``fedzo mask``; without it the mask is computed when the run starts."""
    calibration: Calibration = Calibration.imdb
    calibration_path: str | None = None
    """The text of ``calibration=file``."""
    calibration_docs: int = 16
    """Number of calibration documents (100 x 512 tokens of C4 in SensZOQ's tool)."""
    calibration_tokens: int = 128
    """Length of each document's window in tokens."""


@dataclass(kw_only=True, slots=True)
class LoraTrainerConfig(TrainerConfig):
    """LoRA-MeZO: PEFT's low-rank adapters, in float32 over a base of any dtype (arXiv 2106.09685, 2305.17333)."""

    lr: float = 5e-5  # this and eps: MeZO's for LoRA
    eps: float = 1e-2
    rank: int = 8
    """r: columns of B and rows of A. MeZO uses 8."""
    alpha: int = 16
    """The update B A is scaled by alpha / rank. MeZO uses 16."""
    target_modules: list[str] = field(default_factory=list)
    """Ends of the names of the linear layers to adapt; empty: the query and value projections of the attention."""


@dataclass(kw_only=True, slots=True)
class Ia3TrainerConfig(TrainerConfig):
    """IA3: PEFT's learned rescaling of keys, values and feed-forward activations (arXiv 2205.05638)."""

    lr: float = 1e-3
    eps: float = 1e-2
    target_modules: list[str] = field(default_factory=list)
    """Ends of the names of the linear layers whose output is scaled; empty: the key and value projections."""
    feedforward_modules: list[str] = field(default_factory=list)
    """Ends of the names of the linear layers whose input is scaled; empty: the last layer of each MLP."""


@dataclass(kw_only=True, slots=True)
class PrefixTrainerConfig(TrainerConfig):
    """Prefix tuning: PEFT's learned keys and values before every text, in every layer (arXiv 2101.00190)."""

    lr: float = 1e-3  # this and eps: MeZO's for prefixes
    eps: float = 1e-1
    num_virtual_tokens: int = 5
    """Length of the prefix, which takes as many of the model's positions. MeZO uses 5."""
    init_std: float = 0.02
    """Standard deviation of the initial values."""


@dataclass(kw_only=True, slots=True)
class PromptTrainerConfig(TrainerConfig):
    """Prompt tuning: PEFT's learned embeddings before every text (arXiv 2104.08691)."""

    lr: float = 1e-3
    eps: float = 1e-2
    num_virtual_tokens: int = 5
    """Length of the prompt, which takes as many of the model's positions."""
    init_std: float = 0.02
    """Standard deviation of the initial values."""
