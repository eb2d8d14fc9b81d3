"""``fedzo export``: other libraries load what is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedzo.commands.export import export_run
from fedzo.commands.run_folder import rebuild
from fedzo.errors import ConfigError

Run = Callable[..., Path]
IDS = torch.arange(24).reshape(2, 12)


@pytest.mark.parametrize("trainer", ["meerkat", "mezo", "norms", "tables"])
def test_an_exported_model_is_the_tuned_one_for_plain_transformers(run: Run, tmp_path: Path, trainer: str) -> None:
    folder = run(f"trainer={trainer}", "server_optimizer.lr=0.01", "evaluation.central=false")

    out = export_run(folder, tmp_path / "out")

    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    tuned = rebuild(folder).process.peer.loaded
    base = rebuild(folder, rounds=0).process.peer.loaded
    with torch.inference_mode():
        logits = model.eval()(input_ids=IDS).logits
        assert torch.equal(logits, tuned.model(input_ids=IDS).logits)
        assert not torch.equal(logits, base.model(input_ids=IDS).logits)
    assert model.config.use_cache
    assert not tuned.model.config.use_cache
    assert tokenizer.encode("some text") == tuned.tokenizer.encode("some text")
    for taken in (out, out / "config.json"):
        with pytest.raises(ConfigError, match="OUT must be a new or empty folder"):
            export_run(folder, taken)
