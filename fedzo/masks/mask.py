"""A static mask: which single weights of a model are trained."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import nn

from fedzo.errors import ConfigError
from fedzo.records.decode import canonical
from fedzo.zo.spaces.masked import check_indices

OTHER_MODEL = "It is a mask of another model. Make one with `fedzo mask --out FILE`, and write inputs.artifact=FILE."


@dataclass(frozen=True, slots=True, eq=False)
class Mask:
    """The trained coordinates of a model, in wire order: tensor by tensor, then by index.

    Building one checks it, so every ``Mask`` is sound in itself; ``check_fits`` compares it with a model.

    Raises:
        ConfigError: Indices are out of range, unsorted or repeated; there are none; the gradient does not match them.
    """

    indices: dict[str, torch.Tensor]
    """Per parameter the flat row-major indices, int64 [k], ascending; names in the order of ``named_parameters``."""
    shapes: dict[str, tuple[int, ...]]
    """Shape of each of these parameters."""
    gradient: dict[str, torch.Tensor] | None
    """Signed mean gradient of the calibration loss at the coordinates, float32 [k] each; kept for GradIP."""
    manifest: dict[str, str]
    """How the mask was made."""

    def __post_init__(self) -> None:
        if not self.indices:
            raise ConfigError("mask: it must hold at least one weight, got none. Take one that has.")
        if list(self.shapes) != list(self.indices):
            raise ConfigError("mask: shapes must name the same tensors as indices, in the same order.")
        for name, flat in self.indices.items():
            if flat.numel() == 0:
                raise ConfigError(f"mask: there must be indices of {name!r}, got none. Make the mask again.")
            check_indices(name, flat, math.prod(self.shapes[name]))
        if self.gradient is not None:
            if list(self.gradient) != list(self.indices):
                raise ConfigError("mask: gradient must name the same tensors as indices, in the same order.")
            for name, values in self.gradient.items():
                _check_gradient(name, values, self.indices[name].numel())

    @property
    def size(self) -> int:
        """Number of coordinates n."""
        return sum(flat.numel() for flat in self.indices.values())

    def digest(self) -> str:
        """SHA-256 over names, shapes and indices in wire order; the same on every machine, whatever the manifest."""
        digest = hashlib.sha256()
        for name, flat in self.indices.items():
            digest.update(canonical([name, self.shapes[name], flat.numel()]))
            digest.update(little_endian(flat))
        return digest.hexdigest()


def check_fits(mask: Mask, model: nn.Module) -> None:
    """Check that every tensor of ``mask`` is a parameter of ``model`` with the same shape.

    Raises:
        ConfigError: Naming the first tensor that is missing or shaped otherwise.
    """
    parameters = dict(model.named_parameters())
    for name, shape in mask.shapes.items():
        if name not in parameters:
            raise ConfigError(f"mask: the model has no parameter {name!r}. {OTHER_MODEL}")
        if tuple(parameters[name].shape) != shape:
            got = tuple(parameters[name].shape)
            raise ConfigError(f"mask: {name!r} must have shape {shape}, got {got}. {OTHER_MODEL}")


def _check_gradient(name: str, values: torch.Tensor, size: int) -> None:
    where = f"mask: the gradient of {name!r}"
    if values.dtype != torch.float32 or tuple(values.shape) != (size,):
        raise ConfigError(f"{where} must be float32 of shape ({size},), got {values.dtype} of {tuple(values.shape)}.")
    if not bool(values.isfinite().all()):
        raise ConfigError(f"{where} must be finite, got NaN or infinity. Make the mask again.")


def little_endian(values: torch.Tensor) -> bytes:
    """The numbers as they are hashed, on every machine alike."""
    array = values.detach().cpu().numpy()
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
