"""What a person at the terminal sees of a run while it goes on, from its metric records."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fedzo.records.metrics import CentralScore, FederatedScore, Flagged, MetricRecord, Round, Setup, Summary
from fedzo.report.format import bytes_text, counted, score_text, seconds_text, share_text
from fedzo.system import OnProgress, no_progress

PLAIN_EVERY_S = 10.0


class ProgressSink:
    """One live line on a terminal, a plain line now and then elsewhere, and the result at the end.

    Args:
        rounds: Rounds of the whole run.
        completed: Rounds that were done before it was resumed.
        sent_bytes: Message bytes up and down of those rounds.
        evaluator: Whose scores the live line shows.
        loss: What the losses of a round are called.
        payload: What clients send, ``scalars`` or ``vectors``.
        enabled: Whether to print at all.
    """

    def __init__(
        self,
        rounds: int,
        *,
        completed: int = 0,
        sent_bytes: tuple[int, int] = (0, 0),
        evaluator: str | None = None,
        loss: str = "loss",
        payload: str = "scalars",
        enabled: bool = True,
    ) -> None:
        self._rounds = rounds
        self._up, self._down = sent_bytes
        self._evaluator = evaluator
        self._loss = loss
        self._payload = payload
        self._score = ""
        self._last_print = 0.0
        self._recent: list[tuple[int, float]] = []  # rounds, and when they were told
        self._progress = _bars(enabled=enabled)
        self._console, self._live = self._progress.console, not self._progress.disable
        self._task = self._progress.add_task("rounds", total=rounds, completed=completed, note="", visible=False)
        self._progress.start()

    def write(self, record: MetricRecord) -> None:
        """Show the record."""
        match record:
            case Setup():
                self._setup(record)
            case Round():
                self._round(record)
            case CentralScore():
                self._scored(record)
            case FederatedScore():
                self._count_bytes(record)
            case Summary():
                self._console.print("\n" + "\n".join(ending(record, payload=self._payload)))

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._progress.stop()

    def phase(self, title: str, total: int | None = None) -> AbstractContextManager[OnProgress]:
        """A bar of its own for long work beside the rounds; call what it yields with (done, total)."""
        return _phase(self._progress, title, total=total)

    def round(self) -> AbstractContextManager[object]:
        """While a round runs: the first may take minutes, since what is done once is done in it."""
        return nullcontext() if self._recent else self.phase("first round")

    def replay(self, rounds: int, *, start: int) -> AbstractContextManager[OnProgress]:
        """While a model at round ``start`` is brought to another: of all weights, a record takes seconds to minutes."""
        if rounds == start:
            return nullcontext(no_progress)
        title = f"restoring the model after {counted(rounds, 'round')}" if rounds < start else replaying(rounds)
        return self.phase(title, rounds)

    def _setup(self, setup: Setup) -> None:
        share = share_text(setup.space_size, setup.num_params)
        self._console.print(
            f"{setup.trainer}: {setup.space_size:,} of {setup.num_params:,} weights trained ({share})"
            f", {counted(len(setup.clients), 'client')}"
            f", {counted(sum(client.num_train for client in setup.clients), 'training row')}"
        )
        if estimate := setup.estimate:
            self._console.print(
                f"estimate: {bytes_text(estimate.memory_bytes)} of memory per step, "
                f"{seconds_text(estimate.seconds)} for all forwards in one process"
            )
            if estimate.parts and estimate.free_bytes is not None:
                parts = ", ".join(f"{name} {bytes_text(size)}" for name, size in estimate.parts.items())
                free = bytes_text(estimate.free_bytes)
                self._console.print(f"  on {estimate.device}: {parts}; beside the weights {free} are free")

    def _round(self, record: Round) -> None:
        self._count_bytes(record)
        # neither the first round nor a calibration says how long the others take: they are where the measure begins
        told = (record.round, record.seconds)
        self._recent = [told] if record.calibration else [*self._recent[-20:], told]
        loss = "-" if record.loss is None else f"{record.loss:.3f}"
        note = f"{self._loss} {loss}  {self._score}up {bytes_text(self._up)}  down {bytes_text(self._down)}"
        done = record.round + 1
        self._progress.update(self._task, completed=done, note=note, visible=True)
        now = time.monotonic()
        if not self._live and (now - self._last_print > PLAIN_EVERY_S or done == self._rounds):
            pace = self._seconds_a_round()
            left = None if pace is None else pace * (self._rounds - done)
            what = "  (calibration)" if record.calibration else ""
            self._console.print(f"round {done}/{self._rounds}{what}  {note}  {seconds_text(left)} left")
            self._last_print = now

    def _seconds_a_round(self) -> float | None:
        """With all that passes between two rounds: the model's update, scores."""
        (first, begin), (last, end) = self._recent[0], self._recent[-1]
        return (end - begin) / (last - first) if last > first else None

    def _count_bytes(self, record: Round | FederatedScore) -> None:
        self._up += record.message_up_bytes
        self._down += record.message_down_bytes

    def _scored(self, score: CentralScore) -> None:
        text = score_text(score.metric, score.value)
        if score.evaluator == self._evaluator:
            self._score = f"{score.split} {text}  "
        self._console.print(f"{score.split} after {counted(score.round, 'round')}: {score.metric} {text}")


@contextmanager
def phase(
    title: str, *, stderr: bool = False, enabled: bool = True, note: Callable[[], str] = str
) -> Iterator[OnProgress]:
    """A bar for long work where no run goes on, or a plain line; call what it yields with (done, total).

    Args:
        title: Of the work.
        stderr: Whether to print there, since standard output is for the result.
        enabled: Whether to print at all.
        note: What to say beside the bar, asked with each call.
    """
    with _bars(stderr=stderr, enabled=enabled) as bars, _phase(bars, title, note=note) as advance:
        yield advance


def _bars(*, stderr: bool = False, enabled: bool = True) -> Progress:
    """Bars on a terminal that can draw them; disabled elsewhere."""
    console = Console(
        file=None if stderr else sys.stdout,
        stderr=stderr,
        highlight=False,
        markup=False,
        emoji=False,
        quiet=not enabled,
        soft_wrap=True,
    )
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    draws = console.is_terminal and not console.is_dumb_terminal  # as rich decides
    return Progress(*columns, console=console, disable=not (enabled and draws))


@contextmanager
def _phase(
    bars: Progress, title: str, *, total: int | None = None, note: Callable[[], str] = str
) -> Iterator[OnProgress]:
    if bars.disable:
        bars.console.print(f"{title} ...")
        yield no_progress
        return
    task = bars.add_task(title, total=total, note="")
    try:
        yield lambda done, total: bars.update(task, completed=done, total=total, note=note())
    finally:
        bars.remove_task(task)


def replaying(rounds: int) -> str:
    """The title of a replay from the base."""
    return f"replaying {counted(rounds, 'round')}"


def ending(summary: Summary, *, payload: str = "scalars") -> list[str]:
    """What a run says last: scores, the worst client, whom a step policy flagged, and bytes of the payload.

    The scores are those of the test rows, or without any that of the dev rows at the best round.

    Args:
        summary: The run's.
        payload: What clients send.
    """
    before, after, dev, rows = summary.before, summary.after, summary.dev, []
    head = f"after {counted(summary.rounds, 'round')}:"
    if before and after:
        chosen = "best dev round" if dev else "after round"
        head = f"test, before -> after ({chosen} {summary.best_round} of {summary.rounds}):"
        for title, first, last in (
            (before.metric, before.value, after.value),
            ("accuracy at best test threshold", before.best_threshold_accuracy, after.best_threshold_accuracy),
            ("AUC", before.auc, after.auc),
            *((name, before.numbers.get(name), number) for name, number in after.numbers.items()),
        ):
            if first is not None and last is not None:
                rows.append((title, f"{first:.3f} -> {last:.3f}"))
    elif dev:
        head = f"dev (best round {summary.best_round} of {summary.rounds}):"
        found = ((dev.metric, dev.value), ("loss", dev.loss))
        rows += [(title, f"{number:.3f}") for title, number in found if number is not None]
    if worst := summary.worst_client:
        own = "its own rows" if worst.num_examples is None else counted(worst.num_examples, "own row")
        where = f"client {worst.client}, on {own} after round {worst.round}"
        rows.append((f"worst client's {worst.metric}", f"{worst.value:.3f} ({where})"))
    if summary.step_policy:
        rows.append(("flagged clients", _flagged(summary.step_policy)))
    carried = summary.payload_up_bytes + summary.payload_down_bytes
    messages = summary.message_up_bytes + summary.message_down_bytes
    wire = (summary.wire_up_bytes or 0) + (summary.wire_down_bytes or 0)
    on_wire = f", {bytes_text(wire)} on the wire" if wire else ""
    sent = f"{bytes_text(carried)} ({bytes_text(messages)} as messages, with set-up{on_wire})"
    return [head, *(f"  {title:<32} {text}" for title, text in [*rows, (f"{payload}, all clients, both ways", sent)])]


def _flagged(step_policy: Flagged) -> str:
    """Those of the last decision with their local steps a round, T_k."""
    if step_policy.fallback:
        return f"{', '.join(str(row.client) for row in step_policy.flagged)}; too many to be stopped early"
    return ", ".join(f"{row.client} (T_k = {row.steps})" for row in step_policy.flagged) or "none"
