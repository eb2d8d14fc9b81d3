"""Tables and figures over several runs, written: the jobs of a sweep, or runs that were started one by one."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from fedzo.fl.config import BestBy
from fedzo.records.folder import REPORT, replace_file
from fedzo.report.curves import draw_curves, score_numbers
from fedzo.report.format import span
from fedzo.report.html import Table, render_page, write_page
from fedzo.report.jobs import Job, are_alike, are_ordered, best_by, jobs_of_runs, jobs_of_sweep, varied
from fedzo.report.over_seeds import best_group, groups_of, headline, seeds_notes, seeds_table, settings_notes
from fedzo.report.run_data import computed_with
from fedzo.report.style import save_pictures, writing_report
from fedzo.report.sweep_figures import draw_sweep
from fedzo.report.sweep_tables import job_numbers, job_table


def write_sweep_report(sweep_dir: Path, *, out_dir: Path | None = None) -> Path | None:
    """Write ``sweep.csv``, ``scores.csv``, ``sweep.md`` and ``report.html`` over the jobs; None if there is no job.

    They go into the sweep's folder, or into another.

    Returns:
        The path of ``report.html``.

    Raises:
        RunFolderError: The folder cannot be written.
    """
    jobs = jobs_of_sweep(sweep_dir)
    title = f"Sweep of {len(jobs)} jobs"
    return _write(jobs, out_dir or sweep_dir, title=title, subtitle=sweep_dir.name) if jobs else None


def write_comparison(runs: Sequence[Path], out_dir: Path) -> Path:
    """The same over runs that were started one by one; the folder of a sweep stands for its jobs.

    Raises:
        RunFolderError: The folder cannot be written.
    """
    jobs = jobs_of_runs(runs)
    return _write(jobs, out_dir, title=f"{len(jobs)} runs", subtitle=", ".join(run.name for run in runs))


def unfinished_jobs(sweep_dir: Path) -> list[str]:
    """Folder names of the jobs that have not come to their end."""
    return [job.name for job in jobs_of_sweep(sweep_dir) if job.state != "finished"]


def _write(jobs: list[Job], folder: Path, *, title: str, subtitle: str) -> Path:
    keys, by = varied(jobs), best_by(jobs)
    alike, ordered = are_alike(jobs), are_ordered(jobs, by)
    groups = groups_of(jobs, keys)
    best = best_group(groups, by) if alike and ordered else None
    reference = best if best and best.scores("test") else None
    tables = [Table("Jobs", job_table(jobs, keys), has_head=True)]
    if over_seeds := seeds_table(groups, keys, by, reference):
        tables.append(Table("Over seeds", over_seeds, has_head=True))
    pictures = draw_sweep(jobs, keys) if alike else []
    if alike and ordered:
        pictures += draw_curves(groups, by)
    with writing_report(folder):
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / "sweep.csv", _csv(job_numbers(jobs, keys)))
        replace_file(folder / "scores.csv", _csv(score_numbers(jobs, keys)))
        replace_file(folder / "sweep.md", "\n".join(_markdown(table.rows) for table in tables))
    save_pictures(pictures, folder / "figures")
    page = render_page(
        title=title,
        subtitle=subtitle,
        headline=headline(best, by) if best else "",
        headline_note=f"Choose settings by the dev {by}: a test score that chose a setting is biased.",
        notes=[
            *(f"{job.name}: {job.problem or job.state}" for job in jobs if job.state != "finished"),
            *_not_compared(by, alike=alike, ordered=ordered),
            *_chances(jobs),
            *settings_notes(jobs, keys),
            *_environment_notes(jobs),
            *seeds_notes(groups, jobs, reference, are_compared=alike and ordered),
        ],
        tables=tables,
        pictures=pictures,
    )
    return write_page(folder / REPORT, page)


def _csv(rows: Iterable[list[object]]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue()


def _markdown(rows: Iterable[list[str]]) -> str:
    header, *lines = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, ["---"] * len(header), *lines))


def _not_compared(by: BestBy, *, alike: bool, ordered: bool) -> list[str]:
    """Why no job is named the best, if none is."""
    if not alike:
        return ["The runs have different tasks or measures: no figure and no best run compares them."]
    if not ordered:
        what, best = ("losses", "lowest") if by is BestBy.loss else ("values", "best")
        return [f"The dev {what} may be of different rows or kinds: none is named the {best}."]
    return []


def _chances(jobs: Sequence[Job]) -> list[str]:
    """Whether the jobs had equally many rounds to choose their best from."""
    counts = [len(job.run.first.dev) for job in jobs if job.run and job.summary and job.run.first.dev]
    if len(set(counts)) < 2:
        return []
    return [f"Best rounds were chosen among {span(counts, 'dev score')}: jobs with more scores are favoured."]


def _environment_notes(jobs: Sequence[Job]) -> list[str]:
    """Whether finished jobs were computed with different versions, devices or threads."""
    runs = [job.run for job in jobs if job.run and job.summary]
    told = [each for run in runs if run.environment for each in computed_with(run.environment)]
    names = dict.fromkeys(name for each in told for name in each)
    differ = [name for name in names if len({str(each.get(name)) for each in told}) > 1]
    chosen = {
        run.setup.forwards.products or run.setup.forwards.dtype
        for run in runs
        if run.setup and run.setup.forwards and run.setting("model", "dtype") == "auto"
    }
    if len(chosen) > 1:
        differ.append("dtype (of model.dtype=auto)")
    if not differ:
        return []
    what = ", ".join(differ)
    return [f"Jobs were computed with different {what}: times do not compare, and scores may differ for that alone."]
