"""One registry a kind of plugin, keyed by a typed config dataclass: a closed set, so a config runs no code.

Third parties add plugins through the entry-point group ``fedzo.plugins``: each entry names a module whose import
registers its parts.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import types
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Generic, TypeVar, Union, get_args, get_origin, get_type_hints

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
            yield from problems_of(rules(config, run), by=config, method="problems")


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
        raise _broken_promise(value, f"a {kind.__module__}.{kind.__qualname__}", by=by, method=method)
    return value


def problems_of(found: object, *, by: object, method: str) -> Iterator[Problem]:
    """The problems that a method of a plugin gave, as ``returned`` gives one value.

    Raises:
        PluginError: They are no problems, or nothing at all, as of a method that forgets to ``yield``.
    """
    if not isinstance(found, Iterable):
        raise _broken_promise(found, "an iterator of fedzo.errors.Problem", by=by, method=method)
    for each in found:
        yield returned(each, Problem, by=by, method=method)


def _broken_promise(value: object, promised: str, *, by: object, method: str) -> PluginError:
    return PluginError(
        f"{_full_name(type(by))}.{method} must give {promised}, got {value!r:.100} "
        f"({type(value).__name__}). Correct the plugin; fedzo.testing has checks for it."
    )


def _full_name(of: type) -> str:
    return f"{of.__module__}.{of.__qualname__}"


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
        """Decorate the factory of ``config_class`` under ``name`` (the Hydra option, and a part of keys).

        A class that is defined anew, under the same name in the same module, takes the place of the old one.
        """
        if not re.fullmatch("[A-Za-z_][A-Za-z0-9_-]{0,99}", name):
            raise ValueError(f"{self.kind} {name!r}: a name must hold letters, digits, _ and - only, 100 at most")
        if name.endswith("_schema"):
            raise ValueError(f"{self.kind} {name!r}: a name must not end in _schema, as fedzo's own schemas do")
        if not dataclasses.is_dataclass(config_class) or not issubclass(config_class, self.base):
            raise TypeError(
                f"{self.kind} {name!r}: {config_class.__name__} must be a dataclass of {self.base.__name__}"
            )
        if not {"__slots__", "__dataclass_fields__"} <= vars(config_class).keys():
            raise TypeError(
                f"{self.kind} {name!r}: {config_class.__name__} must be decorated with @dataclass(kw_only=True, "
                "slots=True), so that stray keys fail"
            )
        owner = self._configs.get(name)
        again = owner is not None and _full_name(owner) == _full_name(config_class)  # as of a notebook's cell
        if config_class in self._factories or (owner is not None and not again):
            raise ValueError(
                f"{self.kind} {name!r}: {_full_name(owner or config_class)} is registered already; each name and class "
                "stands once"
            )
        if any(field.name == "plugin" for field in dataclasses.fields(config_class)):
            raise TypeError(
                f"{self.kind} {name!r}: no field of {config_class.__name__} may be called plugin, which names the "
                "option where a config is sent"
            )
        _check_fields(config_class, where=f"{self.kind} {name!r}")

        def add(factory: Callable[..., T]) -> Callable[..., T]:
            self._factories.pop(self._configs.get(name, config_class), None)
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


_ALLOWED = (
    "bool, int, float, str, an Enum of text or numbers, a dataclass of these, list[...], dict[str, ...] or one of them "
    "with | None"
)
"""Types of a config's fields: of these alone Hydra composes values and ``fedzo.config.travel`` reads them."""


def _check_fields(config_class: type, *, where: str) -> None:
    """Refuse a config that could be chosen and then not sent.

    Raises:
        TypeError: A field is of another type than ``_ALLOWED``, its type cannot be found, or ``init`` is false.
    """
    name = config_class.__name__
    try:
        hints = get_type_hints(config_class)
    except (NameError, AttributeError, TypeError, SyntaxError) as error:
        raise TypeError(
            f"{where}: the types of the fields of {name} must be names of its module, got {error}. Import them "
            f"outside TYPE_CHECKING. Allowed: {_ALLOWED}"
        ) from error
    for field in dataclasses.fields(config_class):
        hint = hints[field.name]
        if not field.init:
            raise TypeError(f"{where}: {name}.{field.name} must not have init=False, or no peer can read it")
        for kind in _innermost(hint):
            if isinstance(kind, type) and dataclasses.is_dataclass(kind):
                _check_fields(kind, where=where)
            elif not _is_plain(kind):
                raise TypeError(f"{where}: the type of {name}.{field.name} must be {_ALLOWED}, got {hint}")


def _is_plain(kind: Any) -> bool:
    """Whether values of a type are text or numbers, or an Enum of such: JSON has lists for tuples, and no objects."""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return all(isinstance(member.value, str | int | float) for member in kind)
    return kind in (bool, int, float, str)


def _innermost(hint: Any) -> Iterator[Any]:
    """What lists, dicts and ``| None`` hold at last; what may hold nothing that travels is given as it is."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType) and len(arguments) == 2 and type(None) in arguments:
        yield from _innermost(next(each for each in arguments if each is not type(None)))
    elif origin is list or (origin is dict and arguments[0] is str):
        yield from _innermost(arguments[-1])
    else:
        yield hint


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
