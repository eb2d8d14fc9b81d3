"""Train, dev and test rows of a task: from the embedded set, from one file, or from a folder.

Which rows are used depends on the files and ``split.seed`` only (positions ranked by Philox words): the same on
every machine, and under every template that tells the same rows apart.
"""

from __future__ import annotations

import glob
import logging
import re
from collections.abc import Callable, Set
from dataclasses import dataclass
from pathlib import Path

from fedzo.data.config import DataConfig, SplitConfig, TaskConfig
from fedzo.data.embedded import rotten_tomatoes
from fedzo.data.files import SUFFIXES, Located, Row, read_located, refuse_marked
from fedzo.data.tasks import has_answer, render
from fedzo.errors import ConfigError
from fedzo.records.folder import raised_as
from fedzo.zo.directions import PURPOSE_SPLIT, permutation, stream_key

logger = logging.getLogger(__name__)

EMBEDDED: dict[str, Callable[[], list[Row]]] = {"rotten_tomatoes": rotten_tomatoes}
"""Tasks whose rows come with an install."""
_STEMS = {"train": ("train",), "dev": ("dev", "validation", "valid", "val"), "test": ("test",)}
_PART = re.compile(r"-\d{5}-of-(\d{5})(?=\.)")  # of a file that is stored in several, as by the Hub
_LIKE_ROWS = {*SUFFIXES, ".gz", ".xls", ".xlsx", ".zip"}  # what somebody may have meant to be read
_DRAWN_PART = 4  # a dev or test split drawn from train takes at most a quarter of it


@dataclass(frozen=True, slots=True)
class Splits:
    """Rows by use; no prompt is in two of them."""

    train: list[Row]
    dev: list[Row]
    test: list[Row]


@dataclass(frozen=True, slots=True)
class _Item:
    at: int
    row: Row
    prompt: str


def load_splits(data: DataConfig, split: SplitConfig, task: TaskConfig) -> Splits:
    """Read a task's rows, check each against the task, and set dev and test apart from train.

    A folder may hold ``train``, ``dev`` (or ``validation``, ``valid``, ``val``) and ``test`` files, each of them whole
    or in all its parts (``train-00000-of-00002.parquet``). A missing dev or test split is drawn from train, whole
    prompts with all their rows, a quarter of its rows at most. A warning tells of fewer than were asked for, and of
    files that are not read. Dev rows with the prompt of a test row, and train rows with the prompt of a dev or test
    row, are left out with a warning. Rows keep the order of their file.

    Args:
        data: Where the rows are.
        split: How many are wanted; ``num_dev=0`` or ``num_test=0`` leaves that split empty, and its file unread.
        task: Its templates say which columns must be there.

    Raises:
        ConfigError: A file or column is missing, a line is malformed, a label is not among the candidates, a split is
            empty.
    """
    unused = {name for name, wanted in (("dev", split.num_dev), ("test", split.num_test)) if wanted == 0}
    read, there, others = _read(data, task, unused=unused)
    files = {name: _shuffled(rows, task, name=name, seed=split.seed) for name, rows in read.items()}
    num_rows, taken = len(files["train"]), set[str]()

    def take(name: str, wanted: int) -> list[Row]:
        if wanted == 0:
            return []
        items = files.get(name, files["train"])
        free = [item for item in items if item.prompt not in taken]
        if name in files:
            chosen = free[:wanted]
            if len(free) < len(items):
                what = "data: %d of %d %s rows have the prompt of a row of another split and are left out"
                logger.warning(what, len(items) - len(free), len(items), name)
        else:
            chosen = _whole_prompts(free, min(wanted, num_rows // _DRAWN_PART))
            drawn = {item.at for item in chosen}
            files["train"] = [item for item in items if item.at not in drawn]
            if others or len(chosen) < wanted:
                beside = f" (the folder also holds {', '.join(others[:20])})" if others else ""
                what = "split.num_%s=%d: there is no %s file%s, %d rows are drawn from train"
                logger.warning(what, name, wanted, name, beside, len(chosen))
        if not chosen:
            raise ConfigError(_empty_split(name, data))
        taken.update(item.prompt for item in chosen)
        return [item.row for item in sorted(chosen, key=lambda item: item.at)]

    if split.num_test == 0 and split.num_dev != 0 and not {"dev", "test"} & there:
        logger.warning(
            "split.num_test=0: there is no test file, so the dev rows are test rows of runs that have some. To choose "
            "settings, write evaluation.test=false instead"
        )
    test = take("test", split.num_test)
    dev = take("dev", split.num_dev)
    for name, rows in (("test", test), ("dev", dev)):
        refuse_marked(rows, what=f"{name} rows")
    train = take("train", split.num_train or num_rows)
    if len(train) < split.num_train:
        logger.warning("split.num_train=%d: %d rows are left to train on", split.num_train, len(train))
    return Splits(test=test, dev=dev, train=train)


def load_own(path: Path, task: TaskConfig) -> list[Row]:
    """A site's own training rows (``read_own``), each checked against the task.

    Raises:
        ConfigError: They cannot be read, or a row does not fit the task.
    """
    located = read_own(path)
    for where, row in located:
        _prompt(where, row, task, name="train")
    return [row for _, row in located]


def read_own(path: Path) -> list[Located]:
    """A site's own rows, whatever the task: all rows of a file, or of a folder's ``train`` file.

    Raises:
        ConfigError: There is no such file, it is malformed, or it holds no row.
    """
    files = _own_files(path)
    located = _located(files)
    if not located:
        raise ConfigError(f"{files[0]}: must hold a row, got none. Name another file.")
    return located


def own_files(path: str) -> list[Path]:
    """The files of rows that a site's ``data.path`` names, with any number in the place of ``{client}``; none is read.

    Raises:
        ConfigError: There is none, or a folder has no ``train`` file.
    """
    if "{client}" not in path:
        return _own_files(Path(path))
    parts = re.split(r"(?:\{client\})+", str(Path(path)))
    pattern, numbered = Path("*".join(map(glob.escape, parts))), re.compile(r"\d+".join(map(re.escape, parts)))
    found = sorted(Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor))))
    named = [each for each in found if numbered.fullmatch(str(each))] or [Path(path)]
    return [file for each in named for file in _own_files(each)]


def _own_files(path: Path) -> list[Path]:
    path = _existing(path)
    return _files(path)[0]["train"] if path.is_dir() else [path]


def _existing(path: Path) -> Path:
    path = path.expanduser()
    if not path.exists():
        raise ConfigError(f"{path}: there is no such file or folder. Check data.path.")
    return path


def _read(
    config: DataConfig, task: TaskConfig, *, unused: Set[str]
) -> tuple[dict[str, list[Located]], Set[str], list[str]]:
    """The rows of each file that is used, by the name of its split; the splits with a file; what else lies there."""
    if config.path is None:
        if task.name not in EMBEDDED:
            raise ConfigError(
                f"data.path must be given for task {task.name!r} (embedded: {', '.join(EMBEDDED)}), got null. "
                "Write data.path=<folder or file with the rows>."
            )
        embedded = EMBEDDED[task.name]()
        rows = [(f"{task.name}, row {number}", row) for number, row in enumerate(embedded, start=1)]
        return {"train": rows}, {"train"}, []
    path = _existing(Path(config.path))
    files, others = _files(path) if path.is_dir() else ({"train": [path]}, [])
    located = {name: _located(parts) for name, parts in files.items() if name not in unused}
    for name, rows in located.items():
        if not rows:
            raise ConfigError(f"{files[name][0]}: must hold a row, got none. Fill or remove it.")
    return located, files.keys(), others


def _files(folder: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """The file of each split in a folder, or its parts, in capitals or not; the names of others that may be meant."""
    with raised_as(
        ConfigError, f"{folder}: data.path must be a folder that can be listed", "Give its reader the right."
    ):
        entries = sorted(folder.iterdir())
    found: dict[str, list[Path]] = {}
    for name, stems in _STEMS.items():
        names = {f"{stem}{suffix}" for stem in stems for suffix in SUFFIXES}
        there = [path for path in entries if _PART.sub("", path.name.lower()) in names and path.is_file()]
        if there and not _is_one(there):
            got = ", ".join([path.name for path in there][:20])
            raise ConfigError(f"{folder}: one {name} file must exist, got {got}. Keep one, with all parts that it has.")
        if there:
            found[name] = there
    if "train" not in found:
        held = ", ".join([path.name for path in entries][:20]) or "nothing"
        raise ConfigError(
            f"{folder}: must hold a file train.* ({', '.join(SUFFIXES)}), it holds {held}. Check data.path."
        )
    read = {path for parts in found.values() for path in parts}
    return found, [path.name for path in entries if path not in read and _LIKE_ROWS & {*path.suffixes}]


def _is_one(paths: list[Path]) -> bool:
    """Whether these are one whole file, or all parts of one in their order."""
    names = [path.name.lower() for path in paths]
    if (part := _PART.search(names[0])) is None:
        return len(names) == 1
    return names == [names[0].replace(part[0], f"-{number:05}-of-{part[1]}") for number in range(int(part[1]))]


def _located(parts: list[Path]) -> list[Located]:
    return [located for file in parts for located in read_located(file)]


def _shuffled(rows: list[Located], task: TaskConfig, *, name: str, seed: int) -> list[_Item]:
    items = [_Item(at, row, _prompt(where, row, task, name=name)) for at, (where, row) in enumerate(rows)]
    key = stream_key(seed, round=list(_STEMS).index(name))
    return [items[at] for at in permutation(key, len(items), purpose=PURPOSE_SPLIT)]


def _whole_prompts(items: list[_Item], most: int) -> list[_Item]:
    """The first prompts, each with all its rows, of which there are few enough; else some rows of the rarest prompt."""
    rows_of: dict[str, list[_Item]] = {}
    for item in items:
        rows_of.setdefault(item.prompt, []).append(item)
    chosen: list[_Item] = []
    for rows in rows_of.values():
        if len(chosen) + len(rows) <= most:
            chosen += rows
    return chosen or min(rows_of.values(), key=len, default=[])[:most]


def _prompt(where: str, row: Row, task: TaskConfig, *, name: str) -> str:
    try:
        return render(row, task).prompt
    except ConfigError as error:
        if name == "train" or has_answer(row, task):
            raise ConfigError(f"{where}: {error}") from error
        raise ConfigError(
            f"{where}: the row must have a right answer, but its file hides them, as public test sets do. "
            f"Name a file with answers {name}.*, or remove this one: {name} rows are then drawn from train. "
            f"Or write split.num_{name}=0. ({error})"
        ) from error


def _empty_split(name: str, config: DataConfig) -> str:
    return (
        f"data: the {name} split is empty ({config.path or 'embedded'}); rows with the prompt of a test or dev row do "
        "not count. Give more rows, a file of its own, or lower split.num_dev and split.num_test (0 = none)."
    )
