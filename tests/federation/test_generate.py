"""``fedzo generate``, by a run or a model: rows of several users in one batch answer as separate runs would."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedzo.cli import main
from fedzo.commands import generate as command
from fedzo.commands.generate import generate_run
from fedzo.commands.run_folder import rebuild
from fedzo.data.encode import encode_prompts
from fedzo.models.config import ModelConfig
from fedzo.models.generate import generate
from fedzo.models.load import load_model
from fedzo.models.loaded import LoadedModel
from fedzo.models.sketched.table_file import write_tables
from fedzo.sketch import sketched_layers, tables_of
from fedzo.testing.tiny_models import byte_tokenizer, save_tiny_model, save_tiny_sketch, tiny_model

Run = Callable[..., Path]
Greedy = Callable[[LoadedModel, str, int], str]
PROMPTS = ["the cat", "a dog sat on", "one", "two and three", "the cat", "what is it"]
WHOSE = ["a", "b", "", "a", "b", "a"]


def moved(loaded: LoadedModel, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: table.detach() + 0.05 * torch.randn(table.shape, generator=generator)
        for name, table in tables_of(loaded.model).items()
    }


@pytest.fixture(params=["llama", "gpt2"])
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with a sketch, the tables of two users, and rows that ask."""
    loaded = load_model(ModelConfig(name=str(save_tiny_sketch(tmp_path / "sk", request.param))))
    for seed, name in enumerate("ab"):
        write_tables(tmp_path / f"{name}.safetensors", moved(loaded, seed), base_digest=loaded.base_digest)
    rows = [{"prompt": prompt, "tables": whose or None} for prompt, whose in zip(PROMPTS, WHOSE, strict=True)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def ask(folder: Path, *more: str) -> list[str]:
    tables = ",".join(str(folder / f"{name}.safetensors") for name in "ab")
    rows = str(folder / "rows.jsonl")
    return ["generate", "--model", str(folder / "sk"), "--prompts", rows, "--tables", tables, *more]


def test_generating_with_a_run_is_greedy_decoding_of_its_model(finished: Run, greedy_answer: Greedy) -> None:
    folder = finished()

    (text,) = generate_run(folder, ["Text: a thing\nVerdict:"], max_new_tokens=5)

    loaded = rebuild(folder).process.peer.loaded
    assert text == greedy_answer(loaded, "Text: a thing\nVerdict:", 5)


def test_a_run_answers_in_forwards_that_fit_into_memory(finished: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def answers(loaded: LoadedModel, ids: list[tuple[int, ...]], **settings: object) -> list[str]:
        sizes.append(settings["tokens_per_batch"])
        return ["" for _ in ids]

    folder = finished()  # before the memory is short: other tests use this run, too
    monkeypatch.setattr("fedzo.commands.generate.generate", answers)
    monkeypatch.setattr("fedzo.run.peer.fitting_tokens_per_batch", lambda *_, wanted, **__: wanted // 16)

    generate_run(folder, ["the cat"], max_new_tokens=5)

    assert sizes == [256]


def test_a_mixed_batch_answers_as_separate_runs_would(served: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(ask(served, "--max-new-tokens", "12")) == 0

    first, *lines = capsys.readouterr().out.splitlines()
    answers = [json.loads(line) for line in lines]
    assert [(row["prompt"], row["tables"] or "") for row in answers] == list(zip(PROMPTS, WHOSE, strict=True))
    for seed, name in ((0, "a"), (1, "b"), (None, "")):
        alone = load_model(ModelConfig(name=str(served / "sk")))
        if seed is not None:
            for own, table in moved(alone, seed).items():
                tables_of(alone.model)[own].data.copy_(table)
        for row in answers:
            if (row["tables"] or "") == name:
                ids = encode_prompts([row["prompt"]], alone.tokenizer)
                assert generate(alone, ids, max_new_tokens=12, tokens_per_batch=999) == [row["answer"]]
    assert answers[0]["answer"] != answers[4]["answer"]  # the same prompt of two users
    entries = sum(table.numel() for table in tables_of(alone.model).values())
    assert re.match(rf"2 users: {4 * entries / 1000:.0f}(\.\d)? kB each for tables, beside one model of", first)


def test_a_dense_model_answers_rows_without_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny_model(tmp_path / "dense")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "the cat"}\n')

    assert main(["generate", "--model", str(model), "--prompts", str(tmp_path / "rows.jsonl")]) == 0

    assert json.loads(capsys.readouterr().out)["tables"] is None


def test_a_prompt_is_refused_rather_than_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, rows = save_tiny_model(tmp_path / "model", "gpt2"), tmp_path / "rows.jsonl"  # 512 positions
    rows.write_text('{"prompt": "the cat"}\n')

    assert main(["generate", "--model", str(model), "--prompts", str(rows), "--max-new-tokens", "510"]) == 2

    said = capsys.readouterr().err
    assert "prompt 0 must fit into the model's 512 positions together with 510 tokens of an answer, got 7 tok" in said
    assert "Traceback" not in said


def test_the_weights_are_of_the_dtype_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = save_tiny_model(tmp_path / "dense"), tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "the cat"}\n')
    dtypes = []

    def answers(loaded: LoadedModel, ids: list[list[int]], **_: object) -> list[str]:
        dtypes.append(next(loaded.model.parameters()).dtype)
        return ["" for _ in ids]

    monkeypatch.setattr("fedzo.commands.generate.generate", answers)

    for words in ([], ["--dtype", "bfloat16"]):
        assert main(["generate", "--model", str(model), "--prompts", str(rows), *words]) == 0

    assert dtypes == [torch.float32, torch.bfloat16]


def test_prompts_of_a_chat_go_through_the_chat_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, rows = save_tiny_model(tmp_path / "chat"), tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "the cat"}\n')
    asked = []

    def answers(loaded: LoadedModel, ids: list[tuple[int, ...]], **settings: object) -> list[str]:
        asked.append(([list(tokens) for tokens in ids], settings["ends"]))
        return ["" for _ in ids]

    monkeypatch.setattr("fedzo.commands.generate.generate", answers)

    for words in ([], ["--chat"]):
        assert main(["generate", "--model", str(model), "--prompts", str(rows), *words]) == 0

    plain, chat = byte_tokenizer()(["the cat", "<bos>user\nthe cat<eos>\n<bos>assistant\n"])["input_ids"]
    assert asked == [([plain], set()), ([chat], {2})]  # <eos>
    tiny_model().save_pretrained(tmp_path / "plain")
    byte_tokenizer(chat=False).save_pretrained(tmp_path / "plain")
    assert main(["generate", "--model", str(tmp_path / "plain"), "--prompts", str(rows), "--chat"]) == 2
    assert re.search(
        r"--chat: the tokenizer of '.*plain' must have a chat template, but has none\. Leave it out",
        capsys.readouterr().err,
    )


def test_a_chat_template_that_does_not_take_a_prompt_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer, rows = byte_tokenizer(), tmp_path / "rows.jsonl"
    tokenizer.chat_template = "{{ raise_exception('A system message must come first') }}"
    tokenizer.save_pretrained(save_tiny_model(tmp_path / "chat"))
    rows.write_text('{"prompt": "the cat"}\n')

    assert main(["generate", "--model", str(tmp_path / "chat"), "--prompts", str(rows), "--chat"]) == 2

    said = capsys.readouterr().err
    assert re.search(
        r"chat template must take a text of the user alone, but raises TemplateError: A system message must come "
        r"first\. Choose another model or chat template, or leave out --chat\.",
        said,
    )
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"prompt": "x", "tables": "c"},
            r"rows\.jsonl.*'tables' must name a file of --tables \(a, b\), got 'c'\. Give its file with",
        ),
        ({"prompt": "", "tables": "a"}, r"rows\.jsonl.*column 'prompt' must hold text, got ''"),
        ({"tables": "a"}, r"column 'prompt' must hold text, got None"),
    ],
)
def test_rows_that_cannot_be_answered_are_named(
    row: dict[str, str], expected: str, served: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (served / "rows.jsonl").write_text(json.dumps(row) + "\n")

    assert main(ask(served)) == 2

    assert re.search(expected, capsys.readouterr().err)


def test_a_user_may_be_a_number_or_nobody(tmp_path: Path) -> None:
    whose = [0, 1, "1", " 0 ", None, "", float("nan")]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": "x", "tables": user}) + "\n" for user in whose))

    assert [row.tables for row in command._read(rows, ["0", "1"])] == ["0", "1", "1", "0", "", "", ""]


def test_prompts_that_are_not_there_are_named_by_their_option(served: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (served / "rows.jsonl").unlink()

    assert main(ask(served)) == 2

    assert re.search(
        r"--prompts must name a file, got no such file at '.*rows\.jsonl'\. Check the path\.", capsys.readouterr().err
    )


def test_a_sketched_layer_that_sees_chosen_tokens_is_one_message(
    served: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As experts do that a router gives tokens."""

    def routed(config: ModelConfig) -> LoadedModel:
        loaded = load_model(config)
        next(iter(sketched_layers(loaded.model).values())).register_forward_pre_hook(
            lambda _, args: (args[0].reshape(-1, args[0].shape[-1])[1:],)
        )
        return loaded

    monkeypatch.setattr("fedzo.commands.generate.load_model", routed)
    rows = [{"prompt": "the cat", "tables": name} for name in "ab"]
    (served / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(ask(served)) == 2

    said = capsys.readouterr().err
    assert re.search(r"--tables: each sketched layer of '.*' must see all rows of a batch, but an input of shape", said)
    assert "Export each user's sketch by `fedzo export RUN OUT`" in said
    assert "Traceback" not in said


def test_tables_need_their_own_sketch(served: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = ask(served)
    other[2] = str(save_tiny_sketch(tmp_path / "other", "llama", bits=3))
    assert main(other) == 2
    assert "Name the sketch on which they were trained" in capsys.readouterr().err
    other[2] = str(save_tiny_model(tmp_path / "plain"))
    assert main(other) == 2
    assert "must be a sketch, but is dense" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["generate"],
        ["generate", "--model", "m"],
        ["generate", "run", "hello", "--model", "m"],
        ["generate", "run"],
        ["generate", "run", "hello", "--dtype", "bfloat16"],
        ["generate", "run", "hello", "--chat"],
    ],
)
def test_the_two_ways_are_told_apart(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2

    assert "fedzo generate" in capsys.readouterr().err
