"""What may be registered."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from fedzo import registry
from fedzo.errors import ConfigError, PluginError, Problem
from fedzo.registry import PluginConfig, Registry, broken_rules, returned

if TYPE_CHECKING:
    from decimal import Decimal


@dataclass(kw_only=True, slots=True)
class SquareConfig(PluginConfig):
    """A square."""


@pytest.mark.parametrize("name", ["", "a.b", "../a", "2d", "a b", "a" * 101])
def test_a_name_can_be_a_part_of_keys_and_files(name: str) -> None:
    shapes: Registry[str] = Registry("shape", base=PluginConfig)

    with pytest.raises(ValueError, match="a name must hold letters, digits, _ and - only"):
        shapes.register(name, SquareConfig)
    shapes.register("square-2_d", SquareConfig)(lambda config: "square")
    assert shapes.build(SquareConfig()) == "square"


def test_a_package_whose_plugin_cannot_be_imported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One broken package must not end every command with a traceback."""
    about = tmp_path / "lengths_of_mine-0.1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: lengths-of-mine\nVersion: 0.1\n")
    (about / "entry_points.txt").write_text("[fedzo.plugins]\nlengths = lengths_of_mine\n")
    (tmp_path / "lengths_of_mine.py").write_text("import no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    registry.load_plugins.cache_clear()

    with pytest.raises(ConfigError, match=r"'lengths' of lengths-of-mine: .* ModuleNotFoundError: .* pip uninstall"):
        registry.load_plugins()

    monkeypatch.undo()
    registry.load_plugins.cache_clear()
    registry.load_plugins()


def test_what_a_plugin_gives_is_of_its_kind_or_plugin_method_kind_and_value_are_named() -> None:
    problem = Problem("a", "b")

    assert returned(problem, Problem, by=SquareConfig(), method="problems") is problem
    expected = r"test_registry\.SquareConfig\.build must give a fedzo\.errors\.Problem, got None \(NoneType\)\. Correct"
    with pytest.raises(PluginError, match=expected):
        returned(None, Problem, by=SquareConfig(), method="build")


def test_a_rule_that_yields_text_is_named() -> None:
    @dataclass(kw_only=True, slots=True)
    class WordyConfig(PluginConfig):
        def problems(self, run: Any) -> Iterator[Problem]:
            yield cast(Any, "side must be positive")

    with pytest.raises(PluginError, match=r"WordyConfig\.problems must give a .*Problem, got 'side must be positive'"):
        [*broken_rules(WordyConfig(), cast(Any, None))]


def test_a_config_that_is_no_dataclass_of_its_own_is_refused() -> None:
    """It would inherit the keys of its base, and its own would be none."""

    class PlainConfig(SquareConfig):
        __slots__ = ()
        side: float = 1.0

    shapes: Registry[str] = Registry("shape", base=PluginConfig)

    with pytest.raises(TypeError, match=r"PlainConfig must be decorated with @dataclass\(kw_only=True, slots=True\)"):
        shapes.register("plain", PlainConfig)


def test_rules_that_yield_nothing_since_they_are_no_iterator_are_named() -> None:
    @dataclass(kw_only=True, slots=True)
    class ForgetfulConfig(PluginConfig):
        def problems(self, run: Any) -> Iterator[Problem]:
            return cast(Any, None)

    expected = r"ForgetfulConfig\.problems must give an iterator of fedzo\.errors\.Problem, got None \(NoneType\)"
    with pytest.raises(PluginError, match=expected):
        [*broken_rules(ForgetfulConfig(), cast(Any, None))]


class Colour(Enum):
    red = "red"


@dataclass(kw_only=True, slots=True)
class CornerConfig:
    radius: float | None = None


@dataclass(kw_only=True, slots=True)
class FullConfig(PluginConfig):
    """One field of each kind that travels."""

    closed: bool = True
    sides: int = 4
    name: str | None = None
    colours: list[Colour] = field(default_factory=list)
    corner: CornerConfig = field(default_factory=CornerConfig)
    lengths: dict[str, list[float]] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True)
class TupleConfig(PluginConfig):
    key: tuple[str, ...] = ()


@dataclass(kw_only=True, slots=True)
class UnionConfig(PluginConfig):
    key: int | str = 0


@dataclass(kw_only=True, slots=True)
class PathConfig(PluginConfig):
    key: Path | None = None


@dataclass(kw_only=True, slots=True)
class SetConfig(PluginConfig):
    key: list[set[str]] = field(default_factory=list)


@dataclass(kw_only=True, slots=True)
class NumberedConfig(PluginConfig):
    key: dict[int, str] = field(default_factory=dict)


def test_fields_of_every_type_that_travels_may_be_registered() -> None:
    shapes: Registry[str] = Registry("shape", base=PluginConfig)

    shapes.register("full", FullConfig)(lambda config: "full")

    assert dict(shapes) == {"full": FullConfig}


@pytest.mark.parametrize("config_class", [TupleConfig, UnionConfig, PathConfig, SetConfig, NumberedConfig])
def test_a_field_that_cannot_travel_is_refused_with_the_types_that_can(config_class: type) -> None:
    """It would be composed, and refused only by the peers that read it."""
    shapes: Registry[str] = Registry("shape", base=PluginConfig)

    with pytest.raises(TypeError, match=rf"type of {config_class.__name__}\.key must be bool, int, .*\| None, got"):
        shapes.register("odd", config_class)


class Half(Enum):
    half = object()


class Shape(Enum):
    wide = (1, 2)


@dataclass(kw_only=True, slots=True)
class ObjectConfig(PluginConfig):
    key: Half = Half.half


@dataclass(kw_only=True, slots=True)
class ShapeConfig(PluginConfig):
    key: Shape | None = None


@dataclass(kw_only=True, slots=True)
class FixedConfig(PluginConfig):
    key: int = field(default=3, init=False)


@dataclass(kw_only=True, slots=True)
class NamedConfig(PluginConfig):
    plugin: str = "square"


@pytest.mark.parametrize(
    ("config_class", "rule"),
    [
        (ObjectConfig, r"ObjectConfig\.key must be .* an Enum of text or numbers, .*Half"),
        (ShapeConfig, r"ShapeConfig\.key must be .* an Enum of text or numbers, .*Shape"),
        (FixedConfig, r"FixedConfig\.key must not have init=False"),
        (NamedConfig, "no field of NamedConfig may be called plugin"),
    ],
)
def test_a_config_that_its_own_text_could_not_give_back_is_refused(config_class: type, rule: str) -> None:
    """JSON has no objects of Python and no tuples, and the text names the option in the key ``plugin``."""
    shapes: Registry[str] = Registry("shape", base=PluginConfig)

    with pytest.raises(TypeError, match=rule):
        shapes.register("odd", config_class)


@dataclass(kw_only=True, slots=True)
class AbsentConfig(PluginConfig):
    key: Decimal | None = None


def test_a_type_that_only_a_type_checker_imports_is_refused() -> None:
    shapes: Registry[str] = Registry("shape", base=PluginConfig)

    with pytest.raises(TypeError, match=r"fields of AbsentConfig must be names of its module, got name 'Decimal'"):
        shapes.register("absent", AbsentConfig)


def test_a_name_that_would_hide_among_the_schemas_is_refused() -> None:
    shapes: Registry[str] = Registry("shape", base=PluginConfig)

    with pytest.raises(ValueError, match="a name must not end in _schema"):
        shapes.register("square_schema", SquareConfig)


def test_a_second_owner_of_a_name_is_told_of_the_first() -> None:
    shapes: Registry[str] = Registry("shape", base=PluginConfig)
    shapes.register("square", SquareConfig)(lambda config: "square")

    with pytest.raises(ValueError, match=r"'square': .*test_registry\.SquareConfig is registered already"):
        shapes.register("square", FullConfig)
    with pytest.raises(ValueError, match=r"'box': .*test_registry\.SquareConfig is registered already"):
        shapes.register("box", SquareConfig)
    with pytest.raises(ValueError, match=r"'square': .*test_registry\.SquareConfig is registered already"):
        shapes.register("square", SquareConfig)  # with another factory


def test_a_plugin_that_is_defined_anew_takes_the_place_of_the_old_one() -> None:
    """As in a notebook whose cell runs once more."""
    shapes: Registry[str] = Registry("shape", base=PluginConfig)

    def cell(number: int) -> type:
        @dataclass(kw_only=True, slots=True)
        class Again(PluginConfig):
            side: int = number

        shapes.register("again", Again)(lambda config: f"square of {config.side}")
        return Again

    old, new = cell(1), cell(2)

    assert dict(shapes) == {"again": new}
    assert shapes.build(new()) == "square of 2"
    with pytest.raises(ConfigError, match="nothing is registered for Again"):
        shapes.build(old())
