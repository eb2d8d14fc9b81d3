"""A package of somebody else, with a stage that takes its time and keeps what it made."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fedzo.data.preprocess import STAGES, OnProgress, StageConfig, StageContext
from fedzo.data.preprocess.backend import NoRewriterConfig, RewriterConfig
from fedzo.errors import Problem, problem

if TYPE_CHECKING:
    from fedzo.data.config import TaskConfig


@dataclass(kw_only=True, slots=True)
class MarksConfig(StageConfig):
    """Puts a mark behind the text of each row."""

    mark: str = ""
    """What is put there. Empty = the task's name."""
    seconds: float = 0.0
    """How long a row takes."""
    by_rewriter: bool = False
    """Whether a site must name a rewriter."""

    def site_problems(self, rewriter: RewriterConfig) -> Iterator[Problem]:
        if self.by_rewriter and isinstance(rewriter, NoRewriterConfig):
            yield problem("rewriter", "name who rewrites text for preprocess=[marks]", "none", "Set rewriter=<option>.")

    def filled(self, task: TaskConfig) -> MarksConfig:
        return self if self.mark else replace(self, mark=task.name)


@STAGES.register("marks", MarksConfig)
@dataclass
class Marks:
    config: MarksConfig
    context: StageContext
    column: str | None = "text"
    _marked: dict[int, int] = field(default_factory=dict)

    def apply(self, rows: list[dict[str, Any]], *, client: int, on_progress: OnProgress) -> list[dict[str, Any]]:
        file, made = self.context.folder / "marks.jsonl", []
        kept = dict(map(json.loads, file.read_text().splitlines())) if file.exists() else {}
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as out:
            for number, row in enumerate(rows):
                if row["text"] not in kept:
                    time.sleep(self.config.seconds)
                    kept[row["text"]] = f"{row['text']} {self.config.mark}"
                    out.write(json.dumps([row["text"], kept[row["text"]]]) + "\n")
                made.append({**row, "text": kept[row["text"]]})
                on_progress(number + 1, len(rows))
        self._marked[client] = len(made)
        return made

    def summary(self, client: int) -> Mapping[str, float]:
        return {"marked": self._marked[client], "share of the gate": 0.5}
