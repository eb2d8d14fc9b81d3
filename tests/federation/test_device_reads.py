"""How often a round reads from the device. Each read waits for it, so there is none for every tensor or client.

Counted on a CPU, where a read costs nothing: calls of torch that would wait for a GPU, and copies to it that are not
made by ``on_device``. What transformers does in a forward is left out: on a GPU it is told that no row is packed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from fedzo.models import forwards, scoring
from fedzo.sketch import table_space
from fedzo.zo.spaces import own_weights

Run = Callable[..., Path]
Counts = Callable[..., tuple[int, ...]]
WAITING = {"cpu", "item", "tolist", "__bool__", "__float__", "__int__", "__index__", "equal", "nonzero", "unique"}
NOT_SCORED = ["evaluation.every_rounds=0", "evaluation.federated_every_rounds=-1"]
CHECKS = 2
"""Of theta, where a round finds it and where it leaves it."""


class Reads(TorchFunctionMode):
    """Counts reads, and forwards, which each read their losses, and copies that wait for what the device has to do."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.reads = self.forwards = self.copies = 0
        self._in_model = False
        self._of_host: dict[int, weakref.ref[torch.Tensor]] = {}
        own = torch.from_numpy
        for module in (forwards, scoring, table_space, own_weights):
            monkeypatch.setattr(module, "on_device", lambda numbers, device: own(numbers))
        monkeypatch.setattr(torch, "from_numpy", lambda array: self._seen(own(array)))
        for name in ("hidden_at", "own_logits_at"):
            monkeypatch.setattr(forwards, name, self._counted(getattr(forwards, name)))

    def _seen(self, of_host: torch.Tensor) -> torch.Tensor:
        self._of_host[id(of_host)] = weakref.ref(of_host)
        return of_host

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
        if not self._in_model and self._waits_to_copy(name, args, kwargs):
            self.copies += 1
        return func(*args, **kwargs)

    def _waits_to_copy(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if name in ("tensor", "as_tensor"):
            return kwargs.get("device") is not None
        if name != "to" or not any(isinstance(each, torch.device) for each in (*args[1:], *kwargs.values())):
            return False
        known = self._of_host.get(id(args[0]))
        return known is not None and known() is args[0] and not kwargs.get("non_blocking", False)


@pytest.fixture
def reads_of_a_round(run: Run, monkeypatch: pytest.MonkeyPatch) -> Counts:
    """Reads, forwards and copies of a run's fourth round, by the difference of a run of four and one of three."""

    def count(*settings: str) -> tuple[int, ...]:
        counts = []
        for rounds in (3, 4):
            with monkeypatch.context() as patch, Reads(patch) as reads:
                run(*NOT_SCORED, *settings, f"fl.rounds={rounds}")
            counts.append((reads.reads, reads.forwards, reads.copies))
        return tuple(after - before for before, after in zip(*counts, strict=True))

    return count


@pytest.mark.parametrize("trainer", ["mezo", "meerkat", "lora", "tables"])
@pytest.mark.parametrize("num_clients", [2, 6])
def test_a_round_of_joint_forwards_reads_their_losses_and_two_checks(
    reads_of_a_round: Counts, trainer: str, num_clients: int
) -> None:
    reads, forwards, copies = reads_of_a_round(
        f"trainer={trainer}", f"fl.num_clients={num_clients}", "runtime.batch_clients=true"
    )
    grad_ip = trainer in ("meerkat", "tables")  # the norm of its gradient

    assert 2 <= forwards < 2 * num_clients
    assert reads == forwards + CHECKS + grad_ip
    assert copies == 0


@pytest.mark.parametrize("steps", [1, 3])
def test_clients_that_step_alone_read_their_losses_and_where_they_end(reads_of_a_round: Counts, steps: int) -> None:
    num_clients = 3
    reads, forwards, copies = reads_of_a_round(
        "trainer=mezo", f"fl.num_clients={num_clients}", f"fl.local_steps={steps}"
    )

    assert forwards == 2 * steps * num_clients
    assert reads == forwards + CHECKS + (num_clients if steps > 1 else 0)
    assert copies == 0


@pytest.mark.parametrize(
    ("trainer", "steps"), [("mezo", 1), ("meerkat", 1), ("meerkat", 3), ("tables", 1), ("tables", 3)]
)
@pytest.mark.parametrize("num_clients", [2, 6])
def test_joint_forwards_of_one_token_wait_for_no_copy_and_later_steps_for_that_of_the_start(
    reads_of_a_round: Counts, trainer: str, steps: int, num_clients: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_weights, "_HostProducts", own_weights._DeviceProducts)
    settings = (f"trainer={trainer}", f"fl.num_clients={num_clients}", f"fl.local_steps={steps}")
    _, forwards, copies = reads_of_a_round(*settings, "task.candidates=[b,g]", "runtime.batch_clients=true")

    assert forwards >= 2 * steps
    assert copies == (steps > 1)
