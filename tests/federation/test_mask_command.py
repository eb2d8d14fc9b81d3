"""``fedzo mask``: a mask that is made ahead of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fedzo.commands.mask import make_mask
from fedzo.commands.run_folder import rebuild
from fedzo.config.load import load
from fedzo.masks.mask_file import load_mask, save_mask

Run = Callable[..., Path]


def test_a_mask_made_beforehand_is_the_one_that_the_run_would_make(
    run: Run, finished: Run, overrides: Callable[..., list[str]], tmp_path: Path
) -> None:
    made = make_mask(load(overrides()), tmp_path / "mask.safetensors")
    folder = finished()
    given = run(f"inputs.artifact={tmp_path / 'mask.safetensors'}")

    kept = (folder / "mask.safetensors").read_bytes()
    assert hashlib.sha256(kept).digest() == hashlib.sha256((tmp_path / "mask.safetensors").read_bytes()).digest()
    assert made["size"] == rebuild(folder).replica.space.size
    assert (folder / "public.jsonl").read_bytes() == (given / "public.jsonl").read_bytes()


def test_a_mask_that_was_chosen_on_other_weights_is_used_with_a_warning(
    run: Run, overrides: Callable[..., list[str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_mask(load(overrides()), tmp_path / "own.safetensors")
    own = load_mask(tmp_path / "own.safetensors")
    save_mask(replace(own, manifest={**own.manifest, "base_digest": "f" * 64}), tmp_path / "other.safetensors")

    run(f"inputs.artifact={tmp_path / 'own.safetensors'}", "fl.rounds=1")
    assert not [record for record in caplog.records if "other weights" in record.getMessage()]
    run(f"inputs.artifact={tmp_path / 'other.safetensors'}", "fl.rounds=1")

    (warned,) = [record.getMessage() for record in caplog.records if "other weights" in record.getMessage()]
    assert "other.safetensors: the mask was made for other weights (ffffffffffff...)" in warned
