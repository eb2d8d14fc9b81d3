"""How often a round reads from the device. Each read waits for it, so there is none for every tensor or client.

Counted on a CPU, where a read costs nothing: calls of torch that would wait for a GPU, but for what transformers does
in a forward (it looks once whether rows are packed).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from fedzo.models import forwards

Run = Callable[..., Path]
WAITING = {"cpu", "item", "tolist", "__bool__", "__float__", "__int__", "__index__", "equal", "nonzero", "unique"}
NOT_SCORED = ["evaluation.every_rounds=0", "evaluation.federated_every_rounds=-1"]
CHECKS = 2
"""Of theta, where a round finds it and where it leaves it."""


class Reads(TorchFunctionMode):
    """Counts reads, and forwards, which each read their losses."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.reads = self.forwards = 0
        self._in_model = False
        for name in ("hidden_at", "own_logits_at"):
            monkeypatch.setattr(forwards, name, self._counted(getattr(forwards, name)))

    def _counted(self, at: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            self.forwards += 1
            self._in_model = True
            try:
                return at(*args, **kwargs)
            finally:
                self._in_model = False

        return forward

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        by_mask = name in ("__getitem__", "__setitem__") and getattr(args[1], "dtype", None) == torch.bool
        to_host = name == "to" and "cpu" in [each for each in (*args[1:], *kwargs.values()) if isinstance(each, str)]
        if not self._in_model and (name in WAITING or by_mask or to_host):
            self.reads += 1
        return func(*args, **kwargs)


@pytest.fixture
def reads_of_a_round(run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, int]]:
    """Reads and forwards of a run's fourth round, by the difference of a run of four and one of three."""

    def count(*settings: str) -> tuple[int, int]:
        counts = []
        for rounds in (3, 4):
            with monkeypatch.context() as patch, Reads(patch) as reads:
                run(*NOT_SCORED, *settings, f"fl.rounds={rounds}")
            counts.append((reads.reads, reads.forwards))
        return counts[1][0] - counts[0][0], counts[1][1] - counts[0][1]

    return count


@pytest.mark.parametrize("trainer", ["mezo", "meerkat", "lora", "tables"])
@pytest.mark.parametrize("num_clients", [2, 6])
def test_a_round_of_joint_forwards_reads_their_losses_and_two_checks(
    reads_of_a_round: Callable[..., tuple[int, int]], trainer: str, num_clients: int
) -> None:
    reads, forwards = reads_of_a_round(
        f"trainer={trainer}", f"fl.num_clients={num_clients}", "runtime.batch_clients=true"
    )
    grad_ip = trainer in ("meerkat", "tables")  # the norm of its gradient

    assert 2 <= forwards < 2 * num_clients
    assert reads == forwards + CHECKS + grad_ip


@pytest.mark.parametrize("steps", [1, 3])
def test_clients_that_step_alone_read_their_losses_and_where_they_end(
    reads_of_a_round: Callable[..., tuple[int, int]], steps: int
) -> None:
    num_clients = 3
    reads, forwards = reads_of_a_round("trainer=mezo", f"fl.num_clients={num_clients}", f"fl.local_steps={steps}")

    assert forwards == 2 * steps * num_clients
    assert reads == forwards + CHECKS + (num_clients if steps > 1 else 0)
