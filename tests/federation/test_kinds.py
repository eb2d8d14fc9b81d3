"""Federations on every kind of task and every family of model, end to end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LogitsProcessorList

from fedzo.cli import main
from fedzo.commands.export import export_run
from fedzo.commands.generate import generate_run
from fedzo.commands.replay import replay_run
from fedzo.testing.tiny_models import FAMILIES, byte_tokenizer

Run = Callable[..., Path]
Lines = Callable[[Path, str], list[dict[str, Any]]]
WRITTEN = ("task.loss=lm", "task.candidates=[]", "task.max_new_tokens=6")
INSTRUCTION = ("task.kind=instruction", "task.template='{prompt}'", "task.answer='{response}'", *WRITTEN)
GENERATION = ("task.kind=generation", "task.template='{prompt}\\nAnswer:'", "task.answer=' {response}'", *WRITTEN)


def question_rows(folder: Path) -> Path:
    folder.mkdir()
    for name, count, offset in (("train", 24, 0), ("dev", 4, 100), ("test", 4, 200)):
        rows = [
            {
                "prompt": f"what is the number of thing {i}?",
                "response": f"it is {i % 5}",
                "answers": {"text": [f"it is {i % 5}", f"{i % 5}"], "answer_start": [0, 6]},
                "talk": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": f"what is the number of thing {i}?"},
                    {"role": "assistant", "content": f"it is {i % 5}"},
                ],
            }
            for i in range(offset, offset + count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(
    ("task", "metric"),
    [
        (("task.kind=generation", "task.template='{prompt}\\nAnswer:'", "task.answer=' {response}'"), "token_f1"),
        (("task.kind=generation", "task.template='{prompt}\\nAnswer:'", "task.answer=' {answers.text}'"), "token_f1"),
        (("task.kind=instruction", "task.template='{prompt}'", "task.answer='{response}'"), "rouge_l"),
        (("task.kind=instruction", "task.template=''", "task.messages=talk"), "rouge_l"),
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
    numbers = ["exact_match"] if metric == "token_f1" else []
    assert [*summary["after"].get("numbers", {})] == [*federated[0].get("numbers", {})] == numbers
    assert replay_run(folder)["digest"] == summary["final_digest"]


def test_rows_that_list_their_own_candidates_are_trained_and_scored(run: Run, lines: Lines, tmp_path: Path) -> None:
    (folder := tmp_path / "rows").mkdir()
    for name, count, offset in (("train", 24, 0), ("dev", 4, 100), ("test", 4, 200)):
        rows = [
            {
                "question": f"what is the number of thing {i}?",
                "choices": {"text": [f"it is {j}" for j in range(2 + i % 3)]},
                "key": "ABCD"[i % (2 + i % 3)],
            }
            for i in range(offset, offset + count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    done = run(
        f"data.path={folder}",
        "task.template='{question}\\nAnswer:'",
        "task.candidates=[' {choices.text}']",
        "task.label=key",
        "task.labels=[A,B,C,D]",
    )

    told = lines(done, "metrics.jsonl")
    summary, setup = told[-1], next(line for line in told if line["kind"] == "setup")
    federated = next(line for line in told if line["kind"] == "federated_score")
    for score in (summary["before"], summary["after"], federated):
        assert (score["metric"], score["per_class"], score["auc"]) == ("accuracy", {}, None)
    assert [client["label_counts"] for client in setup["clients"]] == [{}] * 4
    assert replay_run(done)["digest"] == summary["final_digest"]


def test_an_instruction_run_writes_to_a_prompt_as_to_a_row(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run(
        f"data.path={question_rows(tmp_path / 'rows')}",
        *INSTRUCTION,
        "fl.rounds=1",
    )
    asked: list[tuple[int, ...]] = []

    def written(loaded: object, prompts: list[tuple[int, ...]], **settings: object) -> list[str]:
        asked.extend(prompts)
        assert settings["ends"] == {2}  # <eos>
        return ["it is 3"]

    monkeypatch.setattr("fedzo.commands.generate.generate", written)

    assert generate_run(folder, ["what?"], max_new_tokens=6) == ["it is 3"]
    assert list(asked[0]) == byte_tokenizer()("<bos>user\nwhat?<eos>\n<bos>assistant\n")["input_ids"]


@pytest.mark.parametrize(
    ("system", "begin", "told"),
    [
        ("Be brief.", "<bos>system\nBe brief.<eos>\n", []),
        ("Of {prompt}.", "", ["task.system of this run holds columns of its rows (prompt), which a prompt has not"]),
    ],
)
def test_a_prompt_is_asked_behind_the_system_message_of_the_run_unless_each_row_has_its_own(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    system: str,
    begin: str,
    told: list[str],
) -> None:
    folder = run(
        f"data.path={question_rows(tmp_path / 'rows')}",
        *INSTRUCTION,
        f"task.system='{system}'",
        "fl.rounds=1",
    )
    asked: list[tuple[int, ...]] = []

    def written(loaded: object, prompts: list[tuple[int, ...]], **settings: object) -> list[str]:
        asked.extend(prompts)
        return ["it is 3"]

    monkeypatch.setattr("fedzo.commands.generate.generate", written)
    caplog.clear()

    assert generate_run(folder, ["what?"], max_new_tokens=6) == ["it is 3"]
    assert list(asked[0]) == byte_tokenizer()(f"{begin}<bos>user\nwhat?<eos>\n<bos>assistant\n")["input_ids"]
    warnings = [record.getMessage() for record in caplog.records if record.name == "fedzo.commands.generate"]
    assert [warning.partition(". So")[0] for warning in warnings] == told


def test_a_run_of_generation_writes_the_line_that_its_score_reads(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run(
        f"data.path={question_rows(tmp_path / 'rows')}",
        *GENERATION,
        "fl.rounds=1",
    )
    written = byte_tokenizer()(" it is 3\nand more")["input_ids"]
    monkeypatch.setattr("fedzo.models.generate.generate_tokens", lambda *given, **settings: [written])

    assert generate_run(folder, ["what?\nAnswer:"], max_new_tokens=32) == ["it is 3"]


ENDS_WITH_BOS = (
    "{% for message in messages %}{{ message.role }}\n{{ message.content }}<bos>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% endif %}"
)
"""Ends a turn with another token than the tokenizer and the model name, as templates of base models do."""


@pytest.mark.parametrize("trainer", ["meerkat", "tables"])
def test_an_exported_instruction_run_stops_where_its_answers_end(
    run: Run, tmp_path: Path, save_model_for: Callable[..., Path], trainer: str
) -> None:
    model, tokenizer = save_model_for(trainer, tmp_path / "model"), byte_tokenizer(chat=False)
    tokenizer.chat_template = ENDS_WITH_BOS
    tokenizer.save_pretrained(model)
    generation = model / "generation_config.json"
    odd = {"temperature": 0.6}  # without do_sample, as checkpoints are published
    generation.write_text(json.dumps(json.loads(generation.read_text()) | odd))
    folder = run(
        f"model={model}",
        f"trainer={trainer}",
        f"data.path={question_rows(tmp_path / 'rows')}",
        *INSTRUCTION,
        "fl.rounds=1",
    )

    out = AutoModelForCausalLM.from_pretrained(export_run(folder, tmp_path / "out"))

    def ends_the_turn(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -1e9).index_fill(1, torch.tensor([1]), 0.0)

    made = LogitsProcessorList([ends_the_turn])
    written = out.generate(torch.tensor([[65, 66]]), max_new_tokens=4, do_sample=False, logits_processor=made)
    assert written.tolist() == [[65, 66, 1]]
    assert out.generation_config.eos_token_id == [1, 2]
    assert out.generation_config.temperature == 0.6


def test_an_exported_run_of_generation_stops_at_the_line_s_end(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(
        f"data.path={question_rows(tmp_path / 'rows')}",
        *GENERATION,
        "fl.rounds=1",
    )
    newline, prompt = 3 + ord("\n"), "what?\nAnswer:"

    out = export_run(folder, tmp_path / "out")

    def ends_the_line(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -1e9).index_fill(1, torch.tensor([newline]), 0.0)

    model, made = AutoModelForCausalLM.from_pretrained(out), LogitsProcessorList([ends_the_line])
    written = model.generate(torch.tensor([[65, 66]]), max_new_tokens=4, do_sample=False, logits_processor=made)
    assert written.tolist() == [[65, 66, newline]]
    assert model.generation_config.eos_token_id == [2, newline]

    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": prompt}) + "\n")
    tokens = byte_tokenizer()(" it is 3\nand more")["input_ids"]
    monkeypatch.setattr("fedzo.models.generate.generate_tokens", lambda *given, **settings: [tokens])
    capsys.readouterr()
    assert main(["generate", "--model", str(out), "--prompts", str(tmp_path / "rows.jsonl")]) == 0
    assert json.loads(capsys.readouterr().out)["answer"] == "it is 3"
    assert generate_run(folder, [prompt], max_new_tokens=32) == ["it is 3"]


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
