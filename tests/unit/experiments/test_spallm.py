"""Trained tables beside other trainers: verdicts by the rules of the study that the others are from."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[3] / "experiments"


@pytest.fixture
def accuracy(script: Callable[[Path], ModuleType]) -> Any:
    return script(FOLDER / "spallm" / "accuracy.py")


@pytest.fixture
def verdicts(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER / "meerkat"))
    return importlib.import_module("verdicts")


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([5.0, 6.0, 5.0], "ahead"),
        ([-5.0, -6.0, -5.0], "behind"),
        ([5.0, -4.0, 1.0], "cannot judge"),  # an interval of 11 points to either side says nothing
        ([0.5, -0.3, 0.1], "within 2 points"),
        ([0.1, 0.1, 0.1], "within 2 points"),  # a few test rows, three times
    ],
)
def test_a_difference_is_judged_as_the_study_judges_it(
    accuracy: Any, verdicts: Any, points: list[float], expected: str
) -> None:
    ours = [each / 100 for each in points]
    measure = verdicts.ACCURACY
    as_good = {verdicts.as_good(found, measure) for found in (ours, [-each for each in ours])}
    of_study = {"confirmed": "ahead", "contradicted": "behind"}.get(verdicts.ahead(ours, measure))

    assert accuracy.verdict(points) == expected
    assert of_study == (expected if expected in ("ahead", "behind") else None)
    assert (as_good == {"confirmed"}) == (expected == "within 2 points")
    assert pytest.approx(100 * measure.least) == accuracy.LEAST
    assert pytest.approx(100 * measure.same) == accuracy.SAME


def test_a_method_all_of_whose_runs_diverge_is_not_judged(
    accuracy: Any, verdicts: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All three runs of LoRA end above the base's dev loss of 1, and one of Full-FedZO does."""

    def made(method: str, seed: int, value: float, last: float | None) -> dict[str, Any]:
        dev = [[0, 0.5, 1.0], [10, 0.7, 0.8], [20, 0.5, last]]
        score = {"value": value, "loss": 0.5}
        which = {"task": "sst2", "method": method, "budget": "T1", "seed": seed, "lr": 1e-4}
        return {**which, "before": {"value": 0.5, "loss": 1.0}, "after": score, "dev": dev}

    ours = [made("tables", seed, 0.8 + seed / 100, 0.7) for seed in range(3)]
    study = [made("meerkat", seed, 0.7, 0.7) for seed in range(3)]
    study += [made("full", seed, 0.9, 1.1 if seed == 2 else 0.9) for seed in range(3)]
    study += [made("lora", seed, 0.5, last) for seed, last in enumerate((1.4, None, 1.01))]
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "core.json").write_text(json.dumps(study))
    (tmp_path / "accuracy.json").write_text(json.dumps({str(each["seed"]): each for each in ours}))
    for name, path in (("HERE", tmp_path), ("STUDY", tmp_path), ("RESULTS", tmp_path / "accuracy.json")):
        monkeypatch.setattr(accuracy, name, path)

    accuracy.write_claims()

    claims = json.loads((tmp_path / "claims.json").read_text())
    told = {row["claim"].partition("less that of ")[2]: row["unit"].partition(": ")[2] for row in claims}
    assert told["Meerkat of the dense model"] == "ahead"
    assert told["Full-FedZO of the dense model"] == "behind"
    assert told["LoRA-FedZO of the dense model"] == "cannot judge; all runs of LoRA-FedZO diverge"
    assert [accuracy.diverged(each) for each in study] == [verdicts.diverged(each) for each in study]


@pytest.fixture
def kernels_on_a_gpu(script: Callable[[Path], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The script, with an empty folder of results."""
    made: Any = script(FOLDER / "spallm" / "gpu.py")
    monkeypatch.setattr(made, "HERE", tmp_path)
    monkeypatch.setattr(made, "RESULTS", tmp_path / "gpu.json")
    return made


def test_without_a_card_no_kernel_is_measured_and_each_piece_says_so(
    kernels_on_a_gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    made = kernels_on_a_gpu
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(made, "PIECES", dict.fromkeys(made.PIECES, None))  # which nobody can call
    monkeypatch.setattr("sys.argv", ["gpu.py"])

    made.main()

    assert capsys.readouterr().out.startswith("Nothing is measured: this machine has no CUDA device.\n")
    rows = json.loads((tmp_path / "claims.json").read_text())
    assert {(row["value"], row["holds"]) for row in rows} == {(None, None)}
    targets = {row["claim"]: row["target"] for row in rows}
    step = "Llama-2-7B's shape, 4 bits, bfloat16, 32 x 128 tokens, a step of tables"
    assert (targets[f"{step} / its two forwards"], targets[f"{step}, peak memory"]) == (1.08, 8)
    assert len(rows) == 7
    assert not (tmp_path / "gpu.json").exists()


def test_figures_of_kernels_are_the_goals_that_their_pieces_have(kernels_on_a_gpu: Any) -> None:
    made = kernels_on_a_gpu
    times = {"fused": 2.0, "decoded": 8.0, "dense": 4.0}
    named = {made.OURS: (1.05, 0.4, 4 << 30), made.DENSE: (0.5, 0.2, None)}
    keys = ("ratio", "median_s", "peak_bytes")
    steps = [dict(zip(keys, each, strict=True), name=name) for name, each in named.items()]
    found = {
        "check": {"differing": 0, "units": 0.5},
        "replay": {"differing": 0},
        "decode": {"decode": 1.0, "copy": 1.0},
        "product": {"copy_of_codes": 1.0, "tokens": {"1": times, "16": times}},
        "step": {"figures": steps},
    }

    assert set(found) == set(made.GOALS) == set(made.PIECES)
    for name, goals in made.GOALS.items():
        assert set(goals) <= {what for what, _, _ in made.figures(name, found[name])}
    told = {"card": "Card", "environment": {"threads": 1}}
    rows = made.gather({name: {"found": each, **told} for name, each in found.items()}).rows
    assert {row["holds"] for row in rows} == {True}
    values = {row["claim"].removeprefix("Card: "): row["value"] for row in rows}
    step = "Llama-2-7B's shape, 4 bits, bfloat16, 32 x 128 tokens, a step of tables"
    assert [values[f"{step}{rest}"] for rest in (" / its two forwards", ", peak memory")] == [1.05, 4.0]
    assert values[f"{step} / the dense model's two forwards"] == 2.0
    assert sum("cuBLAS" in what for what in values) == 4
