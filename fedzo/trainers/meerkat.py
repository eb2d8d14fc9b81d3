"""Meerkat: a static mask of the most sensitive weights is trained, with a float32 master (arXiv 2506.03337).

Deviations and choices: the paper's mask code was not found, so the rules are those of its predecessor SensZOQ
(arXiv 2406.02913): squared gradients, the top share of each attention and MLP matrix. Calibration text is a setting;
the paper uses C4. The signed mean gradient is kept beside the mask at the server, for GradIP.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedzo.errors import ConfigError, Problem, problem
from fedzo.masks.mask import Mask, check_fits
from fedzo.masks.mask_file import encode_mask, load_mask, save_mask
from fedzo.masks.select import Granularity, Selector, select_mask
from fedzo.models.available import available_memory_bytes
from fedzo.models.blocks import parameters_from
from fedzo.models.memory import calibration_memory_bytes, calibration_window_bytes, weights_bytes
from fedzo.system import device_text
from fedzo.trainers.artifacts import Artifact
from fedzo.trainers.base import TRAINERS, Built, InputsConfig, Prepared, TrainerConfig, TrainerContext, TrainerTraits
from fedzo.trainers.calibration import CalibratedConfig, CalibrationSource, calibration_windows
from fedzo.zo.config import Distribution
from fedzo.zo.spaces.masked import MaskedSpace

if TYPE_CHECKING:
    from fedzo.config.schema import RunSettings
    from fedzo.models.loaded import LoadedModel

log = logging.getLogger(__name__)
MASK_FILE = "mask.safetensors"


@dataclass(kw_only=True, slots=True)
class MeerkatConfig(CalibratedConfig):
    """Meerkat: a static mask chosen once from pre-training gradients (arXiv 2506.03337)."""

    lr: float = 2e-4
    """Learning rate; ``server_optimizer.lr`` defaults to it. The default is ours, since the paper's is not known. In
    200 steps on SST-2 and AG News, ``experiments/meerkat`` found 4e-4 best. Tune it."""
    density: float = 1e-3
    """Share of the eligible weights that is trained."""
    selector: Selector = Selector.sensitivity
    granularity: Granularity = Granularity.per_tensor

    @property
    def traits(self) -> TrainerTraits:
        return TrainerTraits(
            gradient=self.selector is Selector.sensitivity,
            gradient_setting=f"trainer.selector={Selector.sensitivity}",
            cannot_train_sketch="its mask picks from dense weights, of which a sketch has none left",
        )

    def problems(self, run: RunSettings) -> Iterator[Problem]:
        if not 0 < self.density <= 1:
            yield problem("trainer.density", "be > 0 and <= 1", self.density, "0.001 trains one weight in a thousand.")

    def input_problems(self, inputs: InputsConfig, run: RunSettings) -> Iterator[Problem]:
        if inputs.artifact is None:
            yield from CalibratedConfig.input_problems(self, inputs, run)
        else:  # a mask that is given needs no text
            yield from TrainerConfig.input_problems(self, replace(inputs, artifact=None), run)

    def recipe_of(self, artifact: Path) -> MeerkatConfig:
        """As the mask's manifest tells; what it does not tell stays as it is.

        Raises:
            ConfigError: The file is no mask, or a setting is neither the mask's nor the default.
        """
        manifest = load_mask(artifact).manifest
        told: dict[str, Any] = {key: read(manifest[key]) for key, read in _RECIPE.items() if key in manifest}
        told.setdefault("first_layer", 0)  # which only masks of upper blocks tell
        if {"calibration_docs", "calibration_tokens"} <= manifest.keys():
            # the manifest counts the tokens of all windows, the setting those of one; all are of one length
            told["calibration_tokens"] = int(manifest["calibration_tokens"]) // told["calibration_docs"]
        default = MeerkatConfig()
        for key, value in told.items():
            own = getattr(self, key)
            if own not in (value, getattr(default, key)):
                raise ConfigError(
                    f"trainer.{key} must be {value} as for the mask {artifact}, got {own}. Leave it out, or give "
                    "another mask."
                )
        return replace(self, **told)

    def for_timing(self) -> MeerkatConfig:
        return replace(self, selector=Selector.random)


_RECIPE: Mapping[str, Callable[[str], object]] = {
    "density": float,
    "selector": Selector,
    "granularity": Granularity,
    "calibration": CalibrationSource,
    "calibration_docs": int,
    "first_layer": int,
}
"""What a mask's manifest tells of the settings that it was made with, as it stands there."""


@TRAINERS.register("meerkat", MeerkatConfig)
@dataclass(frozen=True, slots=True)
class Meerkat:
    """The masked space."""

    config: MeerkatConfig

    def prepare(self, loaded: LoadedModel, context: TrainerContext) -> Prepared:
        """The mask's indices and its gradient: from the run folder, from ``inputs.artifact``, or chosen now."""
        kept, given = context.folder / MASK_FILE, context.inputs.artifact
        is_kept = context.resumed and kept.exists()
        file = kept if is_kept else given
        mask = load_mask(Path(file)) if file else choose_mask(self.config, loaded, context)
        check_fits(mask, loaded.model)
        if not is_kept:
            if (base := mask.manifest.get("base_digest")) not in (None, loaded.base_digest):
                log.warning(
                    "%s: the mask was made for other weights (%s...) than the model's (%s...). It can be trained, but "
                    "GradIP uses the other model's gradient. For GradIP, make a new mask.",
                    given,
                    base[:12],
                    loaded.base_digest[:12],
                )
            save_mask(mask, kept)
        gradient = None if mask.gradient is None else torch.cat(list(mask.gradient.values()))
        return Prepared(context.artifacts.put(encode_mask(mask)), gradient)

    def build(self, loaded: LoadedModel, artifact: Artifact, *, distribution: Distribution) -> Built:
        """The masked space over ``loaded.model``; its base values are kept for the way back."""
        mask = load_mask(artifact.path)
        check_fits(mask, loaded.model)
        return Built.of(MaskedSpace(loaded.model, mask.indices, distribution=distribution))


def choose_mask(config: MeerkatConfig, loaded: LoadedModel, context: TrainerContext) -> Mask:
    """Choose a mask as the configuration says, of what a text passes."""
    windows, memory_bytes, host = [], math.inf, available_memory_bytes(torch.device("cpu"))
    if config.selector is Selector.sensitivity:
        memory_bytes = _room_for_sums(loaded, config.calibration_tokens)
        windows = calibration_windows(config, loaded, context)
    mask = select_mask(
        loaded.model,
        density=config.density,
        selector=config.selector,
        granularity=config.granularity,
        windows=windows,
        seed=context.seed,
        on_window=context.advance,
        base_digest=loaded.base_digest,
        among=parameters_from(loaded.model, config.first_layer),
        memory_bytes=memory_bytes,
        host_bytes=0.9 * host,
    )
    told = {"calibration": config.calibration.value}
    if config.first_layer:
        told["first_layer"] = str(config.first_layer)
    return replace(mask, manifest={**mask.manifest, **told})


def _room_for_sums(loaded: LoadedModel, num_tokens: int) -> float:
    """Bytes that sums of gradients may take beside the model and a window of so many tokens; said before any work."""
    model, free = loaded.model, available_memory_bytes(loaded.device)
    room = calibration_memory_bytes(model, num_tokens=num_tokens, available_bytes=free)
    log.info(
        "mask: the model takes %.3f GiB of the memory of %s, and %.3f GiB are free. Of these, a window of calibration "
        "text takes %.3f GiB at most, and sums of gradients may take %.3f GiB",
        weights_bytes(model) / 2**30,
        device_text(loaded.device),
        free / 2**30,
        calibration_window_bytes(model, num_tokens=num_tokens) / 2**30,
        max(0.0, room) / 2**30,
    )
    return room
