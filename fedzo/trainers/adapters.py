"""Adapters as trainers: what is trained is a PEFT adapter, over a base that stays as it was loaded.

PEFT's own classes make and compute the adapter; fedzo numbers its values, redraws their initial values from the run
seed (``docs/explanation-randomness.md``), and moves them. So every peer builds the same bits, and nothing but the seed
has to travel. PEFT is imported where an adapter is built: it takes seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from torch import nn

from fedzo.errors import ConfigError, Problem, at_least, not_negative
from fedzo.trainers.artifacts import Artifact
from fedzo.trainers.base import TRAINERS, Built, LayeredConfig, Prepared, TrainerConfig, TrainerContext, TrainerTraits
from fedzo.zo.config import Distribution
from fedzo.zo.directions import PURPOSE_INIT, gaussians, stream_key
from fedzo.zo.spaces.dense import DenseSpace

if TYPE_CHECKING:
    import peft

    from fedzo.config.schema import RunSettings
    from fedzo.models.loaded import LoadedModel

Law = tuple[float, float]
"""Mean and standard deviation of a tensor's initial values."""


@dataclass(kw_only=True, slots=True)
class AdapterConfig(TrainerConfig):
    """A trainer of float32 adapters over a model that stays as it was loaded."""

    @property
    def traits(self) -> TrainerTraits:
        return TrainerTraits(trains_base_weights=False)


@dataclass(frozen=True, slots=True)
class AdapterTrainer:
    """A trainer for one kind of adapter.

    Attributes:
        configure: PEFT's configuration of the adapter for a model.
        law: How a parameter (its name and itself) is drawn at first.
    """

    configure: Callable[[nn.Module], peft.PeftConfig]
    law: Callable[[str, nn.Parameter], Law]

    def prepare(self, loaded: LoadedModel, context: TrainerContext) -> Prepared:
        """The run seed, 8 bytes: all that the initial values depend on."""
        return Prepared(context.artifacts.put(context.seed.to_bytes(8, "little")))

    def build(self, loaded: LoadedModel, artifact: Artifact, *, distribution: Distribution) -> Built:
        """The adapter on ``loaded.model``, in place of an earlier one, at its initial values."""
        from fedzo.models.adapters import inject, remove, trained_parameters

        if artifact.size != 8:
            raise ConfigError(f"an adapter's artifact must be a seed of 8 bytes, got {artifact.size}.")
        remove(loaded.model)  # an earlier one: layers are looked for in the base
        peft_model = inject(loaded, self.configure(loaded.model))
        named = trained_parameters(peft_model)
        peft_model.requires_grad_(False)
        space = DenseSpace([parameter for _, parameter in named], distribution=distribution)
        laws = [(self.law(name, parameter), parameter.numel()) for name, parameter in named]
        space.load(_initial_values(laws, seed=int.from_bytes(artifact.read(), "little")))

        def save(folder: Path) -> None:
            # False: no look at the hub for whether the embeddings have grown; they are frozen
            peft_model.save_pretrained(str(folder), save_embedding_layers=False)

        return Built.of(space, save)


@dataclass(kw_only=True, slots=True)
class LayerAdapterConfig(LayeredConfig):
    """A trainer of adapters that sit on dense linear layers."""

    @property
    def traits(self) -> TrainerTraits:
        return TrainerTraits(
            trains_base_weights=False,
            cannot_train_sketch="PEFT has no adapter of this kind for a layer of codes and tables",
        )


@dataclass(kw_only=True, slots=True)
class LoraTrainerConfig(LayerAdapterConfig):
    """LoRA-MeZO: PEFT's low-rank adapters, in float32 over a base of any dtype (arXiv 2106.09685, 2305.17333)."""

    lr: float = 5e-5
    """Learning rate; ``server_optimizer.lr`` defaults to it. The default is MeZO's for LoRA, for runs of 20,000 steps.
    A run of a few hundred rounds needs a larger one: in 200 steps on SST-2, ``experiments/meerkat`` found 2e-3 best.
    Tune it."""
    eps: float = 1e-2  # MeZO's for LoRA
    rank: int = 8
    """r: columns of B and rows of A. MeZO uses 8."""
    alpha: int = 16
    """The update B A is scaled by alpha / rank. MeZO uses 16."""
    target_modules: list[str] = field(default_factory=list)
    """Ends of the names of the linear layers to adapt; empty: the query and value projections of the attention."""

    def problems(self, run: RunSettings) -> Iterator[Problem]:
        yield from at_least("trainer.rank", self.rank, 1, "8 is usual.")
        yield from at_least("trainer.alpha", self.alpha, 1, "Twice the rank is usual.")


def _some_layers(layers: list[str], first_layer: int) -> list[str]:
    """The layers, of which upper blocks of another kind than the others may have none."""
    if not layers:
        raise ConfigError(
            f"trainer.target_modules must name layers in the blocks from trainer.first_layer={first_layer} on, got "
            "none. Lower trainer.first_layer, or name layers of these blocks."
        )
    return layers


@TRAINERS.register("lora", LoraTrainerConfig)
def lora_trainer(config: LoraTrainerConfig) -> AdapterTrainer:
    """Low-rank updates (alpha / rank) B A of linear layers (arXiv 2106.09685), as in MeZO's LoRA runs.

    Deviation: A is Gaussian with the variance of PEFT's uniform default, 1 / (3 in_features).
    """

    def configure(model: nn.Module) -> peft.PeftConfig:
        import peft

        from fedzo.models.adapters import QUERY_VALUE, are_transposed, find_layers, text_layers

        layers = find_layers(
            model,
            text_layers(model),
            config.target_modules,
            known=QUERY_VALUE,
            first_layer=config.first_layer,
            key="trainer.target_modules",
        )
        return peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=config.rank,
            lora_alpha=config.alpha,
            target_modules=_some_layers(layers, config.first_layer),
            fan_in_fan_out=are_transposed(model, layers),
        )

    def law(name: str, parameter: nn.Parameter) -> Law:
        return (0.0, 1 / math.sqrt(3 * parameter.shape[1])) if ".lora_A." in name else (0.0, 0.0)

    return AdapterTrainer(configure, law)


@dataclass(kw_only=True, slots=True)
class Ia3TrainerConfig(LayerAdapterConfig):
    """IA3: PEFT's learned rescaling of keys, values and feed-forward activations (arXiv 2205.05638)."""

    lr: float = 1e-3
    eps: float = 1e-2
    target_modules: list[str] = field(default_factory=list)
    """Ends of the names of the linear layers whose output is scaled; empty: the key and value projections."""
    feedforward_modules: list[str] = field(default_factory=list)
    """Ends of the names of the linear layers whose input is scaled; empty: the last layer of each MLP,
    without the fused experts of a mixture."""


@TRAINERS.register("ia3", Ia3TrainerConfig)
def ia3_trainer(config: Ia3TrainerConfig) -> AdapterTrainer:
    """One factor a key, a value and a feed-forward activation, 1 at first (arXiv 2205.05638).

    Deviation: a fused projection of query, key and value is scaled whole, as PEFT does.
    """

    def configure(model: nn.Module) -> peft.PeftConfig:
        import peft

        from fedzo.models.adapters import FEED_FORWARD, KEY_VALUE, are_transposed, find_layers, text_layers

        find = partial(find_layers, model, text_layers(model), first_layer=config.first_layer)
        outputs = find(config.target_modules, known=KEY_VALUE, key="trainer.target_modules")
        inputs = find(config.feedforward_modules, known=(*FEED_FORWARD, ()), key="trainer.feedforward_modules")
        layers = _some_layers([*outputs, *inputs], config.first_layer)
        return peft.IA3Config(
            task_type="CAUSAL_LM",
            target_modules=layers,
            feedforward_modules=inputs,
            fan_in_fan_out=are_transposed(model, layers),
        )

    return AdapterTrainer(configure, lambda name, parameter: (1.0, 0.0))


@dataclass(kw_only=True, slots=True)
class VirtualTokensConfig(AdapterConfig):
    """A trainer of virtual tokens before every text."""

    lr: float = 1e-3
    num_virtual_tokens: int = 5
    """Virtual tokens before every text; each takes one of the model's positions. MeZO uses 5."""
    init_std: float = 0.02
    """Standard deviation of the initial values."""

    def problems(self, run: RunSettings) -> Iterator[Problem]:
        yield from at_least("trainer.num_virtual_tokens", self.num_virtual_tokens, 1, "5 is usual.")
        yield from not_negative("trainer.init_std", self.init_std, "0.02 is usual.")


@dataclass(kw_only=True, slots=True)
class PrefixTrainerConfig(VirtualTokensConfig):
    """Prefix tuning: PEFT's learned keys and values before every text, in every layer (arXiv 2101.00190)."""

    eps: float = 1e-1  # this and lr: MeZO's for prefixes


@TRAINERS.register("prefix", PrefixTrainerConfig)
def prefix_trainer(config: PrefixTrainerConfig) -> AdapterTrainer:
    """Keys and values of virtual tokens in every layer, trained as such (arXiv 2101.00190).

    Deviations: no reparametrisation by an MLP, which a zeroth-order step does not need; a Gaussian start where MeZO's
    code takes the activations of random tokens.
    """

    def configure(model: nn.Module) -> peft.PeftConfig:
        import peft

        return peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=config.num_virtual_tokens)

    return AdapterTrainer(configure, lambda name, parameter: (0.0, config.init_std))


@dataclass(kw_only=True, slots=True)
class PromptTrainerConfig(VirtualTokensConfig):
    """Prompt tuning: PEFT's learned embeddings before every text (arXiv 2104.08691)."""

    eps: float = 1e-2


@TRAINERS.register("prompt", PromptTrainerConfig)
def prompt_trainer(config: PromptTrainerConfig) -> AdapterTrainer:
    """Embeddings of virtual tokens (arXiv 2104.08691), Gaussian at first."""

    def configure(model: nn.Module) -> peft.PeftConfig:
        import peft

        return peft.PromptTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=config.num_virtual_tokens,
            token_dim=cast(Any, model).get_input_embeddings().embedding_dim,  # OPT's may differ from its hidden size
        )

    return AdapterTrainer(configure, lambda name, parameter: (0.0, config.init_std))


def _initial_values(laws: list[tuple[Law, int]], *, seed: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """mean + std * z at every coordinate, one rounded product and one rounded sum; float32 [n] in wire order."""
    sizes = [size for _, size in laws]
    mean, std = (np.repeat(np.array([law[i] for law, _ in laws], np.float32), sizes) for i in (0, 1))
    z = gaussians(stream_key(seed, round=0), sum(sizes), purpose=PURPOSE_INIT)
    return mean + std * z
