"""Publishes the dataclasses to Hydra, so that every YAML file and override is checked against them."""

from __future__ import annotations

import hashlib
import re
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from fedzo.config.paths import conf_dir
from fedzo.config.plugins import LISTS, PLAIN, REGISTRIES, list_classes, plugin_classes
from fedzo.config.schema import LaunchConfig

_MAX_FOLDER_CHARS = 80


def register_schemas() -> None:
    """Store ``schema`` (a whole run) and ``<option>_schema`` per group; safe to repeat."""
    store = ConfigStore.instance()
    # Plugin groups start at their base class, and lists empty: merging one plugin onto another would keep the first
    # one's keys.
    bases = {group: registry.base() for group, registry in REGISTRIES.items()}
    empty: dict[str, Any] = {group: {} for group in LISTS}
    store.store(name="schema", node=LaunchConfig(**bases, **empty))
    for group, config_class in PLAIN.items():
        store.store(group=group, name=f"{group}_schema", node=config_class)
    for group, options in plugin_classes().items():
        for name, config_class in options.items():
            store.store(group=group, name=f"{name}_schema", node=config_class)
            if not (conf_dir() / group / f"{name}.yaml").exists():  # a third party's plugin needs no YAML
                store.store(group=group, name=name, node=config_class)
    for group, options in list_classes().items():
        for name, config_class in options.items():
            store.store(group=group, name=name, node=config_class, package=f"{group}.{name}")


def job_folder(number: object, overrides: str) -> str:
    """Folder of a sweep's job, the same for the same sweep: short, and safe as a path and inside an override.

    Example:
        >>> job_folder(3, "model.name=org/opt,trainer=mezo")
        '3_model.name-org-opt_trainer-mezo'
    """
    bare = re.sub(r"[\\'\"]", "", overrides).replace(",", "_")
    safe = re.sub(r"[^A-Za-z0-9._+-]+", "-", bare).strip("-_")
    if len(safe) > _MAX_FOLDER_CHARS:
        safe = safe[:_MAX_FOLDER_CHARS] + "_" + hashlib.sha256(overrides.encode()).hexdigest()[:8]
    return f"{number}_{safe}" if safe else str(number)


# At import, because a worker of the joblib launcher gets here by importing the job function's module only.
OmegaConf.register_new_resolver("fedzo_job_folder", job_folder, replace=True)
