"""Time and memory of a GPU's work: what counts is what the card does and holds, whatever the host is at."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedzo.bench.measure import measure_peak_bytes, medians_on_gpu
from fedzo.models.captured import CudaGraphs

MIB = 1 << 20
CUDA = torch.device("cuda", 0)


class Card:
    """A stream that does what the host has queued, one after another, and both clocks, in seconds."""

    def __init__(self) -> None:
        self.host = self.free = 0.0

    def start(self, seconds: float, *, host: float) -> None:
        """Queue work of so many seconds, which takes the host so long."""
        self.host += host
        self.free = max(self.free, self.host) + seconds

    def event(self, *, enable_timing: bool) -> Event:
        assert enable_timing
        return Event(self)


class Event:
    """As ``torch.cuda.Event``: when the card comes by."""

    def __init__(self, card: Card) -> None:
        self._card = card
        self._at = 0.0

    def record(self) -> None:
        self._at = max(self._card.host, self._card.free)

    def synchronize(self) -> None:
        self._card.host = max(self._card.host, self._at)

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end._at - self._at)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    card = Card()
    monkeypatch.setattr(torch.cuda, "Event", card.event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: card.start(cycles / 1.98e9, host=1e-5))
    monkeypatch.setattr("fedzo.bench.measure.time", SimpleNamespace(perf_counter=lambda: card.host))
    return card


@pytest.mark.parametrize("kernel", [6e-6, 1e-3, 0.1], ids=lambda seconds: f"kernels of {seconds} s")
def test_short_kernels_are_timed_by_the_card_and_not_by_the_host_that_starts_them(card: Card, kernel: float) -> None:
    begun: list[float] = []

    def work(seconds: float) -> None:
        compiled = 0.0 if len(begun) > 3 else 30.0
        begun.append(card.host)
        card.start(seconds, host=4e-5 + compiled)

    found = medians_on_gpu({"one": partial(work, kernel), "two": partial(work, 2 * kernel)}, repeats=5, times=4)

    assert found == pytest.approx({"one": 1e3 * kernel, "two": 2e3 * kernel})
    assert begun[-1] - begun[8] < 5 * 8 * (2 * kernel + 1e-3), "the card waited for longer than starts take"


def test_the_peak_of_replays_counts_what_their_graphs_keep_between_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    segments = [
        {"device": 0, "segment_pool_id": (0, 0), "total_size": 100, "allocated_size": 60},  # which eager work may take
        {"device": 0, "segment_pool_id": (0, 3), "total_size": 900, "allocated_size": 100},
        {"device": 0, "segment_pool_id": (2, 0), "total_size": 50, "allocated_size": 50},
        {"device": 0, "segment_pool_id": (2, 0), "total_size": 7, "allocated_size": 0},
        {"device": 1, "segment_pool_id": (0, 3), "total_size": 4000, "allocated_size": 0},
    ]
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append("reset"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("finished"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 10_000)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    found = [measure_peak_bytes(lambda: calls.append("work"), device) for device in (CUDA, torch.device("cuda"))]

    assert found == [10_807, 10_807]
    assert calls == ["reset", "work", "finished"] * 2


@pytest.mark.gpu
def test_a_host_that_is_slower_than_the_card_does_not_count() -> None:
    small = torch.zeros(8, device="cuda")

    def work() -> Any:
        time.sleep(1e-3)
        return small.add_(1)

    assert medians_on_gpu({"add": work})["add"] < 0.2


@pytest.mark.gpu
def test_the_peak_of_a_replay_has_what_lies_between_its_kernels() -> None:
    given = torch.ones(256, 1, device="cuda")
    graph = CudaGraphs(CUDA)()

    def large() -> torch.Tensor:
        return given.expand(256, MIB // 4).clone().sum(dim=1)

    large()
    bare = measure_peak_bytes(lambda: None, CUDA)
    graph.capture(large)
    works: list[Callable[[], object]] = [graph.replay, large]
    replayed, eager = (measure_peak_bytes(work, CUDA) for work in works)

    assert bare is not None
    assert replayed is not None
    assert eager is not None
    assert replayed - bare >= 256 * MIB
    assert eager - replayed >= 255 * MIB, "the graph keeps its own beside what eager work takes"
