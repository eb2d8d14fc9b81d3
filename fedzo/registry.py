"""One registry a kind of plugin, keyed by a typed config dataclass: a closed set, so a config runs no code.

Third parties add plugins through the entry-point group ``fedzo.plugins``: each entry names a module whose import
registers its parts.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from fedzo.errors import ConfigError, PluginError, Problem

if TYPE_CHECKING:
    from fedzo.config.schema import RunSettings

T = TypeVar("T")
ENTRY_POINT_GROUP = "fedzo.plugins"


@dataclasses.dataclass(kw_only=True, slots=True)
class PluginConfig:
    """Base of every plugin's config: its keys, and beside them the rules on these and what the plugin can do.

    What a plugin can do is told by ``traits``, a property of each kind's base class: rules of other parts read that and
    never a plugin's name.
    """

    def problems(self, run: RunSettings) -> Iterator[Problem]:
        """Broken rules on the keys that this very class adds, alone and beside the rest of the run.

        Each base class is asked for its own (``broken_rules``), so no class calls or replaces those of another.
        """
        return iter(())


def broken_rules(config: PluginConfig, run: RunSettings) -> Iterator[Problem]:
    """The problems of a plugin's config by the rules of its class and of all base classes, these first."""
    for config_class in reversed(type(config).__mro__):
        if rules := vars(config_class).get("problems"):
            for found in rules(config, run):
                yield returned(found, Problem, by=config, method="problems")


def returned(value: object, kind: type[T], *, by: object, method: str) -> T:
    """What a method of a plugin gave, which somebody else may have written.

    Args:
        value: What it gave.
        kind: What it promises to give.
        by: The plugin, or its config.
        method: The method's name.

    Raises:
        PluginError: It is nothing of the kind.
    """
    if not isinstance(value, kind):
        plugin = f"{type(by).__module__}.{type(by).__qualname__}"
        raise PluginError(
            f"{plugin}.{method} must give a {kind.__module__}.{kind.__qualname__}, got {value!r:.100} "
            f"({type(value).__name__}). Correct the plugin; fedzo.testing has checks for it."
        )
    return value


class Registry(Generic[T]):
    """Maps a name and a config class to a factory ``factory(config, **runtime) -> T``.

    Example:
        >>> SHAPES: Registry[float] = Registry("shape", base=object)
        >>> @dataclasses.dataclass(kw_only=True, slots=True)
        ... class Square:
        ...     side: float = 2.0
        >>> @SHAPES.register("square", Square)
        ... def area(config: Square) -> float:
        ...     return config.side**2
        >>> SHAPES.build(Square(side=3.0))
        9.0
    """

    def __init__(self, kind: str, *, base: type) -> None:
        self.kind = kind
        self.base = base
        self._factories: dict[type, Callable[..., T]] = {}
        self._configs: dict[str, type] = {}

    def register(self, name: str, config_class: type) -> Callable[[Callable[..., T]], Callable[..., T]]:
        """Decorate the factory of ``config_class`` under ``name`` (the Hydra option, and a part of keys)."""
        if not re.fullmatch("[A-Za-z_][A-Za-z0-9_-]{0,99}", name):
            raise ValueError(f"{self.kind} {name!r}: a name must hold letters, digits, _ and - only, 100 at most")
        if not dataclasses.is_dataclass(config_class) or not issubclass(config_class, self.base):
            raise TypeError(
                f"{self.kind} {name!r}: {config_class.__name__} must be a dataclass of {self.base.__name__}"
            )
        if not {"__slots__", "__dataclass_fields__"} <= vars(config_class).keys():
            raise TypeError(
                f"{self.kind} {name!r}: {config_class.__name__} must be decorated with @dataclass(kw_only=True, "
                "slots=True), so that stray keys fail"
            )
        if name in self._configs or config_class in self._factories:
            raise ValueError(f"{self.kind} {name!r} or {config_class.__name__} is registered already")

        def add(factory: Callable[..., T]) -> Callable[..., T]:
            self._configs[name] = config_class
            self._factories[config_class] = factory
            return factory

        return add

    def build(self, config: object, /, **runtime: Any) -> T:
        """Make the plugin that ``config`` describes; ``runtime`` holds objects that no config can."""
        factory = self._factories.get(type(config))
        if factory is None:
            known = ", ".join(sorted(self._configs)) or "none"
            raise ConfigError(f"{self.kind}: nothing is registered for {type(config).__name__}. Registered: {known}.")
        return factory(config, **runtime)

    def name_of(self, config: object) -> str | None:
        """Name of the option that a config belongs to, ``None`` if its class is not registered."""
        return next((name for name, config_class in self._configs.items() if config_class is type(config)), None)

    def __iter__(self) -> Iterator[tuple[str, type]]:
        return iter(sorted(self._configs.items()))


@functools.cache
def load_plugins() -> list[str]:
    """Import the modules that installed packages name under ``fedzo.plugins``, once a process; returns their names.

    Raises:
        ConfigError: One of them cannot be imported.
    """
    found = sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda point: point.name)
    for point in found:
        try:
            point.load()
        except Exception as error:  # somebody else's code: whatever it raises
            package = point.dist.name if point.dist else "an unknown package"
            raise ConfigError(
                f"plugin {point.name!r} of {package}: it must be possible to import {point.value}, got "
                f"{type(error).__name__}: {error}. Repair the package, or uninstall it: pip uninstall {package}"
            ) from error
    return [point.name for point in found]
