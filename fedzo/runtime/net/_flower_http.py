"""Private names of Flower's network parts (slow to import), and the two protocols that fedzo speaks with them.

Both ends of a run get their work from a Runtime API: a SuperLink hands out the ServerApp task, a SuperNode one
ClientApp task a message. Whoever acquires a task receives its token, with which to pull its input and push its output.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any, cast

import httpx
from flwr.app import Context, Error, Message
from flwr.common.constant import HEARTBEAT_CALL_TIMEOUT, HEARTBEAT_PATIENCE, SubStatus
from flwr.common.serde import context_from_proto, run_from_proto
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
    SendTaskHeartbeatResponse,
)
from flwr.supercore import heartbeat
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode import fleet_http_connection, start_client_internal
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from fedzo.runtime._flower import ErrorCode, TaskIdentity, failure_reason
from fedzo.runtime.net._flower_grid import ServerGrid
from fedzo.runtime.net.credentials import Endpoint

__all__ = [
    "ClientTask",
    "RunNotRunningException",
    "RuntimeApi",
    "TaskType",
    "client_task",
    "quicken",
    "server_task",
    "superlink",
]
log = logging.getLogger(__name__)
_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
MAX_TIME_S = 120.0
"""How long the server's end tries to reach a SuperLink that does not answer, which is started again meanwhile."""
PULL_PAUSES = {"initial_backoff": 0.02, "backoff_cap": 1.0, "max_tries_per_object": None}
"""Seconds before a part of a message that is still under way is asked for again: doubled each time, to at most the cap.
Flower begins with 1 s and gives up after 500 times; here time alone counts, of which it gives two hours."""

CLEAN_UP_S = 1.0
"""How often a SuperLink looks for tasks that have ended unsaid; they may be silent for 60 s."""
for _pull in (inflatable_utils.pull_objects, inflatable_utils.pull_and_inflate_object_from_tree):
    cast(Any, _pull).__kwdefaults__.update(PULL_PAUSES)
cast(Any, heartbeat).HEARTBEAT_DEFAULT_INTERVAL = HEARTBEAT_CALL_TIMEOUT + 14.0
"""Nodes and tasks say every 10 to 13 s that they live: Flower's sender pauses for 0.7 to 0.9 of this, less the time-out
of a call. Flower would wait 20 s, and a task is given up after 60 s: a SuperLink that is started again twice could miss
them all."""


def quicken(poll_s: float, lease_s: float) -> None:
    """Shorten the pauses of the SuperNode in this process, and the time after which it counts as gone if it dies.

    It asks for work every 3 s when idle, and every 0.5 s whether the client has replied; these are constants in its
    loop, so the module's name ``time``, of which it uses nothing but ``sleep``, is replaced. The gate before fedzo's
    SuperLink holds a question for work until there is some. By Flower's constants a node that died is missed after
    60 s, and cannot come back before; here it is after ``lease_s``.
    """
    flower = logging.getLogger("flwr")
    flower.setLevel(logging.INFO)
    for handler in flower.handlers:
        handler.setLevel(logging.WARNING)  # it would write some lines for each message
    flower.addHandler(_Connected())
    loop: Any = start_client_internal
    loop._pull_and_store_message = partial(_without_remains, loop._pull_and_store_message)
    loop.time = SimpleNamespace(sleep=lambda seconds: time.sleep(min(seconds, poll_s)))
    cast(Any, fleet_http_connection).HEARTBEAT_DEFAULT_INTERVAL = lease_s / HEARTBEAT_PATIENCE


def _without_remains(pull: Callable[..., int | None], **settings: Any) -> int | None:
    """Pull a message, and leave nothing of one whose run ended meanwhile, as Flower does.

    Where the server was killed between a message and its parts, an executor would wait for them for two hours.
    """
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


class _Connected(logging.Handler):
    """Tells when this SuperNode has connected, of all that Flower has to tell."""

    def emit(self, record: logging.LogRecord) -> None:
        if str(record.msg).startswith("SuperNode ID"):
            log.warning("connected as node %s", record.getMessage().rpartition(" ")[2])


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


@dataclass(frozen=True, slots=True)
class RuntimeApi:
    """Where tasks come from.

    Attributes:
        address: ``host:port`` on the loopback interface.
        secret: Shared with whoever started the SuperLink or SuperNode with ``--superexec-auth-secret-file``. Without it
            any local user could take the task, and the token that comes with it.
        authority: Certificate (PEM) that signs a SuperLink's own; None for a SuperNode, which has none.
    """

    address: str
    secret: bytes
    authority: bytes | None = None

    @contextmanager
    def tasks(self, task_type: TaskType) -> Iterator[Callable[[], str | None]]:
        """A function that takes the next task and returns its token, ``None`` when there is none."""
        client = _client(
            self.address,
            self.authority,
            RuntimeVersionHttpInterceptor(component_name="SuperExec"),
            SuperExecAuthHttpInterceptor(master_secret=self.secret, protected_methods={_ACQUIRE}),
        )
        request = AcquireTaskRequest(supported_task_types=[task_type], agentapp_fab_hashes=[])

        def take() -> str | None:
            response = client.AcquireTask(request)
            return response.token if response.HasField("task") and response.token else None

        try:
            yield take
        finally:
            client.close()


@contextmanager
def client_task(address: str, token: str) -> Iterator[ClientTask]:
    """Pull one message and keep its task alive while it is worked on."""
    client = _client(
        address,
        None,
        RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"),
        RuntimeTokenHttpInterceptor(token),
        _TaskOver(),
    )
    with _heartbeat(client) as fall_silent:
        try:
            message, context, _, bundle = pull_task_input(client)
        except Exception as error:
            fall_silent()
            push_task_output(client, None, SubStatus.FAILED, failure_reason(error))
            raise
        yield ClientTask(client, message, context, bundle.content, fall_silent)


class ClientTask:
    """One message for the ClientApp, and the bundle that came with its run."""

    def __init__(
        self,
        client: RuntimeHttpClient,
        message: Message,
        context: Context,
        bundle: bytes,
        fall_silent: Callable[[], None],
    ) -> None:
        self.message = message
        self.context = context
        self.bundle = bundle
        self._client = client
        self._fall_silent = fall_silent

    def finish(self, reply: Message) -> None:
        """Send the reply, with the client's state, to the SuperNode."""
        push_message(self._client, reply, self.context)
        self._fall_silent()
        push_task_output(self._client, self.context, SubStatus.COMPLETED, "")

    def fail(self, reason: str) -> None:
        """Send an error reply."""
        error = Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=reason)
        push_message(self._client, Message(error, reply_to=self.message), self.context)
        self._fall_silent()
        push_task_output(self._client, None, SubStatus.FAILED, reason)


@contextmanager
def server_task(server: Endpoint, token: str) -> Iterator[tuple[ServerGrid, Context]]:
    """Play the ServerApp's process in this one: grid and context of the run, whose end Flower learns."""
    grid = ServerGrid(server.address, root_certificates=server.authority.read_bytes(), token=token)
    grid._retry_invoker.max_time = MAX_TIME_S  # it would retry for ever
    client = grid._runtime_client
    client._interceptors += (_TaskOver(),)
    with _heartbeat(client) as fall_silent:
        task = client.PullTaskInput(PullTaskInputRequest())
        run, context = run_from_proto(task.run), context_from_proto(task.context)
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = task.task_id, run.run_id, context.node_id
        grid.set_run(run)
        output = PushTaskOutputRequest(sub_status=SubStatus.FAILED, details="stopped")
        try:
            yield grid, context
            output = PushTaskOutputRequest(sub_status=SubStatus.COMPLETED, details="")
        except Exception as error:
            output = PushTaskOutputRequest(sub_status=SubStatus.FAILED, details=failure_reason(error))
            raise
        finally:
            grid._retry_invoker.max_tries = 1  # the SuperLink may be what failed
            fall_silent()
            try:
                client.PushTaskOutput(output)
            except (httpx.HTTPError, RunNotRunningException) as error:
                log.warning("the SuperLink was not told how the run ended: %s", error)


class _TaskOver:
    """Has a request whose task is over raise ``RunNotRunningException``.

    For a token that is not known any more Flower would interrupt this process as Ctrl-C does, and sleep for 6 s.
    """

    def intercept(self, context: Any, call_next: Callable[[Any], httpx.Response]) -> httpx.Response:
        """Look at the answer to a request."""
        response = call_next(context)
        if response.status_code == httpx.codes.UNAUTHORIZED:
            raise RunNotRunningException
        return response


@contextmanager
def _heartbeat(client: RuntimeHttpClient) -> Iterator[Callable[[], None]]:
    """Say that a task is alive, until the function is called that this gives: before its end is told, not after."""

    def tell(request: SendTaskHeartbeatRequest) -> SendTaskHeartbeatResponse:
        if not (answer := client.SendTaskHeartbeat(request)).success:  # Flower would interrupt this process
            raise RunNotRunningException
        return answer

    beat = make_task_heartbeat_fn_http(cast(Any, SimpleNamespace(SendTaskHeartbeat=tell)))

    def beat_or_leave() -> bool:
        try:
            return beat()
        except RunNotRunningException:
            return True  # whoever works on the task learns it by the next request

    sender = HeartbeatSender(beat_or_leave)

    def fall_silent() -> None:
        if sender.is_running:
            sender.stop()

    sender.start()
    try:
        yield fall_silent
    finally:
        fall_silent()
        client.close()


def _client(address: str, authority: bytes | None, *interceptors: Any) -> RuntimeHttpClient:
    return RuntimeHttpClient.from_server_address(
        server_address=address,
        insecure=authority is None,
        root_certificates=authority,
        interceptors=list(interceptors),
        retry_invoker=make_simple_http_retry_invoker(),
    )
