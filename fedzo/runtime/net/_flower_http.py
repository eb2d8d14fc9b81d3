"""Private names of Flower's network parts (slow to import), and the two protocols that fedzo speaks with them.

Both ends of a run get their work from a Runtime API: a SuperLink hands out the ServerApp task, a SuperNode one
ClientApp task a message. Whoever acquires a task receives its token, with which to pull its input and push its output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import httpx
from flwr.app import Context, Error, Message
from flwr.common.constant import HEARTBEAT_CALL_TIMEOUT, SubStatus
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
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
from flwr.supercore.retry import RetryInvoker, make_simple_http_retry_invoker
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from fedzo.runtime._flower import ErrorCode, failure_reason

__all__ = [
    "ClientTask",
    "RunNotRunningException",
    "RuntimeApi",
    "TaskOver",
    "TaskType",
    "be_patient",
    "client_task",
    "kept_alive",
]
_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
PULL_PAUSES = {"initial_backoff": 0.02, "backoff_cap": 1.0, "max_tries_per_object": None}
"""Seconds before a part of a message that is still under way is asked for again: doubled each time, to at most the cap.
Flower begins with 1 s and gives up after 500 times; here time alone counts, of which it gives two hours."""
WRONG_CERTIFICATE = "CERTIFICATE_VERIFY_FAILED"
"""OpenSSL's word for a certificate that has ended, or is not of the authority or the host."""

for _pull in (inflatable_utils.pull_objects, inflatable_utils.pull_and_inflate_object_from_tree):
    cast(Any, _pull).__kwdefaults__.update(PULL_PAUSES)
cast(Any, heartbeat).HEARTBEAT_DEFAULT_INTERVAL = HEARTBEAT_CALL_TIMEOUT + 14.0
"""Nodes and tasks say every 10 to 13 s that they live: Flower's sender pauses for 0.7 to 0.9 of this, less the time-out
of a call. Flower would wait 20 s, and a task is given up after 60 s: a SuperLink that is started again twice could miss
them all."""


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
        TaskOver(),
    )
    with kept_alive(client) as fall_silent:
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


class TaskOver:
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
def kept_alive(client: RuntimeHttpClient) -> Iterator[Callable[[], None]]:
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
        retry_invoker=be_patient(make_simple_http_retry_invoker()),
    )


def be_patient(retry: RetryInvoker) -> RetryInvoker:
    """Give up at once for a certificate that is not the server's, and for no other failure of a line.

    Flower does so wherever the error's words have "ssl" in them, such as of a handshake that was slow or broke off.
    """
    judge = retry.should_giveup

    def judge_patiently(error: Exception) -> bool:
        if isinstance(error, httpx.TransportError):
            return WRONG_CERTIFICATE in str(error)
        return judge is not None and judge(error)

    retry.should_giveup = judge_patiently
    return retry
