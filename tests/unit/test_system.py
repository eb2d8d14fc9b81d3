"""What a process may use of its machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedzo.runtime.local import _environment
from fedzo.system import default_threads, usable_cpus


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system pins no process to CPUs")
def test_only_the_cpus_that_a_process_may_run_on_count() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cpus() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert usable_cpus() == len(before)


@pytest.mark.parametrize(("said", "threads"), [("3", 3), ("4,2", 4), ("0", None), ("many", None), ("", None)])
def test_threads_are_what_openmp_is_told_or_all_cpus(
    said: str, threads: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", said)

    assert default_threads() == (threads or usable_cpus())


def test_local_clients_share_the_cpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cpus = usable_cpus()

    assert [_environment(tmp_path, num_clients=n)["OMP_NUM_THREADS"] for n in (1, cpus, 4 * cpus)] == [
        str(cpus),
        "1",
        "1",
    ]

    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert _environment(tmp_path, num_clients=4 * cpus)["OMP_NUM_THREADS"] == "5"
