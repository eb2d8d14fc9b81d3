"""The experiments' own arithmetic: the simulation against another one's figures, planted clients on a made-up log."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from fedzo.records.decode import encode, to_json
from fedzo.records.log import ScalarAuditLine
from fedzo.testing.logs import audit_line

FOLDER = Path(__file__).parents[5] / "experiments" / "vpcs"


@pytest.fixture
def experiment(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


@pytest.mark.slow
def test_the_ratio_separates_as_another_simulation_found(experiment: Any) -> None:
    """4,000 trials a class: the standard error of an AUC is below 0.006, so 0.03 is five of them."""
    found = experiment("simulate").aucs(4_000)

    assert len(found) == 12
    for entry in found:
        assert abs(entry["auc"] - entry["expected"]) <= 0.03, entry
    # and |g| separates no worse than GradIP, which is the same times noise
    for gradip, abs_g in zip(found[0::2], found[1::2], strict=True):
        assert abs_g["auc"] >= gradip["auc"] - 1e-6


@pytest.mark.slow
def test_false_alarms_and_detections_are_those_of_another_simulation(experiment: Any) -> None:
    """Each within the 99 % interval of the difference of two shares, and the rounding of the printed one."""
    simulate = experiment("simulate")
    assert {key: expected for key, (expected, _, _) in simulate.SHARES.items()} == {
        (100, 20, 80, None, "GradIP", 2.0): 0.007,
        (100, 20, 80, None, "|g|", 2.0): 0.0,
        (100, 20, 20, None, "GradIP", 3.0): 0.0023,
        (100, 20, 20, None, "GradIP", 2.0): 0.037,
        (100, 20, 20, None, "|g|", 3.0): 0.00001,
        (30, 10, 20, None, "GradIP", 2.0): 0.056,
        (30, 10, 20, None, "|g|", 2.0): 0.007,
        (10, 3, 7, None, "GradIP", 2.0): 0.17,
        (10, 3, 7, None, "|g|", 2.0): 0.074,
        (100, 20, 20, 40, "GradIP", 3.0): 0.988,
        (100, 20, 20, 40, "|g|", 3.0): 0.9998,
        (100, 20, 20, 20, "GradIP", 3.0): 1.0,
        (100, 20, 20, 20, "|g|", 3.0): 1.0,
    }
    compared = [entry for entry in simulate.ratios(200_000) if "expected" in entry]

    assert len(compared) == len(simulate.SHARES)
    for entry in compared:
        assert abs(entry["share"] - entry["expected"]) <= entry["tolerance"], entry
    # a test that never flagged would not pass for the default threshold
    (default,) = [e for e in compared if (e["statistic"], e["threshold"], e["expected"]) == ("GradIP", 3.0, 0.0023)]
    assert default["tolerance"] < 0.0005
    assert simulate.quiet(1_000_000)["share"] == pytest.approx(simulate.QUIET[0], abs=simulate.QUIET[1])


@pytest.mark.slow
def test_a_cusum_of_stationary_clients_stays_below_its_threshold(experiment: Any) -> None:
    found = {(e["clients"], e["kind"]): e for e in experiment("simulate").cusums(300)}

    for clients in (4, 12):
        assert found[clients, "1 times as quiet"]["by_1000"]["share"] == 0.0
        assert found[clients, "4 times as quiet"]["by_100"]["share"] > 0.95
        assert 20 <= found[clients, "4 times as quiet"]["median_step"] <= 40
        assert found[clients, "2 times as quiet"]["by_100"]["share"] < 0.1


def test_wilson_holds_the_textbook_interval(experiment: Any) -> None:
    low, high = experiment("simulate").wilson(8, 10)

    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert experiment("simulate").wilson(0, 100)[0] == pytest.approx(0.0, abs=1e-12)


def synthetic_line(*, planted: set[int], seed: int = 3) -> ScalarAuditLine:
    """Twelve clients; of the planted ones the even fall and the odd are soft from the start."""
    rng = np.random.default_rng(seed)
    clients = {}
    for client in range(12):
        scale = np.full(100, 10.0)
        if client in planted:
            scale = 20.0 * np.exp(-np.arange(100) / 15) + 0.2 if client % 2 == 0 else np.full(100, 1.5)
        g = scale * rng.standard_normal(100)
        clients[client] = g[:, None]
    return audit_line(clients, xi=rng.standard_normal((100, 1, 1)), lr=2e-4)


def test_planted_clients_are_found_in_a_log_that_was_made_up(experiment: Any, tmp_path: Path) -> None:
    module = experiment("planted")
    planted = {8, 9, 10, 11}

    found = module.analyse(synthetic_line(planted=planted), planted)

    tests = {(t["statistic"], t["steps"], t["rule"]): t for t in found["tests"]}
    assert len(tests) == 2 * 4 * 6
    combined = tests["abs_g", 100, "combined"]
    assert (combined["auc"], combined["found"], combined["false_alarms"]) == (1.0, [8, 9, 10, 11], [])
    assert tests["abs_g", 100, "ratio"]["found"] == [8, 10]
    assert tests["abs_g", 100, "ratio"]["auc"] < 0.9  # it ranks the soft ones among the IID ones
    assert tests["abs_g", 10, "ratio"]["auc"] < 1.0
    assert [client["client"] for client in found["clients"] if client["planted"]] == [8, 9, 10, 11]
    assert found["clients"][8]["ratio"] > 3
    kept = [{"seed": 0, **found, "environment": {"git_commit": "of the run"}}]
    made = module.claims(kept, command="python x", seeds=[0]).rows
    (judged,) = [row for row in made if row["target"] is not None]
    assert (judged["value"], judged["target"], judged["holds"]) == (1.0, 0.9, True)
    assert judged["environment"] == {"git_commit": "of the run"}


def test_nobody_planted_is_told_apart_where_all_are_alike(experiment: Any) -> None:
    areas = []
    for seed in range(20):
        line = synthetic_line(planted=set(), seed=seed)
        tests = experiment("planted").analyse(line, {8, 9, 10, 11})["tests"]
        areas += [t["auc"] for t in tests if (t["statistic"], t["steps"], t["rule"]) == ("abs_g", 100, "combined")]

    # the AUC of 4 against 8 alike has a standard deviation of 0.18
    assert abs(np.mean(areas) - 0.5) < 4 * 0.18 / np.sqrt(20)


def test_the_planted_are_read_from_what_clients_declared(experiment: Any, tmp_path: Path) -> None:
    lines = [audit_line({0: [[0.5]]}, round=round) for round in range(2)]
    (tmp_path / "audit.jsonl").write_text("".join(to_json(line) + "\n" for line in lines))
    counts = ['{"client": 0, "label_counts": {"0": 4}}', '{"client": 1, "label_counts": {"0": 4, "1": 1}}']
    (tmp_path / "metrics.jsonl").write_text('{"kind": "setup", "clients": [' + ", ".join(counts) + "]}\n")

    line, planted = experiment("planted").read(tmp_path)
    assert (encode(line), planted) == (encode(lines[0]), {0})
