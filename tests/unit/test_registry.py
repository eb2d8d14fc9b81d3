"""What may be registered."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

from fedzo import registry
from fedzo.errors import ConfigError, PluginError, Problem
from fedzo.registry import PluginConfig, Registry, broken_rules, returned


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
