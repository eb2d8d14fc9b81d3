"""Scores of several runs over their rounds: all as plain numbers for ``scores.csv``, and those of dev rows drawn.

Rounds are those that were done by then, 0 before training.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from statistics import fmean

from fedzo.fl.config import BestBy
from fedzo.report.format import counted
from fedzo.report.jobs import SEED, Job, dev_number
from fedzo.report.over_seeds import Group, max_seeds, ranked
from fedzo.report.style import (
    BLUE,
    DARK,
    GREEN,
    ORANGE,
    Picture,
    house_style,
    keep_apart,
    label_at,
    new_axes,
    percent_axis,
    whole_numbers,
)
from fedzo.report.sweep_figures import in_short

LOOKS = tuple(product(("-", "--"), (BLUE, ORANGE, GREEN, DARK)))  # of lines, whose names have their colours
_COLUMNS = ("split", "evaluator", "metric", "rounds", "value", "loss", "bytes_per_client", "forwards", "round_seconds")


def score_numbers(jobs: Sequence[Job], keys: Sequence[str]) -> list[list[object]]:
    """A header and a row for each score of the server's rows, with what the run had cost by then."""
    told = [key for key in keys if key != SEED]
    rows: list[list[object]] = [["job", *told, SEED, *_COLUMNS]]
    for job in jobs:
        whose = [job.name, *(job.settings.get(key, "") for key in told), job.seed]
        for scored in job.run.scored if job.run else ():
            for score in scored.central:
                cost = job.costs.get(score.round)
                spent = (cost.bytes_per_client, cost.forwards, cost.seconds) if cost else ()
                found = (score.split, score.evaluator, score.metric, score.round, score.value, score.loss)
                rows.append([*whose, *found, *spent])
    return rows


def draw_curves(groups: Sequence[Group], by: BestBy) -> list[Picture]:
    """Draw what chooses the best round, over the rounds: a line a group; of many groups, those of the best mean."""
    lines = [(group, points) for group in ranked(groups, by) if len(points := curve(group, by)) > 1]
    if not lines:
        return []
    shown, best = lines[: len(LOOKS)], lines[0][0]
    what = "loss" if by is BestBy.loss else best.scores("dev")[0].metric
    names = in_short(group.name for group, _ in shown)
    with house_style():
        figure, axes = new_axes(height=3.4)
        labels = []
        for (group, points), (dash, colour) in zip(shown, LOOKS, strict=False):
            axes.plot([*points], [*points.values()], color=colour, linestyle=dash)
            end = max(points)
            labels.append(label_at(axes, end, points[end], names[group.name], color=colour))
        axes.set_xlabel("rounds")
        axes.set_ylabel(f"dev {what}")
        axes.xaxis.set_major_locator(whole_numbers(8))
        percent_axis(axes, what)
        keep_apart(figure, labels)
    caption = f"{'Down' if best.is_lower_better(by) else 'Up'} is better."
    if max_seeds(groups) > 1:
        caption += " A line is the mean over the seeds of a setting, after the rounds that all of them scored."
    if len(shown) < len(lines):
        caption += f" Of {counted(len(lines), 'line')}, those of the best {len(shown)} mean dev scores are shown."
    return [Picture("curves", f"Dev {what} over rounds", caption, figure)]


def curve(group: Group, by: BestBy) -> dict[int, float]:
    """The mean dev score of its jobs, by the rounds after which all of them have one."""
    told = [
        {score.round: number for score in job.run.first.dev if (number := dev_number(score, by)) is not None}
        for job in group.jobs
        if job.run
    ]
    return {done: fmean(scores[done] for scores in told) for done in told[0] if all(done in scores for scores in told)}
