"""What the checker of the pages' language finds, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
OPENING = "# Title\n\nThis page is for a test.\n\n"


@pytest.fixture(scope="module")
def prose(script: Callable[[Path], ModuleType]) -> ModuleType:
    return script(ROOT / "docs" / "prose.py")


@pytest.fixture
def check(prose: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    def faults(text: str) -> list[tuple[int, str]]:
        page = tmp_path / "page.md"
        page.write_text(text, encoding="utf-8")
        monkeypatch.setattr(prose, "DOCS", (page,))
        return [(line, fault.split(":")[0]) for line, fault in sorted(prose.faults(page))]

    return faults


def words(count: int) -> str:
    return "Word " + "word " * (count - 2) + "word."


LONG = "31 words in a sentence, at most 30"
BEFORE = "the subject stands in the sentence before, name it"
LINK = "the first use of a term is a link"
PAPER = "a paper is a link"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (words(30), []),
        (words(31), [(5, LONG)]),
        (words(20) + " " + words(20), []),
        (f"- {words(30)}\n- {words(31)}", [(6, LONG)]),
        (f"| a |\n|---|\n| {words(31)} |", [(7, LONG)]),
        (f"```\n{words(31)}\n```", []),
        (f"<!-- table: experiments/x.json -->\n\n{words(31)}\n\n<!-- /table -->\n\n{words(31)}", [(11, LONG)]),
        (words(29).replace("word.", "`many words of code` word."), []),
        ("A client sends e.g. " + words(26), []),
        ("A client replies. It then waits.", [(5, BEFORE)]),
        ("Clients reply. So they are heard.", [(5, BEFORE)]),
        ("Clients reply. This is an answer.", [(5, BEFORE)]),
        ("Clients reply. This answer is counted, because it is right.", []),
    ],
)
def test_sentences(check, text: str, expected: list[tuple[int, str]]) -> None:  # type: ignore[no-untyped-def]
    assert check(OPENING + text) == expected


@pytest.mark.parametrize("text", ["# Title\n\n```\ncode\n```\n\nText.", "Text.\n", "# Title\n"])
def test_a_page_begins_with_what_it_is_for(check, text: str) -> None:  # type: ignore[no-untyped-def]
    assert check(text) == [(1, "a page begins with its title and a paragraph that says what it is for")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A scalar is sent.", [(5, LINK)]),
        ("A [scalar](glossary.md#scalar) is sent. Scalars are small.", []),
        ("A [scalar](other.md) is sent.", [(5, LINK)]),
        ("Scalars are sent.\nA [scalar](glossary.md#scalar) is small.", [(5, LINK)]),
        ("A [dropped\nprobe](glossary.md#dropped-probe) is no use of the shorter term.", []),
        ("`scalar` is code, and a scalar_field is another word.", []),
        ("| scalar |\n|---|\n| scalar |", []),
        ("The *walk* is long.", [(5, "italics are for terms of the glossary")]),
        ("The [*scalar*](glossary.md#scalar) is short.", []),
    ],
)
def test_terms(check, text: str, expected: list[tuple[int, str]]) -> None:  # type: ignore[no-untyped-def]
    assert check(OPENING + text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("MeZO (arXiv 2305.17333) is old.", [(5, PAPER)]),
        ("[MeZO](https://arxiv.org/abs/2305.17333) is old.", []),
        ("MeZO ([arXiv\n2305.17333](https://arxiv.org/abs/2305.17333)) is old.", []),
        ("MeZO ([arXiv 2305.17333](https://arxiv.org/abs/2305.17334)) is old.", [(5, PAPER)]),
        ("MeZO ([page](page.md), arXiv\n2305.17333) is old.", [(5, PAPER)]),
        ("| arXiv 2305.17333 |\n|---|\n| arXiv 2305.17334 |", [(5, PAPER), (7, PAPER)]),
        ("`arXiv 2305.17333` is code.", []),
        ("<!-- table: experiments/x.json -->\n\narXiv 2305.17333\n\n<!-- /table -->", []),
    ],
)
def test_papers(check, text: str, expected: list[tuple[int, str]]) -> None:  # type: ignore[no-untyped-def]
    assert check(OPENING + text) == expected


def test_a_term_that_no_page_uses_is_found(prose: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    glossary, page = tmp_path / "glossary.md", tmp_path / "page.md"
    glossary.write_text("# Glossary\n\n### probe\n\nText.\n\n### round trip\n\nText.\n", encoding="utf-8")
    page.write_text("# Page\n\nProbes.\n", encoding="utf-8")
    monkeypatch.setattr(prose, "GLOSSARY", glossary)
    monkeypatch.setattr(prose, "PAGES", (page, glossary))

    assert prose.unused() == ["round trip"]
