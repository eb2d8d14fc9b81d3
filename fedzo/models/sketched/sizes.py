"""What a sketch of a model will weigh, from the shapes of the dense model alone: it may lie on the meta device.

Of a layer with R outputs and d inputs, b bits and G groups a row (SpaLLM, arXiv 2410.06364):

    codes    R * ceil(d * b / 8) bytes
    tables   R * G * 2^b values, which are also what is trained
    dense    what stays as it is: biases, embeddings, head, norms, skipped layers, and experts that are one tensor

A tied head counts once. Sizes are of 16-bit tables and 16-bit dense weights; trained tables are float32 and take twice
as much.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from fedzo.models.sketched.layers import dense_layers, weight_of
from fedzo.sketch.packing import check_bits, columns_per_group, packed_width

_BYTES = 2  # of a 16-bit value


@dataclass(frozen=True, slots=True)
class SketchSize:
    """The size of a sketch.

    Attributes:
        num_weights: Weights of the layers that are sketched.
        num_entries: Values of their tables.
        code_bytes: Their packed codes.
        num_dense: Weights that stay dense.
    """

    num_weights: int
    num_entries: int
    code_bytes: int
    num_dense: int

    @property
    def table_bytes(self) -> int:
        """The tables in 16 bits."""
        return _BYTES * self.num_entries

    @property
    def dense_bytes(self) -> int:
        """What stays dense, in 16 bits."""
        return _BYTES * self.num_dense

    @property
    def num_bytes(self) -> int:
        """All of it."""
        return self.code_bytes + self.table_bytes + self.dense_bytes

    @property
    def bits_per_weight(self) -> float:
        """Of a sketched weight, its share of the tables included."""
        return 8 * (self.code_bytes + self.table_bytes) / self.num_weights if self.num_weights else 0.0


def sketch_size(model: nn.Module, *, bits: int, groups_per_row: int, keep: Iterable[str]) -> SketchSize:
    """The size of the sketch that ``layers.replace_layers`` makes room for with the same arguments.

    Args:
        model: A dense causal language model, on any device; nothing of it is read but shapes. One on the meta device
            must be made there: ``.to("meta")`` parts tied weights, which then count twice.
        bits: Of a code: 2, 3 or 4.
        groups_per_row: G.
        keep: Names of the linear layers that stay dense.

    Returns:
        Exact counts.

    Raises:
        ConfigError: ``bits`` cannot be, or a width that the groups do not divide.
    """
    check_bits(bits)
    kept = set(keep)
    layers = {name: layer for name, layer in dense_layers(model).items() if name not in kept}
    shapes = [tuple(weight_of(layer).shape) for layer in layers.values()]
    for name, (_, inputs) in zip(layers, shapes, strict=True):
        columns_per_group(inputs, groups_per_row, name=name)
    sketched = {id(layer.weight) for layer in layers.values()}
    return SketchSize(
        num_weights=sum(outputs * inputs for outputs, inputs in shapes),
        num_entries=sum(outputs for outputs, _ in shapes) * groups_per_row * 2**bits,
        code_bytes=sum(outputs * packed_width(inputs, bits) for outputs, inputs in shapes),
        num_dense=sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in sketched),
    )
