"""What a site refuses by its own file, what leaves it, and what the server is told: counts that a person can check."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from fedzo.config.schema import RunConfig
from fedzo.data.config import TaskConfig
from fedzo.data.preprocess import IdentityConfig
from fedzo.fl.config import FlConfig, SiteLimitsConfig
from fedzo.fl.messages import Refusal
from fedzo.fl.site_limits import (
    SiteError,
    answers_any,
    check_base,
    check_rows,
    check_run,
    check_work,
    leaving,
    leaving_count,
    leaving_figures,
)
from fedzo.models.config import BaseConfig
from fedzo.records.scores import PartialScore, Score
from fedzo.zo.estimator import BackpropConfig, TwoPointConfig

RUN = RunConfig(
    base=BaseConfig(label="m", weights_digest="b" * 64, tokenizer_digest="", architecture_digest=""),
    artifact="a" * 64,
    task=TaskConfig(name="sst2"),
    preprocess={"identity": IdentityConfig(), "rewrite": IdentityConfig()},
    fl=FlConfig(local_steps=5, batch_size=2, label_counts=True),
    estimator=TwoPointConfig(num_probes=2),
)
OF_VECTORS = replace(RUN, estimator=BackpropConfig())
SCORE = Score(
    "accuracy", 0.75, 0.5, 8, per_class={0: (3, 3), 1: (3, 5)}, auc=0.9, numbers={"calibration": 0.125, "length": 7.0}
)
BOTH = {0: (12, 20), 1: (8, 20)}  # of 40 rows, right ones and all of each label
ONE = {0: (20, 40)}


def limits(**keys: Any) -> SiteLimitsConfig:
    return replace(SiteLimitsConfig(), **keys)


def join(site: SiteLimitsConfig, run: RunConfig = RUN) -> None:
    check_run(site, run, trainer="meerkat", estimator="two_point")


def test_the_numbers_of_refusals_keep_their_meaning() -> None:
    """Sites and servers of two releases must mean the same by them."""
    assert {int(refusal): refusal.name for refusal in Refusal if refusal} == {
        1: "rows",
        2: "changed",
        3: "site",
        11: "task",
        12: "trainer",
        13: "stage",
        14: "steps",
        15: "step_rows",
        16: "base",
        17: "artifact",
        18: "few_rows",
        19: "label_counts",
        20: "client",
        21: "losses",
        22: "vectors",
        23: "probes",
        24: "estimator",
        31: "failed",
        32: "foreign",
        33: "absent",
        34: "slow",
        35: "version",
        36: "preparing",
        37: "rewriter",
        38: "memory",
    }
    assert len({refusal.sentence for refusal in Refusal}) == len(Refusal)


def test_a_file_without_limits_refuses_vectors_and_nothing_else_and_withholds_nothing() -> None:
    join(limits(), replace(RUN, estimator=TwoPointConfig(num_probes=10**6)))
    check_work(limits(), steps=10**6, step_rows=10**6)
    check_base(limits(), "c" * 64, whose="the model")
    check_rows(limits(), num_train=1, label_counts={"0": 1}, num_labels=2)

    assert leaving(limits(), SCORE, num_labels=2) == PartialScore(
        "accuracy", 0.75, 0.5, 8, per_class=SCORE.per_class, numbers=SCORE.numbers
    )


def test_a_run_that_stays_within_every_limit_is_accepted() -> None:
    """Each number at its very bound."""
    site = limits(
        tasks=["sst2", "rte"],
        trainers=["meerkat"],
        estimators=["fzoo", "two_point"],
        stages=["rewrite", "identity", "other"],
        base_digest="b" * 64,
        max_steps=5,
        max_rows=10,
        max_probes=2,
        answers=["label_counts"],
        min_rows=3,
    )

    join(site)
    check_rows(site, num_train=6, label_counts={"0": 3, "1": 3}, num_labels=2)


def test_vectors_leave_a_site_that_says_so_whatever_it_says_of_probes() -> None:
    join(limits(vectors=True, max_probes=1), OF_VECTORS)


@pytest.mark.parametrize(
    ("check", "number", "details"),
    [
        (lambda: join(limits(tasks=["rte", "boolq"])), 11, "limits.tasks allows rte, boolq, .* has sst2"),
        (lambda: join(limits(trainers=["lora"])), 12, "limits.trainers allows lora, .* has meerkat"),
        (lambda: join(limits(stages=["identity"])), 13, "limits.stages allows identity, .* has rewrite"),
        (lambda: join(limits(max_steps=4)), 14, "limits.max_steps is 4, and 5 are"),
        (lambda: join(limits(max_rows=9)), 15, "max_rows is 9, and 5 steps of 2 rows"),
        (lambda: join(limits(base_digest="a" * 64)), 16, "limits.base_digest is a{64}, .* has b{64}"),
        (lambda: check_base(limits(base_digest="a" * 64), "c", whose="model m"), 16, "and model m has c"),
        (
            lambda: check_rows(limits(min_rows=9), num_train=8, label_counts={}, num_labels=2),
            18,
            "is 9, .* are 8 training rows",
        ),
        (
            lambda: check_rows(limits(min_rows=3), num_train=8, label_counts={"0": 6, "1": 2}, num_labels=2),
            18,
            "2 rows of label 1",
        ),
        (lambda: join(limits(answers=["loss"])), 19, "limits.answers lacks label_counts"),
        (lambda: join(limits(answers=["none"])), 19, "limits.answers lacks label_counts"),
        (lambda: join(limits(), OF_VECTORS), 22, "limits.vectors is false, .* send update vectors"),
        (lambda: join(limits(max_probes=1)), 23, "limits.max_probes is 1, and 2 are asked"),
        (lambda: join(limits(estimators=["fzoo", "mine"])), 24, "estimators allows fzoo, mine, .* has two_point"),
    ],
)
def test_each_limit_has_its_number_and_only_the_site_learns_more(
    check: Callable[[], None], number: int, details: str
) -> None:
    with pytest.raises(SiteError) as caught:
        check()

    refusal = Refusal(str(number))
    assert caught.value.refusal is refusal
    assert str(caught.value) == f"refusal {number}, {refusal.sentence}. Its own log says why"
    assert re.search(details, caught.value.details)


@pytest.mark.parametrize(
    ("answers", "kept"),
    [
        (["accuracy"], {"value": 0.75}),
        (["loss"], {"loss": 0.5}),
        (["loss", "accuracy"], {"value": 0.75, "loss": 0.5}),
        (["per_class"], None),  # the classes give the accuracy away
        (["per_class", "accuracy"], {"value": 0.75, "per_class": {0: (3, 3), 1: (3, 5)}}),
        (["length"], {"numbers": {"length": 7.0}}),
        (["none"], None),
        (["rouge_l", "label_counts"], None),
    ],
)
def test_only_the_numbers_that_the_file_names_leave(answers: list[str], kept: dict[str, Any] | None) -> None:
    told = leaving(limits(answers=answers), SCORE, num_labels=2)

    bare: dict[str, Any] = {"value": None, "loss": None, "per_class": {}, "numbers": {}}
    assert told == (None if kept is None else PartialScore("accuracy", num_examples=8, **{**bare, **kept}))
    names = ["accuracy", "loss", "calibration", "length"]
    assert answers_any(limits(answers=answers), names, num_rows=8) is (kept is not None)


def test_the_loss_of_a_model_that_has_diverged_leaves_as_the_largest_that_a_server_takes() -> None:
    told = leaving(limits(), replace(SCORE, loss=3e9), num_labels=2)

    assert told is not None
    assert told.loss == 1e6


def test_no_number_leaves_that_stands_for_fewer_rows_than_the_file_says() -> None:
    """A table in which one class is missing would tell it: its rows are those of all less those of the others."""
    assert leaving(limits(min_rows=8), SCORE, num_labels=2) == replace(
        PartialScore("accuracy", 0.75, 0.5, 8, numbers=SCORE.numbers), per_class={}
    )
    assert leaving(limits(min_rows=9), SCORE, num_labels=2) is None
    three = leaving(limits(min_rows=3), SCORE, num_labels=2)
    assert three is not None
    assert three.per_class == SCORE.per_class
    assert not answers_any(limits(min_rows=9), ["loss"], num_rows=8)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({}, {"a.done", "a.kept", "a.share", "b.done"}),
        ({"answers": ["loss"]}, set()),
        ({"answers": ["none"]}, set()),
        ({"answers": ["loss", "stages"]}, {"a.done", "a.kept", "a.share", "b.done"}),
        ({"min_rows": 5}, {"a.done", "a.kept", "a.share", "b.done"}),
        ({"min_rows": 6}, {"a.share", "b.done"}),  # 5 rows of a are kept, and the other count would tell them
    ],
)
def test_counts_of_a_stage_leave_together_or_not_at_all(keys: dict[str, Any], told: set[str]) -> None:
    figures = {"a.done": 95, "a.kept": 5, "a.share": 0.25, "b.done": 100}

    leave = leaving_figures(limits(**keys), figures, num_train=100)

    assert leave == {name: value for name, value in figures.items() if name in told}


def test_what_is_left_of_the_rows_counts_as_a_count() -> None:
    """Of 100 rows 98 are done: two are not."""
    assert leaving_figures(limits(min_rows=3), {"a.done": 98}, num_train=100) == {}
    assert leaving_figures(limits(min_rows=3), {"a.done": 0}, num_train=100) == {"a.done": 0}


@pytest.mark.parametrize(("count", "told"), [(0, 0), (4, 0), (5, 5), (15, 15), (16, 0), (20, 20)])
def test_a_count_leaves_unless_it_or_the_rest_is_of_few_rows(count: int, told: int) -> None:
    assert leaving_count(limits(min_rows=5), count, of=20) == told
    assert leaving_count(limits(), count, of=20) == count


def test_where_none_leaves_no_number_of_that_name_does() -> None:
    score = replace(SCORE, metric="none", numbers={"none": 1.0})

    assert leaving(limits(answers=["none"]), score, num_labels=2) is None
    assert not answers_any(limits(answers=["none"]), ["none"], num_rows=8)


@pytest.mark.parametrize(
    ("keys", "per_class", "leaves"),
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
    keys: dict[str, Any], per_class: dict[int, tuple[int, int]], leaves: dict[int, tuple[int, int]]
) -> None:
    part = leaving(limits(**keys), Score("accuracy", 0.5, 0.7, 40, per_class), num_labels=2)

    assert part is not None
    assert part.per_class == leaves


@pytest.mark.parametrize(
    ("counts", "few"),
    [
        ({}, None),
        ({"0": 20, "1": 20}, None),
        ({"0": 31, "1": 9}, "9 rows of label 1"),
        ({"0": 40}, "0 rows of label 1"),
    ],
)
def test_label_counts_of_few_rows_are_refused_and_a_label_without_rows_counts_as_few(
    counts: dict[str, int], few: str | None
) -> None:
    def register() -> None:
        check_rows(limits(min_rows=10), num_train=40, label_counts=counts, num_labels=2)

    if few is None:
        return register()
    with pytest.raises(SiteError) as told:
        register()
    assert told.value.refusal is Refusal.few_rows
    assert told.value.details == f"limits.min_rows is 10, and there are {few}"
    sentence = "a number that the run needs covers fewer rows than its site allows"
    assert str(told.value) == f"refusal 18, {sentence}. Its own log says why"


def test_a_run_that_needs_losses_is_refused_by_a_site_that_keeps_them() -> None:
    of_vectors = replace(OF_VECTORS, fl=FlConfig())  # without label counts
    of_scalars = replace(of_vectors, estimator=TwoPointConfig())
    join(limits(vectors=True), of_vectors)
    join(limits(vectors=True, answers=["loss"]), of_vectors)
    join(limits(answers=["accuracy"]), of_scalars)

    with pytest.raises(SiteError, match="refusal 21, its site does not send the losses") as told:
        join(limits(vectors=True, answers=["accuracy"]), of_vectors)
    assert told.value.refusal is Refusal.losses
