"""The training sets of the study: the original rows, published rewrites, an edit by rule, and files of rewrites."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from fedzo.data.files import Row, read_rows
from fedzo.errors import ConfigError

TASKS = ("copa", "cb")
COLUMN = "premise"
NUM_DRAWS = 5  # of the 20 further draws of the main set's prompt
_CONTRACTIONS = [
    *(
        (f"{verb} not", f"{verb}n't")
        for verb in ("do", "does", "did", "is", "are", "was", "were", "has", "have", "had", "could", "would", "should")
    ),
    *(("cannot", "can't"), ("will not", "won't"), ("it is", "it's"), ("I am", "I'm"), ("they are", "they're")),
]
_TWO_CLAUSES = re.compile(r"([A-Z][^.?!;,:]*) (because|when|after|before|while|although) ([^.?!;,:]+)\.")
_TIME_FIRST = re.compile(r"(When|After|Before|While|Although) ([^.?!;,:]+), ([^.?!;,:]+)\.")
_STARTS = re.compile(r"(The|A|An|He|She|They|We|It|His|Her|Their|My|Our|This|That)\b")


@dataclass(frozen=True, slots=True)
class TrainSet:
    """Rows to train on, in the order of the original rows.

    Attributes:
        arm: Which arm of the study the set is of; draws of one prompt share it, and its learning rate.
        name: Of the set.
        rows: The rows, of which ``COLUMN`` alone may differ from the original.
    """

    arm: str
    name: str
    rows: list[Row]

    @property
    def digest(self) -> str:
        """Of the text, so that the result of a file that has changed is not taken for this one's."""
        return hashlib.sha256("\0".join(row[COLUMN] for row in self.rows).encode()).hexdigest()[:12]


def train_sets(rewrites: Path, task: str, files: list[tuple[str, Path]]) -> list[TrainSet]:
    """All sets of a task, the original first.

    Args:
        rewrites: Folder of the published rewrites, with a folder a task.
        task: One of ``TASKS``.
        files: Arm and file of rows as ``fedzo rephrase --out`` writes them. Those of other tasks are passed over.

    Raises:
        ConfigError: A published rewrite is of no row, or a set is there twice.
    """
    folder = rewrites / task
    original = read_rows(folder / "train.jsonl")
    sets = [TrainSet("original", "original", original)]
    draws = sorted(path.stem.removeprefix("rewrites-oat-gpt4o-") for path in folder.glob("rewrites-oat-gpt4o-draw*"))
    for name in ["main", *draws[:: max(1, len(draws) // NUM_DRAWS)][:NUM_DRAWS]]:
        suffix = "" if name == "main" else f"-{name}"
        sets.append(TrainSet("oat", name, published(original, folder / f"rewrites-oat-gpt4o{suffix}.jsonl")))
    if (file := folder / "rewrites-prompt2-gpt4o.jsonl").exists():
        sets.append(TrainSet("prompt2", "prompt2", published(original, file)))
    sets.append(TrainSet("rule", "rule", [row | {COLUMN: by_rule(row[COLUMN])} for row in original]))
    sets += [TrainSet(arm, arm, rows) for arm, file in files if (rows := _of_task(original, file)) is not None]
    if len({each.name for each in sets}) < len(sets):
        raise ConfigError(f"{task}: each set must have a name of its own, got {[each.name for each in sets]}.")
    return sets


def published(original: list[Row], file: Path) -> list[Row]:
    """The rows with the rewrites that the published judge kept, as they were published."""
    rows = [dict(row) for row in original]
    for rewrite in read_rows(file):
        if not 0 <= rewrite["row"] < len(rows) or rewrite["field"] != COLUMN:
            raise ConfigError(f"{file}: a rewrite must be of {COLUMN!r} of a row, got row {rewrite['row']}.")
        if rewrite["verdict"] == "same":
            rows[rewrite["row"]][COLUMN] = rewrite["text"]
    return rows


def by_rule(text: str) -> str:
    """Two clauses exchanged, a contraction made or undone, or a frame around a single sentence; else as it is."""
    if found := _TWO_CLAUSES.fullmatch(text):
        main, link, other = found.groups()
        return f"{link.capitalize()} {other}, {_lower(main)}."
    if found := _TIME_FIRST.fullmatch(text):
        link, other, main = found.groups()
        return f"{main[:1].upper()}{main[1:]} {link.lower()} {other}."
    for long, short in _CONTRACTIONS:
        for old, new in ((long, short), (short, long)):
            if found := re.search(rf"\b{re.escape(old)}\b", text, re.IGNORECASE):
                new = new[:1].upper() + new[1:] if found[0][:1].isupper() else new
                return text[: found.start()] + new + text[found.end() :]
    one_sentence = text.endswith(".") and not re.search(r"[.?!;:]", text[:-1])
    return f"It so happened that {_lower(text)}" if one_sentence else text  # nearly all of COPA


def changed(original: list[Row], rows: list[Row]) -> int:
    """Rows whose text is another."""
    return sum(one[COLUMN] != other[COLUMN] for one, other in zip(original, rows, strict=True))


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:] if _STARTS.match(text) else text


def _of_task(original: list[Row], file: Path) -> list[Row] | None:
    """The rows of a file if they are these but for the text, with the columns of the original."""
    rows = [{key: row.get(key) for key in original[0]} for row in read_rows(file)]
    kept = [{**row, COLUMN: ""} for row in rows]
    return rows if json.dumps(kept) == json.dumps([{**row, COLUMN: ""} for row in original]) else None
