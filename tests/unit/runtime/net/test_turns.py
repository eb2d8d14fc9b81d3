"""Turns of requests: against sorting by urgency, on an event loop that goes on step by step."""

import asyncio
from contextlib import AsyncExitStack

from hypothesis import given
from hypothesis import strategies as st

from fedzo.runtime.net.turns import Turns, unless_left


async def _settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


@given(
    at_once=st.integers(1, 3),
    urgencies=st.lists(st.integers(0, 2), max_size=12),
    leaving=st.lists(st.booleans(), min_size=12, max_size=12),
)
def test_the_most_urgent_is_next_and_who_left_is_passed_over(
    at_once: int, urgencies: list[int], leaving: list[bool]
) -> None:
    async def play() -> list[int]:
        turns, order = Turns(at_once), list[int]()

        async def one(number: int, urgency: int) -> None:
            async with turns.one(urgency):
                order.append(number)

        async with AsyncExitStack() as taken:
            for _ in range(at_once):
                await taken.enter_async_context(turns.one(9))
            tasks = [asyncio.ensure_future(one(*each)) for each in enumerate(urgencies)]
            await _settle()
            assert not order
            for task, leaves in zip(tasks, leaving, strict=False):
                if leaves:
                    task.cancel()
            await _settle()
        await asyncio.gather(*tasks, return_exceptions=True)
        async with AsyncExitStack() as all_of_them:  # each turn was given back, and once
            for _ in range(at_once):
                await asyncio.wait_for(all_of_them.enter_async_context(turns.one(0)), timeout=1)
            late = asyncio.ensure_future(all_of_them.enter_async_context(turns.one(0)))
            await _settle()
            assert not late.done()
            late.cancel()
            await asyncio.gather(late, return_exceptions=True)
        return order

    stay = [(urgency, number) for number, urgency in enumerate(urgencies) if not leaving[number]]
    assert asyncio.run(play()) == [number for _, number in sorted(stay)]


def test_a_turn_that_comes_to_somebody_who_leaves_at_that_moment_goes_on() -> None:
    async def play() -> bool:
        turns = Turns(1)
        async with AsyncExitStack() as first, AsyncExitStack() as second:
            await first.enter_async_context(turns.one(0))
            waiting = asyncio.ensure_future(second.enter_async_context(turns.one(0)))
            await _settle()
            await first.aclose()  # the turn has come ...
            waiting.cancel()  # ... and who waited has not seen it yet
            await asyncio.gather(waiting, return_exceptions=True)
            async with asyncio.timeout(1), turns.one(0):
                return waiting.cancelled()

    assert asyncio.run(play())


def test_it_waits_until_it_has_come_or_the_other_has_left() -> None:
    async def play() -> list[bool]:
        never, now = asyncio.Event(), asyncio.Event()
        now.set()

        async def wait(event: asyncio.Event) -> None:
            await event.wait()

        return [await unless_left(wait(now), lambda: wait(never)), await unless_left(wait(never), lambda: wait(now))]

    assert asyncio.run(play()) == [True, False]
