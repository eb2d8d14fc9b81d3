"""Sketching a whole model, one linear layer after another (SpaLLM, arXiv 2410.06364; LeanQuant, 2407.10032).

The Hessian of a layer is of the inputs that it gets from the layers before it as they are sketched already, and within
a block from the earlier stages, in GPTQ's "true sequential" order ({q, k, v}, {o}, {up, gate}, {down}). So a layer
makes good what those before it lost. Embeddings, head and norms stay as they are, as does whatever is no linear layer
of a block: experts that are fused into one tensor, for instance.

In memory are the model, the states of the calibration text between two blocks, and one stage's Hessian. A finished
layer is kept in a file; a build that was killed takes it from there, and ends with the same bytes.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from fedzo.errors import ConfigError
from fedzo.models.sketched.layers import dense_layers, weight_of
from fedzo.models.sketched.walk import Walk, find_linear_blocks, start_walk
from fedzo.records.folder import replace_file
from fedzo.records.sketch import SketchedLayer
from fedzo.sketch import Sketch, SketchLinear, SketchSettings, check_shapes, sketch_matrix, sketched_layers
from fedzo.sketch.packing import columns_per_group
from fedzo.system import OnProgress, no_progress


@dataclass(frozen=True, slots=True)
class BuildReport:
    """What became of the layers, and what it took.

    Attributes:
        layers: By name. A layer that the calibration text does not reach stays dense and is not among them.
        matrices_s: Seconds for factors, tables and codes.
        forwards_s: Seconds for all the rest: the calibration text's way through the model, and its Hessians.
    """

    layers: dict[str, SketchedLayer]
    matrices_s: float
    forwards_s: float


_NUMBER = re.compile(r"\d+")


def sketch_model(
    model: nn.Module,
    windows: Sequence[torch.Tensor],
    settings: SketchSettings,
    *,
    skip: Sequence[str] = (),
    sequential: bool = True,
    kept: Path,
    advance: OnProgress = no_progress,
) -> BuildReport:
    """Replace the linear layers in a model's blocks by sketches, in place.

    Args:
        model: A dense causal language model in evaluation mode, in any float dtype.
        windows: Token ids of the calibration text, int64 [tokens] each, all of one length.
        settings: How matrices are sketched.
        skip: Ends of names of layers that stay dense.
        sequential: Without it all Hessians are of the dense model.
        kept: Folder of the finished layers, of this very build. It may not be there yet.
        advance: Told (layers done, layers).

    Raises:
        ConfigError: The model is a sketch already, or no decoder; a name to skip is of no layer; groups do not divide a
            width; a weight or a Hessian cannot be used. Nothing was changed, but in the last case.
    """
    names = layers_to_sketch(model, settings.groups_per_row, skip)
    results: dict[str, SketchedLayer] = {}
    started, matrices_s = time.perf_counter(), 0.0
    with torch.no_grad():
        walk = start_walk(model, windows)
        for number in range(len(walk.blocks)):
            block = f"{walk.name}.{number}"
            finished: dict[str, Sketch] = {}
            for stage in walk.stages(number):
                chosen = [name for name in stage if f"{block}.{name}" in names]
                for name, sketch, seconds in _sketch_stage(walk, number, chosen, settings, kept):
                    matrices_s += seconds
                    finished[name] = sketch
                    results[f"{block}.{name}"] = SketchedLayer(
                        relative_error=sketch.relative_error, num_unused=sketch.num_unused
                    )
                    advance(len(results), len(names))
                if sequential:
                    _replace(walk.blocks[number], finished)
            walk.advance(number)
            _replace(walk.blocks[number], finished)
            names -= {name for name in names if name.startswith(f"{block}.") and name not in results}
            advance(len(results), len(names))
    return BuildReport(results, matrices_s, time.perf_counter() - started - matrices_s)


def layers_to_sketch(model: nn.Module, groups_per_row: int, skip: Iterable[str]) -> set[str]:
    """Full names of the linear layers in a model's blocks, less those that are skipped.

    Raises:
        ConfigError: As ``sketch_model`` says.
    """
    if sketched := sketched_layers(model):
        raise ConfigError(
            f"sketch: the model must be dense, but is a sketch already ({len(sketched)} layers, such as "
            f"{next(iter(sketched))!r}). Sketch the dense model that it was made of."
        )
    prefix, _ = find_linear_blocks(model)
    layers = {name: each for name, each in dense_layers(model).items() if name.startswith(f"{prefix}.")}
    for end in skip:
        named = [name for name in layers if f".{name}".endswith(f".{end}")]
        if not named:
            known = sorted({name.rpartition(".")[2] for name in dense_layers(model)})
            raise ConfigError(f"sketch: --skip must name linear layers ({', '.join(known)}), got {end!r}.")
        for name in named:
            del layers[name]
    for name, layer in layers.items():
        columns_per_group(weight_of(layer).shape[1], groups_per_row, name=name)
    if not layers:
        raise ConfigError("sketch: at least one linear layer must be left to sketch, got none. Skip fewer.")
    return set(layers)


def left_dense(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Matrices that are no sketch, numbers of blocks and experts written as ``*``: how many, and weights in all."""
    inside = {f"{name}.tables" for name in sketched_layers(model)}
    left: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and name not in inside:
            pattern = _NUMBER.sub("*", name)
            count, weights = left.get(pattern, (0, 0))
            left[pattern] = count + 1, weights + parameter.numel()
    return left


def _sketch_stage(
    walk: Walk, number: int, stage: list[str], settings: SketchSettings, kept: Path
) -> Iterator[tuple[str, Sketch, float]]:
    """The sketches of layers that read one tensor, whose Hessian is made when the first of them needs it.

    Each with its layer's name in the block, and the seconds that its matrix took.
    """
    hessian = None
    for name in stage:
        full_name = f"{walk.name}.{number}.{name}"
        file = kept / f"{full_name}.safetensors"
        layer: Any = walk.blocks[number].get_submodule(name)
        weight = weight_of(layer)
        sketch, seconds = _read(file, weight.shape[1], name=full_name), 0.0
        if sketch is None:
            if hessian is None:
                hessian = _hessian(walk.inputs(number, name))
            started = time.perf_counter()
            sketch = sketch_matrix(weight.cpu(), hessian, settings, name=full_name)
            seconds = time.perf_counter() - started
            _write(file, sketch)
        yield name, sketch, seconds


def _hessian(inputs: Iterable[torch.Tensor]) -> torch.Tensor:
    """(2 / n) sum x x^T, float32 [d, d] on the CPU."""
    total, count = torch.empty(0), 0
    for x in inputs:
        wide = x.float()
        total = total.addmm_(wide.T, wide) if count else wide.T @ wide
        count += len(wide)
    return (total * (2 / count)).cpu()


def _replace(block: nn.Module, sketches: dict[str, Sketch]) -> None:
    for name, sketch in sketches.items():
        layer: Any = block.get_submodule(name)
        if not isinstance(layer, SketchLinear):
            sketched = SketchLinear.of(sketch.codes, sketch.tables, sketch.num_columns, layer.bias)
            block.set_submodule(name, sketched.to(layer.weight.device))


def _write(file: Path, sketch: Sketch) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    facts = {key: getattr(sketch, key) for key in ("output_error", "output_energy", "num_unused")}
    data = save({"codes": sketch.codes, "tables": sketch.tables}, {"sketch": json.dumps(facts)})
    replace_file(file, data, durable=True)


def _read(file: Path, num_columns: int, *, name: str) -> Sketch | None:
    """A layer that an earlier start finished; None where there is none, or a damaged one."""
    if not os.path.lexists(file):
        return None
    try:
        with safe_open(file, framework="pt") as stored:
            codes, tables = stored.get_tensor("codes"), stored.get_tensor("tables")
            facts = json.loads(stored.metadata()["sketch"])
        check_shapes(codes, tables, num_columns, name=name)
        return Sketch(codes=codes, tables=tables, num_columns=num_columns, **facts)
    except (SafetensorError, ConfigError, KeyError, TypeError, ValueError):
        return None
