"""The start of a run, part by part, and the jobs of a sweep: that the parts are there, and what is told of a device."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from fedzo.config.load import load
from fedzo.config.sweep import plan_sweep
from fedzo.testing.tiny_models import save_tiny_model

FOLDER = Path(__file__).parents[3] / "experiments" / "start"
LATE = ["aiohttp", "datasets", "flwr_datasets", "matplotlib", "pandas"]
"""What a run without a report, whose rows no partitioner of Flower's deals, has no use for."""


@pytest.fixture(autouse=True)
def scripts_find_what_they_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.fixture
def start(script: Callable[[Path], ModuleType]) -> Any:
    return script(FOLDER / "run.py")


@pytest.fixture
def parts(script: Callable[[Path], ModuleType]) -> Any:
    return script(FOLDER / "parts.py")


@pytest.fixture
def sweep(script: Callable[[Path], ModuleType]) -> Any:
    return script(FOLDER / "sweep.py")


@pytest.fixture
def tiny(tmp_path: Path) -> list[str]:
    """Words of a short run without scores, whose mask is drawn."""
    model = save_tiny_model(tmp_path / "model")
    unscored = ["evaluation.central=false", "evaluation.federated_every_rounds=-1"]
    return ["experiment=tiny", "trainer.selector=random", f"model.name={model}", "fl.rounds=1", "device=cpu", *unscored]


def test_every_part_has_functions_that_are_there(parts: Any) -> None:
    places = [place for each in parts.PARTS.values() for place in each]

    for place in (*places, parts.FIRST_ROUND):
        module, _, path = place.partition(":")
        found: Any = importlib.import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
        assert callable(found), place
    assert len(places) == len(set(places))


def test_what_one_part_takes_within_another_is_its_own(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, seconds, within = [0.0], dict[str, float](), list[float]()
    monkeypatch.setattr(parts, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def wait(spent: float) -> None:
        clock[0] += spent

    inner = parts.timed(wait, "inner", seconds, within)

    def both(own: float) -> None:
        wait(own)
        inner(2.0)
        inner(3.0)

    outer = parts.timed(both, "outer", seconds, within)
    outer(10.0)
    inner(1.0)

    assert seconds == {"inner": 6.0, "outer": 10.0}
    assert within == []


@pytest.mark.slow
def test_a_start_has_all_parts_and_a_rest(start: Any, parts: Any, tiny: list[str], tmp_path: Path) -> None:
    found = start.seconds_by_part(tiny, tmp_path / "run")

    assert set(found) == {*parts.PARTS, parts.IMPORTS, "all else"}
    assert min(found.values()) > -1e-6
    assert found["the model, loaded"] > 0


@pytest.mark.slow
def test_a_run_imports_no_library_that_it_has_no_use_for(tiny: list[str], tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from fedzo.cli import main\n"
        "assert main(sys.argv[1:]) == 0\n"
        f"print([name for name in {LATE} if name in sys.modules])\n"
    )
    command = [sys.executable, "-c", code, "train", *tiny, f"hydra.run.dir={tmp_path / 'run'}"]

    done = subprocess.run(command, capture_output=True, text=True, check=True)

    assert done.stdout.splitlines()[-1] == "[]"


def result(*, start: float, load: float) -> Any:
    parts = [{"rows": 0.5, "all else": 1.0}, {"rows": 0.75, "all else": 2.0}, {"rows": 0.25, "all else": 3.0}]
    imports = [{"torch": 2.0, "numba": 1.0}, {"torch": 4.0}, {"torch": 3.0, "numba": 3.0}]
    return {
        "starts": [start, start + 1, start + 2],
        "loads": [load, load, load + 4],
        "parts": parts,
        "imports": imports,
        "environment": {"threads": 1},
    }


def test_rows_are_medians_of_starts_and_name_a_card(start: Any) -> None:
    claims = start.gather({"cpu": result(start=12.0, load=2.0), "NVIDIA H200": result(start=7.0, load=2.0)}).rows

    told = {row["claim"]: (row["value"], row["holds"]) for row in claims}
    assert told[start.WHAT] == (13.0, True)
    assert told[start.REST] == (10.0, False)  # of 10, 11 and 8
    assert told[f"NVIDIA H200: {start.REST}"] == (5.0, True)
    assert told["the start, rows"] == (0.5, True)
    assert told["the start, all else"] == (2.0, True)
    assert told["imports, all"] == (4.0, True)
    assert told["imports, modules of numba"] == (1.0, True)
    assert [row for row in claims if row["value"] is None] == []


def test_before_there_is_a_card_its_target_is_told(start: Any) -> None:
    *_, last = start.gather({"cpu": result(start=12.0, load=2.0)}).rows

    assert last["claim"] == f"on a GPU: {start.REST}"
    assert (last["value"], last["holds"], last["target"]) == (None, None, 6.0)


# --- jobs of a sweep --------------------------------------------------------------------------------------------------


JOBS = {"alike": 11, "jobs": 12, "environment": {"threads": 1}}


def test_a_sweep_and_the_commands_beside_it_are_the_same_runs(
    sweep: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(sweep, "fedzo", lambda *words: calls.append(words))

    for way in (sweep.in_one_process, sweep.as_commands):
        way(["partition=iid", "fl.rounds=1"], tmp_path)

    (train, flag, *jobs), *commands = calls
    planned = plan_sweep(jobs)
    assert (train, flag, planned.folder) == ("train", "-m", tmp_path)
    assert [config.seed for config in planned.configs] == [0, 1, 2, 3]
    assert [load(words).seed for _, *words in commands] == [0, 1, 2, 3]
    assert [words[-1] for words in commands] == [f"hydra.run.dir={tmp_path / f'job{number}'}" for number in range(4)]


def test_jobs_a_minute_are_told_with_their_range_and_beside_those_of_commands(sweep: Any) -> None:
    seconds = {sweep.ONE: [20.0, 24.0, 30.0], sweep.COMMANDS: [40.0, 36.0, 45.0], sweep.TWO: [24.0, 40.0, 48.0]}
    head = f"NVIDIA H200: {sweep.WHAT}, "

    rows = sweep.gather({"NVIDIA H200": {"seconds": seconds, **JOBS}}).rows

    told = {row["claim"].removeprefix(head): (row["value"], row["unit"], row["holds"]) for row in rows}
    assert told == {
        "in one process: jobs a minute": (10.0, "(8 to 12)", True),
        "as commands, one after another: jobs a minute": (6.0, "(5.333 to 6.667)", True),
        "in two processes: jobs a minute": (6.0, "(5 to 10)", True),
        "in one process / as commands, one after another: jobs a minute": (1.5, "ratio (1.5 to 2)", True),
        "in two processes / as commands, one after another: jobs a minute": (0.9375, "ratio (0.9 to 1.667)", True),
        "in one process: logs that are those of the commands, byte for byte": (0.9167, "share", False),
    }


def test_before_jobs_ran_on_a_card_their_target_is_told(sweep: Any) -> None:
    seconds = {sweep.ONE: [20.0], sweep.COMMANDS: [10.0]}

    *rows, last = sweep.gather({"cpu": {"seconds": seconds, **JOBS}}).rows

    assert last["claim"].startswith(f"on a GPU: {sweep.WHAT}, in one process / ")
    assert (last["value"], last["holds"], last["target"], last["within"]) == (None, None, 1.0, ">=")
    (slower,) = [row for row in rows if " / " in row["claim"]]
    assert (slower["value"], slower["unit"], slower["holds"]) == (0.5, "ratio", False)
