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
from fedzo.report.format import gain_text, interval, mean_text, score_text, span
from fedzo.report.jobs import SEED, Job, dev_number

_ELSEWHERE = ("device", "threads", "artifact_max_bytes", "runtime", "report", "trackers")
"""Keys of where a job is computed and how it is told of. ``rewriter`` is none: other models write other rows."""
_WRITES_ROWS = ("plugin", "model", "judge_model", "examples", "dtype", "max_tokens", "context_tokens")
"""Keys of ``rewriter`` by which rows differ; the others are of its budget, its speed and its place."""
_ROWS = (("data", "path"), ("split",), ("partition",), ("fl", "num_clients"))
"""What tells, with the run seed, which rows each client has."""


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

    def is_lower_better(self, by: BestBy) -> bool:
        """Of what ``dev_mean`` is the mean of."""
        return by is BestBy.loss or self.scores("dev")[0].lower_is_better

    @property
    def test_by_seed(self) -> dict[str, float]:
        """The value on the test rows by run seed; empty where a job has none."""
        return {job.seed: score.value for job, score in zip(self.jobs, self.scores("test"), strict=False)}

    @property
    def rows(self) -> list[object]:
        """The settings by which, with the run seed, each client has its rows."""
        run = self.jobs[0].run
        return [run.setting(*path) for path in _ROWS] if run else []


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


def ranked(groups: Sequence[Group], by: BestBy) -> list[Group]:
    """Those that have a mean dev score, the best first."""
    known = [(mean, group) for group in groups if (mean := group.dev_mean(by)) is not None]
    known.sort(key=lambda entry: entry[0] if entry[1].is_lower_better(by) else -entry[0])
    return [group for _, group in known]


def best_group(groups: Sequence[Group], by: BestBy) -> Group | None:
    """The group of the best mean dev score; None where fewer than two have one.

    Groups of fewer seeds than the largest do not take part: the fewer the seeds, the luckier a mean can be.
    """
    most = max_seeds(groups)
    able = ranked([group for group in groups if len(group.jobs) == most], by)
    return able[0] if len(able) > 1 else None


def headline(best: Group, by: BestBy) -> str:
    """Names the best of the groups."""
    what = f"dev {by if by is BestBy.loss else best.scores('dev')[0].metric}: {_dev_text(best, by)}"
    if len(best.jobs) > 1:
        what = f"mean {what} over {len(best.jobs)} seeds"
    return f"{'Lowest' if best.is_lower_better(by) else 'Highest'} {what} ({best.name})"


def gains(group: Group, other: Group) -> list[float]:
    """Its values on the test rows less those of another group, of each run seed that both have.

    Jobs of one seed are a pair, since it gives their clients the same rows in the same order: what a seed does to both
    is in no difference. Empty where the clients of the two have other rows.
    """
    if group.rows != other.rows:
        return []
    theirs = other.test_by_seed
    return [value - theirs[seed] for seed, value in group.test_by_seed.items() if seed in theirs]


def seeds_table(groups: Sequence[Group], keys: Sequence[str], by: BestBy, reference: Group | None) -> list[list[str]]:
    """A header and a row for each group; empty where no group has two seeds.

    With a ``reference``, the last column has the mean of the ``gains`` over that group.
    """
    if max_seeds(groups) < 2:
        return []
    rows = [[*_of_recipe(keys), "seeds", f"mean dev {by}", "mean test"]]
    if reference:
        rows[0].append(f"test less that of the best dev {by}")
    for group in groups:
        test = group.scores("test")
        row = [*group.settings, str(len(group.jobs)), _dev_text(group, by)]
        row.append(mean_text(test[0].metric, *interval([score.value for score in test])) if test else "")
        if reference:
            found = [] if group is reference else gains(group, reference)
            row.append(gain_text(test[0].metric, *interval(found)) if len(found) > 1 else "")
        rows.append(row)
    return rows


def settings_notes(jobs: Sequence[Job], keys: Sequence[str]) -> list[str]:
    """Whether jobs look alike by their words and are not."""
    recipes: dict[tuple[str | None, ...], set[str]] = {}
    for job in jobs:
        if job.summary:
            recipes.setdefault(_words(job, keys), set()).add(_recipe(job))
    if all(len(found) == 1 for found in recipes.values()):
        return []
    return ["Jobs of the same words have different settings, perhaps of an edited file: compare their config.yaml."]


def seeds_notes(
    groups: Sequence[Group], jobs: Sequence[Job], reference: Group | None, *, are_compared: bool
) -> list[str]:
    """What a reader of the means must know; empty where no group has two seeds."""
    most = max_seeds(groups)
    if most < 2:
        return []
    notes = ["Over seeds: +- is the half width of the 95 % interval of the mean over run seeds, by Student's t."]
    if rows := [score.num_examples for group in groups for score in group.scores("test")]:
        same = f"the same {span(rows, 'test row')}"
        notes.append(f"All seeds of a setting score {same}, whose own error is no part of +-.")
    if reference:
        notes.append(
            f"The last column compares with {reference.name}, seed by seed, since jobs of one seed have the same rows. "
            "It is empty for that setting, for fewer than two common seeds, and where clients have other rows."
        )
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


def _dev_text(group: Group, by: BestBy) -> str:
    """Its mean dev score; empty where it has none."""
    mean = group.dev_mean(by)
    if mean is None:
        return ""
    return f"{mean:.3f}" if by is BestBy.loss else score_text(group.scores("dev")[0].metric, mean)
