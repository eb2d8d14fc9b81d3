"""States of single texts behind the lower blocks, kept over all rounds and scores (``model.lower_layers_cache_mb``).

Which texts run together depends on what is kept, and products of other shapes round differently: losses are those of
whole forwards but for their last bits. A client's rows all run before its first step in a process. So these bits do not
depend on the round in which the process began, as long as there is room for all and no two clients share a text.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

Tokens = tuple[int, ...]
Make = Callable[[list[int]], Iterable[tuple[int, torch.Tensor]]]
"""From indices of texts, of which no two are the same: the states of each."""


class Read(NamedTuple):
    """A text of which only the last positions are read."""

    tokens: Tokens
    num_positions: int


class Output(NamedTuple):
    """What a block gives.

    Attributes:
        states: [B, T, H], in most models.
        num_nones: How many times None stands behind the states, if they stand in a tuple.
    """

    states: torch.Tensor
    num_nones: int | None = None

    def given(self) -> object:
        """As the block gives it."""
        return self.states if self.num_nones is None else (self.states, *[None] * self.num_nones)


@dataclass(slots=True)
class RowStates:
    """States of single texts, kept for as long as the weights that made them are what they were; the first stay.

    Attributes:
        max_bytes: What they may take together.
        num_nones: As of the block's ``Output``.
        reads_alone: Whether what is computed behind the blocks takes each position alone, as a norm does: then only the
            positions that are read are kept, and a text needs no others.
        weights: Names the weights that made them, and their contents.
        is_full: Whether there was no room for a text.
        owners: Whose texts were all offered (``ScalarUpdate``).
        by_text: The states [T, H] of texts, or [num_positions, H] of what is read of them.
    """

    max_bytes: int
    num_nones: int | None = None
    reads_alone: bool = False
    num_bytes: int = 0
    weights: Hashable = None
    is_full: bool = False
    owners: set[int] = field(default_factory=set)
    by_text: dict[Tokens | Read, torch.Tensor] = field(default_factory=dict)

    def drop_if_other(self, weights: Hashable) -> None:
        """Keep nothing that other weights made."""
        if weights != self.weights:
            self.by_text.clear()
            self.owners.clear()
            self.num_bytes, self.is_full, self.weights = 0, False, weights

    def of(self, texts: Sequence[Tokens] | Sequence[Read], make: Make) -> list[torch.Tensor]:
        """The states of every text; those that are not kept are made, and kept if there is room."""
        fresh = {text: index for index, text in enumerate(texts) if text not in self.by_text}
        made: dict[Tokens | Read, torch.Tensor] = {}
        if fresh:
            for index, states in make([*fresh.values()]):
                made[texts[index]] = states.clone()  # of a batch that need not outlive it
                self._put(texts[index], made[texts[index]])
        return [made[text] if text in made else self.by_text[text] for text in texts]

    def _put(self, text: Tokens | Read, states: torch.Tensor) -> None:
        self.is_full |= self.num_bytes + states.nbytes > self.max_bytes
        if not self.is_full:  # from then on nothing: what is kept depends on what came first alone
            self.by_text[text] = states
            self.num_bytes += states.nbytes
