"""What a user can say about a trainer: which numbers are trained, and the lr and eps that suit them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar

from fedzo.errors import Problem, at_least, not_negative, positive, problem
from fedzo.registry import PluginConfig
from fedzo.zo.config import Rounding

if TYPE_CHECKING:
    from fedzo.config.schema import RunConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerTraits:
    """What the rules on other parts of a run must know of a trainer.

    Attributes:
        trains_base_weights: Whether weights of the model itself are trained, so that nobody may pack them.
        float32_master: Whether the trained values are held in float32 whatever the model's dtype. Without it they are
            the model's weights themselves, in its dtype, and too many for float32 vectors beside them.
        cannot_compile: Why its forwards cannot go through ``torch.compile``, as half a sentence; empty where they can.
        gradient: Whether ``prepare`` can find a gradient of the trained values, for GradIP.
    """

    trains_base_weights: bool = True
    float32_master: bool = True
    cannot_compile: str = ""
    gradient: bool = False


@dataclass(kw_only=True, slots=True)
class TrainerConfig(PluginConfig):
    """Which numbers are trained, and the step sizes that suit them."""

    lr: float = 1e-4
    """Learning rate that suits this space; ``server_optimizer.lr`` defaults to it."""
    eps: float = 1e-3
    """Probe size that suits this space; ``estimator.eps`` defaults to it."""

    @property
    def traits(self) -> TrainerTraits:
        """What other parts of a run must know of this trainer."""
        return TrainerTraits()

    def problems(self, run: RunConfig) -> Iterator[Problem]:
        yield from not_negative("trainer.lr", self.lr, "0 trains nothing.")
        yield from positive("trainer.eps", self.eps, "1e-3 is usual.")

    def for_timing(self) -> TrainerConfig:
        """The trainer for whoever only times its steps: where it learns from data what to train, it draws lots."""
        return self


@dataclass(kw_only=True, slots=True)
class MezoConfig(TrainerConfig):
    """MeZO: all weights are trained (arXiv 2305.17333)."""

    lr: float = 1e-6
    rounding: Rounding = Rounding.nearest
    """How steps round where ``model.dtype`` has 16 bits: nearest loses steps that stochastic keeps in the mean."""

    @property
    def traits(self) -> TrainerTraits:
        return TrainerTraits(
            float32_master=False,
            cannot_compile="its probes hand each operation a perturbed weight, made by kernels outside of torch, which "
            "cannot be traced",
        )


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
    """``calibration_path``: a text file (one document a line) or a table with a ``text`` column."""


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

    paths: ClassVar[Mapping[str, str]] = {
        "mask_path": "Make one with `fedzo mask --out FILE`.",
        "calibration_path": "Give the calibration text.",
    }

    @property
    def traits(self) -> TrainerTraits:
        # of a given mask it shows when it is read
        return TrainerTraits(gradient=self.selector is Selector.sensitivity or self.mask_path is not None)

    def problems(self, run: RunConfig) -> Iterator[Problem]:
        if not 0 < self.density <= 1:
            yield problem("trainer.density", "be > 0 and <= 1", self.density, "0.001 trains one weight in a thousand.")
        yield from at_least("trainer.calibration_docs", self.calibration_docs, 1, "It counts documents.")
        yield from at_least("trainer.calibration_tokens", self.calibration_tokens, 1, "It counts tokens a document.")
        if self.calibration is Calibration.file and self.calibration_path is None:
            remedy = "Write trainer.calibration_path=<text file>, or choose another trainer.calibration."
            yield problem("trainer.calibration_path", "be given for trainer.calibration=file", None, remedy)
        if self.calibration is Calibration.train and self.mask_path is None and run.partition.traits.own_rows:
            rule = "be imdb or file for partition=own, where the server has no training rows"
            yield problem("trainer.calibration", rule, "train", "Choose another text, or give trainer.mask_path.")

    def for_timing(self) -> MeerkatConfig:
        return self if self.mask_path else replace(self, selector=Selector.random)


@dataclass(kw_only=True, slots=True)
class AdapterConfig(TrainerConfig):
    """A trainer of float32 adapters over a model that stays as it was loaded."""

    @property
    def traits(self) -> TrainerTraits:
        return TrainerTraits(trains_base_weights=False)


@dataclass(kw_only=True, slots=True)
class LoraTrainerConfig(AdapterConfig):
    """LoRA-MeZO: PEFT's low-rank adapters, in float32 over a base of any dtype (arXiv 2106.09685, 2305.17333)."""

    lr: float = 5e-5  # this and eps: MeZO's for LoRA
    eps: float = 1e-2
    rank: int = 8
    """r: columns of B and rows of A. MeZO uses 8."""
    alpha: int = 16
    """The update B A is scaled by alpha / rank. MeZO uses 16."""
    target_modules: list[str] = field(default_factory=list)
    """Ends of the names of the linear layers to adapt; empty: the query and value projections of the attention."""

    def problems(self, run: RunConfig) -> Iterator[Problem]:
        yield from at_least("trainer.rank", self.rank, 1, "8 is usual.")
        yield from at_least("trainer.alpha", self.alpha, 1, "Twice the rank is usual.")


@dataclass(kw_only=True, slots=True)
class Ia3TrainerConfig(AdapterConfig):
    """IA3: PEFT's learned rescaling of keys, values and feed-forward activations (arXiv 2205.05638)."""

    lr: float = 1e-3
    eps: float = 1e-2
    target_modules: list[str] = field(default_factory=list)
    """Ends of the names of the linear layers whose output is scaled; empty: the key and value projections."""
    feedforward_modules: list[str] = field(default_factory=list)
    """Ends of the names of the linear layers whose input is scaled; empty: the last layer of each MLP."""


@dataclass(kw_only=True, slots=True)
class VirtualTokensConfig(AdapterConfig):
    """A trainer of virtual tokens before every text."""

    lr: float = 1e-3
    num_virtual_tokens: int = 5
    """Virtual tokens before every text; each takes one of the model's positions. MeZO uses 5."""
    init_std: float = 0.02
    """Standard deviation of the initial values."""

    def problems(self, run: RunConfig) -> Iterator[Problem]:
        yield from at_least("trainer.num_virtual_tokens", self.num_virtual_tokens, 1, "5 is usual.")
        yield from not_negative("trainer.init_std", self.init_std, "0.02 is usual.")


@dataclass(kw_only=True, slots=True)
class PrefixTrainerConfig(VirtualTokensConfig):
    """Prefix tuning: PEFT's learned keys and values before every text, in every layer (arXiv 2101.00190)."""

    eps: float = 1e-1  # this and lr: MeZO's for prefixes


@dataclass(kw_only=True, slots=True)
class PromptTrainerConfig(VirtualTokensConfig):
    """Prompt tuning: PEFT's learned embeddings before every text (arXiv 2104.08691)."""

    eps: float = 1e-2
