"""A run scored by several evaluators, one of them from a package of its own.

Every program is a process of its own, in which the package is found by its entry point: here the registries stay
closed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedzo.commands.evaluate import evaluate_run

Ask = Callable[[str, object], Any]
PACKAGE = Path(__file__).resolve().parents[1] / "third_party"
LOAD = """
import json, sys
from fedzo.config.load import load
from fedzo.config.schema import LaunchConfig
from fedzo.config.travel import from_json, to_json
from fedzo.errors import ConfigError

def told(overrides):
    try:
        config = load(overrides)
    except ConfigError as error:
        return str(error)
    assert from_json(to_json(config), LaunchConfig) == config
    return [*config.evaluators]

print(json.dumps([told(overrides) for overrides in json.loads(sys.argv[1])]))
"""
RUN = """
import json, sys
from pathlib import Path
from fedzo.commands.evaluate import evaluate_run
from fedzo.commands.run_folder import rebuild
from fedzo.commands.train import start_run
from fedzo.config.load import load
from fedzo.models.generate import generate
from fedzo.report.html import write_report

overrides, folder = json.loads(sys.argv[1])
start_run(load(overrides), Path(folder), overrides=[])
write_report(Path(folder))
process = rebuild(Path(folder)).process
prompts = [example.prompt for example in process.server.examples("test")]
answers = generate(process.peer.loaded, prompts, max_new_tokens=6, tokens_per_batch=4096)
print(json.dumps([[len(answer) for answer in answers], evaluate_run(Path(folder), split="test")]))
"""
KILLED = """
import json, os, signal, sys
from pathlib import Path
from fedzo.commands.resume import resume_run
from fedzo.commands.train import start_run
from fedzo.config.load import load
from fedzo.fl.log_store import RunStore
from fedzo.records.metrics import CentralScore, FederatedScore

overrides, folder, kill = json.loads(sys.argv[1])
written = []

def write(self, record, original=RunStore.write):
    original(self, record)
    written.append([getattr(record, name, None) for name in ("kind", "evaluator", "round")])
    if written[-1] == kill:
        os.kill(os.getpid(), signal.SIGKILL)

RunStore.write = write
if Path(folder).exists():
    resume_run(Path(folder))
else:
    start_run(load(overrides), Path(folder), overrides=[])
"""


@pytest.fixture
def run_program(forked: Callable[..., tuple[int, str]]) -> Callable[[str, object], tuple[int, str]]:
    return lambda program, argument: forked(program, json.dumps(argument), path=PACKAGE)


@pytest.fixture
def answer_of(run_program: Callable[[str, object], tuple[int, str]]) -> Ask:
    def answer(program: str, argument: object) -> Any:
        code, said = run_program(program, argument)
        assert code == 0, said
        return json.loads(said.splitlines()[-1])

    return answer


def test_a_third_partys_evaluator_is_accepted_and_refused_by_name(answer_of: Ask) -> None:
    cases = {
        "default": [],
        "both": ["evaluators=[answers,lengths]"],
        "other order": ["evaluators=[lengths,answers]", "evaluators.lengths.max_new_tokens=7"],
        "none": ["evaluators=[]"],
        "own rule": ["evaluators=[lengths]", "evaluators.lengths.max_new_tokens=0"],
        "wrong key": ["evaluators=[lengths]", "evaluators.lengths.tokens=1"],
        "not chosen": ["evaluators.lengths.max_new_tokens=7"],
        "unknown": ["evaluators=[answers,speed]"],
        "no list": ["evaluators=speed"],
    }
    told = dict(zip(cases, answer_of(LOAD, list(cases.values())), strict=True))

    assert told["default"] == ["answers"]
    assert told["both"] == ["answers", "lengths"]
    assert told["other order"] == ["lengths", "answers"]
    assert told["none"] == []
    assert told["own rule"] == "evaluators.lengths.max_new_tokens must be >= 1, got 0. It counts tokens."
    assert "evaluators.lengths.tokens is not a setting" in told["wrong key"]
    assert "evaluators.lengths.max_new_tokens is not a setting" in told["not chosen"]
    assert told["unknown"] == "evaluators must hold some of answers, lengths, none, got speed."
    assert told["no list"].startswith("evaluators must be one of answers, lengths, none, got 'speed'.")


@pytest.mark.slow
def test_two_evaluators_both_tell_their_scores_and_the_first_chooses_the_best_round(
    answer_of: Ask,
    run: Callable[..., Path],
    overrides: Callable[..., list[str]],
    lines: Callable[[Path, str], list[dict[str, Any]]],
    tmp_path: Path,
) -> None:
    settings = ("fl.rounds=4", "server_optimizer.lr=0.05", "evaluation.every_rounds=1", "evaluation.best_by=value")
    alone = run(*settings, "partition.holdout=0.25")
    both = tmp_path / "both"
    lengths = ("evaluators=[lengths,answers]", "evaluators.lengths.max_new_tokens=6", "partition.holdout=0.25")

    sizes, again = answer_of(RUN, [overrides(*settings, *lengths), str(both)])

    told, alone_told = lines(both, "metrics.jsonl"), lines(alone, "metrics.jsonl")
    scores = {name: [s for s in told if s.get("evaluator") == name] for name in ("answers", "lengths")}
    wanted = [s for s in alone_told if s.get("evaluator") == "answers" and s.get("split") != "test"]
    kept = ("kind", "split", "round", "metric", "value", "loss", "num_examples", "per_class")
    assert [{k: s.get(k) for k in kept} for s in scores["answers"] if s.get("split") != "test"] == [
        {k: s.get(k) for k in kept} for s in wanted
    ]  # another evaluator beside it changes no number
    assert [line["chain"] for line in lines(both, "public.jsonl")] == [
        line["chain"] for line in lines(alone, "public.jsonl")
    ]
    dev = {s["round"]: s["value"] for s in scores["lengths"] if s.get("split") == "dev"}
    summary = told[-1]
    assert sorted(dev) == [0, 1, 2, 3, 4]
    assert summary["best_round"] == min(dev, key=lambda done: (dev[done], done))  # fewer characters are better
    (after,) = [s for s in scores["lengths"] if s.get("split") == "test" and s["round"] == summary["best_round"]][-1:]
    assert after["value"] == pytest.approx(sum(sizes) / len(sizes))
    assert after["numbers"] == {"empty": pytest.approx(sizes.count(0) / len(sizes))}
    assert summary["after"] == after
    assert again["lengths"]["value"] == after["value"]
    assert list(again) == ["lengths", "answers"]

    federated = {s["evaluator"]: s for s in told if s["kind"] == "federated_score"}
    assert list(federated) == ["lengths", "answers"]
    own = federated["lengths"]
    assert own["value"] == pytest.approx(sum(c["value"] * c["num_examples"] for c in own["clients"]) / 16)
    assert own["worst_client"] == max(client["value"] for client in own["clients"])
    assert summary["worst_client"]["value"] == own["worst_client"]
    assert own["message_up_bytes"] > 0  # both travel in one message, which is counted once
    assert federated["answers"]["message_up_bytes"] == 0

    page = (both / "report.html").read_text()
    for text in ("Scores by evaluator", "Characters over rounds", "Accuracy over rounds", "Characters per client"):
        assert text in page
    assert {"score.svg", "score-answers.svg", "federated-answers.svg"} <= {p.name for p in (both / "figures").iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("kill", [["score", "answers", 2], ["federated_score", "answers", 3]], ids=["dev", "federated"])
def test_a_run_killed_between_two_evaluators_tells_each_score_once(
    run_program: Callable[[str, object], tuple[int, str]],
    overrides: Callable[..., list[str]],
    lines: Callable[[Path, str], list[dict[str, Any]]],
    tmp_path: Path,
    kill: list[object],
) -> None:
    settings = overrides("evaluators=[answers,lengths]", "partition.holdout=0.25")
    folder = tmp_path / "killed"

    assert run_program(KILLED, [settings, str(folder), kill])[0] < 0
    assert lines(folder, "metrics.jsonl")[-1]["evaluator"] == "answers"
    code, said = run_program(KILLED, [settings, str(folder), None])
    assert code == 0, said

    told = [line for line in lines(folder, "metrics.jsonl") if "evaluator" in line]
    taken = [(line["evaluator"], line.get("split"), line["round"]) for line in told]
    assert len(taken) == len({*taken})
    for name in ("answers", "lengths"):
        assert {(split, done) for who, split, done in taken if who == name} >= {
            *(("dev", done) for done in (0, 2, 3)),
            ("test", 0),
            (None, 3),
        }


def test_without_evaluators_nothing_is_scored_and_the_last_round_is_the_best(
    run: Callable[..., Path], lines: Callable[[Path, str], list[dict[str, Any]]]
) -> None:
    folder = run("evaluators=[]", "partition.holdout=0.25")

    told = lines(folder, "metrics.jsonl")
    assert {line["kind"] for line in told} == {"setup", "round", "summary"}
    assert [told[-1][name] for name in ("best_round", "before", "after", "worst_client")] == [3, None, None, None]
    assert evaluate_run(folder, split="test") == {}
