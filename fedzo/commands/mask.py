"""``fedzo mask``: choose Meerkat's mask once, for runs to come."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from fedzo.config.schema import LaunchConfig, uncompiled
from fedzo.errors import ConfigError
from fedzo.masks.mask_file import save_mask
from fedzo.run.peer import check_format, open_model
from fedzo.run.process import row_source
from fedzo.run.start import calibration_texts
from fedzo.trainers import TrainerContext
from fedzo.trainers.meerkat import MeerkatConfig, choose_mask


def make_mask(config: LaunchConfig, out: Path) -> dict[str, Any]:
    """Choose a mask as ``trainer=meerkat`` would and write it to a file."""
    if not isinstance(config.trainer, MeerkatConfig):
        raise ConfigError("fedzo mask: trainer must be meerkat. Only a masked trainer has a mask.")
    site = uncompiled(config.site())
    context = TrainerContext(
        folder=out.parent,
        seed=config.seed,
        texts=partial(calibration_texts, row_source(config, site)),
        inputs=config.inputs,
    )
    loaded = open_model(site, config.task.max_length)
    check_format(config, loaded)
    mask = choose_mask(config.trainer, loaded, context)
    save_mask(mask, out)
    return {"path": str(out), "size": mask.size, "digest": mask.digest(), **mask.manifest}
