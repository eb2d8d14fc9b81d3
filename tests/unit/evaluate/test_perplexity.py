"""Perplexity against transformers' own loss, window by window, and windows cut by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from fedzo.errors import ConfigError, NumericsError
from fedzo.evaluate.perplexity import perplexity, text_windows
from fedzo.models import scoring
from fedzo.models.load import wrap_model
from fedzo.testing.tiny_models import FAMILIES, byte_tokenizer, tiny_loaded, tiny_sketch

TEXTS = ["One day a fox ", "met a crow.\n", "", "The crow held a piece of cheese in her beak, and the fox was hungry."]


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_exponential_of_transformers_mean_loss(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny_loaded(family)
    windows = text_windows(loaded, TEXTS, num_tokens=24, source="a.txt")
    whole = perplexity(loaded, windows)
    monkeypatch.setattr(scoring, "_CHUNK_LOGITS", 5 * len(loaded.tokenizer))  # the logits of five positions at a time
    calls: list[tuple[int, int]] = []

    found = perplexity(loaded, windows, on_window=lambda done, total: calls.append((done, total)))

    with torch.inference_mode():
        losses = [loaded.model(input_ids=row[None], labels=row[None]).loss.item() for row in windows]
    assert found.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert found.value == pytest.approx(whole.value, rel=1e-6)
    assert (found.num_windows, found.num_tokens) == (3, 3 * 23)
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_a_sketch_has_the_perplexity_of_the_dense_model_of_its_weights() -> None:
    model = tiny_sketch()
    sketch = wrap_model(model, byte_tokenizer())
    windows = text_windows(sketch, TEXTS, num_tokens=24, source="a.txt")
    found = perplexity(sketch, windows)
    for name, layer in [(name, layer) for name, layer in model.named_modules() if hasattr(layer, "codes")]:
        dense = nn.Linear(layer.in_features, layer.out_features, bias=False)
        dense.weight = nn.Parameter(layer.weight, requires_grad=False)
        model.set_submodule(name, dense)

    with torch.inference_mode():
        losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in windows]

    assert found.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)


def test_a_model_that_knows_nothing_is_as_perplexed_as_the_vocabulary_is_large() -> None:
    loaded = tiny_loaded()
    for parameter in loaded.model.parameters():
        parameter.zero_()

    found = perplexity(loaded, text_windows(loaded, TEXTS, num_tokens=8, num_windows=2, source="a.txt"))

    assert (found.value, found.num_windows, found.num_tokens) == (pytest.approx(512, rel=1e-6), 2, 14)


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), byte_tokenizer(add_eos=True)])
def test_windows_are_cut_out_of_the_joined_documents_without_overlap_or_special_tokens(tokenizer: Any) -> None:
    loaded = wrap_model(tiny_loaded().model, tokenizer)

    windows = text_windows(loaded, ["ab", "cde", "", "fgh\n", "i"], num_tokens=3, source="a.txt")
    first = text_windows(loaded, ["ab", "cde", "", "fgh\n", "i"], num_tokens=3, num_windows=1, source="a.txt")

    assert windows.tolist() == [[3 + ord(letter) for letter in part] for part in ("abc", "def", "gh\n")]
    assert (windows.dtype, first.tolist()) == (torch.int64, windows[:1].tolist())


@pytest.mark.parametrize("add_eos", [False, True])
def test_a_token_that_begins_every_text_stands_in_place_of_a_windows_first(add_eos: bool) -> None:
    """The tokens that are predicted are those of a tokenizer without it."""
    model, texts = tiny_loaded().model, ["ab", "cde", "", "fgh\n", "i"]
    plain = text_windows(wrap_model(model, byte_tokenizer()), texts, num_tokens=3, source="a.txt")
    loaded = wrap_model(model, byte_tokenizer(add_bos=True, add_eos=add_eos))

    windows = text_windows(loaded, texts, num_tokens=3, source="a.txt")

    assert windows[:, 0].tolist() == [1, 1, 1]
    assert torch.equal(windows[:, 1:], plain[:, 1:])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"num_tokens": 8},
            r"a.txt: must hold at least 1 x 8 tokens .*, got 5 tokens of 2 documents. Give more text, or",
        ),
        ({"num_tokens": 2, "num_windows": 3}, r"a.txt: must hold at least 3 x 2 tokens .*, got 5 tokens of 2 doc"),
        ({"num_tokens": 1}, r"a window must have at least 2 tokens and at most 512, the model's positions, got 1\."),
        ({"num_tokens": 513}, r"a window must have .* at most 512, the model's positions, got 513. Choose another"),
    ],
)
def test_windows_that_cannot_be_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        text_windows(tiny_loaded(), ["abc", "de"], **settings, source="a.txt")


def test_a_token_without_an_embedding_is_refused() -> None:
    loaded = tiny_loaded()
    loaded.tokenizer.add_tokens([f"<{number}>" for number in range(300)])

    with pytest.raises(ConfigError, match=r"a.txt: every token must have a row of the model's embedding"):
        text_windows(loaded, ["abc<299>"], num_tokens=2, source="a.txt")


def test_a_loss_that_is_no_number_is_refused() -> None:
    loaded = tiny_loaded()
    windows = text_windows(loaded, TEXTS, num_tokens=24, source="a.txt")
    loaded.model.get_input_embeddings().weight[windows[1, 3]] = torch.nan

    with pytest.raises(NumericsError, match=r"perplexity: the loss of window \d must be finite .*, got nan. Write"):
        perplexity(loaded, windows)
