"""``fedzo sketch``: replace a model's linear layers by lookup tables and codes, once, for runs to come."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from fedzo.commands.perplexity import read_documents
from fedzo.config.schema import LaunchConfig, uncompiled
from fedzo.errors import ConfigError, RunFolderError
from fedzo.evaluate.perplexity import perplexity, text_windows
from fedzo.masks.calibration import windows_digest
from fedzo.models.config import Quantization
from fedzo.models.loaded import LoadedModel
from fedzo.models.sketched.builder import layers_to_sketch, left_dense, sketch_model
from fedzo.models.sketched.folder import write_sketch
from fedzo.models.sketched.leanquant import put_layout, write_layout
from fedzo.records.decode import to_json
from fedzo.records.folder import folder_of_one_process, raised_as, replace_file, sync_folder
from fedzo.records.sketch import BuildInProgress, SketchedLayer, SketchRecipe
from fedzo.report.format import bytes_text, seconds_text
from fedzo.report.sinks import phase
from fedzo.run.peer import open_model
from fedzo.sketch import SketchSettings, sketched_layers

_RECIPE, _LAYERS, _WHOLE = "recipe.json", "layers", "sketch"  # in the folder of a build that is under way
_MEASURED_WINDOWS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class SketchRequest:
    """What a sketch is to be.

    Attributes:
        out: New folder.
        settings: How matrices are sketched.
        calibration: File of text without labels.
        windows: Most windows of it that are used.
        tokens: Tokens of a window.
        skip: Ends of names of layers that stay dense.
        text: File of text whose perplexity is measured before and after; None for the calibration's own.
    """

    out: Path
    settings: SketchSettings
    calibration: Path
    windows: int = 128
    tokens: int = 512
    skip: list[str] = field(default_factory=list)
    text: Path | None = None


def make_sketch(config: LaunchConfig, request: SketchRequest) -> Iterator[str]:
    """Build a sketch of ``config.model`` in a new folder; yields what to tell people, line by line.

    The folder appears whole or not at all. What is finished stays in a folder beside it until then, and the same
    command goes on from there.

    Raises:
        ConfigError: The model, the text or the settings cannot be used.
        RunFolderError: The folder cannot be written, or another process builds it.
    """
    _check_out(request.out)
    documents = read_documents(request.calibration, "--calibration")
    measured_on = documents if request.text is None else read_documents(request.text, "--text")
    loaded = _open(config)
    windows, measured = (
        text_windows(loaded, texts, num_tokens=request.tokens, source=str(file))[:most]
        for texts, file, most in (
            (documents, request.calibration, request.windows),
            (measured_on, request.text or request.calibration, _MEASURED_WINDOWS),
        )
    )
    recipe = _recipe(loaded, request, windows)
    layers_to_sketch(loaded.model, request.settings.groups_per_row, request.skip)  # what is wrong with it, at once
    with _part_of(request.out) as part:
        yield from _build(loaded, request, recipe, windows, measured, part)


def import_sketch(config: LaunchConfig, file: Path, out: Path) -> Iterator[str]:
    """Make a sketch's folder of a dense model, and tables and codes in LeanQuant's layout; errors as above."""
    _check_out(out)
    loaded = _open(config)
    put_layout(loaded.model, file)
    with _part_of(out) as part:
        if (part / _RECIPE).exists():
            raise ConfigError(
                f"{part}: a build has begun there and its finished layers must not be lost. End that build, remove the "
                "folder, or choose another --out."
            )
        yield from _facts(loaded)
        yield from _write(loaded, None, {}, part, out)


def export_sketch(config: LaunchConfig, file: Path) -> Iterator[str]:
    """Write a sketch's tables and codes in LeanQuant's layout."""
    with raised_as(RunFolderError, f"{file}: it must be writable", "Make room or choose another place."):
        yield f"{file}: {write_layout(_open(config).model, file)} layers"


def _check_out(out: Path) -> None:
    if out.name == "..":
        raise ConfigError(f"--out must end with the name of a new folder, got {str(out)!r}. Write its name.")
    if os.path.lexists(out):
        raise ConfigError(f"--out: {str(out)!r} must not exist, but does. Choose another, or remove it.")


def _open(config: LaunchConfig) -> LoadedModel:
    site = config.site()
    if site.model.quantization is not Quantization.none:
        raise ConfigError(
            f"model.quantization must be none for a sketch, which packs the weights itself, got "
            f"{site.model.quantization}. Leave it out."
        )
    loaded = open_model(uncompiled(site), max_length=1)
    if loaded.packed_as is not None:
        raise ConfigError(
            f"model.name must be a model of dense weights for a sketch, got {loaded.source!r}, whose weights are "
            f"stored packed (quant_method={loaded.packed_as}). Name the model that it was packed from."
        )
    return loaded


@contextmanager
def _part_of(out: Path) -> Iterator[Path]:
    """The folder beside the result in which this process alone works until that is whole."""
    part = out.with_name(f"{out.name}.part")
    remedy = (
        f"Make room or choose another folder, and call the same command again: it goes on with what is in {part.name}."
    )
    with raised_as(RunFolderError, f"{out}: it must be writable", remedy):
        part.mkdir(parents=True, exist_ok=True)
        with folder_of_one_process(part):
            yield part
        with suppress(OSError):  # empty where NFS still had a name for the file that was locked, else gone or in use
            part.rmdir()


def _build(
    loaded: LoadedModel,
    request: SketchRequest,
    recipe: SketchRecipe,
    windows: torch.Tensor,
    measured: torch.Tensor,
    part: Path,
) -> Iterator[str]:
    dtype = str(next(loaded.model.parameters()).dtype).removeprefix("torch.")
    begun = BuildInProgress(
        recipe=recipe, architecture_digest=loaded.architecture_digest, dtype=dtype, device=loaded.device.type
    )
    _check_begun(part / _RECIPE, begun, request.out)
    what = f"{len(measured)} windows of {'--text' if request.text else 'the calibration text itself'}"
    yield f"calibration: {len(windows)} windows of {request.tokens} tokens"
    before = perplexity(loaded, measured).value
    yield f"perplexity on {what}: {before:.2f} before"
    with phase("sketching layers") as advance:
        report = sketch_model(
            loaded.model, list(windows), request.settings, skip=request.skip, kept=part / _LAYERS, advance=advance
        )
    layers = report.layers
    yield (
        f"sketched {len(layers)} layers: {seconds_text(report.forwards_s)} for forwards of the text, "
        f"{seconds_text(report.matrices_s)} for tables and codes"
    )
    after = perplexity(loaded, measured).value
    yield f"perplexity on {what}: {after:.2f} after ({after / before:.3f} times)"
    worst = max(layers, key=lambda name: layers[name].relative_error)
    mean = sum(layer.relative_error for layer in layers.values()) / len(layers)
    yield f"relative error of the layers' outputs: {mean:.4f} on average, {layers[worst].relative_error:.4f} in {worst}"
    yield from _facts(loaded)
    yield from _write(loaded, recipe, layers, part, request.out)


def _write(
    loaded: LoadedModel, recipe: SketchRecipe | None, layers: dict[str, SketchedLayer], part: Path, out: Path
) -> Iterator[str]:
    whole = part / _WHOLE
    shutil.rmtree(whole, ignore_errors=True)
    source = loaded.base_digest if recipe is None else None
    manifest = write_sketch(loaded.model, loaded.tokenizer, recipe, layers, whole, source_digest=source)
    whole.rename(out)
    sync_folder(out.parent)
    shutil.rmtree(part, ignore_errors=True)
    yield f"{out}: {bytes_text(_stored_bytes(out))}, {len(manifest.tensors)} tensors"


def _recipe(loaded: LoadedModel, request: SketchRequest, windows: torch.Tensor) -> SketchRecipe:
    return SketchRecipe(
        **asdict(request.settings),
        sequential=True,
        source=loaded.source.rstrip("/").rpartition("/")[2],
        source_digest=loaded.base_digest,
        calibration_digest=windows_digest(list(windows)),
        num_windows=len(windows),
        num_tokens=request.tokens,
        skipped=tuple(request.skip),
    )


def _check_begun(file: Path, build: BuildInProgress, out: Path) -> None:
    """A build that was killed goes on only with what it began with."""
    said = to_json(build) + "\n"
    if file.exists() and file.read_text(encoding="utf-8") != said:
        raise ConfigError(
            f"{file.parent}: a build with other settings, another config.json, another model, other text, another "
            "model.dtype or another kind of device has begun there, and must be ended with those. Call that command "
            f"again, remove the folder, or choose another --out than {str(out)!r}."
        )
    replace_file(file, said, durable=True)


def _facts(loaded: LoadedModel) -> Iterator[str]:
    """What the codes and tables take, and what stays dense."""
    sketched = sketched_layers(loaded.model).values()
    weights = sum(layer.out_features * layer.in_features for layer in sketched)
    entries = sum(layer.tables.numel() for layer in sketched)
    bits = 8 * sum(layer.codes.numel() for layer in sketched) + 16 * entries
    yield f"{weights:,} weights are codes now, {bits / weights:.3f} bits each with their {entries:,} table values"
    dense = ", ".join(
        f"{name} ({count} x {total // count:,})" for name, (count, total) in left_dense(loaded.model).items()
    )
    yield f"left dense: {dense or 'nothing'}"


def _stored_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())
