"""The study's own arithmetic: rows of runs, intervals, verdicts, and that only finished and tuned runs count."""

from __future__ import annotations

import importlib
import json
import re
from math import log
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from fedzo.config.load import load
from fedzo.config.overrides import with_config_dir
from fedzo.masks.mask import Mask
from fedzo.masks.mask_file import save_mask

FOLDER = Path(__file__).parents[3] / "experiments" / "meerkat"
MODULES = ("collect", "pieces", "verdicts", "draw", "costs", "sequential", "tables", "run")


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The study's modules by name, with an empty folder of results."""
    monkeypatch.syspath_prepend(str(FOLDER))
    loaded = {name: importlib.import_module(name) for name in MODULES}
    monkeypatch.setattr(loaded["collect"], "RESULTS", tmp_path / "results")
    return loaded


def row(
    seed: int, value: float, *, method: str = "meerkat", budget: str = "T10", lr: float = 1e-3, **changed: Any
) -> Any:
    return {
        "name": f"{method} {budget} {seed} {lr}",
        "task": "sst2",
        "method": method,
        "budget": budget,
        "seed": seed,
        "changed": {key.replace("__", "."): value for key, value in changed.items()},
        "lr": lr,
        "before": {"value": 0.5, "best_threshold_accuracy": 0.6, "auc": 0.65, "loss": 1.0, "per_class": {"0": [1, 2]}},
        "after": {
            "value": value,
            "best_threshold_accuracy": value,
            "auc": value / 2,
            "loss": 1 - value,
            "per_class": {"0": [1, 2], "1": [2, 2]},
        },
        "best_round": 20,
        "seconds": 60.0,
        "git_commit": "c",
        "num_clients": 8,
        "payload_up_bytes": 800,
        "payload_down_bytes": 800,
        "setup_down_bytes": 0,
        "federated": None,
        "rounds": 20,
        "dev": [[0, 0.5, 1.0], [20, 0.7, 1 - lr]],
        "flagged": [],
        "fallback": False,
        "clients": [],
        "space_size": 1_000_000 if method == "full" else 100,
    }


def test_differences_are_those_of_paired_seeds(study: Any) -> None:
    assert study["verdicts"].gains({0: 0.5, 1: 0.75}, {1: 0.25, 2: 1.0}) == [0.5]


@pytest.mark.parametrize(
    ("found", "ahead", "as_good"),
    [
        ([0.05, 0.06, 0.05], "confirmed", "confirmed"),
        ([-0.05, -0.06, -0.05], "contradicted", "contradicted"),
        ([0.05, -0.04, 0.01], "cannot judge", "cannot judge"),
        ([0.001, 0.001, 0.001], "cannot judge", "confirmed"),  # one test row, three times
        ([-0.015, -0.016, -0.015], "contradicted", "confirmed"),  # worse, but by less than two points
    ],
)
def test_a_verdict_needs_an_interval_on_one_side_and_a_point(
    study: Any, found: list[float], ahead: str, as_good: str
) -> None:
    verdicts = study["verdicts"]

    assert verdicts.ahead(found, verdicts.ACCURACY) == ahead
    assert verdicts.as_good(found, verdicts.ACCURACY) == as_good


def test_p_is_students_and_holm_counts_the_lines(study: Any) -> None:
    """The table of Student's t with two degrees of freedom: 4.303 leaves 5 %, 9.925 leaves 1 %."""
    verdicts = study["verdicts"]

    def lines(*ps: float | None) -> list[Any]:
        return [verdicts.Verdict(str(p), "", "confirmed", p) for p in ps]

    def values(t: float) -> list[float]:  # of mean t and standard error 1
        return [t - 3**0.5, t, t + 3**0.5]

    assert verdicts.p_value(values(4.303)) == pytest.approx(0.05, abs=1e-4)
    assert verdicts.p_value(values(-9.925)) == pytest.approx(0.01, abs=1e-4)
    assert verdicts.p_value([0.5, 0.5, 0.5]) == verdicts.p_value([-0.5, -0.5, -0.5]) == 0
    assert verdicts.p_value([0.0, 0.0, 0.0]) == 1
    # 0.01 x 4 and 0.016 x 3 are below 5 %, 0.03 x 2 is not, and what comes after is not asked
    left = verdicts.after_holm(lines(0.03, 0.01, None, 0.04, 0.016))
    assert [each.claim for each in left] == ["0.01", "0.016"]
    assert verdicts.after_holm(lines(verdicts.p_value([0.0, 0.0, 0.0]), 0.03)) == []  # equal runs count as a line


def test_holm_counts_the_lines_of_all_columns(study: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16 lines a p of 0.002 would be left (0.032), of two columns of 16 it is not (0.064), and 0.001 is."""
    tables, verdicts = study["tables"], study["verdicts"]

    def holm(p: float) -> str:
        others = [verdicts.Verdict(f"line {number}", "", "cannot judge", 0.5) for number in range(15)]
        column = [verdicts.Verdict("ours", "", "confirmed", p), *others, verdicts.Verdict("not run", "", "not run")]
        monkeypatch.setattr(tables, "judge", lambda *_: column)
        return str(tables.holm(verdicts.Results({}), ["sst2"])[-1])

    assert holm(0.002) == "| 32 | none |"
    assert holm(0.001) == "| 32 | SST-2, accuracy: ours (confirmed); SST-2, loss: ours (confirmed) |"


def test_a_mean_is_over_runs_of_the_same_settings(study: Any) -> None:
    core = [{**row(seed, 0.8), "settings": "new" if seed else "old"} for seed in range(3)]
    pieces = {**{piece: [] for piece in study["pieces"].PIECES}, "core": core}

    got = re.escape('must have the same settings, got "old" (commit c) and "new" (commit c)')
    with pytest.raises(ValueError, match=got):
        study["tables"].claims(pieces)
    for each in core:
        each["settings"] = "new"
    assert study["tables"].claims(pieces).rows


def test_a_claim_is_judged_only_when_all_seeds_have_run(study: Any) -> None:
    rows = [row(seed, 0.8 + seed / 100) for seed in range(3)]
    rows += [row(seed, 0.7 + seed / 100, method="full") for seed in range(2)]

    def verdict_on_full() -> Any:
        lines = study["verdicts"].judge(study["verdicts"].Results({"core": rows}), "sst2", study["verdicts"].ACCURACY)
        return next(line for line in lines if line.claim == "T = 10: Meerkat is ahead of Full-FedZO")

    assert verdict_on_full().verdict == "2 of 3 seeds"
    rows.append(row(2, 0.72, method="full"))
    assert (verdict_on_full().verdict, verdict_on_full().seen) == (
        "confirmed",
        "+10.0 +- 0.0 points, p = 0",
    )


def test_of_several_learning_rates_the_one_of_the_best_dev_loss_is_shown(study: Any) -> None:
    rows = [row(seed, 0.9, lr=1e-3) for seed in range(3)] + [row(seed, 0.6, lr=1e-2) for seed in range(3)]

    verdicts = study["verdicts"]
    assert verdicts.tested(rows, verdicts.ACCURACY) == {0: 0.6, 1: 0.6, 2: 0.6}  # worse on test, but chosen on dev


def test_results_are_found_by_what_was_changed(study: Any) -> None:
    rows = [row(0, 0.5, server_optimizer="feddyn"), row(0, 0.6, inputs__artifact="runs/mask-c4-60.safetensors")]
    results = study["verdicts"].Results({"servers": rows})

    assert [r["after"]["value"] for r in results.rows("servers", "sst2", server_optimizer="feddyn")] == [0.5]
    assert len(results.rows("servers", "sst2", inputs__artifact="c4-60.safetensors")) == 1
    assert not results.rows("servers", "sst2", "full")


def test_a_seed_on_which_too_many_were_flagged_says_nothing_of_stopping_by_lot(study: Any) -> None:
    """Of three runs of VPCS one stops two clients, one nobody, and one falls back, as its run by lot does."""
    vpcs = [{**row(seed, 0.9, step_policy="vpcs"), "flagged": [1, 2][: 2 - 2 * (seed == 1)]} for seed in range(3)]
    lot = [{**row(seed, 0.6, step_policy="random"), "fallback": seed == 2} for seed in (0, 2)]
    pieces = {"step_policy": vpcs, "random_step_policy": lot, "core": [row(seed, 0.5) for seed in range(3)]}

    found = study["verdicts"].Results(pieces).by_lot("sst2")

    assert [(each["seed"], each["after"]["value"]) for each in found] == [(0, 0.6), (1, 0.5)]


def test_what_diverges_at_its_rate_is_not_judged_but_counts_for_holm(study: Any) -> None:
    """All three runs of a method end above the base's dev loss of 1; two of three are judged as they stand."""
    verdicts = study["verdicts"]
    rows = [row(seed, 0.8 + seed / 100) for seed in range(3)]
    rows += [row(seed, 0.6 + seed / 90, method="lora") for seed in range(3)]

    def verdict() -> Any:
        lines = verdicts.judge(verdicts.Results({"core": rows}), "sst2", verdicts.ACCURACY)
        return next(line for line in lines if line.claim == "T = 10: Meerkat is ahead of LoRA-FedZO")

    for each, last in zip(rows[3:], (1.4, None, 0.9), strict=True):
        each["dev"] = [[0, 0.5, 1.0], [10, 0.7, 0.8], [20, 0.5, last]]
    judged = verdict()
    rows[5]["dev"][-1] = [20, 0.5, 1.01]
    withheld = verdict()

    assert (judged.verdict, withheld.verdict) == ("confirmed", "cannot judge")
    assert withheld.seen == judged.seen + "; all runs of the second diverge"
    assert withheld.p == judged.p
    assert verdicts.after_holm([judged]) == [judged]
    assert verdicts.after_holm([withheld]) == []


def test_methods_are_judged_by_accuracy_and_by_what_a_threshold_cannot_give(study: Any) -> None:
    """Ahead in accuracy, behind in AUC: the columns say both, and a task of four labels is judged by its loss."""
    tables, results = study["tables"], study["verdicts"].Results
    rows = [row(seed, 0.8 + seed / 1000, budget="T1") for seed in range(3)]
    rows += [row(seed, 0.7, method="full", budget="T1") for seed in range(3)]
    for each in rows[3:]:
        each["after"]["auc"] = 0.9
    claim = "| (ours) T = 1: Meerkat is ahead of Full-FedZO |"

    (binary,) = [line for line in tables.verdicts(results({"core": rows}), ["sst2"]) if line.startswith(claim)]
    for each in rows:
        each["after"]["auc"] = None
    head, _, *others = tables.verdicts(results({"core": rows}), ["sst2"])

    assert re.findall(r"\*\*(\w+)", binary) == ["confirmed", "contradicted"]
    assert head == "| claim | SST-2, accuracy | SST-2, loss |"
    (of_loss,) = [line for line in others if line.startswith(claim)]
    assert re.findall(r"[+-][0-9.]+ \+-", of_loss) == ["+10.1 +-", "+0.101 +-"]


def test_what_is_committed_is_made_of_the_results(study: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables that the README shows, made anew; ``docs/tables.py --check`` compares them with the page."""
    monkeypatch.setattr(study["collect"], "RESULTS", FOLDER / "results")

    made = json.loads(json.dumps(study["tables"].made()))

    assert made == json.loads((FOLDER / "tables.json").read_text())
    rows = study["tables"].claims({piece: study["collect"].known(piece) for piece in study["pieces"].PIECES}).rows
    assert json.loads(json.dumps(rows)) == json.loads((FOLDER / "claims.json").read_text())


def write_run(folder: Path, *, finished: bool) -> None:
    folder.mkdir(parents=True)
    clients = [{"client": 0, "num_train": 4, "num_heldout": 1, "label_counts": {"1": 4}}]
    score = {
        "value": 0.5,
        "loss": 0.7,
        "auc": None,
        "best_threshold_accuracy": None,
        "per_class": {},
        "num_examples": 2,
    }
    lines: list[Any] = [{"kind": "setup", "clients": clients, "space_size": 10, "setup_down_bytes": 0}]
    for round_, slope in enumerate((4.0, -2.0, 1.0, -1.0)):
        signals = {"abs_g": [abs(slope)], "grad_ip": [slope / 2]}
        lines.append({"kind": "round", "round": round_, "clients": [{"client": 0, "abs_g": 9.9, "signals": signals}]})
    if finished:
        summary = {"before": score, "after": score, "best_round": 4, "rounds": 4, "seconds": 1.0, "final_digest": "d"}
        lines.append({"kind": "summary", **summary, "payload_up_bytes": 8, "payload_down_bytes": 8})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "overrides.yaml").write_text("[experiment=study, +cell=sst2-meerkat, +budget=T1, seed=1]")
    (folder / "config.json").write_text(json.dumps({"trainer": {"lr": 1e-3}, "fl": {"num_clients": 1}}))
    (folder / "environment.json").write_text(json.dumps({"git_commit": "c"}))
    (folder / "run.json").write_text(json.dumps({"seed": 1, "artifact": "", "step_policy": {}}))


def test_finished_runs_become_rows_and_interrupted_ones_do_not(study: Any, tmp_path: Path) -> None:
    write_run(tmp_path / "sweep" / "a", finished=False)
    assert study["collect"].keep("core", tmp_path / "sweep") == []

    write_run(tmp_path / "sweep" / "b", finished=True)
    (kept,) = study["collect"].keep("core", tmp_path / "sweep")
    assert kept == study["collect"].known("core")[0]
    assert kept["name"] == "+budget=T1 +cell=sst2-meerkat seed=1"
    assert (kept["seed"], kept["lr"], kept["changed"]) == (1, 1e-3, {})
    # a quarter of four steps is one: the first and the last, without signs
    assert kept["clients"] == [{"client": 0, "labels": {"1": 4}, "mean_abs_g": [4.0, 1.0], "mean_grad_ip": [2.0, 0.5]}]


def test_runs_side_by_side_are_sweeps_of_folders_of_their_own(
    study: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A sweep's folder is one process's: the second of two would be refused. What is below them becomes rows."""
    monkeypatch.setattr(study["run"], "RUNS", tmp_path)
    jobs = study["pieces"].jobs_of("iid", "sst2-meerkat", lr=1.0)
    folders: list[str] = []

    def finish(*words: str) -> None:
        folders.append(words[-1].removeprefix("hydra.sweep.dir="))
        write_run(Path(folders[-1]) / "run", finished=True)
        text = json.dumps(["experiment=study", *jobs[len(folders) - 1]])
        (Path(folders[-1]) / "run" / "overrides.yaml").write_text(text)
        (Path(folders[-1]) / "run" / "config.yaml").write_text("task: {name: sst2}")

    monkeypatch.setattr(study["run"], "fedzo", finish)
    monkeypatch.setattr(study["collect"], "PANELS", tmp_path / "panels")
    for job in jobs:
        study["run"].run("iid", job)

    assert len({*folders}) == len(jobs) == 6
    assert len(study["collect"].known("iid")) == 6


def test_the_local_steps_of_a_plain_run_and_of_one_with_vpcs_are_kept(
    study: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Seed 0 at T = 10, by the very words of the pieces."""
    monkeypatch.setattr(study["collect"], "PANELS", tmp_path / "panels")
    for piece in ("core", "step_policy", "long", "normalised"):
        for number, words in enumerate(study["pieces"].jobs_of(piece, "sst2-meerkat", lr=1.0)):
            folder = tmp_path / piece / str(number)
            write_run(folder, finished=True)
            with (folder / "metrics.jsonl").open("a") as more:
                more.write(json.dumps({"kind": "piece", "of": piece}) + "\n")
            (folder / "overrides.yaml").write_text(json.dumps(["experiment=study", *words]))
            (folder / "config.yaml").write_text("task: {name: sst2}")
        study["collect"].keep(piece, tmp_path / piece)

    kept = {folder.name: (folder / "metrics.jsonl").read_text() for folder in (tmp_path / "panels").iterdir()}
    assert {name: json.loads(text.splitlines()[-1])["of"] for name, text in kept.items()} == {
        "sst2-plain": "core",
        "sst2-vpcs": "step_policy",
    }


def test_a_learning_rate_is_tuned_when_the_best_lies_inside_the_ladder(
    study: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = study["run"]
    losses = {1e-3: 0.7, 2e-3: 0.6}
    monkeypatch.setattr(run, "tried", lambda cell: losses)
    monkeypatch.setattr(run, "rate_of", lambda cell: 2e-3)

    assert not run.is_tuned("sst2-full")  # at the ladder's end
    losses[4e-3] = 0.8
    assert run.is_tuned("sst2-full")
    losses[3e-3] = 0.5
    assert not run.is_tuned("sst2-full")  # the cell holds another than the best


def test_a_piece_with_rates_of_its_own_climbs_a_ladder_for_each_combination(
    study: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The dev loss is least at four times the cell's rate at T = 50, and at half of it elsewhere."""
    run, ran = study["run"], []

    def finish(piece: str, words: list[str]) -> None:
        own = dict(word.split("=", 1) for word in words)
        budget, rate = own["+budget"], float(own["trainer.lr"])
        best = 4e-3 if budget == "T50" else 5e-4
        dev = [[0, 0.5, 1.0], [20, 0.7, 0.5 + abs(log(rate / best))]]
        ran.append((piece, budget, own["seed"], rate, own.get("evaluation.test")))
        name = study["collect"].name_of(words)
        rows = [*study["collect"].known(piece), {**row(0, 0.7, budget=budget, lr=rate), "name": name, "dev": dev}]
        (tmp_path / "results").mkdir(exist_ok=True)
        (tmp_path / "results" / f"{piece}.json").write_text(json.dumps(rows))

    monkeypatch.setattr(run, "RUNS", tmp_path)
    monkeypatch.setattr(run, "run", finish)
    monkeypatch.setattr(run, "rate_of", lambda cell: 1e-3)
    monkeypatch.setattr(run, "is_tuned", lambda cell: True)
    monkeypatch.setattr(run, "choose_mask", lambda data, name: None)
    monkeypatch.setattr(
        "sys.argv", ["run.py", "drift", "--data", ".", "--task", "sst2", "--method", "meerkat", "--jobs", "1"]
    )

    run.main()

    tuned = {budget: [r for p, b, s, r, t in ran if b == budget and p == "tune_drift"] for budget in ("T1", "T50")}
    assert tuned == {"T1": [5e-4, 1e-3, 2e-3, 2.5e-4], "T50": [5e-4, 1e-3, 2e-3, 4e-3, 8e-3]}
    assert all((seed, test) == ("0", "False") for piece, _, seed, _, test in ran if piece == "tune_drift")
    judged = [(budget, seed, rate) for piece, budget, seed, rate, _ in ran if piece == "drift"]
    rates = {"T1": 5e-4, "T50": 4e-3}
    assert sorted(judged) == sorted((budget, seed, rates[budget]) for budget in rates for seed in "012")


@pytest.mark.parametrize("rows", [1_000, 1_500, 60])
def test_a_mask_of_the_task_has_as_many_documents_as_windows(
    study: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rows: int
) -> None:
    """BoolQ has 1,000 rows, the others 1,500: every row is in one document."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "boolq").mkdir()
    texts = [f"row {number}" for number in range(rows)]
    path = tmp_path / "boolq" / "train.jsonl"
    path.write_text("".join(json.dumps({"text": text, "label": 1}) + "\n" for text in texts))

    made = [json.loads(line)["text"] for line in study["run"].documents_of(path, number=60).read_text().splitlines()]

    assert len(made) == study["pieces"].corpus_of("mask-boolq-60").docs == 60
    assert "\n".join(made).splitlines() == texts
    assert max(map(len, made)) < 2 * min(map(len, made))


def test_a_folder_without_the_texts_of_a_mask_is_named(
    study: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)

    for mask, file in (("mask-c4.safetensors", "c4/train.jsonl"), ("mask-boolq-60.safetensors", "boolq/train.jsonl")):
        with pytest.raises(SystemExit, match=f"--data must hold {file}, which the mask {mask} is chosen on"):
            study["run"].choose_mask(tmp_path, mask)


def test_the_steps_of_a_run_are_its_rounds_and_its_calibration(study: Any) -> None:
    steps_of, jobs_of = study["costs"].steps_of, study["pieces"].jobs_of

    def steps(piece: str) -> list[int]:
        return [steps_of(job) for job in jobs_of(piece, "sst2-meerkat", lr=1.0)]

    assert steps("core") == steps("iid") == [200] * 6
    assert steps("T50") == [200] * 3
    assert steps("long") == [1000] * 3
    assert steps("drift") + steps("drift_100") == [1000] * 9
    assert steps("step_policy") == [200] * 3 + [300] * 3


def test_tuning_takes_the_hours_that_its_runs_took(study: Any) -> None:
    """Three runs of an hour and one of two, two at a time."""
    taken = [("sst2", 3600.0)] * 3 + [("ag_news", 7200.0)]

    lines = study["costs"].hours([], [{"task": task, "seconds": seconds} for task, seconds in taken])

    assert "| `tune` | 3 | 1.5 | 1 | 1.0 |" in lines


def test_the_sums_of_a_cusum_are_those_of_a_slow_loop(study: Any) -> None:
    """The committed run on SST-2, client by client and step by step, by the words of ``step_policy.cusum``."""
    lines = (FOLDER / "results" / "panels" / "sst2-plain" / "metrics.jsonl").read_text().splitlines()
    rounds = [record for record in map(json.loads, lines) if record["kind"] == "round"]
    sums, peaks = dict.fromkeys(range(8), 0.0), dict.fromkeys(range(8), 0.0)
    for record in rounds:
        paths = {client["client"]: client["signals"]["abs_g"] for client in record["clients"]}
        for step in range(10):
            for client in range(8):
                others = median(log(paths[other][step]) for other in range(8) if other != client)
                below = min(others - log(paths[client][step]), 2.0)
                sums[client] = max(0.0, sums[client] + below - 1.0)
                peaks[client] = max(peaks[client], sums[client])

    core = json.loads((FOLDER / "results" / "core.json").read_text())
    (shown,) = [line for line in study["sequential"].sequential(core) if line.startswith("| SST-2")]

    alone = {int(client): float(peak) for client, peak in re.findall(r"client (\d): ([0-9.]+)", shown)}
    assert alone == {client: pytest.approx(peaks[client], abs=0.051) for client in alone}
    assert shown.count(f"{max(peaks[client] for client in peaks if client not in alone):.1f}") >= 1
    assert f"| {sum(peaks[client] > 8 for client in alone)} of {len(alone)} |" in shown


def test_every_piece_names_settings_that_exist(study: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Composed and checked as `fedzo train` would; masks and data are there by name only."""
    pieces = study["pieces"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDZO_STUDY_DATA", str(tmp_path))
    pieces.RUNS.mkdir(parents=True)
    cells = [f"{task}-{method}" for task in pieces.TASKS for method in pieces.METHODS]
    jobs = [(cell, job) for cell in cells for piece in pieces.PIECES for job in pieces.jobs_of(piece, cell, lr=1e-3)]
    first = dict(reversed(jobs))  # of each cell; budgets and parts are the same for all tasks
    composed = set()
    for cell, job in jobs:
        named = (cell, *(word for word in job if not word.startswith("trainer.lr=")))  # of its rates, one will do
        if named in composed or "seed=0" not in job or not (cell.startswith("sst2") or job == first[cell]):
            continue
        composed.add(named)
        (tmp_path / cell.partition("-")[0]).mkdir(exist_ok=True)
        for mask in ["mask-c4.safetensors", *re.findall(r"mask-[^/]*safetensors", " ".join(job))]:
            save_mask(Mask({"w": torch.tensor([0])}, {"w": (2,)}, None, manifest={}), pieces.RUNS / mask)
            assert study["pieces"].corpus_of(mask.removesuffix(".safetensors")).docs in (60, 100)
        config = load(with_config_dir(["experiment=study", *job], str(FOLDER / "conf")))
        assert config.fl.num_clients == 8
