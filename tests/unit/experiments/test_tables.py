"""The generated tables of the pages are tables to whoever renders them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
TABLE = re.compile(r"<!-- table: (\S+) -->\n(.*?)<!-- /table -->", re.DOTALL)
PAGES = (ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("experiments/*/*.md"))


@pytest.mark.parametrize(
    ("name", "body"),
    [found.groups() for page in PAGES for found in TABLE.finditer(page.read_text(encoding="utf-8"))],
    ids=lambda value: value if value.startswith("experiments") else "",
)
def test_every_row_has_the_cells_of_its_head(name: str, body: str) -> None:
    """Between the marks of one file there may be several tables, with an empty line between them."""
    for table in body.split("\n\n"):
        lines = [line for line in table.splitlines() if line.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) <= 1
        assert not lines or set(lines[1]) == set("|-")
