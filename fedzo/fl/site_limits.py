"""What a site refuses, and which of its numbers leave it, whoever asks.

The server is told a number and the sentence that belongs to it (``Refusal``). What the site's file says and what it
holds stay in the site's own log.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from fedzo.errors import FedzoError, OtherVersionError, ProtocolError
from fedzo.evaluate.base import LABEL_COUNTS, LOSS, NONE, PER_CLASS, STAGE_FIGURES
from fedzo.fl.config import SiteLimitsConfig
from fedzo.fl.messages import Refusal
from fedzo.records.scores import MAX_LOSS, PartialScore, Score
from fedzo.system import is_out_of_memory

if TYPE_CHECKING:
    from fedzo.config.schema import RunConfig


class SiteError(FedzoError):
    """What a client refuses, or cannot do. Its text is all that the server is told: a fixed sentence and a number.

    Attributes:
        refusal: The number.
        details: For the site's own log.
        versions: Which fedzo is at either side, the one thing that is told in words.
    """

    def __init__(self, refusal: Refusal, details: str = "", *, versions: str = "") -> None:
        text = f"{refusal.text}: {versions}" if versions else refusal.text
        super().__init__(text + (". Its own log says why" if details else ""))
        self.refusal = refusal
        self.details = details


def as_site_error(error: Exception) -> SiteError:
    """What the server is told of an error, whatever it says of the site."""
    if isinstance(error, SiteError):
        return error
    if isinstance(error, OtherVersionError):
        return SiteError(Refusal.version, versions=str(error))
    what = str(error) or type(error).__name__
    if is_out_of_memory(error):
        first = what.splitlines()[0].rstrip(".")
        remedy = (
            "Write a small model.tokens_per_batch, such as 1024, lower model.lower_layers_cache_mb, or take a smaller "
            "model.dtype."
        )
        return SiteError(Refusal.memory, f"{first}. {remedy}")
    return SiteError(Refusal.foreign if isinstance(error, ProtocolError) else Refusal.failed, what)


def check_run(limits: SiteLimitsConfig, run: RunConfig, *, trainer: str | None, estimator: str | None) -> None:
    """Refuse a run that its settings alone rule out, before a model is loaded for it.

    Args:
        limits: The site's.
        run: What its peers agreed on.
        trainer: Name of its trainer.
        estimator: Name of its estimator.

    Raises:
        SiteError: The run has a task, trainer, estimator, stage or base that the site does not take part in, or more
            work in a round than it takes, or needs label counts, vectors or the losses of local steps, and these do not
            leave the site.
    """
    for key, allowed, asked, refusal in (
        ("tasks", limits.tasks, [run.task.name], Refusal.task),
        ("trainers", limits.trainers, [trainer], Refusal.trainer),
        ("estimators", limits.estimators, [estimator], Refusal.estimator),
        ("stages", limits.stages, [*run.preprocess], Refusal.stage),
    ):
        if allowed and (stray := [name for name in asked if name not in allowed]):
            raise SiteError(refusal, f"limits.{key} allows {', '.join(allowed)}, and the run has {stray[0]}")
    check_base(limits, run.base.weights_digest, whose="the run's base")
    if run.fl.label_counts and not leaves(limits, LABEL_COUNTS):
        raise SiteError(Refusal.label_counts, f"limits.answers lacks {LABEL_COUNTS}, and the run has fl.label_counts")
    probes = run.estimator.probes_per_step
    if limits.max_probes and probes > limits.max_probes:
        raise SiteError(Refusal.probes, f"limits.max_probes is {limits.max_probes}, and {probes} are asked")
    if probes == 0 and not limits.vectors:
        raise SiteError(Refusal.vectors, "limits.vectors is false, and the run's clients send update vectors")
    if probes == 0 and not leaves(limits, LOSS):
        raise SiteError(Refusal.losses, f"limits.answers lacks {LOSS}, and the run's clients send vectors with it")
    check_work(limits, steps=run.step_policy.max_steps(run.fl), step_rows=run.fl.batch_size)


def check_base(limits: SiteLimitsConfig, digest: str, *, whose: str) -> None:
    """Refuse other base weights than the site accepts; ``SiteError``."""
    if limits.base_digest and digest != limits.base_digest:
        raise SiteError(Refusal.base, f"limits.base_digest is {limits.base_digest}, and {whose} has {digest}")


def check_work(limits: SiteLimitsConfig, *, steps: int, step_rows: int) -> None:
    """Refuse more local steps, or more rows, than the site takes in one request; ``SiteError``."""
    if limits.max_steps and steps > limits.max_steps:
        raise SiteError(Refusal.steps, f"limits.max_steps is {limits.max_steps}, and {steps} are asked")
    if limits.max_rows and steps * step_rows > limits.max_rows:
        asked = f"{steps} steps of {step_rows} rows are asked"
        raise SiteError(Refusal.step_rows, f"limits.max_rows is {limits.max_rows}, and {asked}")


def check_rows(limits: SiteLimitsConfig, *, num_train: int, label_counts: Mapping[str, int], num_labels: int) -> None:
    """Refuse to register with counts that stand for too few rows; ``SiteError``. A label without rows counts 0."""
    counts = {"training rows": num_train}
    if label_counts:
        counts |= {f"rows of label {label}": label_counts.get(str(label), 0) for label in range(num_labels)}
    if few := [f"{count} {what}" for what, count in counts.items() if count < limits.min_rows]:
        raise SiteError(Refusal.few_rows, f"limits.min_rows is {limits.min_rows}, and there are {', '.join(few)}")


def leaves(limits: SiteLimitsConfig, name: str) -> bool:
    """Whether a number of this name may leave the site."""
    return not limits.answers or (name in limits.answers and NONE not in limits.answers)


def answers_any(limits: SiteLimitsConfig, names: Collection[str], *, num_rows: int) -> bool:
    """Whether any number of an evaluator may leave the site: else it need not score."""
    return num_rows >= limits.min_rows and any(leaves(limits, name) for name in names)


def leaving_figures(limits: SiteLimitsConfig, figures: Mapping[str, float], *, num_train: int) -> dict[str, float]:
    """What stages tell of a client's rows, as far as it may leave the site.

    A whole number counts rows. The counts of a stage leave as a whole or not at all: a single one could be told from
    the others. They stay where one of them, or the other training rows, are fewer rows than the site allows; none at
    all tells nothing of a row.

    Args:
        limits: The site's.
        figures: By name, the stage's before it (``fedzo.data.preprocess.summaries``).
        num_train: The client's training rows.
    """
    if not leaves(limits, STAGE_FIGURES):
        return {}
    counts = {name: value for name, value in figures.items() if isinstance(value, int)}
    kept = {name.partition(".")[0] for name, count in counts.items() if _is_of_few(limits, count, num_train)}
    return {
        name: float(value)
        for name, value in figures.items()
        if not isinstance(value, int) or name.partition(".")[0] not in kept
    }


def leaving_count(limits: SiteLimitsConfig, count: int, *, of: int) -> int:
    """A count among so many rows; 0 where it, or the rest of them, are fewer rows than the site allows."""
    return 0 if _is_of_few(limits, count, of) else count


def _is_of_few(limits: SiteLimitsConfig, count: int, num_rows: int) -> bool:
    return any(0 < rows < limits.min_rows for rows in (count, num_rows - count))


def leaving(limits: SiteLimitsConfig, score: Score, *, num_labels: int) -> PartialScore | None:
    """What of a score may leave the site; None where that is nothing.

    The table of classes leaves as a whole or not at all: a single class could be told from the others, and a missing
    one has no rows. It holds the metric, so it leaves along with that only.
    """
    if score.num_examples < limits.min_rows:
        return None
    many = all(score.per_class.get(label, (0, 0))[1] >= limits.min_rows for label in range(num_labels))
    classes = many and leaves(limits, PER_CLASS) and leaves(limits, score.metric)
    part = PartialScore(
        metric=score.metric,
        value=score.value if leaves(limits, score.metric) else None,
        loss=max(-MAX_LOSS, min(score.loss, MAX_LOSS)) if score.loss is not None and leaves(limits, LOSS) else None,
        num_examples=score.num_examples,
        per_class=score.per_class if classes else {},
        numbers={name: number for name, number in score.numbers.items() if leaves(limits, name)},
        lower_is_better=score.lower_is_better,
    )
    return part if part.value is not None or part.loss is not None or part.per_class or part.numbers else None
