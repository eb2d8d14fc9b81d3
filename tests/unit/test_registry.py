"""What may be registered."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from fedzo import registry
from fedzo.errors import ConfigError
from fedzo.registry import PluginConfig, Registry


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
