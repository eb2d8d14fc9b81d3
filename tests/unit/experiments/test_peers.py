"""The comparison with other protocols: what a method costs, which rate is taken, and that its settings exist."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from itertools import accumulate
from math import log
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedzo.config.load import load
from fedzo.masks.mask import Mask
from fedzo.masks.mask_file import save_mask

FOLDER = Path(__file__).parents[3] / "experiments" / "peers"


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The modules by name, with an empty folder of results; other experiments have modules of these names, too."""
    loaded = {}
    for name in ("methods", "tables", "run"):
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        loaded[name] = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, loaded[name])
        spec.loader.exec_module(loaded[name])
    for name in ("run", "tables"):
        monkeypatch.setattr(loaded[name], "HERE", tmp_path)
    monkeypatch.setattr(loaded["run"], "RESULTS", tmp_path / "results.json")
    return loaded


BASE = {"value": 0.6, "loss": 1.0, "auc": 0.65, "best_threshold_accuracy": 0.68}


def entry(method: str, seed: int, lr: float, *, loss: float, value: float = 0.8, task: str = "sst2") -> Any:
    score = {"value": value, "loss": loss, "auc": value, "best_threshold_accuracy": value}
    dev = [
        {
            **score,
            "round": round_,
            "loss": 1.0 if round_ == 0 else loss,
            "seconds": 10.0 * round_,
            "forwards": 320 * round_,
        }
        for round_ in (0, 5, 11)
    ]
    return {
        **{"task": task, "method": method, "seed": seed, "lr": lr, "rounds": 11, "diverged": False, "train_s": 110.0},
        **{"best_round": 11, "test": score, "peak_bytes": 2**30, "environment": {"threads": 2}},
        "dev": [{**each, "bytes": 100 * each["round"]} for each in dev],
    }


def diverged(made: Any) -> Any:
    return {**{key: value for key, value in made.items() if key != "test"}, "diverged": True, "dev": []}


def test_forwards_are_those_of_rows_through_the_blocks_that_they_pass(peers: Any) -> None:
    """By hand, for 900 rows: what runs once has run before the first step, so round 0 alone is free."""
    methods = peers["methods"].METHODS

    def after(name: str, rounds: int) -> float:
        return methods[name].whole_forwards(rounds, num_rows=900)

    assert {after(name, 0) for name in methods} == {0.0}
    assert after("meerkat", 10) == 10 * 16 * 2
    assert after("decomfl", 10) == 10 * 16 * 6
    assert after("fedkseed", 10) == 10 * 10 * 16 * 2
    assert after("mask_gradient", 1) == 10 * 16 * 3
    assert after("upper", 10) == pytest.approx(900 * 11 / 30 + 10 * 16 * 2 * 19 / 30)
    assert after("last_norm", 1) == after("last_norm", 4000) == 900


def test_the_rate_climbs_until_it_lies_inside_and_its_run_is_that_of_seed_0(
    peers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The least dev loss is at four times the first rate; a rate that diverges counts as the worst."""
    run, tables = peers["run"], peers["tables"]
    first = peers["methods"].METHODS["lora"].first_lr

    def finish(task: str, name: str, rate: float, seed: int) -> None:
        made = entry(name, seed, rate, loss=0.5 + abs(log(rate / (4 * first))), task=task)
        if rate > 6 * first:
            made = diverged(made)
        run.keep(f"run {task} {name} {rate:g} {seed}", made)

    monkeypatch.setattr(run, "run", finish)
    best = run.tune("sst2", "lora")
    for seed in (1, 2):
        finish("sst2", "lora", best, seed)

    assert best == 4 * first
    assert sorted(tables.ladder(run.known(), "sst2", "lora")) == [first * 2.0**power for power in (-1, 0, 1, 2, 3)]
    assert [each["seed"] for each in tables.chosen(run.known(), "sst2", "lora")] == [0, 1, 2]
    assert tables.chosen(run.known(), "sst2", "meerkat") == []


def test_a_ladder_whose_best_rate_is_its_end_makes_no_claim(peers: Any, tmp_path: Path) -> None:
    results = {f"run sst2 lora {lr:g} 0": entry("lora", 0, lr, loss=1 - lr) for lr in (0.1, 0.2, 0.4)}

    peers["tables"].write(results)

    assert not (tmp_path / "claims.json").exists()


def test_claims_are_of_equal_forwards_and_of_paired_seeds(peers: Any, tmp_path: Path) -> None:
    """Meerkat ends after 3,520 forwards, MeZO after 1,600: both are compared at the last score within 1,600."""
    results: dict[str, Any] = {"base sst2": BASE}
    for method, values in (("meerkat", (0.7, 0.72, 0.74)), ("mezo", (0.75, 0.76, 0.77))):
        for lr, loss in ((0.1, 0.6), (0.2, 0.5), (0.4, 0.7)):
            for seed in range(3) if lr == 0.2 else (0,):
                made = entry(method, seed, lr, loss=loss, value=values[seed])
                made["dev"] = made["dev"][: 2 if method == "mezo" else 3]
                results[f"run sst2 {method} {lr:g} {seed}"] = made

    peers["tables"].write(results)

    claims = {row["claim"]: row for row in json.loads((tmp_path / "claims.json").read_text())}
    mezo = "SST-2, MeZO, one site with all rows"
    gain = claims[f"{mezo}: test accuracy less that of Meerkat"]
    assert gain["value"] == pytest.approx(4.0)  # of 5, 4 and 3 points
    assert gain["unit"] == f"points +- {4.303 / 3**0.5:.2g}"
    assert claims["SST-2, the base model: test accuracy"]["value"] == 60
    assert claims["SST-2, Meerkat: forwards of these"]["value"] == 1600
    assert claims[f"{mezo}: forwards of these"]["value"] == 1600
    assert claims["SST-2, Meerkat: s to 0.70"]["value"] == 0  # its dev scores are there from the start
    assert f"{mezo}: bytes to 0.70" not in claims  # one site sends nothing
    assert "SST-2, Meerkat: s to 0.75" not in claims
    assert (tmp_path / "peers.png").exists()


def test_a_median_over_seeds_tells_the_least_and_the_most(peers: Any, tmp_path: Path) -> None:
    """Where they differ: all seeds reach 0.70 with the bytes of round 5."""
    results: dict[str, Any] = {"base sst2": BASE}
    for lr, loss in ((0.1, 0.6), (0.2, 0.5), (0.4, 0.7)):
        for seed, train_s in enumerate((130.0, 100.0, 110.0) if lr == 0.2 else (100.0,)):
            made = {**entry("meerkat", seed, lr, loss=loss), "train_s": train_s}
            made["dev"][0]["value"] = 0.5
            made["dev"][1]["seconds"] = train_s / 2
            results[f"run sst2 meerkat {lr:g} {seed}"] = made

    peers["tables"].write(results)

    claims = {row["claim"]: row for row in json.loads((tmp_path / "claims.json").read_text())}
    told = {what: claims[f"SST-2, Meerkat: {what}"] for what in ("training time", "s to 0.70", "bytes to 0.70")}
    assert {what: (row["value"], row["unit"]) for what, row in told.items()} == {
        "training time": (110, "s (100 to 130)"),
        "s to 0.70": (55, "(50 to 65)"),
        "bytes to 0.70": (500, "bytes"),
    }


def test_a_seed_that_diverged_is_missing_and_one_method_can_stand_alone(peers: Any, tmp_path: Path) -> None:
    results = {f"run sst2 last_norm {lr:g} 0": entry("last_norm", 0, lr, loss=abs(lr - 0.2)) for lr in (0.1, 0.2, 0.4)}
    results["run sst2 last_norm 0.2 1"] = diverged(entry("last_norm", 1, 0.2, loss=0))
    results["base sst2"] = BASE

    peers["tables"].write(results)

    claims = {row["claim"]: row["value"] for row in json.loads((tmp_path / "claims.json").read_text())}
    title = peers["methods"].METHODS["last_norm"].title
    assert claims[f"SST-2, {title}: seeds"] == 1
    assert claims[f"SST-2, {title}: forwards of these"] == 3520


def test_every_method_names_settings_that_exist(peers: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Composed and checked as `fedzo train` would; masks and data are there by name only."""
    run, methods = peers["run"], peers["methods"].METHODS
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDZO_PEERS_DATA", str(tmp_path))
    (tmp_path / "sst2").mkdir()
    for method in methods.values():
        for path in re.findall(r"inputs\.artifact=(\S+)", " ".join(method.words)):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            layer = {"first_layer": "11"} if "upper" in path else {}
            save_mask(Mask({"w": torch.tensor([0])}, {"w": (2,)}, None, manifest=layer), Path(path))

    configs = {(task, name): load(run.words(task, name, ["fl.rounds=9"])) for task in run.TASKS for name in methods}

    for (_, name), config in configs.items():
        taking_part = config.strategy.clients_per_round or config.fl.num_clients
        assert config.fl.batch_size * taking_part == methods[name].rows
        assert config.fl.local_steps == methods[name].steps
        assert (config.fl.num_clients, config.partition.holdout, config.fl.rounds) == (
            8 if methods[name].is_federated else 1,
            0,
            9,
        )


SCORE = {"value": 0.5, "loss": 0.9, "auc": 0.6, "best_threshold_accuracy": 0.55}


def lines_of(rounds: int, *, loss: float) -> list[Any]:
    """What a run of two clients leaves: rounds of 1, 2, ... s, half a second apart, a dev score after the last two."""
    ends = accumulate(1.5 + number for number in range(rounds))
    clients = [{"client": 0, "num_train": 4}, {"client": 1, "num_train": 6}]
    sent = {"payload_up_bytes": 8, "payload_down_bytes": 12}
    return [
        {"kind": "setup", "setup_down_bytes": 100, "clients": clients},
        *({"kind": "score", "split": split, "round": 0, **SCORE} for split in ("test", "dev")),
        *(
            {"kind": "round", "seconds": 10 + end, "round": number, "round_seconds": 1.0 + number, **sent}
            for number, end in enumerate(ends)
        ),
        *({"kind": "score", "split": "dev", "round": at, **SCORE, "loss": loss} for at in (rounds - 1, rounds)),
        {"kind": "summary", "best_round": rounds, "before": SCORE, "after": None},
    ]


def test_a_dev_score_has_what_was_spent_until_then_and_no_more(peers: Any) -> None:
    """By hand: rounds of 1, 2 and 3 s and half a second for the update of each; 20 bytes a round for two clients."""
    method = peers["methods"].METHODS["meerkat"]

    scores = peers["run"].curve(lines_of(3, loss=0.7), method, commit_s=0.5)

    assert [(score["round"], score["loss"]) for score in scores] == [(0, 0.9), (2, 0.7), (3, 0.7)]
    assert [score["seconds"] for score in scores] == [0.0, 1.5 + 2.5, 1.5 + 2.5 + 3.5]
    assert [score["bytes"] for score in scores] == [100, 120, 130]
    assert [score["forwards"] for score in scores] == [0, 2 * 32, 3 * 32]


@pytest.mark.parametrize(
    ("first_s", "round_s", "rounds"), [(33.2, 35.2, 5), (1.0, 2.0, 91), (179.0, 90.0, 1), (500.0, 90.0, 1)]
)
def test_a_method_of_long_rounds_gets_no_more_time(peers: Any, first_s: float, round_s: float, rounds: int) -> None:
    """180 s: FedKSeed's ten local steps on a CPU make five rounds, however few scores these give."""
    assert peers["run"].rounds_within(180.0, {"first_s": first_s, "round_s": round_s}) == rounds


def test_no_test_row_is_scored_before_the_rate_is_chosen_and_then_one_run_a_seed(
    peers: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The least dev loss is at twice the first rate."""
    run, first = peers["run"], peers["methods"].METHODS["lora"].first_lr
    trained: list[tuple[str, ...]] = []
    scored: list[str] = []

    def fedzo(*command: str) -> None:
        if command[0] != "train":
            return
        trained.append(command)
        words = dict(word.split("=", 1) for word in command[1:])
        loss = 0.5 + abs(log(float(words.get("trainer.lr", 1)) / (2 * first)))
        folder = Path(words["hydra.run.dir"])
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines_of(8, loss=loss)))
        (folder / "environment.json").write_text("{}")
        (folder / "run.json").write_text('{"seed": 0, "artifact": ""}')

    def score(command: list[str], **_: Any) -> Any:
        scored.append(command[command.index("evaluate") + 1])
        assert command[-2:] == ["--split", "test"]
        return SimpleNamespace(returncode=0, stdout=json.dumps({"answers": SCORE}))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "fedzo", fedzo)
    monkeypatch.setattr(run, "peak_bytes", lambda *_: 7)
    monkeypatch.setattr(run.subprocess, "run", score)
    monkeypatch.setattr(sys, "argv", ["run.py", "--data", str(tmp_path), "--task", "sst2", "--method", "lora"])

    run.main()

    known = run.known()
    runs = {key: made for key, made in known.items() if key.startswith("run ")}
    rates = [first / 2, first, 2 * first, 4 * first]
    assert {(made["lr"], made["seed"]) for made in runs.values()} == {
        *((rate, 0) for rate in rates),
        (2 * first, 1),
        (2 * first, 2),
    }
    base, *rest = trained
    assert "evaluation.test=false" not in base
    assert known["base sst2"] == SCORE
    assert all({"evaluation.test=false", "evaluation.central=false"} & {*words} for words in rest)
    assert scored == [str(run.folder_of(f"run sst2 lora {2 * first:g} {seed}")) for seed in (0, 1, 2)]
    assert {key for key, made in runs.items() if "test" in made} == {
        f"run sst2 lora {2 * first:g} {seed}" for seed in (0, 1, 2)
    }
    # of rounds of 1 to 8 s, each followed by an update of half a second
    assert known["pace sst2 lora"] == {"first_s": 1.5, "round_s": 6.0, "commit_s": 0.5, "peak_bytes": 7}
