"""Greedy generation against a loop without cache, padding or batches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fedzo.data.config import TaskKind
from fedzo.errors import ConfigError
from fedzo.models import generate as module
from fedzo.models.generate import answer_ends, generate, generate_tokens
from fedzo.testing.tiny_models import FAMILIES, WITHOUT_ATTENTION, tiny_loaded, tiny_model

PROMPTS = [[65, 66, 67], [70], list(range(80, 97))]


def slow_tokens(model: Any, prompt: list[int], num: int) -> list[int]:
    ids = list(prompt)
    for _ in range(num):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", [*FAMILIES, *WITHOUT_ATTENTION])
@pytest.mark.parametrize("tokens_per_batch", [1, 4096])
def test_answers_equal_the_slow_loop_for_every_batching(family: str, tokens_per_batch: int) -> None:
    loaded = tiny_loaded(family, seed=1)
    expected = [slow_tokens(loaded.model, prompt, 6) for prompt in PROMPTS]

    answers = generate(loaded, PROMPTS, max_new_tokens=6, tokens_per_batch=tokens_per_batch)

    assert answers == [loaded.tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in expected]


def test_what_a_checkpoint_asks_of_a_generation_changes_no_answer() -> None:
    """Greedy means greedy: a penalty on words of the prompt would punish an answer that is copied from it."""
    loaded = tiny_loaded(seed=1)
    expected = generate(loaded, PROMPTS, max_new_tokens=6, tokens_per_batch=64)
    own = loaded.model.generation_config
    own.repetition_penalty, own.no_repeat_ngram_size, own.suppress_tokens = 5.0, 1, [65, 66, 70]

    assert generate(loaded, PROMPTS, max_new_tokens=6, tokens_per_batch=64) == expected
    assert loaded.model.generation_config is own
    assert own.repetition_penalty == 5.0


def test_keys_and_values_that_are_kept_count_towards_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, asked = tiny_loaded(seed=1), [[65, 66]] * 8
    sizes: list[int] = []
    monkeypatch.setattr(module, "cache_tokens", lambda model: 2.0)

    generate(loaded, asked, max_new_tokens=6, tokens_per_batch=64, on_batch=lambda done, total: sizes.append(done))

    assert sizes == [4, 8]  # of 8 tokens each, which take the memory of 16


def test_an_answer_ends_at_the_end_token() -> None:
    loaded = tiny_loaded(seed=1)
    first = slow_tokens(loaded.model, PROMPTS[0], 3)
    loaded.model.generation_config.eos_token_id = first[1]

    answers = generate(loaded, PROMPTS[:1], max_new_tokens=8, tokens_per_batch=64)

    stop = first.index(first[1]) + 1
    assert answers == [loaded.tokenizer.decode(first[:stop], skip_special_tokens=True).strip()]


class NewlineAfterTwo:
    """Stands in for a model that writes ``ab``, a line's end, and more."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self.generation_config = None
        self.config = tiny_model("llama").config
        self.settings: Any = None

    def generate(self, ids: torch.Tensor, *, attention_mask: torch.Tensor, generation_config: Any) -> torch.Tensor:
        self.settings = generation_config
        return torch.cat([ids, torch.tensor([self.tokens] * len(ids))], dim=1)


def test_only_the_first_line_is_kept_where_it_is_asked_for() -> None:
    loaded = tiny_loaded()
    encode = loaded.tokenizer.encode
    stand_in = NewlineAfterTwo(encode(" ab\ncd"))
    fake = replace(loaded, model=stand_in)  # type: ignore[arg-type]

    whole = generate(fake, [[65]], max_new_tokens=8, tokens_per_batch=64)
    assert encode("\n")[0] not in stand_in.settings.eos_token_id
    line = generate(fake, [[65]], max_new_tokens=8, tokens_per_batch=64, stop_at_newline=True)

    assert (whole, line) == (["ab\ncd"], ["ab"])
    assert encode("\n")[0] in stand_in.settings.eos_token_id


def test_the_first_line_is_that_of_the_text_as_it_was_written() -> None:
    loaded = tiny_loaded()
    fake = replace(loaded, model=NewlineAfterTwo(loaded.tokenizer.encode("\n\ncd")))  # type: ignore[arg-type]

    assert generate(fake, [[65]], max_new_tokens=8, tokens_per_batch=64, stop_at_newline=True) == [""]


def test_an_answer_ends_at_a_further_end_whatever_follows_it() -> None:
    loaded = tiny_loaded()
    stand_in = NewlineAfterTwo(loaded.tokenizer.encode("ab<bos>cd"))
    fake = replace(loaded, model=stand_in)  # type: ignore[arg-type]
    bos = loaded.tokenizer.bos_token_id

    assert generate(fake, [[65]], max_new_tokens=8, tokens_per_batch=64, ends={bos}) == ["ab"]
    assert bos in stand_in.settings.eos_token_id


@pytest.mark.parametrize(
    ("kind", "ends"),
    [(TaskKind.instruction, {2}), (TaskKind.generation, {3 + ord("\n")}), (TaskKind.candidates, set())],
)
def test_an_answer_ends_where_the_score_of_its_task_reads_to(kind: TaskKind, ends: set[int]) -> None:
    assert answer_ends(tiny_loaded().tokenizer, kind) == ends


@pytest.mark.parametrize(
    ("lengths", "max_new_tokens", "said"),
    [
        ([1, 509], 4, r"prompt 1 must fit into .* 512 positions together with 4 tokens of an answer, got 509 tokens\."),
        ([1], 512, r"prompt 0 must fit into .* together with 512 .*, got 1 tokens\. .* or lower --max-new-tokens"),
    ],
)
def test_a_prompt_without_room_for_an_answer_is_refused(lengths: list[int], max_new_tokens: int, said: str) -> None:
    """Cut, it would ask something else; and behind its last position a model has nothing to say."""
    prompts = [[i % 250 for i in range(length)] for length in lengths]

    with pytest.raises(ConfigError, match=said):
        generate(tiny_loaded("gpt2"), prompts, max_new_tokens=max_new_tokens, tokens_per_batch=600)


def test_an_answer_may_take_the_last_position() -> None:
    loaded = tiny_loaded("gpt2")  # 512 positions
    prompt = [i % 250 for i in range(508)]

    answers = generate_tokens(loaded, [prompt], ends=set(), max_new_tokens=4, tokens_per_batch=600)

    assert answers == [slow_tokens(loaded.model, prompt, 4)]


def test_global_generators_are_untouched() -> None:
    before = torch.random.get_rng_state()

    generate(tiny_loaded(), PROMPTS, max_new_tokens=3, tokens_per_batch=64)

    assert torch.equal(before, torch.random.get_rng_state())


def test_an_empty_prompt_is_refused_and_no_prompt_gives_no_answer() -> None:
    with pytest.raises(ConfigError, match="prompt must have at least one token"):
        generate(tiny_loaded(), [[1], []], max_new_tokens=3, tokens_per_batch=64)
    assert generate(tiny_loaded(), [], max_new_tokens=3, tokens_per_batch=64) == []
