"""Rows that hold whole conversations, and system messages: from a file to token ids, against templates filled by hand.

Texts are rendered by Jinja alone, and tokens are counted byte by byte.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import pyarrow
import pyarrow.parquet
import pytest

from fedzo.data.chat import encode_instructions
from fedzo.data.config import DataConfig, Loss, SplitConfig, TaskConfig, TaskKind
from fedzo.data.encode import encode
from fedzo.data.rows import OwnRows, client_rows
from fedzo.data.sources import load_own, load_splits
from fedzo.data.tasks import columns_used, render
from fedzo.errors import ConfigError
from fedzo.system import warn_once
from fedzo.testing.tiny_models import byte_tokenizer

SPOKEN = TaskConfig(name="mine", kind=TaskKind.instruction, loss=Loss.lm, messages="messages")
ASKED = TaskConfig(name="mine", kind=TaskKind.instruction, loss=Loss.lm, template="{q}", answer="{a}")
BOS, EOS = 1, 2
ROLES = {"s": "system", "u": "user", "a": "assistant"}
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('No\\nsystem role') }}{% endif %}"
DROPS = "{% for message in messages if message.role != 'system' %}"


def ids(text: str) -> tuple[int, ...]:
    tokens: tuple[int, ...] = ()
    for part in re.split("(<bos>|<eos>)", text):
        tokens += {"<bos>": (BOS,), "<eos>": (EOS,)}.get(part) or tuple(3 + byte for byte in part.encode())
    return tokens


def said(*turns: str) -> list[dict[str, str]]:
    """Messages of "u Hi", "a Yo" and the like."""
    return [{"role": ROLES[turn[0]], "content": turn[2:]} for turn in turns]


def row(*turns: str, **more: Any) -> dict[str, Any]:
    return {"messages": said(*turns), **more}


LONG = row("s Be brief.", "u Hi", "a Yo", "u Why?", "a So.")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    return path


def test_all_messages_before_the_last_are_the_prompt_and_the_last_is_the_answer() -> None:
    tokenizer = byte_tokenizer(add_bos=True)
    by_hand = jinja2.Template(str(tokenizer.chat_template))
    text = by_hand.render(messages=LONG["messages"][:-1], add_generation_prompt=True)

    [example] = encode([LONG], SPOKEN, tokenizer=tokenizer, max_length=256)

    assert text == (
        "<bos>system\nBe brief.<eos>\n<bos>user\nHi<eos>\n<bos>assistant\nYo<eos>\n<bos>user\nWhy?<eos>\n"
        "<bos>assistant\n"
    )
    assert example.prompt == example.generation_prompt == ids(text)
    assert example.candidates == ((*ids("So."), EOS),)
    assert (example.label, example.references, example.scored_cut) == (0, ("So.",), False)
    assert columns_used(SPOKEN) == ("messages",)


def test_a_conversation_of_one_question_is_a_row_with_columns() -> None:
    """Outer white space is nobody's text in either form, and other keys of a message are not read."""
    talk = [
        {"role": "system", "content": " Be brief.\n", "name": None},
        {"role": "user", "content": "\tHi there "},
        {"role": "assistant", "content": " Yo\n", "weight": 0},
    ]
    system, columns = replace(ASKED, system="Be brief.\n"), {"q": "Hi there", "a": "Yo"}
    tokenizer = byte_tokenizer()

    for task, messages in ((system, talk), (ASKED, talk[1:])):
        one, other = {"messages": messages}, columns
        assert render(one, SPOKEN) == render(other, task)
        assert encode([one], SPOKEN, tokenizer=tokenizer, max_length=256) == encode(
            [other], task, tokenizer=tokenizer, max_length=256
        )
    assert render({"messages": talk[1:]}, SPOKEN).prompt == "Hi there"


def test_a_system_message_stands_before_the_question_and_may_hold_columns() -> None:
    task, given = replace(ASKED, system="You are at {ward}."), {"q": "Hi", "a": "Yo", "ward": " A1 "}

    [example] = encode([given], task, tokenizer=byte_tokenizer(), max_length=256)

    text = "<bos>system\nYou are at A1.<eos>\n<bos>user\nHi<eos>\n<bos>assistant\n"
    assert example.prompt == ids(text)
    assert [example.prompt] == encode_instructions(["Hi"], byte_tokenizer(), system="You are at A1.")
    assert columns_used(task) == ("a", "q", "ward")
    for value in (None, " ", "NaN", "none"):
        with pytest.raises(ConfigError, match=r"column 'ward' \(task.system\) (is|holds) .*ill it or remove the row"):
            render(given | {"ward": value}, task)


def test_a_system_message_is_part_of_what_is_asked() -> None:
    task = replace(ASKED, system="You are at {ward}.")

    prompts = [render({"q": "Hi", "a": "Yo", "ward": ward}, task).prompt for ward in "ABA"]

    assert prompts[0] == prompts[2] == "user: Hi\nsystem: You are at A."  # a message shows the beginning of a prompt
    assert prompts[1] != prompts[0]


def test_a_long_prompt_loses_its_oldest_messages_but_not_the_system_s() -> None:
    """Each row keeps its own system message, whatever the rows beside it have."""
    start, end = "<eos>\n<bos>user\n", "<eos>\n<bos>assistant\n"
    rows = [row(f"s {name * 4}", f"u {'x' * 60}", "a y", "u z", "a Yo") for name in "ST"]
    tail = ids(f"{end}y{start}z{end}")

    found = encode(rows, replace(SPOKEN, max_new_tokens=3), tokenizer=byte_tokenizer(), max_length=68)

    for name, example in zip("ST", found, strict=True):
        head = ids(f"<bos>system\n{name * 4}{start}")
        assert (len(head), len(tail)) == (20, 36)
        assert example.prompt == (*head, *ids("x" * (68 - 3 - 20 - 36)), *tail)  # beside 3 tokens of the answer
        assert example.generation_prompt == example.prompt
        assert example.candidates == ((*ids("Yo"), EOS),)
        assert example.cut


def test_a_system_message_takes_half_of_the_room_at_most() -> None:
    task, asked = replace(ASKED, system="S" * 60, max_new_tokens=3), {"q": "Hi", "a": "Yo"}

    [example] = encode([asked], task, tokenizer=byte_tokenizer(), max_length=43)

    whole = ids(f"<bos>system\n{'S' * 60}<eos>\n<bos>user\nHi<eos>\n<bos>assistant\n")
    assert example.prompt == (*whole[:20], *whole[-20:])
    assert example.cut


def test_a_conversation_that_the_assistant_begins_keeps_what_it_shares_with_one_of_a_user() -> None:
    [example] = encode(
        [row("a Hello" + "o" * 60, "u Hi", "a Yo")],
        replace(SPOKEN, max_new_tokens=3),
        tokenizer=byte_tokenizer(),
        max_length=43,
    )

    whole = ids("<bos>assistant\nHello" + "o" * 60 + "<eos>\n<bos>user\nHi<eos>\n<bos>assistant\n")
    assert example.prompt == (BOS, *whole[-39:])


def rows_of(path: Path, form: str, given: list[dict[str, Any]]) -> Path:
    file = path / f"train.{form}"
    if form == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(given), file)
    elif form == "json":
        file.write_text(json.dumps(given), encoding="utf-8")
    else:
        write(file, given)
    return file


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet"])
def test_conversations_are_read_from_every_format_that_holds_lists(form: str, tmp_path: Path) -> None:
    given = [LONG, row("u Hi", "a Yo")]

    read = load_own(rows_of(tmp_path, form, given), SPOKEN)

    assert read == given


ANSWER = {"role": "assistant", "content": "Yo"}
COLUMN = r"column 'messages' \(task\.messages\)"


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("Hi", rf"{COLUMN} must hold a list of messages, each with a 'role' and a 'content', got str\. Write a list"),
        (ANSWER, rf"{COLUMN} must hold a list of messages, .*, got dict"),
        (None, rf"{COLUMN} is empty \(null\)\. Fill it or remove the row"),
        ([], rf"{COLUMN} must hold at least 2 messages, a prompt and its answer, got 0\. Complete or remove the row"),
        ([ANSWER], rf"{COLUMN} must hold at least 2 messages, .*, got 1"),
        (said("u Hi", "a Yo", "u So?"), rf"{COLUMN} must end with a message of the assistant, .* one of the user"),
        (said("u Hi", "s No."), rf"{COLUMN} must end with a message of the assistant, .*, got one of the system there"),
        (["Hi", ANSWER], rf"message 1 of {COLUMN} must be an object with the keys 'role' and 'content', got str\. "),
        ([{"from": "human", "value": "Hi"}, ANSWER], rf"message 1 of {COLUMN} .* got the keys \['from', 'value'\]\. R"),
        ([*said("u Hi"), {"role": "assistant"}], rf"message 2 of {COLUMN} must be .* got the keys \['role'\]"),
        (
            [*said("u Hi"), {"role": "tool", "content": "7"}, ANSWER],
            rf"message 2 of {COLUMN} must have one of the roles system, user, assistant, got 'tool'\. Rename it, or",
        ),
        ([{"role": ["user"], "content": "Hi"}, ANSWER], rf"message 1 of {COLUMN} must have one of .*, got \['user'\]"),
        *(
            (
                [{"role": "user", "content": content}, ANSWER],
                rf"message 1 of {COLUMN} must have text as its 'content', got {re.escape(repr(content))}\. Write",
            )
            for content in (None, "", " \n", 7, [{"type": "text", "text": "Hi"}])
        ),
    ],
)
def test_what_is_no_conversation_names_file_row_and_message(cell: object, message: str, tmp_path: Path) -> None:
    rows = [row(f"u {number}", "a Yo") for number in range(40)]
    rows[1]["messages"] = cell
    file = write(tmp_path / "train.jsonl", rows)

    for read in (
        lambda: load_splits(DataConfig(path=str(tmp_path)), SplitConfig(), SPOKEN),
        lambda: load_own(file, SPOKEN),
    ):
        with pytest.raises(ConfigError, match=rf"^{re.escape(str(file))}:2: {message}") as caught:
            read()
        assert "\n" not in str(caught.value)


def test_a_column_of_another_name_is_missing_or_named(tmp_path: Path) -> None:
    file = write(tmp_path / "chats.jsonl", [{"talk": said("u Hi", "a Yo"), "id": 1}])

    with pytest.raises(
        ConfigError, match=r"chats\.jsonl:1: task\.messages needs a column 'messages', the columns there are: talk, id"
    ):
        load_own(file, SPOKEN)
    assert len(load_own(file, replace(SPOKEN, messages="talk"))) == 1


def talks() -> list[dict[str, Any]]:
    """Twenty prompts that only all their messages tell apart, each with two answers."""
    return [
        row(f"s ward {number % 2}", f"u case {number // 2 % 5}", f"a so {number // 10}", "u And then?", f"a {answer}")
        for answer in ("Yes.", "No.")
        for number in range(20)
    ]


def prompts_in(rows: list[dict[str, Any]]) -> Counter[str]:
    return Counter(json.dumps(each["messages"][:-1]) for each in rows)


def test_rows_with_the_same_prompt_stay_together_and_a_prompt_is_the_whole_conversation(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", talks())

    splits = load_splits(DataConfig(path=str(tmp_path)), SplitConfig(num_dev=4, num_test=6), SPOKEN)

    parts = [prompts_in(part) for part in (splits.train, splits.dev, splits.test)]
    assert [len(part) for part in parts] == [15, 2, 3]
    assert all(times == 2 for part in parts for times in part.values())
    assert parts[0] + parts[1] + parts[2] == prompts_in(talks())


def test_no_conversation_is_both_trained_on_and_held_out(tmp_path: Path) -> None:
    source = OwnRows(str(write(tmp_path / "train.jsonl", talks())), SPOKEN)

    found = client_rows(source, 0, share=0.2, seed=0)

    train, heldout = prompts_in(found.train), prompts_in(found.heldout)
    assert (len(train), len(heldout)) == (16, 4)
    assert not train.keys() & heldout.keys()


@pytest.mark.parametrize(
    ("task", "given", "prompt"),
    [
        (SPOKEN, LONG, "user: Hi\nassistant: Yo\nuser: Why?\nsystem: Be brief."),
        (replace(ASKED, system="Be brief."), {"q": "Hi", "a": "Yo"}, "user: Hi\nsystem: Be brief."),
    ],
)
def test_a_chat_template_that_refuses_a_system_message_says_what_to_do(
    task: TaskConfig, given: dict[str, Any], prompt: str
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = NO_SYSTEM + str(tokenizer.chat_template)

    with pytest.raises(ConfigError) as caught:
        encode([given], task, tokenizer=tokenizer, max_length=256)

    assert str(caught.value) == (
        f"row 0, {prompt!r}: the model's chat template must take its text, but raises TemplateError: No system role. "
        "Begin the user's first message with what the system says, correct or remove the row, or choose another model."
    )
    assert encode([row("u Hi", "a Yo")], SPOKEN, tokenizer=tokenizer, max_length=256)


def test_a_chat_template_that_refuses_the_order_of_messages_names_the_row() -> None:
    tokenizer = byte_tokenizer()
    check = "{% if messages[0].role != 'user' %}{{ raise_exception('a user must begin') }}{% endif %}"
    tokenizer.chat_template = check + str(tokenizer.chat_template)

    with pytest.raises(
        ConfigError, match=r"^row 1, 'assistant: Hi.*': .* raises TemplateError: a user must begin\. Correct or remove "
    ):
        encode([row("u Hi", "a Yo"), row("a Hi", "u Yo", "a So.")], SPOKEN, tokenizer=tokenizer, max_length=256)


@pytest.mark.parametrize("task", [SPOKEN, replace(ASKED, system=" Be brief.\n")], ids=["messages", "system"])
def test_a_system_message_that_the_chat_template_leaves_out_is_told_of_once(
    task: TaskConfig, caplog: pytest.LogCaptureFixture
) -> None:
    given, tokenizer = {**LONG, "q": "Hi", "a": "Yo"}, byte_tokenizer()
    warn_once.cache_clear()
    encode([given], task, tokenizer=tokenizer, max_length=256)
    assert caplog.messages == []
    tokenizer.chat_template = str(tokenizer.chat_template).replace("{% for message in messages %}", DROPS)

    for _ in range(2):
        [example] = encode([given], task, tokenizer=tokenizer, max_length=256)

    assert example.prompt[:6] == ids("<bos>user\n")
    assert [message.partition(",")[0] for message in caplog.messages] == [
        "task 'mine': this model's chat template leaves out the system message of some rows"
    ]


@pytest.mark.parametrize(
    ("task", "given", "is_told"),
    [
        (SPOKEN, row("u Hi <eos>", "a Yo", "u So?", "a Yes"), True),
        (SPOKEN, row("u Hi", "a Yo <eos>", "u So?", "a Yes"), True),
        (SPOKEN, row("s <eos>", "u Hi", "a Yo"), True),
        (SPOKEN, row("u Hi", "a Yo <eos>"), True),
        (SPOKEN, LONG, False),
        (replace(ASKED, system="Say <eos>."), {"q": "Hi", "a": "Yo"}, False),  # the task's author meant it
        (replace(ASKED, system="Say {q}."), {"q": "<eos>", "a": "Yo"}, True),
    ],
)
def test_a_special_token_in_any_message_is_told_of(
    task: TaskConfig, given: dict[str, Any], is_told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    warn_once.cache_clear()

    encode([given], task, tokenizer=byte_tokenizer(), max_length=256)

    expected = "task 'mine': the text of some rows holds '<eos>'"
    assert [message.partition(",")[0] for message in caplog.messages] == ([expected] if is_told else [])


CUTS_THOUGHTS = (
    "{% for message in messages %}<bos>{{ message.role }}\n"
    "{% if message.role == 'assistant' and not loop.last %}{{ message.content.split('</think>')[-1].strip() }}"
    "{% else %}{{ message.content }}{% endif %}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant\n{% endif %}"
)
"""Leaves out the thoughts of earlier answers, as templates of models that think do."""


def test_thoughts_of_earlier_answers_are_the_chat_templates_matter(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer, answer = byte_tokenizer(), "a <think>\nhm\n</think>\n\nYo"
    tokenizer.chat_template = CUTS_THOUGHTS
    warn_once.cache_clear()

    [example] = encode([row("u Hi", answer, "u So?", "a Yes")], SPOKEN, tokenizer=tokenizer, max_length=256)

    assert example.prompt == ids("<bos>user\nHi<eos>\n<bos>assistant\nYo<eos>\n<bos>user\nSo?<eos>\n<bos>assistant\n")
    assert example.candidates == ((*ids("Yes"), EOS),)
    assert caplog.messages == []
