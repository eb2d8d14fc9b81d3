"""``fedzo perplexity`` on a tiny model and on a sketch, beside transformers' own loss."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fedzo.cli import main
from fedzo.testing.tiny_models import save_tiny_model, save_tiny_sketch


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "One day a fox"}\n{"text": " met a crow.\\n"}\n', encoding="utf-8")
    return file


@pytest.mark.parametrize("save", [save_tiny_model, save_tiny_sketch])
def test_windows_tokens_and_value_are_printed_and_nothing_else(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str], save: Callable[[Path], Path]
) -> None:
    folder = save(tmp_path / "any")
    whole = b"One day a fox met a crow.\n"
    ids = torch.tensor([3 + byte for byte in whole[:24]]).view(3, 8)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.inference_mode():
        losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in ids]

    assert main(["perplexity", "--text", str(text), "--tokens", "8", f"model={folder}", "device=cpu"]) == 0

    printed = json.loads(capsys.readouterr().out)
    assert printed == {
        "model": str(folder),
        "text": str(text),
        "windows": 3,
        "tokens": 21,
        "perplexity": pytest.approx(math.exp(sum(losses) / 3), rel=1e-5),
    }


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (None, [], "--text must name a file, got no such file at "),
        (b"", [], "a.txt: must hold text, got 1 documents without any. Give another file."),
        (b" \n\n", [], "a.txt: must hold text, got 1 documents without any."),
        (b"short", [], "a.txt: must hold at least 1 x 512 tokens (windows x their length), got 5 tokens of 1 doc"),
        (b"x" * 50, ["--tokens", "9", "--windows", "6"], "a.txt: must hold at least 6 x 9 tokens "),
        (b"x" * 600, ["--tokens", "513"], "a window must have at least 2 tokens and at most 512, "),
        (b"\xff\xfe", [], "a.txt:1: text must be UTF-8"),
        (b"x", ["--tokens", "0"], "argument --tokens: must be a whole number >= 1, got '0'"),
    ],
)
def test_a_text_that_cannot_be_measured_on_is_refused(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes | None,
    arguments: list[str],
    message: str,
) -> None:
    file = tmp_path / "a.txt"
    if content is not None:
        file.write_bytes(content)

    try:
        code = main(["perplexity", "--text", str(file), f"model={folder}", "device=cpu", *arguments])
    except SystemExit as stop:  # argparse's own
        code = int(str(stop.code))

    assert code == 2
    assert message in capsys.readouterr().err


def test_what_only_a_training_rules_out_is_no_matter(
    folder: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Packed weights cannot be trained, and measuring them is what the command is for."""
    asked: list[str] = []
    measured = {"perplexity": 1.5}
    monkeypatch.setattr(
        "fedzo.commands.perplexity.measure_perplexity",
        lambda config, *_, **__: asked.append(str(config.model.quantization)) or measured,
    )

    assert main(["perplexity", "--text", str(text), f"model={folder}", "model.quantization=nf4"]) == 0
    assert (asked, json.loads(capsys.readouterr().out)) == (["nf4"], measured)
