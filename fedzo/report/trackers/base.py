"""What a tracker is, and the sink that gives it a run's settings and each number once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar, Protocol

from fedzo.errors import Problem
from fedzo.records.metrics import CentralScore, FederatedScore, MetricRecord, Round, Summary
from fedzo.registry import PluginConfig, Registry

log = logging.getLogger(__name__)
_ROUND = (
    *("loss", "mean_abs_g", "payload_up_bytes", "payload_down_bytes", "message_up_bytes", "message_down_bytes"),
    *("wire_up_bytes", "wire_down_bytes", "round_seconds", "dropped_probes", "clip_bound", "clipped"),
)
_SUMMARY = (
    *("rounds", "best_round", "seconds", "dropped_probes", "payload_up_bytes", "payload_down_bytes"),
    *("message_up_bytes", "message_down_bytes", "wire_up_bytes", "wire_down_bytes"),
)


@dataclass(kw_only=True, slots=True)
class TrackerConfig(PluginConfig):
    """A tracker of runs.

    Attributes:
        library: What Python imports for it; empty where it needs nothing.
        extra: The extra of fedzo that installs the library; None where fedzo does.
    """

    library: ClassVar[str] = ""
    extra: ClassVar[str | None] = None


class Tracker(Protocol):
    """One run in a tracker, which goes on when the run is resumed. Whatever it raises ends the tracker, not the run."""

    def last_step(self, tag: str) -> int:
        """Step of the last number under this tag; -1 where there is none."""
        ...

    def settings(self, settings: Mapping[str, Any]) -> None:
        """Write the run's settings: plain JSON values by their keys, such as ``fl.rounds``."""
        ...

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        """Write numbers by their tags; the step is the rounds that were done by then."""
        ...

    def close(self, *, finished: bool) -> None:
        """Let go of the tracker's run; ``finished`` says that no round is missing."""
        ...


TRACKERS: Registry[Tracker] = Registry("trackers", base=TrackerConfig)
"""Factories ``(config, *, folder: Path, completed: int) -> Tracker`` of the run folder and its committed rounds."""


def missing_libraries(trackers: Mapping[str, TrackerConfig]) -> list[Problem]:
    """The trackers whose library is not installed."""
    return [
        Problem(
            "trackers",
            f"trackers={name}: the package {config.library} must be installed, but is not. Install it with: "
            f"pip install '{f'fedzo[{config.extra}]' if config.extra else config.library}'",
        )
        for name, config in trackers.items()
        if config.library and not _is_installed(config.library)
    ]


def _is_installed(library: str) -> bool:
    try:
        spec = find_spec(library)
    except ModuleNotFoundError:  # the package that it is a part of
        return False
    return spec is not None and spec.origin is not None  # a folder of that name is no package


def numbers_of(record: MetricRecord) -> tuple[int, dict[str, float]]:
    """The step of a record and its numbers by tag; those that are not known are left out."""
    found: dict[str, float | None] = {}
    match record:
        case Round():
            step = record.round + 1
            found = {f"round/{name}": getattr(record, name) for name in _ROUND}
            if record.calibration:  # of paths that were given up: no point of the curves of training
                found |= {f"calibration/{name}": found.pop(f"round/{name}") for name in ("loss", "mean_abs_g")}
            found["round/absent"] = len(record.absent)
        case CentralScore() | FederatedScore():
            step = record.round
            place = record.split if isinstance(record, CentralScore) else "federated"
            found = {name: getattr(record, name) for name in ("loss", "auc", "best_threshold_accuracy")}
            found |= {record.metric: record.value, **record.numbers}
            if isinstance(record, FederatedScore):
                found["worst_client"] = record.worst_client
            found = {f"{place}/{record.evaluator}/{name}": number for name, number in found.items()}
        case Summary():
            step = record.rounds
            found = {name: getattr(record, name) for name in _SUMMARY}
            scores = {
                "dev": record.dev,
                "test_before": record.before,
                "test_after": record.after,
                "worst_client": record.worst_client,
            }
            found |= {name: score.value for name, score in scores.items() if score}
            found["dev_loss"] = record.dev.loss if record.dev else None
            found = {f"summary/{name}": number for name, number in found.items()}
        case _:
            step = 0
    return step, {tag: number for tag, number in found.items() if number is not None}


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted keys; lists stay whole."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


class TrackerSink:
    """A tracker behind a run: it gets each number once, and its first error ends it with a warning.

    Args:
        name: The tracker's.
        make: Opens it.
        settings: The run's, as nested plain values.
        told: Records from before the run was resumed. What the tracker lacks of these is written first.
    """

    def __init__(
        self, name: str, make: Callable[[], Tracker], *, settings: Mapping[str, Any], told: Iterable[MetricRecord] = ()
    ) -> None:
        self._name = name
        self._tracker: Tracker | None = None
        self._last: dict[str, int] = {}
        self._finished = False
        try:
            self._tracker = make()
            self._tracker.settings(flat(settings))
        except Exception as error:
            self._give_up(error)
        for record in told:
            self.write(record)

    def write(self, record: MetricRecord) -> None:
        """Write what the tracker lacks of the record's numbers."""
        self._finished = isinstance(record, Summary)
        if self._tracker is None:
            return
        step, numbers = numbers_of(record)
        try:
            for tag in numbers.keys() - self._last.keys():
                self._last[tag] = self._tracker.last_step(tag)
            if new := {tag: float(number) for tag, number in numbers.items() if step > self._last[tag]}:
                self._tracker.write(new, step)
            self._last |= dict.fromkeys(new, step)
        except Exception as error:
            self._give_up(error)

    def close(self) -> None:
        """Let go of the tracker."""
        if (tracker := self._tracker) is not None:
            self._tracker = None
            try:
                tracker.close(finished=self._finished)
            except Exception as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        log.warning(
            "trackers=%s: it failed and gets no more of this run, which goes on. Reason: %s", self._name, reason
        )
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            try:
                tracker.close(finished=False)
            except Exception as again:
                log.info("trackers=%s: it could not be closed, either: %s", self._name, again)
