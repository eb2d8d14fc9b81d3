"""``task.loss=score``: a step measures an evaluator's value, of whatever the model writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedzo.commands.replay import replay_client, replay_run
from fedzo.commands.resume import resume_run
from fedzo.commands.run_folder import rebuild
from fedzo.config.load import load
from fedzo.data.rows import batch_rows
from fedzo.evaluate import EVALUATORS, EvaluatorConfig, Measure
from fedzo.fl.log_store import RunStore
from fedzo.models.generate import generate
from fedzo.models.loaded import LoadedModel
from fedzo.run import federation
from fedzo.run.start import open_run
from fedzo.trainers import TrainerContext
from fedzo.zo.directions import stream_key

Run = Callable[..., Path]
Lines = Callable[[Path, str], list[dict[str, Any]]]
NEW_TOKENS = 6
WRITTEN = (
    "task.loss=score",
    "task.kind=generation",
    "task.template='{prompt}\\nAnswer:'",
    "task.answer=' {response}'",
    "task.candidates=[]",
    f"task.max_new_tokens={NEW_TOKENS}",
)
FAR = ("estimator.eps=1.0", "server_optimizer.lr=0.1")
"""Probes so far apart that the model writes other texts."""


@dataclass(kw_only=True, slots=True)
class EvenConfig(EvaluatorConfig):
    """Theirs."""


class Even:
    """The mean number of an answer's characters that have an even number."""

    def measure(self, task: Any) -> Measure:
        return Measure(metric="even", high=100.0)

    def evaluate(self, loaded: LoadedModel, examples: Any, task: Any, *, tokens_per_batch: int, **rest: Any) -> Any:
        texts = generate(
            loaded,
            [example.generation_prompt for example in examples],
            max_new_tokens=task.max_new_tokens,
            tokens_per_batch=tokens_per_batch,
        )
        return self.measure(task).score(np.mean([num_even(text) for text in texts]), num_examples=len(texts))


def num_even(text: str) -> int:
    return sum(ord(character) % 2 == 0 for character in text)


def slow_answer(loaded: LoadedModel, prompt: Sequence[int]) -> str:
    """A forward over the whole text for each token: no cache, no batch, no padding."""
    ids = list(prompt)
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            ids.append(int(loaded.model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == loaded.tokenizer.eos_token_id:
            break
    text: str = loaded.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
    return text.strip()


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    (folder := tmp_path / "rows").mkdir()
    for name, count, offset in (("train", 24, 0), ("dev", 4, 100), ("test", 4, 200)):
        made = [
            {"prompt": f"what is the number of thing {i}?", "response": f"it is {i % 5}"}
            for i in range(offset, offset + count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return folder


@pytest.fixture
def scored(register: Callable[..., None], run: Run, rows: Path) -> Run:
    """Run a federation that is trained and scored by a plugin."""
    register("evaluators", "even", EVALUATORS, EvenConfig, lambda config: Even())
    return lambda *extra: run(f"data.path={rows}", *WRITTEN, "evaluators=[even]", *extra)


@pytest.mark.parametrize(("trainer", "eps", "lr"), [("meerkat", 1.0, 0.1), ("mezo", 0.1, 1e-3)])
def test_a_scalar_is_the_difference_of_what_is_written_on_both_sides(
    scored: Run, lines: Lines, trainer: str, eps: float, lr: float
) -> None:
    folder = scored(f"trainer={trainer}", f"estimator.eps={eps}", f"server_optimizer.lr={lr}")

    side, found = float(np.float32(eps)), list[float]()
    for done, line in enumerate(lines(folder, "audit.jsonl")):
        built = rebuild(folder, rounds=done)
        loaded, space = built.process.peer.loaded, built.replica.space
        assert [entry["client"] for entry in line["clients"]] == [0, 1, 2, 3]
        for entry in line["clients"]:
            client = entry["client"]
            train = built.process.client.data(client).train
            picked = batch_rows(run_seed=0, client=client, used=done, batch_size=2, num_rows=len(train))
            values = []
            for scale in (side, -side):
                with space.probe(scale, stream_key(0, round=done)):
                    answers = [slow_answer(loaded, train[row].generation_prompt) for row in picked]
                values.append(np.mean([num_even(answer) for answer in answers]))
            plus, minus = values
            # more is better, so the loss is minus the value
            assert entry["g"] == [[pytest.approx((minus - plus) / (2 * side), rel=1e-6)]]
            assert entry["loss"] == [[pytest.approx(-(plus + minus) / 2)]]
            found.append(plus - minus)
    assert np.count_nonzero(found) > 0


def test_a_run_that_is_killed_goes_on_as_the_unbroken_one_and_replays(
    scored: Run, lines: Lines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (*FAR, "fl.local_steps=2", "evaluation.every_rounds=0")
    unbroken, commit = scored(*settings), RunStore.commit

    def dies(self: RunStore, record: Any, **kwargs: Any) -> None:
        if record.round == 2:
            raise KeyboardInterrupt
        commit(self, record, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(RunStore, "commit", dies)
        with pytest.raises(KeyboardInterrupt):
            scored(*settings)
    broken = tmp_path / "run1"
    assert len(lines(broken, "public.jsonl")) == 2
    resume_run(broken)

    for name in ("public.jsonl", "audit.jsonl"):
        assert (broken / name).read_bytes() == (unbroken / name).read_bytes()
    assert replay_run(unbroken)["digest"] == lines(unbroken, "public.jsonl")[-1]["digest"]
    path = replay_client(unbroken, client=1, round=2)
    assert (len(path.checks), path.checked) == (2, True)


def test_where_clients_may_share_forwards_each_value_is_measured_alone(scored: Run) -> None:
    settings = (*FAR, "fl.local_steps=2", "fl.rounds=2")
    alone, together = scored(*settings), scored(*settings, "runtime.batch_clients=true")

    assert (together / "audit.jsonl").read_bytes() == (alone / "audit.jsonl").read_bytes()


def test_token_f1_is_trained_and_chooses_the_best_round(
    run: Run, rows: Path, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    estimate = federation.estimate_run
    monkeypatch.setattr(federation, "estimate_run", lambda at, **given: asked.append(given) or estimate(at, **given))

    folder = run(f"data.path={rows}", *WRITTEN, *FAR, "evaluation.every_rounds=1")

    told = lines(folder, "metrics.jsonl")
    losses = [line["loss"] for line in told if line["kind"] == "round"]
    assert len(losses) == 3
    assert all(-1 <= loss <= 0 for loss in losses)
    dev = {line["round"]: line["value"] for line in told if line["kind"] == "score" and line["split"] == "dev"}
    summary = told[-1]
    assert summary["best_round"] == min(dev, key=lambda done: (-dev[done], done))
    assert (summary["after"]["metric"], summary["after"]["loss"]) == ("token_f1", None)
    assert json.loads((folder / "config.json").read_text())["evaluation"]["best_by"] == "value"
    assert replay_run(folder)["digest"] == summary["final_digest"]
    (given,) = asked
    times, examples = given["scored"][-1]
    assert (given["forwards_per_step"], times, len(examples)) == (0, 3 * 4 * 2, 2)  # rounds, clients, sides; rows


@pytest.mark.parametrize(("loss", "kept"), [("candidates", True), ("score", False)])
def test_steps_by_scores_keep_nothing_of_the_lower_blocks(
    overrides: Callable[..., list[str]], tmp_path: Path, loss: str, kept: bool
) -> None:
    config = load(overrides("trainer.first_layer=1", f"task.loss={loss}"))
    peer = open_run(config, tmp_path).peer
    context = TrainerContext(folder=tmp_path, seed=config.seed, texts=list)

    workspace = peer.workspace(peer.trainer.prepare(peer.loaded, context).artifact)

    assert (workspace.lower is not None) is kept
