"""The server's end of Flower's messages, which waits for nobody and outlives a SuperLink that is started again."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import httpx
from flwr.app import Array, Context, Error, Message
from flwr.app.message.message import make_message
from flwr.app.metadata import Metadata
from flwr.common.constant import SubStatus
from flwr.common.serde import context_from_proto, run_from_proto
from flwr.common.serde_utils import metadata_from_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullTaskInputRequest, PushTaskOutputRequest
from flwr.supercore.constant import OBJECT_PUSH_SESSION_TTL_SECONDS
from flwr.supercore.inflatable.inflatable_object import get_object_type_from_object_content, iterate_object_tree
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    ObjectUnavailableError,
    inflate_object_from_contents,
)
from flwr.supercore.run import Run
from flwr.superlink.grid import HttpGrid

from fedzo.fl.exchange import message_bytes
from fedzo.runtime._flower import ErrorCode, TaskIdentity, failure_reason
from fedzo.runtime.net._flower_http import RunNotRunningException, TaskOver, be_patient, kept_alive

__all__ = ["ServerGrid", "server_task"]
log = logging.getLogger(__name__)
MAX_TIME_S = 120.0
"""How long the server's end tries to reach a SuperLink that does not answer, which is started again meanwhile."""
SMALL_REPLY_BYTES = 16 << 20
"""A reply may have so many bytes beside the numbers of a round: two JSON texts of at most 4 MiB, names and hashes."""
GROWING = Array.__qualname__
"""What no reply of a client has, and may name its chunks any number of times, each of which takes memory."""
TAKE_S = 5.0
"""How long one look takes parts, before the deadline and other replies have their turn."""


class _Unreadable(Exception):
    """A reply that nobody can read, or that is too long; its text says which."""


@dataclass(slots=True)
class _Arriving:
    """A reply whose parts come one by one, each named by its hash.

    Attributes:
        told: What the SuperLink says of it. What the reply says of itself is its client's word.
        missing: Names of the parts that have not come.
        parts: Those that have.
        num_bytes: Of these together.
        since: When the last part came, or the reply was told of, by ``time.monotonic``.
    """

    told: Metadata
    missing: list[str]
    parts: dict[str, bytes] = field(default_factory=dict)
    num_bytes: int = 0
    since: float = 0.0


class ServerGrid(HttpGrid):
    """Flower's grid, which would wait for the parts of a reply, up to two hours, and die of a part that is sent twice.

    Here a reply is there when all of its parts are; until then the others are heard, and the deadline runs.
    """

    def __init__(self, address: str, *, root_certificates: bytes, token: str) -> None:
        super().__init__(address, root_certificates=root_certificates, token=token)
        self._arriving: dict[str, _Arriving] = {}
        self._max_bytes = SMALL_REPLY_BYTES

    def limit_replies(self, number_bytes: int) -> None:
        """Expect at most so many bytes of numbers in a reply; a longer one is an error of its client."""
        self._max_bytes = SMALL_REPLY_BYTES + number_bytes

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The whole replies to these messages."""
        asked, now = set(message_ids), time.monotonic()
        told = {
            reply.told.reply_to_message_id for reply in self._arriving.values()
        }  # which the SuperLink has forgotten
        if asked - told:
            self._look(asked - told, now)
        whole = []
        # by how long each waits for a part: one that used up this look is last in the next
        for name, reply in sorted(self._arriving.items(), key=lambda each: each[1].since):
            if reply.told.reply_to_message_id in asked and (message := self._take(name, reply, now)):
                whole.append(message)
            elif now - reply.since > OBJECT_PUSH_SESSION_TTL_SECONDS:  # the SuperLink gives it up, too
                self._arriving.pop(name, None)  # which may just have been told
        return whole

    def _look(self, message_ids: set[str], now: float) -> None:
        """Hear of new replies."""
        response = self._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=message_ids))
        for message, tree in zip(response.messages_list, response.message_object_trees, strict=True):
            parts = list(dict.fromkeys(part.object_id for part in iterate_object_tree(tree)))
            told = metadata_from_proto(message.metadata)
            self._arriving[told.message_id] = _Arriving(told, parts, since=now)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; the names by which their replies are asked for."""
        sent = list(messages)
        try:
            return super().push_messages(sent)
        except ObjectPushError as error:
            log.warning("messages are sent again: %s", error)
            return super().push_messages(sent)  # of the same names: what has arrived is not sent twice

    def _take(self, name: str, reply: _Arriving, now: float) -> Message | None:
        """The reply, once all of its parts are there; an error in its place where it is none."""
        try:
            message = self._open(name, reply) if self._take_parts(name, reply, now) else None
        except _Unreadable as error:
            message = make_message(metadata=reply.told, error=Error(ErrorCode.UNKNOWN, str(error)))
        if message is not None:
            del self._arriving[name]
            self._runtime_client.ConfirmMessageReceived(
                ConfirmMessageReceivedRequest(node=self.node, run_id=self._run_id, message_object_id=name)
            )
        return message

    def _take_parts(self, name: str, reply: _Arriving, now: float) -> bool:
        """Take the parts that are there; whether these were the last."""
        pull = make_pull_object_fn_protobuf(self._runtime_client.PullObject, self.node, self._run_id)
        try:
            while reply.missing:
                if time.monotonic() - now > TAKE_S:
                    return False
                reply.parts[reply.missing[-1]] = part = pull(reply.missing[-1])
                reply.missing.pop()
                reply.since = time.monotonic()
                reply.num_bytes += len(part)
                if reply.num_bytes > self._max_bytes:
                    raise _Unreadable(self._too_long)
        except ObjectUnavailableError:
            return False
        except ObjectPullError as error:
            log.warning("a reply is lost: %s", error)
            del self._arriving[name]
            return False
        return True

    @property
    def _too_long(self) -> str:
        return f"its reply must have at most {self._max_bytes} bytes, got more"

    @property
    def _run_id(self) -> int:
        return cast(Run, self._run).run_id

    def _open(self, name: str, reply: _Arriving) -> Message:
        try:
            if any(get_object_type_from_object_content(part) == GROWING for part in reply.parts.values()):
                raise TypeError(f"a part that is an {GROWING}")
            message = inflate_object_from_contents(name, reply.parts)
            if not isinstance(message, Message):
                raise TypeError(type(message).__name__)
            # a record counts each time that the reply names it
            if not message.has_error() and message_bytes(message.content) > self._max_bytes:
                raise _Unreadable(self._too_long)
        except _Unreadable:
            raise
        except Exception as error:  # the SuperLink looks into no part: these are whatever bytes a client sent
            raise _Unreadable(
                f"its reply must be a message of Flower, got bytes that are none ({error!r:.80})"
            ) from error
        if message.has_error():
            return make_message(metadata=reply.told, error=message.error)
        return make_message(metadata=reply.told, content=message.content)


@contextmanager
def server_task(grid: ServerGrid, *, not_taken: Callable[[], None]) -> Iterator[Context]:
    """Play the ServerApp's process in this one: the context of the run, whose end Flower learns.

    Args:
        grid: With the token of the run's task.
        not_taken: Called each time that the SuperLink does not take a request, which is then made again.
    """
    retry, over = be_patient(grid._retry_invoker), threading.Event()

    def wait(seconds: float) -> None:
        not_taken()
        log.warning("retrying a request to the SuperLink in %.1f s", seconds)
        over.wait(seconds)

    retry.max_time, retry.wait_function = MAX_TIME_S, wait  # Flower would retry for ever, and wait whatever ends
    client = grid._runtime_client
    client._interceptors += (TaskOver(),)
    with kept_alive(client) as fall_silent:
        task = client.PullTaskInput(PullTaskInputRequest())
        run, context = run_from_proto(task.run), context_from_proto(task.context)
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = task.task_id, run.run_id, context.node_id
        grid.set_run(run)
        output = PushTaskOutputRequest(sub_status=SubStatus.FAILED, details="stopped")
        try:
            yield context
            output = PushTaskOutputRequest(sub_status=SubStatus.COMPLETED, details="")
        except Exception as error:
            output = PushTaskOutputRequest(sub_status=SubStatus.FAILED, details=failure_reason(error))
            raise
        finally:
            retry.max_time = 0.0  # the SuperLink may be what failed: who asks it again, such as the heartbeat, gives up
            over.set()
            fall_silent()
            try:
                client.PushTaskOutput(output)
            except (httpx.HTTPError, RunNotRunningException) as error:
                log.warning("the SuperLink was not told how the run ended: %s", error)
