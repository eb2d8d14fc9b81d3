"""The embedded model is no judge, and the gate must say so (spec 3.13): left to itself it gives no verdict at all."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fedzo.config.load import load
from fedzo.data.embedded import rotten_tomatoes
from fedzo.data.preprocess.backend import EndpointError
from fedzo.data.preprocess.rephrase import course
from fedzo.data.preprocess.rephrase.config import OatRephraseConfig
from fedzo.data.preprocess.rephrase.gate import faults, keep
from fedzo.data.preprocess.rephrase.rephraser import Rephraser


@pytest.mark.slow
def test_the_gate_refuses_the_embedded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(course, "JUDGE_TOKENS", 24)  # a verdict takes 20
    settings = ["rewriter.model=smollm2-135m", "rewriter.batch_size=40"]
    config = load(["rewriter=transformers", *settings])
    recipe = dataclasses.replace(OatRephraseConfig(), gate_pairs=1).filled(config.task)
    rephraser = Rephraser(recipe, config.task, config.rewriter, tmp_path)

    found = rephraser.test_judge(rotten_tomatoes()[:4], most=1, on_progress=lambda done, total: None)

    pairs = sum(each.pairs for each in found.kinds)
    assert pairs >= 4
    assert sum(sum(each.unread) for each in found.kinds) == 2 * pairs  # in either order; it goes on with the prompt
    assert [*faults(found, recipe)] == ["sensitivity must be at least 95%, got 0% of 2 pairs (95 % interval 0% to 66%)"]
    keep(found, tmp_path)
    with pytest.raises(EndpointError, match="the judge must pass its test"):
        rephraser.rewrite(rotten_tomatoes()[:4], lambda done, total: None)
