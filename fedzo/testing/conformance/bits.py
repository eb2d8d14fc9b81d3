"""What the checks share: comparisons bit for bit, and global random generators that a plugin must leave alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from fedzo.zo.spaces.base import Values

Bits = Mapping[str, torch.Tensor]
"""The bytes of each tensor of a model, uint8."""


def must(holds: bool, message: str) -> None:
    """Raise ``AssertionError`` with ``message`` unless ``holds``; unlike ``assert`` it stays under ``python -O``."""
    if not holds:
        raise AssertionError(message)


def model_bits(model: nn.Module) -> Bits:
    """A copy of the bytes of every parameter and buffer."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        name: tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).clone() for name, tensor in tensors.items()
    }


def must_be_same_model(found: Bits, expected: Bits, rule: str) -> None:
    """The models must hold the same tensors with the same bits."""
    must(found.keys() == expected.keys(), f"{rule}: tensors came or went: {sorted(found.keys() ^ expected.keys())}")
    changed = [name for name in expected if not torch.equal(found[name], expected[name])]
    must(not changed, f"{rule}: {len(changed)} of {len(expected)} tensors differ, first {(changed or [''])[0]!r}")


def must_be_same_values(found: Values, expected: Values, rule: str) -> None:
    """Float32 vectors must be equal bit for bit."""
    kinds = f"{found.dtype} {found.shape}", f"{expected.dtype} {expected.shape}"
    must(kinds[0] == kinds[1], f"{rule}: must be {kinds[1]}, got {kinds[0]}")
    (where,) = np.nonzero(found.view(np.uint32) != expected.view(np.uint32))
    if where.size:
        i = int(where[0])
        raise AssertionError(
            f"{rule}: {where.size} of {found.size} values differ, the first at {i}: "
            f"must be {expected[i]!r}, got {found[i]!r}"
        )


@contextmanager
def global_generators(seed: int) -> Iterator[None]:
    """Seed the global generators of torch, numpy and Python; within, nothing may draw from them.

    They are as before afterwards. Two seeds that give two results show a plugin that depends on them without a trace.
    """
    kept = _generator_states()
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    try:
        seeded = _generator_states()
        yield
        drawn = [name for name, state in _generator_states().items() if state != seeded[name]]
        must(
            not drawn,
            f"global generators must be left alone, but {', '.join(drawn)}'s was used. "
            "Take random numbers from fedzo.zo.directions.",
        )
    finally:
        for name, restore in _RESTORE.items():
            restore(kept[name])


def _generator_states() -> dict[str, Any]:
    name, words, *rest = np.random.get_state()
    return {
        "torch": torch.random.get_rng_state().numpy().tobytes(),
        "numpy": (name, np.asarray(words).tobytes(), *rest),
        "random": random.getstate(),
    }


def _restore_numpy(state: Any) -> None:
    name, words, *rest = state
    np.random.set_state((name, np.frombuffer(words, np.uint32), *rest))


_RESTORE: dict[str, Callable[[Any], None]] = {
    "torch": lambda state: torch.random.set_rng_state(torch.frombuffer(bytearray(state), dtype=torch.uint8)),
    "numpy": _restore_numpy,
    "random": random.setstate,
}
