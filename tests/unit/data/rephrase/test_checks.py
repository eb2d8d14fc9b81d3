"""The checks of a rewriter's answer: hand-written answers with the fault that a reader would name, and properties."""

from __future__ import annotations

import time
from dataclasses import replace
from operator import itemgetter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedzo.data.preprocess.rephrase import checks as checks_module
from fedzo.data.preprocess.rephrase import figures as figures_module
from fedzo.data.preprocess.rephrase.checks import Checked, check, leaking_labels, lost_names
from fedzo.data.preprocess.rephrase.config import Check, OatRephraseConfig, Style
from fedzo.data.preprocess.rephrase.figures import SetFigures
from fedzo.data.preprocess.rephrase.prompts import Prompts
from fedzo.data.preprocess.rephrase.tasks import TASKS, RephraseTask
from fedzo.data.words import words

PROMPT = "Rewrite the premise so that its meaning stays and nothing is added that hints at the answer."
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60).filter(lambda text: text.strip())


def prompts_of(task: RephraseTask, told: str = PROMPT) -> Prompts:
    """Prompts with words of our own in the instructions."""
    return Prompts(Style.plain, replace(task, about=told), task.column)


def fault(rewrite: str, original: str, task: str = "cb", label: int | None = 0, **row: Any) -> Check | None:
    return checked(rewrite, original, task, label, **row).fault


def checked(rewrite: str, original: str, task: str, label: int | None, **row: Any) -> Checked:
    row = {TASKS[task].column: original, "hypothesis": "it rained", **row}
    return check(rewrite, row, label, prompts=prompts_of(TASKS[task]), rules=OatRephraseConfig())


def cleaned(answer: str, original: str) -> str:
    found = checked(answer, original, "cb", 0)
    assert found.fault is None
    return found.text


@pytest.mark.parametrize(
    "answer",
    [
        "  The bus was late today.\n",
        '"The bus was late today."',
        "\u201cThe bus was late today.\u201d",
        "Here is the rephrased premise: The bus was late today.",
        'Certainly, here\'s the rephrased premise:\n\n"The bus was late today."',
        "Sure!\nThe bus was late today.",
        "Premise: The bus was late today.",
        "**Rewritten premise:** The bus was late today.",
        "Rephrased: The bus was late today.",
    ],
)
def test_what_surrounds_an_answer_is_taken_off(answer: str) -> None:
    assert cleaned(answer, "Today the bus came late.") == "The bus was late today."


@pytest.mark.parametrize(
    "answer",
    ["Certainly. The bus was late.", "Here the bus was late.", "Okay, the bus was late.", "She said: late bus."],
)
def test_a_word_alone_is_no_lead_in(answer: str) -> None:
    assert cleaned(answer, "Yeah, the bus came late.") == answer


@pytest.mark.parametrize(
    ("answer", "original", "expected"),
    [
        ("", "It rained.", Check.empty),
        (" None. ", "It rained.", Check.empty),
        ("N/A", "It rained.", Check.empty),
        ("Here is the rephrased premise The bus was late.", "Today the bus came late.", Check.lead_in),
        ("I'm sorry, but I can't help with that.", "Today the bus came very late.", Check.lead_in),
        ('"The bus was late today.', "Today the bus came late.", Check.quotes),
        ('"Late," he said, "very late."', "He said it was late, very late.", Check.quotes),
        ("The bus\nwas late.", "Today the bus came late.", Check.line_break),
        ("The bus\nwas\nlate.", "Today the bus\ncame late.", Check.line_break),
        ("Late.", "Today the bus came late because of the snow.", Check.length),
        ("a b c d e f g h i j k", "Late bus.", Check.length),
        ("The bus was late was late was late.", "Today the bus came very late.", Check.loop),
        ("The bus came late late late late.", "Today the bus came very late.", Check.loop),
        ("Nothing is added that hints at the answer here.", "Today the bus came very late.", Check.echo),
        ("The bus had people on it.", "The bus had ten people on it.", Check.numbers),
        ("The bus had 11 people on it.", "The bus had ten people on it.", Check.numbers),
        ("The bus had 3 people on it.", "The bus had people on it.", Check.numbers),
        ("It had 5 degrees outside.", "Outside it had -5 degrees.", Check.numbers),
        ("It had -5 degrees outside.", "Outside it had 5 degrees.", Check.numbers),
        ("It had 5 degrees outside.", "Outside it had \u22125 degrees.", Check.numbers),
        ("It had 1,5 degrees outside.", "Outside it had -1,5 degrees.", Check.numbers),
        ("It fell to 5 million.", "It sank (-5 million).", Check.numbers),
        ("It had -20 and 5 degrees.", "It had 20 and -5 degrees.", Check.numbers),
        ("It had five degrees outside.", "Outside it had minus five degrees.", Check.numbers),
        ("Yes, the bus came late.", "Today the bus came late.", Check.leak),
    ],
)
def test_an_answer_has_the_fault_that_a_reader_names(answer: str, original: str, expected: Check) -> None:
    assert fault(answer, original) == expected


@pytest.mark.parametrize(
    ("answer", "original"),
    [
        ("The bus had 10 people.", "There were ten people on the bus."),
        ("Some 21 buses left.", "Twenty-one buses left."),
        ("It cost 3000 euros.", "It cost 3,000 euros."),
        ("It cost three thousand euros.", "It cost 3,000 euros."),
        ("It cost 1,500,000 euros.", "It cost 1.5 million euros."),
        ("It was the 21st bus.", "It was the twenty-first bus."),
        ("It fell by ten percent.", "It fell by 10%."),
        ("It took 105 days.", "It took one hundred and five days."),
        ("It ended in 1999.", "It ended in nineteen ninety-nine."),
        ("It had -5 degrees outside.", "Outside it had \u22125 degrees."),
        ("It sank to -5,000,000.", "It fell (-5 million)."),
        ("It had minus five degrees outside.", "Outside it had -5 degrees."),
        ("It had minus 5 degrees outside.", "Outside it had -5 degrees."),
        ("It ran from 2010 to 2015.", "It ran 2010-2015."),
        ("The 16 of F-16 is a number.", "A number is the 16 of F-16."),
        ("Nobody knew it.", "No one knew it."),
        ("Initially it was new.", "At first it was new."),
        ("I love you very much.", "I do love you \U0001f642 very much."),
        ("\u6211\u975e\u5e38\u7231\u4f60\u4eec", "\u6211\u5f88\u7231\u4f60\u4eec\u5927\u5bb6"),
        ("I\u0307stanbul is big.", "\u0130stanbul is large."),
    ],
)
def test_the_same_in_another_form_is_no_fault(answer: str, original: str) -> None:
    assert fault(answer, original, label=2) is None


def test_a_rewrite_may_be_six_words_longer_however_short_the_original() -> None:
    assert fault("a b c d e f g h", "x y") is None
    assert fault("a b c d e f g h i", "x y") == Check.length


@pytest.mark.parametrize(
    ("keys", "kept", "refused"),
    [
        ({}, (4, 20), (3, 21)),
        ({"min_length_ratio": 0.5, "max_length_ratio": 1.0, "max_extra_words": 2}, (5, 12), (4, 13)),
    ],
)
def test_a_rewrite_of_ten_words_has_as_many_as_the_recipe_says(
    keys: dict[str, Any], kept: tuple[int, int], refused: tuple[int, int]
) -> None:
    def found(count: int) -> Check | None:
        row = {"premise": " ".join(f"{chr(97 + i)}x" for i in range(10)), "hypothesis": "it rained"}
        text = " ".join(f"n{chr(97 + i)}x" for i in range(count))
        return check(text, row, 0, prompts=prompts_of(TASKS["cb"]), rules=replace(OatRephraseConfig(), **keys)).fault

    assert [found(count) for count in kept] == [None, None]
    assert [found(count) for count in refused] == [Check.length, Check.length]


def test_an_anchor_must_stay_as_a_whole_word() -> None:
    assert fault("They RAN, home fast.", "He ran home fast.", "wic", word="ran") is None
    assert fault("They ranged home fast.", "He ran home fast.", "wic", word="ran") == Check.anchors
    assert fault("He ran home fast.", "He ran home fast.", "wic", word="run") == Check.anchors, "an unusable row"


@pytest.mark.parametrize(
    "answer",
    [
        'new premise: "The bus came late."',
        "New text: The bus came late.",
        "Updated premise: The bus came late.",
        "Premise (rewritten): The bus came late.",
        "**New premise:** The bus came late.",
        "Sure: The bus came late.",
        "Here you go: The bus came late.",
        "Here's my shorter version: The bus came late.",
        "Revised premise: The bus came late.",
    ],
)
def test_the_prompts_last_line_and_a_short_opener_are_taken_off(answer: str) -> None:
    found = checked(answer, "The bus came late.", "copa", 0, choice1="a", choice2="b", question="cause")

    assert (found.text, found.fault) == ("The bus came late.", None)


@pytest.mark.parametrize(
    "answer",
    [
        "Sorry, I can't help with that request.",
        '{"premise": "The bus was late."}',
        "<premise>The bus was late.</premise>",
        "The bus was late.<|im_end|>",
        "The bus was late.\x00",
        "Right answer: the bus was late.",
        "Question: the bus was late.",
    ],
)
def test_what_is_no_text_of_a_row_is_rejected(answer: str) -> None:
    row = {"choice1": "a", "choice2": "b", "question": "cause"}

    assert fault(answer, "Today the bus came late.", "copa", 0, **row) == Check.lead_in


@pytest.mark.parametrize(
    "answer",
    [
        "Here is the director's version: longer and worse.",
        "Revised estimates: growth is weak.",
        "This is a fine version of the story.",
    ],
)
def test_words_that_a_lead_in_may_have_are_kept_in_a_text(answer: str) -> None:
    found = checked(answer, "The story is a fine one, growth or not.", "sst2", None)

    assert (found.text, found.fault) == (answer, None)


def test_numbers_side_by_side_are_two() -> None:
    told = "In 2000 12 people died in the fire."

    assert fault("In 2012 people died in the fire.", told, "sst2", None) == Check.numbers
    assert fault("12 people died in the fire in 2000.", told, "sst2", None) is None
    assert (
        fault("In 2008, 20 million came to the place.", "20 million came to the place in 2008.", "sst2", None) is None
    )


def test_new_words_of_the_right_choice_alone_are_a_leak() -> None:
    row = {"choice1": "He was sneezing.", "choice2": "He fell down."}

    assert fault("Sneezed on, the man got tissues.", "The man got tissues.", "copa", 0, **row) == Check.leak
    assert fault("Sneezed on, the man got tissues.", "The man got tissues.", "copa", 1, **row) is None


@pytest.mark.parametrize("task", ["copa", "cb", "rte", "boolq", "multirc", "wic", "wsc", "sst2", "ag_news"])
def test_a_rewriter_that_always_writes_the_label_is_caught(task: str) -> None:
    known = TASKS[task]
    text = "Alpha beta gamma delta epsilon zeta eta theta"
    row = {"choice1": "red fox", "choice2": "blue bird", "word": "beta", "span1_text": "alpha", "span2_text": "eta"}
    for label, name in enumerate(known.labels):
        told = name.format_map(row)
        for right in range(len(known.labels)):  # a wrong answer is no text of a row either
            assert fault(f"{text} {told}", text, task, right, **row) == Check.leak
        known_inside = f"Iota {told} kappa {text}"
        assert fault(f"{known_inside} {told}", known_inside, task, label, **row) == Check.leak


def test_a_written_answer_may_not_be_written_again() -> None:
    assert fault("The tower is in Paris. Paris", "The tower is in Paris.", "squad", None, answer="Paris") == Check.leak


def checked_as(task: RephraseTask, rewrite: str, row: dict[str, Any], label: int | None) -> Check | None:
    return check(rewrite, row, label, prompts=prompts_of(task), rules=OatRephraseConfig()).fault


@pytest.mark.parametrize(
    ("rewrite", "expected"), [("A bus came late today.", None), ("The bus came late today: B", Check.leak)]
)
def test_an_article_is_no_answer_by_letter(rewrite: str, expected: Check | None) -> None:
    task = replace(TASKS["sst2"], labels=("A", "B"), answer_words=(("a",), ("b",)))

    assert checked_as(task, rewrite, {"text": "Today the bus came late."}, 0) == expected


@pytest.mark.parametrize(
    ("rewrite", "expected"),
    [("Who came to the house, Anna?", Check.leak), ("Did anybody come to the house?", None)],
)
def test_the_column_of_a_written_answer_is_the_tasks(rewrite: str, expected: Check | None) -> None:
    task = replace(TASKS["squad"], anchors=(), written=("reply",))
    row = {"context": "Who came to the house?", "reply": "Anna", "answer": "anybody"}

    assert checked_as(task, rewrite, row, None) == expected


SEVERAL = {"question": "Where?", "answer": ["Paris", "the capital of France"]}


@pytest.mark.parametrize(
    ("rewrite", "expected"),
    [
        ("You can see the tower in Paris.", None),  # the answer that is trained on stays, the others need not
        ("You see the tower in the capital of France.", Check.anchors),
        ("In Paris stands the tower, the capital of France.", Check.leak),
    ],
)
def test_of_several_written_answers_the_first_must_stay_and_none_may_be_brought_in(
    rewrite: str, expected: Check | None
) -> None:
    assert fault(rewrite, "The tower is in Paris.", "squad", None, **SEVERAL) == expected


def test_the_answers_in_a_field_of_a_column_are_the_tasks() -> None:
    task = replace(TASKS["squad"], anchors=("answers.text",), written=("answers.text",))
    row = {"context": "The tower is in Paris.", "answers": {"text": ["Paris", "the capital of France"]}}

    assert checked_as(task, "You can see the tower in Paris.", row, None) is None
    assert checked_as(task, "You can see the tower there.", row, None) == Check.anchors


def test_the_first_fault_in_the_order_of_the_checks_is_told_and_only_wanted_ones() -> None:
    row = {"premise": "The bus had ten people on it."}
    answer = "The\nbus"
    prompts = prompts_of(TASKS["cb"])
    found = []
    left = list(Check)
    while (result := check(answer, row, 0, prompts=prompts, rules=OatRephraseConfig(checks=left)).fault) is not None:
        found.append(result)
        left.remove(result)

    assert found == [Check.line_break, Check.length, Check.numbers]
    cut = check(answer, row, 0, prompts=prompts, rules=OatRephraseConfig(), truncated=True)
    assert cut.fault == Check.truncated


def test_names_that_changed_are_told_but_are_no_fault() -> None:
    rewrite, original = "Then Mary met the Queen at noon.", "Later Mary met John at noon."

    assert fault(rewrite, original) is None
    assert lost_names(rewrite, original) == ("John", "Queen")


@pytest.mark.parametrize("owner", ["DOG'S", "Dog's", "DOG\u2019S"])
def test_a_possessive_is_its_owners_name_in_capitals_too(owner: str) -> None:
    original = f"He saw the {owner} bone."

    assert lost_names(original, original) == lost_names("He saw the bone of the DOG.", original) == ()
    assert lost_names("He saw the bone.", original) == (owner[:3],)


@given(TEXT)
def test_a_text_that_stays_as_it_is_loses_no_name(text: str) -> None:
    assert lost_names(text, text) == ()


@given(TEXT)
def test_an_untouched_original_has_no_fault(text: str) -> None:
    found = check(text, {"premise": text}, 0, prompts=prompts_of(TASKS["cb"], text), rules=OatRephraseConfig())

    assert found.fault is None or not found.text


@given(st.integers(0, 10**9), st.sampled_from(["the cat saw {} dogs", "{} is it", "it was {}"]))
def test_a_number_that_is_added_or_lost_is_always_caught(number: int, text: str) -> None:
    with_it, without = text.format(f"{number:,}"), text.format("some")

    assert fault(with_it, without, label=2) == Check.numbers
    assert fault(without, with_it, label=2) == Check.numbers


@given(TEXT, TEXT)
def test_any_pair_of_texts_is_judged(answer: str, original: str) -> None:
    assert fault(answer, original) in (None, *Check)


@pytest.mark.parametrize(
    "piece", ["a ", "1,", "1,234", '"', "a'", "hundred ", "x\n", "\u6211", "\u0301", "sure -", "`"]
)
def test_a_megabyte_is_read_or_refused_within_seconds(piece: str) -> None:
    began = time.process_time()
    fault(piece * (1_000_000 // len(piece)), "The bus had ten people on it.")

    assert time.process_time() - began < 2


@settings(max_examples=30)
@given(st.lists(st.sampled_from(["sneezing", "falling", "he", "ran"]), min_size=1, max_size=5))
def test_figures_count_leaks_both_ways(added: list[str]) -> None:
    row = {"premise": "The man got tissues", "choice1": "was sneezing", "choice2": "was falling", "label": 0}
    found = SetFigures.of(
        [(row, " ".join([row["premise"], *added]))], task=TASKS["copa"], column="premise", label_of=itemgetter("label")
    )

    assert (found.leaks_right, found.leaks_wrong) == ("sneezing" in added, "falling" in added)
    assert (found.words_before, found.words_after) == (4, 4 + len(added))


def test_an_answer_of_several_words_leaks_as_a_whole() -> None:
    task = replace(TASKS["sst2"], answer_words=(("very bad", "a"), ("very good", "")))
    rewrites = ["It is very bad, not very good.", "Very, very good! A bad thing.", "Very well it runs, bad or good."]

    def leaks(original: str) -> tuple[int, int]:
        pairs = [({"text": original, "label": 1}, rewrite) for rewrite in rewrites]
        found = SetFigures.of(pairs, task=task, column="text", label_of=itemgetter("label"))
        return found.leaks_right, found.leaks_wrong

    assert leaks("It runs.") == (2, 1)
    assert leaks("It runs very well, and very good it is not.") == (0, 1)


PIECES = st.lists(st.sampled_from(["red", "fox", "hen", "a"]), max_size=6).map(" ".join)


@settings(max_examples=200)
@given(PIECES, PIECES, st.lists(st.lists(PIECES, max_size=3), min_size=2, max_size=4))
def test_leaks_are_answers_of_one_label_that_stand_in_the_rewrite_alone(
    text: str, original: str, answers: list[list[str]]
) -> None:
    """The oracle looks for each answer between spaces, in the texts as they are."""
    task = replace(TASKS["sst2"], answer_words=tuple(map(tuple, answers)))

    def stands(answer: str, where: str) -> bool:
        return f" {answer} " in f" {where} "

    expected = {
        label
        for label, own in enumerate(answers)
        for answer in own
        if not {*answer.split()} <= {"a"}  # also a blank one
        and not any(answer in others for other, others in enumerate(answers) if other != label)
        and stands(answer, text)
        and not stands(answer, original)
    }

    assert leaking_labels(text.split(), original.split(), row={}, task=task) == expected


def test_figures_of_a_task_with_many_labels_read_no_text_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """What belongs to one label alone is found once a task; then each row costs its own two texts."""
    read: list[str] = []
    for module in (checks_module, figures_module):
        monkeypatch.setattr(module, "words", lambda text: read.append(text) or words(text))

    def count(num_labels: int) -> list[str]:
        task = replace(TASKS["sst2"], answer_words=tuple((f"intent {number}",) for number in range(num_labels)))
        for _ in range(2):
            read.clear()
            rows = [({"text": "It runs.", "label": 1}, "It ran: intent 1.")] * 5
            found = SetFigures.of(rows, task=task, column="text", label_of=itemgetter("label"))
            assert (found.leaks_right, found.leaks_wrong) == (5, 0)
        return [*read]

    assert count(2) == count(150) == ["It runs.", "It ran: intent 1."] * 5


def test_figures_tell_how_many_words_of_the_other_field_are_found_by_label() -> None:
    rows = [
        {"premise": "a b c", "hypothesis": "a b", "label": 0},
        {"premise": "x y", "hypothesis": "x q r s", "label": 1},
    ]
    found = SetFigures.of(
        zip(rows, ["a z", "x q"], strict=True), task=TASKS["cb"], column="premise", label_of=itemgetter("label")
    )

    assert {k: (v.rows, v.before, v.after) for k, v in found.overlap.items()} == {0: (1, 1, 0.5), 1: (1, 0.25, 0.5)}
    assert SetFigures.of([], task=TASKS["cb"], column="premise", label_of=itemgetter("label")).words_after == 0
