"""How the warm executor answers one message; its talk with a SuperNode is tested over the network."""

from __future__ import annotations

import runpy
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from fedzo.errors import OtherVersionError, ProtocolError
from fedzo.fl.messages import Refusal
from fedzo.fl.site_limits import SiteError

pytestmark = pytest.mark.slow  # the import of Flower's network parts alone takes two seconds


class Task(SimpleNamespace):
    """Stands for a message that came from a SuperNode."""

    def __init__(self, bundle: bytes = b"") -> None:
        super().__init__(message="message", context="context", bundle=bundle, sent=[])

    def finish(self, reply: object) -> None:
        self.sent.append(("reply", reply))

    def fail(self, reason: str) -> None:
        self.sent.append(("error", reason))


def answer(app: Any, *, step_limit_s: float = 10.0) -> list[tuple[str, object]]:
    from fedzo.runtime.net.executor import answer

    task = Task()
    answer(app, task, step_limit_s=step_limit_s)  # type: ignore[arg-type]
    return task.sent


def test_reply_of_the_app_is_sent() -> None:
    assert answer(lambda message, context: (message, context)) == [("reply", ("message", "context"))]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ZeroDivisionError("/data/rows"), "refusal 31, the client failed to do what was asked. Its own log says"),
        (ProtocolError("/data/rows"), "refusal 32, the request does not belong to this run. Its own log says"),
        (SiteError(Refusal.task, "/data/rows"), "refusal 11, its site does not take part in this task. Its own log"),
        (
            OtherVersionError("fedzo 1, got 2"),
            "refusal 35, its site runs another fedzo than the server: fedzo 1, got 2",
        ),
    ],
)
def test_failure_of_the_app_is_sent_as_a_number_and_a_sentence_in_flowers_form(error: Exception, told: str) -> None:
    def app(message: object, context: object) -> object:
        raise error

    ((kind, said),) = answer(app)

    assert kind == "error"
    assert said.startswith(f"<class 'fedzo.fl.site_limits.SiteError'>:<'{told}")  # type: ignore[attr-defined]
    assert "rows" not in said  # type: ignore[operator]


def test_a_message_of_a_run_with_another_bundle_is_refused_each_time_and_the_app_does_not_see_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fedzo.runtime.net import executor
    from fedzo.runtime.net.bundle import build_bundle

    tasks = [Task(bundle) for bundle in (b"another", b"another", build_bundle(), b"another")]
    api: Any = SimpleNamespace(address="127.0.0.1:1", tasks=lambda kind: nullcontext(iter(tasks).__next__))
    monkeypatch.setattr(executor, "client_task", lambda address, token: nullcontext(token))
    seen: list[object] = []

    def app(message: object, context: object) -> object:
        seen.append(message)
        return "reply"

    with pytest.raises(StopIteration):  # there are no more messages
        executor.serve(app, api, step_limit_s=10.0)  # type: ignore[arg-type]

    assert [[kind for kind, _ in task.sent] for task in tasks] == [["error"], ["error"], ["reply"], ["error"]]
    assert all("refusal 35, its site runs another fedzo" in tasks[at].sent[0][1] for at in (0, 1, 3))
    assert seen == ["message"]  # that of the run with this fedzo's own bundle


@pytest.mark.parametrize("program", ["executor", "daemons"])
def test_what_a_program_logs_is_fedzos_whatever_python_calls_the_program(
    program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run by -m it is `__main__`, but what writes to the logs of a site and a server listens to `fedzo`."""
    name = f"fedzo.runtime.net.{program}"
    monkeypatch.delitem(sys.modules, name, raising=False)

    ran = runpy.run_module(name, run_name="another")

    assert ran["__name__"] == "another"
    assert ran["log"].name == name


@pytest.mark.parametrize(
    ("error", "level"), [(ZeroDivisionError("a row"), "ERROR"), (SiteError(Refusal.task, "a row"), "WARNING")]
)
def test_what_the_app_has_told_its_site_of_a_failure_is_not_told_again(
    error: Exception, level: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Errors go to the site's log."""

    def app(message: object, context: object) -> object:
        raise error

    answer(app)

    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [(level, "the ClientApp failed")]


def test_a_message_that_ends_with_its_run_is_no_error_of_the_site(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from fedzo.runtime.net import executor

    def gone(address: str, token: object) -> object:
        raise ConnectionError("the SuperNode is gone")

    api: Any = SimpleNamespace(address="127.0.0.1:1", tasks=lambda kind: nullcontext(iter(["token"]).__next__))
    monkeypatch.setattr(executor, "client_task", gone)

    with pytest.raises(StopIteration):  # there are no more messages
        executor.serve(lambda message, context: "reply", api, step_limit_s=10.0)  # type: ignore[arg-type]

    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [("WARNING", "a message was lost")]
    assert "the SuperNode is gone" in caplog.text


def test_finished_step_stops_its_watchdog() -> None:
    import threading
    import time

    assert answer(lambda message, context: 1, step_limit_s=0.2) == [("reply", 1)]
    time.sleep(0.3)  # a watchdog that still ran would end this process
    assert not any(thread.name == "watchdog" for thread in threading.enumerate())


def test_a_client_that_catches_up_record_by_record_is_not_given_up() -> None:
    """All records together take longer than the limit, and none of them alone."""
    program = """
import time
from types import SimpleNamespace
from fedzo.fl.replica import ON_RECORD
from fedzo.runtime.net import executor

def app(message, context):
    for _ in range(12):
        time.sleep(0.25)
        ON_RECORD.get()()
    return "caught up"

executor.answer(app, SimpleNamespace(message=None, context=None, finish=print), step_limit_s=2.0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)

    assert done.returncode == 0, done.stderr
    assert "caught up" in done.stdout


@pytest.mark.parametrize("is_lost", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_a_process_whose_gpu_is_lost_answers_and_ends_whatever_the_answer_is(is_lost: bool, fails: bool) -> None:
    """CUDA gives no second chance to a process; a load that fails for it is a refusal, and no error."""
    program = f"""
import sys
from types import SimpleNamespace
import torch
from fedzo.runtime.net import executor

def synchronize(index):
    asked.append(index)
    if {is_lost}:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

def app(message, context):
    if {fails}:
        raise ValueError("a row")
    return "reply"

asked, cuda = [], torch.cuda
cuda.is_initialized, cuda.device_count, cuda.synchronize = (lambda: True), (lambda: 3), synchronize
cuda.memory_reserved = lambda index: 1 if index == 1 else 0
say = lambda said: print("told", said, flush=True)
task = SimpleNamespace(message=None, context=None, finish=say, fail=say)
for _ in range(2):
    executor.answer(app, task, step_limit_s=30.0)
sys.exit(0 if asked == [1, 1] else 1)  # a GPU of which the process has nothing is left alone
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)

    assert done.returncode == (70 if is_lost else 0), done.stderr
    assert done.stdout.count("told") == (1 if is_lost else 2)
    assert ("refusal 31" in done.stdout) is fails
    assert ("the device does not respond any more in this process" in done.stderr) is is_lost


def give_up(fail: str) -> subprocess.CompletedProcess[str]:
    program = f"""
import time
from types import SimpleNamespace
from fedzo.runtime.net import executor
executor.TELL_S = 0.2
task = SimpleNamespace(message=None, context=None, fail=lambda reason: {fail})
executor.answer(lambda message, context: time.sleep(600), task, step_limit_s=0.2)
print("never")
"""
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("fail", ["1 / 0", "time.sleep(600)"], ids=["which says no", "which does not answer"])
def test_hung_step_ends_the_process_whatever_becomes_of_its_supernode(fail: str) -> None:
    assert give_up(fail).returncode == 70


def test_hung_step_is_answered_by_an_error_and_ends_the_process() -> None:
    done = give_up("print(reason, flush=True)")

    assert done.returncode == 70
    assert "refusal 34, a step took longer than its site allows. Its own log says why" in done.stdout
    assert "0.2" not in done.stdout  # which is the site's own business
    assert "a request took longer than 0.2 s (step_limit_s of" in done.stderr
