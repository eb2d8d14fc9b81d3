"""What every stage between a client's rows and its tokens must do."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

from fedzo.data.files import Row
from fedzo.data.preprocess import Stage, summaries
from fedzo.data.preprocess.stage import checked
from fedzo.errors import ConfigError, PluginError
from fedzo.system import OnProgress
from fedzo.testing.conformance.bits import global_generators, must


def check_stage(make: Callable[[], Stage], rows: Sequence[Row]) -> None:
    """Check that a stage keeps the contract of ``fedzo.data.preprocess.Stage``.

    - It gives as many rows in the same order, and changes no value but that of ``column``, which keeps its type.
    - It does not change the rows that it is given.
    - The same rows of the same client give the same result, whatever it did before, and in a new stage.
    - No rows give no rows.
    - It tells of its progress in counts of at most its rows, and lets pass what is raised there.
    - Its summary holds a few finite numbers by simple names.
    - The global random generators are neither used nor needed.

    Args:
        make: Makes the stage.
        rows: Rows that differ in another column than the stage's, or their order cannot be seen; at least two.

    Raises:
        AssertionError: The first rule that does not hold, with what was seen.
    """
    must(len(rows) >= 2, f"rows must be at least two, or their order cannot be seen, got {len(rows)}")
    given = copy.deepcopy(list(rows))
    with global_generators(1):
        stage = make()
        first = _apply(stage, given, client=0)
        second = _apply(stage, given[::-1], client=1)
        _must_agree(_apply(stage, given, client=0), first, "must not depend on what the stage did before")
        must(stage.apply([], client=0, on_progress=_told(0)) == [], "no rows must give no rows")
        _must_stop(make(), copy.deepcopy(given))
    with global_generators(2):
        fresh = make()  # which meets the clients in the other order
        _must_agree(_apply(fresh, given[::-1], client=1), second, "of a new stage must be the same")
        _must_agree(_apply(fresh, given, client=0), first, "of a new stage must be the same")


def _apply(stage: Stage, rows: list[Row], *, client: int) -> list[Row]:
    before = copy.deepcopy(rows)
    given = stage.apply(rows, client=client, on_progress=_told(len(rows)))
    must(rows == before, "apply must not change the rows that it is given")
    try:
        after = copy.deepcopy(checked("stage", stage, before, given))
        summaries({"stage": stage}, client=client)
    except (ConfigError, PluginError) as error:
        raise AssertionError(str(error)) from error
    if (column := stage.column) is not None:
        for i, (old, new) in enumerate(zip(before, after, strict=True)):
            must(column in old, f"rows must have the stage's column {column!r}, row {i} has {sorted(old)}")
            kinds = type(old[column]).__name__, type(new.get(column)).__name__
            must(kinds[0] == kinds[1], f"apply must keep the type of {column!r}, {kinds[0]}; row {i} got {kinds[1]}")
    return after


class _StoppedError(Exception):
    """Nothing that a stage could expect."""


def _told(most: int) -> OnProgress:
    def told(done: int, total: int) -> None:
        must(total == most, f"on_progress must be called with all rows, {most}, got {total}")
        must(0 <= done <= total, f"on_progress must be called with rows done of {total}, got {done}")

    return told


def _must_stop(stage: Stage, rows: list[Row]) -> None:
    """A stage that tells nothing has nothing to let pass."""
    calls: list[int] = []

    def stop(done: int, total: int) -> None:
        calls.append(done)
        raise _StoppedError

    try:
        stage.apply(rows, client=0, on_progress=stop)
    except _StoppedError:
        return
    must(not calls, "apply must let pass what on_progress raises, which stops it")


def _must_agree(found: list[Row], expected: list[Row], rule: str) -> None:
    differ = [i for i, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1]]
    must(
        not differ,
        f"the result for the same rows of the same client {rule}; row {differ[:1]} of {len(expected)} first: "
        f"{[(expected[i], found[i]) for i in differ[:1]]}",
    )
