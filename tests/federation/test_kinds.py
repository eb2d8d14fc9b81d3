"""Federations on every kind of task and every family of model, end to end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedzo.commands.trained import generate_run, replay_run
from fedzo.testing.tiny_models import FAMILIES, byte_tokenizer

Run = Callable[..., Path]
Lines = Callable[[Path, str], list[dict[str, Any]]]


def question_rows(folder: Path) -> Path:
    folder.mkdir()
    for name, count, offset in (("train", 24, 0), ("dev", 4, 100), ("test", 4, 200)):
        rows = [
            {"prompt": f"what is the number of thing {i}?", "response": f"it is {i % 5}"}
            for i in range(offset, offset + count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(
    ("task", "metric"),
    [
        (("task.kind=generation", "task.template='{prompt}\\nAnswer:'", "task.answer=' {response}'"), "token_f1"),
        (("task.kind=instruction", "task.template='{prompt}'", "task.answer='{response}'"), "rouge_l"),
    ],
)
def test_answers_that_a_model_writes_are_trained_and_scored(
    run: Run, lines: Lines, tmp_path: Path, task: tuple[str, ...], metric: str
) -> None:
    folder = run(
        f"data.path={question_rows(tmp_path / 'rows')}",
        "task.loss=lm",
        "task.candidates=[]",
        "task.max_new_tokens=6",
        *task,
    )

    summary = lines(folder, "metrics.jsonl")[-1]
    federated = [line for line in lines(folder, "metrics.jsonl") if line["kind"] == "federated_score"]
    assert summary["before"]["metric"] == summary["after"]["metric"] == metric
    assert federated[0]["metric"] == metric
    assert replay_run(folder)["digest"] == summary["final_digest"]


def test_an_instruction_run_writes_to_a_prompt_as_to_a_row(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run(
        f"data.path={question_rows(tmp_path / 'rows')}",
        "task.kind=instruction",
        "task.template='{prompt}'",
        "task.answer='{response}'",
        "task.loss=lm",
        "task.candidates=[]",
        "task.max_new_tokens=6",
        "fl.rounds=1",
    )
    asked: list[tuple[int, ...]] = []

    def written(loaded: object, prompts: list[tuple[int, ...]], **settings: object) -> list[str]:
        asked.extend(prompts)
        assert settings["ends"] == {2}  # <eos>
        return ["it is 3"]

    monkeypatch.setattr("fedzo.commands.trained.generate", written)

    assert generate_run(folder, ["what?"], max_new_tokens=6) == ["it is 3"]
    assert list(asked[0]) == byte_tokenizer()("<bos>user\nwhat?<eos>\n<bos>assistant\n")["input_ids"]


@pytest.mark.parametrize("trainer", ["meerkat", "mezo", "tables"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "llama"])
def test_every_family_of_models_runs_and_replays(
    run: Run, lines: Lines, tmp_path: Path, family: str, trainer: str, save_model_for: Callable[..., Path]
) -> None:
    model = save_model_for(trainer, tmp_path / family, family)

    folder = run(f"model={model}", f"trainer={trainer}", "fl.rounds=2", "server_optimizer.lr=1e-3")

    public = lines(folder, "public.jsonl")
    assert replay_run(folder)["digest"] == public[-1]["digest"]
    assert public[0]["c"][0][0][0] != 0


def test_a_language_model_loss_trains_on_the_right_answer_s_tokens(run: Run, lines: Lines) -> None:
    folder = run("task.loss=lm", "fl.rounds=1")

    first = next(line for line in lines(folder, "metrics.jsonl") if line["kind"] == "round")
    assert first["loss"] > 3  # about log of the vocabulary, where two candidates would be log 2
