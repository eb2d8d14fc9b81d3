"""How often a round reads from the device. Each read waits for it, so there is none for every tensor or client.

Counted on a CPU, where a read costs nothing: calls of torch that would wait for a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.overrides import TorchFunctionMode

Run = Callable[..., Path]
WAITING = {"cpu", "item", "tolist", "__bool__", "__float__", "__int__", "equal", "nonzero", "masked_select"}
NOT_SCORED = ["evaluation.every_rounds=0", "evaluation.federated_every_rounds=-1"]
ONE_FORWARD = "model.tokens_per_batch=8192"
"""For the rows of all clients."""
SIDES = 2
"""Of a probe, each a forward. It reads its losses, and transformers looks whether its rows are packed."""


class Reads(TorchFunctionMode):
    """Counts calls by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if (name := getattr(func, "__name__", "")) in WAITING:
            self.count[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def reads_of_a_round(run: Run) -> Callable[..., Counter[str]]:
    """Of a run's fourth round, by the difference of a run of four and one of three."""

    def count(*settings: str) -> Counter[str]:
        counts = []
        for rounds in (3, 4):
            with Reads() as reads:
                run(*NOT_SCORED, ONE_FORWARD, *settings, f"fl.rounds={rounds}")
            counts.append(reads.count)
        return counts[1] - counts[0]

    return count


@pytest.mark.parametrize("trainer", ["mezo", "meerkat", "lora"])
@pytest.mark.parametrize("num_clients", [2, 6])
def test_a_round_of_joint_forwards_reads_their_losses_and_one_check(
    reads_of_a_round: Callable[..., Counter[str]], trainer: str, num_clients: int
) -> None:
    reads = reads_of_a_round(f"trainer={trainer}", f"fl.num_clients={num_clients}", "runtime.batch_clients=true")
    grad_ip = Counter({"__float__": 1} if trainer == "meerkat" else {})  # the norm of the mask's gradient

    forwards = reads["__bool__"]
    assert forwards <= 2 * SIDES  # rows of unequal lengths may take two
    assert reads == Counter({"cpu": forwards + 1, "__bool__": forwards}) + grad_ip


@pytest.mark.parametrize("steps", [1, 3])
def test_clients_that_step_alone_read_their_losses_and_where_they_end(
    reads_of_a_round: Callable[..., Counter[str]], steps: int
) -> None:
    num_clients = 3
    reads = reads_of_a_round("trainer=mezo", f"fl.num_clients={num_clients}", f"fl.local_steps={steps}")

    ends = num_clients if steps > 1 else 0
    assert reads == Counter({"cpu": SIDES * steps * num_clients + ends + 1, "__bool__": SIDES * steps * num_clients})
