"""What a process may use of its machine."""

from __future__ import annotations

import os

import pytest

from fedzo.environment import usable_cpus


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system pins no process to CPUs")
def test_only_the_cpus_that_a_process_may_run_on_count() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cpus() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert usable_cpus() == len(before)
