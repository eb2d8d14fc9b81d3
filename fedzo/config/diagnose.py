"""Why a composition failed: every override's own problem, in the user's words."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, cast

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

from fedzo.config.compose import FAILURES, StrayKeyError, compose_run, group_names, option_names
from fedzo.config.overrides import in_shell
from fedzo.config.plugins import NO_PLUGIN, plugin_classes
from fedzo.config.yaml_files import texts
from fedzo.errors import Problem

RENAMED = {
    "optimizer": "server_optimizer",
    "fl.seeds": "fl.directions",
    "task.prepare": "task.derive",
    "model.max_length": "task.max_length",
    "data.num_train": "split.num_train",
    "data.num_dev": "split.num_dev",
    "data.num_test": "split.num_test",
    "data.split_seed": "split.seed",
    "trainer.mask_path": "inputs.artifact",
    "trainer.calibration_path": "inputs.calibration",
}
"""Groups and keys of fedzo 0.1 and what they are called now."""
_EXTRAS = {
    ("hydra/launcher", "joblib"): "sweep",
    ("hydra/launcher", "submitit_local"): "slurm",
    ("hydra/launcher", "submitit_slurm"): "slurm",
    ("hydra/sweeper", "optuna"): "optuna",
}
"""Choices of Hydra's that are there once an extra of fedzo is installed."""


def parse_overrides(overrides: Sequence[str]) -> tuple[list[Override], list[Problem]]:
    """Read overrides by Hydra's grammar; returns those that it accepts, and the problems of the others."""
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    parsed: list[Override] = []
    found: list[Problem] = []
    for text in overrides:
        try:
            parsed += parser.parse_overrides([text])
        except HydraException as error:
            key, first_line = text.partition("=")[0], str(error).splitlines()[0]
            found.append(Problem(key, f"{text!r} must be an override key=value. {first_line}.{_in_quotes(text)}"))
    return parsed, found


def _in_quotes(text: str) -> str:
    """How to write an override whose value Hydra's grammar takes for something else, as a shell must be given it."""
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[+~]*[\w@./-]+", key):
        return " Quote the whole override for the shell if its value holds spaces."
    if re.fullmatch(r"[\w./:-]+", value, re.ASCII):
        return f" Check the key {key!r}."
    shell = in_shell(key, value)
    if value[:1] in {"[", "'", '"'} or re.match(r"\{\w+:", value):
        return f" Close its brackets and quotes and quote the texts in it; or, where it is one text, write {shell}"
    return f" A value of more than letters, digits and ./:_- must be in quotes of its own: write {shell}"


def respelled(parsed: Iterable[Override]) -> list[Problem]:
    """Texts that Hydra reads as another value, whose own text is another one: ``true`` would be ``True``."""
    found = []
    known = texts()
    for override in parsed:
        section, name = override.key_or_group.partition(".")[0], override.key_or_group.rpartition(".")[2]
        if name not in known.get(section, ()) or override.is_sweep_override():
            continue
        value, text = override.value(), cast(str, override.input_line)
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, bool | int | float) and str(each) not in text:
                rule = f"{override.key_or_group} must be text, but {text} is read as {each!r}"
                found.append(Problem(override.key_or_group, f"{rule}. Put the text in quotes of its own."))
    return found


def diagnose(overrides: Sequence[str]) -> tuple[list[str], list[Problem]]:
    """Look for the overrides that are wrong; needs a ``session``.

    A composition takes long: bisection tells how many work together, from the first on, and so the next one is wrong.

    Returns:
        The overrides that work together, and the problems of the others.
    """
    parsed, found = parse_overrides(overrides)
    kept: list[str] = []
    groups = group_names(overrides)
    # First where to look, then choices: whether a key exists depends on the chosen plugin.
    ranks = {"hydra.searchpath": 0, **dict.fromkeys(groups, 1)}
    left = sorted(parsed, key=lambda each: ranks.get(each.key_or_group, 2))
    while left:
        words = [cast(str, each.input_line) for each in left]
        fit, unfit = 0, len(left) + 1  # so many of them work together, and so many do not
        failure: Exception | None = None
        while unfit - fit > 1:
            tried = len(left) if failure is None else (fit + unfit) // 2
            try:
                compose_run([*kept, *words[:tried]])
            except FAILURES as error:
                unfit, failure = tried, error
            else:
                fit = tried
        kept += words[:fit]
        if failure is not None:
            found.append(Problem(left[fit].key_or_group, _explain(left[fit], failure, kept)))
        left = left[unfit:]
    return kept, found


def reason(error: BaseException) -> str:
    """The useful half of an error of Hydra or OmegaConf, on one line: the innermost cause says what is wrong."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    headline_only = len(lines) > 1 and lines[0].endswith(":")
    text = " ".join(lines[: 1 + headline_only]) or type(error).__name__
    file = re.match(r"In '([^']+)': \w+ raised while composing config: ", text)
    if file:
        key = _full_key(error)
        text = f"{file[1]}.yaml: {f'{key}: ' if key else ''}{text[file.end() :]}"
    return text if text.endswith(".") else text + "."


def _full_key(error: BaseException) -> str:
    """The setting that an error of OmegaConf is about, if it tells."""
    found = re.search(r"^\s*full_key: (\S+)$", str(error), re.MULTILINE)
    return found[1] if found else ""


def _explain(override: Override, error: Exception, kept: Sequence[str]) -> str:
    key, text = override.key_or_group, cast(str, override.input_line)
    for old, new in RENAMED.items():
        if key == old or key.startswith(f"{old}."):
            return f"{text}: {old} has the new name {new}. Write {text.replace(old, new, 1)}."
    if override.is_sweep_override():
        return _explain_sweep(override, kept)
    options = option_names(key, kept)
    value = override.value()
    if options and override.is_add() and value in options:
        return f"{text}: {key} already has a choice. Leave out the +."
    if options and (value is None or (isinstance(value, str) and value not in options)):
        return f"{key} must be one of {', '.join(options)}, got {value!r}.{_no_option(key, str(value), options)}"
    if options and isinstance(value, list) and (wrong := [str(each) for each in value if each not in options]):
        told = f"{key} must hold some of {', '.join(options)}, got {', '.join(wrong)}."
        return told + _near(wrong[0], options)
    unknown = isinstance(error, StrayKeyError) or isinstance(error.__cause__, ConfigKeyError | ConfigAttributeError)
    known = set() if options else {*_keys(compose_run(kept)), *group_names(kept)}
    if unknown and not options and key not in known:
        return f"{text}: {key} is not a setting.{near_key(key, known)}"
    inner = sorted(name for name in known if name.startswith(f"{key}."))
    if inner and not isinstance(value, dict):
        return f"{text}: {key} holds settings and has no value of its own. Set one of {', '.join(inner)}."
    why = reason(error)
    if options and (in_file := _explain_file(f"{key}/{value}.yaml", error, kept)):
        return f"{text}: {in_file}"
    if options and (stray := re.search(r"Key '([^']*)' not in '", why)):
        own = {name.removeprefix(f"{key}.") for name in _keys(compose_run(kept)) if name.startswith(f"{key}.")}
        told = f"{text}: the file {key}/{value}.yaml must hold keys of its schema only, got {stray[1]!r}."
        return told + _near(stray[1], own)
    remedy = ""
    if "is not a ListConfig" in why:
        given = text.partition("=")[2]
        is_list = "," in given and given[:1] in {"'", '"'}  # a list that was quoted, as a text with commas must be
        remedy = f" Write {key}=[{given[1:-1] if is_list else given}]."
        if given.lower() == NO_PLUGIN:  # which groups of plugins take
            remedy = f" Write {key}=[] for an empty list."
    return f"{text}: {why}{remedy}"


def _explain_file(file: str, error: Exception, kept: Sequence[str]) -> str:
    """What is wrong with the settings and choices of other groups in a chosen file; empty for other faults."""
    if absent := re.search(r"Could not find '((?:hydra/)?[^'/]+)/([^']+)'", str(error)):
        options = option_names(absent[1], kept)
        told = f"{file}: {absent[1]} must be one of {', '.join(options)}, got {absent[2]!r}."
        return told + _no_option(absent[1], absent[2], options)
    stray = _full_key(error) if "not in '" in str(error) else ""
    if stray and not file.startswith(f"{stray.partition('.')[0]}/"):
        return f"{file}: {stray} is not a setting.{near_key(stray, {*_keys(compose_run(kept))})}"
    if "Cannot merge DictConfig with ListConfig" in str(error):
        return f"{file}: a list of plugins must be chosen under defaults, as in `- override /evaluators: [nats]`."
    return ""


def _explain_sweep(override: Override, kept: Sequence[str]) -> str:
    text = cast(str, override.input_line)
    told = f"{text}: one run must have one value per key, got several. Add -m to run them all."
    listed = f"{override.key_or_group}=[{text.partition('=')[2]}]"
    try:
        compose_run([*kept, listed])
    except FAILURES:
        is_number = re.fullmatch(r"[-+.,\deE]+", text.partition("=")[2])
        return told if is_number else told + _in_quotes(text)
    return f"{told} Or, for one list, write {listed}"


def near_key(key: str, known: set[str]) -> str:
    """A remedy for a key that does not exist, given all that do."""
    section, _, leaf = key.rpartition(".")
    options = plugin_classes().get(section, {})
    if owners := [name for name, cls in options.items() if leaf in {field.name for field in fields(cls)}]:
        return f" It belongs to {' or '.join(f'{section}={name}' for name in owners)}, and another is chosen."
    beside = sorted(name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == section)
    elsewhere = sorted(name for name in known if name.rpartition(".")[2] == leaf)
    prefix = f"{section}." if section else ""
    if hint := _near(leaf, beside, prefix):
        return hint
    if elsewhere:
        return f" Did you mean {elsewhere[0]}?"
    if beside:
        return f" Known there: {', '.join(beside)}."
    return " `fedzo train --cfg all` prints all settings."


def _no_option(group: str, name: str, options: Sequence[str]) -> str:
    """What to do about a choice that a group does not have: install what brings it, or take the nearest."""
    extra = _EXTRAS.get((group, name))
    return f" Install it with: pip install 'fedzo[{extra}]'" if extra else _near(name, options)


def _near(word: str, known: Iterable[str], prefix: str = "") -> str:
    """Asks whether the nearest of the known names was meant, with a ``prefix`` before it; empty where none is near."""
    near = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean {prefix}{near[0]}?" if near else ""


def _keys(config: DictConfig) -> list[str]:
    return [*dotted_keys(cast(dict[str, Any], OmegaConf.to_container(config, enum_to_str=True)))]


def dotted_keys(plain: Mapping[str, object], prefix: str = "") -> Iterator[str]:
    """Every key of nested settings, inner ones too."""
    for name, child in plain.items():
        yield f"{prefix}{name}"
        if isinstance(child, dict):
            yield from dotted_keys(child, f"{prefix}{name}.")
