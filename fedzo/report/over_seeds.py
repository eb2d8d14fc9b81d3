"""Jobs that differ in the run seed alone are one group: its means over seeds, and the best of the groups.

The best of all jobs would be the luckiest pair of a setting and a seed. What differs is read in the jobs'
configurations: words of a command line may name a device, or a file that was edited between two jobs.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fedzo.fl.config import BestBy
from fedzo.records.metrics import CentralScore
from fedzo.report.format import interval, mean_text, score_text
from fedzo.report.jobs import SEED, Job, dev_number

_ELSEWHERE = ("device", "threads", "artifact_max_bytes", "runtime", "report", "trackers")
"""Keys of where a job is computed and how it is told of. ``rewriter`` is none: other models write other rows."""
_WRITES_ROWS = ("plugin", "model", "judge_model", "examples", "dtype", "max_tokens", "context_tokens")
"""Keys of ``rewriter`` by which rows differ; the others are of its budget, its speed and its place."""


@dataclass(frozen=True, slots=True)
class Group:
    """Finished jobs of the same settings, one a seed.

    Attributes:
        name: The settings, in words of the first job.
        settings: Values there of the varied keys but the seed; a key that is not set has an empty one.
        jobs: One a seed.
    """

    name: str
    settings: tuple[str, ...]
    jobs: tuple[Job, ...]

    def scores(self, split: str) -> list[CentralScore]:
        """The score of each job at its best round; empty where a job has none, or one by another measure."""
        found = [pair[1] for job in self.jobs if (pair := job.scores(split))]
        is_whole = len(found) == len(self.jobs) and len({score.metric for score in found}) == 1
        return found if is_whole else []

    def dev_mean(self, by: BestBy) -> float | None:
        """Mean of what the jobs are ordered by; None where a job has none."""
        numbers = [dev_number(score, by) for score in self.scores("dev")]
        known = [number for number in numbers if number is not None]
        return statistics.fmean(known) if known and len(known) == len(numbers) else None


def groups_of(jobs: Sequence[Job], keys: Sequence[str]) -> list[Group]:
    """Finished jobs by all settings but the seed; each job on its own where no group would have two seeds.

    Of jobs with the same settings and the same seed, the last stands for all.
    """
    done = [job for job in jobs if job.summary]
    found: dict[str, dict[str, Job]] = {}
    for job in done:
        found.setdefault(_recipe(job), {})[job.seed] = job
    if all(len(by_seed) == 1 for by_seed in found.values()):
        return [Group(job.in_words(keys), (), (job,)) for job in done]
    groups = []
    for by_seed in found.values():
        alike = tuple(by_seed.values())
        values = _words(alike[0], keys)
        name = ", ".join("-" if value is None else value for value in values) or "all jobs"
        groups.append(Group(name, tuple(value or "" for value in values), alike))
    return groups


def max_seeds(groups: Sequence[Group]) -> int:
    """Seeds of the largest group."""
    return max((len(group.jobs) for group in groups), default=0)


def seeds_table(groups: Sequence[Group], keys: Sequence[str], by: BestBy) -> list[list[str]]:
    """A header and a row for each group; empty where no group has two seeds."""
    if max_seeds(groups) < 2:
        return []
    rows = [[*_of_recipe(keys), "seeds", f"mean dev {by}", "mean test"]]
    for group in groups:
        mean, dev, test = group.dev_mean(by), group.scores("dev"), group.scores("test")
        row = [*group.settings, str(len(group.jobs))]
        row.append("" if mean is None else _dev_text(dev[0], mean, by))
        row.append(mean_text(test[0].metric, *interval([score.value for score in test])) if test else "")
        rows.append(row)
    return rows


def best_group(groups: Sequence[Group], by: BestBy) -> str:
    """The group of the best mean dev score; empty where fewer than two have one.

    Groups of fewer seeds than the largest do not take part: the fewer the seeds, the luckier a mean can be.
    """
    most = max_seeds(groups)
    largest = [group for group in groups if len(group.jobs) == most]
    means = [(value, group) for group in largest if (value := group.dev_mean(by)) is not None]
    if len(means) < 2:
        return ""
    score = means[0][1].scores("dev")[0]
    is_lower = by is BestBy.loss or score.lower_is_better
    sign = 1 if is_lower else -1
    mean, best = min(means, key=lambda entry: sign * entry[0])
    what = f"dev {by if by is BestBy.loss else score.metric}: {_dev_text(score, mean, by)}"
    if most > 1:
        what = f"mean {what} over {most} seeds"
    return f"{'Lowest' if is_lower else 'Highest'} {what} ({best.name})"


def settings_notes(jobs: Sequence[Job], keys: Sequence[str]) -> list[str]:
    """Whether jobs look alike by their words and are not."""
    recipes: dict[tuple[str | None, ...], set[str]] = {}
    for job in jobs:
        if job.summary:
            recipes.setdefault(_words(job, keys), set()).add(_recipe(job))
    if all(len(found) == 1 for found in recipes.values()):
        return []
    return ["Jobs of the same words have different settings, perhaps of an edited file: compare their config.yaml."]


def seeds_notes(groups: Sequence[Group], jobs: Sequence[Job], *, are_compared: bool) -> list[str]:
    """What a reader of the means must know; empty where no group has two seeds."""
    most = max_seeds(groups)
    if most < 2:
        return []
    notes = ["Over seeds: +- is the half width of the 95 % interval of the mean over run seeds, by Student's t."]
    fewer = [group.name for group in groups if len(group.jobs) < most]
    if fewer and are_compared:
        notes.append(f"Groups of fewer than {most} seeds are not named the best: {'; '.join(fewer)}.")
    if sum(len(group.jobs) for group in groups) < sum(job.summary is not None for job in jobs):
        notes.append("Of jobs with the same settings and the same seed, only the last counts in the means.")
    return notes


def _recipe(job: Job) -> str:
    """What its scores follow from beside its seed; by its words, where it has lost its configuration."""
    told = (job.run.config if job.run else {}) or dict(sorted(job.settings.items()))
    recipe = {key: told[key] for key in _of_recipe(told)}
    if isinstance(rewriter := recipe.get("rewriter"), dict):
        recipe["rewriter"] = {key: rewriter.get(key) for key in _WRITES_ROWS}
    return repr(recipe)


def _words(job: Job, keys: Sequence[str]) -> tuple[str | None, ...]:
    """What its command line says of these keys, as far as its scores follow from them beside its seed."""
    return tuple(job.settings.get(key) for key in _of_recipe(keys))


def _of_recipe(keys: Iterable[str]) -> list[str]:
    return [key for key in keys if key != SEED and str(key).partition(".")[0] not in _ELSEWHERE]


def _dev_text(score: CentralScore, number: float, by: BestBy) -> str:
    return f"{number:.3f}" if by is BestBy.loss else score_text(score.metric, number)
