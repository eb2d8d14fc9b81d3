"""A table and a figure over the jobs of a sweep."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import yaml

from fedzo.errors import RunFolderError
from fedzo.report.format import bytes_text, score_text, seconds_text
from fedzo.report.html import render_page, write_page
from fedzo.report.run_data import RunData, load_run
from fedzo.report.style import BLUE, MUTED, Picture, house_style, new_axes, save_pictures, unwritable


@dataclass(frozen=True, slots=True)
class Job:
    """One job of a sweep; ``run`` is None where it left no run that can be read."""

    folder: Path
    overrides: tuple[str, ...]
    run: RunData | None
    problem: str = ""

    @property
    def finished(self) -> bool:
        """Whether the job ran to its end."""
        return self.run is not None and self.run.summary is not None


def write_sweep_report(sweep_dir: Path) -> Path | None:
    """Write ``sweep.csv``, ``sweep.md`` and ``report.html`` over the jobs in ``sweep_dir``; None if there is no job.

    Raises:
        RunFolderError: The folder cannot be written.
    """
    jobs = _jobs(sweep_dir)
    if not jobs:
        return None
    header, rows = _table(jobs)
    pictures = _pictures(jobs)
    try:
        with (sweep_dir / "sweep.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([header, *rows])
        lines = [header, ["---"] * len(header), *rows]
        (sweep_dir / "sweep.md").write_text("".join(f"| {' | '.join(line)} |\n" for line in lines), encoding="utf-8")
    except OSError as error:
        raise unwritable(sweep_dir, error) from error
    save_pictures(pictures, sweep_dir / "figures")
    failed = [job for job in jobs if not job.finished]
    page = render_page(
        title=f"Sweep of {len(jobs)} jobs",
        subtitle=str(sweep_dir.name),
        headline="",
        headline_note="",
        notes=[f"{job.folder.name}: {job.problem or 'not finished'}" for job in failed],
        tables=[("Jobs", [header, *rows])],
        pictures=pictures,
        details=[],
    )
    return write_page(sweep_dir / "report.html", page)


def _jobs(sweep_dir: Path) -> list[Job]:
    jobs = []
    for path in sorted(sweep_dir.glob("*/overrides.yaml")):
        overrides = tuple(str(item) for item in yaml.safe_load(path.read_text(encoding="utf-8")) or ())
        try:
            jobs.append(Job(path.parent, overrides, load_run(path.parent)))
        except RunFolderError as error:
            jobs.append(Job(path.parent, overrides, None, str(error)))
    return jobs


def _varied(jobs: list[Job]) -> list[str]:
    """Keys whose values differ between jobs."""
    values: dict[str, set[str]] = {}
    for job in jobs:
        for override in job.overrides:
            key, _, value = override.partition("=")
            values.setdefault(key, set()).add(value)
    return [key for key, found in values.items() if len(found) > 1]


def _settings(job: Job, keys: list[str]) -> list[str]:
    given = dict(override.partition("=")[::2] for override in job.overrides)
    return [given.get(key, "") for key in keys]


def _table(jobs: list[Job]) -> tuple[list[str], list[list[str]]]:
    keys = _varied(jobs)
    header = ["job", *keys, "before", "after", "best round", "scalars up, all clients", "time"]
    rows = []
    for job in jobs:
        cells = ["failed", "", "", "", ""]
        if job.run and job.run.summary:
            before, after = job.run.test_scores
            cells = [
                score_text(before.metric, before.value) if before else "n/a",
                score_text(after.metric, after.value) if after else "n/a",
                str(job.run.summary.best_round),
                bytes_text(job.run.summary.payload_up_bytes),
                seconds_text(job.run.seconds),
            ]
        rows.append([job.folder.name, *_settings(job, keys), *cells])
    return header, rows


def _pictures(jobs: list[Job]) -> list[Picture]:
    """Test score before and after, one row a finished job."""
    keys = _varied(jobs)
    ends = []
    for job in jobs:
        before, after = job.run.test_scores if job.run else (None, None)
        if before and after:
            name = ", ".join(_settings(job, keys)) or job.folder.name
            ends.append((name, before.metric, before.value, after.value))
    if not ends:
        return []
    with house_style():
        figure, axes = new_axes(height=0.9 + 0.32 * len(ends))
        for row, (_, _, start, end) in enumerate(reversed(ends)):
            axes.plot([start, end], [row, row], color=MUTED, linewidth=1)
            axes.plot([start], [row], "o", color=MUTED, markersize=4)
            axes.plot([end], [row], "o", color=BLUE, markersize=7)
        axes.set_yticks(range(len(ends)), [name for name, *_ in reversed(ends)])
        axes.set_xlabel(f"test {ends[0][1]}")
        axes.grid(visible=True, axis="x")
        axes.grid(visible=False, axis="y")
    caption = f"Grey: before training; blue: after. Jobs by {', '.join(keys) or 'folder'}."
    return [Picture("sweep", "Test score of every job", caption, figure)]
