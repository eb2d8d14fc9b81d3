"""A local chat model against a slow loop, and its samples against the softmax that they are drawn from."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers.utils import chat_template_utils

from fedzo.config.schema import LaunchConfig
from fedzo.data.config import Loss, TaskConfig, TaskKind
from fedzo.data.encode import encode
from fedzo.data.preprocess.backend import (
    REWRITERS,
    Completion,
    EndpointError,
    Message,
    Request,
    RowFault,
)
from fedzo.errors import ConfigError
from fedzo.models.config import ChatDType, TransformersConfig
from fedzo.registry import broken_rules
from fedzo.testing.tiny_models import byte_tokenizer, tiny_loaded

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{{ raise_exception('no assistant') }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
)
TEXTS = ["a", "a longer one", "and the longest of these three"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Saves a tiny model with a chat template, and returns its folder."""

    def save(*, template: str | None = TEMPLATE, end: int | None = None) -> str:
        folder = tmp_path_factory.mktemp("chat")
        tiny = tiny_loaded(seed=1)
        tiny.tokenizer.chat_template = template
        tiny.model.generation_config.eos_token_id = end
        tiny.model.save_pretrained(folder)
        tiny.tokenizer.save_pretrained(folder)
        return str(folder)

    return save


@pytest.fixture(scope="module")
def chatty(saved: Callable[..., str]) -> str:
    """The folder of a tiny chat model."""
    return saved()


def _request(folder: str, text: str, **changes: Any) -> Request:
    given = {"temperature": 0.0, "seed": 0, "max_tokens": 6} | changes
    return Request(messages=(Message("user", text),), model=folder, **given)


def _prompt(text: str) -> list[int]:
    return list(tiny_loaded(seed=1).tokenizer(f"<user>{text}:")["input_ids"])


def _slow(prompt: list[int], num: int) -> list[int]:
    ids, model = list(prompt), tiny_loaded(seed=1).model
    for _ in range(num):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_greedy_answers_equal_the_slow_loop(batch_size: int, chatty: str) -> None:
    backend = REWRITERS.build(TransformersConfig(model=chatty, batch_size=batch_size))
    tokenizer = tiny_loaded(seed=1).tokenizer

    answers = backend.complete([_request(chatty, text) for text in TEXTS])

    for text, answer in zip(TEXTS, answers, strict=True):
        assert isinstance(answer, Completion)
        assert answer.text == tokenizer.decode(_slow(_prompt(text), 6), skip_special_tokens=True)
        assert (answer.prompt_tokens, answer.completion_tokens) == (len(_prompt(text)), 6)
        assert answer.truncated
        assert backend.count_tokens(_request(chatty, text)) == answer.prompt_tokens


def test_an_answer_ends_at_the_end_token(saved: Callable[..., str]) -> None:
    tokens = _slow(_prompt("a"), 6)
    folder = saved(end=tokens[2])
    first = tokens.index(tokens[2])

    (answer,) = REWRITERS.build(TransformersConfig(model=folder)).complete([_request(folder, "a")])

    assert isinstance(answer, Completion)
    assert answer.text == tiny_loaded(seed=1).tokenizer.decode(tokens[:first], skip_special_tokens=True)
    assert (answer.truncated, answer.completion_tokens) == (False, first + 1)


def test_an_answer_ends_where_the_chat_template_ends_one(
    saved: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where neither the tokenizer nor the model names that token as an end."""
    folder = saved(template="{% for message in messages %}<{{ message.role }}>{{ message.content }}<bos>{% endfor %}:")
    written = [tiny_loaded().tokenizer.encode("ab<bos>cd")]
    monkeypatch.setattr("fedzo.models.chat.generate_tokens", lambda *given, **settings: written)

    (answer,) = REWRITERS.build(TransformersConfig(model=folder)).complete([_request(folder, "a")])

    assert isinstance(answer, Completion)
    assert (answer.text, answer.truncated, answer.completion_tokens) == ("ab", False, 3)


@pytest.mark.slow
def test_samples_are_drawn_from_the_softmax(chatty: str) -> None:
    """Chi-square over the likeliest texts and the rest; its 99.99 % quantile at 10 degrees of freedom is 35.6."""
    backend, num = REWRITERS.build(TransformersConfig(model=chatty, batch_size=500)), 2000
    tiny = tiny_loaded(seed=1)
    with torch.no_grad():
        logits = tiny.model(torch.tensor([_prompt("a")])).logits[0, -1].double()
    shares: Counter[str] = Counter()
    for token, share in enumerate(torch.softmax(logits / 0.7, 0).tolist()):
        shares[tiny.tokenizer.decode([token], skip_special_tokens=True)] += share
    likely = dict(shares.most_common(10))

    answers = backend.complete([_request(chatty, "a", temperature=0.7, seed=s, max_tokens=1) for s in range(num)])

    texts = [answer.text for answer in answers if isinstance(answer, Completion)]
    seen = np.array([texts.count(text) for text in likely], float)
    expected = np.array(list(likely.values())) * num
    seen, expected = np.append(seen, num - seen.sum()), np.append(expected, num - expected.sum())
    assert len(texts) == num
    assert expected.min() > 5
    assert float(((seen - expected) ** 2 / expected).sum()) < 35.6


def test_a_sample_depends_on_its_own_seed_alone(chatty: str) -> None:
    backend = REWRITERS.build(TransformersConfig(model=chatty, batch_size=8))
    requests = [_request(chatty, text, temperature=1.0, seed=seed) for text in TEXTS for seed in (0, 1, 2**64 + 2)]

    together = backend.complete(requests)
    alone = [backend.complete([request])[0] for request in requests]

    assert together == alone
    assert len({answer.text for answer in together[:3] if isinstance(answer, Completion)}) == 3


def test_a_prompt_beyond_the_context_is_refused_alone(chatty: str) -> None:
    backend = REWRITERS.build(TransformersConfig(model=chatty, context_tokens=40, max_tokens=6))
    assert backend.room(chatty) == 40
    fits = 40 - 6 - len(_prompt(""))

    answers = backend.complete([_request(chatty, "x" * (fits + 1)), _request(chatty, "x" * fits)])

    assert isinstance(answers[0], RowFault)
    assert answers[0].reason == "refused"
    assert "the prompt has 35 tokens, and with 6 of an answer must have 40" in str(answers[0])
    assert isinstance(answers[1], Completion)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=["python", "gpu", "cpu", "cublas"],
)
def test_memory_that_does_not_hold_the_prompts_is_told_with_the_setting_that_helps(
    error: Exception, chatty: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = REWRITERS.build(TransformersConfig(model=chatty))
    errors = [error, RuntimeError("mat1 and mat2 shapes cannot be multiplied")]

    def fails(*given: Any, **settings: Any) -> Any:
        raise errors.pop(0)

    monkeypatch.setattr("fedzo.models.chat.generate_tokens", fails)

    with pytest.raises(EndpointError, match=r"does not hold 1 prompts at once\. Lower rewriter\.batch_size; "):
        backend.complete([_request(chatty, "a")])
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes"):  # of which that is no remedy
        backend.complete([_request(chatty, "a")])


def test_models_are_told_apart_by_what_is_in_them(saved: Callable[..., str], chatty: str) -> None:
    other = saved(template=TEMPLATE + " ")
    backend = REWRITERS.build(TransformersConfig(model=chatty))

    assert backend.fingerprint(chatty) == backend.fingerprint(saved())
    assert backend.fingerprint(chatty) != backend.fingerprint(other)


def test_a_model_that_computes_otherwise_is_another(saved: Callable[..., str], chatty: str) -> None:
    """By what its config.json says, or in another dtype: with the same weights it writes other text."""
    other = saved()
    file = Path(other, "config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "rms_norm_eps": 0.01}))
    dtypes = (ChatDType.float32, ChatDType.bfloat16)
    backends = [REWRITERS.build(TransformersConfig(model=chatty, dtype=dtype)) for dtype in dtypes]

    found = {backend.fingerprint(folder) for backend in backends for folder in (chatty, other)}

    assert len(found) == 4


def test_a_template_that_refuses_a_role_stops(chatty: str) -> None:
    request = Request((Message("assistant", "I said"),), chatty, 0.0, 0, 4)

    with pytest.raises(EndpointError, match=r"its chat template must take the roles assistant, but says: no assistant"):
        REWRITERS.build(TransformersConfig(model=chatty)).complete([request])


def test_models_that_cannot_be_used(saved: Callable[..., str], tmp_path: Path) -> None:
    bare = saved(template=None)
    with pytest.raises(ConfigError, match=r"must be a chat model, but its tokenizer has no chat template. Take"):
        REWRITERS.build(TransformersConfig(model=bare)).fingerprint(bare)
    with pytest.raises(ConfigError, match=r"rewriter.model '/.*': model.name .* must hold config.json"):
        REWRITERS.build(TransformersConfig(model=str(tmp_path))).fingerprint(str(tmp_path))
    with pytest.raises(ConfigError, match=r"rewriter.model must be a folder with a chat model, or smollm2-135m, got"):
        REWRITERS.build(TransformersConfig(model="some/hub-name"))
    with pytest.raises(ConfigError, match=r"rewriter.judge_model must be a folder"):
        REWRITERS.build(TransformersConfig(model="smollm2-135m", judge_model="nowhere"))
    (found,) = broken_rules(TransformersConfig(model="smollm2-135m", batch_size=0), LaunchConfig())
    assert found.text.startswith("rewriter.batch_size must be >= 1")


def test_a_template_that_asks_for_the_day_gets_the_same_one_every_day(
    saved: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own whitespace, of which Jinja drops some at the start of a line, stays as it is."""
    folder, tokenizer = saved(template="{{ strftime_now('%A') }}" + TEMPLATE), byte_tokenizer()
    tokenizer.chat_template = "\n  {% if true %}on {% endif %}{{ strftime_now('%A') }}{{ messages[-1].content }}"
    task = TaskConfig(name="mine", kind=TaskKind.instruction, loss=Loss.lm, template="{q}", answer="{a}")
    read = []

    for day in (3, 4):
        clock = SimpleNamespace(now=lambda day=day: datetime(2026, 1, day))
        monkeypatch.setattr(chat_template_utils, "datetime", clock)
        num_tokens = REWRITERS.build(TransformersConfig(model=folder)).count_tokens(_request(folder, "a"))
        examples = encode([{"q": "Hi", "a": "Yo"}], task, tokenizer=tokenizer, max_length=64)
        read.append((num_tokens, examples))

    assert read[0] == read[1]
    num_tokens, [example] = read[0]
    assert num_tokens == len(tokenizer("26 Jul 2024<user>a:")["input_ids"])
    assert list(example.prompt) == tokenizer("\non 26 Jul 2024")["input_ids"]
    assert list(example.candidates[0]) == tokenizer("Yo")["input_ids"]
