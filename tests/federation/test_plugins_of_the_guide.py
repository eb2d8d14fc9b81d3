"""The plugins of the page for plugin authors make a run together, in a package that is found by its entry points."""

from __future__ import annotations

import csv
import json
import os
import re
import tomllib
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to-add-a-plugin.md"
RUN = """
import json, os, sys
from pathlib import Path

from fedzo.commands.resume import resume_run
from fedzo.commands.train import start_run
from fedzo.commands.replay import replay_run
from fedzo.config.load import load
from fedzo.data.preprocess.backend import REWRITERS, Message, Request
from fedzo.run.process import row_source

overrides, folder = json.loads(sys.argv[1])
config = load(overrides)
source = row_source(config, config.site())
lengths = [[len(row["text"]) for row in source.rows_for(client)] for client in range(4)]
chat = Request(messages=(Message("user", "Say it."),), model="m", temperature=0, seed=0, max_tokens=9)
(answer,) = REWRITERS.build(config.rewriter).complete([chat])
start_run(config, Path(folder), overrides=[])
niceness = os.nice(0)
resume_run(Path(folder))
print(json.dumps([lengths, answer.text, niceness, replay_run(Path(folder))["digest"]]))
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder with the page's package as pip would install it."""
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    found = re.search(r"```toml\n(.*?)```", text, flags=re.DOTALL)
    assert found is not None
    modules: dict[str, str] = tomllib.loads(found[1])["project"]["entry-points"]["fedzo.plugins"]
    about = tmp_path / "site" / "my_package-0.1.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 0.1\n")
    points = "".join(f"{name} = {module}\n" for name, module in modules.items())
    (about / "entry_points.txt").write_text(f"[fedzo.plugins]\n{points}")
    (about.parent / "my_package").mkdir()
    (about.parent / "my_package" / "__init__.py").touch()
    for module, block in zip(modules.values(), blocks, strict=True):
        (about.parent / f"{module.replace('.', '/')}.py").write_text(block, encoding="utf-8")
    return about.parent


@pytest.mark.slow
def test_the_plugins_are_chosen_by_their_names_and_do_what_the_page_says(
    package: Path,
    forked: Callable[..., tuple[int, str]],
    overrides: Callable[..., list[str]],
    lines: Callable[[Path, str], list[dict[str, Any]]],
    tmp_path: Path,
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name, first, count in (("train", 0, 40), ("dev", 100, 8), ("test", 200, 8)):
        texts = [f"item  {i} is {['bad', 'good'][i % 2]}{' indeed' * (i % 5)}" for i in range(first, first + count)]
        rows = [{"text": text, "label": i % 2} for i, text in enumerate(texts)]
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    say = tmp_path / "say.sh"
    say.write_text("#!/bin/sh\ncat > /dev/null\necho 'It is said.'\n")
    say.chmod(0o755)
    settings = overrides(
        f"data.path={data}",
        "fl.rounds=3",
        "fl.local_steps=2",
        "partition=by_length",
        "preprocess=[squeeze]",
        "rewriter=program",
        f"rewriter.program={say}",
        "step_policy=quiet",
        "step_policy.share=1e9",  # everybody is below that
        "step_policy.max_share=1",
        "trackers=[csv]",
        "runtime=nice",
    )
    niceness, folder = os.nice(0), tmp_path / "run"

    code, said = forked(RUN, json.dumps([settings, str(folder)]), path=package, cwd=tmp_path)

    assert code == 0, said
    lengths, answer, nicer, digest = json.loads(said.splitlines()[-1])
    assert [len(part) for part in lengths] == [10] * 4
    assert all(max(part) <= min(after) for part, after in pairwise(lengths))
    assert min(lengths[0]) < max(lengths[3])
    setup = next(line for line in lines(folder, "metrics.jsonl") if line["kind"] == "setup")
    assert [client["stages"] for client in setup["clients"]] == [{"squeeze.changed": 9}] * 4  # one row is held out
    assert answer == "It is said."
    steps = [[client["steps"] for client in line["clients"]] for line in lines(folder, "audit.jsonl")]
    assert steps == [[2] * 4, [1] * 4, [1] * 4]
    with (folder / "numbers.csv").open(newline="") as file:
        numbers = [(int(step), tag) for step, tag, _ in csv.reader(file)]
    assert [step for step, tag in numbers if tag == "round/loss"] == [1, 2, 3]
    assert set(Counter(numbers).values()) == {1}  # none twice, though the run was opened again
    assert nicer == min(19, niceness + 10)
    assert digest == lines(folder, "public.jsonl")[-1]["digest"]
