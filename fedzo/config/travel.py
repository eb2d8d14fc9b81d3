"""A config as text: one JSON string between peers, files in the run folder and on a site, a hash in every message.

A plugin is named by its option (``"trainer": {"plugin": "meerkat", ...}``) and looked up in the table of installed
plugins, so nothing in the text is imported, evaluated or interpolated.
"""

from __future__ import annotations

import hashlib
import json
import math
import types
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import yaml

from fedzo.config.diagnose import dotted_keys, near_key
from fedzo.config.plugins import list_classes, plugin_classes, plugin_name
from fedzo.config.rules import launch_problems, run_problems, site_file_problems
from fedzo.config.schema import LaunchConfig, RunConfig, RunSettings, SiteConfig, SiteFile, filled
from fedzo.config.yaml_files import read_yaml
from fedzo.errors import ConfigError, listed, refuse
from fedzo.records.decode import parse_json

_TOP = "configuration"
VERSION = 2
"""Of the text, and so of a run folder: another version has other keys and other records."""
_MACHINE = ("device", "threads", "artifact_max_bytes", "rewriter", "runtime", "report", "trackers")
"""Keys of where a run is computed, by whose help, and how it is told of."""
_WRITTEN: dict[type, str] = {
    str: "Write text, in quotes.",
    int: "Write a whole number.",
    float: "Write a finite number.",
    bool: "Write true or false.",
}
"""How a value of each type is written in the file of a site."""
_CHOOSE = "Choose one of these."
Config = TypeVar("Config", RunConfig, LaunchConfig)


def to_json(config: RunConfig | SiteConfig | LaunchConfig) -> str:
    """The config as JSON text; ``from_json`` gives an equal config back.

    Raises:
        ConfigError: a plugin is not registered, or a number is not finite.
    """
    try:
        return json.dumps(_to_plain(config), allow_nan=False)
    except ValueError as error:
        raise ConfigError(f"The configuration must hold finite numbers to travel: {error}.") from error


def from_json(text: str, config_class: type[Config]) -> Config:
    """The config of ``to_json``'s text, with every key there, known, of its type and within its rules.

    Files that it names need not exist here.

    Raises:
        ConfigError: the text is not such a config.
    """
    plain = parse_json(text, where=_TOP, error=ConfigError)
    if isinstance(plain, dict) and (version := plain.pop("version", None)) != VERSION:
        got = "none, so that fedzo did not write it, or an early fedzo did" if version is None else f"{version!r:.40}"
        raise ConfigError(
            f"configuration must be of version {VERSION}, got {got}. Use the fedzo that made the run folder."
        )
    config = cast(Config, _decode_class(config_class, plain, _TOP))
    refuse(launch_problems(config) if isinstance(config, LaunchConfig) else run_problems(config))
    return filled(config)


def load_site(path: Path) -> SiteFile:
    """A machine's own configuration from its YAML (or JSON) file; keys that are not there have their defaults.

    ``~`` is the home folder, and paths that begin with a dot are relative to the file.

    Raises:
        ConfigError: The file cannot be read, or holds something else: all unknown keys, wrong values and broken rules
            together.
    """
    try:
        plain = read_yaml(path)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise ConfigError(f"site configuration {path}: it must be a readable YAML file. {reason}.") from error
    given = {} if plain is None else plain  # an empty file
    if isinstance(given, dict):
        given.pop("version", None)
    found: list[str] = []
    try:
        site = cast(SiteFile, _decode_class(SiteFile, given, _TOP, found=found))
    except ConfigError as error:
        raise ConfigError(f"site configuration {path}: {error} {_how_to_write(SiteFile)}") from error
    found += [problem.text for problem in site_file_problems(site)]
    if found:
        raise ConfigError(f"site configuration {path}: {listed(found)}")
    site.model.name = _located(site.model.name, path.parent)
    for section, key in ((site.data, "path"), *((site.rewriter, key) for key in site.rewriter.paths)):
        if (named := getattr(section, key)) is not None:
            setattr(section, key, _located(named, path.parent))
    return site


def _located(name: str, folder: Path) -> str:
    if name.startswith("."):
        return str((folder / name).resolve())
    return str(Path(name).expanduser()) if name.startswith("~") else name


def to_yaml(config: LaunchConfig) -> str:
    """The config for people; a run reads its JSON."""
    return str(yaml.safe_dump(_to_plain(config), sort_keys=False, allow_unicode=False))


def config_hash(config: RunConfig) -> str:
    """SHA-256 (hex) of what all peers of a run must agree on: of all that travels."""
    canonical = json.dumps(_to_plain(config), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def is_same_run(one: LaunchConfig, other: LaunchConfig) -> bool:
    """Whether two command lines mean the same run: files, dtype and all, wherever it is computed and reported."""
    plain = [_to_plain(config) for config in (one, other)]
    first, second = ({key: value for key, value in each.items() if key not in _MACHINE} for each in plain)
    return first == second


def _to_plain(config: RunConfig | SiteConfig | LaunchConfig) -> dict[str, Any]:
    if isinstance(config, RunSettings):
        config = filled(config)
    plain = {"version": VERSION, **cast(dict[str, Any], _encode(config))}
    for group, options in plugin_classes().items():
        if group not in plain:
            continue
        plugin = getattr(config, group)
        name = plugin_name(group, plugin)
        if name is None:
            raise ConfigError(f"{group} must be one of {', '.join(sorted(options))}, got {type(plugin).__name__}.")
        plain[group] = {"plugin": name, **plain[group]}
    for group, options in list_classes().items():
        if group not in plain:
            continue
        chosen = getattr(config, group)
        if wrong := [name for name, each in chosen.items() if options.get(name) is not type(each)]:
            raise ConfigError(f"{group} must hold {', '.join(sorted(options))}, got {', '.join(wrong)}.")
        plain[group] = [{"plugin": name, **plain[group][name]} for name in chosen]  # a list, since the order counts
    return plain


def _encode(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _encode(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, list):
        return [_encode(item) for item in value]
    if isinstance(value, dict):
        return {key: _encode(item) for key, item in value.items()}
    return value


def _decode_class(config_class: type, plain: object, where: str, *, found: list[str] | None = None) -> object:
    """``plain`` as a config with every key, read up to the first fault.

    With ``found``, as the file of a site is read: keys that are not there have their defaults, and so have those with a
    fault, which is told in ``found``.
    """
    if not isinstance(plain, dict):
        _refuse(where, f"be a mapping for {config_class.__name__}", plain)
    hints = get_type_hints(config_class)
    names = [field.name for field in fields(config_class)]
    stray = sorted(str(key) for key in plain if key not in names)
    absent = [name for name in names if name not in plain]
    top = where == _TOP
    prefix = "" if top else f"{where}."
    if found is not None:
        rule = f"{where} must hold keys of {config_class.__name__} only"
        known = {f"{prefix}{name}" for name in names}
        found += [f"{rule}, got unknown {[key]}.{_near_key_of_site(f'{prefix}{key}', known)}" for key in stray]
    elif stray or absent:
        got = f"unknown {stray}, missing {absent}. Do all peers have the same fedzo?"
        raise ConfigError(f"{where} must hold exactly the keys of {config_class.__name__}, got {got}")
    groups = plugin_classes() if top else {}
    lists = list_classes() if top else {}
    values = {}
    for name in names:
        if name not in plain:
            continue
        path = f"{prefix}{name}"
        try:
            if name in lists:
                values[name] = _decode_list(lists[name], plain[name], path)
            elif name in groups:
                values[name] = _decode_plugin(groups[name], plain[name], path, found=found)
            else:
                values[name] = _decode(hints[name], plain[name], path, found=found)
        except ConfigError as error:
            if found is None:
                raise
            found.append(f"{error} {_CHOOSE if name in groups else _how_to_write(hints[name], plain[name])}")
    return config_class(**values)


def _near_key_of_site(key: str, known: set[str]) -> str:
    """What to do about an unknown key of a site's file; ``known`` are those of its section."""
    everywhere = {*dotted_keys(cast(dict[str, Any], _encode(SiteFile())))}
    if key in everywhere:  # a key as one writes it on a command line
        section, _, name = key.rpartition(".")
        return f" Write it as {section}: {{{name}: ...}}."
    return near_key(key, known | everywhere)


def _how_to_write(hint: Any, given: object = None) -> str:
    """What to do about a value of a site's file that is not of its type."""
    if get_origin(hint) is list:
        return _how_to_write(*get_args(hint)) if isinstance(given, list) else "Write a list, as in [one, two]."
    if is_dataclass(hint):
        return "Write its keys and their values."
    return next((told for kind, told in _WRITTEN.items() if kind in (hint, *get_args(hint))), _CHOOSE)


def _decode_list(options: dict[str, type], plain: object, where: str) -> object:
    if not isinstance(plain, list):
        _refuse(where, "be a list of plugins", plain)
    decoded: dict[str, object] = {}
    for number, item in enumerate(plain):
        plugin = _decode_plugin(options, item, f"{where}[{number}]")
        name = cast(dict[str, Any], item)["plugin"]
        if name in decoded:
            _refuse(where, "name each plugin once", name)
        decoded[name] = plugin
    return decoded


def _decode_plugin(options: dict[str, type], plain: object, where: str, *, found: list[str] | None = None) -> object:
    name = plain.get("plugin") if isinstance(plain, dict) else None
    if not isinstance(plain, dict) or not isinstance(name, str) or name not in options:
        known = ", ".join(sorted(options))
        _refuse(f"{where}.plugin", f"be one of {known} (or of an installed package that registers it)", name)
    rest = {key: value for key, value in plain.items() if key != "plugin"}
    return _decode_class(options[name], rest, where, found=found)


def _decode(hint: Any, plain: object, where: str, *, found: list[str] | None = None) -> object:
    """``plain`` as the annotated type; only types that a config class may have."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if plain is None and type(None) in arguments:
            return None
        (hint,) = (each for each in arguments if each is not type(None))
        return _decode(hint, plain, where)
    if origin is list and isinstance(plain, list):
        return [_decode(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(plain)]
    if origin is dict and isinstance(plain, dict):
        return {_decode(arguments[0], key, where): _decode(arguments[1], plain[key], where) for key in plain}
    if isinstance(hint, type):
        if is_dataclass(hint):
            return _decode_class(hint, plain, where, found=found)
        if issubclass(hint, Enum) and plain in [member.value for member in hint]:
            return hint(plain)
        if hint is float and type(plain) in (int, float) and _is_finite(plain):
            return float(cast(float, plain))
        if hint in (bool, int, str) and type(plain) is hint:
            return plain
    return _refuse(where, f"be {_name(hint)}", plain)


def _is_finite(number: Any) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer too large for a float
        return False


def _name(hint: Any) -> str:
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "one of " + ", ".join(str(member.value) for member in hint)
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)


def _refuse(where: str, rule: str, got: object) -> NoReturn:
    shown = repr(got)
    raise ConfigError(f"{where} must {rule}, got {shown if len(shown) <= 80 else shown[:77] + '...'}.")
