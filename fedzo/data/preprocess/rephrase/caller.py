"""Many requests through a store and a backend: at most once each, within budgets, as fast as the endpoint bears."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from fedzo.data.preprocess.backend import (
    Backend,
    BusyError,
    Completion,
    EndpointError,
    Request,
    RewriterConfig,
    RowFault,
    RowReason,
)
from fedzo.data.preprocess.rephrase.answers import without_thought
from fedzo.data.preprocess.rephrase.store import Store, request_key
from fedzo.system import OnProgress, no_progress

MAX_TRIES = 8
"""How often a request is made to an endpoint that says that it is busy: over two minutes, as a quota is often one a
minute."""
MAX_BUSY = 10
"""How often in a row, without an answer between, an endpoint may say that it is busy before it counts as down."""
FIRST_WAIT_S = 1.0
"""First wait for a busy endpoint, unless it asks for a longer one; each further one is twice as long."""
LONGEST_WAIT_S = 60.0
"""Longest wait, whatever the endpoint asks for."""
CALLS_PER_STEP_UP = 10
"""Answers in a row after which one call more is made at once, up to the backend's own number."""
MAX_FAULTS, FEWEST_CALLS = 0.2, 20
"""Share of faults above which nothing more is asked, once there were that many calls. Both are guesses."""
MAX_UNANSWERED = 20
"""How many calls on end may have no answer (a timeout, a broken connection, an error of the server) before the endpoint
counts as down. Where one call in five has none by chance, so many on end come once in 10**14."""


@dataclass(slots=True)
class Totals:
    """What a caller did so far.

    Attributes:
        calls: Requests that the backend answered or failed, without those for which it asked for patience.
        faults: Those that failed.
        prompt_tokens: Of all calls; for a call that failed, as estimated.
        answer_tokens: Of all calls; for a call that failed, the most that it may have made.
        said: The first fault of each kind, in words, which may be the endpoint's. For the site alone.
        waiting_s: How long a busy backend is waited for at the moment.
    """

    calls: int = 0
    faults: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    said: dict[str, str] = field(default_factory=dict)
    waiting_s: float = 0.0


@dataclass(slots=True)
class _Job:
    """A request that waits, with all its places in the sequence, and whether a kept answer stands just before it."""

    request: Request
    key: str
    places: list[int]
    prompt_tokens: int
    after_kept: bool
    tries: int = 0


@dataclass(slots=True)
class _Outcome:
    """What became of a batch that was begun at ``begun``."""

    jobs: list[_Job]
    begun: float
    result: list[Completion | RowFault] | Exception


class Caller:
    """Answers requests from the store, and the rest by the backend; for one thread.

    Args:
        backend: Who answers.
        store: Where answers are kept; faults are not.
        config: The budgets: they count from now, and what the store has costs nothing.
        totals: What earlier callers of the same command or run did, for which the budgets hold, too.

    Attributes:
        kept: Answers that were there before: the share of faults is of these, too, for what has failed is asked again.
    """

    def __init__(self, backend: Backend, store: Store, config: RewriterConfig, *, totals: Totals | None = None) -> None:
        self.totals = Totals() if totals is None else totals
        self._before = replace(self.totals)  # faults of an outage that is over say nothing of this endpoint
        self.kept = 0
        self._backend = backend
        self._store = store
        self._config = config
        self._limit = backend.concurrency
        self._in_a_row = 0
        self._busy_in_a_row = 0
        self._unanswered = 0
        self._not_before = 0.0
        self._eased = 0.0  # when the limit fell last: calls begun before say nothing new

    def answer(self, requests: Sequence[Request], on_done: OnProgress = no_progress) -> list[Completion | RowFault]:
        """Answers in the order of the requests; equal requests are asked once.

        Args:
            requests: What is asked.
            on_done: Called with the requests that are done and their number, in the caller's thread.

        Raises:
            EndpointError: The endpoint cannot be used, a budget does not hold another call, or too many calls failed.
                What was answered until then is in the store.
        """
        results: list[Completion | RowFault | None] = [None] * len(requests)
        jobs = self._jobs(requests, results)
        num_done = sum(result is not None for result in results)
        on_done(num_done, len(requests))
        waiting, running, outcomes = deque(jobs), 0, queue.SimpleQueue[_Outcome]()
        held: dict[int, _Job] = {}  # in flight, with the tokens that they may take
        stop: EndpointError | None = None
        while waiting or running:
            while waiting and stop is None and running < self._limit:
                batch = self._affordable(waiting, held)
                if not batch:
                    if not running:
                        stop = self._spent(waiting[0])
                    break
                self._be_patient(partial(on_done, num_done, len(requests)))
                held |= {id(job): job for job in batch}
                running += 1
                self._begin(batch, outcomes)
            if not running:
                break
            outcome = outcomes.get()
            running -= 1
            for job in outcome.jobs:
                del held[id(job)]
            if isinstance(outcome.result, BusyError):
                again = self._ease(outcome, results)
                waiting.extendleft(reversed(again))
                num_done += sum(len(job.places) for job in outcome.jobs if job not in again)
            elif isinstance(outcome.result, EndpointError):
                stop = stop or outcome.result
            elif isinstance(outcome.result, Exception):
                raise outcome.result
            else:
                for job, result in zip(outcome.jobs, outcome.result, strict=True):
                    self._count(job, result, outcome.begun)
                    num_done += len(job.places)
                    for place in job.places:
                        results[place] = result
            stop = stop or self._no_use()
            on_done(num_done, len(requests))
        if stop is not None:
            raise stop
        return [result for result in results if result is not None]

    def _jobs(self, requests: Sequence[Request], results: list[Completion | RowFault | None]) -> list[_Job]:
        """What must be asked for; answers of the store are put into ``results``."""
        fingerprints = {model: self._backend.fingerprint(model) for model in {request.model for request in requests}}
        jobs: dict[str, _Job] = {}
        after_kept = False
        for place, request in enumerate(requests):
            key = request_key(request, model=fingerprints[request.model])
            if (stored := self._store.get(key)) is not None:
                results[place], after_kept = stored, True
                self.kept += 1
            elif key in jobs:
                jobs[key].places.append(place)
            else:
                jobs[key] = _Job(request, key, [place], self._backend.count_tokens(request), after_kept)
                after_kept = False
        return list(jobs.values())

    def _begin(self, batch: list[_Job], outcomes: queue.SimpleQueue[_Outcome]) -> None:
        """Have a batch answered, in a thread of its own where there may be several."""
        begun = time.monotonic()

        def work() -> None:
            result: list[Completion | RowFault] | Exception
            try:
                answers = self._backend.complete([job.request for job in batch])
                result = [without_thought(each) if isinstance(each, Completion) else each for each in answers]
                for job, answer in zip(batch, result, strict=True):
                    if isinstance(answer, Completion):
                        self._keep(job.key, answer)  # here: whatever ends the process, it is kept
            except Exception as error:
                result = error
            outcomes.put(_Outcome(batch, begun, result))

        if self._backend.concurrency == 1:
            work()
        else:
            threading.Thread(target=work, name="fedzo-call", daemon=True).start()  # an end does not wait for it

    def _keep(self, key: str, answer: Completion) -> None:
        try:
            self._store.put(key, answer)
        except OSError as error:
            raise EndpointError(
                f"rewriter.store: an answer must be kept, but cannot be: {error}. Make room there, or choose another "
                "folder; what is done is kept."
            ) from error

    def _affordable(self, waiting: deque[_Job], held: dict[int, _Job]) -> list[_Job]:
        """The next batch, out of ``waiting``, as far as the budgets hold it beside what is in flight."""
        batch: list[_Job] = []
        while waiting and len(batch) < self._backend.batch_size and self._fits([*held.values(), *batch, waiting[0]]):
            batch.append(waiting.popleft())
        return batch

    def _fits(self, jobs: list[_Job]) -> bool:
        prompt = self.totals.prompt_tokens + sum(job.prompt_tokens for job in jobs)
        answer = self.totals.answer_tokens + sum(job.request.max_tokens for job in jobs)
        config, calls = self._config, self.totals.calls + len(jobs)
        return not (
            0 < config.budget_calls < calls
            or 0 < config.budget_tokens < prompt + answer
            or 0 < config.budget_cost < self._config.cost(prompt, answer)
        )

    def _spent(self, job: _Job) -> EndpointError:
        config, totals = self._config, self.totals
        tokens, most = totals.prompt_tokens + totals.answer_tokens, job.prompt_tokens + job.request.max_tokens
        spent = f"{totals.calls} calls, {tokens} tokens"
        budgets = [
            f"rewriter.{name}={value:g}"
            for name in ("budget_calls", "budget_tokens", "budget_cost")
            if (value := getattr(config, name)) > 0
        ]
        if config.price_prompt or config.price_answer:
            spent += f", cost {config.cost(totals.prompt_tokens, totals.answer_tokens):.4g}"
        return EndpointError(
            f"The budget ({', '.join(budgets)}) does not hold another call: {spent} are spent, and the next may take "
            f"{most} tokens. What is done is kept. Raise the budget, or start again to spend it once more."
        )

    def _count(self, job: _Job, result: Completion | RowFault, begun: float) -> None:
        self.totals.calls += 1
        if isinstance(result, Completion):
            self.totals.prompt_tokens += result.prompt_tokens
            self.totals.answer_tokens += result.completion_tokens
        else:
            self._fault(result)
            if result.reason is not RowReason.refused:  # else nobody knows what it took
                self.totals.prompt_tokens += job.prompt_tokens
                self.totals.answer_tokens += job.request.max_tokens
        if isinstance(result, RowFault) and result.reason in (RowReason.timeout, RowReason.unavailable):
            # behind a kept answer stands what failed before, and may fail for ever, while the endpoint is there
            self._unanswered = 1 if job.after_kept else self._unanswered + 1
        else:
            self._unanswered = 0
        self._busy_in_a_row = 0
        self._in_a_row += begun >= self._eased
        if self._in_a_row >= CALLS_PER_STEP_UP and self._limit < self._backend.concurrency:
            self._limit, self._in_a_row = self._limit + 1, 0

    def _ease(self, outcome: _Outcome, results: list[Completion | RowFault | None]) -> list[_Job]:
        """Ask for less at once, and later; returns the requests that are made again."""
        assert isinstance(outcome.result, BusyError)
        now, asked = time.monotonic(), outcome.result.retry_after_s or 0.0
        self._in_a_row = 0
        if outcome.begun >= self._eased:
            self._limit, self._eased = max(1, self._limit // 2), now
            self._busy_in_a_row += 1
        wait = max(asked, FIRST_WAIT_S * 2 ** max(0, self._busy_in_a_row - 1))  # it may ask for 0, or name a past date
        self._not_before = max(self._not_before, now + min(LONGEST_WAIT_S, wait))
        again = []
        for job in outcome.jobs:
            job.tries += 1
            if job.tries < MAX_TRIES:
                again.append(job)
                continue
            fault = RowFault(RowReason.unavailable, f"busy, {MAX_TRIES} times")
            self.totals.calls += 1
            self._fault(fault)
            for place in job.places:
                results[place] = fault
        return again

    def _fault(self, fault: RowFault) -> None:
        self.totals.faults += 1
        self.totals.said.setdefault(fault.reason, str(fault))

    def _be_patient(self, tell: Callable[[], None]) -> None:
        wait = self._not_before - time.monotonic()
        if wait > 0:
            self.totals.waiting_s = wait
            tell()
            time.sleep(wait)
            self.totals.waiting_s = 0.0

    def _no_use(self) -> EndpointError | None:
        said = "; ".join(self.totals.said.values())
        if self._busy_in_a_row >= MAX_BUSY:
            return EndpointError(
                f"The endpoint said {MAX_BUSY} times in a row that it is busy. Its quota may be spent: look there, or "
                "start again later. What is done is kept."
            )
        if self._unanswered >= MAX_UNANSWERED:
            return EndpointError(
                f"{self._unanswered} calls on end had no answer ({said}). See whether the endpoint is down, or raise "
                "rewriter.timeout_s. What is done is kept, and what failed is asked again."
            )
        faults = self.totals.faults - self._before.faults
        calls = self.totals.calls - self._before.calls + self.kept
        if calls < FEWEST_CALLS or faults <= MAX_FAULTS * calls:
            return None
        return EndpointError(
            f"{faults} of {calls} calls failed, which is more than {MAX_FAULTS:.0%} ({said}). Correct the endpoint, "
            "its model or rewriter.timeout_s. What is done is kept, and what failed is asked again."
        )
