"""The committed claims are what their scripts make of the committed results, and say what they can be checked by."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedzo.bench.claims import ran_with
from fedzo.config.load import load
from fedzo.config.travel import to_json
from fedzo.models.config import BaseConfig

FOLDER = Path(__file__).parents[3] / "experiments"
FILES = sorted([*FOLDER.glob("*/claims.json"), FOLDER / "bench" / "roofline.json"])
ROWS = [row for file in FILES for row in json.loads(file.read_text())]


def read(name: str) -> Any:
    return json.loads((FOLDER / name).read_text())


def each_case(made: Any) -> list[Any]:
    return [row for name, case in made.CASES.items() for row in made.rows_of(name, case, made.result_of(name))]


MADE: dict[str, Callable[[Any], Any]] = {
    "bench/run.py": lambda made: [row for case in made.CASES.items() for row in made.gather(*case)],
    "clients/run.py": lambda made: made.gather(read("clients/results.json")).rows,
    "gpu/run.py": each_case,
    "lower_layers/accuracy.py": lambda made: made.gather(made.known()),
    "lower_layers/step.py": lambda made: made.gather(read("lower_layers/step.json")).rows,
    "network/hostile.py": lambda made: made.gather(read("network/hostile.json")).rows,
    "quickstart/run.py": lambda made: made.gather(read("quickstart/results.json")).rows,
    "spallm/accuracy.py": lambda made: made.write_claims(),
    "spallm/gpu.py": lambda made: made.gather(made.known()).rows,
    "spallm/quality.py": lambda made: made.write_claims(read("spallm/quality.json")),
    "start/run.py": lambda made: made.gather(read("start/results.json")).rows,
    "start/sweep.py": lambda made: made.gather(read("start/sweep.json")).rows,
    "vpcs/simulate.py": lambda made: made.claims(read("vpcs/simulation.json")).rows,
}
"""How each script makes its rows of what it has kept; one that gives none has written them beside itself."""


@pytest.mark.parametrize("name", MADE)
def test_what_is_committed_is_made_of_the_results(
    name: str, script: Callable[[Path], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str((FOLDER / name).parent))  # as for any script, which may import others
    made = script(FOLDER / name)
    if name != "bench/run.py":  # which reads its results there
        monkeypatch.setattr(made, "HERE", tmp_path)

    rows = MADE[name](made) or json.loads((tmp_path / "claims.json").read_text())

    committed = [row for row in ROWS if row["command"].split()[1] == f"experiments/{name}"]
    if name == "vpcs/simulate.py":  # which keeps no environment: it is run whole each time
        rows, committed = ([{**row, "environment": {}} for row in each] for each in (rows, committed))
    assert json.loads(json.dumps(rows)) == committed


def test_what_holds_follows_from_value_and_target() -> None:
    def holds(value: float | None, target: float | None, within: str | float | None) -> bool | None:
        if value is None:
            return None
        if target is None:
            return within is None
        if isinstance(within, str):
            return {"<=": value <= target, ">=": value >= target}[within]
        return target - within <= value <= target + within  # type: ignore[operator]

    wrong = [row["claim"] for row in ROWS if row["holds"] != holds(row["value"], row["target"], row["within"])]

    assert len(ROWS) > 900
    assert wrong == []


def test_a_row_without_a_value_was_measured_with_nothing() -> None:
    told = [row for row in ROWS if row["value"] is None]

    assert all(row["environment"] == {} for row in told)
    assert [row["claim"] for row in ROWS if row["environment"] == {} and row not in told] == []


def test_a_commit_has_the_script_whose_figures_name_it() -> None:
    named = [(row["environment"].get("git_commit"), row["command"].split()[1]) for row in ROWS]
    pairs = {(one, made_by) for told, made_by in named for one in (told if isinstance(told, list) else [told]) if one}

    def missing(objects: list[str]) -> set[str]:
        found = subprocess.run(
            ["git", "-C", str(FOLDER), "cat-file", "--batch-check"],
            input="\n".join(objects) + "\n",
            capture_output=True,
            text=True,
            check=False,
        )
        return {line.removesuffix(" missing") for line in found.stdout.splitlines() if line.endswith(" missing")}

    unknown = missing([commit for commit, _ in pairs])  # all but a few in a shallow clone
    known = {pair for pair in pairs if pair[0] not in unknown}
    lacking = missing([f"{commit}:{made_by}" for commit, made_by in known])

    assert {pair for pair in known if ":".join(pair) in lacking} == set()


def test_what_scripts_vary_on_purpose_are_settings_of_a_run() -> None:
    """By the file that a run leaves: a key that is not there would compare nothing less, and say nothing."""
    base = BaseConfig(label="a", weights_digest="b" * 64, tokenizer_digest="c" * 64, architecture_digest="d" * 64)
    config = load(["task=sst2", "data.path=.", "step_policy=random", "step_policy.num_flagged=1"])
    agreed = json.loads(to_json(config.run(base, artifact="e" * 64)))
    calls = re.findall(r"ran_with\(([^)]+)", "".join(path.read_text() for path in FOLDER.glob("*/*.py")))
    varied = {key for call in calls for key in re.findall(r'"([\w.]+)"', call)}

    assert {"strategy", "trainer.lr"} <= varied
    for key in ("seed", "artifact", *varied):
        found = agreed
        for name in key.split("."):
            assert name in found, key
            found = found[name]


def test_scripts_take_what_a_run_was_made_with_from_the_one_place_that_leaves_out_what_is_its_own() -> None:
    """Such as its name, or its command with the folders of a machine, which no claim tells."""
    assert [str(path) for path in FOLDER.glob("**/*.py") if "environment.json" in path.read_text()] == []


def test_runs_that_differ_in_what_a_script_varies_have_the_same_settings(tmp_path: Path) -> None:
    """Also in keys that follow from it: the trainer's learning rate is the server optimizer's, too."""
    base = BaseConfig(label="a", weights_digest="b" * 64, tokenizer_digest="c" * 64, architecture_digest="d" * 64)
    (call,) = re.findall(r"ran_with\(([^)]+)", (FOLDER / "spallm" / "accuracy.py").read_text())

    def settings(lr: float) -> Any:
        folder = tmp_path / f"{lr}"
        folder.mkdir()
        config = load(["task=sst2", "data.path=.", f"trainer.lr={lr}"])
        (folder / "run.json").write_text(to_json(config.run(base, artifact="e" * 64)))
        (folder / "environment.json").write_text("{}")
        return ran_with(folder, *re.findall(r'"([\w.]+)"', call))["settings"]

    assert settings(1e-4) == settings(2e-4)
