"""Private names of Flower that every runtime needs, and the proof that this is the Flower they were read in.

All private names of flwr that fedzo uses stand here and in ``fedzo.runtime.net._flower_*`` (apart, because importing
those takes two seconds). ``tests/unit/runtime/test_flower_contract.py`` fails when one of them is gone or has changed.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import flwr

from fedzo.errors import ConfigError

SUPPORTED = ("1.41.", "1.42.")


def check_version(version: str) -> None:
    """Refuse a Flower whose private names nobody has looked at.

    Raises:
        ConfigError: it is not a 1.41 or 1.42.
    """
    if not version.startswith(SUPPORTED):
        raise ConfigError(
            f"flwr: fedzo's runtimes need version {' or '.join(f'{each}*' for each in SUPPORTED)}, got {version}. "
            "Install it with: pip install 'flwr>=1.41,<1.43'"
        )


check_version(flwr.__version__)  # before the names that another may not have

from flwr.app import Message  # noqa: E402
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode  # noqa: E402
from flwr.supercore import telemetry  # noqa: E402
from flwr.supercore.task_identity import TaskIdentity  # noqa: E402

ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""For every process: no word to anyone, and nothing installed because a bundle asks for it."""

__all__ = [
    "ENVIRONMENT",
    "SUPERLINK_NODE_ID",
    "ErrorCode",
    "TaskIdentity",
    "check_version",
    "failure_reason",
    "one_federation",
    "quiet_flower",
    "set_message_id",
]


os.environ.update(ENVIRONMENT)
telemetry.FLWR_TELEMETRY_ENABLED = "0"  # it has read the environment already
for _chatty in ("alembic", "httpx"):  # the one reports its plugins, the other every request
    logging.getLogger(_chatty).setLevel(logging.WARNING)

_busy = threading.Lock()


@contextmanager
def one_federation(run_id: int | None = None) -> Iterator[None]:
    """Hold this process's one Flower identity, which the constructor of messages reads from a global.

    Args:
        run_id: Set the server's identity for this run; ``None`` where the runtime does it itself.

    Raises:
        ConfigError: another federation runs in this process.
    """
    if not _busy.acquire(blocking=False):
        raise ConfigError(
            "runtime: one federation at a time must run in a process, but another is under way in this one. "
            "Start each in a process of its own (a sweep: hydra/launcher=joblib)."
        )
    try:
        if run_id is not None:
            TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run_id, SUPERLINK_NODE_ID
        yield
    finally:
        _busy.release()


@contextmanager
def quiet_flower() -> Iterator[None]:
    """Let Flower say only what went wrong: fedzo reports the run itself."""
    log = logging.getLogger("flwr")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def set_message_id(message: Any, message_id: str) -> None:
    """Number a message, which Flower does when it accepts one."""
    message.metadata.__dict__["_message_id"] = message_id


def failure_reason(error: BaseException) -> str:
    """An exception as the text of an error reply, in Flower's own form."""
    return f"{type(error)}:<'{error}'>"


class OnThisMachine:
    """What ``fedzo.fl.exchange.Grid`` asks of a network, where there is none."""

    def registered(self, clients: set[int]) -> set[int]:
        """All of them: nobody leaves for good."""
        return clients

    def wire_bytes(self) -> None:
        """What goes between processes of one machine is not counted."""

    def restarts(self) -> int:
        """What carries the messages is not started again where it ends."""
        return 0

    def lost(self, reply: Message) -> bool:
        """Never."""
        return False

    def unreachable(self, reply: Message) -> bool:
        """Never."""
        return False

    def limit_replies(self, number_bytes: int) -> None:
        """Replies are made on this machine, by what its user runs: nothing is limited."""
