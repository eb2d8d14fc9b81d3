"""The warm executor: one process that answers every message of a SuperNode and keeps its model loaded.

Takes the place of ``flower-superexec``, which starts a Python process a message. It runs the fedzo that is installed
here. The bundle that the server ships is compared with this fedzo's own, and nothing in it is imported.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from flwr.clientapp import ClientApp

from fedzo.errors import OtherVersionError
from fedzo.fl.messages import Refusal
from fedzo.fl.replica import ON_RECORD
from fedzo.fl.site_limits import SiteError, as_site_error
from fedzo.runtime._flower import failure_reason
from fedzo.runtime.net._flower_http import ClientTask, RunNotRunningException, RuntimeApi, TaskType, client_task
from fedzo.runtime.net.addresses import accepts
from fedzo.runtime.net.bundle import check_bundle
from fedzo.runtime.net.processes import watch_parent
from fedzo.system import device_is_lost, quiet_libraries

log = logging.getLogger("fedzo.runtime.net.executor")  # run by -m it is `__main__`, which the site's log does not hear
POLL_S = 0.05
TELL_S = 10.0
"""How long a process that gives up tries to say so before it ends."""
START_AGAIN = 70
"""Exit status after a hung step, or with a lost device; whoever started the executor should start it again."""


def main(arguments: Sequence[str] | None = None, *, app: ClientApp | None = None) -> None:
    """Serve a SuperNode until SIGTERM.

    Args:
        arguments: Command line, by default the process's.
        app: The ClientApp, by default the installed ``fedzo.run.apps.client_app``; only tests give another.
    """
    parser = argparse.ArgumentParser(prog="python -m fedzo.runtime.net.executor", description=__doc__)
    parser.add_argument("--runtime-api-address", required=True, help="host:port of the SuperNode, loopback only")
    parser.add_argument("--secret-file", type=Path, required=True, help="the SuperNode's --superexec-auth-secret-file")
    parser.add_argument("--step-limit-s", type=float, required=True, help="a message that takes longer is given up")
    parser.add_argument("--parent-pid", type=int, help="end when this process has ended")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    quiet_libraries()
    signal.signal(signal.SIGTERM, _exit)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Flower raises it in a process whose task is over, as after each run
    if options.parent_pid is not None:
        watch_parent(options.parent_pid)
    if app is None:
        from fedzo.run.apps import client_app
        from fedzo.run.process import load_ahead

        app = client_app
        load_ahead()
    while not accepts(options.runtime_api_address):
        time.sleep(POLL_S)
    api = RuntimeApi(options.runtime_api_address, options.secret_file.read_bytes())
    serve(app, api, step_limit_s=options.step_limit_s)


def serve(app: ClientApp, api: RuntimeApi, *, step_limit_s: float) -> None:
    """Answer messages for ever, those of runs with another bundle by an error."""
    known: bytes | None = None
    with api.tasks(TaskType.CLIENT_APP) as take:
        while True:
            token = take()
            if token is None:
                time.sleep(POLL_S)
                continue
            try:
                with client_task(api.address, token) as task:
                    try:
                        if task.bundle != known:
                            check_bundle(task.bundle)
                            known = task.bundle
                    except OtherVersionError as error:
                        log.error("%s", error)
                        task.fail(failure_reason(as_site_error(error)))
                        continue
                    answer(app, task, step_limit_s=step_limit_s)
            except RunNotRunningException:
                log.info("the run ended while a message was worked on")
            except Exception:  # no error of the site: a run that is stopped ends amid its messages
                log.warning("a message was lost", exc_info=True)


def answer(app: ClientApp, task: ClientTask, *, step_limit_s: float) -> None:
    """Answer one message, with an error if it fails; past ``step_limit_s`` say so and end the process.

    The process also ends where nothing more can be computed in it; a new one can.

    The time begins anew with each record of the log that is applied: a client that was away may replay for hours. A
    thread watches, so a step that never gives the interpreter back is not caught here: then the heartbeats stop as
    well, and the SuperNode itself gives the message up after a minute.
    """
    turn = threading.Lock()  # whoever has it first replies, worker or watchdog
    heard_at, over = time.monotonic(), threading.Event()

    def hear() -> None:
        nonlocal heard_at
        heard_at = time.monotonic()

    def give_up() -> None:
        if turn.acquire(blocking=False):
            what = "a request took longer than %g s (step_limit_s of the site file's limits, or of runtime=local)"
            log.error(f"{what}: restarting this process", step_limit_s)
            slow = failure_reason(SiteError(Refusal.slow, "it is in the log of this process"))
            telling = threading.Thread(target=task.fail, args=(slow,), daemon=True)  # its SuperNode may be gone
            telling.start()
            telling.join(TELL_S)
            os._exit(START_AGAIN)

    def watch() -> None:
        while not over.wait(heard_at + step_limit_s - time.monotonic()):
            if time.monotonic() >= heard_at + step_limit_s:
                return give_up()

    threading.Thread(target=watch, name="watchdog", daemon=True).start()
    before = ON_RECORD.set(hear)
    try:
        try:
            reply, failure = app(message=task.message, context=task.context), ""
        except Exception as error:
            told = isinstance(error, SiteError)  # by the app itself
            log.log(logging.WARNING if told else logging.ERROR, "the ClientApp failed", exc_info=True)
            failure = failure_reason(as_site_error(error))
        is_lost = device_is_lost()  # while the watchdog looks on
    finally:
        over.set()
        ON_RECORD.reset(before)
    with turn:
        if failure:
            task.fail(failure)
        else:
            task.finish(reply)
    if is_lost:
        log.error("the device does not respond any more in this process: restarting the process")
        os._exit(START_AGAIN)


def _exit(signal_number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


if __name__ == "__main__":
    main()
