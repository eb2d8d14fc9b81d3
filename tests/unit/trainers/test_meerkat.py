"""A mask that is given tells of the text that it was chosen on."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from fedzo.errors import ConfigError
from fedzo.masks.mask import Mask
from fedzo.masks.mask_file import save_mask
from fedzo.testing.tiny_models import tiny_loaded
from fedzo.trainers import TrainerContext, meerkat
from fedzo.trainers.calibration import CalibrationSource
from fedzo.trainers.meerkat import MeerkatConfig, choose_mask

TEXTS = [f"Document {i}: the quick brown fox jumps over {i} lazy dogs." * 2 for i in range(12)]
CHOSEN = MeerkatConfig(
    density=0.05, calibration=CalibrationSource.train, calibration_docs=3, calibration_tokens=20, first_layer=1
)


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """The file of a mask that ``CHOSEN`` made."""
    place = TrainerContext(folder=tmp_path, seed=3, texts=lambda: TEXTS)
    save_mask(choose_mask(CHOSEN, tiny_loaded("llama"), place), tmp_path / "given.safetensors")
    return tmp_path / "given.safetensors"


def test_the_recipe_of_a_given_mask_is_all_that_it_was_made_with(given: Path) -> None:
    assert MeerkatConfig().recipe_of(given) == CHOSEN


@pytest.mark.parametrize(("other", "expected"), [({"calibration_docs": 4}, 3), ({"calibration_tokens": 60}, 20)])
def test_other_windows_than_those_of_a_given_mask_are_refused(
    other: dict[str, Any], expected: int, given: Path
) -> None:
    ((key, value),) = other.items()

    with pytest.raises(ConfigError, match=rf"trainer\.{key} must be {expected} as for the mask .*, got {value}\."):
        MeerkatConfig(**other).recipe_of(given)


@pytest.mark.parametrize("manifest", [{}, {"calibration_docs": "3"}, {"calibration_tokens": "60"}])
def test_a_window_of_which_a_given_mask_tells_nothing_stays_as_it_is(manifest: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "old.safetensors"
    save_mask(Mask({"w": torch.tensor([0])}, {"w": (2,)}, gradient=None, manifest=manifest), file)

    found = MeerkatConfig(calibration_docs=3, calibration_tokens=64).recipe_of(file)

    assert (found.calibration_docs, found.calibration_tokens) == (3, 64)


def test_what_a_mask_will_take_is_said_before_its_text_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By hand: 34,976 weights; a window of 20 tokens in both layers, its head and one gradient."""
    window = 20 * 4 * 2 * (10 * 32 + 4 * 64) + 12 * 20 * 512 + 4 * 32 * 64
    loaded, said = tiny_loaded("llama"), list[str]()
    monkeypatch.setattr(meerkat, "available_memory_bytes", lambda device: 1 << 30)

    def texts() -> list[str]:
        said.extend(caplog.messages)
        return TEXTS

    with caplog.at_level(logging.INFO, logger="fedzo"):
        choose_mask(CHOSEN, loaded, TrainerContext(folder=tmp_path, seed=3, texts=texts))

    assert said == [
        f"mask: the model takes {4 * 34_976 / 2**30:.3f} GiB of the memory of cpu, and 1.000 GiB are free. Of these, a "
        f"window of calibration text takes {window / 2**30:.3f} GiB at most, and sums of gradients may take "
        f"{0.9 - window / 2**30:.3f} GiB"
    ]
    assert "calibration passes over its text once" in caplog.text
    assert meerkat._room_for_sums(loaded, 20) == pytest.approx(0.9 * 2**30 - window, abs=1)
