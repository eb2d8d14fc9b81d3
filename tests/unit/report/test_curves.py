"""Scores over rounds: their costs against sums by hand, and lines against means of their seeds."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedzo.fl.config import BestBy
from fedzo.records.metrics import CentralScore
from fedzo.report.curves import LOOKS, curve, draw_curves
from fedzo.report.jobs import jobs_of_sweep
from fedzo.report.over_seeds import Group
from fedzo.report.sweep import write_sweep_report

MakeRun = Callable[..., Path]


def group(name: str, *seeds: dict[int, float | None]) -> Group:
    """A finished job for each dict of dev losses by rounds."""
    return Group(name, (name,), tuple(job(str(seed), losses) for seed, losses in enumerate(seeds)))


def job(seed: str, losses: dict[int, float | None]) -> Any:
    """A finished job as curves and groups ask for it, whose last round is the best."""
    dev = [
        CentralScore(
            seconds=1.0, split="dev", round=done, metric="accuracy", value=1 - (loss or 0), loss=loss, num_examples=10
        )
        for done, loss in losses.items()
    ]
    run = SimpleNamespace(first=SimpleNamespace(dev=dev))
    return SimpleNamespace(seed=seed, run=run, scores=lambda split: (dev[0], dev[-1]) if split == "dev" else None)


def test_every_score_has_a_row_with_what_the_run_had_cost_by_then(make_run: MakeRun, tmp_path: Path) -> None:
    whole = (make_run("other/whole") / "metrics.jsonl").read_text().splitlines()
    lines: list[dict[str, Any]] = [json.loads(line) for line in whole]
    lines[0]["forwards_per_step"] = 2
    for line in lines:
        if line["kind"] == "round":
            line["payload_up_bytes"] = 12 * (1 + line["round"])
    lines.append({**next(line for line in lines if line.get("split") == "dev"), "round": 4, "value": 0.6, "loss": 0.5})
    for lr, seed in (("0.1", "7"), ("0.2", "8")):
        make_run(f"jobs/{lr}", lines=lines, trainer__lr=lr, seed=seed)
    make_run("jobs/failed", lines=[], trainer__lr="0.4")

    write_sweep_report(tmp_path / "jobs")

    with (tmp_path / "jobs" / "scores.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header[:6] == ["job", "trainer.lr", "seed", "split", "evaluator", "metric"]
    assert header[6:] == ["rounds", "value", "loss", "bytes_per_client", "forwards", "round_seconds"]
    assert [row[:3] for row in rows] == [["0.1", "0.1", "7"]] * 5 + [["0.2", "0.2", "8"]] * 5
    assert {tuple(row[4:6]) for row in rows} == {("answers", "accuracy")}
    # a client of three sends 4 B more each round (4, 8, ...) and gets 4 B; each round has 3 steps of 2 forwards
    begun, middle, end = (
        ["459000.0", "0", "0.0"],
        [str(459_000 + 4.0 + 8 + 12 + 16 + 4 * 4), "24", "4.0"],
        [str(459_000 + 4.0 * 55 + 4 * 10), "60", "10.0"],
    )
    assert [[row[3], *row[6:]] for row in rows[:5]] == [
        ["test", "0", "0.555", str(1 - 0.555), *begun],
        ["dev", "0", "0.54", str(1 - 0.54), *begun],
        ["dev", "4", "0.6", "0.5", *middle],
        ["dev", "10", "0.75", "0.25", *end],
        ["test", "10", "0.765", str(1 - 0.765), *end],
    ]
    with (tmp_path / "jobs" / "sweep.csv").open(newline="") as file:
        first, *_ = csv.DictReader(file)
    assert [first[name] for name in ("bytes_per_client", "forwards", "round_seconds")] == end


def test_the_jobs_of_a_sweep_keep_no_record_of_their_rounds(make_run: MakeRun, tmp_path: Path) -> None:
    """Those of sixty jobs of 20,000 rounds and eight clients would take gigabytes."""
    make_run("0", trainer="mezo")

    (found,) = jobs_of_sweep(tmp_path)

    assert found.run is not None
    assert (found.run.rounds, found.run.places) == ((), {})
    assert [*found.costs] == [0, 10]


def test_a_line_is_the_mean_of_its_seeds_after_the_rounds_that_all_have_scored() -> None:
    found = group("a", {0: 0.9, 4: 0.5, 10: 0.3}, {0: 0.7, 4: 0.3, 6: 0.1, 10: 0.1}, {0: 0.8, 4: None, 10: 0.2})

    assert curve(found, BestBy.loss) == pytest.approx({0: 0.8, 10: 0.2})
    assert curve(group("b", {0: 0.9, 4: 0.5}), BestBy.value) == pytest.approx({0: 0.1, 4: 0.5})


@pytest.mark.parametrize(
    ("by", "what", "better", "ends"),
    [(BestBy.loss, "loss", "Down", [0.2, 0.8]), (BestBy.value, "accuracy", "Up", [0.8, 0.2])],
)
def test_settings_are_drawn_the_best_first(by: BestBy, what: str, better: str, ends: list[float]) -> None:
    groups = [group("slow", {0: 0.9, 10: 0.8}, {0: 0.9, 10: 0.8}), group("fast", {0: 0.8, 10: 0.3}, {0: 0.8, 10: 0.1})]

    (picture,) = draw_curves(groups, by)

    (axes,) = picture.figure.axes
    assert picture.title == f"Dev {what} over rounds"
    assert picture.caption.startswith(f"{better} is better. A line is the mean over the seeds of a setting")
    assert [text.get_text() for text in axes.texts] == ["fast", "slow"]
    assert [float(line.get_ydata()[-1]) for line in axes.lines] == pytest.approx(ends)
    assert [float(x) for x in axes.lines[0].get_xdata()] == [0, 10]


def test_of_many_settings_the_best_are_drawn_and_told_apart_within_the_figure() -> None:
    groups = [group(f"server_optimizer.lr=1e-{k:02d}", {0: 1.0, 10: 0.5 + k / 1000}) for k in range(12)]

    (picture,) = draw_curves(groups[::-1], BestBy.loss)

    (axes,) = picture.figure.axes
    assert [text.get_text() for text in axes.texts] == [each.name for each in groups[: len(LOOKS)]]
    assert picture.caption == "Down is better. Of 12 lines, those of the best 8 mean dev scores are shown."
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == 8
    picture.figure.canvas.draw()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert all(picture.figure.bbox.x0 <= box.x0 and box.x1 <= picture.figure.bbox.x1 for box in boxes)
    assert all(low.y1 <= high.y0 or high.y1 <= low.y0 for at, low in enumerate(boxes) for high in boxes[:at])
    assert axes.get_position().width > 0.5


def test_without_two_scores_of_a_setting_there_is_no_figure() -> None:
    assert draw_curves([group("a", {10: 0.3}), group("b", {0: None, 10: 0.2})], BestBy.loss) == []
