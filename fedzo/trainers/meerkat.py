"""Meerkat: a static mask of the most sensitive weights is trained, with a float32 master (arXiv 2506.03337).

Deviations and choices: the paper's mask code was not found, so the rules are those of its predecessor SensZOQ
(arXiv 2406.02913): squared gradients, the top share of each attention and MLP matrix. Calibration text is a setting;
the paper uses C4. The signed mean gradient is kept beside the mask at the server, for GradIP.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import fedzo
from fedzo.data.embedded import imdb_texts
from fedzo.data.texts import read_texts
from fedzo.masks.calibration import windows_from_texts
from fedzo.masks.mask import Mask, check_fits
from fedzo.masks.mask_file import encode_mask, load_mask, save_mask
from fedzo.masks.select import select_mask
from fedzo.models.load import LoadedModel
from fedzo.trainers import Built, Prepared, Workplace
from fedzo.trainers.artifacts import Artifact
from fedzo.trainers.config import Calibration, MeerkatConfig, Selector
from fedzo.zo.config import Distribution
from fedzo.zo.spaces.masked import MaskedSpace

log = logging.getLogger(__name__)
MASK_FILE = "mask.safetensors"


@dataclass(frozen=True, slots=True)
class Meerkat:
    """The masked space."""

    config: MeerkatConfig

    def prepare(self, loaded: LoadedModel, workplace: Workplace) -> Prepared:
        """The mask's indices and its gradient: from the run folder, from ``trainer.mask_path``, or chosen now."""
        kept = workplace.folder / MASK_FILE
        if kept.exists():
            mask = load_mask(kept)
        else:
            given = self.config.mask_path
            mask = load_mask(Path(given)) if given else choose_mask(self.config, loaded, workplace)
            check_fits(mask, loaded.model)
            if (base := mask.manifest.get("base_digest")) not in (None, loaded.base_digest):
                log.warning(
                    "%s: it was chosen on other weights (%s...) than the model's (%s...): it can be trained, but its "
                    "gradient, with which local steps are compared (GradIP), is not this model's.",
                    given,
                    base[:12],
                    loaded.base_digest[:12],
                )
            save_mask(mask, kept)
        check_fits(mask, loaded.model)
        gradient = None if mask.gradient is None else torch.cat(list(mask.gradient.values()))
        return Prepared(workplace.artifacts.put(encode_mask(mask)), gradient)

    def build(self, loaded: LoadedModel, artifact: Artifact, *, distribution: Distribution) -> Built:
        """The masked space over ``loaded.model``; its base values are kept for the way back."""
        mask = load_mask(artifact.path)
        check_fits(mask, loaded.model)
        space = MaskedSpace(loaded.model, mask.indices, distribution=distribution)
        base = space.values()
        return Built(space, lambda: space.load(base))


def choose_mask(config: MeerkatConfig, loaded: LoadedModel, workplace: Workplace) -> Mask:
    """Choose a mask as the configuration says."""
    windows = []
    if config.selector is Selector.sensitivity:
        windows = windows_from_texts(
            _texts(config, workplace),
            tokenize=lambda text: list(loaded.tokenizer(text)["input_ids"]),
            num_docs=config.calibration_docs,
            num_tokens=config.calibration_tokens,
            seed=workplace.seed,
        )
    mask = select_mask(
        loaded.model,
        density=config.density,
        selector=config.selector.value,
        granularity=config.granularity.value,
        windows=windows,
        seed=workplace.seed,
        on_window=workplace.advance,
        base_digest=loaded.base_digest,
    )
    return replace(
        mask, manifest={**mask.manifest, "calibration": config.calibration.value, "fedzo": fedzo.__version__}
    )


def _texts(config: MeerkatConfig, workplace: Workplace) -> list[str]:
    if config.calibration is Calibration.imdb:
        return imdb_texts()
    if config.calibration is Calibration.train:
        return workplace.texts()
    return read_texts(Path(config.calibration_path or ""))
