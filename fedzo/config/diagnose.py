"""Why a composition failed: every override's own problem, in the user's words."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from enum import Enum
from typing import get_type_hints

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

from fedzo.config.schema import RunConfig
from fedzo.config.validate import Problem
from fedzo.errors import ConfigError

Attempt = Callable[[Sequence[str]], RunConfig]
"""Composes these overrides, or raises what Hydra, OmegaConf or ``to_config`` raise."""
_FAILURES = (HydraException, OmegaConfBaseException, ConfigError)


def diagnose(overrides: Sequence[str], attempt: Attempt) -> tuple[list[str], list[Problem]]:
    """Apply the overrides one at a time; returns those that work together, and the problems of the others."""
    kept: list[str] = []
    found: list[Problem] = []
    parsed = []
    for text in overrides:
        try:
            parsed.append(OverridesParser.create().parse_override(text))
        except HydraException as error:
            found.append(Problem(text.partition("=")[0], f"{text!r} is not an override key=value: {_first_line(error)}."))
    # Choices first: whether a key exists depends on the chosen plugin.
    for override in sorted(parsed, key=lambda each: not _is_group(each)):
        text = str(override.input_line)
        try:
            _alone(override, [*kept, text], attempt)
        except _FAILURES as error:
            found.append(Problem(override.key_or_group, _explain(override, error, attempt, kept)))
        else:
            kept.append(text)
    try:
        attempt(kept)
    except _FAILURES as error:  # not an override's fault, or a setting that must be given
        found.append(Problem("", _useful(error)))
    return kept, found
