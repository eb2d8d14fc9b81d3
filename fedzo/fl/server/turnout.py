"""Whom a round asks, in which order, and how long it waits where too few clients are there."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Container, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedzo.fl.exchange import Grid
from fedzo.fl.server.client_registry import ClientRegistry
from fedzo.zo.directions import PURPOSE_SAMPLING, permutation, stream_key

if TYPE_CHECKING:
    from fedzo.config.schema import RunSettings

PAUSE_S = 0.1


@dataclass(kw_only=True, slots=True)
class Turnout:
    """The clients of each round.

    Attributes:
        grid: Flower's grid.
        client_registry: Says which clients can be asked.
        config: How many clients a round asks, how many replies it needs, and how long it waits for clients.
        joined: Called with each client that came as a new node.
        while_waiting: Called again and again while too few clients are there.
    """

    grid: Grid
    client_registry: ClientRegistry
    config: RunSettings
    joined: Callable[[int], None]
    while_waiting: Callable[[], None] = lambda: None
    _left_s: float = 0.0  # that the present round may still wait

    def begin(self) -> None:
        """Before a round: take up who has registered; where too few clients can be asked, wait for more."""
        self._left_s = self.config.strategy.startup_s
        self._let_in(self.config.strategy.min_replies, spent=set(), results=())

    def groups(
        self, round: int, *, everyone: bool, results: Collection[int], refused: dict[int, str]
    ) -> Iterator[list[int]]:
        """The clients to ask, group after group, for as long as the caller has too few replies.

        First come all clients, or the sample of the round and then others in the place of those that fail. Clients
        that did not answer before are asked when their time has come. Where that is not enough, whoever else is there
        is asked, and whoever comes back: all may have left at once, as where a line is down.

        Args:
            round: Its number.
            everyone: Whether the round needs all clients, however many a round samples.
            results: Clients that gave a usable reply, as the caller adds them.
            refused: Why clients did not, as the caller adds them; those that rest are added here.
        """
        registry, strategy, num_clients = self.client_registry, self.config.strategy, self.config.fl.num_clients
        size = strategy.clients_per_round or num_clients
        resting, asked = registry.resting(round), set[int]()
        if everyone or size == num_clients:
            size = num_clients
            refused |= resting
            first = iter([[client for client in range(size) if client not in resting]])
        else:
            connected = {client for client in registry.nodes if client not in resting}
            first = self._samples(round, connected, num_clients, size)
        for group in filter(None, first):
            yield group
            asked.update(group)
        spent = {client for client in asked if client in registry.nodes} | {*results}  # the others are not here
        while num_clients - len(spent) >= (missing := strategy.min_replies - len(results)):
            self._let_in(missing, spent=spent, results=results)
            able = registry.nodes.keys() - spent
            if not able:
                return
            yield from self._samples(round, able, len(able), size)
            resting = registry.resting(round)
            spent.update(client for client in able if client in registry.nodes or client in resting)

    def _samples(self, round: int, connected: Container[int], count: int, size: int) -> Iterator[list[int]]:
        """The first ``count`` clients of the round's order, ``size`` at a time; those that are connected come first."""
        num_clients = self.config.fl.num_clients
        order = sampling_order(run_seed=self.config.seed, round=round, num_clients=num_clients, connected=connected)
        del order[count:]
        yield from (sorted(order[first : first + size]) for first in range(0, count, size))

    def _let_in(self, fewest: int, *, spent: set[int], results: Collection[int]) -> None:
        """Take up who has registered; wait until so many can be asked that are not ``spent``, or time is up.

        Whoever comes as a new node is spent no longer, unless it has answered.
        """
        ends = time.monotonic() + self._left_s
        while True:
            for client in self.client_registry.refresh(self.grid):
                self.joined(client)
                if client not in results:
                    spent.discard(client)
            if len(self.client_registry.nodes.keys() - spent) >= fewest or time.monotonic() >= ends:
                break
            self.while_waiting()
            time.sleep(PAUSE_S)
        self._left_s = max(0.0, ends - time.monotonic())


def sampling_order(*, run_seed: int, round: int, num_clients: int, connected: Container[int]) -> list[int]:
    """All clients in the order in which a round that needs only some takes them; those that are connected come first.

    While all are connected it is a function of run seed and round alone.
    """
    order: list[int] = permutation(stream_key(run_seed, round=round), num_clients, purpose=PURPOSE_SAMPLING).tolist()
    away = [client for client in order if client not in connected]
    return [client for client in order if client in connected] + away
