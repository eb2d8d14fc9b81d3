"""Digests of what a peer holds: base weights as stored, how the model computes with them, and the tokenizer."""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from fedzo.records.decode import canonical
from fedzo.system import usable_cpus

Entry = tuple[str, str, tuple[int, ...], str]
"""Name, dtype as safetensors writes it, shape, SHA-256 of the little-endian bytes."""

_DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.uint8: "U8",
}

_TEXTS = (
    "The quick brown fox doesn't jump over 12,345.67 lazy dogs -- or does it?",
    " two  spaces\n\tand\r\nlines ",
    "Caf\u00e9 cafe\u0301 \u00c5ngstr\u00f6m \ufb01ne \u0130stanbul",
    "\u5317\u4eac\u662f\u9996\u90fd\u3002 \u041c\u043e\u0441\u043a\u0432\u0430",
    "\u0645\u0631\u062d\u0628\u0627 \u0928\u092e\u0938\u094d\u0924\u0947",
    "def f(x): return x**2  # \U0001f642\U0001f469\u200d\U0001f52c",
    "internationalization UPPER lower Title",
)
"""What ``tokenizer_digest`` has tokenized; another text here makes another digest of every tokenizer."""

_NOT_COMPUTED = frozenset(
    {
        *("architectures", "attn_implementation", "auto_map", "dtype", "experts_implementation", "quantization_config"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "id2label", "label2id", "problem_type"),
        *("task_specific_params", "tokenizer_class", "torch_dtype", "transformers_version", "unsloth_fixed"),
        *("unsloth_version", "use_cache"),
    }
)
"""Keys of a configuration that ``architecture_digest`` leaves out; another set makes another digest."""


def stored_entries(files: Iterable[Path]) -> dict[str, Entry]:
    """The tensors of safetensors files by name, whatever their order and sharding, before any cast."""
    return {entry[0]: entry for file in files for entry in _stored(file)}


def weights_digest(entries: Mapping[str, Entry], *, tied: Mapping[str, str] | None = None) -> str:
    """SHA-256 over stored tensors.

    Args:
        entries: Of all shards, as ``stored_entries`` gives them.
        tied: Names that the model takes from another tensor, and that tensor's name; they do not count if it is stored.

    Returns:
        Hex digest over the sorted lines ``name dtype shape sha256(bytes)``.
    """
    return _digest([entry for name, entry in entries.items() if (tied or {}).get(name) not in entries])


def parameters_digest(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """As ``weights_digest`` for tensors in memory; a tensor met twice counts once, by its first name."""
    unique: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in named:
        unique.setdefault(id(tensor), (name, tensor))
    return _digest([_entry(name, tensor) for name, tensor in unique.values()])


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 over vocabulary, special tokens, chat template and the tokens of a few texts, as canonical JSON.

    The texts tell what a file may say in many ways: whether a token begins or ends a text, how text is normalised and
    split, which tokens are merged.
    """
    held = {
        "vocabulary": tokenizer.get_vocab(),
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "chat_template": getattr(tokenizer, "chat_template", None),
        "tokens": [
            [list(tokenizer(text, add_special_tokens=whether, verbose=False)["input_ids"]) for whether in (True, False)]
            for text in _TEXTS
        ],
    }
    return hashlib.sha256(canonical(held)).hexdigest()


def architecture_digest(config_file: Path | None) -> str:
    """SHA-256 over what a model's ``config.json`` says of how it computes with its weights, as canonical JSON.

    As the file is stored: what transformers reads of it has other keys in another version of transformers. Left out is
    what may differ where the weights are the same: how they are held, and what the tokenizer says as well.

    Args:
        config_file: The file; None where the files of the weights hold the configuration, too.
    """
    held = {} if config_file is None else _of_computation(json.loads(config_file.read_text(encoding="utf-8")))
    return hashlib.sha256(canonical(held)).hexdigest()


def _of_computation(held: Any) -> Any:
    """Plain JSON without the keys that are left out, and without those that begin with an underscore."""
    if isinstance(held, list):
        return [_of_computation(item) for item in held]
    if isinstance(held, dict):
        kept = (key for key in held if key not in _NOT_COMPUTED and not key.startswith("_"))
        return {key: _of_computation(held[key]) for key in kept}
    return held


def _digest(entries: list[Entry]) -> str:
    lines = (f"{name} {dtype} {'x'.join(map(str, shape))} {digest}\n" for name, dtype, shape, digest in sorted(entries))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _stored(path: Path) -> list[Entry]:
    """Hashes the tensors of one file in threads, straight from the page cache: hashlib lets go of the interpreter."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        header_bytes = int.from_bytes(mapped[:8], "little")
        header: dict[str, Any] = json.loads(mapped[8 : 8 + header_bytes])
        header.pop("__metadata__", None)

        def entry(item: tuple[str, Any]) -> Entry:
            name, info = item
            low, high = (8 + header_bytes + offset for offset in info["data_offsets"])
            with memoryview(mapped) as view, view[low:high] as part:
                digest = hashlib.sha256(part).hexdigest()
            return name, info["dtype"], tuple(info["shape"]), digest

        with ThreadPoolExecutor(min(4, usable_cpus())) as pool:
            return list(pool.map(entry, header.items()))


def _entry(name: str, tensor: torch.Tensor) -> Entry:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    dtype = _DTYPES.get(tensor.dtype, str(tensor.dtype))
    return name, dtype, tuple(tensor.shape), hashlib.sha256(flat.data).hexdigest()
