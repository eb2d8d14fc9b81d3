"""Rows to token ids, with one token a byte so that every id can be counted."""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fedzo.data.chat import chat_end, encode_instructions
from fedzo.data.config import Loss, TaskConfig, TaskKind
from fedzo.data.encode import Example, encode, encode_prompts, opening, task_digest
from fedzo.data.tasks import columns_used
from fedzo.errors import ConfigError
from fedzo.system import warn_once
from fedzo.testing.tiny_models import byte_tokenizer

CHOICE = TaskConfig(name="mine", template="{text}:", candidates=[" no", " maybe"])
WRITTEN = TaskConfig(name="mine", kind=TaskKind.generation, loss=Loss.lm, template="{q}?", answer=" {a}\n")
CHAT = TaskConfig(name="mine", kind=TaskKind.instruction, loss=Loss.lm, template="{q}", answer="{a}")
SPOKEN = TaskConfig(name="mine", kind=TaskKind.instruction, loss=Loss.lm, messages="said")
BOS, EOS = 1, 2


def ids(text: str) -> tuple[int, ...]:
    return tuple(3 + byte for byte in text.encode())


class MergingTokenizer:
    """Knows ``: `` and ``ab`` as one token each, so that tokens span the border of prompt and answer."""

    bos_token_id = None
    chat_template = None
    merges = (": ", "ab")

    def added_tokens_decoder(self) -> dict[int, Any]:  # a method, as transformers has it for mistral-common
        raise NotImplementedError

    def __call__(self, text: list[str], *, add_special_tokens: bool, verbose: bool) -> dict[str, Any]:
        return {"input_ids": [self._tokens(one) for one in text]}

    def _tokens(self, text: str) -> list[int]:
        tokens = []
        while text:
            merged = next((merge for merge in self.merges if text.startswith(merge)), None)
            tokens.append(1000 + self.merges.index(merged) if merged else ord(text[0]))
            text = text[len(merged) if merged else 1 :]
        return tokens

    def apply_chat_template(self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool) -> str:
        raise NotImplementedError


def test_prompt_and_candidates_are_parted_at_the_border() -> None:
    [example] = encode([{"text": " h\u00e9 ", "label": "1"}], CHOICE, tokenizer=byte_tokenizer(), max_length=64)

    assert example.prompt == ids("h\u00e9:")
    assert example.candidates == (ids(" no"), ids(" maybe"))
    assert (example.label, example.references) == (1, ())


def test_rows_do_not_influence_each_other() -> None:
    rows = [{"text": "one", "label": 0}, {"text": "b", "label": 1}, {"text": "a longer one", "label": 0}]
    tokenizer = byte_tokenizer()

    together = encode(rows, CHOICE, tokenizer=tokenizer, max_length=64)

    assert together == [encode([row], CHOICE, tokenizer=tokenizer, max_length=64)[0] for row in rows]


class CountingTokenizer(MergingTokenizer):
    """Remembers the most characters that it was given at once, and refuses a text."""

    max_chars = 0

    def __call__(self, text: list[str], *, add_special_tokens: bool, verbose: bool) -> dict[str, Any]:
        self.max_chars = max(self.max_chars, sum(map(len, text)))
        if any("refused" in one for one in text):
            raise ValueError("not this one")
        return super().__call__(text, add_special_tokens=add_special_tokens, verbose=verbose)


@pytest.mark.parametrize(("limit", "given"), [(81, 81), (80, 54), (1, 27)])
def test_many_rows_are_tokenised_in_blocks_and_give_the_same_tokens(
    limit: int, given: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The texts of a row have 27 characters: "row 0:" three times, " no" and " maybe"."""
    rows = [{"text": f"row {i}", "label": i % 2} for i in range(7)]
    whole = encode(rows, CHOICE, tokenizer=MergingTokenizer(), max_length=64)
    tokenizer = CountingTokenizer()
    monkeypatch.setattr("fedzo.data.encode._BLOCK_CHARS", limit)

    assert encode(rows, CHOICE, tokenizer=tokenizer, max_length=64) == whole
    assert tokenizer.max_chars == given


def test_rows_with_the_same_candidates_share_them() -> None:
    rows = [{"text": text, "label": 0} for text in ("one", "two")]

    one, two = encode(rows, CHOICE, tokenizer=byte_tokenizer(), max_length=64)

    assert one.candidates is two.candidates


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x", "label": 5}, "row 4: column 'label' must hold an index"),
        ({"text": "refused", "label": 0}, "row 4, 'refused:': the model's tokenizer must take its text"),
    ],
)
def test_rows_are_numbered_through_all_blocks(
    row: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedzo.data.encode._BLOCK_CHARS", 50)  # three rows of 15 characters
    rows = [{"text": "x", "label": 0}] * 4 + [row]

    with pytest.raises(ConfigError, match=message):
        encode(rows, CHOICE, tokenizer=CountingTokenizer(), max_length=64)


def test_no_rows_give_no_examples() -> None:
    assert encode([], CHOICE, tokenizer=byte_tokenizer(), max_length=8) == []


def test_whether_answers_are_single_tokens_is_found_once() -> None:
    class Answer(tuple[int, ...]):
        num_looks = 0

        def __len__(self) -> int:
            Answer.num_looks += 1
            return super().__len__()

    example = Example((1,), (Answer((7,)),), 0)

    assert [example.one_token for _ in range(3)] == [True] * 3
    assert Answer.num_looks == 1
    assert not replace(example, candidates=((7, 8),)).one_token


def test_all_candidates_are_kept_for_the_language_model_loss() -> None:
    row = {"text": "x", "label": 1}

    [example] = encode([row], replace(CHOICE, loss=Loss.lm), tokenizer=byte_tokenizer(), max_length=64)

    assert len(example.candidates) == 2


def test_generation_has_one_candidate_and_its_reference() -> None:
    [example] = encode([{"q": "Who", "a": "Ann"}], WRITTEN, tokenizer=byte_tokenizer(), max_length=64)

    assert (example.prompt, example.candidates) == (ids("Who?"), (ids(" Ann\n"),))
    assert (example.label, example.references) == (0, ("Ann",))


def test_an_instruction_goes_through_the_chat_template_and_its_answer_ends() -> None:
    [example] = encode([{"q": "Hi", "a": "Yo"}], CHAT, tokenizer=byte_tokenizer(add_bos=True), max_length=64)

    assert example.prompt == (BOS, *ids("user\nHi"), EOS, *ids("\n"), BOS, *ids("assistant\n"))
    assert example.candidates == ((*ids("Yo"), EOS),)  # what the template writes behind the turn is never written
    assert example.references == ("Yo",)


THINKS = (
    "{% for message in messages %}<bos>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ message.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""Writes an empty thought before an answer, but before one that is to be written only where thinking is off."""


def test_the_thought_that_a_chat_template_writes_belongs_to_the_prompt() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = THINKS

    [example] = encode([{"q": "Hi", "a": "Yo"}], CHAT, tokenizer=tokenizer, max_length=128)

    assert example.prompt[-len("</think>\n\n") :] == ids("</think>\n\n")
    assert example.candidates == ((*ids("Yo"), EOS),)


def test_a_row_with_a_thought_is_written_from_the_same_prompt_and_told_of_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its own turn begins in another way than the one that is to be written, where thinking is off."""
    tokenizer = byte_tokenizer()
    is_assistant = "message.role == 'assistant'"
    tokenizer.chat_template = THINKS.replace(is_assistant, f"{is_assistant} and '<think>' not in message.content")
    rows = [{"q": "Hi", "a": answer} for answer in ("Yo", "<think>\nhm\n</think>\n\nYo")]
    warn_once.cache_clear()

    [plain] = encode(rows[:1], CHAT, tokenizer=tokenizer, max_length=256)
    assert caplog.messages == []
    for _ in range(2):
        again, thinks = encode(rows, CHAT, tokenizer=tokenizer, max_length=256)

    assert again == plain
    assert [plain.generation_prompt] == [thinks.generation_prompt] == encode_instructions(["Hi"], tokenizer)
    assert thinks.prompt[-len("<think>\n") :] == ids("<think>\n")
    assert thinks.candidates == ((*ids("hm\n</think>\n\nYo"), EOS),)
    assert not thinks.scored_cut
    assert [message.partition(",")[0] for message in caplog.messages] == [
        "task 'mine': this model's chat template begins an answer that is to be written otherwise than the answer of a "
        "row"
    ]


def test_an_answer_ends_with_the_first_special_token_behind_it_or_as_the_template_ends_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tokenizer, row = byte_tokenizer(), {"q": "Hi", "a": "Yo"}
    chat = "{% for message in messages %}<bos>{{ message.role }}\n{{ message.content }}END{% endfor %}"
    chat += "{% if add_generation_prompt %}<bos>assistant\n{% endif %}"
    warn_once.cache_clear()

    tokenizer.chat_template = chat.replace("END", " <eos>\n<pad>")
    [example] = encode([row], CHAT, tokenizer=tokenizer, max_length=64)
    assert example.candidates == ((*ids("Yo "), EOS),)
    assert caplog.messages == []

    tokenizer.chat_template = chat.replace("END", "\n")
    [example] = encode([row], CHAT, tokenizer=tokenizer, max_length=64)
    assert example.candidates == (ids("Yo\n"),)
    [told] = caplog.messages
    assert "ends an answer with no special token, so nothing teaches the model where to stop" in told


def test_an_answer_is_whole_where_its_text_parts_from_the_prompt_within_the_users_turn() -> None:
    """A hint that stands behind the last message where an answer is to be written, and in no row."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}<bos>{{ message.role }}\n{{ message.content }}"
        "{% if add_generation_prompt and loop.last %} /no_think{% endif %}<eos>\n{% endfor %}"
        "{% if add_generation_prompt %}<bos>assistant\n{% endif %}"
    )

    [example] = encode([{"q": "Hi", "a": "Yo"}], CHAT, tokenizer=tokenizer, max_length=64)

    assert example.prompt == (BOS, *ids("user\nHi"))
    assert example.candidates == ((EOS, *ids("\n"), BOS, *ids("assistant\nYo"), EOS),)


def test_a_long_instruction_keeps_what_the_chat_template_writes_before_it() -> None:
    header, tail = (BOS, *ids("user\n")), (EOS, *ids("\n"), BOS, *ids("assistant\n"))

    [example] = encode([{"q": "x" * 60, "a": "Yo"}], CHAT, tokenizer=byte_tokenizer(), max_length=40)

    assert example.prompt == (*header, *ids("x" * (40 - 3 - 6 - 13)), *tail)  # beside 3 tokens of the answer
    assert example.generation_prompt == (*header, *ids("x" * (20 - 6 - 13)), *tail)
    assert example.cut


def test_instructions_are_rendered_as_the_prompts_of_rows() -> None:
    tokenizer = byte_tokenizer(add_bos=True)

    [example] = encode([{"q": "Hi", "a": "Yo"}], CHAT, tokenizer=tokenizer, max_length=64)

    assert encode_instructions(["Hi"], tokenizer) == [example.prompt]
    assert encode_instructions([], tokenizer) == []


@pytest.mark.parametrize(
    ("template", "raised"),
    [
        ("{{ raise_exception('a system\\nmessage') }}", "TemplateError: a system message"),
        ("{{ tools[0].name }}", "UndefinedError: "),
        ({"tool_use": "{{ messages[0].content }}"}, "ValueError: "),  # none is the default
    ],
)
def test_a_chat_template_that_takes_no_text_of_the_user_alone_is_named(template: Any, raised: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template

    with pytest.raises(ConfigError, match=rf"the model's chat template must take .* but raises {raised}.*leave out"):
        encode_instructions(["Hi"], tokenizer)


@pytest.mark.parametrize(
    ("template", "end"),
    [
        ("{% for message in messages %}{{ message.content }}<bos>\n<eos>{% endfor %}", {BOS}),  # the first of both
        ("{% for message in messages %}<bos>{{ message.content }}\n{% endfor %}", set()),
        ("{% for message in messages %}<bos>{{ message.content }}{% endfor %}", set()),
        ("{% if messages | length > 1 %}{{ raise_exception('one') }}{% endif %}{{ messages[0].content }}<bos>", set()),
        (None, set()),
    ],
)
def test_an_answer_ends_where_the_chat_template_ends_it(template: str | None, end: set[int]) -> None:
    tokenizer = byte_tokenizer(chat=False)
    tokenizer.chat_template = template

    assert chat_end(tokenizer) == end


@pytest.mark.parametrize(
    ("task", "fields"),
    [
        (CHAT, ["instruction", "{q}", [], "label", [], "{a}", None]),
        (replace(CHAT, system="S"), ["instruction", "{q}", [], "label", [], "{a}", None, "", "S"]),
        (SPOKEN, ["instruction", "", [], "label", [], "", None, "said", ""]),
        (WRITTEN, ["generation", "{q}?", [], "label", [], " {a}\n", None]),
        (CHOICE, ["candidates", "{text}:", [" no", " maybe"], "label", [], "", None]),
    ],
    ids=["instruction", "system", "messages", "generation", "candidates"],
)
def test_sites_that_make_other_tokens_have_another_digest(task: TaskConfig, fields: list[Any]) -> None:
    """Tokens of all kinds have changed since the first format, of instructions also since the second.

    Those of candidates have changed since the third.
    """
    *old, new = (hashlib.sha256(json.dumps([f"fedzo-prompt/{n}", *fields]).encode()).hexdigest() for n in range(1, 5))

    assert task_digest(task) == new
    assert new not in old


def test_a_tokenizer_without_chat_template_cannot_take_instructions() -> None:
    with pytest.raises(ConfigError, match=r"task 'mine' \(kind=instruction\) needs a tokenizer with a chat template"):
        encode([{"q": "Hi", "a": "Yo"}], CHAT, tokenizer=byte_tokenizer(chat=False), max_length=64)


def test_a_token_over_the_border_belongs_to_the_answers_of_all_candidates() -> None:
    task = replace(CHOICE, template="{text}:", candidates=[" no", "no"])

    [example] = encode([{"text": "x", "label": 0}], task, tokenizer=MergingTokenizer(), max_length=64)

    assert example.prompt == (ord("x"),)
    assert example.candidates == ((1000, ord("n"), ord("o")), (ord(":"), ord("n"), ord("o")))


def gpt2_like_tokenizer() -> Any:
    """Splits texts as GPT-2 does, and knows some words and two line breaks as one token each."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    merges = [("\u010a", "\u010a"), ("o", "k"), ("Y", "e"), ("Ye", "s"), ("N", "o"), ("s", "o"), ("\u0120", "so")]
    vocabulary = {token: number for number, token in enumerate([*sorted(letters), *map("".join, merges)])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend)  # type: ignore[no-untyped-call]


def test_white_space_of_the_prompt_belongs_to_no_candidate() -> None:
    r"""GPT-2's split is ``... | ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+``: before a word, the last white space stands alone.

    So "ok?\n\n" alone is  ok | ? | \n\n        but "ok?\n\nYes" is        ok | ? | \n | \n | Yes
    and "ok?\n\nYes so" is                                                 ok | ? | \n | \n | Yes | " so"
    """
    tokenizer = gpt2_like_tokenizer()
    ok, mark, line, lines, yes, no, so = tokenizer.convert_tokens_to_ids(
        ["ok", "?", "\u010a", "\u010a\u010a", "Yes", "No", "\u0120so"]
    )
    task = replace(CHOICE, template="{text}\n\n", candidates=["Yes", "No", "Yes so"])
    row = {"text": "ok?", "label": 0}

    [example] = encode([row], task, tokenizer=tokenizer, max_length=64)
    [short] = encode([row], replace(task, candidates=["Yes", "No"]), tokenizer=tokenizer, max_length=64)

    assert encode_prompts(["ok?\n\n"], tokenizer) == [(ok, mark, lines)]
    assert example.prompt == short.prompt == (ok, mark, line, line)
    assert example.candidates == ((yes,), (no,), (yes, so))
    assert short.one_token


def test_a_byte_that_two_letters_share_belongs_to_the_candidates() -> None:
    task = replace(CHOICE, candidates=["\u00e9", "\u00e8"])

    [example] = encode([{"text": "x", "label": 0}], task, tokenizer=byte_tokenizer(), max_length=64)

    assert (example.prompt, example.candidates) == (ids("x:"), (ids("\u00e9"), ids("\u00e8")))


def test_a_model_that_would_learn_behind_other_tokens_than_it_writes_behind_is_told_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows = [{"q": "xy", "a": "n"}] * 2
    warn_once.cache_clear()

    encode(rows, replace(WRITTEN, template="{q}:", answer="{a}\n"), tokenizer=MergingTokenizer(), max_length=64)
    assert caplog.messages == []
    encode(rows, replace(WRITTEN, template="{q}:", answer=" {a}\n"), tokenizer=MergingTokenizer(), max_length=64)
    [told] = caplog.messages
    assert told.startswith("task 'mine': to this model, the end of a prompt has other tokens where an answer follows")


@pytest.mark.parametrize(
    ("answer", "add_eos", "is_told"),
    [
        (" {a}", False, True),
        (" {a}\\n", False, True),  # as a command line has it
        (" {a}\n", False, False),
        (" {a}<eos>", False, False),
        (" {a}", True, False),
    ],
)
def test_written_answers_that_nothing_ends_are_told_of(
    answer: str, add_eos: bool, is_told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    task, tokenizer = replace(WRITTEN, answer=answer), byte_tokenizer(add_eos=add_eos)
    warn_once.cache_clear()

    for _ in range(2):
        encode([{"q": "Who", "a": "Ann"}], task, tokenizer=tokenizer, max_length=64)

    expected = "task 'mine': its answers end with neither a line break nor a special token"
    assert [message.partition(",")[0] for message in caplog.messages] == ([expected] if is_told else [])


@pytest.mark.parametrize(
    ("task", "row", "is_told"),
    [
        (CHOICE, {"text": "a <eos> b", "label": 0}, True),
        (replace(CHOICE, template="<eos>{text}:"), {"text": "a", "label": 0}, False),
        (CHOICE, {"text": "a <b> eos", "label": 0}, False),
        (WRITTEN, {"q": "Who", "a": "Ann <eos>"}, True),
        (replace(WRITTEN, answer=" {a}<eos>"), {"q": "Who", "a": "Ann"}, False),
        (CHAT, {"q": "Hi <eos>", "a": "Yo"}, True),
        (CHAT, {"q": "Hi", "a": "Yo"}, False),  # the chat template writes some
    ],
)
def test_a_special_token_in_the_text_of_a_row_is_told_of(
    task: TaskConfig, row: dict[str, Any], is_told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    warn_once.cache_clear()

    encode([row, row], task, tokenizer=byte_tokenizer(), max_length=64)

    expected = "task 'mine': the text of some rows holds '<eos>'"
    assert [message.partition(",")[0] for message in caplog.messages] == ([expected] if is_told else [])


def test_an_answer_that_the_prompt_swallows_still_has_a_token() -> None:
    task = replace(CHOICE, template="{text}a", candidates=["b", "c"])

    [example] = encode([{"text": "xy", "label": 0}], task, tokenizer=MergingTokenizer(), max_length=64)

    assert example.prompt == (ord("x"), ord("y"))
    assert example.candidates == ((1001,), (ord("a"), ord("c")))


@pytest.mark.parametrize(("template", "answer"), [("{q}a", "{a}"), ("{q}:", " {a}\n")])
def test_the_prompt_that_is_written_from_tells_nothing_of_the_answer(template: str, answer: str) -> None:
    """It is the text's own tokens, also where the right answer has a token with the prompt together."""
    task, tokenizer = replace(WRITTEN, template=template, answer=answer), MergingTokenizer()

    examples = encode([{"q": "xy", "a": right} for right in "bc"], task, tokenizer=tokenizer, max_length=64)

    alone = tuple(map(ord, template.replace("{q}", "xy")))
    assert [example.generation_prompt for example in examples] == [alone, alone]
    assert encode_prompts([template.replace("{q}", "xy")], tokenizer) == [alone]
    assert examples[0].prompt == alone[:-1]
    assert not examples[0].scored_cut
    [short] = encode([{"q": "xy", "a": "b"}], replace(task, max_new_tokens=3), tokenizer=tokenizer, max_length=5)
    assert short.generation_prompt == alone[-2:]
    assert short.scored_cut


class SmallLetters(MergingTokenizer):
    """Does not tell capitals from other letters, as a vocabulary may that lacks some words."""

    def __call__(self, text: list[str], *, add_special_tokens: bool, verbose: bool) -> dict[str, Any]:
        return super().__call__([one.lower() for one in text], add_special_tokens=add_special_tokens, verbose=verbose)


def test_a_right_candidate_that_is_another_to_the_model_is_refused() -> None:
    """All its scores would be ties. Two wrong ones that are the same hurt nothing."""
    task = replace(CHOICE, candidates=[" no", " yes", " Yes"])
    rows = [{"text": "x", "label": label} for label in (0, 2)]

    [example] = encode(rows[:1], task, tokenizer=SmallLetters(), max_length=64)
    assert example.candidates[1] == example.candidates[2]
    with pytest.raises(
        ConfigError, match=r"row 1, 'x:': the right candidate must have tokens that no other has, but ' Yes'"
    ):
        encode(rows, task, tokenizer=SmallLetters(), max_length=64)


@pytest.mark.parametrize("add_bos", [False, True])
def test_what_the_tokenizer_puts_behind_every_text_is_part_of_no_candidate(add_bos: bool) -> None:
    """An answer that is written ends with it: so the model learns to stop."""
    plain, ending = (byte_tokenizer(add_bos=add_bos, add_eos=add_eos) for add_eos in (False, True))
    rows = [{"text": "it", "label": 1}, {"text": "a longer one" * 5, "label": 0}]

    for task in (CHOICE, replace(CHOICE, candidates=["n", "y"], loss=Loss.lm)):
        examples = encode(rows, task, tokenizer=ending, max_length=40)
        assert examples == encode(rows, task, tokenizer=plain, max_length=40)
    assert all(example.one_token for example in examples)
    [written] = encode([{"q": "Who", "a": "Ann"}], WRITTEN, tokenizer=ending, max_length=64)
    assert written.candidates == ((*ids(" Ann\n"), EOS),)


def test_a_long_prompt_loses_its_beginning() -> None:
    [example] = encode([{"text": "abcdefgh", "label": 0}], CHOICE, tokenizer=byte_tokenizer(), max_length=10)

    assert example.prompt == ids("fgh:")
    assert example.cut
    assert example.candidates == (ids(" no"), ids(" maybe"))


def test_a_long_prompt_keeps_its_bos_token() -> None:
    [example] = encode(
        [{"text": "abcdefgh", "label": 0}], CHOICE, tokenizer=byte_tokenizer(add_bos=True), max_length=10
    )

    assert example.prompt == (BOS, *ids("gh:"))


def test_a_long_prompt_keeps_whatever_the_tokenizer_puts_before_every_text() -> None:
    """Some begin texts with another token than the one that they call BOS, or with several."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<eos> <pad> $A", special_tokens=[("<eos>", EOS), ("<pad>", 0)]
    )

    [example] = encode([{"text": "abcdefgh", "label": 0}], CHOICE, tokenizer=tokenizer, max_length=12)

    assert example.prompt == (EOS, 0, *ids("fgh:"))


def test_a_long_prompt_keeps_a_bos_token_that_its_template_writes() -> None:
    task = replace(CHOICE, template="<bos>{text}:")

    [example] = encode([{"text": "abcdefgh", "label": 0}], task, tokenizer=byte_tokenizer(), max_length=10)

    assert example.prompt == (BOS, *ids("gh:"))


TEXTS = st.text(alphabet=string.ascii_letters, min_size=1, max_size=40).map(lambda letters: f"x{letters}")
"""With a first letter that makes none of them a word for a missing value, such as ``none``."""


@given(TEXTS, st.integers(7, 60), st.booleans())
def test_a_shortened_prompt_is_the_end_of_the_whole_one(text: str, max_length: int, add_bos: bool) -> None:
    tokenizer = byte_tokenizer(add_bos=add_bos)
    row = {"text": text, "label": 0}

    [whole] = encode([row], CHOICE, tokenizer=tokenizer, max_length=1000)
    [short] = encode([row], CHOICE, tokenizer=tokenizer, max_length=max_length)

    longest = max(len(candidate) for candidate in whole.candidates)
    assert short.candidates == whole.candidates
    assert len(short.prompt) == min(len(whole.prompt), max_length - longest)
    assert (short.cut, whole.cut) == (len(short.prompt) < len(whole.prompt), False)
    body = short.prompt[1:] if add_bos and len(short.prompt) > 1 else short.prompt
    assert whole.prompt[len(whole.prompt) - len(body) :] == body
    assert not add_bos or len(short.prompt) == 1 or short.prompt[0] == BOS


def test_candidates_that_leave_no_room_for_the_prompt_are_refused() -> None:
    with pytest.raises(
        ConfigError,
        match=rf"row 0, '{'x' * 77}\.\.\.': the longest candidate has 6 tokens and task.max_length is 6, no room",
    ):
        encode([{"text": "x" * 90, "label": 0}], CHOICE, tokenizer=byte_tokenizer(), max_length=6)


def test_a_long_reference_answer_leaves_half_of_the_room_to_the_prompt() -> None:
    row = {"q": "abcdefghijk", "a": "0123456789"}

    [example] = encode([row], WRITTEN, tokenizer=byte_tokenizer(), max_length=10)

    assert (example.prompt, example.candidates) == (ids("hijk?"), (ids(" 0123"),))
    assert example.cut
    assert example.references == ("0123456789",)


@pytest.mark.parametrize("task", [WRITTEN, CHAT])
def test_the_first_of_several_right_answers_is_the_one_to_learn(task: TaskConfig) -> None:
    """Whatever the others are: a longer one takes no room from the prompt."""
    several = {"q": "Who", "a": ["Ann", "Ann Lee" * 50, "Lee"]}

    [example], [single] = (
        encode([row], task, tokenizer=byte_tokenizer(), max_length=64) for row in (several, {"q": "Who", "a": "Ann"})
    )

    assert example == replace(single, references=("Ann", "Ann Lee" * 50, "Lee"))
    assert not example.scored_cut


def test_a_long_answer_to_a_short_prompt_takes_the_rest() -> None:
    [example] = encode([{"q": "ab", "a": "0123456789"}], WRITTEN, tokenizer=byte_tokenizer(), max_length=10)

    assert (example.prompt, example.candidates) == (ids("ab?"), (ids(" 012345"),))
    assert example.cut  # the answer is


def test_rows_that_ask_alike_are_answered_from_the_same_prompt() -> None:
    """What is trained on is cut by the right answer's length, what is written by ``max_new_tokens`` alone."""
    rows = [{"q": "x" * 600, "a": "y" * num} for num in (10, 400)]

    short, long = encode(rows, WRITTEN, tokenizer=byte_tokenizer(), max_length=512)

    assert short.generation_prompt == long.generation_prompt == ids("x" * (512 - 32 - 1) + "?")
    assert (len(short.prompt), len(long.prompt)) == (500, 256)
    assert short.prompt + short.candidates[0] == ids("x" * 499 + "?" + f" {'y' * 10}\n")


def test_a_prompt_that_is_not_cut_is_the_one_that_an_answer_is_written_from() -> None:
    [written] = encode([{"q": "why", "a": "so"}], WRITTEN, tokenizer=byte_tokenizer(), max_length=64)
    [chosen] = encode([{"text": "x" * 90, "label": 0}], CHOICE, tokenizer=byte_tokenizer(), max_length=64)

    assert written.generation_prompt is written.prompt
    assert chosen.generation_prompt is chosen.prompt


def test_answers_longer_than_a_text_may_be_leave_half_of_it_to_the_prompt() -> None:
    task = replace(WRITTEN, max_new_tokens=100)

    [example] = encode([{"q": "abcdefghijk", "a": "so"}], task, tokenizer=byte_tokenizer(), max_length=10)

    assert example.generation_prompt == ids("hijk?")


def test_a_prompt_that_its_answer_swallows_is_refused() -> None:
    task = replace(CHOICE, template="{text}", candidates=["b", "c"])  # "ab" is one token

    with pytest.raises(
        ConfigError, match=r"row 0, 'a': the prompt must have a token of its own, got none. Extend task.template"
    ):
        encode([{"text": "a", "label": 0}], task, tokenizer=MergingTokenizer(), max_length=9)


def test_a_bad_row_is_numbered() -> None:
    rows = [{"text": "x", "label": 0}, {"text": "x", "label": 5}]

    with pytest.raises(ConfigError, match="row 1: column 'label' must hold an index"):
        encode(rows, CHOICE, tokenizer=byte_tokenizer(), max_length=64)


@pytest.mark.parametrize("name", ["sst2", "rte", "boolq", "wic", "wsc", "cb", "copa", "multirc", "ag_news", "yelp"])
def test_candidates_of_shipped_tasks_follow_their_prompt_byte_for_byte(
    name: str, shipped_task: Callable[[str], TaskConfig]
) -> None:
    task = shipped_task(name)
    row: dict[str, Any] = {column: f"the {column}" for column in columns_used(task)} | {"question": "cause", "label": 0}
    tokenizer = byte_tokenizer()

    [example] = encode([row], task, tokenizer=tokenizer, max_length=512)

    prompt = str(tokenizer.decode(list(example.prompt)))
    for candidate in example.candidates:
        text = str(tokenizer.decode(list(candidate)))
        assert prompt.endswith("\n") != text.startswith(" ")  # exactly one white space at the border
        assert example.prompt + candidate == ids(prompt + text)


def test_a_saved_byte_tokenizer_loads_as_any_other(tmp_path: Path) -> None:
    byte_tokenizer(add_bos=True).save_pretrained(tmp_path)

    loaded = AutoTokenizer.from_pretrained(tmp_path)

    text = "\x00 h\u00e9\u4e2d <eos>?"
    assert loaded(text)["input_ids"] == [BOS, *ids("\x00 h\u00e9\u4e2d "), EOS, *ids("?")]
    assert loaded.decode(list(ids("\x00 h\u00e9\u4e2d"))) == "\x00 h\u00e9\u4e2d"
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id, len(loaded)) == (0, 1, 2, 259)


@pytest.mark.parametrize(
    "change",
    [
        {"template": "{text}"},
        {"candidates": [" no", " yes"]},
        {"candidates": [" maybe", " no"]},
        {"label": "gold"},
        {"labels": ["0", "1"]},
        {"answer": "{a}"},
        {"messages": "m"},
        {"system": "m"},
        {"derive": "copa"},
        {"kind": TaskKind.generation},
    ],
)
def test_the_digest_changes_with_all_that_makes_prompts(change: dict[str, Any]) -> None:
    assert task_digest(replace(CHOICE, **change)) != task_digest(CHOICE)


def test_the_digest_does_not_change_with_names_and_scores() -> None:
    other = replace(CHOICE, name="other", loss=Loss.lm, max_new_tokens=1)

    assert task_digest(other) == task_digest(CHOICE)
    assert task_digest(CHOICE) != "5fe4a4cae4cfb2ba8d50f72831f43d3a760d89109122516ba4cbb80d03192e23"  # of the format 1


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("add_eos", [False, True])
@pytest.mark.parametrize("text", ["it is", "a", "aa", "<eos>", "<eos><eos>", "ends with <eos>"])
def test_a_prompt_to_go_on_from_has_no_end_token_that_its_text_has_not(add_bos: bool, add_eos: bool, text: str) -> None:
    tokenizer = byte_tokenizer(add_bos=add_bos, add_eos=add_eos)
    counted: tuple[int, ...] = ()
    for part in re.split("(<eos>)", text):
        counted += (EOS,) if part == "<eos>" else ids(part)

    [prompt] = encode_prompts([text], tokenizer)

    assert prompt == (BOS,) * add_bos + counted


@pytest.mark.parametrize("add_eos", [False, True])
def test_the_prompt_of_a_row_is_the_prompt_that_is_generated_from(add_eos: bool) -> None:
    tokenizer = byte_tokenizer(add_bos=True, add_eos=add_eos)

    [example] = encode([{"q": "why", "a": "so"}], WRITTEN, tokenizer=tokenizer, max_length=64)

    assert [example.prompt] == encode_prompts(["why?"], tokenizer)


def test_prompts_keep_their_order_and_may_be_none() -> None:
    tokenizer = byte_tokenizer(add_eos=True)

    assert encode_prompts(["b", "a"], tokenizer) == [ids("b"), ids("a")]
    assert encode_prompts([], tokenizer) == []
    assert encode_prompts(["ab: c"], MergingTokenizer()) == [(1001, 1000, ord("c"))]


@pytest.mark.parametrize("add_eos", [False, True])
def test_what_begins_every_text_is_the_tokenizers_bos_or_nothing(add_eos: bool) -> None:
    spaced = byte_tokenizer(add_eos=add_eos)
    spaced.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)

    assert opening(byte_tokenizer(add_bos=True, add_eos=add_eos)) == BOS
    assert opening(byte_tokenizer(add_eos=add_eos)) is None
    assert opening(spaced) is None  # the blank before a text is a part of it
    assert opening(MergingTokenizer()) is None


def test_a_row_whose_prompt_to_write_from_is_cut_counts_as_cut_where_it_is_scored() -> None:
    """The prompt fits with its short answer, and not with room for ``max_new_tokens``."""
    task = replace(WRITTEN, max_new_tokens=8)

    [example] = encode([{"q": "abcdefghijk", "a": "so"}], task, tokenizer=byte_tokenizer(), max_length=16)

    assert example.prompt == ids("abcdefghijk?")
    assert example.candidates == (ids(" so\n"),)
    assert example.generation_prompt == ids("efghijk?")
    assert (example.cut, example.scored_cut) == (False, True)


def test_a_row_that_is_cut_to_be_trained_on_counts_as_cut_where_it_is_scored() -> None:
    """The answer is longer than ``max_new_tokens``, so the prompt that is written from is whole."""
    task = replace(WRITTEN, max_new_tokens=2)

    [example] = encode([{"q": "abc", "a": "0123456789"}], task, tokenizer=byte_tokenizer(), max_length=10)

    assert example.generation_prompt == example.prompt == ids("abc?")
    assert (example.written_cut, example.cut, example.scored_cut) == (False, True, True)
