"""Calibration windows: long documents only, seeded, one window each."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedzo.errors import ConfigError
from fedzo.masks import windows_digest, windows_from_texts

# document i holds the tokens 1000 i, 1000 i + 1, ...: every token says where it comes from
TEXTS = [f"{i} {length}" for i, length in enumerate([5, 40, 8, 8, 100, 7, 9, 300, 8, 2])]


def tokenize(text: str) -> list[int]:
    number, length = map(int, text.split())
    return list(range(1000 * number, 1000 * number + length))


def windows(**changes: int) -> list[torch.Tensor]:
    settings = {"num_docs": 5, "num_tokens": 8, "seed": 3} | changes
    return windows_from_texts(TEXTS, tokenize=tokenize, **settings)


@pytest.mark.parametrize("seed", range(5))
def test_windows_are_runs_of_distinct_documents_that_are_long_enough(seed: int) -> None:
    found = windows(num_docs=7, seed=seed)

    assert {int(w[0]) // 1000 for w in found} == {1, 2, 3, 4, 6, 7, 8}
    for window in found:
        start = int(window[0])
        assert window.dtype == torch.int64
        assert window.tolist() == list(range(start, start + 8))
        assert start % 1000 + 8 <= len(tokenize(TEXTS[start // 1000]))


def test_a_token_that_begins_every_text_stands_in_place_of_a_windows_first() -> None:
    plain = windows()

    found = windows(opening=7)

    assert [window.tolist() for window in found] == [[7, *window[1:].tolist()] for window in plain]
    assert windows_digest(found) != windows_digest(plain)


def test_windows_are_a_function_of_the_seed() -> None:
    assert windows_digest(windows()) == windows_digest(windows())
    assert windows_digest(windows()) != windows_digest(windows(seed=4))


def test_offsets_are_uniform_and_reach_both_ends() -> None:
    text = ["0 17"]  # ten offsets

    starts = [
        int(windows_from_texts(text, tokenize=tokenize, num_docs=1, num_tokens=8, seed=s)[0][0]) for s in range(500)
    ]

    counts = np.bincount(starts, minlength=10)
    assert counts.size == 10
    assert np.abs(counts - 50).max() < 5 * np.sqrt(500 * 0.1 * 0.9)


def test_each_window_has_an_offset_of_its_own() -> None:
    pairs = [
        [
            int(window[0]) % 1000
            for window in windows_from_texts(["0 17", "1 17"], tokenize=tokenize, num_docs=2, num_tokens=8, seed=s)
        ]
        for s in range(400)
    ]

    assert abs(sum(a == b for a, b in pairs) - 40) < 5 * np.sqrt(400 * 0.1 * 0.9)  # one in ten


def test_the_order_of_documents_is_uniform() -> None:
    texts = [f"{i} 8" for i in range(10)]

    firsts = [
        int(windows_from_texts(texts, tokenize=tokenize, num_docs=1, num_tokens=8, seed=s)[0][0]) // 1000
        for s in range(500)
    ]

    assert np.abs(np.bincount(firsts, minlength=10) - 50).max() < 5 * np.sqrt(500 * 0.1 * 0.9)


def test_only_as_many_documents_are_tokenized_as_are_needed() -> None:
    seen: list[str] = []

    def counting(text: str) -> list[int]:
        seen.append(text)
        return tokenize(text)

    windows_from_texts(["1 8"] * 1000, tokenize=counting, num_docs=3, num_tokens=8, seed=0)

    assert len(seen) == 3


def test_the_digest_depends_on_every_token_and_on_where_windows_end() -> None:
    a, b, c = torch.tensor([1, 2]), torch.tensor([3]), torch.tensor([1, 2, 3])

    assert len({windows_digest(w) for w in ([a, b], [b, a], [c], [a], [])}) == 5


def test_too_few_long_documents_are_refused_with_their_number() -> None:
    with pytest.raises(ConfigError, match=r"calibration_docs=8 documents of at least 8 tokens .* got 7 .* among 10"):
        windows(num_docs=8)
