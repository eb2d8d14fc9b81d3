"""The jobs of a sweep, or runs that were started one by one: what each has found, and whether that can be compared."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Annotated, NamedTuple

from fedzo.errors import FedzoError, FolderInUseError, RunFolderError, printable
from fedzo.fl.config import BestBy
from fedzo.fl.log_store import has_begun
from fedzo.records.decode import parse_json, read_record, to_json
from fedzo.records.fields import Length
from fedzo.records.folder import CONFIG, FAILED, OVERRIDES, RUN_FILE, read_file, replace_file
from fedzo.records.metrics import CentralScore, Summary
from fedzo.records.texts import read_overrides
from fedzo.report.run_data import RunData, load_run

SEED = "seed"
"""The key of the run seed."""
_SETTINGS_OF_DEV_ROWS = (
    ("task", "candidates"),
    ("task", "answer"),
    ("data", "path"),
    ("split", "seed"),
    ("split", "num_dev"),
    ("split", "num_test"),
)
"""Which rows are the dev rows, and what is asked of them."""
_MAX_TEXT = 1 << 20
_Text = Annotated[str, Length(0, _MAX_TEXT)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """An error that ended a job, and the job's overrides: a run in its folder may have others."""

    overrides: Annotated[tuple[_Text, ...], Length(0, 1 << 16)]
    text: _Text


@contextmanager
def noted_failure(folder: Path, overrides: Sequence[str]) -> Iterator[None]:
    """Leave a note in a job's folder if the job fails; one of an earlier start is removed."""
    with suppress(OSError):  # a folder that cannot be written is told of by the start
        (folder / FAILED).unlink(missing_ok=True)
    try:
        yield
    except FolderInUseError:  # whoever has the folder may yet finish the run
        raise
    except Exception as error:
        text = str(error) if isinstance(error, FedzoError) else repr(error)
        with suppress(OSError, ValueError):  # such as a full disk, for which the job failed, or text that is not UTF-8
            failure = Failure(overrides=tuple(overrides), text=text[:_MAX_TEXT])
            replace_file(folder / FAILED, to_json(failure))
        raise


class Cost(NamedTuple):
    """What a run has cost by the end of some round.

    Attributes:
        setup_bytes: What a client was sent before the first.
        payload_bytes: What a client has sent and received in rounds, the mean over clients.
        forwards: Of all local steps that counted, of all clients; None where the set-up does not tell a step's.
        seconds: Of the rounds alone.
    """

    setup_bytes: int
    payload_bytes: float
    forwards: int | None
    seconds: float

    @property
    def bytes_per_client(self) -> float:
        """Both ways, with the set-up."""
        return self.setup_bytes + self.payload_bytes


@dataclass(frozen=True, slots=True)
class Job:
    """One job of a sweep.

    Attributes:
        name: Its folder.
        settings: The words of its command line, by key.
        run: Without its rounds, since those of all jobs would fill the memory; None where the job failed, or left no
            run that can be read.
        problem: Why there is none.
        costs: By rounds done: at every score of the server's rows, and in the end.
    """

    name: str
    settings: dict[str, str]
    run: RunData | None
    problem: str = ""
    costs: dict[int, Cost] = field(default_factory=dict)

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

    @property
    def cost(self) -> Cost:
        """Of all rounds of its run."""
        return self.costs[max(self.costs)]

    @property
    def seed(self) -> str:
        """The run seed; empty where it is not known."""
        recorded = None if self.run is None else self.run.setting(SEED)
        return self.settings.get(SEED, "") if recorded is None else str(recorded)

    def scores(self, split: str) -> tuple[CentralScore, CentralScore] | None:
        """The first evaluator's score of a finished run on these rows before it, and that of its best round."""
        if self.run is None or self.summary is None:
            return None
        dev = {score.round: score for score in self.run.first.dev}
        before, after = self.run.first.test if split == "test" else (dev.get(0), dev.get(self.summary.best_round))
        return (before, after) if before and after else None

    def in_words(self, keys: Sequence[str]) -> str:
        """Its values of these keys."""
        return ", ".join(self.settings.get(key, "-") for key in keys) or self.name


def jobs_of_sweep(sweep_dir: Path) -> list[Job]:
    """The jobs in a sweep's folder, in order."""
    return [_job(folder, folder.relative_to(sweep_dir).as_posix()) for folder in _job_folders(sweep_dir)]


def jobs_of_runs(runs: Sequence[Path]) -> list[Job]:
    """A job for each run folder, and those of each folder of a sweep; equal names have their parents' before them."""
    folders = [folder for run in runs for folder in _folders_of(run)]
    names = [folder.name for folder in folders]
    jobs = []
    for folder in folders:
        whole = folder.absolute()
        jobs.append(_job(folder, folder.name if names.count(folder.name) == 1 else f"{whole.parent.name}/{whole.name}"))
    return jobs


def _folders_of(run: Path) -> list[Path]:
    """The run's own folder, or where it is a sweep's, those of its jobs."""
    if (run / CONFIG).exists():
        return [run]
    return _job_folders(run) or [run]


def _job_folders(sweep_dir: Path) -> list[Path]:
    """In a sweep's folder, or deeper by ``hydra.sweep.subdir``; there Hydra may keep overrides of its own, too.

    A job that was refused before its run began left a note alone.

    They are in the order of what they set, key by key, then of their names.
    """
    found = {path.parent for path in sweep_dir.glob(f"*/{OVERRIDES}")}
    found |= {path.parent for path in sweep_dir.glob(f"*/**/{OVERRIDES}") if (path.parent / CONFIG).exists()}
    found |= {path.parent for path in sweep_dir.glob(f"*/**/{FAILED}")}
    told: dict[Path, dict[str, str]] = {}
    for folder in sorted(found, key=lambda folder: (_by_size(folder.as_posix()), folder)):
        try:
            told[folder] = _settings(folder)
        except RunFolderError:  # its row says what is wrong with it
            told[folder] = {}
    keys = dict.fromkeys(key for settings in told.values() for key in settings)
    return sorted(told, key=lambda folder: [_by_size(told[folder].get(key, "")) for key in keys])


def _by_size(text: str) -> list[str | float]:
    """By what to sort a text so that numbers in it are in the order of their size."""
    parts = re.split(r"((?:^-)?[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?)", text)  # every second one is a number
    return [float(part) if at % 2 else part for at, part in enumerate(parts)]


def _failure(folder: Path) -> Failure | None:
    return read_record(Failure, folder, FAILED, error=RunFolderError)


def _settings(folder: Path) -> dict[str, str]:
    failure = _failure(folder)
    overrides = read_overrides(folder) if failure is None else failure.overrides
    return dict(override.partition("=")[::2] for override in overrides)


def _job(folder: Path, name: str) -> Job:
    settings: dict[str, str] = {}
    try:
        settings = _settings(folder)
        if failure := _failure(folder):
            hidden = f" To see the run in its folder again, remove {FAILED} there." if has_begun(folder) else ""
            return Job(name, settings, None, printable(failure.text, most=1000) + hidden)
        run = load_run(folder)
        return Job(name, settings, replace(run, rounds=(), places={}), costs=_costs(run))
    except RunFolderError as error:
        return Job(name, settings, None, str(error))


def _costs(run: RunData) -> dict[int, Cost]:
    """By rounds done, as ``Job`` has them."""
    wanted = {len(run.rounds), *(score.round for scored in run.scored for score in scored.central)}
    setup_bytes = run.setup.setup_down_bytes if run.setup else 0
    per_step = run.setup.forwards_per_step if run.setup else None
    num_clients = max(len(run.clients), 1)
    payload = accumulate((record.payload_up_bytes + record.payload_down_bytes for record in run.rounds), initial=0)
    steps = accumulate((sum(client.steps for client in record.clients) for record in run.rounds), initial=0)
    seconds = accumulate((record.round_seconds for record in run.rounds), initial=0.0)
    return {
        done: Cost(setup_bytes, sent / num_clients, None if per_step is None else taken * per_step, spent)
        for done, (sent, taken, spent) in enumerate(zip(payload, steps, seconds, strict=True))
        if done in wanted
    }


def varied(jobs: Sequence[Job]) -> list[str]:
    """Keys whose values differ between jobs, or that only some jobs set."""
    keys = dict.fromkeys(key for job in jobs for key in job.settings)
    return [key for key in keys if len({job.settings.get(key) for job in jobs}) > 1]


def best_by(jobs: Sequence[Job]) -> BestBy:
    """What jobs are ordered by: the dev value where all of them chose their best round by it, else the dev loss."""
    told = [job.run.setting("evaluation", "best_by") for job in jobs if job.run]
    return BestBy.value if told and all(by == BestBy.value for by in told) else BestBy.loss


def dev_number(score: CentralScore, by: BestBy) -> float | None:
    """What a dev score is judged by: its loss, or its value."""
    return score.loss if by is BestBy.loss else score.value


def are_alike(jobs: Sequence[Job]) -> bool:
    """Whether all scores are of one task, evaluator and measure."""
    return len({kind for job in jobs if (kind := _kind(job))}) <= 1


def are_ordered(jobs: Sequence[Job], by: BestBy) -> bool:
    """Whether what the jobs are ordered by is of the same dev rows and kind: on others, a lower loss is no better."""
    return len({kind for job in jobs if (kind := _kind_of_dev(job, by))}) <= 1


def _kind(job: Job) -> tuple[object, ...] | None:
    """What its scores are of; None without scores."""
    if job.run is None or (scores := job.scores("test") or job.scores("dev")) is None:
        return None
    return job.run.setting("task", "name"), job.run.first.evaluator, scores[1].metric


def _kind_of_dev(job: Job, by: BestBy) -> str | None:
    """What its dev loss or dev value is of; None without one."""
    if job.run is None or (dev := job.scores("dev")) is None or dev_number(dev[1], by) is None:
        return None
    settings = [job.run.setting(*path) for path in _SETTINGS_OF_DEV_ROWS]
    is_per_token = dev[1].lower_is_better  # such as a perplexity
    if by is BestBy.loss:
        loss = job.run.setting("task", "loss")
        settings.append(loss)
        is_per_token = loss == "lm"
    return repr([*settings, dev[1].num_examples, _tokenizer(job.run) if is_per_token else None])


def _tokenizer(run: RunData) -> object:
    """Whose tokens a score per token is of: the digest that the peers agreed on, else the model's name."""
    try:
        text = read_file(run.run_dir, RUN_FILE)
        agreed = parse_json(text, where=str(run.run_dir / RUN_FILE), error=RunFolderError)
        return agreed["base"]["tokenizer_digest"]
    except (OSError, KeyError, TypeError):
        return run.setting("model", "name")
