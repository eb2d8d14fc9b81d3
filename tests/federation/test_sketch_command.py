"""``fedzo sketch`` as a person calls it."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

from fedzo.cli import main
from fedzo.commands.sketch import _part_of
from fedzo.models.config import ModelConfig
from fedzo.models.load import load_model
from fedzo.models.sketched.folder import read_manifest
from fedzo.records.folder import folder_of_one_process
from fedzo.testing.tiny_models import tiny_loaded


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path)


@pytest.fixture
def ask(tiny_model_dir: Path, text: Path, tmp_path: Path) -> list[str]:
    return command(tiny_model_dir, text, tmp_path / "sk4")


@pytest.fixture(scope="module")
def built(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sketch as the command of ``ask`` builds it, for tests that leave it as it is."""
    folder = tmp_path_factory.mktemp("built")
    assert main(command(tiny_model_dir, write_text(folder), folder / "sk4")) == 0
    return folder / "sk4"


def write_text(folder: Path) -> Path:
    file = folder / "text.txt"
    file.write_text("\n".join(f"The {i} quick brown foxes jump over {i * i} lazy dogs." for i in range(60)))
    return file


def command(model: Path, text: Path, out: Path) -> list[str]:
    sizes = ["--tokens", "32", "--windows", "6"]
    return ["sketch", "--out", str(out), "--calibration", str(text), *sizes, f"model={model}"]


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_sketch_is_built_measured_and_loaded(
    ask: list[str], tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*ask, "--bits", "3", "--groups-per-row", "2", "--skip", "o_proj"]) == 0

    printed = capsys.readouterr().out
    dense = load_model(ModelConfig(name=str(tiny_model_dir)))
    loaded = load_model(ModelConfig(name=str(tmp_path / "sk4")))
    manifest = read_manifest(tmp_path / "sk4" / "sketch.json")
    assert "calibration: 6 windows of 32 tokens" in printed
    assert "sketched 12 layers" in printed
    bits = re.search(r"([\d,]+) weights are codes now, ([\d.]+) bits each with their ([\d,]+) table values", printed)
    assert bits is not None
    weights = 2 * (32 * 32 + 2 * 16 * 32 + 3 * 64 * 32)  # q, k and v, gate, up and down of two blocks
    entries = 2 * (32 + 2 * 16 + 2 * 64 + 32) * 2 * 8
    assert bits.groups() == (f"{weights:,}", f"{3 + 16 * entries / weights:.3f}", f"{entries:,}")
    assert "model.layers.*.self_attn.o_proj.weight (2 x 1,024)" in printed
    before, after = (float(re.search(rf"([\d.]+) {word}", printed)[1]) for word in ("before", "after"))  # type: ignore[index]
    ids = torch.tensor(loaded.tokenizer((tmp_path / "text.txt").read_text(), add_special_tokens=False)["input_ids"])
    windows = ids[: 32 * 16].view(16, 32)
    for model, said in ((dense.model, before), (loaded.model, after)):
        with torch.no_grad():
            losses = [model(input_ids=window[None], labels=window[None]).loss for window in windows]
        assert torch.stack(losses).mean().exp().item() == pytest.approx(said, abs=0.006)
    assert (manifest.recipe.bits, manifest.recipe.num_windows, manifest.recipe.skipped) == (3, 6, ("o_proj",))
    assert manifest.recipe.source_digest == dense.base_digest
    assert not (tmp_path / "sk4.part").exists()


KILLED = """
import os, signal, sys
from fedzo.cli import main
from fedzo.models.sketched import builder

write, written = builder._write, []

def write_and_die(file, sketch):
    write(file, sketch)
    written.append(file)
    if len(written) == 3:
        os.kill(os.getpid(), signal.SIGKILL)

builder._write = write_and_die
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_build_goes_on_to_the_same_bytes(
    ask: list[str], forked: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    assert main([str(tmp_path / "whole") if each == str(tmp_path / "sk4") else each for each in ask]) == 0
    code, said = forked(KILLED, *ask)
    assert code == -signal.SIGKILL, said
    assert len([*(tmp_path / "sk4.part" / "layers").glob("*.safetensors")]) == 3
    assert not (tmp_path / "sk4").exists()

    assert main(ask) == 0

    assert files_of(tmp_path / "sk4") == files_of(tmp_path / "whole")


def test_a_build_goes_on_only_with_what_it_began_with(
    ask: list[str],
    tiny_model_dir: Path,
    no_room: Callable[[], AbstractContextManager[None]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with no_room():
        assert main(ask) == 1
    said = capsys.readouterr().err
    assert "sk4: it must be writable, got 'File too large'" in said
    assert "call the same command again: it goes on with what is in sk4.part" in said
    assert not (tmp_path / "sk4").exists()

    changed = Path(shutil.copytree(tiny_model_dir, tmp_path / "changed" / tiny_model_dir.name))
    config = json.loads((changed / "config.json").read_text())
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    (changed / "config.json").write_text(json.dumps(config | rope))
    for other in (["--bits", "2"], ["model.dtype=bfloat16"], [f"model={changed}"]):
        assert main([*ask, *other]) == 2
        assert "another model, other text, another model.dtype or another kind of" in capsys.readouterr().err
    with folder_of_one_process(tmp_path / "sk4.part"):
        assert main(ask) == 1
    assert "sk4.part" in capsys.readouterr().err

    assert main(ask) == 0
    assert main(ask) == 2
    assert "sk4' must not exist, but does" in capsys.readouterr().err


def test_the_folder_of_a_build_that_is_empty_at_its_end_goes_with_its_lock(tmp_path: Path) -> None:
    """NFS keeps a name for a file that is open, so a folder with a lock cannot be removed before."""
    with _part_of(tmp_path / "sk4") as part:
        for file in part.iterdir():
            file.unlink()
    assert not list(tmp_path.iterdir())

    with _part_of(tmp_path / "sk4") as part:
        (part / "recipe.json").touch()
    assert (part / "recipe.json").exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (["--bits", "5"], "bits must be 2, 3 or 4, got 5"),
        (["--groups-per-row", "3"], "'model.layers.0.self_attn.q_proj' must be a multiple of groups_per_row=3, got 32"),
        (["--tokens", "4096"], "a window must have at least 2 tokens and at most 512"),
        (["--skip", "nothing"], "--skip must name linear layers (down_proj"),
        (["--calibration", "absent.txt"], "--calibration must name a file, got no such file at 'absent.txt'"),
        (["--text", "absent.txt"], "--text must name a file, got no such file at 'absent.txt'"),
        (["model.quantization=nf4"], "model.quantization must be none for a sketch"),
        (["model.quantization=nf4", "trainer=lora"], "model.quantization must be none for a sketch"),
        (["--out", "nope/.."], "--out must end with the name of a new folder, got 'nope/..'. Write its name."),
        (["--damping", "nan"], "damping must be >= 0 and finite, got nan"),
    ],
)
def test_bad_input_is_one_message_before_any_work(
    change: list[str], expected: str, ask: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*ask, *change]) == 2

    captured = capsys.readouterr()
    assert expected in captured.err
    assert "Traceback" not in captured.err
    assert "before" not in captured.out
    assert not (tmp_path / "sk4").exists()
    assert not (tmp_path / "sk4.part").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [("", "must hold text"), ("short\n", "must hold at least 1 x 32 tokens .*, got 6 tokens of 1")],
)
def test_calibration_that_is_empty_or_too_short_is_told_with_what_there_is(
    content: str, expected: str, ask: list[str], text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text.write_text(content)

    assert main(ask) == 2

    assert re.search(expected, capsys.readouterr().err)


def test_a_sketch_is_not_sketched_again(built: Path, ask: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ask[:-1], f"model={built}"]) == 2

    assert "must be dense, but is a sketch already (14 layers" in capsys.readouterr().err


def test_weights_that_are_stored_packed_are_not_sketched(
    ask: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = tiny_loaded()
    packed.model.quantization_method = "gptq"
    monkeypatch.setattr("fedzo.commands.sketch.open_model", lambda *_, **__: packed)

    assert main(ask) == 2

    assert "'tiny-llama', whose weights are stored packed (quant_method=gptq). Name the" in capsys.readouterr().err
    assert not (tmp_path / "sk4.part").exists()


def test_the_recipe_is_json_that_people_can_read(built: Path) -> None:
    said = json.loads((built / "sketch.json").read_text())

    assert said["recipe"]["source"] == "tiny"
    assert said["recipe"]["bits"] == 4
    assert set(said["layers"]["model.layers.0.mlp.up_proj"]) == {"relative_error", "num_unused"}


def test_a_link_in_the_folders_place_is_refused_before_any_work(
    ask: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sk4").symlink_to("nowhere")

    assert main(ask) == 2

    assert "sk4' must not exist, but does" in capsys.readouterr().err
    assert not (tmp_path / "sk4.part").exists()


@pytest.mark.parametrize(
    "option",
    ["--bits=3", "--groups-per-row=2", "--skip=o_proj", "--text=f", "--windows=3", "--tokens=9", "--damping=1"],
)
@pytest.mark.parametrize("source", [["--import", "f", "--out", "d"], ["--export", "f"]])
def test_options_of_a_build_are_refused_where_nothing_is_built(
    source: list[str], option: str, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sketch", *source, option, f"model={tiny_model_dir}"]) == 2

    name = option.partition("=")[0]
    assert f"must be given without options of a build, got {name}: the file and" in capsys.readouterr().err


def test_a_sketch_goes_to_leanquants_layout_and_back(
    built: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout, again = tmp_path / "layout.safetensors", tmp_path / "again"

    assert main(["sketch", "--export", str(tmp_path / "absent" / "f"), f"model={built}"]) == 1
    assert "'No such file or directory'. Make room or choose another place." in capsys.readouterr().err
    assert main(["sketch", "--export", str(layout), f"model={built}"]) == 0
    begun = tmp_path / "begun.part"
    begun.mkdir()
    (begun / "recipe.json").write_text("of a build that was killed")
    assert main(["sketch", "--import", str(layout), "--out", str(tmp_path / "begun"), f"model={tiny_model_dir}"]) == 2
    assert (begun / "recipe.json").exists()
    assert main(["sketch", "--import", str(layout), "--out", str(again), f"model={tiny_model_dir}"]) == 0

    assert "layout.safetensors: 14 layers" in capsys.readouterr().out
    assert (again / "model.safetensors").read_bytes() == (built / "model.safetensors").read_bytes()
    dense = load_model(ModelConfig(name=str(tiny_model_dir)))
    assert read_manifest(again / "sketch.json").source_digest == dense.base_digest
    assert "source_digest" not in json.loads((built / "sketch.json").read_text())
    assert load_model(ModelConfig(name=str(again))).base_digest == load_model(ModelConfig(name=str(built))).base_digest
    assert main(["sketch", "--import", str(layout), f"model={tiny_model_dir}"]) == 2
    assert "needs --out DIR with --calibration FILE or with --import FILE" in capsys.readouterr().err
