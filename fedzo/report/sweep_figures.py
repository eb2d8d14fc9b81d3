"""The figures of a sweep: the scores of its jobs, and what these cost in bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from matplotlib.ticker import PercentFormatter

from fedzo.records.metrics import CentralScore
from fedzo.report.format import counted, score_text, shortened
from fedzo.report.jobs import Job
from fedzo.report.style import (
    BLUE,
    MUTED,
    Picture,
    bytes_axis,
    house_style,
    keep_apart,
    label_at,
    new_axes,
    percent_axis,
)

MAX_NAME = 32  # letters of a job's name; a table has it whole
MAX_NAMED = 20  # points that have room for their jobs' names


class _Point(NamedTuple):
    """A finished job as the figures show it."""

    name: str
    before: CentralScore
    after: CentralScore
    num_bytes: float


def draw_sweep(jobs: Sequence[Job], keys: Sequence[str]) -> list[Picture]:
    """Draw the test scores of finished jobs of one measure; their dev scores where no job has test rows."""
    split = "test" if any(job.scores("test") for job in jobs) else "dev"
    names = in_short(job.in_words(keys) for job in jobs)
    points = [
        _Point(names[job.in_words(keys)], *scores, job.cost.bytes_per_client)
        for job in jobs
        if job.summary and (scores := job.scores(split))
    ]
    if not points:
        return []
    unscored = sum(job.summary is not None for job in jobs) - len(points)
    with house_style():
        pictures = [_before_after(points, keys, unscored=unscored)]
        if len({point.num_bytes for point in points}) > 1:
            pictures.append(_score_by_bytes(points))
    return pictures


def in_short(names: Iterable[str]) -> dict[str, str]:
    """What a figure shows for each name; the whole of each, where what tells them apart would be cut."""
    short = {name: shortened(name, MAX_NAME, tail=MAX_NAME // 2) for name in names}
    return short if len({*short.values()}) == len(short) else {name: name for name in short}


def _before_after(points: Sequence[_Point], keys: Sequence[str], *, unscored: int) -> Picture:
    figure, axes = new_axes(height=0.9 + 0.32 * len(points))
    split, metric = points[0].before.split, points[0].before.metric
    for row, point in enumerate(reversed(points)):
        ends, label = (point.before.value, point.after.value), score_text(metric, point.after.value)
        axes.plot(ends, [row, row], color=MUTED, linewidth=1)
        axes.plot(ends[:1], [row], "o", color=MUTED, markersize=4)
        axes.plot(ends[1:], [row], "o", color=BLUE, markersize=7)
        axes.annotate(label, (ends[1], row), xytext=(0, 7), textcoords="offset points", ha="center")
    axes.set_yticks(range(len(points)), [point.name for point in reversed(points)])
    axes.set_ylim(-0.6, len(points) - 0.2)
    axes.set_xlabel(f"{split} {metric}")
    if metric == "accuracy":
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(visible=True, axis="x")
    axes.grid(visible=False, axis="y")
    caption = f"Grey: before training; blue: after. Jobs by {', '.join(keys) or 'folder'}."
    if unscored:
        caption += f" {counted(unscored, 'finished job')} without {split} scores: not shown."
    return Picture("sweep", f"{split.capitalize()} score of every job", caption, figure)


def _score_by_bytes(points: Sequence[_Point]) -> Picture:
    figure, axes = new_axes()
    for point in points:
        axes.plot(point.num_bytes, point.after.value, "o", color=BLUE, markersize=7)
    split, metric, sent = points[0].after.split, points[0].after.metric, [point.num_bytes for point in points]
    if min(sent) > 0 and max(sent) > 20 * min(sent):
        axes.set_xscale("log")
        axes.minorticks_off()
    else:  # from 0: a large set-up is no small difference
        axes.set_xlim(0, 1.05 * max(sent))
    bytes_axis(axes.xaxis)
    axes.set_xlabel("bytes of a client, both ways, with its set-up")
    axes.set_ylabel(f"{split} {metric}")
    percent_axis(axes, metric)
    named = points if len(points) <= MAX_NAMED else _unbeaten(points)[-MAX_NAMED:]
    keep_apart(figure, [label_at(axes, point.num_bytes, point.after.value, point.name) for point in named])
    title = f"{split.capitalize()} score against bytes of a client"
    better = "Down" if points[0].after.lower_is_better else "Up"
    caption = f"{better} and to the left is better. The bytes are set-up and payload, the mean over clients."
    if len(named) < len(points):
        caption += " Only jobs are named that no other beats with as few bytes."
    return Picture("bytes", title, caption, figure)


def _unbeaten(points: Sequence[_Point]) -> list[_Point]:
    """The points with a better score than all of fewer bytes, or as many; by bytes."""
    found: list[_Point] = []
    for point in sorted(points, key=lambda point: (point.num_bytes, -point.after.merit)):
        if not found or point.after.merit > found[-1].after.merit:
            found.append(point)
    return found
