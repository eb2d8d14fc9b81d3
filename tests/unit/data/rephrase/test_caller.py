"""Many calls: in order, once each, within budgets, and what is done is kept, whatever ends the process."""

from __future__ import annotations

import hashlib
import itertools
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Generic, TypeVar

import pytest

from fedzo.data.preprocess.backend import (
    BusyError,
    Completion,
    EndpointError,
    Request,
    RewriterConfig,
    RowFault,
    RowReason,
)
from fedzo.data.preprocess.rephrase import caller as caller_module
from fedzo.data.preprocess.rephrase.caller import Caller, Totals
from fedzo.data.preprocess.rephrase.store import FILE, Store
from fedzo.errors import FolderInUseError

Make = Callable[..., Any]
T = TypeVar("T")

CHILD = """
import signal, sys
from pathlib import Path
from fedzo.data.preprocess.backend import Message, Request
from fedzo.data.preprocess.rephrase.caller import Caller
from fedzo.data.preprocess.rephrase.chat_completions import ChatCompletions
from fedzo.data.preprocess.rephrase.openai_compatible import OpenAICompatibleConfig
from fedzo.data.preprocess.rephrase.store import Store

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are deaf to it
url, folder, concurrency = sys.argv[1:]
config = OpenAICompatibleConfig(base_url=url, model="m", concurrency=int(concurrency))
requests = [Request((Message("user", f"row {i}"),), "m", 0.0, 0, 16) for i in range(40)]
with Store(Path(folder)) as store:
    Caller(ChatCompletions(config, key=None), store, config).answer(requests)
"""


def _text(body: dict[str, Any]) -> str:
    return str(body["messages"][0]["content"])


@dataclass
class Gate:
    """Answers the first requests; the others wait until it is open."""

    first: int
    opened: threading.Event = field(default_factory=threading.Event)
    count: Iterator[int] = field(default_factory=itertools.count)

    def pass_(self) -> None:
        if next(self.count) >= self.first:
            self.opened.wait()


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate(14)
    yield made
    made.opened.set()


@pytest.fixture
def echo(serve: Make, sent: Make, chat: Make) -> Make:
    """Starts a server that answers a text by the text in capitals, after ``before``, with 10 and 5 tokens."""

    def start(before: Callable[[], object] = lambda: None) -> Any:
        usage = {"prompt_tokens": 10, "completion_tokens": 5}

        def reply(handler: Any, body: dict[str, Any]) -> None:
            before()
            sent(handler, 200, chat(_text(body).upper(), usage=usage))

        return serve(reply)

    return start


def test_answers_come_in_order_and_once(echo: Make, client: Make, ask: Make, tmp_path: Path) -> None:
    endpoint, seen = echo(), []
    requests = [ask(f"row {i % 7}") for i in range(20)]

    with Store(tmp_path) as store:
        caller = Caller(client(endpoint.url), store, RewriterConfig())
        answers = caller.answer(requests, lambda done, total: seen.append((done, total)))
        again = Caller(client("http://127.0.0.1:9/v1"), store, RewriterConfig())
        assert again.answer(requests) == answers

    assert [answer.text for answer in answers] == [f"ROW {i % 7}" for i in range(20)]
    assert Counter(map(_text, endpoint.bodies)) == {f"row {i}": 1 for i in range(7)}
    assert seen[0] == (0, 20)
    assert seen[-1] == (20, 20)
    assert sorted(seen) == seen
    totals = caller.totals
    assert (totals.calls, totals.prompt_tokens, totals.answer_tokens, totals.faults) == (7, 70, 35, 0)
    assert again.totals.calls == 0
    assert RewriterConfig(price_prompt=2.0, price_answer=4.0).cost(70, 35) == pytest.approx((70 * 2 + 35 * 4) / 1e6)


def test_an_answer_is_kept_under_the_digest_of_what_was_asked_whatever_its_limit(
    scripted: Make, ask: Make, tmp_path: Path
) -> None:
    """The oracle is the text whose digest is the key: a later fedzo must find what was paid for."""
    text = '{"messages": [["user", "Hello"]], "model": "m", "schema": null, "seed": null, "temperature": 0.0}'

    with Store(tmp_path) as store:
        store.put(hashlib.sha256(text.encode()).hexdigest(), Completion("Hi.", False, "m", 3, 4))
        backend = scripted(lambda request: "asked")
        requests = [ask("Hello", max_tokens=16), ask("Hello", max_tokens=17), ask("Hello there", max_tokens=16)]
        answers = [Caller(backend, store, RewriterConfig()).answer([each])[0] for each in requests]

    assert [answer.text for answer in answers] == ["Hi.", "Hi.", "asked"]
    assert len(backend.asked) == 1


def test_faults_keep_their_place_and_are_asked_again(
    serve: Make, sent: Make, chat: Make, client: Make, ask: Make, tmp_path: Path
) -> None:
    endpoint = serve(lambda handler, body: sent(handler, 400 if "3" in _text(body) else 200, chat("fine")))
    requests = [ask(f"row {i}") for i in range(5)]

    for _ in range(2):
        with Store(tmp_path) as store:
            answers = Caller(client(endpoint.url), store, RewriterConfig()).answer(requests)
        assert [isinstance(answer, RowFault) for answer in answers] == [False, False, False, True, False]

    assert Counter(map(_text, endpoint.bodies)) == {"row 0": 1, "row 1": 1, "row 2": 1, "row 3": 2, "row 4": 1}


@pytest.mark.parametrize(
    ("budget", "calls"),
    [
        ({"budget_calls": 3}, 3),
        ({"budget_tokens": 76}, 4),  # a call takes 15, and may take 12 + 16 before it is made: 3 * 15 + 28 = 73
        ({"budget_tokens": 72}, 3),
        ({"budget_cost": 76e-6, "price_prompt": 1.0, "price_answer": 1.0}, 4),
    ],
)
@pytest.mark.parametrize("concurrency", [1, 8])
def test_a_budget_stops_before_a_call_that_may_exceed_it(
    budget: dict[str, Any], calls: int, concurrency: int, echo: Make, client: Make, ask: Make, tmp_path: Path
) -> None:
    endpoint, config = echo(), RewriterConfig(**budget)
    requests = [ask(f"row {i}") for i in range(10)]

    with Store(tmp_path) as store:
        backend = client(endpoint.url, concurrency=concurrency)
        with pytest.raises(EndpointError, match=rf"\(rewriter\.budget_.*\) does not hold.*: {calls} calls.*Raise"):
            Caller(backend, store, config).answer(requests)
        assert len(endpoint.bodies) == len(store) == calls
        with pytest.raises(EndpointError):
            Caller(backend, store, config).answer(requests)  # its budget is new, what is done costs nothing
        assert len(store) == 2 * calls


def test_an_endpoint_that_is_not_there_stops_and_keeps_what_is_done(
    serve: Make, sent: Make, chat: Make, client: Make, ask: Make, tmp_path: Path
) -> None:
    endpoint = serve(lambda handler, body: sent(handler, 401 if "5" in _text(body) else 200, chat("fine")))

    with Store(tmp_path) as store:
        with pytest.raises(EndpointError, match="answered 401"):
            Caller(client(endpoint.url, concurrency=2), store, RewriterConfig()).answer(
                [ask(f"row {i}") for i in range(10)]
            )
        assert len(store) in (5, 6)  # a call may be in flight beside the sixth


def test_too_many_faults_stop(serve: Make, sent: Make, chat: Make, client: Make, ask: Make, tmp_path: Path) -> None:
    endpoint = serve(lambda handler, body: sent(handler, 500 if int(_text(body)) % 4 == 0 else 200, chat("fine")))

    with Store(tmp_path) as store, pytest.raises(EndpointError, match=r"5 of 20 calls failed, .* more than 20%"):
        Caller(client(endpoint.url, concurrency=1), store, RewriterConfig()).answer([ask(str(i)) for i in range(30)])

    assert len(endpoint.bodies) == 20


@pytest.mark.parametrize("reason", [RowReason.timeout, RowReason.unavailable])
def test_calls_on_end_that_nobody_answers_stop_however_many_were_answered(
    reason: RowReason, scripted: Make, ask: Make, tmp_path: Path
) -> None:
    backend = scripted(lambda request: "fine" if len(backend.asked) <= 200 else RowFault(reason))

    with Store(tmp_path) as store, pytest.raises(EndpointError, match=rf"20 calls on end had no answer \({reason}\)"):
        Caller(backend, store, RewriterConfig()).answer([ask(f"row {i}") for i in range(240)])

    assert len(backend.asked) == 220


@pytest.mark.parametrize("reason", [RowReason.refused, RowReason.malformed])
def test_calls_on_end_that_are_answered_by_a_fault_are_of_their_rows(
    reason: RowReason, scripted: Make, ask: Make, tmp_path: Path
) -> None:
    backend = scripted(lambda request: "fine" if len(backend.asked) <= 200 else RowFault(reason))

    with Store(tmp_path) as store:
        answers = Caller(backend, store, RewriterConfig()).answer([ask(f"row {i}") for i in range(240)])

    assert [isinstance(answer, RowFault) for answer in answers] == [False] * 200 + [True] * 40


def test_what_fails_again_between_kept_answers_is_no_outage(scripted: Make, ask: Make, tmp_path: Path) -> None:
    """A second start asks for nothing else; of new rows behind them, nobody answers any."""

    def reply(request: Request) -> str | RowFault:
        number = int(request.messages[0].content)
        return RowFault(RowReason.timeout) if number % 8 == 0 or number >= 240 else "fine"

    requests = [ask(str(i)) for i in range(240)]
    for num_asked in (240, 30):
        backend = scripted(reply)
        with Store(tmp_path) as store:
            answers = Caller(backend, store, RewriterConfig()).answer(requests)
        assert len(backend.asked) == num_asked
        assert [isinstance(answer, RowFault) for answer in answers] == [i % 8 == 0 for i in range(240)]

    backend = scripted(reply)
    with Store(tmp_path) as store, pytest.raises(EndpointError, match="20 calls on end had no answer"):
        Caller(backend, store, RewriterConfig()).answer([*requests, *(ask(str(i)) for i in range(240, 300))])
    assert len(backend.asked) == 30 + 20


def test_faults_of_an_outage_that_is_over_stop_no_later_caller(scripted: Make, ask: Make, tmp_path: Path) -> None:
    """As of a site whose process goes on; its budgets hold for all that it ever asked."""
    totals = Totals(calls=40, faults=40)

    with Store(tmp_path) as store:
        caller = Caller(scripted(lambda request: "fine"), store, RewriterConfig(budget_calls=75), totals=totals)
        answers = caller.answer([ask(f"row {i}") for i in range(30)])
        assert (len(answers), totals.calls, totals.faults) == (30, 70, 40)
        with pytest.raises(EndpointError, match="budget_calls=75"):
            caller.answer([ask(f"more {i}") for i in range(30)])


def test_thoughts_are_no_part_of_an_answer_and_are_not_kept(scripted: Make, ask: Make, tmp_path: Path) -> None:
    replies = {"thinks": "<think>\nHm.\n</think>\n\nfine", "is cut": "<think>\nHm.", "says": "fine <think>"}
    replies["thinks on"] = "Hm.\n</think>\n\nfine"
    backend = scripted(lambda request: replies[request.messages[0].content])

    with Store(tmp_path) as store:
        answers = Caller(backend, store, RewriterConfig()).answer([ask(each) for each in replies])
        assert len(store) == 3

    assert [(answer.text, answer.truncated) for answer in answers] == [
        ("fine", False),
        ("<think>\nHm.", True),
        ("fine <think>", False),
        ("fine", False),
    ]
    assert "think>" not in (tmp_path / FILE).read_text().replace("fine <think>", "")


class Turns:
    """Threads, their queue and the time: a call runs, and takes 0.2 s, where the caller waits for an outcome."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.begun: list[Callable[[], None]] = []
        turns = self

        class Thread:
            def __init__(self, *, target: Callable[[], None], **_: object) -> None:
                self.start = lambda: turns.begun.append(target)

        class Outcomes(Generic[T]):
            def __init__(self) -> None:
                self.put, self._got = lambda outcome: self._got.append(outcome), []

            def get(self) -> T:
                turns.now += 0.2
                turns.begun[0]()
                del turns.begun[0]
                return self._got.pop()

        self.threading, self.queue = SimpleNamespace(Thread=Thread), SimpleNamespace(SimpleQueue=Outcomes)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize(("requests", "most"), [(16, 4), (40, 6)])  # a step up is 10 answers away
def test_a_busy_endpoint_gets_fewer_calls_at_once_after_the_time_that_it_asks_for(
    requests: int, most: int, scripted: Make, ask: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns, at_once = Turns(), {}
    for name in ("threading", "queue"):
        monkeypatch.setattr(caller_module, name, getattr(turns, name))
    monkeypatch.setattr(caller_module, "time", turns)

    def reply(request: Request) -> str:
        at_once[turns.now] = len(turns.begun)
        if len(at_once) == 1:
            raise BusyError(5.0)
        return "fine"

    with Store(tmp_path) as store:
        caller = Caller(scripted(reply, concurrency=8), store, RewriterConfig())
        waited = []
        on_done = lambda done, total: waited.append(caller.totals.waiting_s)  # noqa: E731
        answers = caller.answer([ask(f"row {i}") for i in range(requests)], on_done)

    (wait,) = [wait for wait in waited if wait]  # told before it is waited for
    assert 0 < wait <= 5
    assert caller.totals.waiting_s == 0
    assert [answer.text for answer in answers] == ["fine"] * requests
    (refused_at, before), *rest = at_once.items()
    resumed = [(now, count) for now, count in rest if now >= refused_at + 5]
    assert before == 8
    assert len(resumed) == requests - (8 - 4)  # those that wait for nobody: begun before, and down to the new limit
    assert max(count for _, count in resumed) == most


@pytest.mark.parametrize(
    ("asked", "waits"),
    [
        (None, [1, 2, 4, 8, 16, 32, 60]),
        (0.0, [1, 2, 4, 8, 16, 32, 60]),
        (7.0, [7, 7, 7, 8, 16, 32, 60]),
        (86_400.0, [60] * 7),
    ],
)
def test_waits_double_and_none_is_shorter_than_asked_or_longer_than_a_minute(
    asked: float | None, waits: list[float], scripted: Make, ask: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, slept = [1000.0], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    def busy(request: Request) -> str:
        raise BusyError(asked)

    monkeypatch.setattr(caller_module, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))

    with Store(tmp_path) as store:
        (fault,) = Caller(scripted(busy), store, RewriterConfig()).answer([ask()])

    assert fault.reason == "unavailable"
    assert slept == waits


def test_a_quota_that_opens_again_after_a_minute_costs_no_row(
    scripted: Make, ask: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    def reply(request: Request) -> str:
        if now[0] < 1060:
            raise BusyError(None)
        return "fine"

    monkeypatch.setattr(caller_module, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))

    with Store(tmp_path) as store:
        answers = Caller(scripted(reply), store, RewriterConfig()).answer([ask("a"), ask("b")])

    assert [answer.text for answer in answers] == ["fine", "fine"]


def test_an_endpoint_that_stays_busy_is_asked_a_bounded_number_of_times(
    serve: Make, sent: Make, client: Make, ask: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caller_module, "FIRST_WAIT_S", 0.001)
    endpoint = serve(lambda handler, _: sent(handler, 429, b""))

    with Store(tmp_path) as store:
        (fault,) = Caller(client(endpoint.url), store, RewriterConfig()).answer([ask()])
        assert (fault.reason, len(endpoint.bodies)) == ("unavailable", 8)
        with pytest.raises(EndpointError, match="10 times in a row that it is busy"):
            Caller(client(endpoint.url, concurrency=1), store, RewriterConfig()).answer([ask("a"), ask("b"), ask("c")])

    assert len(endpoint.bodies) == 8 + 10


@pytest.mark.slow
@pytest.mark.parametrize("concurrency", [1, 3])
def test_a_process_that_is_killed_loses_its_calls_in_flight_only(
    concurrency: int, echo: Make, gate: Gate, tmp_path: Path
) -> None:
    endpoint = echo(gate.pass_)
    command = [sys.executable, "-c", CHILD, endpoint.url, str(tmp_path), str(concurrency)]
    process = subprocess.Popen(command)
    _wait_for(lambda: len(endpoint.bodies) == gate.first + concurrency)  # a call begins when another's answer is kept
    process.kill()
    process.wait()
    with (tmp_path / FILE).open("rb") as file:
        assert file.read().count(b'"key"') == gate.first
    gate.opened.set()

    subprocess.run(command, check=True)

    asked = Counter(map(_text, endpoint.bodies))
    assert set(asked) == {f"row {i}" for i in range(40)}
    assert len(endpoint.bodies) == 40 + concurrency


@pytest.mark.slow
@pytest.mark.parametrize("concurrency", [1, 3])
def test_an_interrupt_ends_promptly_and_keeps_what_is_done(
    concurrency: int, echo: Make, gate: Gate, tmp_path: Path
) -> None:
    endpoint = echo(gate.pass_)
    command = [sys.executable, "-c", CHILD, endpoint.url, str(tmp_path), str(concurrency)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    _wait_for(lambda: len(endpoint.bodies) == gate.first + concurrency)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)  # its calls are never answered

    assert "KeyboardInterrupt" in errors
    assert process.returncode == -signal.SIGINT
    with Store(tmp_path) as store:
        assert len(store) == gate.first


@pytest.mark.slow
def test_of_two_processes_on_one_store_the_second_refuses(echo: Make, gate: Gate, tmp_path: Path) -> None:
    endpoint = echo(gate.pass_)
    first = subprocess.Popen([sys.executable, "-c", CHILD, endpoint.url, str(tmp_path), "1"])
    _wait_for(lambda: len(endpoint.bodies) > gate.first)

    with pytest.raises(FolderInUseError, match=rf"{tmp_path / FILE}: another process is writing to it. Wait for it"):
        Store(tmp_path)

    gate.opened.set()
    assert first.wait() == 0
    assert len(endpoint.bodies) == 40


def _wait_for(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.005)
