"""Unlabelled documents from a file: one a line, or the ``text`` column of a table."""

from __future__ import annotations

from pathlib import Path

from fedzo.data.files import read_rows
from fedzo.errors import ConfigError


def read_texts(path: Path) -> list[str]:
    """The documents of a ``.txt`` file (one a line), or the ``text`` column of any data file."""
    if path.suffix == ".txt":
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ConfigError(f"inputs.calibration: cannot read {path} ({error.strerror}).") from error
        return [line for line in lines if line.strip()]
    rows = read_rows(path)
    if rows and "text" not in rows[0]:
        raise ConfigError(f"{path}: a column 'text' is needed for calibration, got columns {sorted(rows[0])}.")
    return [str(row["text"]) for row in rows]
