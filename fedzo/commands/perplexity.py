"""``fedzo perplexity``: how well the model of a command line predicts a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedzo.config.schema import LaunchConfig, uncompiled
from fedzo.data.files import read_running_text
from fedzo.errors import ConfigError
from fedzo.evaluate.perplexity import perplexity, text_windows
from fedzo.run.peer import open_model
from fedzo.system import OnProgress


def measure_perplexity(
    config: LaunchConfig, text: Path, *, num_tokens: int, num_windows: int | None, on_window: OnProgress
) -> dict[str, Any]:
    """The perplexity of the model that ``config`` names on windows of a file; the rest of a run plays no part.

    Args:
        config: Model and machine.
        text: A text file, or a table with a ``text`` column.
        num_tokens: Of a window.
        num_windows: From the start of the text; None for all.
        on_window: Called with windows done and in total.

    Returns:
        Plain JSON values: ``perplexity``; the number of ``windows`` and of ``tokens`` that were predicted; and the
        names of ``model`` and ``text``. How documents are joined and cut, ``fedzo.evaluate.perplexity`` says.

    Raises:
        ConfigError: The file is missing, has no text or too little, cannot be read, or the windows do not fit the
            model.
        NumericsError: A loss is not finite.
    """
    documents = read_documents(text, "--text")  # before the model, whose loading takes longer
    loaded = open_model(uncompiled(config.site()), max_length=1)
    windows = text_windows(loaded, documents, num_tokens=num_tokens, num_windows=num_windows, source=str(text))
    on_window(0, len(windows))
    found = perplexity(loaded, windows, on_window=on_window)
    return {
        "model": loaded.source,
        "text": str(text),
        "windows": found.num_windows,
        "tokens": found.num_tokens,
        "perplexity": found.value,
    }


def read_documents(file: Path, option: str) -> list[str]:
    """The texts of the file that an option names.

    Raises:
        ConfigError: It is no file, cannot be read, or holds no text.
    """
    check_file(file, option)
    documents = read_running_text(file)
    if not any(document.strip() for document in documents):
        raise ConfigError(f"{file}: must hold text, got {len(documents)} documents without any. Give another file.")
    return documents


def check_file(file: Path, option: str) -> None:
    """Refuse what is no file, naming the option that names it."""
    if not file.is_file():
        got = "a folder" if file.is_dir() else "no such file"
        raise ConfigError(f"{option} must name a file, got {got} at {str(file)!r}. Check the path.")
