"""The private names of Flower that the runtimes need, in one place. Pinned: flwr 1.41 (``tests/unit/runtime`` checks them)."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

from flwr.app import Error, Message, RecordDict
from flwr.app.message.message import make_message
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

SERVER_NODE_ID = SUPERLINK_NODE_ID
_busy = threading.Lock()


def new_run() -> Any:
    """A run record with a fresh id; the process takes on the identity of its server task."""
    run = Run.create_empty(run_id=secrets.randbits(62))
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run.run_id, SERVER_NODE_ID
    return run


def identify(message: Message) -> str:
    """Give a message an id, as Flower's grid does when it is sent."""
    message.metadata.__dict__["_message_id"] = str(uuid4())
    return message.metadata.message_id


def copy_of(message: Message) -> Message:
    """The message with record containers of its own, so that no side sees the other's changes."""
    content = RecordDict({name: type(record)(dict(record)) for name, record in message.content.items()})
    return make_message(metadata=message.metadata, content=content)


def error_reply(message: Message, error: Exception) -> Message:
    """The reply of a client that raised."""
    reason = f"{type(error).__name__}: {error}"
    return Message(Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=reason), reply_to=message)


@contextmanager
def one_run_a_process() -> Iterator[None]:
    """Flower keeps the running task's identity in globals, so a process runs one federation at a time."""
    if not _busy.acquire(blocking=False):
        raise RuntimeError("one federation runs in this process already; use a process for each")
    try:
        yield
    finally:
        _busy.release()
