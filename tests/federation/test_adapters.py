"""Federations whose clients train an adapter or a sketch's tables: live state, replay, resume, scores, text, export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from fedzo.commands.evaluate import evaluate_run
from fedzo.commands.export import export_run
from fedzo.commands.generate import generate_run
from fedzo.commands.replay import replay_run
from fedzo.commands.resume import resume_run
from fedzo.commands.run_folder import rebuild
from fedzo.commands.train import start_run
from fedzo.config.load import load
from fedzo.fl.server.rounds import Server

Run = Callable[..., Path]
Greedy = Callable[[Any, str, int], str]
Lines = Callable[[Path, str], list[dict[str, Any]]]
ADAPTERS = ["lora", "ia3", "prefix", "prompt"]
TRAINERS = [*ADAPTERS, "tables"]
ROOM = "task.max_length=256"  # the tiny model has 512 positions, of which virtual tokens take some
IDS = torch.arange(24).reshape(2, 12)

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # by PEFT, of transformers


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize(
    "settings", [(), ("fl.local_steps=3",), ("model.dtype=bfloat16", "fl.transport=values")], ids=" ".join
)
def test_the_log_leads_to_the_live_state(run: Run, lines: Lines, trainer: str, settings: tuple[str, ...]) -> None:
    folder = run(f"trainer={trainer}", ROOM, "fl.rounds=2", "server_optimizer.lr=0.01", *settings)

    public, metrics = lines(folder, "public.jsonl"), lines(folder, "metrics.jsonl")
    assert replay_run(folder)["digest"] == public[-1]["digest"]
    assert len({line["check"] for line in public}) == 2
    assert metrics[0]["trainer"] == trainer
    assert metrics[0]["setup_down_bytes"] == (8 if trainer in ADAPTERS else 0)  # of an adapter the seed
    assert any(line["kind"] == "federated_score" for line in metrics)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_run_stopped_and_resumed_ends_as_an_unbroken_one(
    run: Run, overrides: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainer: str
) -> None:
    settings = (f"trainer={trainer}", ROOM, "fl.rounds=3", "fl.local_steps=3", "server_optimizer.lr=0.01")
    unbroken, broken = run(*settings), tmp_path / "broken"
    play = Server.run_round

    def stops(self: Server) -> None:
        if self.round == 2:
            raise KeyboardInterrupt
        play(self)

    monkeypatch.setattr(Server, "run_round", stops)
    with pytest.raises(KeyboardInterrupt):
        start_run(load(overrides(*settings)), broken, overrides=[])
    monkeypatch.setattr(Server, "run_round", play)

    resume_run(broken)

    for name in ("public.jsonl", "audit.jsonl"):
        assert (broken / name).read_bytes() == (unbroken / name).read_bytes()


@pytest.mark.parametrize("trainer", ADAPTERS)
def test_an_exported_run_is_an_adapter_for_plain_peft_that_names_its_base(
    run: Run, lines: Lines, tmp_path: Path, tiny_model_dir: Path, trainer: str
) -> None:
    folder = run(f"trainer={trainer}", ROOM, "server_optimizer.lr=0.05")

    out = export_run(folder, tmp_path / "out")

    tuned = rebuild(folder).process.peer.loaded.model
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with torch.inference_mode():
        before = base(input_ids=IDS).logits
        plain = peft.PeftModel.from_pretrained(base, out)(input_ids=IDS).logits[:, -12:]
        assert torch.equal(plain, tuned(input_ids=IDS).logits)
    assert lines(folder, "metrics.jsonl")[-1]["best_round"] > 0  # else the base would be compared with itself
    assert not torch.equal(plain, before)
    assert peft.PeftConfig.from_pretrained(out).base_model_name_or_path == str(tiny_model_dir)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_scores_and_text_are_those_of_the_tuned_model(
    run: Run, lines: Lines, greedy_answer: Greedy, trainer: str
) -> None:
    folder = run(f"trainer={trainer}", ROOM, "server_optimizer.lr=0.05", "evaluation.every_rounds=1")

    again = evaluate_run(folder, split="test")
    (text,) = generate_run(folder, ["Text: a thing\nVerdict:"], max_new_tokens=5)

    after = lines(folder, "metrics.jsonl")[-1]["after"]
    assert again == {"answers": {name: after[name] for name in again["answers"]}}
    loaded = rebuild(folder).process.peer.loaded
    assert text == greedy_answer(loaded, "Text: a thing\nVerdict:", 5)


def test_the_base_digest_is_that_of_the_base(run: Run) -> None:
    plain = rebuild(run("trainer=mezo", "fl.rounds=1")).process.peer.loaded.base_digest

    assert rebuild(run("trainer=lora", "fl.rounds=1")).process.peer.loaded.base_digest == plain
