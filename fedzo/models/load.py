"""Loading a causal language model: device, dtype, digests of what was stored."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoTokenizer

from fedzo.errors import ConfigError
from fedzo.models.attention import repeat_keys
from fedzo.models.available import TORCH_DTYPES, check_room, held_bytes, ways_to_fit
from fedzo.models.checks import check_causal, check_finite, check_tokens, num_positions, positions_alone
from fedzo.models.compiled import compile_decoder
from fedzo.models.config import DType, ModelConfig, Quantization
from fedzo.models.digest import (
    Entry,
    architecture_digest,
    file_digest,
    parameters_digest,
    stored_entries,
    tokenizer_digest,
    weights_digest,
)
from fedzo.models.head import check_head
from fedzo.models.loaded import LoadedModel
from fedzo.models.shared_prompts import check_cache
from fedzo.models.sketched.folder import MANIFEST, check_tensors, read_manifest
from fedzo.models.sketched.layers import stored_state
from fedzo.models.source import (
    Source,
    check_unpacked,
    find_file,
    find_source,
    quantization_arguments,
    read_gguf,
    read_model,
    without_progress_bars,
)
from fedzo.sketch import sketched_layers
from fedzo.system import is_out_of_memory

logger = logging.getLogger(__name__)


def load_model(config: ModelConfig, *, device: str = "auto", max_length: int = 1) -> LoadedModel:
    """Load the model that ``config`` names: the embedded one, a local folder, or a hub name.

    Args:
        config: Which model, and in which dtype.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        max_length: Tokens of the longest text that it must take.

    Returns:
        The model in evaluation mode, without gradients or cache.

    Raises:
        ConfigError: It cannot be found, read, held on that device, or used at ``max_length``.
    """
    where = resolve_device(device)
    try:
        return _load(config, where, max_length)
    except ConfigError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise ConfigError(
                f"model.name {config.name!r}: the memory of {where} must hold the weights in {config.dtype}, but does "
                f"not. {ways_to_fit(config, where)}"
            ) from error
        if not _is_of_device(error):
            raise
        raise ConfigError(
            f"device must be one that torch {torch.__version__} can compute on, got {str(where)!r}, which fails: "
            f"{_line(error)}. Take a torch that is built for it, update its driver, or write device=cpu."
        ) from error


def _load(config: ModelConfig, where: torch.device, max_length: int) -> LoadedModel:
    source = find_source(config)
    dtype = TORCH_DTYPES[DType(config.dtype)]
    with _reading(config, where):
        check_unpacked(source, config)
    packed = quantization_arguments(config.quantization, device=where, dtype=dtype)
    if (held := held_bytes(config, source.files)) is not None:
        check_room(config, held, where)
    with _reading(config, where):
        tokenizer = AutoTokenizer.from_pretrained(source.name, **source.arguments())
        model = _read(source, dtype, **packed)
    check_finite(model, source.files, name=config.name)
    check_length(model, max_length, name=config.name)
    if not packed:  # packed weights are where they belong already
        model.to(where)
    if source.gguf_file is None:
        entries = stored_entries(source.files)
        if sketched_layers(model) and (file := find_file(source.name, MANIFEST, source.revision)):
            check_tensors(read_manifest(file), entries, name=config.name)
        digest = weights_digest(entries, tied=model.all_tied_weights_keys)
        apart = _is_as_stored(model, entries)
    else:
        digest = file_digest(source.files[0])
        apart = False

    def read_weights() -> Iterator[tuple[str, torch.Tensor]]:
        yield from _stored_tensors(source.files) if apart else _read(source, dtype, **packed).named_parameters()

    try:
        loaded = _wrap(
            model,
            tokenizer,
            device=where,
            digest=digest,
            source=config.name,
            read_weights=read_weights,
            config_file=source.config_file,
        )
    except Exception as error:  # and their model may do anything in its first forward
        if isinstance(error, ConfigError) or is_out_of_memory(error):
            raise
        if config.quantization is not Quantization.none:
            raise _cannot_pack(config, where, error) from error
        if _is_of_device(error):
            raise
        raise ConfigError(
            f"model.name {config.name!r} must be a causal language model that runs on token ids alone, but a forward "
            f"of {type(model).__name__} fails: {_line(error)}. Take another model, or correct its config.json."
        ) from error
    loaded = replace(loaded, revision=source.revision, reads_whole=not apart)
    return compile_loaded(loaded, longest=max_length) if config.compile else loaded


def check_length(model: nn.Module, max_length: int, *, name: str) -> None:
    """Refuse texts that are longer than the model's positions; warn where they change those of texts beside them.

    Raises:
        ConfigError: It has fewer than ``max_length``.
    """
    longest = num_positions(model)
    if longest is not None and max_length > longest:
        raise ConfigError(f"task.max_length must be <= {longest} for {name!r}, got {max_length}. Lower it.")
    alone = positions_alone(model)
    if alone is not None and max_length > alone:
        logger.warning(
            "%s: a text of more than %d tokens changes the positions of the shorter ones in its batch (longrope), so "
            "losses and scores depend on which texts meet there. Write task.max_length=%d to have each text alone",
            name,
            alone,
            alone,
        )


@contextmanager
def _reading(config: ModelConfig, device: torch.device) -> Iterator[None]:
    """Whatever transformers raises of files from anywhere, as fedzo's own error."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ConfigError) or is_out_of_memory(error):
            raise
        raise _cannot_read(config, device, error) from error


def _cannot_read(config: ModelConfig, device: torch.device, error: Exception) -> ConfigError:
    if isinstance(error, RuntimeError | SafetensorError):
        if config.quantization is not Quantization.none:
            return _cannot_pack(config, device, error)
        return ConfigError(
            f"model.name {config.name!r} must hold whole safetensors files with the shapes of its config.json. Reading "
            f"them fails: {_line(error)}. Copy the files again (`git lfs pull` where they are pointers of git-lfs)."
        )
    if "trust_remote_code" in str(error):  # which it tells the user to set
        return ConfigError(
            f"model.name {config.name!r} must hold a causal language model and a tokenizer that transformers can load "
            "without code of their own, but its files name such code (auto_map), and fedzo never runs it. Take a model "
            "of another family."
        )
    return ConfigError(
        f"model.name {config.name!r} must hold a causal language model and a tokenizer that transformers can load. "
        f"It says: {_line(error)}"
    )


def _cannot_pack(config: ModelConfig, device: torch.device, error: Exception) -> ConfigError:
    return ConfigError(
        f"model.quantization={config.quantization} must be a quantization that {config.name!r} can compute with on "
        f"{device}, but that fails: {_line(error)}. Write model.quantization=none, or another."
    )


def _is_of_device(error: Exception) -> bool:
    """Whether a GPU failed, whatever the model: there are no kernels for it, or it was lost."""
    return isinstance(error, RuntimeError) and "CUDA error" in str(error)


def _line(error: Exception) -> str:
    """An error's words in one line, after its kind where they are few (a KeyError's are a key alone)."""
    words = " ".join(str(error).split()).partition(" Model type should be one of")[0][:400]
    return words if len(words.split()) > 3 else f"{type(error).__name__}: {words}"


def compile_loaded(loaded: LoadedModel, *, longest: int) -> LoadedModel:
    """The same model, whose losses and scores run through its compiled decoder; ``longest`` counts a text's tokens.

    Generation and prompts shared among candidates, whose caches grow, stay with the model's own.

    Raises:
        ConfigError: This model cannot be compiled on this machine.
    """
    if not loaded.direct_head:
        raise ConfigError(
            f"model.compile must be false for {loaded.source!r}: its LM head cannot be applied without its decoder, "
            "and only the decoder is compiled. Write model.compile=false."
        )
    if loaded.is_sketch:
        raise ConfigError(
            f"model.compile must be false for {loaded.source!r}, which is a sketch: its layers decode their weights by "
            "kernels outside of torch, which cannot be traced. Write model.compile=false."
        )
    return replace(loaded, decoder=compile_decoder(loaded.model, longest=longest))


def wrap_model(model: Any, tokenizer: Any, *, source: str = "memory") -> LoadedModel:
    """Make a ``LoadedModel`` of a model built in memory; a copy of its weights serves ``reload_weights``."""
    kept = [(name, parameter.detach().clone()) for name, parameter in model.named_parameters()]
    digest = parameters_digest(
        (stored_state(model) if sketched_layers(model) else dict(model.named_parameters())).items()
    )
    device = next(model.parameters()).device
    return _wrap(model, tokenizer, device=device, digest=digest, source=source, read_weights=lambda: kept)


def resolve_device(device: str) -> torch.device:
    """The torch device that ``device`` names; ``auto`` takes CUDA, then MPS, then the CPU.

    Raises:
        ConfigError: The name is unknown or the device is not on this machine.
    """
    present = [
        name
        for name, there in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available()))
        if there
    ]
    present.append("cpu")
    if device == "auto":
        return torch.device(present[0])
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device must be auto, cpu, cuda, cuda:<index> or mps, got {device!r}.") from error
    if found.type not in present or (found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count()):
        raise ConfigError(f"device must be on this machine ({', '.join(present)}), got {device!r}. Use device=auto.")
    return found


def _read(source: Source, dtype: torch.dtype, **packed: Any) -> Any:
    with without_progress_bars():
        if source.gguf_file is not None:
            return read_gguf(source.name, dtype=dtype, **source.arguments())
        return read_model(source.name, dtype=dtype, use_safetensors=True, **source.arguments(), **packed)


def _is_as_stored(model: Any, entries: Mapping[str, Entry]) -> bool:
    """Whether the files hold each parameter under its own name, and transformers changed nothing of it but the dtype.

    Then a weight can be read again without the others, which beside the model would take its memory once more.
    """
    # transformers' own notes of what it renamed or converted, and of who unpacked: where these are gone, all are read
    if getattr(model, "_weight_conversions", None) != [] or getattr(model, "hf_quantizer", None) is not None:
        return False
    stored = {name: entry[2] for name, entry in entries.items() if name not in model.all_tied_weights_keys}
    return all(stored.get(name) == tuple(parameter.shape) for name, parameter in model.named_parameters())


def _stored_tensors(files: Iterable[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor of safetensors files with its name, mapped into memory when its turn comes."""
    for file in files:
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118
                yield name, stored.get_tensor(name)


def _wrap(
    model: Any,
    tokenizer: Any,
    *,
    device: torch.device,
    digest: str,
    source: str,
    read_weights: Callable[[], Iterable[tuple[str, torch.Tensor]]],
    config_file: Path | None = None,
) -> LoadedModel:
    model.eval()
    model.requires_grad_(False)
    if device.type == "cuda":
        repeat_keys()
    for settings in (model.config, model.config.get_text_config()):  # a decoder beside other parts reads its own
        settings.use_cache = False
    if hasattr(model.config, "rescale_every"):
        model.config.rescale_every = 0  # or RWKV divides its weights, in place, in its first forward
    check_tokens(model, tokenizer, name=source)
    check_causal(model, name=source)
    direct_head = check_head(model)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        device=device,
        base_digest=digest,
        tokenizer_digest=tokenizer_digest(tokenizer),
        architecture_digest=architecture_digest(config_file),
        source=source,
        read_weights=read_weights,
        direct_head=direct_head,
        shared_prompts=direct_head and check_cache(model),
    )
