"""Runs on models and tokenizers that are not like most: without attention, or with an end after every text."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedzo.commands.generate import generate_run
from fedzo.commands.replay import replay_run
from fedzo.commands.run_folder import rebuild
from fedzo.errors import ConfigError
from fedzo.testing.tiny_models import WITHOUT_ATTENTION, byte_tokenizer, save_tiny_model

Run = Callable[..., Path]


@pytest.mark.parametrize("family", WITHOUT_ATTENTION)
@pytest.mark.parametrize("trainer", ["meerkat", "mezo", "norms"])
def test_a_model_without_attention_trains_and_replays(
    run: Run, lines: Callable[..., list[dict[str, Any]]], tmp_path: Path, family: str, trainer: str
) -> None:
    model = save_tiny_model(tmp_path / family, family)

    folder = run(f"model={model}", f"trainer={trainer}", "server_optimizer.lr=0.01")

    scalars = [client["g"] for line in lines(folder, "audit.jsonl") for client in line["clients"]]
    assert len(scalars) == 3 * 4
    assert np.all(np.asarray(scalars) != 0)
    assert replay_run(folder)["rounds"] == 3
    moved, base = (rebuild(folder, rounds=n).process.peer.loaded.model.state_dict() for n in (3, 0))
    assert any(not torch.equal(moved[name], base[name]) for name in base)


@pytest.mark.parametrize("trainer", ["prefix", "prompt"])
@pytest.mark.parametrize("family", WITHOUT_ATTENTION)
def test_virtual_tokens_that_a_model_does_not_read_are_refused(
    run: Run, tmp_path: Path, family: str, trainer: str
) -> None:
    model = save_tiny_model(tmp_path / family, family)
    if (family, trainer) == ("mamba2", "prompt"):
        run(f"model={model}", f"trainer={trainer}")  # it has heads, and reads embeddings before its text
        return

    with pytest.raises(ConfigError, match=r"trainer: a \w+ForCausalLM must be a model that can have an adapter"):
        run(f"model={model}", f"trainer={trainer}")


def test_generating_goes_on_from_a_prompt_whatever_the_tokenizer_ends_a_text_with(
    run: Run, tiny_model_dir: Path, tmp_path: Path
) -> None:
    ending = Path(shutil.copytree(tiny_model_dir, tmp_path / "ending"))
    byte_tokenizer(add_eos=True).save_pretrained(ending)

    texts = [
        generate_run(
            run(f"model={model}", "fl.rounds=1", "server_optimizer.lr=1e-9"), ["item 1 is", "x"], max_new_tokens=6
        )
        for model in (tiny_model_dir, ending)
    ]

    assert texts[0] == texts[1]
    assert any(texts[0])


def test_a_text_with_a_token_that_has_no_row_is_named_before_the_first_round(
    run: Run, tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    beyond = Path(shutil.copytree(tiny_model_dir, tmp_path / "beyond"))
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<filler{i}>" for i in range(512 - len(tokenizer))])
    tokenizer.add_tokens(["item"])
    tokenizer.save_pretrained(beyond)

    words = (
        "every token must have a row of the model's embedding, which has 512, but the text holds the token with id 512"
    )
    with pytest.raises(ConfigError, match=f"calibration text: {words}"):
        run(f"model={beyond}", "trainer=meerkat")
    with pytest.raises(ConfigError, match="its rows cannot be read or encoded"):  # which and why: the site's own log
        run(f"model={beyond}", "trainer=mezo")
    assert re.search(rf"row 0, '.*item \d+ is .*': {words}", caplog.text)
