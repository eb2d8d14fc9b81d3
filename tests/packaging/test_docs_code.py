"""The code in the documentation runs, as it stands there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
USE_TRAINER = """
from fedzo.testing.tiny_models import tiny_loaded
from fedzo.config.plugins import plugin_classes

assert plugin_classes()["trainer"]["norms"] is NormsConfig
loaded = tiny_loaded("opt")
built = TRAINERS.build(NormsConfig(skip="bias")).build(loaded, b"", distribution=Distribution.gaussian)
weights = [w for name, w in loaded.model.named_parameters() if w.dim() == 1 and "bias" not in name]
before = [w.detach().clone() for w in weights]
start = built.space.digest()
built.space.step(0.5, 7)
assert all((w != old).any() for w, old in zip(weights, before, strict=True))
built.reset()
assert built.space.digest() == start
print(built.space.size, sum(w.numel() for w in weights))
"""


def code(page: str, language: str) -> str:
    """The first block of a language on a page."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found = re.search(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)
    assert found is not None, f"{page} has no {language} block"
    return found[1]


def test_trainer_of_the_how_to_is_a_working_plugin(tmp_path: Path) -> None:
    program = tmp_path / "norms.py"  # a process of its own: the registry is closed to the other tests
    program.write_text(code("how-to-add-a-trainer.md", "python") + USE_TRAINER, encoding="utf-8")

    done = subprocess.run([sys.executable, str(program)], cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    size, expected = done.stdout.split()
    assert size == expected != "0"


def test_task_of_the_how_to_composes(tmp_path: Path) -> None:
    from fedzo.config.load import load
    from fedzo.config.overrides import with_config_dir

    folder = tmp_path / "task"
    folder.mkdir()
    (folder / "verdict.yaml").write_text(code("how-to-own-task.md", "yaml"), encoding="utf-8")
    rows = tmp_path / "reviews.jsonl"
    rows.write_text('{"text": "Runs hot.", "stars": "bad"}\n', encoding="utf-8")

    config = load(with_config_dir(["task=verdict", "data=files", f"data.path={rows}"], str(tmp_path)))

    assert config.task.candidates == [" poor", " fine"]
    assert config.task.labels == ["bad", "good"]


def test_command_line_of_the_how_to_composes(tmp_path: Path) -> None:
    from fedzo.config.load import load

    rows = tmp_path / "reviews.jsonl"
    rows.write_text('{"text": "Runs hot.", "stars": "bad"}\n', encoding="utf-8")
    text = (ROOT / "docs" / "how-to-own-task.md").read_text(encoding="utf-8")
    command = re.search(r"^fedzo train (task=custom.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    assert command is not None

    overrides = shlex.split(command[1].replace("\\\n", " ").replace("reviews.jsonl", str(rows)))
    config = load(overrides)

    assert config.task.template == "{text} This product is"
    assert config.task.label == "stars"


def test_entry_point_group_of_the_how_to_is_the_one_that_is_read() -> None:
    from fedzo.registry import ENTRY_POINT_GROUP

    assert tomllib.loads(code("how-to-add-a-trainer.md", "toml"))["project"]["entry-points"].keys() == {
        ENTRY_POINT_GROUP
    }
