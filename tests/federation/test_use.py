"""What a user does with a finished run: export it, score it, generate with it, mask, read its folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedzo.commands.doctor import doctor
from fedzo.commands.mask import make_mask
from fedzo.commands.run_folder import read_run, rebuild
from fedzo.commands.train import resume_run, start_run
from fedzo.commands.trained import evaluate_run, export_run, generate_run, replay_run
from fedzo.config.load import load
from fedzo.errors import ConfigError, RunFolderError
from fedzo.masks.mask_file import load_mask, save_mask

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


def test_scoring_a_run_again_gives_its_own_score(run: Run, lines: Callable[..., list[dict[str, Any]]]) -> None:
    folder = run("server_optimizer.lr=0.05", "fl.rounds=4")

    again = evaluate_run(folder, split="test")

    after = lines(folder, "metrics.jsonl")[-1]["after"]
    assert {"metric", "value", "loss", "num_examples", "per_class", "auc"} <= again["answers"].keys()
    assert again == {"answers": {name: after[name] for name in again["answers"]}}


def test_every_replay_is_told_as_it_may_take_hours(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """All dev losses are equal, so the first model is the best one."""
    folder = run("trainer=mezo", "server_optimizer.lr=0", "fl.rounds=2", "report.progress=true")
    shown = capsys.readouterr().out.splitlines()
    resume_run(folder)
    resumed = capsys.readouterr().out.splitlines()
    replay_run(folder)
    replayed = capsys.readouterr()
    evaluate_run(folder, split="test")

    back = "restoring the model after 0 rounds ..."
    assert shown.count(back) == resumed.count(back) == 1
    assert "replaying 2 rounds ..." in resumed
    assert not any("replaying" in line for line in shown)
    assert (replayed.out, replayed.err) == ("", "replaying 2 rounds ...\n")
    assert "replaying" not in "".join(capsys.readouterr())


def test_generating_with_a_run_is_greedy_decoding_of_its_model(run: Run) -> None:
    folder = run()

    (text,) = generate_run(folder, ["Text: a thing\nVerdict:"], max_new_tokens=5)

    loaded = rebuild(folder).process.peer.loaded
    ids = list(loaded.tokenizer("Text: a thing\nVerdict:")["input_ids"])
    prompt = len(ids)
    for _ in range(5):
        with torch.inference_mode():
            ids.append(int(loaded.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == loaded.tokenizer.eos_token_id:
            break
    assert text == loaded.tokenizer.decode(ids[prompt:], skip_special_tokens=True).strip()


def test_a_mask_made_beforehand_is_the_one_that_the_run_would_make(
    run: Run, overrides: Callable[..., list[str]], tmp_path: Path
) -> None:
    made = make_mask(load(overrides()), tmp_path / "mask.safetensors")
    folder = run()
    given = run(f"inputs.artifact={tmp_path / 'mask.safetensors'}")

    kept = (folder / "mask.safetensors").read_bytes()
    assert hashlib.sha256(kept).digest() == hashlib.sha256((tmp_path / "mask.safetensors").read_bytes()).digest()
    assert made["size"] == rebuild(folder).replica.space.size
    assert (folder / "public.jsonl").read_bytes() == (given / "public.jsonl").read_bytes()


def test_a_mask_that_was_chosen_on_other_weights_is_used_with_a_warning(
    run: Run, overrides: Callable[..., list[str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_mask(load(overrides()), tmp_path / "own.safetensors")
    own = load_mask(tmp_path / "own.safetensors")
    save_mask(replace(own, manifest={**own.manifest, "base_digest": "f" * 64}), tmp_path / "other.safetensors")

    run(f"inputs.artifact={tmp_path / 'own.safetensors'}", "fl.rounds=1")
    assert not [record for record in caplog.records if "other weights" in record.getMessage()]
    run(f"inputs.artifact={tmp_path / 'other.safetensors'}", "fl.rounds=1")

    (warned,) = [record.getMessage() for record in caplog.records if "other weights" in record.getMessage()]
    assert "other.safetensors: the mask was made for other weights (ffffffffffff...)" in warned


def test_the_run_folder_holds_what_made_the_run(run: Run) -> None:
    folder = run("seed=7")

    environment = json.loads((folder / "environment.json").read_text())
    assert read_run(folder).seed == 7
    assert (folder / "overrides.yaml").read_text() == '- "seed=7"\n'
    assert environment["packages"]["flwr"].startswith("1.41.")
    assert (environment["device"], environment["threads"]) == ("cpu", 1)
    assert len(environment["config_hash"]) == 64


def test_a_folder_with_a_run_is_not_overwritten_and_one_without_is_named(
    run: Run, overrides: Callable[..., list[str]], tmp_path: Path
) -> None:
    folder = run()

    with pytest.raises(RunFolderError, match="it holds a run"):
        start_run(load(overrides()), folder, overrides=[])
    with pytest.raises(RunFolderError, match="not a run folder"):
        rebuild(tmp_path)
    with pytest.raises(ConfigError, match="--rounds must be 0 to 3, the rounds done, got 4"):
        rebuild(folder, rounds=4)


def test_doctor_finds_this_machine_fit() -> None:
    assert [name for name, good, _ in doctor() if not good] == []
