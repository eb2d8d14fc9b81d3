"""The embedded model is no judge, and the gate must say so (spec 3.13): it names the verdict that it was told first."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fedzo.config.load import load
from fedzo.data.embedded import rotten_tomatoes
from fedzo.data.preprocess.backend import EndpointError
from fedzo.data.preprocess.rephrase.config import OatRephraseConfig
from fedzo.data.preprocess.rephrase.gate import faults, keep
from fedzo.data.preprocess.rephrase.rephraser import Rephraser


@pytest.mark.slow
def test_the_gate_refuses_the_embedded_model(tmp_path: Path) -> None:
    settings = ["rewriter.model=smollm2-135m", "rewriter.max_tokens=40", "rewriter.batch_size=40"]  # a verdict takes 20
    config = load(["rewriter=transformers", *settings])
    recipe = dataclasses.replace(OatRephraseConfig(), gate_pairs=2).filled(config.task)
    rephraser = Rephraser(recipe, config.task, config.rewriter, tmp_path)

    found = rephraser.test_judge(rotten_tomatoes()[:8], most=2, on_progress=lambda done, total: None)

    assert sum(each.pairs for each in found.kinds) >= 8
    assert [*faults(found, recipe)]
    keep(found, tmp_path)
    with pytest.raises(EndpointError, match="the judge must pass its test"):
        rephraser.check_gate()
