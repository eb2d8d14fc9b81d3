"""Federations whose clients train the tables of a sketch: who may take part, what is refused, what comes of a run."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fedzo.bench.step import open_bench
from fedzo.cli import main
from fedzo.commands.mask import make_mask
from fedzo.commands.replay import replay_run
from fedzo.commands.resume import resume_run
from fedzo.commands.run_folder import read_launch, read_run, rebuild
from fedzo.commands.train import start_run
from fedzo.config.load import load
from fedzo.errors import ConfigError, FedzoError
from fedzo.models.config import ModelConfig
from fedzo.models.load import load_model
from fedzo.models.sketched.folder import read_manifest
from fedzo.models.sketched.table_file import read_tables
from fedzo.run import apps
from fedzo.run.process import open_process
from fedzo.run.start import open_run
from fedzo.sketch import tables_of
from fedzo.testing.tiny_models import save_tiny_sketch
from fedzo.zo.directions import direction, stream_key

Run = Callable[..., Path]
Lines = Callable[[Path, str], list[dict[str, Any]]]
Overrides = Callable[..., list[str]]
TABLES = "trainer=tables"
IDS = torch.arange(24).reshape(2, 12) * 7 % 256


def test_grad_ip_is_the_product_with_the_gradient_on_calibration_text(run: Run, lines: Lines) -> None:
    """From the gradient's file as the run folder keeps it, in the order of ``named_parameters``."""
    folder = run(TABLES, "fl.local_steps=2", "fl.rounds=2")

    kept = load_file(folder / "table_gradient.safetensors")
    names = [name for name, _ in rebuild(folder).process.peer.loaded.model.named_parameters() if name in kept]
    gradient = torch.cat([kept[name].reshape(-1) for name in names]).double().numpy()
    assert len(names) == len(kept) == 14
    rounds = [line for line in lines(folder, "metrics.jsonl") if line["kind"] == "round"]
    for audited, measured in zip(lines(folder, "audit.jsonl"), rounds, strict=True):
        for entry, client in zip(audited["clients"], measured["clients"], strict=True):
            expected = [
                g * float(gradient @ direction(stream_key(0, round=audited["round"], step=t), len(gradient)))
                for t, (g,) in enumerate(entry["g"])
            ]
            assert client["signals"]["grad_ip"] == pytest.approx(expected, rel=1e-5)


def test_a_run_goes_on_with_the_gradient_that_it_began_with(
    overrides: Overrides, run: Run, tmp_path: Path, lines: Lines
) -> None:
    """The text to calibrate on is gone when the run is resumed; its metrics are those of an unbroken one."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"document {i} has words enough to fill a window of sixteen bytes\n" for i in range(9)))
    settings = [TABLES, "trainer.calibration=file", f"inputs.calibration={text}", "fl.local_steps=2"]
    whole, broken = run(*settings, "fl.rounds=4"), tmp_path / "broken"
    start_run(load(overrides(*settings, "fl.rounds=2")), broken, overrides=[])
    text.write_text("another text, which would give another gradient if it were read\n" * 9)

    resume_run(broken, rounds=4)

    xi = [[line["xi"] for line in lines(folder, "audit.jsonl")] for folder in (whole, broken)]
    assert xi[0] == xi[1]
    assert lines(broken, "public.jsonl")[-1]["digest"] == lines(whole, "public.jsonl")[-1]["digest"]


# --- who may take part ------------------------------------------------------------------------------------------------


def other_codes(folder: Path) -> Path:
    """The same sketch but for one code of one weight, and no manifest beside it."""
    save_tiny_sketch(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.codes"][0, 0] ^= 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("codes", ["the same", "other"])
def test_a_client_whose_codes_differ_is_refused_before_the_first_round(
    codes: str, overrides: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A site keeps its folder under another name than the server; with the same codes the run goes through."""
    make = save_tiny_sketch if codes == "the same" else other_codes
    model, opened = make(tmp_path / "of a site" / "sk"), []

    def worker(context: Any) -> Any:
        if not opened:
            run_dir = Path(context.run_config["run-dir"])
            site = read_launch(run_dir).site()
            site = replace(site, model=replace(site.model, name=str(model)))
            process = open_process(
                read_run(run_dir), site, site_folder=tmp_path, artifacts=tmp_path / "artifacts", plays_clients=True
            )
            opened.append(process.client.worker)
        return opened[0]

    monkeypatch.setattr(apps, "_worker", worker)
    begin = [load(overrides(TABLES, "fl.rounds=1", "strategy.startup_s=1")), tmp_path / "run"]

    if codes == "the same":
        start_run(*begin, overrides=[])
        assert replay_run(tmp_path / "run")["rounds"] == 1
        return
    with caplog.at_level(logging.WARNING), pytest.raises(FedzoError):
        start_run(*begin, overrides=[])
    assert "its base weights must be the server's" in caplog.text
    assert not (tmp_path / "run" / "public.jsonl").exists() or not (tmp_path / "run" / "public.jsonl").read_text()


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ("mezo", "it would train tables, embeddings and norms together, at one learning rate, got 'mezo'"),
        ("meerkat", "its mask picks from dense weights, of which a sketch has none left, got 'meerkat'"),
        ("lora", "PEFT has no adapter of this kind for a layer of codes and tables, got 'lora'"),
        ("ia3", "PEFT has no adapter of this kind for a layer of codes and tables, got 'ia3'"),
    ],
)
def test_trainers_of_dense_weights_are_refused_on_a_sketch(
    trainer: str, message: str, overrides: Overrides, tiny_sketch_dir: Path, tmp_path: Path
) -> None:
    config = load(overrides(f"trainer={trainer}", f"model={tiny_sketch_dir}"))
    expected = (
        rf"trainer must be one that trains sketches, as '.*' is: \w+ cannot, since {message}\. "
        "Write trainer=tables, or name the dense"
    )

    with pytest.raises(ConfigError, match=expected):
        start_run(config, tmp_path / "run", overrides=[])
    with pytest.raises(ConfigError, match=expected):
        open_bench(config, shape=None, rows=1, tokens=8)
    if trainer == "meerkat":
        with pytest.raises(ConfigError, match=expected):
            make_mask(config, tmp_path / "mask")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_dense_model_has_no_tables(overrides: Overrides, tiny_model_dir: Path, tmp_path: Path) -> None:
    config = load(overrides(TABLES, f"model={tiny_model_dir}"))

    with pytest.raises(
        ConfigError,
        match=r"trainer must be one that trains dense models, as '.*' is: tables cannot, since a dense model has no "
        r"tables, got 'tables'\. .* `fedzo sketch --out FOLDER --calibration FILE model=.*` and write model=FOLDER",
    ):
        open_run(config, tmp_path)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.quantization=nf4", r"model\.quantization must be none for .*quant_method=fedzo_sketch"),
        ("model.compile=true", r"model\.compile must be false for .* which is a sketch"),
    ],
)
@pytest.mark.parametrize("trainer", ["tables", "prompt"])
def test_a_sketch_is_neither_packed_nor_compiled(
    trainer: str, setting: str, message: str, overrides: Overrides, tiny_sketch_dir: Path, tmp_path: Path
) -> None:
    config = load(overrides(f"trainer={trainer}", f"model={tiny_sketch_dir}", setting))

    with pytest.raises(ConfigError, match=message):
        open_run(config, tmp_path)


@pytest.mark.parametrize("trainer", ["prefix", "prompt"])
def test_virtual_tokens_are_trained_before_a_sketch(
    trainer: str, run: Run, lines: Lines, tiny_sketch_dir: Path
) -> None:
    folder = run(f"trainer={trainer}", f"model={tiny_sketch_dir}", "task.max_length=64", "fl.rounds=2")

    assert replay_run(folder)["digest"] == lines(folder, "public.jsonl")[-1]["digest"]
    assert any(client["g"][0][0] for client in lines(folder, "audit.jsonl")[0]["clients"])


# --- what comes of a run ----------------------------------------------------------------------------------------------


@pytest.fixture
def moved(finished: Run) -> Path:
    return finished(TABLES, "server_optimizer.lr=1e-3", "evaluation.central=false")


def test_export_writes_a_sketch_its_tables_or_a_dense_model(moved: Path, tmp_path: Path, tiny_sketch_dir: Path) -> None:
    out = {form: tmp_path / form for form in ("sketch", "tables", "dense")}
    assert main(["export", str(moved), str(out["sketch"])]) == 0
    assert main(["export", str(moved), str(out["tables"]), "--tables"]) == 0
    assert main(["export", str(moved), str(out["dense"]), "--dense"]) == 0

    models = {form: AutoModelForCausalLM.from_pretrained(out[form]) for form in ("sketch", "dense")}
    base = AutoModelForCausalLM.from_pretrained(tiny_sketch_dir)
    with torch.inference_mode():
        logits = {form: model(input_ids=IDS).logits for form, model in models.items()}
        assert torch.equal(logits["sketch"], logits["dense"])
        assert not torch.equal(logits["sketch"], base(input_ids=IDS).logits)
    replayed = replay_run(moved)["digest"]
    stored = load_file(out["sketch"] / "model.safetensors")
    assert {tensor.dtype for name, tensor in stored.items() if name.endswith(".tables")} == {torch.float32}
    assert not [name for name in load_file(out["dense"] / "model.safetensors") if "codes" in name or "tables" in name]
    # the file's tables in the base are the exported sketch
    loaded = load_model(ModelConfig(name=str(tiny_sketch_dir)), device="cpu")
    assert read_manifest(out["sketch"] / "sketch.json").source_digest == loaded.base_digest
    for name, table in read_tables(out["tables"], loaded).items():
        assert torch.equal(table, stored[name])
        tables_of(loaded.model)[name].data.copy_(table)
    with torch.inference_mode():
        assert torch.equal(loaded.model(input_ids=IDS).logits, logits["sketch"])
    header = out["tables"].read_bytes()
    told = json.loads(json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"]["fedzo_tables"])
    assert told["digest"] == replayed
    # of another base they are refused, and so is a folder that is exported, whose tables are others
    for other in (other_codes(tmp_path / "other"), out["sketch"]):
        with pytest.raises(ConfigError, match="got tables of another"):
            read_tables(out["tables"], load_model(ModelConfig(name=str(other)), device="cpu"))


@pytest.mark.parametrize("form", [[], ["--dense"]])
@pytest.mark.parametrize("out_is_there", [False, True])
def test_an_export_is_whole_or_not_there(
    form: list[str],
    out_is_there: bool,
    moved: Path,
    no_room: Callable[[], AbstractContextManager[None]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "place" / "out"
    (out if out_is_there else out.parent).mkdir(parents=True)
    before = out.stat().st_ino if out_is_there else None
    with no_room():
        assert main(["export", str(moved), str(out), *form]) == 1
    said = capsys.readouterr().err
    assert "out': it must be writable, got 'File too large'. Make room or choose" in said
    assert "Traceback" not in said
    assert [each.name for each in out.parent.iterdir()] == (["out"] if out_is_there else [])
    assert not (out_is_there and list(out.iterdir()))

    assert main(["export", str(moved), str(out), *form]) == 0

    assert [each.name for each in out.parent.iterdir()] == ["out"]
    assert before in (None, out.stat().st_ino)
    names = {each.name for each in out.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert ("sketch.json" in names) == (not form)
    load_model(ModelConfig(name=str(out)))


def test_an_exported_sketch_whose_codes_were_swapped_is_refused(moved: Path, tmp_path: Path) -> None:
    assert main(["export", str(moved), str(tmp_path / "sketch")]) == 0
    file = tmp_path / "sketch" / "model.safetensors"
    stored = load_file(file)
    one, other = (f"model.layers.{i}.mlp.up_proj.codes" for i in (0, 1))
    stored[one], stored[other] = stored[other], stored[one]
    save_file(stored, file, metadata={"format": "pt"})

    with pytest.raises(ConfigError, match=r"must have the SHA-256 that sketch\.json names"):
        load_model(ModelConfig(name=str(tmp_path / "sketch")))


def test_a_run_goes_on_from_an_exported_sketch(moved: Path, run: Run, tmp_path: Path) -> None:
    assert main(["export", str(moved), str(tmp_path / "sketch")]) == 0

    folder = run(TABLES, f"model={tmp_path / 'sketch'}", "fl.rounds=1")

    ends = rebuild(moved).replica.space.values(), rebuild(folder, rounds=0).replica.space.values()
    assert np.array_equal(*ends)


def test_other_places_and_runs_are_refused_for_tables_and_dense_models(
    moved: Path, finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = tmp_path / "there"
    there.mkdir()
    assert main(["export", str(moved), str(there), "--tables"]) != 0
    assert "OUT must be a new file, got" in capsys.readouterr().err
    dense = finished("fl.rounds=1")
    for form in ("tables", "dense"):
        assert main(["export", str(dense), str(tmp_path / "out"), f"--{form}"]) != 0
        assert f"--{form} must be given for a run that trained the tables of a sketch" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
