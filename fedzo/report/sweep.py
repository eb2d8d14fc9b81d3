"""A table and figures over several runs: the jobs of a sweep, or runs that were started one by one."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.ticker import PercentFormatter

from fedzo.errors import RunFolderError
from fedzo.records.decode import parse_json
from fedzo.records.folder import CONFIG, OVERRIDES, REPORT, RUN_FILE, read_file, replace_file
from fedzo.records.metrics import CentralScore, Summary
from fedzo.report.format import bytes_text, score_text, seconds_text
from fedzo.report.html import render_page, write_page
from fedzo.report.run_data import RunData, load_run, read_overrides
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
    save_pictures,
    unwritable,
)

_SETTINGS_OF_LOSSES = (
    *(("task", "loss"), ("task", "candidates"), ("task", "answer"), ("data", "path")),
    *(("split", "seed"), ("split", "num_dev"), ("split", "num_test")),
)
"""Which rows are the dev rows, and what their loss is."""


@dataclass(frozen=True, slots=True)
class Job:
    """One job of a sweep; ``run`` is None where it left no run that can be read."""

    name: str
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
    def summary(self) -> Summary | None:
        """How the run ended; None while it has not."""
        return self.run.summary if self.run else None

    def scores(self, split: str) -> tuple[CentralScore, CentralScore] | None:
        """The first evaluator's score of a finished run on these rows before it, and that of its best round."""
        if self.run is None or self.summary is None:
            return None
        dev = {score.round: score for score in self.run.first.dev}
        before, after = self.run.first.test if split == "test" else (dev.get(0), dev.get(self.summary.best_round))
        return (before, after) if before and after else None


def write_sweep_report(sweep_dir: Path, *, out_dir: Path | None = None) -> Path | None:
    """Write ``sweep.csv`` (plain numbers), ``sweep.md`` and ``report.html`` over the jobs; None if there is no job.

    They go into the sweep's folder, or into another.

    Raises:
        RunFolderError: The folder cannot be written.
    """
    jobs = _jobs(sweep_dir)
    title = f"Sweep of {len(jobs)} jobs"
    return _write(jobs, out_dir or sweep_dir, title=title, subtitle=sweep_dir.name) if jobs else None


def write_comparison(runs: Sequence[Path], out_dir: Path) -> Path:
    """The same over runs that were started one by one; the folder of a sweep stands for its jobs.

    Raises:
        RunFolderError: The folder cannot be written.
    """
    folders = [folder for run in runs for folder in ([] if (run / CONFIG).exists() else _job_folders(run)) or [run]]
    names = [folder.name for folder in folders]
    jobs = []
    for folder in folders:
        whole = folder.absolute()
        jobs.append(_job(folder, folder.name if names.count(folder.name) == 1 else f"{whole.parent.name}/{whole.name}"))
    return _write(jobs, out_dir, title=f"{len(jobs)} runs", subtitle=", ".join(run.name for run in runs))


def _write(jobs: list[Job], folder: Path, *, title: str, subtitle: str) -> Path:
    keys = _varied(jobs)
    header, rows = _table(jobs, keys)
    alike = len({kind for job in jobs if (kind := _kind(job))}) <= 1
    ordered = len({losses for job in jobs if (losses := _kind_of_losses(job))}) <= 1
    not_ordered = "The dev losses may be of different rows or kinds: none is named the lowest."
    pictures = _pictures(jobs, keys) if alike else []
    table = io.StringIO(newline="")
    csv.writer(table).writerows(_numbers(jobs, keys))
    lines = [[cell.replace("|", "\\|") for cell in line] for line in (header, ["---"] * len(header), *rows)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / "sweep.csv", table.getvalue())
        replace_file(folder / "sweep.md", "".join(f"| {' | '.join(line)} |\n" for line in lines))
    except OSError as error:
        raise unwritable(folder, error) from error
    save_pictures(pictures, folder / "figures")
    page = render_page(
        title=title,
        subtitle=subtitle,
        headline=_best(jobs, keys) if alike and ordered else "",
        headline_note="Choose by the dev loss: test rows that chose a setting no longer measure anything.",
        notes=[
            *(f"{job.name}: {job.problem or job.state}" for job in jobs if job.state != "finished"),
            *([] if alike else ["The runs have different tasks or measures: no figure and no best run compares them."]),
            *([] if ordered or not alike else [not_ordered]),
        ],
        tables=[("Jobs", [header, *rows])],
        long_tables=[],
        pictures=pictures,
        details=[],
    )
    return write_page(folder / REPORT, page)


def unfinished_jobs(sweep_dir: Path) -> list[str]:
    """Folder names of the jobs that have not come to their end."""
    return [job.name for job in _jobs(sweep_dir) if job.state != "finished"]


def _jobs(sweep_dir: Path) -> list[Job]:
    return [_job(folder, folder.relative_to(sweep_dir).as_posix()) for folder in _job_folders(sweep_dir)]


def _job_folders(sweep_dir: Path) -> list[Path]:
    """In a sweep's folder, or deeper by ``hydra.sweep.subdir``; there Hydra may keep overrides of its own, too."""
    found = {path.parent for path in sweep_dir.glob(f"*/{OVERRIDES}")}
    found |= {path.parent for path in sweep_dir.glob(f"*/**/{OVERRIDES}") if (path.parent / CONFIG).exists()}
    return sorted(found, key=_place)


def _place(folder: Path) -> tuple[bool, int, str]:
    """Jobs by their numbers, with which the names of their folders begin."""
    number = folder.name.partition("_")[0]
    return not number.isdecimal(), int(number) if number.isdecimal() else 0, folder.as_posix()


def _job(folder: Path, name: str) -> Job:
    settings: dict[str, str] = {}
    try:
        settings = dict(override.partition("=")[::2] for override in read_overrides(folder))
        return Job(name, folder, settings, load_run(folder))
    except RunFolderError as error:
        return Job(name, folder, settings, None, str(error))


def _kind(job: Job) -> tuple[object, ...] | None:
    """What its scores are of; None without scores."""
    if job.run is None or (scores := job.scores("test") or job.scores("dev")) is None:
        return None
    return job.run.setting("task", "name"), job.run.first.evaluator, scores[1].metric


def _kind_of_losses(job: Job) -> str | None:
    """What its dev loss is of: on other rows, or of other answers, a lower one is no better; None without one."""
    if job.run is None or (dev := job.scores("dev")) is None or dev[1].loss is None:
        return None
    settings = [job.run.setting(*path) for path in _SETTINGS_OF_LOSSES]
    counted_by = _tokenizer(job.run) if job.run.setting("task", "loss") == "lm" else None
    return repr([*settings, dev[1].num_examples, counted_by])


def _tokenizer(run: RunData) -> object:
    """Whose tokens a language-model loss is of: the digest that the peers agreed on, else the model's name."""
    try:
        text = read_file(run.run_dir, RUN_FILE)
        agreed = parse_json(text, where=str(run.run_dir / RUN_FILE), error=RunFolderError)
        return agreed["base"]["tokenizer_digest"]
    except (OSError, KeyError, TypeError):
        return run.setting("model", "name")


def _best(jobs: list[Job], keys: list[str]) -> str:
    """The finished job of the lowest dev loss; empty where fewer than two have one."""
    losses = {job.folder: dev[1].loss for job in jobs if (dev := job.scores("dev")) and dev[1].loss is not None}
    if len(losses) < 2:
        return ""
    best = min((job for job in jobs if job.folder in losses), key=lambda job: losses[job.folder])
    return f"Lowest dev loss: {losses[best.folder]:.3f} ({_name(best, keys)})"


def _varied(jobs: list[Job]) -> list[str]:
    """Keys whose values differ between jobs, or that only some jobs set."""
    keys = dict.fromkeys(key for job in jobs for key in job.settings)
    return [key for key in keys if len({job.settings.get(key) for job in jobs}) > 1]


def _name(job: Job, keys: list[str]) -> str:
    return ", ".join(job.settings.get(key, "-") for key in keys) or job.name


def _table(jobs: list[Job], keys: list[str]) -> tuple[list[str], list[list[str]]]:
    header = [
        *("job", *keys, "state", "best round", "dev loss", "dev", "test before", "test after"),
        *("worst client (last round)", "flagged", "payload up, all clients", "time"),
    ]
    rows = []
    for job in jobs:
        row = [job.name, *(job.settings.get(key, "") for key in keys), job.state]
        if job.run and (summary := job.summary):
            dev, test, worst = job.scores("dev"), job.scores("test"), summary.worst_client
            row += [
                "" if dev is None else str(summary.best_round),
                "" if dev is None or dev[1].loss is None else f"{dev[1].loss:.3f}",
                "" if dev is None else score_text(dev[1].metric, dev[1].value),
                *([score_text(score.metric, score.value) for score in test] if test else ("", "")),
                "" if worst is None else score_text(worst.metric, worst.value),
                _flagged(summary),
                bytes_text(summary.payload_up_bytes),
                seconds_text(job.run.seconds),
            ]
        rows.append(row + [""] * (len(header) - len(row)))
    return header, rows


def _flagged(summary: Summary) -> str:
    """The clients of the last decision on who stops early; nothing where there was none."""
    if summary.step_policy is None:
        return ""
    return " ".join(str(row.client) for row in summary.step_policy.flagged) or "none"


def _numbers(jobs: list[Job], keys: list[str]) -> list[list[object]]:
    rows: list[list[object]] = [
        [
            "job",
            *keys,
            *("state", "best_round", "dev_loss", "dev", "test_before", "test_after"),
            *("worst_client_last_round", "flagged", "payload_up_bytes", "payload_down_bytes", "seconds"),
        ]
    ]
    for job in jobs:
        row: list[object] = [job.name, *(job.settings.get(key, "") for key in keys), job.state]
        if summary := job.summary:
            dev, test = job.scores("dev"), job.scores("test")
            row += [summary.best_round if dev else None, *((dev[1].loss, dev[1].value) if dev else (None, None))]
            row += [score.value for score in test] if test else [None, None]
            row += [summary.worst_client.value if summary.worst_client else None, _flagged(summary)]
            row += [summary.payload_up_bytes, summary.payload_down_bytes, summary.seconds]
        rows.append(row)
    return rows


def _pictures(jobs: list[Job], keys: list[str]) -> list[Picture]:
    split = "test" if any(job.scores("test") for job in jobs) else "dev"
    done = [(_name(job, keys), *scores, job.summary) for job in jobs if (scores := job.scores(split)) and job.summary]
    if not done:
        return []
    with house_style():
        pictures = [_before_after([(name, before, after) for name, before, after, _ in done], keys)]
        sent = [(name, after, summary.payload_up_bytes) for name, _, after, summary in done]
        if len({payload_bytes for _, _, payload_bytes in sent}) > 1:
            pictures.append(_score_by_bytes(sent))
    return pictures


def _before_after(jobs: list[tuple[str, CentralScore, CentralScore]], keys: list[str]) -> Picture:
    figure, axes = new_axes(height=0.9 + 0.32 * len(jobs))
    split, metric = jobs[0][1].split, jobs[0][1].metric
    for row, (_, before, after) in enumerate(reversed(jobs)):
        ends, label = (before.value, after.value), score_text(metric, after.value)
        axes.plot(ends, [row, row], color=MUTED, linewidth=1)
        axes.plot(ends[:1], [row], "o", color=MUTED, markersize=4)
        axes.plot(ends[1:], [row], "o", color=BLUE, markersize=7)
        axes.annotate(label, (ends[1], row), xytext=(0, 7), textcoords="offset points", ha="center")
    axes.set_yticks(range(len(jobs)), [name for name, _, _ in reversed(jobs)])
    axes.set_ylim(-0.6, len(jobs) - 0.2)
    axes.set_xlabel(f"{split} {metric}")
    if metric == "accuracy":
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(visible=True, axis="x")
    axes.grid(visible=False, axis="y")
    caption = f"Grey: before training; blue: after. Jobs by {', '.join(keys) or 'folder'}."
    return Picture("sweep", f"{split.capitalize()} score of every job", caption, figure)


def _score_by_bytes(jobs: list[tuple[str, CentralScore, int]]) -> Picture:
    figure, axes = new_axes()
    for _, score, payload_bytes in jobs:
        axes.plot(payload_bytes, score.value, "o", color=BLUE, markersize=7)
    split, metric, sent = jobs[0][1].split, jobs[0][1].metric, [payload_bytes for _, _, payload_bytes in jobs]
    if min(sent) > 0 and max(sent) > 20 * min(sent):
        axes.set_xscale("log")
        axes.minorticks_off()
    bytes_axis(axes.xaxis)
    axes.set_xlabel("payload up, all clients")
    axes.set_ylabel(f"{split} {metric}")
    percent_axis(axes, metric)
    keep_apart(figure, [label_at(axes, payload_bytes, score.value, name) for name, score, payload_bytes in jobs])
    title = f"{split.capitalize()} score against payload sent"
    return Picture("bytes", title, "Up and to the left is better.", figure)
