"""Hydra on fedzo's ``conf`` and schemas."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fedzo.config.overrides import rewrite_model
from fedzo.config.plugins import LISTS, NO_PLUGIN, PLAIN, REGISTRIES, conf_dir, list_classes, plugin_classes
from fedzo.config.schema import LaunchConfig
from fedzo.config.yaml_files import check_users_files
from fedzo.errors import ConfigError

CONFIG_NAME = "config"
VERSION_BASE = "1.3"
_MAX_FOLDER_CHARS = 80  # of a name in full
_MAX_SHORTENED_CHARS = 200  # of a name of many settings; a file system takes 255
_VALUE_CHARS = 24  # of a value in it; no number has more
_stored: list[object] = []  # Hydra's store, and the plugins that it holds the schemas of
FAILURES = (HydraException, OmegaConfBaseException, ConfigError)
"""What composing and converting raise for bad input."""

# Hydra copies all that it knows of a configuration's sources for each question about a group, the store of schemas with
# it, which nobody changes: that took most of the time of `fedzo train --help`.
cast(Any, ConfigStore).__deepcopy__ = lambda store, memo: store


class StrayKeyError(ConfigError):
    """A key was added (``+key=value``) that no config class has."""


@contextmanager
def session() -> Iterator[None]:
    """Hydra, initialised; what was initialised before is put back at the end. The functions below need it."""
    register_schemas()
    with initialize_config_dir(str(conf_dir()), job_name="fedzo", version_base=VERSION_BASE):
        yield


def compose_run(overrides: Sequence[str], *, hydra: bool = False) -> DictConfig:
    """The composed run, resolved; with ``hydra`` also Hydra's own node, unresolved.

    Raises:
        HydraException, OmegaConfBaseException, ConfigError: the overrides do not fit.
    """
    try:
        composed = compose(CONFIG_NAME, overrides=list(overrides), return_hydra_config=hydra)
    except (ValueError, TypeError, AssertionError, YAMLError) as error:  # Hydra's for some bad overrides, and bad YAML
        raise ConfigError(str(error)) from error
    if not hydra:
        _settle(composed)
    return composed


def _settle(composed: DictConfig) -> None:
    OmegaConf.resolve(composed)
    _refuse_stray_keys(composed, "")


def _refuse_stray_keys(node: DictConfig, prefix: str) -> None:
    config_class = OmegaConf.get_type(node)
    for name in node:
        key = str(name)
        if is_dataclass(config_class) and key not in {field.name for field in fields(config_class)}:
            raise StrayKeyError(f"{prefix}{key} is not a setting of {config_class.__name__}.")
        child = None if OmegaConf.is_missing(node, name) else node[name]
        if isinstance(child, DictConfig):
            _refuse_stray_keys(child, f"{prefix}{key}.")


def to_config(composed: DictConfig) -> LaunchConfig:
    """The typed config of a composed one.

    Raises:
        ConfigError: settings that must be given were not.
        OmegaConfBaseException: an interpolation or a type is wrong.
    """
    _settle(composed)
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise ConfigError(f"{', '.join(missing)} must be given, got nothing. Write {missing[0]}=<value>.")
    return cast(LaunchConfig, OmegaConf.to_object(composed))


def group_names(overrides: Sequence[str] = ()) -> list[str]:
    """Groups of fedzo's configuration; ``overrides`` matter for their ``hydra.searchpath``."""
    names = _look(None, overrides, kind=ObjectType.GROUP)
    return sorted(set(names) - {"hydra"})


def option_names(group: str, overrides: Sequence[str] = ()) -> list[str]:
    """Options of a group, schemas left out; empty when there is no such group."""
    names = _look(group, overrides, kind=ObjectType.CONFIG)
    return sorted({name for name in names if not name.endswith("_schema")})


def with_models(overrides: Sequence[str]) -> list[str]:
    """The overrides with ``model=<hub name or local folder>`` written out, which is no option of the group.

    Raises:
        ConfigError: A sweep mixes options and names, or the search path is wrong.
    """
    if not any(text.startswith(("model=", "hydra.searchpath=")) for text in overrides):
        return list(overrides)  # to list the options, Hydra would read its files once more
    return rewrite_model(overrides, option_names("model", overrides))


def _look(group: str | None, overrides: Sequence[str], *, kind: ObjectType) -> list[str]:
    searchpath = [text for text in overrides if text.startswith("hydra.searchpath=")]
    loader = GlobalHydra.instance().config_loader()
    try:
        return loader.get_group_options(group or "", kind, config_name=CONFIG_NAME, overrides=searchpath)
    except HydraException as error:
        raise ConfigError(f"hydra.searchpath must be a list of folders: {error}") from error


def register_schemas() -> None:
    """Store ``schema`` (a whole run) and ``<option>_schema`` per group, and check users' files; safe to repeat."""
    check_users_files()
    store, plugins, lists = ConfigStore.instance(), plugin_classes(), list_classes()
    if _stored == [store, plugins, lists]:
        return  # making nodes of all classes takes a third of a composition
    # Plugin groups start at their base class, and lists empty: merging one plugin onto another would keep the first
    # one's keys.
    bases = {group: registry.base() for group, registry in REGISTRIES.items()}
    empty: dict[str, Any] = {group: {} for group in LISTS}
    store.store(name="schema", node=LaunchConfig(**bases, **empty))
    for group, config_class in PLAIN.items():
        store.store(group=group, name=f"{group}_schema", node=config_class)
    for group, options in plugins.items():
        for name, config_class in options.items():
            if (conf_dir() / group / f"{name}.yaml").exists():  # Hydra would take that file for it
                raise ConfigError(
                    f"{group} {name!r} of {config_class.__module__}: a plugin must have another name than the presets "
                    "of fedzo, got that of one. Rename it, or uninstall its package."
                )
            store.store(group=group, name=f"{name}_schema", node=config_class)
            store.store(group=group, name=name, node=config_class)
    for group, options in lists.items():
        if NO_PLUGIN in options:
            raise ConfigError(
                f"{group} {NO_PLUGIN!r} of {options[NO_PLUGIN].__module__}: a plugin must have another name than the "
                "empty list, got that of it. Rename it, or uninstall its package."
            )
        store.store(group=group, name=NO_PLUGIN, node={}, package=group)
        for name, config_class in options.items():
            store.store(group=group, name=name, node=config_class, package=f"{group}.{name}")
    _stored[:] = [store, plugins, lists]


def job_folder(overrides: str) -> str:
    """Folder of a sweep's job by what it sets, whatever its number: short, and safe as a path and inside an override.

    In a long name each setting is shortened, since any of them may be what varies. A hash tells apart what is cut off
    or has other signs than letters, digits and ``._+-``, or ends in a sign.

    Example:
        >>> job_folder("fl.rounds=3,trainer=mezo")
        'fl.rounds-3_trainer-mezo'
    """
    # a comma in quotes parts no settings
    bare = re.sub(r"['\"]", "", re.sub(r"(['\"]).*?\1", lambda quote: quote[0].replace(",", ";"), overrides))
    name = _safe(bare)
    is_long = len(name) > _MAX_FOLDER_CHARS
    if is_long:
        settings = re.split(r",(?=[+~]*[\w./@-]+=)", bare)
        name = _safe(",".join(map(_shortened, settings))[-_MAX_SHORTENED_CHARS:])
    if is_long or re.search(r"[^A-Za-z0-9._+=,-]|[-_]$", bare):
        name += "_" + hashlib.sha256(overrides.encode()).hexdigest()[:8]
    return name or "job"


def _safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text.replace(",", "_")).strip("-_")


def _shortened(setting: str) -> str:
    """The last part of the key, and the end of the value: of a path or of a model's name, what tells most."""
    key, _, value = setting.partition("=")
    return f"{key.rpartition('.')[2]}={value.rstrip('/').rpartition('/')[2][-_VALUE_CHARS:]}"


# At import, because a worker of the joblib launcher gets here by importing the job function's module only.
OmegaConf.register_new_resolver("fedzo_job_folder", job_folder, replace=True)
