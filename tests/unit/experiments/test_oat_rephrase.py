"""The study of rewritten text: its statistics against closed forms and simulated data, its arms, and its gradient."""

from __future__ import annotations

import importlib
import json
import os
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from fedzo.bench.claims import measured_in
from fedzo.commands.run_folder import rebuild
from fedzo.config.load import load
from fedzo.config.travel import to_json
from fedzo.data.encode import Example
from fedzo.records.folder import CONFIG
from fedzo.records.texts import write_whole
from fedzo.testing.tiny_models import save_tiny_model, tiny_loaded

FOLDER = Path(__file__).parents[3] / "experiments" / "oat_rephrase"


@pytest.fixture
def analysis(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("analysis")


@pytest.fixture
def cells(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("cells")


@pytest.fixture
def findings(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("findings")


@pytest.fixture
def arms(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("arms")


def test_runs_that_differ_alone_give_the_t_interval_of_their_means(analysis: Any) -> None:
    runs = np.array([0.1, 0.4, -0.2, 0.3])
    effect = analysis.crossed_effect(np.repeat(runs[:, None], 7, axis=1))
    expected = stats.t.interval(0.95, 3, loc=runs.mean(), scale=stats.sem(runs))
    assert (effect.low, effect.high) == pytest.approx(expected)
    assert effect.smallest == pytest.approx(stats.sem(runs) * (stats.t.ppf(0.975, 3) + stats.t.ppf(0.8, 3)))


def test_rows_that_differ_alone_give_the_t_interval_of_their_means(analysis: Any) -> None:
    rows = np.array([0.1, 0.4, -0.2, 0.3, 0.9])
    effect = analysis.crossed_effect(np.repeat(rows[None], 3, axis=0))
    assert (effect.low, effect.high) == pytest.approx(stats.t.interval(0.95, 4, loc=rows.mean(), scale=stats.sem(rows)))


def test_no_difference_is_an_effect_of_zero(analysis: Any) -> None:
    effect = analysis.crossed_effect(np.zeros((3, 4)))
    assert (effect.mean, effect.low, effect.high, effect.smallest) == (0, 0, 0, 0)


def test_the_interval_holds_the_truth_of_simulated_studies(analysis: Any) -> None:
    """Crossed runs and rows: the paired t over all cells would miss far more often than one time in twenty."""
    draw = np.random.default_rng(1)
    found = [
        analysis.crossed_effect(
            0.5 + draw.normal(size=(6, 1)) + 2 * draw.normal(size=(1, 40)) + draw.normal(size=(6, 40))
        )
        for _ in range(400)
    ]
    share = np.mean([each.low <= 0.5 <= each.high for each in found])
    assert 0.91 <= share <= 0.99
    spread = np.std([each.mean for each in found])
    assert np.mean([each.error for each in found]) == pytest.approx(spread, rel=0.1)
    assert spread == pytest.approx(np.sqrt(1 / 6 + 4 / 40 + 1 / 240), rel=0.1)


def test_the_gain_is_that_of_explicit_gradients(analysis: Any) -> None:
    """Cosine squared, times the share of the mean gradient in the mean square of a batch's."""
    draw = np.random.default_rng(2)
    batches, dev = draw.normal(size=(8, 5)), draw.normal(size=5)
    found = analysis.gain(batches @ dev, (batches**2).sum(1)) / (dev @ dev)
    mean = batches.mean(0)
    cosine = mean @ dev / np.linalg.norm(mean) / np.linalg.norm(dev)
    signal = mean @ mean / np.mean([batch @ batch for batch in batches])
    assert found == pytest.approx(cosine**2 * signal)


def test_a_set_that_is_the_original_gains_as_much(analysis: Any) -> None:
    draw = np.random.default_rng(3)
    base = (draw.normal(size=30) + 1, draw.uniform(1, 2, size=30))
    assert analysis.relative_gain([base, base], base) == pytest.approx((1, 1, 1))


def test_twice_the_signal_is_four_times_the_gain(analysis: Any) -> None:
    draw = np.random.default_rng(4)
    along, squared = draw.normal(size=30) + 3, draw.uniform(1, 2, size=30)
    assert analysis.relative_gain([(2 * along, squared)], (along, squared)) == pytest.approx((4, 4, 4))


def test_draws_widen_the_interval(analysis: Any) -> None:
    along, squared = np.full(30, 1.0), np.ones(30)
    value, low, high = analysis.relative_gain([(along, squared), (2 * along, squared)], (along, squared))
    assert (value, low, high) == pytest.approx((2, 1, 4))  # geometric mean of 1 and 4; all draws the one or the other


@pytest.mark.parametrize(
    ("text", "edited"),
    [
        ("The man slept because he was tired.", "Because he was tired, the man slept."),
        ("When it rained, Mary left.", "Mary left when it rained."),
        ("Is it late? I do not know.", "Is it late? I don't know."),
        ("Don't go. Stay!", "Do not go. Stay!"),
        ("My body cast a shadow.", "It so happened that my body cast a shadow."),
        ("Mary slept.", "It so happened that Mary slept."),
        ("Who? Me!", "Who? Me!"),
    ],
)
def test_the_rule_edits_without_a_model(arms: Any, text: str, edited: str) -> None:
    assert arms.by_rule(text) == edited


def test_a_rewrite_that_the_judge_did_not_keep_is_left_out(arms: Any, tmp_path: Path) -> None:
    rows = [{"premise": text, "label": 0} for text in ("a", "b", "c")]
    rewrites = [
        {"row": 0, "field": "premise", "text": "A", "verdict": "same"},
        {"row": 2, "field": "premise", "text": "C", "verdict": "not the same"},
    ]
    file = tmp_path / "rewrites.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in rewrites))
    assert [row["premise"] for row in arms.published(rows, file)] == ["A", "b", "c"]
    assert rows[0]["premise"] == "a"


def test_a_file_of_rows_is_of_the_task_whose_rows_it_has(arms: Any, tmp_path: Path) -> None:
    for task in arms.TASKS:
        (tmp_path / task).mkdir()
        row = {"premise": f"The {task} slept.", "label": 1}
        (tmp_path / task / "train.jsonl").write_text(json.dumps(row) + "\n")
        (tmp_path / task / "rewrites-oat-gpt4o.jsonl").write_text("")
    other = {"premise": "Other text.", "label": 1, "fedzo_status": "rewritten"}
    mine, stray = tmp_path / "mine.jsonl", tmp_path / "stray.jsonl"
    mine.write_text(json.dumps(other) + "\n")
    stray.write_text(json.dumps({**other, "label": 0}) + "\n")
    sets = arms.train_sets(tmp_path, "copa", [("local", mine), ("none", stray)])
    assert [each.name for each in sets] == ["original", "main", "rule", "local"]
    assert sets[-1].rows == [{"premise": "Other text.", "label": 1}]
    assert sets[-1].digest != sets[0].digest


@pytest.fixture
def endpoint() -> Iterator[tuple[str, list[str]]]:
    """A server on loopback that frames a premise and judges pairs right, and which models it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = body["messages"][-1]["content"]
            asked.append(body["model"])
            if "text B" in prompt:
                a, b = (json.loads(prompt.rsplit(f"text {name}: ", 1)[1].split("\n")[0]) for name in "AB")
                alike = a.strip(".").casefold() in b.casefold() and not re.search(r"\bnot\b|\bfalse\b|\bnever\b", b)
                label = "choice1" if "choice1" in prompt else "entailment"
                text = json.dumps({"verdict": "same" if alike else "different", "predicted_label": label})
            else:
                old = json.loads(prompt.rsplit("premise: ", 1)[1].split("\n")[0])
                text = f"By {body['model']}: {old}"
            choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            answer = json.dumps({"choices": [choice]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: Any) -> None:
            """Nothing on the terminal."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
        server.shutdown()
        thread.join()


def test_each_model_behind_an_endpoint_is_tested_as_a_judge_and_has_files_of_its_own(
    endpoint: tuple[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.chdir(tmp_path)
    effect = importlib.import_module("effect")
    effect.WORK.mkdir(parents=True)
    others = {"copa": ["question", "choice1", "choice2"], "cb": ["hypothesis"]}
    for task, columns in others.items():
        (tmp_path / task).mkdir()
        rows = [
            {"premise": f"The {noun} fell down.", **{name: f"{name} {noun}" for name in columns}, "label": 0}
            for noun in ("man", "woman", "boy", "girl", "child", "teacher")
        ]
        (tmp_path / task / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    url, asked = endpoint
    words = ["rewriter=openai_compatible", f"rewriter.base_url={url}", "preprocess.oat_rephrase.gate_pairs=6"]

    first = effect.rephrase([*words, "rewriter.model=org/alpha"], tmp_path)
    second = effect.rephrase([*words, "rewriter.model=org/beta"], tmp_path)

    for name, files in (("alpha", first), ("beta", second)):
        assert sorted(arm for arm, _ in files) == ["model-oat"] * 2 + ["model-plain"] * 2
        for _, file in files:
            assert f"By org/{name}: The man fell down." in file.read_text()
    assert not {file for _, file in first} & {file for _, file in second}
    calls = len(asked)
    assert effect.rephrase([*words, "rewriter.model=org/alpha"], tmp_path) == first
    assert len(asked) == calls
    with pytest.raises(SystemExit, match=r"must name rewriter\.model"):
        effect.rephrase(words, tmp_path)


def test_the_gradient_is_that_of_finite_differences(cells: Any) -> None:
    loaded = tiny_loaded()
    examples = [Example((1, 2, 3), ((4, 5), (6,)), label=0), Example((7, 8), ((9,), (10, 11)), label=1)]
    assert cells.check_gradient(loaded, examples) == pytest.approx(1, abs=0.01)


def test_the_model_of_a_run_is_that_of_its_log(cells: Any, tmp_path: Path) -> None:
    """A run leaves its model after the last round, as replay rebuilds it from the log."""
    save_tiny_model(tmp_path / "model")
    config = load(
        [
            "experiment=tiny",
            "trainer=mezo",
            "trainer.lr=1e-2",
            f"model.name={tmp_path / 'model'}",
            "trackers=[]",
            "device=cpu",
            "split.num_dev=0",
            "split.num_test=0",
        ]
    )
    loaded = cells.run_here(config, tmp_path / "run")
    write_whole(tmp_path / "run" / CONFIG, to_json(config))
    rebuilt = rebuild(tmp_path / "run", rounds=2).process.peer.loaded
    before = rebuild(tmp_path / "run", rounds=0).process.peer.loaded
    weights = [torch.cat([each.flatten() for each in of.model.parameters()]) for of in (loaded, rebuilt, before)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_cell_is_measured_once_and_outlives_a_kill(cells: Any, tmp_path: Path) -> None:
    file = tmp_path / "effect.json"
    kept = cells.Cells(file)
    kept.measure("a", lambda: {"value": 1})
    (tmp_path / f".effect.json.{os.getpid()}.part").write_text("{torn")  # of a process of this number, killed
    assert kept.measure("a", lambda: {"value": 2})["value"] == 1
    cells.Cells(file, "cuda").measure("b", lambda: {"value": 3})
    assert {name: cell["value"] for name, cell in kept.all().items()} == {"a": 1, "b": 3}
    with pytest.raises(ValueError, match="results of one claim must have the same settings"):
        measured_in(kept.all().values())  # of a CPU and of a GPU


def test_the_rate_is_that_of_the_least_dev_loss(cells: Any, arms: Any) -> None:
    each = arms.TrainSet("rule", "rule", [{"premise": "a"}])
    losses = {4e-6: [0.7, 0.7], 1.6e-5: [0.9, 0.3], 6.4e-5: [0.8, 0.8]}
    known = {cells.tuning_name("copa", "mezo", each, lr): {"dev": dev} for lr, dev in losses.items()}
    assert cells.tuned(known, "copa", "mezo", each) == 1.6e-5


def test_runs_of_another_rate_are_not_those_of_the_tuned_one(cells: Any, arms: Any) -> None:
    each = arms.TrainSet("rule", "rule", [{"premise": "a"}])
    names = {cells.run_name("copa", "mezo", each, lr, 3) for lr in cells.METHODS["mezo"]}
    assert names == {f"train/copa/mezo/rule-{each.digest}/{lr}/3" for lr in ("4e-06", "1.6e-05", "6.4e-05")}


@pytest.mark.parametrize(
    ("of_original", "of_rule", "doubts"),
    [
        ([0.7, 0.5, 0.8], [0.6, 0.4, 0.9], []),
        ([0.7, 0.5, 0.8], [0.6, 0.4, 0.3], ["best rate of rule at the edge of the grid"]),
        ([0.7, 0.5, 0.8], [0.8, 0.75, 0.9], ["dev loss of rule not below untrained"]),
        (
            [0.72, 0.8, 0.9],
            [0.5, 0.6, 0.7],
            ["best rate of rule and original at the edge of the grid", "dev loss of original not below untrained"],
        ),
    ],
)
def test_a_comparison_says_so_where_a_rate_is_at_the_edge_or_has_learnt_nothing(
    findings: Any,
    cells: Any,
    arms: Any,
    tmp_path: Path,
    of_original: list[float],
    of_rule: list[float],
    doubts: list[str],
) -> None:
    """The untrained dev loss is 0.7. Rates and accuracies are claimed all the same, and how large an effect would have
    been found only where nothing is said against the comparison.
    """
    sets = [arms.TrainSet(arm, arm, [{"premise": arm}] * 10) for arm in ("original", "rule")]
    made: dict[str, Any] = {"untrained/copa": {"dev": [0.6, 0.8], "test": [1.0, 2.0]}}
    for each, losses, of_test in zip(sets, (of_original, of_rule), (0.5, 0.4), strict=True):
        for lr, loss in zip(cells.METHODS["mezo"], losses, strict=True):
            made[cells.tuning_name("copa", "mezo", each, lr)] = {"dev": [loss, loss]}
        lr = cells.tuned(made, "copa", "mezo", each)
        for seed in cells.SEEDS["copa"]:
            test = [of_test + seed / 100, 1.0]
            made[cells.run_name("copa", "mezo", each, lr, seed)] = {"test": test, "right": 1, "lr": lr}
    (tmp_path / "effect.json").write_text(json.dumps(made))

    findings.report(cells.Cells(tmp_path / "effect.json"), {"copa": sets}, tmp_path / "claims.json")

    claims = {row["claim"]: row["value"] for row in json.loads((tmp_path / "claims.json").read_text())}
    what = "SmolLM2-135M, copa, mezo: loss on test rows after training on rule less on original"
    told = "; ".join([what, *doubts])
    assert claims[told] == pytest.approx(-0.05)  # of -0.1 and 0
    ends = {f"{told}, lower end of its 95 % interval", f"{told}, upper end"}
    smallest = f"{told}, smallest effect that four such studies in five would find"
    of_comparison = {claim for claim in claims if claim.startswith(what)}
    assert of_comparison == {told, *ends, *([] if doubts else [smallest])}
    for each in sets:
        assert f"SmolLM2-135M, copa, mezo, {each.arm}: learning rate by dev loss" in claims
        assert claims[f"SmolLM2-135M, copa, mezo, {each.arm}: accuracy on 2 test rows"] == 0.5


def test_what_is_committed_has_its_rate_in_its_name(cells: Any) -> None:
    known = cells.Cells(FOLDER / "effect.json").all()
    runs = {name: cell["lr"] for name, cell in known.items() if name.startswith("train/")}
    assert runs
    assert all(name.split("/")[-2] == f"{lr:g}" for name, lr in runs.items())
