"""What may be registered."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

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
