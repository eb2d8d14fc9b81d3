"""Where the YAML files are: inside the installed package, or beside it in a source tree."""

from __future__ import annotations

from pathlib import Path

from fedzo.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parent.parent


def conf_dir() -> Path:
    """The folder with ``config.yaml``: ``fedzo/_conf`` of a wheel, ``conf`` of a checkout.

    Raises:
        ConfigError: neither folder is there.
    """
    candidates = (_PACKAGE / "_conf", _PACKAGE.parent / "conf")
    for folder in candidates:
        if (folder / "config.yaml").is_file():
            return folder
    looked = " or ".join(str(folder) for folder in candidates)
    raise ConfigError(f"conf must hold config.yaml, found none in {looked}. Reinstall fedzo.")
