"""What a sketch's folder says of itself (``sketch.json``): how it was made, of what, and what lies in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fedzo.records.fields import Count, Hash, Length, Magnitude, Name, OmitDefault, Within

VERSION = 1
_MAX_TENSORS = 1 << 20
LayerName = Annotated[str, Length(1, 400)]
Places = Annotated[int, Within(1, 1 << 53)]


@dataclass(frozen=True, slots=True, kw_only=True)
class SketchedLayer:
    """How well a layer was sketched.

    Attributes:
        relative_error: tr(D H D^T) / tr(W H W^T), with D what the weight W lost and H the Hessian of its inputs.
        num_unused: Values of its tables that no code names.
    """

    relative_error: Magnitude
    num_unused: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor of the safetensors files; ``dtype`` as these write it. Its bytes follow from it and from ``shape``."""

    dtype: Name
    shape: Annotated[tuple[Count, ...], Length(0, 64)]
    sha256: Hash


@dataclass(frozen=True, slots=True, kw_only=True)
class SketchRecipe:
    """What a sketch was made of; ``SketchSettings`` has the meaning of the settings.

    Attributes:
        source: What the dense model was called.
        source_digest: SHA-256 of its weights.
        calibration_digest: SHA-256 of the token ids of the calibration windows.
        num_windows: Calibration windows.
        num_tokens: Tokens of each.
        skipped: Names of layers that were to stay dense, as they were given.
    """

    bits: Annotated[int, Within(2, 4)]
    groups_per_row: Places
    importance_power: Magnitude
    damping: Magnitude
    act_order: bool
    compensate: bool
    sequential: bool
    source: Name
    source_digest: Hash
    calibration_digest: Hash
    num_windows: Places
    num_tokens: Places
    skipped: Annotated[tuple[LayerName, ...], Length(0, 1 << 16)]


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildInProgress:
    """What the finished layers of a build depend on, to their last bit.

    Attributes:
        recipe: What the sketch is made of.
        architecture_digest: Of the dense model (``digest.architecture_digest``).
        dtype: In which the dense model is held while it is sketched.
        device: Kind of the device on which it is.
    """

    recipe: SketchRecipe
    architecture_digest: Hash
    dtype: Name
    device: Name


@dataclass(frozen=True, slots=True, kw_only=True)
class SketchManifest:
    """All of ``sketch.json``.

    Attributes:
        version: Of this record.
        fedzo: Version that wrote it.
        recipe: What it was made of; None where it came in another layout, or its tables were trained.
        layers: How well each layer was sketched, by name; empty where that is not known.
        tensors: What the safetensors files hold.
        source_digest: Without a recipe, SHA-256 of the model that was read: the dense one of an import, or the sketch
            whose tables were trained. None in older folders.
    """

    version: Annotated[int, Within(VERSION, VERSION)] = VERSION
    fedzo: Name
    recipe: SketchRecipe | None
    layers: Annotated[dict[LayerName, SketchedLayer], Length(0, _MAX_TENSORS)]
    tensors: Annotated[dict[LayerName, StoredTensor], Length(1, _MAX_TENSORS)]
    source_digest: Annotated[Hash | None, OmitDefault()] = None
