"""A table and figures over the jobs of a sweep."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import yaml
from matplotlib.ticker import PercentFormatter

from fedzo.errors import RunFolderError
from fedzo.report.format import bytes_text, score_text, seconds_text
from fedzo.report.html import render_page, write_page
from fedzo.report.records import Summary
from fedzo.report.run_data import RunData, load_run
from fedzo.report.style import (
    BLUE,
    MUTED,
    Picture,
    house_style,
    new_axes,
    percent_axis,
    save_pictures,
    unwritable,
)


@dataclass(frozen=True, slots=True)
class Job:
    """One job of a sweep; ``run`` is None where it left no run that can be read."""

    folder: Path
    settings: dict[str, str]
    run: RunData | None
    problem: str = ""

    @property
    def state(self) -> str:
        """``finished``, ``not finished`` or ``failed``."""
        if self.run is None:
            return "failed"
        return "finished" if self.run.summary else "not finished"

    @property
    def scores(self) -> tuple[str, float, float] | None:
        """Metric and test score before and after a finished run."""
        before, after = self.run.test_scores if self.run and self.run.summary else (None, None)
        return (before.metric, before.value, after.value) if before and after else None


def write_sweep_report(sweep_dir: Path) -> Path | None:
    """Write ``sweep.csv`` (plain numbers), ``sweep.md`` and ``report.html`` over the jobs; None if there is no job.

    Raises:
        RunFolderError: The folder cannot be written.
    """
    jobs = _jobs(sweep_dir)
    if not jobs:
        return None
    keys = _varied(jobs)
    header, rows = _table(jobs, keys)
    pictures = _pictures(jobs, keys)
    try:
        with (sweep_dir / "sweep.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(_numbers(jobs, keys))
        lines = [[cell.replace("|", "\\|") for cell in line] for line in (header, ["---"] * len(header), *rows)]
        (sweep_dir / "sweep.md").write_text("".join(f"| {' | '.join(line)} |\n" for line in lines), encoding="utf-8")
    except OSError as error:
        raise unwritable(sweep_dir, error) from error
    save_pictures(pictures, sweep_dir / "figures")
    page = render_page(
        title=f"Sweep of {len(jobs)} jobs",
        subtitle=sweep_dir.name,
        headline="",
        headline_note="",
        notes=[f"{job.folder.name}: {job.problem or job.state}" for job in jobs if job.state != "finished"],
        tables=[("Jobs", [header, *rows])],
        long_tables=[],
        pictures=pictures,
        details=[],
    )
    return write_page(sweep_dir / "report.html", page)


def _jobs(sweep_dir: Path) -> list[Job]:
    paths = sorted(sweep_dir.glob("*/overrides.yaml"), key=lambda path: (len(path.parent.name), path.parent.name))
    jobs = []
    for path in paths:
        overrides = [str(item) for item in yaml.safe_load(path.read_text(encoding="utf-8")) or ()]
        settings = dict(override.partition("=")[::2] for override in overrides)
        try:
            jobs.append(Job(path.parent, settings, load_run(path.parent)))
        except RunFolderError as error:
            jobs.append(Job(path.parent, settings, None, str(error)))
    return jobs


def _varied(jobs: list[Job]) -> list[str]:
    """Keys whose values differ between jobs, or that only some jobs set."""
    keys = dict.fromkeys(key for job in jobs for key in job.settings)
    return [key for key in keys if len({job.settings.get(key) for job in jobs}) > 1]


def _name(job: Job, keys: list[str]) -> str:
    return ", ".join(job.settings.get(key, "-") for key in keys) or job.folder.name


def _table(jobs: list[Job], keys: list[str]) -> tuple[list[str], list[list[str]]]:
    header = [
        "job",
        *keys,
        "before",
        "after",
        "best round",
        "worst client",
        "flagged",
        "scalars up, all clients",
        "time",
    ]
    rows = []
    for job in jobs:
        cells = [job.state, *[""] * 6]
        if job.scores and job.run and job.run.summary:
            (metric, before, after), summary = job.scores, job.run.summary
            cells = [
                score_text(metric, before),
                score_text(metric, after),
                str(summary.best_round),
                "" if summary.worst_client is None else score_text(metric, summary.worst_client),
                _flagged(summary),
                bytes_text(summary.payload_up_bytes),
                seconds_text(job.run.seconds),
            ]
        rows.append([job.folder.name, *(job.settings.get(key, "") for key in keys), *cells])
    return header, rows


def _flagged(summary: Summary) -> str:
    """The clients of the last decision on who stops early; nothing where there was none."""
    if summary.flagged is None:
        return ""
    return " ".join(map(str, summary.flagged)) or "none"


def _numbers(jobs: list[Job], keys: list[str]) -> list[list[object]]:
    rows: list[list[object]] = [
        [
            "job",
            *keys,
            *("state", "before", "after", "best_round", "worst_client", "flagged"),
            *("payload_up_bytes", "payload_down_bytes", "seconds"),
        ]
    ]
    for job in jobs:
        row: list[object] = [job.folder.name, *(job.settings.get(key, "") for key in keys), job.state]
        if job.scores and job.run and job.run.summary:
            summary = job.run.summary
            row += [*job.scores[1:], summary.best_round, summary.worst_client, _flagged(summary)]
            row += [summary.payload_up_bytes, summary.payload_down_bytes, summary.seconds]
        rows.append(row)
    return rows


def _pictures(jobs: list[Job], keys: list[str]) -> list[Picture]:
    done = [job for job in jobs if job.scores]
    if not done:
        return []
    with house_style():
        pictures = [_before_after(done, keys)]
        if len({job.run.summary.payload_up_bytes for job in done if job.run and job.run.summary}) > 1:
            pictures.append(_score_by_bytes(done, keys))
    return pictures


def _before_after(jobs: list[Job], keys: list[str]) -> Picture:
    figure, axes = new_axes(height=0.9 + 0.32 * len(jobs))
    metric = ""
    for row, job in enumerate(reversed(jobs)):
        assert job.scores is not None
        metric, before, after = job.scores
        axes.plot([before, after], [row, row], color=MUTED, linewidth=1)
        axes.plot([before], [row], "o", color=MUTED, markersize=4)
        axes.plot([after], [row], "o", color=BLUE, markersize=7)
        axes.annotate(score_text(metric, after), (after, row), xytext=(0, 7), textcoords="offset points", ha="center")
    axes.set_yticks(range(len(jobs)), [_name(job, keys) for job in reversed(jobs)])
    axes.set_ylim(-0.6, len(jobs) - 0.2)
    axes.set_xlabel(f"test {metric}")
    if metric == "accuracy":
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(visible=True, axis="x")
    axes.grid(visible=False, axis="y")
    caption = f"Grey: before training; blue: after. Jobs by {', '.join(keys) or 'folder'}."
    return Picture("sweep", "Test score of every job", caption, figure)


def _score_by_bytes(jobs: list[Job], keys: list[str]) -> Picture:
    figure, axes = new_axes()
    for job in jobs:
        assert job.scores is not None
        assert job.run is not None
        assert job.run.summary is not None
        sent = job.run.summary.payload_up_bytes
        axes.plot([sent], [job.scores[2]], "o", color=BLUE, markersize=7)
        axes.annotate(
            _name(job, keys), (sent, job.scores[2]), xytext=(6, 4), textcoords="offset points", annotation_clip=False
        )
        metric = job.scores[0]
    axes.set_xlabel("scalars up, all clients (bytes)")
    percent_axis(axes, metric)
    return Picture("bytes", "Test score against scalars sent", "Up and to the left is better.", figure)
