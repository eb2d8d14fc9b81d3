"""What transformers is told of attention, where by its own guess it would ask torch for other kernels, or slow ones.

Each note takes the place of a function of its modules, by name. Tests check that the names are still there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from transformers import masking_utils

_LOOK = masking_utils.find_packed_sequence_indices
_FIRST_WITH_GROUPS = 8  # major number of the compute capability: Ampere


@contextmanager
def whole_texts() -> Iterator[None]:
    """Tell transformers that each row is one text, for which it would look at positions: a GPU makes it wait for them.

    While kernels are recorded it cannot look, and would give attention an explicit mask, and with it other kernels than
    those of the eager forward.
    """
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = _LOOK


@cache
def repeat_keys() -> None:
    """Let transformers repeat keys that several heads share, from now on, where a GPU has no fused kernel for groups.

    By its own guess it asks torch for groups on every GPU. Where no fused kernel has them, torch says nothing and takes
    plain attention. That writes all scores down, in memory that no estimate counts, and is slow.
    """
    from transformers.integrations import sdpa_attention  # slow to import

    own = sdpa_attention.use_gqa_in_sdpa

    def use_gqa_in_sdpa(attention_mask: torch.Tensor | None, key: torch.Tensor, value: torch.Tensor) -> bool:
        return has_groups(key.device, key.dtype) and own(attention_mask, key, value)

    sdpa_attention.use_gqa_in_sdpa = use_gqa_in_sdpa


def has_groups(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether attention in which heads share keys may be asked of torch, on this device and in this dtype.

    A GPU's fused kernels for it (flash, cuDNN) take 16 bits, from Ampere on. Other devices are left to transformers.
    """
    if device.type != "cuda":
        return True
    if dtype == torch.float32:
        return False
    # the properties: torch.compile takes them for a constant, but not the capability that torch reads from them
    major: int = torch.cuda.get_device_properties(device).major
    return major >= _FIRST_WITH_GROUPS
