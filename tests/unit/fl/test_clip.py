"""The relative clip against medians worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from fedzo.errors import RunFolderError
from fedzo.fl.clip import NO_BOUND, announced_bound, clip
from fedzo.records.decode import decode_json, to_json
from fedzo.records.log import ScalarAuditLine
from fedzo.testing.logs import audit_line
from fedzo.zo.directions import SHARED
from fedzo.zo.log import ScalarRecord


def line(*clients: list[list[float]], dropped: list[list[bool]] | None = None) -> ScalarAuditLine:
    return audit_line(dict(enumerate(clients)), dropped=None if dropped is None else dict.fromkeys(range(9), dropped))


def bound_of(audit: list[ScalarAuditLine], *, factor: float, rounds: int, lrs: Sequence[float] = ()) -> float:
    c = np.zeros((1, 1, 1), np.float32)
    records = [
        ScalarRecord(round=number, lr=lr, owners=(SHARED,), coefficients=c)
        for number, lr in enumerate(lrs or [0.5] * len(audit))
    ]
    return announced_bound(audit, records, factor=factor, rounds=rounds)


def test_the_bound_is_a_multiple_of_the_median_over_clients_steps_and_probes() -> None:
    audit = [line([[1.0, -2.0], [3.0, 4.0]], [[-5.0, 6.0], [7.0, -80.0]])]  # |g| 1 2 3 4 5 6 7 80: median 4.5

    assert bound_of(audit, factor=3.0, rounds=10) == 13.5


def test_of_a_round_count_the_steps_that_all_of_its_clients_took() -> None:
    """Who is stopped after a step has the weight of the others: four of twelve cannot decide the median."""
    stopped, honest, hostile = [[1.0]], [[1.0]] * 10, [[100.0]] * 10
    audit = [line(*[stopped] * 5, *[honest] * 3, *[hostile] * 4)]

    assert bound_of(audit, factor=100.0, rounds=1) == 100.0
    assert bound_of([*audit, line([[3.0], [5.0]])], factor=1.0, rounds=2) == 1.0  # other rounds count theirs


def test_only_the_last_rounds_count() -> None:
    audit = [line([[100.0]]), line([[1.0]]), line([[3.0]])]

    assert [bound_of(audit, factor=1.0, rounds=rounds) for rounds in (1, 2, 3, 9)] == [3.0, 2.0, 3.0, 3.0]


def test_dropped_probes_measured_nothing() -> None:
    audit = [line([[0.0, 0.0, 0.0, 8.0]], dropped=[[True, True, True, False]])]

    assert bound_of(audit, factor=1.0, rounds=1) == 8.0


@pytest.mark.parametrize(
    "audit", [[], [line()], [line([[0.0]], dropped=[[True]])], [line([[0.0, 0.0, 5.0]])]], ids=range(4)
)
def test_there_is_no_bound_without_a_history_that_says_something(audit: list[ScalarAuditLine]) -> None:
    assert bound_of(audit, factor=2.0, rounds=3) == NO_BOUND


def test_a_round_that_only_measured_is_left_out() -> None:
    audit = [line([[0.1], [0.1], [0.1]]), line([[4.0]]), line([[6.0]])]

    assert bound_of(audit, factor=1.0, rounds=3, lrs=[0.0, 0.5, 0.5]) == 5.0
    assert bound_of(audit[:1], factor=1.0, rounds=3, lrs=[0.0]) == NO_BOUND


def test_factor_0_is_off() -> None:
    assert bound_of([line([[1.0]])], factor=0.0, rounds=3) == NO_BOUND


def test_it_is_a_float32_value_the_same_after_the_log_was_read_back_and_never_infinite() -> None:
    audit = [line([[float(np.float32(0.1)), float(np.float32(0.3))]])]

    bound = bound_of(audit, factor=1.1, rounds=1)

    assert bound == float(np.float32(1.1 * (float(np.float32(0.1)) + float(np.float32(0.3))) / 2))
    assert bound == bound_of(
        [decode_json(ScalarAuditLine, to_json(each), where="audit", error=RunFolderError) for each in audit],
        factor=1.1,
        rounds=1,
    )
    assert bound_of([line([[3e38]])], factor=10.0, rounds=1) == float(np.finfo(np.float32).max)


def test_clients_clip_both_sides_and_change_nothing_else() -> None:
    g = np.array([-7, -1.5, 0, 1.5, 7], np.float32)

    clipped = clip(g, 1.5)

    assert clipped.tolist() == [-1.5, -1.5, 0, 1.5, 1.5]
    assert clipped.dtype == np.float32
    assert clip(g, NO_BOUND).tobytes() == g.tobytes()


def test_what_a_client_clips_is_never_beyond_the_bound_it_was_given() -> None:
    bound = bound_of([line([[0.1]])], factor=1.7, rounds=1)

    assert float(clip(np.array([9.0], np.float32), bound)[0]) <= bound
