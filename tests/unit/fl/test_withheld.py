"""What a site's file keeps at the site: each case by a count or a list that a person can check by eye."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fedzo.config.schema import RunConfig
from fedzo.fl.config import SiteLimitsConfig
from fedzo.fl.messages import Refusal
from fedzo.fl.site_limits import SiteError, check_rows, check_run, leaving
from fedzo.models.config import BaseConfig
from fedzo.records.scores import Score
from fedzo.zo.estimator import BackpropConfig, TwoPointConfig

BOTH = {0: (12, 20), 1: (8, 20)}
ONE = {0: (20, 40)}
RUN = RunConfig(
    base=BaseConfig(label="m", weights_digest="a" * 64, tokenizer_digest="", architecture_digest=""),
    artifact="a" * 64,
    estimator=BackpropConfig(),
)


@pytest.mark.parametrize(
    ("limits", "per_class", "leaves"),
    [
        ({}, BOTH, BOTH),
        ({}, ONE, ONE),
        ({"min_rows": 20}, BOTH, BOTH),
        ({"min_rows": 21}, BOTH, {}),
        ({"min_rows": 20}, ONE, {}),  # that no row has the other label is a count of 0
        ({"answers": ["accuracy", "per_class"]}, BOTH, BOTH),
        ({"answers": ["loss", "per_class"]}, BOTH, {}),  # (12 + 8) / 40 is the accuracy
        ({"answers": ["accuracy"]}, BOTH, {}),
    ],
)
def test_the_table_of_classes_leaves_whole_and_tells_no_more_than_the_file_says(
    limits: dict[str, Any], per_class: dict[int, tuple[int, int]], leaves: dict[int, tuple[int, int]]
) -> None:
    part = leaving(SiteLimitsConfig(**limits), Score("accuracy", 0.5, 0.7, 40, per_class), num_labels=2)

    assert part is not None
    assert part.per_class == leaves


@pytest.mark.parametrize(
    ("counts", "refused"),
    [({}, False), ({"0": 20, "1": 20}, False), ({"0": 31, "1": 9}, True), ({"0": 40}, True)],
)
def test_label_counts_of_few_rows_are_refused_and_no_row_is_few(counts: dict[str, int], refused: bool) -> None:
    def register() -> None:
        check_rows(SiteLimitsConfig(min_rows=10), num_train=40, label_counts=counts, num_labels=2)

    if not refused:
        return register()
    with pytest.raises(SiteError) as told:
        register()
    assert told.value.refusal is Refusal.few_rows
    assert not any(count in str(told.value).replace("18", "") for count in ("10", "31", "9", "40"))


def test_a_run_that_needs_losses_is_refused_by_a_site_that_keeps_them() -> None:
    of_scalars = replace(RUN, estimator=TwoPointConfig())
    check_run(SiteLimitsConfig(vectors=True), RUN, trainer="meerkat")
    check_run(SiteLimitsConfig(vectors=True, answers=["loss"]), RUN, trainer="meerkat")
    check_run(SiteLimitsConfig(answers=["accuracy"]), of_scalars, trainer="meerkat")

    with pytest.raises(SiteError, match="refusal 21, its site does not send the losses") as told:
        check_run(SiteLimitsConfig(vectors=True, answers=["accuracy"]), RUN, trainer="meerkat")
    assert told.value.refusal is Refusal.losses
