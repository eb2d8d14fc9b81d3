"""What is changed in Flower's SuperNode and SuperLink, by private names that are slow to import."""

from __future__ import annotations

import datetime
import email.utils
import logging
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import httpx
from flwr.app import Message
from flwr.common.constant import HEARTBEAT_PATIENCE, TIMESTAMP_HEADER, Status
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.retry import http_retry
from flwr.supernode import fleet_http_connection, node_auth_http_interceptor, start_client_internal

from fedzo.errors import printable
from fedzo.runtime.net._flower_http import be_patient  # its shorter pauses hold for a SuperNode, too
from fedzo.runtime.net.daemons import CONNECTED, HEARD, LATE, REFUSED, SILENT
from fedzo.runtime.net.gate import CLOCK_AHEAD_S, CLOCK_BEHIND_S
from fedzo.runtime.net.gate_http import FLEET

log = logging.getLogger(__name__)
CLEAN_UP_S = 1.0
"""How often a SuperLink looks for tasks that have ended unsaid; they may be silent for 60 s."""
ACTIVATE = f"{FLEET}activate-node"
UNREACHED = (httpx.codes.BAD_GATEWAY, httpx.codes.GATEWAY_TIMEOUT)
"""What a proxy answers in the place of a server that does not."""
MAX_UNANSWERED = 2
"""Calls in a row, for a server to count as silent: one alone also fails where a connection was closed meanwhile."""


def quicken(poll_s: float, lease_s: float) -> None:
    """Shorten the pauses of the SuperNode in this process, and the time after which it counts as gone if it dies.

    It asks for work every 3 s when idle, and every 0.5 s whether the client has replied; these are constants in its
    loop, so the module's name ``time``, of which it uses nothing but ``sleep``, is replaced. The gate before fedzo's
    SuperLink holds a question for work until there is some. By Flower's constants a node that died is missed after
    60 s, and cannot come back before; here it is after ``lease_s``. What a proxy does not pass on is sent again,
    and what a handshake lost: Flower would lose the site's reply. And a node says again that it lives, whatever the
    answer was.
    """
    flower = logging.getLogger("flwr")
    flower.setLevel(logging.INFO)
    for handler in flower.handlers:
        handler.setLevel(logging.WARNING)  # it would write some lines for each message
    flower.addHandler(_Connected())
    loop: Any = start_client_internal
    loop._pull_and_store_message = partial(_without_remains, loop._pull_and_store_message)
    loop.time = SimpleNamespace(sleep=lambda seconds: time.sleep(min(seconds, poll_s)))
    connection: Any = fleet_http_connection
    connection.HEARTBEAT_DEFAULT_INTERVAL = lease_s / HEARTBEAT_PATIENCE
    connection.HeartbeatSender = lambda beat: HeartbeatSender(_persistent(beat))
    connection.make_simple_http_retry_invoker = lambda: be_patient(http_retry.make_simple_http_retry_invoker())
    signing: Any = node_auth_http_interceptor.NodeAuthHttpInterceptor
    signing.intercept = _telling(signing.intercept)
    retry: Any = http_retry
    retry._RETRYABLE_TRANSPORT_ERRORS = (*retry._RETRYABLE_TRANSPORT_ERRORS, httpx.ProxyError)


def _persistent(beat: Callable[[], bool]) -> Callable[[], bool]:
    """The same call, that has failed, and is made again soon, where a gate or a proxy answers something else.

    Flower would say no more that the node lives, which asks for work as before and gets none.
    """

    def persistent() -> bool:
        try:
            return beat()
        except Exception as error:
            if isinstance(error, httpx.HTTPStatusError) and error.response.status_code == httpx.codes.UNAUTHORIZED:
                raise  # Flower ends the node
            log.warning("the server did not hear that this node lives: %s", printable(str(error)))
            return False

    return persistent


def _telling(intercept: Callable[..., httpx.Response]) -> Callable[..., httpx.Response]:
    """The same method, that says when the server is silent, and why it does not let this node in.

    Flower does not say what a call failed by, and ends the node without a word.
    """
    server = _Server()

    def telling(self: Any, context: Any, call_next: Any) -> httpx.Response:
        try:
            response = intercept(self, context, call_next)
        except httpx.TransportError as error:
            server.was_silent(str(error) or type(error).__name__)
            raise
        if response.status_code in UNREACHED:
            server.was_silent(f"status {response.status_code}")
            return response
        server.answered()
        if response.status_code == httpx.codes.UNAUTHORIZED:
            signed, told = context.request.headers[TIMESTAMP_HEADER], response.headers.get("date")
            log.warning("%s: %s", REFUSED, _why(context.request.url.path, signed, told))
        elif response.status_code == httpx.codes.REQUEST_TIMEOUT:
            log.warning("%s: %s. This site needs a faster line to it.", REFUSED, LATE)
        return response

    return telling


class _Server:
    """Whether the server answers this node, told when it is otherwise than before."""

    def __init__(self) -> None:
        self._unanswered = 0

    def was_silent(self, why: str) -> None:
        """A call got no answer."""
        self._unanswered += 1
        if self._unanswered == MAX_UNANSWERED:
            log.warning("%s (%s)", SILENT, printable(why))

    def answered(self) -> None:
        """A call got an answer."""
        if self._unanswered >= MAX_UNANSWERED:
            log.warning(HEARD)
        self._unanswered = 0


def _why(path: str, signed: str, told: str | None) -> str:
    """Why a request to this path was refused that was signed at this time, when the server's clock showed that one."""
    if (server := email.utils.parsedate_tz(told or "")) is not None:
        ahead_s = datetime.datetime.fromisoformat(signed).timestamp() - email.utils.mktime_tz(server)
        if not -CLOCK_BEHIND_S < ahead_s < CLOCK_AHEAD_S:
            side = "ahead of" if ahead_s > 0 else "behind"
            off = f"this machine's clock is {abs(ahead_s):.0f} s {side} the server's"
            return f"{off}. One of the two clocks is wrong: set that one."
    if path != ACTIVATE:  # it was let in before
        return "it has started anew, or has revoked the key of this site. The site connects again."
    return "the key of this site is not registered there, or was revoked. `fedzo server add-client` registers it."


def _without_remains(pull: Callable[..., int | None], **settings: Any) -> int | None:
    """Pull a message, and leave nothing of one whose run ended meanwhile, nor of tasks that are over, as Flower does.

    Where the server was killed between a message and its parts, an executor would wait for them for two hours.
    """
    _forget_done(settings["state"])
    received: list[Message] = []

    def receive() -> Any:
        if (got := settings["receive"]()) is not None:
            received.append(got[0])
        return got

    run_id = pull(**{**settings, "receive": receive})
    if run_id is None:
        for message in received:
            settings["state"].delete_messages(message_ids=[message.metadata.message_id])
            settings["object_store"].delete(message.metadata.message_id)
    return run_id


def _forget_done(state: Any) -> None:
    """Drop the tasks that are over: Flower keeps one a message, and looks at all whenever the executor asks for work.

    Nothing refers to them: with its end a task loses its token, and to an unknown task Flower answers as to one that is
    over.
    """
    with state.lock_task_store:
        for task_id in [each for each, task in state.task_store.items() if task.status.status == Status.FINISHED]:
            del state.task_store[task_id]


class _Connected(logging.Handler):
    """Tells when this SuperNode has connected, of all that Flower has to tell."""

    def emit(self, record: logging.LogRecord) -> None:
        if str(record.msg).startswith("SuperNode ID"):
            log.warning("%s %s", CONNECTED, record.getMessage().rpartition(" ")[2])


def superlink(serve: Callable[..., None]) -> None:
    """Run Flower's SuperLink by ``sys.argv``; its app is served by ``serve`` instead of ``uvicorn.run``.

    With each request Flower looks for tasks whose end nobody has told, which makes a write of each read and took a
    third of the time. Here it looks once a second; who asks with the token of such a task is refused as before.
    """
    module: Any = import_module("flwr.superlink.cli.flower_superlink")
    state: Any = import_module("flwr.supercore.corestate.sql_corestate").SqlCoreState
    state._cleanup_expired_task_tokens = _sparing(state._cleanup_expired_task_tokens)
    logging.getLogger("flwr").setLevel(logging.WARNING)  # it would write some lines for each message
    module.uvicorn = SimpleNamespace(run=serve)
    module.flower_superlink()


def _sparing(clean_up: Callable[[Any], None]) -> Callable[[Any], None]:
    """The same method, that does something once in ``CLEAN_UP_S``."""
    due = 0.0

    def sparing(self: Any) -> None:
        nonlocal due
        if (now := time.monotonic()) >= due:
            due = now + CLEAN_UP_S
            clean_up(self)

    return sparing
