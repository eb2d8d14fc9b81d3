"""Users' own YAML files: what is written is what is used, and what cannot be used is named with file and line.

The rule holds for the files that Hydra composes (outside fedzo's own ``conf``) and for the configuration of a site.
"""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from hydra._internal.core_plugins import file_config_source
from hydra._internal.sources_registry import SourcesRegistry
from hydra.plugins.config_source import ConfigResult
from omegaconf import OmegaConf
from omegaconf._utils import get_yaml_loader

from fedzo.config.plugins import PLAIN, conf_dir, list_classes, plugin_classes
from fedzo.data.files import text_of
from fedzo.errors import ConfigError
from fedzo.trainers.base import InputsConfig

_GLOBAL = "experiment"  # the group whose files hold keys of all others
_own_files: dict[tuple[str, Path, int, int], ConfigResult] = {}  # as Hydra read them, until they change


def texts() -> dict[str, frozenset[str]]:
    """Keys of each group that hold text, of which OmegaConf would make text of anything: ``no`` would become ``False``.

    Those of installed third parties' plugins are among them.
    """
    plugins = {**plugin_classes(), **list_classes()}
    return {
        **{group: _texts_of(config_class) for group, config_class in {**PLAIN, "inputs": InputsConfig}.items()},
        **{group: frozenset[str]().union(*map(_texts_of, options.values())) for group, options in plugins.items()},
    }


@functools.cache
def _texts_of(config_class: type) -> frozenset[str]:
    hints = get_type_hints(config_class)
    return frozenset(each.name for each in fields(config_class) if hints[each.name] in (str, str | None, list[str]))


def read_yaml(path: Path) -> Any:
    """The plain values of a YAML file.

    Raises:
        ConfigError: As ``checked_text``.
        OSError: The file cannot be read.
    """
    return yaml.load(checked_text(path), Loader=get_yaml_loader())  # a safe one, in whose dialect 1e3 is a number


def checked_text(path: Path) -> str:
    """The text of a YAML file, without a byte order mark, that a parser takes.

    Raises:
        ConfigError: It is no UTF-8 or no YAML, a key stands twice, or a text is written as YAML writes another
            value.
        OSError: The file cannot be read.
    """
    text = io.StringIO(text_of(path, path.read_bytes()), newline=None).read()
    try:
        node = yaml.compose(text, Loader=get_yaml_loader())
        faults = [*_faults(node, set(), frozenset[str]().union(*texts().values()))]
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line if error.problem_mark else 0
        raise ConfigError(f"{path}:{line + 1}: not valid YAML ({error.problem}). {_advice(text, line)}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position)
        raise ConfigError(
            f"{path}:{line + 1}: not valid YAML (the character U+{ord(text[error.position]):04X}). Remove it."
        ) from None
    except RecursionError:
        raise ConfigError(f"{path}: not valid YAML (too many brackets inside one another). Correct the file.") from None
    if faults:
        line, fault = min(faults, key=lambda fault: fault[0])
        raise ConfigError(f"{path}:{line + 1}: {fault}")
    return text


def _advice(text: str, line: int) -> str:
    lines = text.split("\n")
    near = lines[max(0, line - 1) : line + 1]
    if any("\t" in each[: len(each) - len(each.lstrip())] for each in near):
        return "Indent with spaces: YAML takes no tab there."
    return "Quote texts that hold a colon, a brace, a bracket or a hash sign, and close what is open."


def _faults(node: yaml.Node | None, seen: set[int], named: frozenset[str]) -> Iterator[tuple[int, str]]:
    if node is None or id(node) in seen:  # an alias
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            yield from _faults(child, seen, named)
    if not isinstance(node, yaml.MappingNode):
        return
    keys: set[str] = set()
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode):
            if key.value in keys:
                yield key.start_mark.line, f"a key must stand once, got {key.value!r} twice. Remove one."
            keys.add(key.value)
            if key.value in named:
                yield from _respelled(key.value, value)
        yield from _faults(value, seen, named)


def _respelled(key: str, node: yaml.Node) -> Iterator[tuple[int, str]]:
    """Texts that YAML reads as another value, whose own text is another one."""
    for child in node.value if isinstance(node, yaml.SequenceNode) else [node]:
        if not isinstance(child, yaml.ScalarNode) or not child.tag.endswith((":bool", ":int", ":float")):
            continue
        value = yaml.load(child.value, Loader=get_yaml_loader())
        if str(value) != child.value:
            yield (
                child.start_mark.line,
                f'{key} must be text, but YAML reads {child.value} as {value!r}. Quote it: "{child.value}".',
            )


class FileConfigSource(file_config_source.FileConfigSource):
    """Hydra's reader of files, with users' files checked. It has the name of Hydra's, which then never replaces it."""

    def load_config(self, config_path: str) -> ConfigResult:
        """As Hydra's; a byte order mark hides no ``# @package``. A process parses each of fedzo's own files once."""
        path = (Path(self.path) / self._normalize_file_name(config_path)).resolve()
        if not path.is_file():
            return super().load_config(config_path)
        if path.is_relative_to(conf_dir().resolve()):
            state = path.stat()
            key = str(self), path, state.st_mtime_ns, state.st_size
            if key not in _own_files:
                _own_files[key] = super().load_config(config_path)
            return copy.deepcopy(_own_files[key])  # Hydra takes the defaults list out of what it gets
        text = checked_text(path)
        header = self._get_header_dict(text)
        if path.parent.name == _GLOBAL and not header.get("package"):
            raise ConfigError(
                f"{path}:1: an experiment must begin with the line `# @package _global_`, or its keys are looked for "
                f"under {_GLOBAL}. Add the line."
            )
        return ConfigResult(
            config=OmegaConf.load(io.StringIO(text)),
            path=f"{self.scheme()}://{self.path}",
            provider=self.provider,
            header=header,
        )


def check_users_files() -> None:
    """Let Hydra read files through ``FileConfigSource``; safe to repeat."""
    SourcesRegistry.instance().types[FileConfigSource.scheme()] = FileConfigSource
