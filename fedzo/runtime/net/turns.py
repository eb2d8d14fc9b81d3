"""How requests wait: for their turn at something that can do a few things at once, or until there is an answer."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any


class Turns:
    """Of those who wait the most urgent is next, and of these who came first.

    Args:
        at_once: How many have their turn at the same time.
    """

    def __init__(self, at_once: int) -> None:
        self._free = at_once
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._numbers = itertools.count()

    @asynccontextmanager
    async def one(self, urgency: int) -> AsyncIterator[None]:
        """A turn, once it is there. A smaller number is more urgent."""
        if self._free:
            self._free -= 1
        else:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            heapq.heappush(self._waiting, (urgency, next(self._numbers), turn))
            try:
                await turn
            except asyncio.CancelledError:
                if not turn.cancelled():  # it came, and nobody is there to take it
                    self._next()
                raise
        try:
            yield
        finally:
            self._next()

    def _next(self) -> None:
        while self._waiting:
            turn = heapq.heappop(self._waiting)[2]
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1


class Arrivals:
    """What has come since somebody asked for it: of who has never asked it is not known that nothing has."""

    def __init__(self) -> None:
        self._asked: dict[int, str] = {}  # who, by address, and nothing has come since
        self._came = Counter[int]()
        self._bells: dict[str, asyncio.Event] = {}

    def came(self, address: int) -> None:
        """Something has come to this address."""
        self._came[address] += 1
        if name := self._asked.get(address):
            self.forget(name, address)

    def forget(self, name: str, address: int) -> None:
        """Something may have come for this name, which waits no longer."""
        if self._asked.get(address) == name:
            del self._asked[address]
        self._ring(name)

    def end(self) -> None:
        """Nobody waits any longer."""
        self._asked.clear()
        for name in [*self._bells]:
            self._ring(name)

    def bell(self, name: str, address: int) -> asyncio.Event | None:
        """What is set when something comes; None unless this name was the last to ask, and nothing has come since.

        One of a name waits: with a second bell the first is set.
        """
        if self._asked.get(address) != name:
            return None
        self._ring(name)
        self._bells[name] = bell = asyncio.Event()
        return bell

    def _ring(self, name: str) -> None:
        if bell := self._bells.pop(name, None):
            bell.set()

    def count(self, address: int) -> int:
        """How often something has come to this address."""
        return self._came[address]

    def ask(self, name: str, address: int, *, since: int) -> None:
        """Note that somebody has asked, unless something has come since: ``count`` was ``since`` before he did."""
        if self._came[address] == since:
            self._asked[address] = name


async def unless_left(wait: Coroutine[Any, Any, object], leave: Callable[[], Awaitable[None]]) -> bool:
    """Wait, but no longer than until ``leave`` returns; whether it has not."""
    waiting, leaving = asyncio.ensure_future(wait), asyncio.ensure_future(leave())
    try:
        await asyncio.wait((waiting, leaving), return_when=asyncio.FIRST_COMPLETED)
        return not leaving.done()
    finally:
        waiting.cancel()
        leaving.cancel()
        await asyncio.gather(waiting, leaving, return_exceptions=True)
