"""A federation in one process: every client answers here, one after another, on one copy of the model."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedzo.errors import FedzoError
from fedzo.runtime._flower import (
    SUPERLINK_NODE_ID,
    ErrorCode,
    OnThisMachine,
    failure_reason,
    one_federation,
    set_message_id,
)

log = logging.getLogger(__name__)
LookAhead = Callable[[list[tuple[Message, Context]]], None]
RUN_ID = 1
FIRST_NODE_ID = SUPERLINK_NODE_ID + 1


class InlineGrid(OnThisMachine):
    """A federation's grid (``fedzo.fl.exchange.Grid``) without a network.

    Node ids are fixed, one a client, and messages are answered in the order they were pushed, so two runs are alike.
    A message is worked on when its reply is pulled, one a call: between two clients the server can show progress and
    be interrupted.

    Args:
        client_app: Answers for every client.
        num_clients: Number of clients.
        run_config: Given to the app.
        look_ahead: Called with the messages that were pushed together, before the first of them is worked on.
            What it raises is logged, and each client then works alone.
    """

    def __init__(
        self,
        client_app: ClientApp,
        *,
        num_clients: int,
        run_config: Mapping[str, Any],
        look_ahead: LookAhead | None = None,
    ) -> None:
        self._client_app = client_app
        self._look_ahead = look_ahead
        self._unseen: list[tuple[Message, Context]] = []
        self._clients = {FIRST_NODE_ID + client: client for client in range(num_clients)}
        self._contexts = {
            node: Context(run_id=RUN_ID, node_id=node, node_config={}, state=RecordDict(), run_config=dict(run_config))
            for node in self._clients
        }
        self._pending: dict[str, Message] = {}
        self._numbers = itertools.count()

    def get_node_ids(self) -> list[int]:
        """Node ids by client index."""
        return list(self._clients)

    def client_of(self, node: int) -> int | None:
        """Index of the client that a node plays."""
        return self._clients.get(node)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Take messages; each is copied, so that neither side can see what the other does to it later."""
        pushed = []
        for message in messages:
            self._number(message)
            self._pending[message.metadata.message_id] = kept = copy.deepcopy(message)
            if self._look_ahead:
                self._unseen.append((kept, self._contexts[message.metadata.dst_node_id]))
            pushed.append(message.metadata.message_id)
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Let the client of the oldest of these messages answer; one reply, or none when nothing is pending."""
        if self._look_ahead and self._unseen:
            together, self._unseen = self._unseen, []
            try:
                self._look_ahead(together)
            except Exception as raised:  # then each answers for itself, and only those at fault fail
                # each client tells its own failure in full
                unforeseen = None if isinstance(raised, FedzoError) else raised
                log.warning("joint forwards failed; each client is evaluated alone", exc_info=unforeseen)
        wanted = set(message_ids)
        for message_id in self._pending:
            if message_id in wanted:
                return [self._answer(self._pending.pop(message_id))]
        return []

    def _answer(self, message: Message) -> Message:
        node_id = message.metadata.dst_node_id
        context = self._contexts[node_id]
        try:
            reply = self._client_app(message=message, context=context)
        except Exception as raised:  # a client's failure is a reply, as on every other runtime
            if not isinstance(raised, FedzoError):  # which the refusal of the reply tells in full
                log.warning("client %d failed", self._clients[node_id], exc_info=raised)
            error = Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=failure_reason(raised))
            reply = Message(error, reply_to=message)
        return copy.deepcopy(self._number(reply))

    def _number(self, message: Message) -> Message:
        set_message_id(message, f"inline-{next(self._numbers)}")
        return message


def run_inline(
    server_app: ServerApp,
    client_app: ClientApp,
    *,
    num_clients: int,
    run_config: Mapping[str, Any],
    look_ahead: LookAhead | None = None,
) -> None:
    """Run a federation in this process; what the server raises, this raises.

    Args:
        server_app: The server.
        client_app: Answers for every client.
        num_clients: Number of clients, indexed from 0.
        run_config: Given to both apps.
        look_ahead: As for ``InlineGrid``.

    Raises:
        ConfigError: another federation runs in this process.
    """
    with one_federation(RUN_ID):
        grid = InlineGrid(client_app, num_clients=num_clients, run_config=run_config, look_ahead=look_ahead)
        context = Context(
            run_id=RUN_ID, node_id=SUPERLINK_NODE_ID, node_config={}, state=RecordDict(), run_config=dict(run_config)
        )
        server_app(grid=cast(Grid, grid), context=context)
