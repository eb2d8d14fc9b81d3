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
from types import SimpleNamespace
from typing import Any, cast

import httpx
from flwr.app import Context, Error, Message
from flwr.common.constant import SubStatus
from flwr.common.serde import context_from_proto, run_from_proto
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
)
from flwr.serverapp import Grid
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.superlink.grid import HttpGrid
from flwr.supernode import start_client_internal
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from fedzo.runtime._flower import ErrorCode, TaskIdentity, failure_reason

__all__ = [
    "ClientTask",
    "RunNotRunningException",
    "RuntimeApi",
    "TaskType",
    "client_task",
    "poll_often",
    "server_task",
]
log = logging.getLogger(__name__)
_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
MAX_TRIES = 5
"""Of the server's end for a SuperLink that does not answer, with pauses of 1, 2, 4 and 8 s."""


def poll_often(poll_s: float) -> None:
    """Shorten the pauses of the SuperNode in this process, which are 3 s when idle and 0.5 s while a client works.

    They are constants in its loop, so the module's name ``time``, of which it uses nothing but ``sleep``, is replaced.
    """
    cast(Any, start_client_internal).time = SimpleNamespace(sleep=lambda seconds: time.sleep(min(seconds, poll_s)))


@dataclass(frozen=True, slots=True)
class RuntimeApi:
    """Where tasks come from.

    Attributes:
        address: ``host:port`` on the loopback interface, so without TLS.
        secret: Shared with whoever started the SuperLink or SuperNode with ``--superexec-auth-secret-file``. Without it
            any local user could take the task, and the token that comes with it.
    """

    address: str
    secret: bytes

    @contextmanager
    def tasks(self, task_type: TaskType) -> Iterator[Callable[[], str | None]]:
        """A function that takes the next task and returns its token, ``None`` when there is none."""
        client = _client(
            self.address,
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
        address, RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"), RuntimeTokenHttpInterceptor(token)
    )
    with _heartbeat(client):
        try:
            message, context, _, _ = pull_task_input(client)  # the bundle comes along and is not looked at
        except Exception as error:
            push_task_output(client, None, SubStatus.FAILED, failure_reason(error))
            raise
        yield ClientTask(client, message, context)


class ClientTask:
    """One message for the ClientApp."""

    def __init__(self, client: RuntimeHttpClient, message: Message, context: Context) -> None:
        self.message = message
        self.context = context
        self._client = client

    def finish(self, reply: Message) -> None:
        """Send the reply, with the client's state, to the SuperNode."""
        push_message(self._client, reply, self.context)
        push_task_output(self._client, self.context, SubStatus.COMPLETED, "")

    def fail(self, reason: str) -> None:
        """Send an error reply."""
        error = Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=reason)
        push_message(self._client, Message(error, reply_to=self.message), self.context)
        push_task_output(self._client, None, SubStatus.FAILED, reason)


@contextmanager
def server_task(address: str, token: str) -> Iterator[tuple[Grid, Context]]:
    """Play the ServerApp's process in this one: grid and context of the run, whose end Flower learns."""
    grid = HttpGrid(address, insecure=True, token=token)
    grid._retry_invoker.max_tries = MAX_TRIES  # it would retry for ever
    client = grid._runtime_client
    with _heartbeat(client):
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
            try:
                client.PushTaskOutput(output)
            except (httpx.HTTPError, RunNotRunningException) as error:
                log.warning("the SuperLink was not told how the run ended: %s", error)


@contextmanager
def _heartbeat(client: RuntimeHttpClient) -> Iterator[None]:
    sender = HeartbeatSender(make_task_heartbeat_fn_http(client))
    sender.start()
    try:
        yield
    finally:
        if sender.is_running:
            sender.stop()
        client.close()


def _client(address: str, *interceptors: Any) -> RuntimeHttpClient:
    return RuntimeHttpClient.from_server_address(
        server_address=address,
        insecure=True,
        root_certificates=None,
        interceptors=list(interceptors),
        retry_invoker=make_simple_http_retry_invoker(),
    )
