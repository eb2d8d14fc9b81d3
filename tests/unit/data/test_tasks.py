"""Golden prompts of every shipped task, and what a template may and may not do."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from fedzo.config.plugins import conf_dir
from fedzo.data.config import Loss, TaskConfig, TaskKind
from fedzo.data.tasks import columns_used, has_labels, label_index, num_labels, render, right_label, template_faults
from fedzo.errors import ConfigError

Shipped = Callable[[str], TaskConfig]

# name -> row, prompt, answers, index of the right answer; written out by hand from MeZO's templates
GOLDEN: dict[str, tuple[dict[str, Any], str, list[str], int]] = {
    "sst2": ({"text": " a fine film . ", "label": 1}, "a fine film . It was", [" terrible", " great"], 1),
    "rotten_tomatoes": (
        {"text": "a dull film .", "label": 0},
        "Review: a dull film .\nSentiment: The movie was",
        [" terrible", " great"],
        0,
    ),
    "rte": (
        {"premise": "Ann sold her car.", "hypothesis": "Ann had a car.", "label": 0},
        'Ann sold her car.\nDoes this mean that "Ann had a car." is true? Yes or No?\n',
        ["Yes", "No"],
        0,
    ),
    "boolq": (
        {"passage": "Salt melts ice.", "question": "does salt melt ice", "label": 1},
        "Salt melts ice. Does salt melt ice?",
        [" No", " Yes"],
        1,
    ),
    "wic": (
        {"word": "bank", "sentence1": "The bank closed.", "sentence2": "They sat on the bank.", "label": 0},
        'Does the word "bank" have the same meaning in these two sentences? Yes, No?\n'
        "The bank closed.\nThey sat on the bank.\n",
        ["No", "Yes"],
        0,
    ),
    "wsc": (
        {"text": "Tom thanked Ben. He smiled.", "span1_text": "Ben", "span2_text": "He", "label": 1},
        'Tom thanked Ben. He smiled.\nIn the previous sentence, does the pronoun "he" refer to Ben? Yes or No?\n',
        ["No", "Yes"],
        1,
    ),
    "cb": (
        {"premise": "Did it rain? I do not know.", "hypothesis": "it rained", "label": 2},
        'Suppose Did it rain? I do not know. Can we infer that "it rained"? Yes, No, or Maybe?\n',
        ["Yes", "No", "Maybe"],
        2,
    ),
    "copa": (
        {
            "premise": "The road was wet.",
            "choice1": "It had rained.",
            "choice2": "I forgot my hat.",
            "question": "cause",
            "label": 0,
        },
        "The road was wet because",
        [" it had rained.", " I forgot my hat."],
        0,
    ),
    "multirc": (
        {"paragraph": "Bo ate two pears.", "question": "What did Bo eat?", "answer": "pears", "label": 1},
        'Bo ate two pears.\nQuestion: What did Bo eat?\nI found this answer "pears". Is that correct? Yes or No?\n',
        ["No", "Yes"],
        1,
    ),
    "ag_news": (
        {"text": "Shares fell.", "label": 2},
        "Shares fell. The news above is about",
        [" world", " sports", " business", " tech"],
        2,
    ),
    "yelp": ({"text": "Cold soup", "label": 0}, "Cold soup . It is", [" negative", " positive"], 0),
    "squad": (
        {"context": "Oslo is in Norway.", "question": "Where is Oslo?", "answer": "Norway"},
        "Oslo is in Norway.\nQuestion: Where is Oslo?\nAnswer:",
        [" Norway\n"],
        0,
    ),
    "instruct": ({"prompt": "Name a colour.", "response": "Red."}, "Name a colour.", ["Red."], 0),
    "chat": (
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Hi."},
                {"role": "assistant", "content": "Yes?"},
                {"role": "user", "content": "Name a colour."},
                {"role": "assistant", "content": "Red."},
            ]
        },
        "user: Hi.\nassistant: Yes?\nuser: Name a colour.\nsystem: Be brief.",
        ["Red."],
        0,
    ),
    "alpaca": (
        {"instruction": "Translate.", "input": "chat", "output": "cat"},
        "Translate.\n\nchat",
        ["cat"],
        0,
    ),
}


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_the_shipped_prompt_is_the_golden_one(name: str, shipped_task: Shipped) -> None:
    row, prompt, answers, label = GOLDEN[name]

    rendered = render(row, shipped_task(name))

    assert (rendered.prompt, list(rendered.answers), rendered.label) == (prompt, answers, label)


def test_every_shipped_task_has_a_golden_prompt() -> None:
    shipped = {path.stem for path in (conf_dir() / "task").glob("*.yaml")}

    assert shipped == {*GOLDEN, "custom"}


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_a_shipped_task_uses_exactly_the_columns_of_its_golden_row(name: str, shipped_task: Shipped) -> None:
    assert columns_used(shipped_task(name)) == tuple(sorted(GOLDEN[name][0]))


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_a_shipped_task_is_named_as_its_file_and_written_answers_train_with_lm(
    name: str, shipped_task: Shipped
) -> None:
    task = shipped_task(name)

    assert task.name == name
    assert (task.loss is Loss.lm) == (task.kind is not TaskKind.candidates)


def test_the_custom_task_waits_for_a_template(shipped_task: Shipped) -> None:
    assert shipped_task("custom") == TaskConfig(name="custom")


def test_copa_effects_use_so_and_a_question_with_its_mark_keeps_one(shipped_task: Shipped) -> None:
    effect = {"premise": "He ran", "choice1": "He Won.", "choice2": "I won.", "question": "effect", "label": "1"}
    asked = {"passage": "P.", "question": "Is it?", "label": 0}

    copa, boolq = render(effect, shipped_task("copa")), render(asked, shipped_task("boolq"))

    assert (copa.prompt, copa.answers, copa.label) == ("He ran so", (" he Won.", " I won."), 1)
    assert (boolq.prompt, boolq.label) == ("P. Is it?", 0)


def test_an_alpaca_row_without_input_is_its_instruction(shipped_task: Shipped) -> None:
    row = {"instruction": "Sing.", "input": "", "output": "La."}

    assert render(row, shipped_task("alpaca")).prompt == "Sing."


def test_the_reference_is_the_answer_without_outer_white_space(shipped_task: Shipped) -> None:
    assert render(GOLDEN["squad"][0], shipped_task("squad")).references == ("Norway",)


CHOICE = TaskConfig(name="mine", template="{text}:", candidates=[" no", " yes"])


@pytest.mark.parametrize(("value", "index"), [(0, 0), (1, 1), ("1", 1), (" 0 ", 0), (1.0, 1), ("1.0", 1)])
def test_an_index_may_be_a_number_or_numeric_text(value: object, index: int) -> None:
    assert label_index({"label": value}, CHOICE) == index


@pytest.mark.parametrize("labels", [["neg", "pos"], [" neg", " pos "]])
@pytest.mark.parametrize(("value", "index"), [("neg", 0), (" pos ", 1)])
def test_a_label_may_be_a_listed_value(value: str, index: int, labels: list[str]) -> None:
    assert label_index({"label": value}, replace(CHOICE, labels=labels)) == index


def test_a_listed_value_may_be_a_word_that_stands_for_nothing_elsewhere() -> None:
    countries = replace(CHOICE, labels=["NA", "none"])

    assert [render({"text": "x", "label": value}, countries).label for value in ("NA", "none")] == [0, 1]


def test_a_row_whose_answer_is_written_has_no_label() -> None:
    row = {"text": "x", "label": 1}

    assert right_label(row, CHOICE) == 1
    assert right_label(row, replace(CHOICE, kind=TaskKind.generation)) is None


def test_listed_values_go_before_indices() -> None:
    stars = replace(CHOICE, labels=["1", "2"])

    assert [label_index({"label": value}, stars) for value in (1, "2")] == [0, 1]


@pytest.mark.parametrize("value", [2, -1, "yes", 0.5, "nan", float("inf"), [1], ""])
def test_a_label_that_is_no_index_is_refused_with_the_candidates_listed(value: object) -> None:
    with pytest.raises(ConfigError, match=r"column 'label' must hold an index \(0 to 1\) of .*\[' no', ' yes'\], got "):
        label_index({"label": value}, CHOICE)


def test_a_label_outside_the_listed_values_is_refused_with_the_values_listed() -> None:
    with pytest.raises(ConfigError, match=r"one of task.labels \['neg', 'pos'\], got 'great'"):
        label_index({"label": "great"}, replace(CHOICE, labels=["neg", "pos"]))


def test_a_value_is_never_read_as_a_template() -> None:
    row = {"text": "{label} {text} {0.__class__}", "label": 1}

    assert render(row, CHOICE).prompt == "{label} {text} {0.__class__}:"


def test_braces_that_name_no_column_are_plain_text() -> None:
    task = replace(CHOICE, template='{{text}} {} { text } {"a": 1} {text!r}')

    assert render({"text": "T", "label": 0}, task).prompt == '{T} {} { text } {"a": 1} {text!r}'


def test_an_attribute_in_a_template_is_only_a_column_name() -> None:
    task = replace(CHOICE, template="{text.__class__}")

    with pytest.raises(ConfigError, match=r"needs a column 'text\.__class__'"):
        render({"text": "T", "label": 0}, task)


def test_a_column_name_may_hold_spaces_and_hyphens() -> None:
    task = replace(CHOICE, template="{Review Text} {a-b}")

    assert render({"Review Text": "x", "a-b": 2, "label": 0}, task).prompt == "x 2"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"body": "x", "label": 0}, "task.template needs a column 'text', the columns there are: body, label"),
        ({"text": "x", "gold": 0}, "task.label needs a column 'label', the columns there are: text, gold"),
        ({"text": None, "label": 0}, r"column 'text' \(task.template\) is empty \(null\)"),
        ({"text": ["x"], "label": 0}, r"column 'text' \(task.template\) must hold text or a number, got list"),
        ({"text": "x", "label": None}, r"column 'label' \(task.label\) is empty \(null\)"),
    ],
)
def test_a_row_that_does_not_fit_is_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        render(row, CHOICE)


def test_a_blank_answer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"an answer of task 'mine' is blank: ' '"):
        render({"text": "x", "label": 0}, replace(CHOICE, candidates=["yes", " "]))


def test_an_unknown_derivation_lists_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"one of alpaca, boolq, copa, wsc or null, got 'os.system'"):
        render({"text": "x", "label": 0}, replace(CHOICE, derive="os.system"))


def test_a_copa_question_of_another_kind_is_refused(shipped_task: Shipped) -> None:
    row = GOLDEN["copa"][0] | {"question": "why"}

    with pytest.raises(ConfigError, match="must be cause or effect, got 'why'"):
        render(row, shipped_task("copa"))


def test_a_column_that_a_derivation_reads_must_be_there(shipped_task: Shipped) -> None:
    with pytest.raises(ConfigError, match=r"task.derive=copa needs a column 'premise', the columns there are: label"):
        render({"label": 0}, shipped_task("copa"))


WRITTEN = TaskConfig(name="mine", kind=TaskKind.generation, template="{q}", answer=" {a}\n")


@pytest.mark.parametrize(
    "value",
    [
        *("", " \n", "nan", "NaN", "<NA>", " nat ", "\\N", " NA ", "#N/A", "#NAME?", "#REF!", "#DIV/0!"),
        *(float("nan"), float("inf"), None),
    ],
)
@pytest.mark.parametrize(
    ("task", "row", "column", "key"),
    [
        (CHOICE, {"text": "x", "label": 0}, "text", "task.template"),
        (replace(CHOICE, candidates=["{text}", "{b}"]), {"text": "x", "b": "y", "label": 0}, "b", "task.candidates"),
        (WRITTEN, {"q": "x", "a": "y"}, "a", "task.answer"),
        (
            replace(WRITTEN, answer="{response}", derive="alpaca"),
            {"input": "i", "output": "o"},
            "instruction",
            "alpaca",
        ),
    ],
)
def test_a_value_that_nobody_wrote_is_refused_wherever_it_fills_a_text(
    task: TaskConfig, row: dict[str, Any], column: str, key: str, value: object
) -> None:
    with pytest.raises(ConfigError, match=rf"column '{column}' \([\w.=]*{key}\) .*(Fill it|fill it|remove the row)"):
        render(row | {column: value}, task)


@pytest.mark.parametrize("word", ["Na", "na", "NA 5", "#name"])
def test_a_text_that_only_looks_like_a_missing_value_is_one(word: str) -> None:
    assert render({"q": word, "a": word}, WRITTEN).prompt == word


@pytest.mark.parametrize("word", ["None", "null", "N/A"])
def test_a_word_for_nothing_may_be_an_answer_but_no_prompt(word: str) -> None:
    assert render({"q": "How many?", "a": word}, WRITTEN).references == (word,)
    with pytest.raises(ConfigError, match=rf"column 'q' \(task.template\) holds '{word}', which stands for a missing"):
        render({"q": word, "a": "x"}, WRITTEN)


TEXTS = ["Denver Broncos", "the Broncos ", 7]


@pytest.mark.parametrize(
    ("answer", "row"),
    [
        (" {a}\n", {"a": TEXTS}),
        (" {a.text}\n", {"a": {"text": TEXTS, "answer_start": [0, 3, 5]}}),
        (" {a.text}\n", {"a": [{"text": text, "answer_start": 0} for text in TEXTS]}),
        (" {a.text}\n", {"a.text": TEXTS, "a": {"text": ["another column"]}}),
    ],
)
def test_a_column_may_list_several_right_answers(answer: str, row: dict[str, Any]) -> None:
    rendered = render({"q": "Who won?", **row}, replace(WRITTEN, answer=answer))

    assert rendered.answers == (" Denver Broncos\n",)
    assert rendered.references == ("Denver Broncos", "the Broncos", "7")
    assert columns_used(replace(WRITTEN, answer=answer)) == tuple(sorted(("q", answer.strip(" {}\n"))))


def test_what_stands_around_the_answer_is_part_of_each() -> None:
    row = {"q": "How far?", "a": ["3", "three"], "unit": "km"}

    assert render(row, replace(WRITTEN, answer="{a} {unit}, {a}!")).references == ("3 km, 3!", "three km, three!")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"a": []}, r"column 'a' \(task.answer\) lists no answer: \[\]. Fill it or remove the row"),
        ({"a": ["x", " "]}, r"column 'a' \(task.answer\) is blank: ' '"),
        ({"a": ["x", None]}, r"column 'a' \(task.answer\) is empty \(null\)"),
        ({"a": ["x", "NaN"]}, r"column 'a' \(task.answer\) holds 'NaN', which stands for a missing value"),
        ({"a": [["x"]]}, r"column 'a' \(task.answer\) must hold text or a number, got list. Flatten it first"),
        (
            {"a": {"text": ["x"]}},
            r"column 'a' \(task.answer\) must .*, got dict. Name one of its fields, as in \{a.text\}",
        ),
        ({"a": [{"text": "x"}]}, r"column 'a' \(task.answer\) must .*, got dict. Name one of its fields"),
        ({"a": "x", "q": ["y"]}, r"column 'q' \(task.template\) must hold text or a number, got list"),
        ({"a": "x", "q": {"text": "y"}}, r"column 'q' \(task.template\) must .*, got dict. Flatten it first"),
    ],
)
def test_a_list_of_answers_must_be_one_of_texts(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        render({"q": "Who?", **row}, WRITTEN)


@pytest.mark.parametrize("inside", [{"texts": ["x"]}, [{"text": "x"}, {}], "x", None])
def test_a_field_that_is_not_there_is_a_column_that_is_missing(inside: object) -> None:
    with pytest.raises(ConfigError, match=r"task.answer needs a column 'a.text', the columns there are: q, a"):
        render({"q": "Who?", "a": inside}, replace(WRITTEN, answer="{a.text}"))


def test_lists_in_two_columns_do_not_say_which_answers_there_are() -> None:
    task = replace(WRITTEN, answer="{a} {unit}")

    with pytest.raises(ConfigError, match=r"task.answer must name at most one column .*, got lists in 'a' and 'unit'"):
        render({"q": "How far?", "a": ["3", "three"], "unit": ["km", "kilometres"]}, task)


def test_a_candidate_and_a_prompt_take_no_list() -> None:
    for task in (
        replace(CHOICE, candidates=["{a}", "no"]),
        replace(CHOICE, template="{a}"),
        replace(CHOICE, label="a"),
    ):
        with pytest.raises(ConfigError, match=r"column 'a' .*must hold .*(list|\[0\])"):
            render({"text": "x", "a": [0], "label": 0}, task)


LISTED = TaskConfig(name="mine", template="{q}:", candidates=[" {c}"], label="a")
PLACES = ["Oslo", "Rome ", 7]


@pytest.mark.parametrize(
    ("candidate", "choices"),
    [
        (" {c}", PLACES),
        (" {c.text}", {"text": PLACES, "label": ["A", "B", "C"]}),
        (" {c.text}", [{"text": text} for text in PLACES]),
    ],
)
def test_a_row_may_list_its_own_candidates(candidate: str, choices: object) -> None:
    task = replace(LISTED, candidates=[candidate])

    rendered = render({"q": "Where", "c": choices, "a": "2"}, task)

    assert (rendered.prompt, rendered.answers, rendered.label) == ("Where:", (" Oslo", " Rome", " 7"), 2)
    assert columns_used(task) == tuple(sorted(("a", candidate.strip(" {}"), "q")))


def test_rows_may_list_different_numbers_of_candidates_which_are_no_labels() -> None:
    letters = replace(LISTED, labels=["A", "B", "C", "D"])
    rows = [{"q": "x", "c": ["p", "q", "r"], "a": "C"}, {"q": "x", "c": ["p", "q", "r", "s"], "a": "D"}]

    rendered = [render(row, letters) for row in rows]

    assert [(row.label, len(row.answers)) for row in rendered] == [(2, 3), (3, 4)]
    assert [right_label(row, letters) for row in rows] == [2, 3]
    assert (has_labels(letters), num_labels(letters)) == (False, 0)
    assert (has_labels(CHOICE), num_labels(CHOICE)) == (True, 2)


@pytest.mark.parametrize(
    ("row", "labels", "message"),
    [
        ({"c": ["x", "y"], "a": 2}, [], r"column 'a' must hold an index \(0 to 1\) of .*\[' \{c\}'\], got 2"),
        ({"c": ["x", "y"], "a": "C"}, ["A", "B", "C"], r"column 'a' .* one of task.labels \['A', 'B'\], got 'C'"),
        ({"c": ["x"], "a": 0}, [], r"must name a column that lists at least 2 answers, got ' x' alone. Write a list"),
        ({"c": "x; y", "a": 0}, [], r"must name a column that lists at least 2 answers, got ' x; y' alone"),
        ({"c": [], "a": 0}, [], r"column 'c' \(task.candidates\) lists no answer: \[\]. Fill it or remove the row"),
        ({"c": ["x", " "], "a": 0}, [], r"column 'c' \(task.candidates\) is blank: ' '"),
        ({"c": {"text": ["x", "y"]}, "a": 0}, [], r"got dict. Name one of its fields, as in \{c.text\}"),
        ({"a": 0}, [], r"task.candidates needs a column 'c', the columns there are: q, a"),
    ],
)
def test_candidates_that_a_row_does_not_list_are_refused(row: dict[str, Any], labels: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        render({"q": "Where", **row}, replace(LISTED, labels=labels))


def test_a_candidate_may_be_the_field_of_an_object() -> None:
    task = replace(CHOICE, candidates=[" {c.first}", " {c.last}"])

    assert render({"text": "x", "c": {"first": "p", "last": 9}, "label": 1}, task).answers == (" p", " 9")


@pytest.mark.parametrize("value", ["", None])
def test_the_input_of_alpaca_may_be_missing_but_is_no_nan(value: object, shipped_task: Shipped) -> None:
    row = {"instruction": "Sing.", "input": value, "output": "La."}

    assert render(row, shipped_task("alpaca")).prompt == "Sing."
    with pytest.raises(ConfigError, match=r"column 'input' \(task.derive=alpaca\) holds nan, which stands for"):
        render(row | {"input": float("nan")}, shipped_task("alpaca"))


def test_a_boolean_is_no_index_but_may_be_a_listed_value() -> None:
    with pytest.raises(ConfigError, match=r"got true, a boolean. .*task.labels=\['false','true'\]"):
        label_index({"label": True}, CHOICE)
    for labels in (["true", "false"], ["True", "False"]):
        assert label_index({"label": False}, replace(CHOICE, labels=labels)) == 1


@pytest.mark.parametrize("labels", [["true", "false"], ["True", "False"], ["TRUE", "FALSE"]])
@pytest.mark.parametrize("value", [False, "false", " False", "FALSE"])
def test_a_boolean_is_read_however_a_table_spells_it(value: object, labels: list[str]) -> None:
    assert label_index({"label": value}, replace(CHOICE, labels=labels)) == 1


def test_labels_that_differ_in_case_alone_are_not_taken_for_one_another() -> None:
    both = replace(CHOICE, labels=["true", "True"])

    assert [label_index({"label": value}, both) for value in ("true", "True")] == [0, 1]
    with pytest.raises(ConfigError, match=r"must hold one of task.labels \['b', 'a'\], got 'A'"):
        label_index({"label": "A"}, replace(CHOICE, labels=["b", "a"]))


@pytest.mark.parametrize("value", [-1, "-1", -1.0])
def test_a_label_that_nobody_gave_is_told_from_a_wrong_one(value: object) -> None:
    with pytest.raises(ConfigError, match=r"-1 stands for a label that nobody gave: remove the row, or .* task.labels"):
        label_index({"label": value}, CHOICE)


def test_a_label_of_minus_one_may_be_a_listed_value() -> None:
    assert label_index({"label": -1}, replace(CHOICE, labels=["1", "-1"])) == 1


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        ("It was", r"hold a \{column\} of the rows, or every row has the same text"),
        ("{} was", r"hold a \{column\}"),
        ('{"a": 1}', r"hold a \{column\}"),
        ("{text It was", r"close the brace of '\{text It was' right after the column's name, as in \{text It was\}"),
        ("{a} {text", r"close the brace of '\{text'"),
        ("{text\n{a}", r"close the brace of '\{text'"),
        ("{ text }", r"close the brace of '\{ text ' .*, as in \{text\}"),
        ("{{ text }}", r"close the brace of"),
        ("{text!r} {a}", r"close the brace of '\{text'"),
        ("{text:>9}", r"close the brace of '\{text'"),
        (
            "{Befund (Text)} x",
            r"close the brace of '\{Befund ' .* as in \{Befund\} \(a name may hold .*: rename a column with other",
        ),
        ("text} It was", r"open the brace of 'text\}' right before the column's name, as in \{text\}"),
        ("{a} text }", r"open the brace of 'text \}'"),
    ],
)
def test_a_template_that_loses_its_column_is_faulty(template: str, fault: str) -> None:
    [found] = template_faults(template)
    assert re.match(fault, found)


@pytest.mark.parametrize(
    "template",
    ["{text}", "{{text}}", '{"a": "{text}", "b": {}}', "int main() {\n{text}\n}", "{a b} :-} {", "${x:y} {a}"],
)
def test_other_braces_are_plain_text(template: str) -> None:
    assert not [*template_faults(template)]


def test_an_answer_may_be_the_same_for_all_rows_where_it_is_one_of_several() -> None:
    assert not [*template_faults(" yes", constant=True)]
    assert [*template_faults(" {choice", constant=True)]
