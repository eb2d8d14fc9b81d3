"""Windows of calibration text: what the sensitivity of a weight is measured on.

As the tool behind SensZOQ's checkpoints does it (SqueezeLLM-gradients): documents that are long enough, one random
window of each, every window an example of its own. Deviations: order and offsets come from the counter-based generator;
a token that begins every text stands in place of a window's first, since some models (Gemma) are lost without it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch

from fedzo.errors import ConfigError
from fedzo.zo.directions import PURPOSE_DATA, permutation, philox_words, stream_key

_ORDER, _OFFSET = 0, 1  # ``step`` of the two streams; their owner is SHARED, which no client's data order uses


def windows_from_texts(
    texts: Sequence[str],
    *,
    tokenize: Callable[[str], list[int]],
    num_docs: int,
    num_tokens: int,
    seed: int,
    opening: int | None = None,
) -> list[torch.Tensor]:
    """One random window of each of ``num_docs`` documents.

    Documents are tried in a seeded order and only as many are tokenized as are needed.

    Args:
        texts: The documents.
        tokenize: Text to token ids.
        num_docs: Number of windows, at least 1.
        num_tokens: Length of each, at least 2; shorter documents are passed over.
        seed: Seed of the order and of the offsets.
        opening: The token that begins every text, if one does.

    Returns:
        int64 [num_tokens] tensors.

    Raises:
        ConfigError: Too few documents are long enough.
    """
    words = philox_words(stream_key(seed, round=0, step=_OFFSET), purpose=PURPOSE_DATA, num_words=2 * num_docs)
    windows: list[torch.Tensor] = []
    for number in permutation(stream_key(seed, round=0, step=_ORDER), len(texts), purpose=PURPOSE_DATA).tolist():
        tokens = tokenize(texts[number])
        if len(tokens) < num_tokens:
            continue
        # 64 bits make the bias of the remainder negligible
        word = int(words[2 * len(windows)]) | int(words[2 * len(windows) + 1]) << 32
        offset = word % (len(tokens) - num_tokens + 1)
        window = torch.tensor(tokens[offset : offset + num_tokens], dtype=torch.int64)
        if opening is not None:
            window[0] = opening
        windows.append(window)
        if len(windows) == num_docs:
            return windows
    raise ConfigError(
        f"trainer.calibration_docs={num_docs} documents of at least {num_tokens} tokens are needed, "
        f"got {len(windows)} that are long enough among {len(texts)}. "
        "Lower calibration_docs or calibration_tokens, or give more text."
    )


def windows_digest(windows: Sequence[torch.Tensor]) -> str:
    """SHA-256 over the token ids of the windows, in order."""
    digest = hashlib.sha256()
    for window in windows:
        digest.update(window.numel().to_bytes(8, "little"))
        digest.update(window.cpu().numpy().astype("<i8").tobytes())
    return digest.hexdigest()
