"""From original text to what stands in its place: rewriter, checks, judge; whatever fails, the row keeps its text."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fedzo.data.config import TaskConfig
from fedzo.data.files import Row
from fedzo.data.preprocess.backend import (
    USUAL_TOKENS,
    Backend,
    Completion,
    EndpointError,
    Request,
    RewriterConfig,
    RowFault,
    RowReason,
)
from fedzo.data.preprocess.rephrase.caller import Caller
from fedzo.data.preprocess.rephrase.checks import check, lacks_anchor
from fedzo.data.preprocess.rephrase.config import Check, OatRephraseConfig
from fedzo.data.preprocess.rephrase.judge import Verdict, verdict_of
from fedzo.data.preprocess.rephrase.prompts import ORDERS, Prompts, label_of
from fedzo.data.preprocess.rephrase.results import row_digest
from fedzo.errors import ConfigError
from fedzo.records.rephrase import RowOutcome
from fedzo.system import OnProgress, no_progress

ROWS_AT_ONCE, ROWS_A_CALL = 64, 8
"""Rows that go through rewriter and judge together, or so many for each call that may be in flight, where that is more:
all wait for the slowest of them."""
MAX_FAILED = 0.2
"""Share of rows above which a set is none (a guess); a single row never is: its fault may be its own."""
_RAISE_TEMPERATURE = 0.3  # a further attempt at temperature 0 would repeat the first; the seeds of all differ
JUDGE_TOKENS = 128
"""Most tokens of a verdict, where ``rewriter.max_tokens`` is not above the usual."""
IDENTICAL = "identical"
"""The reason of a row whose rewrite is its own text."""
TOO_LONG = "too_long"
"""The reason of a row whose prompt and its answer have no room in the context."""
_CALL, _JUDGE = "call_", "judge_"
_FAILED = frozenset(
    {f"{prefix}{reason}" for prefix in (_CALL, _JUDGE) for reason in RowReason}
    | {Check.empty, Check.truncated, TOO_LONG}
)
_UNREAD, _DIFFERENT, _LABEL, _ORIGINAL = "judge_unread", "judge_different", "judge_label", "judge_fails_original"


@dataclass(slots=True)
class Attempt:
    """What is known of one row.

    Attributes:
        digest: Of the row.
        row: As it was.
        label: Index of the right answer; None where it is written.
        where: What it is called in an error: its place in the set.
        outcome: What became of it; None while that is open.
        refused: The last rewrite that was not accepted, as a person may read it.
        failed: Whether the endpoint gave no answer in its last call, a cut off or a blank one.
        reason: Why the last rewrite was not accepted; empty where nothing speaks against it.
        model: What the last answer of the rewriter says that it is from.
    """

    digest: str
    row: Row
    label: int | None
    where: str
    outcome: RowOutcome | None = None
    refused: str = ""
    failed: bool = False
    reason: str = ""
    model: str = ""

    @property
    def is_too_long(self) -> bool:
        """Whether the row keeps its text since its prompt has no room in the context."""
        return self.outcome is not None and self.outcome.reason == TOO_LONG


@dataclass(frozen=True)
class Course:
    """How the rows of a task are rewritten.

    Attributes:
        config: The recipe.
        task: What the rows are for.
        prompts: What rewriter and judge read.
        backend: Who they are.
        caller: Asks them.
        rewriter: Their models and limits.
    """

    config: OatRephraseConfig
    task: TaskConfig
    prompts: Prompts
    backend: Backend
    caller: Caller
    rewriter: RewriterConfig

    def run(self, attempts: Mapping[str, Attempt], on_progress: OnProgress = no_progress, *, beside: int = 0) -> None:
        """Rewrite the rows whose outcome is open; each has one at the end.

        Args:
            attempts: Of ``check_rows``, or some of them.
            on_progress: Told of attempts done and in all.
            beside: Rows of the same set that had their answers before.

        Raises:
            EndpointError: The endpoint cannot be used, failed too many rows, or a budget is spent. Its answers so far
                are kept, so the same call goes on from there.
        """
        self.caller.kept += beside
        waiting = [each for each in attempts.values() if each.outcome is None]
        at_once = max(ROWS_AT_ONCE, ROWS_A_CALL * self.backend.concurrency * self.backend.batch_size)
        for first in range(0, len(waiting), at_once):
            some = waiting[first : first + at_once]
            done = functools.partial(_tell, on_progress, first / len(waiting), len(some) / len(waiting), len(attempts))
            self._rewrite(some, done)
            _check_failed(waiting[: first + len(some)], beside, self.caller.totals.said)
        on_progress(len(attempts), len(attempts))

    def check_rows(self, rows: Sequence[Row]) -> dict[str, Attempt]:
        """The rows that differ, by their digests; those that no call can help have their outcome. Makes no call.

        Raises:
            ConfigError: A row does not fit the task, or too many prompts have no room in the context. A single one
                never stops the others.
        """
        anchored = Check.anchors in self.config.checks
        attempts: dict[str, Attempt] = {}
        for number, row in enumerate(rows):
            if (digest := row_digest(row)) not in attempts:
                where = f"row {number}"
                label = label_of(row, self.prompts, self.task, where=where)
                each = attempts[digest] = Attempt(digest, row, label, where)
                if anchored and lacks_anchor(row, self.prompts.task, self.prompts.column):
                    self._keep(each, str(Check.anchors))
                elif not all(map(self._has_room, self.requests(row))):
                    self._keep(each, TOO_LONG)
        long = [each for each in attempts.values() if each.is_too_long]
        if len(long) > 1 and len(long) > MAX_FAILED * len(attempts):
            for request in self.requests(long[0].row):
                self.check_context(request, long[0].where)
        return attempts

    def check_context(self, request: Request, where: str) -> None:
        """Raise ``ConfigError`` where a prompt and its answer are longer than the site or the model allows."""
        if self._has_room(request):
            return
        tokens, most = self.backend.count_tokens(request), self._max_tokens(request.model)
        short = most < self.rewriter.context_tokens
        remedy = "Take a model that can read more" if short else "Raise it if the model can read more"
        raise ConfigError(
            f"rewriter.context_tokens: a prompt and its answer must have at most {most} tokens"
            f"{', as many as the model has positions' if short else ''}, {where} has {tokens} and "
            f"{request.max_tokens}. {remedy}, show fewer examples, or leave out rows that long."
        )

    def _has_room(self, request: Request) -> bool:
        return self.backend.count_tokens(request) + request.max_tokens <= self._max_tokens(request.model)

    def _max_tokens(self, model: str) -> int:
        room = self.backend.room(model)
        return self.rewriter.context_tokens if room is None else min(room, self.rewriter.context_tokens)

    def requests(self, row: Row) -> tuple[Request, ...]:
        """What is asked for a row at least: its rewrite, and the judgement of the original beside itself."""
        label = label_of(row, self.prompts, self.task, where="a row")
        asked = [self._rewrite_request(row, label, attempt=0)]
        return (*asked, *([self.judge_request(row, str(row[self.prompts.column]))] if self.config.judged else []))

    @property
    def judge_tokens(self) -> int:
        """Most tokens of a verdict: as many as of a rewrite where these were raised, since a model may think first."""
        most = self.rewriter.max_tokens
        return most if most > USUAL_TOKENS else JUDGE_TOKENS

    def judge_request(self, row: Row, rewrite: str, order: Sequence[str] = ORDERS[0], *, where: str = "") -> Request:
        """What asks the judge about a row and a text in the place of its column."""
        messages, schema = self.prompts.judge(row, rewrite, order), self.prompts.judge_schema(order)
        most = self.judge_tokens
        return Request(messages, self.rewriter.judge, 0.0, seed=0, max_tokens=most, schema=schema, where=where)

    def _rewrite(self, attempts: Sequence[Attempt], on_share: Callable[[float], None]) -> None:
        """All attempts at some rows: one whose rewrite was not accepted is asked again, as often as the recipe says."""
        for number in range(self.config.max_attempts):
            waiting = [each for each in attempts if each.outcome is None]
            if not waiting:
                break
            asked = [self._rewrite_request(each.row, each.label, attempt=number, where=each.where) for each in waiting]
            answers = self.caller.answer(asked, lambda done, total: on_share(done / total / 2))
            checked = [(each, self._checked(each, answer)) for each, answer in zip(waiting, answers, strict=True)]
            passed = [(each, text) for each, text in checked if text is not None]
            if passed and self.config.judged:
                self._judge(passed, on_share)
            for each, text in passed:
                if each.outcome is None and not each.reason:
                    each.outcome = outcome_of(each.digest, self.prompts.column, text, model=each.model)
        for each in attempts:
            if each.outcome is None:
                self._keep(each, each.reason)

    def _checked(self, each: Attempt, answer: Completion | RowFault) -> str | None:
        """The text of an answer that passes the checks; None where it does not, or is the original."""
        each.reason, each.failed = "", _is_failure(answer)
        if isinstance(answer, RowFault):
            each.reason = f"{_CALL}{answer.reason}"
            self._keep(each, each.reason)  # a further sample is for a rewrite that was rejected
            return None
        each.model = answer.model
        checked = check(
            answer.text, each.row, each.label, prompts=self.prompts, rules=self.config, truncated=answer.truncated
        )
        if checked.fault is not None:
            each.reason, each.refused = str(checked.fault), answer.text
            return None
        if checked.text == str(each.row[self.prompts.column]).strip():
            self._keep(each, IDENTICAL)
            return None
        return checked.text

    def _judge(self, passed: Sequence[tuple[Attempt, str]], on_share: Callable[[float], None]) -> None:
        """Ask for each rewrite, and for the original beside itself: a judge that fails there says nothing of it."""
        column, labels = self.prompts.column, self.prompts.labels
        asked = [self.judge_request(each.row, str(each.row[column]), where=each.where) for each, _ in passed]
        asked += [self.judge_request(each.row, text, where=each.where) for each, text in passed]
        answers = self.caller.answer(asked, lambda done, total: on_share(0.5 + done / total / 2))
        of_original, of_rewrite = answers[: len(passed)], answers[len(passed) :]
        for (each, text), own, other in zip(passed, of_original, of_rewrite, strict=True):
            each.failed = _is_failure(own) or _is_failure(other)
            verdict = verdict_of(own, labels)
            each.reason = why_not(verdict, verdict_of(other, labels))
            if each.reason:
                each.refused = text
            if each.reason == _ORIGINAL or (each.reason == _UNREAD and verdict is None):
                self._keep(each, each.reason)  # whatever the rewrite: this verdict stays the same
            elif isinstance(own, RowFault) or isinstance(other, RowFault):
                self._keep(each, each.reason)  # the rewrite may be good: what is missing is a verdict

    def _keep(self, each: Attempt, reason: str) -> None:
        text = str(each.row[self.prompts.column])
        each.outcome = outcome_of(each.digest, self.prompts.column, text, reason=reason, model=each.model)

    def _rewrite_request(self, row: Row, label: int | None, *, attempt: int, where: str = "") -> Request:
        temperature = min(attempt, 1) * _RAISE_TEMPERATURE
        messages = self.prompts.rewriter(row, label)
        model, most = self.rewriter.model, self.rewriter.max_tokens
        return Request(messages, model, temperature, seed=attempt, max_tokens=most, where=where)


def outcome_of(digest: str, column: str, text: str, *, reason: str = "", model: str) -> RowOutcome:
    """A row with the text that it has from now on: its own where there is a reason, else a rewrite."""
    status: Literal["original", "rewritten"] = "original" if reason else "rewritten"
    return RowOutcome(row=digest, column=column, text=text, status=status, reason=reason, model=model)


def _is_failure(answer: Completion | RowFault) -> bool:
    return isinstance(answer, RowFault) or not answer.whole


def _check_failed(attempts: Sequence[Attempt], beside: int, said: Mapping[str, str]) -> None:
    """Raise ``EndpointError`` where the endpoint failed too many of the rows that are done."""
    failed, done = [each for each in attempts if each.failed], len(attempts) + beside
    if len(failed) < 2 or len(failed) <= MAX_FAILED * done:
        return
    reasons = ", ".join(
        f"{number} {reason}" for reason, number in Counter(each.reason for each in failed).most_common()
    )
    words = f"; {'; '.join(said.values())}" if said else ""
    raise EndpointError(
        f"oat_rephrase: the endpoint must answer for at least {1 - MAX_FAILED:.0%} of the rows, but failed "
        f"{len(failed)} of {done} ({reasons}{words}). Correct the endpoint, its model, rewriter.timeout_s or "
        "rewriter.max_tokens, and start again: its answers are kept, and what failed is asked again."
    )


def is_failed(outcome: RowOutcome) -> bool:
    """Whether a row keeps its text for a fault of the endpoint or its context, so that it may be asked for again."""
    return outcome.reason in _FAILED


def why_not(own: Verdict | RowFault | None, other: Verdict | RowFault | None) -> str:
    """Why a judge's answers accept no rewrite; empty where they accept it.

    Args:
        own: What it says of the original beside itself.
        other: What it says of the rewrite.
    """
    if isinstance(own, RowFault):
        return f"{_JUDGE}{own.reason}"
    if isinstance(other, RowFault):
        return f"{_JUDGE}{other.reason}"
    if own is None or other is None:
        return _UNREAD
    if not own.same:
        return _ORIGINAL
    if not other.same:
        return _DIFFERENT
    return _LABEL if own.label != other.label else ""


def counts(outcomes: Iterable[RowOutcome]) -> dict[str, int]:
    """Rows by what became of them: ``rewritten``, and ``original`` with the reason."""
    found = Counter(each.status if not each.reason else f"{each.status} {each.reason}" for each in outcomes)
    return dict(sorted(found.items(), key=lambda item: (item[0] != "rewritten", -item[1], item[0])))


def _tell(on_progress: OnProgress, before: float, here: float, total: int, share: float) -> None:
    on_progress(int((before + share * here) * total), total)
