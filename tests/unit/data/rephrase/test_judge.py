"""What a judge's answer means, and how far a judge can be trusted."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from fedzo.config.load import load
from fedzo.data.embedded import rotten_tomatoes
from fedzo.data.preprocess.backend import Completion, EndpointError, RowFault, RowReason
from fedzo.data.preprocess.rephrase import course
from fedzo.data.preprocess.rephrase.config import OatRephraseConfig
from fedzo.data.preprocess.rephrase.course import why_not
from fedzo.data.preprocess.rephrase.gate import (
    check_gate,
    faults,
    few_pairs,
    find,
    find_test,
    judge_test_digest,
    keep,
    remedy,
    summarise,
)
from fedzo.data.preprocess.rephrase.judge import Verdict, read_verdict, verdict_of
from fedzo.data.preprocess.rephrase.pairs import KINDS, Pair, make_pairs, negated, paraphrased, swapped
from fedzo.data.preprocess.rephrase.prompts import Example
from fedzo.data.preprocess.rephrase.rephraser import Rephraser
from fedzo.errors import ConfigError
from fedzo.report.rephrased import judge_test_lines

LABELS = ("entailment", "neutral")


def said(verdict: object = "same", label: object = "neutral", **more: object) -> str:
    return json.dumps({"verdict": verdict, "predicted_label": label, **more})


# --- verdicts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (said(), Verdict(True, "neutral")),
        (f"  {said('different', 'entailment')}\n", Verdict(False, "entailment")),
        ("same", Verdict(True, None)),
        ("Same.", Verdict(True, None)),
        (" NOT  the same. ", Verdict(False, None)),
    ],
)
def test_a_whole_verdict_is_read(text: str, expected: Verdict) -> None:
    assert read_verdict(text, LABELS) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "They are the same.",
        "same meaning",
        "not the same, I think",
        "different",
        "same..",
        f"Sure! {said()}",
        f"```json\n{said()}\n```",
        said() + said(),
        said("Same"),
        said(True),
        said(["same"]),
        said(label="contradiction"),
        said(label=None),
        said(reason="because"),
        '{"verdict": "same"}',
        '{"predicted_label": "neutral"}',
        '{"verdict": "different", "verdict": "same", "predicted_label": "neutral"}',
        '["same"]',
        "null",
        "[" * 5000,
        '{"verdict": "same", "predicted_label": "neutral", "x": ' + "9" * 5000 + "}",
    ],
)
def test_anything_else_is_no_verdict(text: str) -> None:
    assert read_verdict(text, LABELS) is None


def test_a_verdict_that_was_cut_off_or_blank_is_a_fault() -> None:
    whole = Completion(said(), truncated=False, model="m", prompt_tokens=1, completion_tokens=1)

    assert verdict_of(whole, LABELS) == Verdict(True, "neutral")
    for bad in (dataclasses.replace(whole, truncated=True), dataclasses.replace(whole, text=" ")):
        found = verdict_of(bad, LABELS)
        assert isinstance(found, RowFault)
        assert found.reason == RowReason.cut_off


def test_a_task_without_labels_has_a_verdict_alone() -> None:
    assert read_verdict('{"verdict": "same"}', ()) == Verdict(True, None)
    assert read_verdict(said(), ()) is None


@given(st.text())
def test_no_text_but_a_verdict_accepts(text: str) -> None:
    """The words of the two forms are not drawn by chance, so whatever is drawn accepts nothing."""
    verdict = read_verdict(text, LABELS)
    assert verdict is None or text.strip().casefold().removesuffix(".") in {"same", "not the same"}


SAME, OTHER_LABEL, DIFFERENT = Verdict(True, "a"), Verdict(True, "b"), Verdict(False, "a")


@pytest.mark.parametrize(
    ("own", "other", "reason"),
    [
        (SAME, SAME, ""),
        (Verdict(True, None), Verdict(True, None), ""),
        (SAME, OTHER_LABEL, "judge_label"),
        (SAME, Verdict(True, None), "judge_label"),
        (SAME, DIFFERENT, "judge_different"),
        (DIFFERENT, SAME, "judge_fails_original"),
        (None, SAME, "judge_unread"),
        (SAME, None, "judge_unread"),
        (RowFault(RowReason.cut_off), None, "judge_cut_off"),
    ],
)
def test_a_rewrite_is_accepted_by_two_verdicts_with_one_label(own: Any, other: Any, reason: str) -> None:
    assert why_not(own, other) == reason


# --- pairs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The man left because the film was dull.", "Because the film was dull, the man left."),
        ("They do not know.", "They don't know."),
        ("It's late.", "It is late."),
        ("Ana lost her keys.", "It is true that Ana lost her keys."),
        ("The sun rose.", "It is true that the sun rose."),
    ],
)
def test_a_paraphrase_by_rule(text: str, expected: str) -> None:
    assert paraphrased(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The door was open.", "The door was not open."),
        ("The door was not open.", "The door was open."),
        ("They don't know.", "They do know."),
        ("Ana lost her keys.", "It is not true that Ana lost her keys."),
    ],
)
def test_a_negation_by_rule(text: str, expected: str) -> None:
    assert negated(text) == expected


def test_a_number_or_a_name_is_exchanged() -> None:
    assert swapped("In 1999 he had 3 dogs.") == "In 2002 he had 3 dogs."
    assert swapped("They met Anna there.") == "They met Miller there."
    assert swapped("They met there.") is None
    assert swapped("Kate left early.") == "Miller left early."
    assert swapped("Although it rained, they left.") is None
    assert swapped("Two dogs barked at ten cats.") == "Seven dogs barked at ten cats."
    assert swapped("The man's eye hurt.") == "The girl's eye hurt."


def test_frames_take_turns_so_that_none_tells_a_kind() -> None:
    for make in (paraphrased, negated):
        assert len({make("Ana lost her keys.", turn).replace("Ana lost her keys", "") for turn in range(10)}) == 5
    assert negated("The man broke his toe.") == "The man never broke his toe."
    assert paraphrased("They sat on the couch.") == "They sat on the sofa."
    assert "After her children" not in paraphrased("The mother needed help looking after her children.")


PREMISES = [
    "My body cast a shadow over the grass.",
    "The woman tolerated her friend's difficult behavior.",
    "The women met for coffee.",
    "The guests of the party hid behind the couch.",
    "The politician lost the election.",
    "I poured water on my sleeping friend.",
    "Two boys skipped school.",
    "The children knocked over a lamp.",
]


def test_short_texts_without_names_in_the_middle_give_pairs_of_each_kind() -> None:
    """As COPA's, which gave none with another name or number."""
    pairs = make_pairs([{"premise": text} for text in PREMISES], "premise", [], most=5)

    assert Counter(pair.kind for pair in pairs) == dict.fromkeys(KINDS, 5)


def test_pairs_are_as_many_of_a_kind_as_rows_give() -> None:
    rows = [{"text": f"The guest {i} was late.", "label": i % 2} for i in range(6)]
    pairs = make_pairs(rows, "text", [], most=4)

    kinds = {pair.kind: [each for each in pairs if each.kind == pair.kind] for pair in pairs}
    assert {kind: len(some) for kind, some in kinds.items()} == dict.fromkeys(
        ("identical", "paraphrased", "negated", "swapped", "other row"), 4
    )
    assert all(pair.text == pair.row["text"] for pair in kinds["identical"])
    assert all(pair.text != pair.row["text"] for pair in pairs if pair.kind != "identical")
    assert all(pair.same == (pair.kind in ("identical", "paraphrased")) for pair in pairs)


def test_no_pair_holds_what_stands_in_the_judges_own_prompt() -> None:
    rows = [{"text": f"The guest {i} was late.", "label": i % 2} for i in range(6)]
    pairs = make_pairs(rows, "text", [Example(rows[0], 0, "Guest 0 came late.")], most=10)

    assert not [pair for pair in pairs if "0" in (pair.text + pair.row["text"]).replace("10", "")]
    assert {pair.kind for pair in pairs} == {"identical", "paraphrased", "negated", "swapped", "other row"}


# --- the gate ---------------------------------------------------------------------------------------------------------

PAIRS = [Pair("identical" if k < 80 else "negated", {"text": str(k)}, str(k), same=k < 80) for k in range(160)]
RULES = OatRephraseConfig()
RIGHT = [k < 80 for k in range(160)]
BIASED = [k < 120 for k in range(160)]  # calls half of the negated pairs the same


def summary(first: list[bool | None], second: list[bool | None]) -> Any:
    read = [tuple(None if each is None else Verdict(each, None) for each in order) for order in (first, second)]
    return summarise(PAIRS, (read[0], read[1]), judge="a" * 64, model="m")


def test_intervals_are_wilsons() -> None:
    right = [k < 80 for k in range(160)]
    right[3] = False
    found = summary(right, right)

    expected = binomtest(79, 80).proportion_ci(method="wilson")
    assert found.sensitivity.share == 79 / 80
    assert math.isclose(found.sensitivity.low, expected.low)
    assert math.isclose(found.sensitivity.high, expected.high)
    assert found.specificity.share == 1.0
    assert math.isclose(found.specificity.high, 1.0)
    assert found.order_points == 0.0


def test_the_lower_of_the_two_orders_counts() -> None:
    found = summary(RIGHT, BIASED)

    assert found.sensitivity.share == 1.0
    assert found.specificity.share == 0.5
    assert found.order_points == 0.25
    assert found.order_points_high > 0.25
    assert [(each.made, each.pairs, each.same) for each in found.kinds] == [
        ("identical", 80, (80, 80)),
        ("negated", 80, (0, 40)),
    ]
    assert len([*faults(found, RULES)]) == 2


def test_the_interval_of_the_order_is_walds_for_paired_shares() -> None:
    """40 pairs change their verdict, all one way."""
    assert summary(RIGHT, BIASED).order_points_high == pytest.approx(
        0.25 + 1.959964 * math.sqrt(40 - 40**2 / 160) / 160
    )


@pytest.mark.parametrize(
    ("keys", "number"),
    [
        ({}, 2),
        ({"gate_share": 0.5}, 1),
        ({"gate_order_points": 0.25}, 1),
        ({"gate_share": 0.5, "gate_order_points": 0.25}, 0),
    ],
)
def test_a_recipe_says_what_is_enough(keys: dict[str, float], number: int) -> None:
    assert len([*faults(summary(RIGHT, BIASED), dataclasses.replace(RULES, **keys))]) == number


def test_a_judge_that_says_the_verdict_named_first_is_refused() -> None:
    """As the embedded model does (spec 3.13)."""
    found = summary([True] * 160, [False] * 160)

    assert found.order_points == 1.0
    assert len([*faults(found, RULES)]) == 3


def test_answers_that_are_no_verdict_accept_nothing() -> None:
    found = summary([None] * 160, [None] * 160)

    assert found.sensitivity.share == 0.0
    assert found.specificity.share == 1.0
    assert [each.unread for each in found.kinds] == [(80, 80), (80, 80)]
    assert [text for text in faults(found, RULES) if "sensitivity" in text]


def test_verdicts_that_were_cut_off_are_told_apart_with_what_to_do(tmp_path: Path) -> None:
    cut: Any = (RowFault(RowReason.cut_off),) * 160
    found, unread = summarise(PAIRS, (cut, cut), judge="a" * 64, model="m"), summary([None] * 160, [None] * 160)

    keep(found, tmp_path)

    assert find(tmp_path, "a" * 64) == found
    assert [(each.unread, each.cut_off) for each in found.kinds] == [((80, 80), (80, 80))] * 2
    assert "320 of 320 verdicts were cut off or blank: raise rewriter.max_tokens (above 512" in remedy(found, RULES)
    assert {each.cut_off for each in unread.kinds} == {(0, 0)}
    assert remedy(unread, RULES) == "Use a stronger model as rewriter.judge_model."
    ends = [[line.partition(" times")[2] for line in judge_test_lines(each)][2:] for each in (found, unread)]
    assert ends == [[", 160 unreadable (160 cut off or blank)"] * 2, [", 160 unreadable"] * 2]


def test_too_few_pairs_prove_nothing() -> None:
    right: Any = tuple(Verdict(pair.same, None) for pair in PAIRS[70:90])
    found = summarise(PAIRS[70:90], (right, right), judge="a" * 64, model="m")

    assert all("at least 60 pairs, got 10" in text for text in faults(found, RULES))
    assert len([*faults(found, RULES)]) == 2


def test_kinds_with_few_pairs_are_named(tmp_path: Path) -> None:
    found = summary([True] * 160, [True] * 160)

    assert few_pairs(found, RULES) == (
        "Fewer than 60 pairs were seen of these kinds: paraphrased 0, swapped 0, other row 0."
    )
    assert few_pairs(found, dataclasses.replace(RULES, gate_pairs=90)).count(" 80") == 2
    keep(found, tmp_path)
    with pytest.raises(EndpointError, match="of these kinds: paraphrased 0"):
        check_gate(tmp_path, "a" * 64, RULES)


def test_a_test_that_root_keeps_at_a_site_is_the_sites(tmp_path: Path, given_by_root: Callable[[], set[Path]]) -> None:
    file = keep(summary([True] * 160, [True] * 160), tmp_path / "new")

    assert file in given_by_root()
    assert given_by_root() == {*tmp_path.rglob("*")}


def test_a_test_on_few_pairs_does_not_take_the_place_of_one_that_was_passed(tmp_path: Path) -> None:
    right = [k < 80 for k in range(160)]
    good = summary(right, right)
    answers: Any = tuple(Verdict(pair.same, None) for pair in PAIRS[70:90])
    short = summarise(PAIRS[70:90], (answers, answers), judge="a" * 64, model="m")
    keep(good, tmp_path, min_pairs=60)

    keep(short, tmp_path, min_pairs=60)

    assert check_gate(tmp_path, "a" * 64, RULES) == good
    assert find_test(tmp_path, judge_test_digest(short)) == short
    keep(short, tmp_path)
    with pytest.raises(EndpointError, match=r"60 pairs, got 10.*Give fedzo rephrase judge-test more rows"):
        check_gate(tmp_path, "a" * 64, RULES)


def test_the_gate_asks_for_a_test_that_was_passed(tmp_path: Path) -> None:
    right = [k < 80 for k in range(160)]
    good, bad = summary(right, right), summary([True] * 160, [True] * 160)
    with pytest.raises(EndpointError, match="judge-test"):
        check_gate(tmp_path, "a" * 64, RULES)

    keep(good, tmp_path)
    assert find(tmp_path, "a" * 64) == good == check_gate(tmp_path, "a" * 64, RULES)

    keep(bad, tmp_path)
    with pytest.raises(EndpointError, match=r"specificity must be at least 95%, got 0%.*gate=false"):
        check_gate(tmp_path, "a" * 64, RULES)
    assert check_gate(tmp_path, "a" * 64, dataclasses.replace(RULES, gate=False)) == bad

    file = next((tmp_path / "judges").iterdir())
    assert file.stat().st_mode & 0o077 == 0
    whole = file.read_text()
    for damaged in (whole.replace('"share":1.0', '"share":1.5').encode(), b"\xff"):
        file.write_bytes(damaged)
        with pytest.raises(ConfigError, match="judge-test again"):
            find(tmp_path, "a" * 64)


@pytest.mark.slow
def test_the_gate_refuses_the_embedded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no judge (spec 3.13): left to itself it gives no verdict at all."""
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
