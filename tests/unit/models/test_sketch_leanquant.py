"""LeanQuant's layout: written as it is defined, read to the bit, and refused where it does not fit."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fedzo.errors import ConfigError
from fedzo.models.sketched.leanquant import put_layout, write_layout
from fedzo.sketch import sketched_layers
from fedzo.testing.tiny_models import tiny_model, tiny_sketch

NAME = "model.layers.0.mlp.down_proj"
Tensors = dict[str, torch.Tensor]


@pytest.mark.parametrize(("bits", "groups"), [(4, 1), (4, 2), (3, 1), (2, 4)])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_sketch_comes_back_to_the_bit(family: str, bits: int, groups: int, tmp_path: Path) -> None:
    sketch, again = tiny_sketch(family, bits=bits, groups_per_row=groups), tiny_model(family)

    assert write_layout(sketch, tmp_path / "f") == len(sketched_layers(sketch))
    put_layout(again, tmp_path / "f")

    assert again.state_dict().keys() == sketch.state_dict().keys()
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in sketch.state_dict().items())


@pytest.mark.parametrize(("bits", "groups"), [(4, 1), (3, 2)])
def test_each_weight_is_the_tables_value_that_its_nibble_names(bits: int, groups: int, tmp_path: Path) -> None:
    sketch = tiny_sketch(bits=bits, groups_per_row=groups)
    write_layout(sketch, tmp_path / "f")

    stored = load_file(tmp_path / "f")

    table, halves = stored[f"{NAME}.table"], stored[f"{NAME}.codes"]
    width = 64 // groups
    assert table.shape == ((32, 16) if groups == 1 else (32, groups, 2**bits))
    assert halves.shape == ((32, 32) if groups == 1 else (32, groups, width // 2))
    weight = sketch.get_submodule(NAME).weight
    table, halves = table.view(32, groups, -1), halves.view(32, groups, -1)
    for row in range(0, 32, 5):
        for column in range(64):
            byte = int(halves[row, column // width, column % width // 2])
            code = byte % 16 if column % 2 else byte // 16
            assert weight[row, column] == table[row, column // width, code].float()


def test_layers_that_the_file_has_not_stay_dense(tmp_path: Path) -> None:
    model, dense = tiny_model(), tiny_model()
    write_layout(tiny_sketch(), tmp_path / "f")
    save_file({name: each for name, each in load_file(tmp_path / "f").items() if name.startswith(NAME)}, tmp_path / "f")

    put_layout(model, tmp_path / "f")

    assert list(sketched_layers(model)) == [NAME]
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, dense.model.layers[1].mlp.up_proj.weight)


def _rename(tensors: Tensors) -> None:
    for part in ("table", "codes"):
        tensors[f"model.layers.9.mlp.down_proj.{part}"] = tensors.pop(f"{NAME}.{part}")


def _cut(tensors: Tensors) -> None:
    tensors[f"{NAME}.codes"] = tensors[f"{NAME}.codes"][:, 1:].contiguous()


def _beyond(tensors: Tensors) -> None:
    tensors[f"{NAME}.table"] = tensors[f"{NAME}.table"][:, :8].contiguous()
    tensors[f"{NAME}.codes"][:] = 0x3C


def _lose(tensors: Tensors) -> None:
    del tensors[f"{NAME}.table"]


def _mix(tensors: Tensors) -> None:
    tensors[f"{NAME}.table"] = tensors[f"{NAME}.table"][:, :8].contiguous()
    tensors[f"{NAME}.codes"][:] = 0x31


def _poison(tensors: Tensors) -> None:
    tensors[f"{NAME}.table"][3, 4] = float("nan")


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (_poison, f"'{NAME}': its table must be finite, got NaN or infinity. Copy the file again."),
        (_rename, "'model.layers.9.mlp.down_proj' must be a dense linear layer of the model"),
        (_cut, "must have a table [32, groups, 4, 8 or 16] and codes uint8 [32, groups, 64 / groups / 2], got"),
        (_beyond, "codes must be below 8, got 12"),
        (_lose, f"each layer must have a table and codes, but '{NAME}.table' is not there. Make the file again"),
        (_mix, "all layers must have the same bits and groups, got [(3, 1), (4, 1)]. Give a file of one sketch."),
    ],
)
def test_a_file_that_does_not_fit_is_refused(edit: Callable[[Tensors], None], expected: str, tmp_path: Path) -> None:
    write_layout(tiny_sketch(), tmp_path / "f")
    tensors = load_file(tmp_path / "f")
    edit(tensors)
    save_file(tensors, tmp_path / "f")

    with pytest.raises(ConfigError, match=re.escape(expected)):
        put_layout(tiny_model(), tmp_path / "f")


def test_codes_of_fewer_columns_than_the_layer_has_are_refused(tmp_path: Path) -> None:
    """A group of 3 columns does not fill whole bytes: one byte holds 2 of them."""
    save_file({"0.table": torch.zeros(5, 2, 16), "0.codes": torch.zeros(5, 2, 1, dtype=torch.uint8)}, tmp_path / "f")

    with pytest.raises(ConfigError, match=re.escape("codes uint8 [5, groups, 6 / groups / 2], got")):
        put_layout(nn.Sequential(nn.Linear(6, 5)), tmp_path / "f")


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    torch.save({NAME: (torch.zeros(32, 16), torch.zeros(32, 32, dtype=torch.uint8))}, tmp_path / "base.pkl")

    with pytest.raises(ConfigError, match=r"must be a safetensors file of LAYER\.table .* Pickles are never read"):
        put_layout(tiny_model(), tmp_path / "base.pkl")


def test_a_dense_model_and_odd_groups_have_no_such_layout(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be a sketch, but is dense"):
        write_layout(tiny_model(), tmp_path / "f")
    with pytest.raises(ConfigError, match="must have an even number of columns in this layout, got 1"):
        write_layout(tiny_sketch(groups_per_row=32), tmp_path / "f")
