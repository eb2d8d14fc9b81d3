"""What can be chosen: the groups, their options and one line about each."""

from __future__ import annotations

import inspect
from pathlib import Path

from fedzo.config.paths import conf_dir
from fedzo.config.plugins import list_classes, plugin_classes


def list_groups() -> dict[str, dict[str, str]]:
    """Per group: option name -> summary, from a plugin's docstring or the first comment of its YAML file."""
    conf = conf_dir()
    groups = {
        folder.name: {path.stem: _first_comment(path) for path in sorted(folder.glob("*.yaml"))}
        for folder in sorted(conf.iterdir())
        if folder.is_dir() and folder.name != "hydra"
    }
    for group, options in {**plugin_classes(), **list_classes()}.items():
        summaries = {
            name: (inspect.getdoc(cls) or "").split("\n")[0].replace("``", "") for name, cls in options.items()
        }
        groups[group] = dict(sorted({**groups.get(group, {}), **summaries}.items()))
    return dict(sorted(groups.items()))


def _first_line(config_class: type) -> str:
    return (inspect.getdoc(config_class) or "").split("\n")[0].replace("``", "")


def _first_comment(path: Path) -> str:
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and "@package" not in line:
            return line.lstrip("# ")
    return ""
