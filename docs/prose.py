"""Checks the language of the pages: ``python docs/prose.py``.

A sentence has at most 30 words and names its own subject. A page begins with a paragraph: what it is for. A term of the
glossary is a link to the glossary where a page uses it first, and what a page puts in italics is such a term. A paper
that is named by its number is a link to it.
Lines, links and forbidden words are rumdl's (``pyproject.toml``), which has no rule for sentences.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import sentencex
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parent.parent
GLOSSARY = ROOT / "docs" / "glossary.md"
GENERATED = ROOT / "docs" / "ref-config.md"  # its text is that of docstrings, which hold no links
DOCS = (ROOT / "README.md", *(page for page in sorted((ROOT / "docs").glob("*.md")) if page != GLOSSARY))
PAGES = (
    *DOCS,
    GLOSSARY,
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    *(ROOT / side / "README.md" for side in ("clients", "server")),
    *sorted((ROOT / "experiments").rglob("README.md")),
)

MAX_WORDS = 30
TABLE = re.compile(r"<!-- table: .*?<!-- /table -->", re.DOTALL)  # docs/tables.py writes these
PAPER = re.compile(r"arXiv \d{4}\.\d+")
VERB = (
    "is|are|was|were|has|have|had|can|could|may|might|must|will|would|should|does|do|did|makes?|means?|gives?|takes?|"
    "needs?|holds?|costs?|keeps?|says?|shows?|works?|applies|apply|leaves?|lets?|happens?|goes|go|gets?"
)
SUBJECT_BEFORE = re.compile(
    r"((And|But|So|Then|Here|There|Otherwise),? )?"
    rf"((it|they|both|neither)\b|(this|that|these|those|each|none) ({VERB})\b)",
    re.IGNORECASE,
)


class Block(NamedTuple):
    """One paragraph, list item, table cell, heading or fence: where it stands, what it is and its text."""

    line: int
    kind: str  # the token that opened it, "paragraph_open" for list items too
    token: Token

    @property
    def text(self) -> str:
        """Its words; a piece of code counts as one, a picture as none."""
        words = {"softbreak": " ", "hardbreak": " ", "code_inline": "Code"}
        return "".join(
            words.get(child.type, child.content) for child in self.token.children or [] if child.type != "image"
        )


def blocks(text: str) -> Iterator[Block]:
    """All blocks of a page in order, without those that docs/tables.py writes."""
    text = TABLE.sub(lambda found: "\n" * found[0].count("\n"), text)
    opened, line = "", 0
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        line = token.map[0] + 1 if token.map else line
        if token.type in ("inline", "fence"):
            yield Block(line, opened if token.type == "inline" else "fence", token)
        elif token.nesting == 1:
            opened = token.type


def sentence_faults(block: Block) -> Iterator[str]:
    """What is wrong with the sentences of a block."""
    for sentence in (part.strip() for part in sentencex.segment("en", block.text)):
        words = sum(any(c.isalnum() for c in word) for word in sentence.split())
        if words > MAX_WORDS:
            yield f"{words} words in a sentence, at most {MAX_WORDS}: {sentence[:70]} ..."
        if SUBJECT_BEFORE.match(sentence):
            yield f"the subject stands in the sentence before, name it: {sentence[:70]}"


def slug(term: str) -> str:
    """The anchor of a heading."""
    return re.sub(r"[^\w-]", "", term.lower().replace(" ", "-"))


def terms() -> list[str]:
    """What the glossary defines: its third-level headings."""
    return re.findall(r"^### (.+)$", GLOSSARY.read_text(encoding="utf-8"), flags=re.MULTILINE)


def pieces(block: Block) -> list[tuple[str, str]]:
    """The text of a block without its code, in pieces, each with the link that it stands in, or ""."""
    found = [("", "")]
    for child in block.token.children or []:
        if child.type in ("link_open", "link_close"):
            found.append(("", str(child.attrGet("href") or "")))
        else:
            text, link = found[-1]
            more = child.content if child.type == "text" else " " if child.type == "softbreak" else "|"
            found[-1] = (text + more, link)
    return found


def uses(block: Block, names: list[str]) -> Iterator[tuple[str, str]]:
    """Each term in the text of a block, the longest where two begin alike, with the link that it stands in, or ""."""
    longest_first = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    pattern = re.compile(rf"(?<![\w-])({longest_first})s?(?![\w-])", re.IGNORECASE)
    known = {name.lower(): name for name in names}
    for text, link in pieces(block):
        yield from ((known[found[1].lower()], link) for found in pattern.finditer(text))


def paper_faults(block: Block) -> Iterator[str]:
    """Numbers of papers that are no links to them."""
    for text, link in pieces(block):
        for paper in PAPER.findall(text):
            url = f"https://arxiv.org/abs/{paper.removeprefix('arXiv ')}"
            if link != url:
                yield f"a paper is a link: [{paper}]({url})"


def term_faults(page: list[Block]) -> Iterator[tuple[int, str]]:
    """First uses that are no link to the glossary, and italics that the glossary does not know."""
    names, seen = terms(), set()
    known = {name.lower() for name in names}
    for block in (block for block in page if block.kind == "paragraph_open"):
        for name, target in uses(block, names):
            if name not in seen and not target.endswith(f"glossary.md#{slug(name)}"):
                yield block.line, f"the first use of a term is a link: [{name}](glossary.md#{slug(name)})"
            seen.add(name)
        children = block.token.children or []
        for opening, inside in pairwise(children):
            if opening.type == "em_open" and inside.content.lower().removesuffix("s") not in known:
                yield block.line, f"italics are for terms of the glossary: {inside.content}"


def faults(path: Path) -> Iterator[tuple[int, str]]:
    """Line and fault, for all that is wrong with a page."""
    page = list(blocks(path.read_text(encoding="utf-8")))
    if len(page) < 2 or page[0].kind != "heading_open" or page[1].kind != "paragraph_open":
        yield 1, "a page begins with its title and a paragraph that says what it is for"
    for block in page:
        if block.kind != "heading_open":
            yield from ((block.line, fault) for fault in sentence_faults(block))
        if path != GENERATED:
            yield from ((block.line, fault) for fault in paper_faults(block))
    if path in DOCS and path != GENERATED:
        yield from term_faults(page)


def unused() -> list[str]:
    """Terms of the glossary that no other page uses."""
    names = terms()
    texts = [path.read_text(encoding="utf-8") for path in PAGES if path != GLOSSARY]
    used = {name for text in texts for block in blocks(text) for name, _ in uses(block, names)}
    return [name for name in names if name not in used]


def main() -> int:
    """Print every fault as ``page:line: fault``; 1 if there is one."""
    lines = [f"{path.relative_to(ROOT)}:{line}: {fault}" for path in PAGES for line, fault in sorted(faults(path))]
    lines += [f"{GLOSSARY.relative_to(ROOT)}: no page uses the term {term!r}" for term in unused()]
    sys.stderr.writelines(f"{line}\n" for line in lines)
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
