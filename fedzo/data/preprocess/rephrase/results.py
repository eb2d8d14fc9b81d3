"""Rewrites that a site has made, found by the recipe and the row they belong to.

A site keeps one file a recipe, one line a row. A row that has a line is never rewritten anew, so a run that goes on
finds the text that it began with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from fedzo.data.config import TaskConfig
from fedzo.data.files import Row
from fedzo.data.preprocess.rephrase.config import OatRephraseConfig
from fedzo.errors import ConfigError
from fedzo.records.decode import canonical, decode_json, to_json
from fedzo.records.folder import folder_of_one_process, make_folder, raised_as, replace_file
from fedzo.records.rephrase import RowOutcome

_FOLDER = "results"


def row_digest(row: Row) -> str:
    """Digest of a row's columns and values, 32 hexadecimal digits, whatever the order of its columns."""
    plain = json.dumps(row, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.blake2b(plain.encode(), digest_size=16).hexdigest()


def set_digest(outcomes: Iterable[RowOutcome]) -> str:
    """Digest of a set of rows as they were, in their order."""
    return hashlib.sha256("".join(each.row for each in outcomes).encode()).hexdigest()


def recipe_digest(config: OatRephraseConfig, task: TaskConfig) -> str:
    """Digest of a recipe whose prompts are known, and of which label has which meaning: others make other results.

    Of a task that the recipe tells of, the candidates count as well: the check for leaks looks for their words.
    """
    if not config.prompt:
        raise ValueError("the digest of the prompts must be filled in first")
    plain = asdict(config)
    if task.labels or config.meanings:
        plain["labels"] = [task.label, *task.labels]
    if config.meanings:
        plain["candidates"] = task.candidates
    return hashlib.sha256(canonical(plain)).hexdigest()


@dataclass(frozen=True, slots=True)
class Results:
    """The results of one recipe at one site.

    Attributes:
        folder: Where the site keeps what rewriting leaves; made when it is needed.
        recipe: Digest of the recipe.
    """

    folder: Path
    recipe: str

    @property
    def file(self) -> Path:
        """The file of this recipe."""
        return self.folder / _FOLDER / f"{self.recipe}.jsonl"

    def file_of_set(self, outcomes: Iterable[RowOutcome], suffix: str) -> Path:
        """A file of one set of rows with this recipe."""
        return self.folder / _FOLDER / f"{self.recipe[:16]}-{set_digest(outcomes)[:16]}{suffix}"

    def older(self) -> list[Path]:
        """Copies of the file from before outcomes of it were replaced, the last one last."""
        return sorted(self.file.parent.glob(f"{self.recipe}.older-{'[0-9]' * 4}.jsonl"))

    def read(self) -> Mapping[str, RowOutcome]:
        """What is there, by the digest of the row.

        Raises:
            ConfigError: The file holds something else.
        """
        try:
            found = self.file.stat()
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.file}: it must be readable, got: {error}.") from error
        return _read(self.file, (found.st_ino, found.st_mtime_ns, found.st_size))

    def find(self, rows: Iterable[Row]) -> list[RowOutcome] | None:
        """The outcomes of these rows in their order; None where one of them has none."""
        there = self.read()
        found = [there.get(row_digest(row)) for row in rows]
        return None if any(each is None for each in found) else [each for each in found if each is not None]

    def add(self, outcomes: Mapping[str, RowOutcome], *, instead: Iterable[str] = ()) -> None:
        """Keep outcomes beside those that are there; a row that has one keeps that.

        Args:
            outcomes: By the digest of the row.
            instead: Rows whose new outcome takes the place of the one that is there. The file as it was is kept, too
                (``older``), for runs that began with it.

        Raises:
            FolderInUseError: Another process writes there.
            ConfigError: The file cannot be written.
        """
        with raised_as(
            ConfigError, f"{self.file}: it must be writable", "Make room, or choose another rewriter.store."
        ):
            make_folder(self.file.parent)
            with folder_of_one_process(self.file.parent):
                if instead := set(instead):
                    last = int(older[-1].stem[-4:]) if (older := self.older()) else 0  # a site may remove some
                    copy = self.file.with_suffix(f".older-{last + 1:04d}.jsonl")
                    replace_file(copy, self.file.read_text(encoding="utf-8"), durable=True, mode=0o600)
                both = {**outcomes, **self.read()} | {row: outcomes[row] for row in instead}
                text = "".join(f"{to_json(outcome)}\n" for outcome in both.values())
                replace_file(self.file, text, durable=True, mode=0o600)


@lru_cache(maxsize=1)
def _read(file: Path, state: tuple[int, int, int]) -> Mapping[str, RowOutcome]:
    """The outcomes of a file, which are the same for each client until another file takes its place (``state``)."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: it must be readable, got: {error}.") from error
    remedy = "Remove the file: the rows are put together anew from the kept answers."
    outcomes: dict[str, RowOutcome] = {}
    for number, line in enumerate(lines, start=1):
        outcome = decode_json(RowOutcome, line, where=f"{file}:{number}", error=ConfigError, remedy=remedy)
        outcomes[outcome.row] = outcome
    return outcomes


def apply_outcomes(rows: Iterable[Row], outcomes: Iterable[RowOutcome]) -> list[Row]:
    """The rows with the text of their outcomes; all other columns, and the order, stay."""
    return [{**row, each.column: each.text} for row, each in zip(rows, outcomes, strict=True)]
