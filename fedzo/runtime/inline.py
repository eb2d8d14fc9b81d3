"""All clients in this process, one after another, on one copy of the model: the default runtime."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedzo.runtime import _flower


class InlineGrid(Grid):
    """A Flower grid whose nodes are function calls: a pushed message is handled when its reply is pulled.

    Node ids are the client indices plus 2, so nothing about a run is random.
    """

    def __init__(self, client_app: ClientApp, *, num_clients: int, run_config: dict[str, str]) -> None:
        self._client_app = client_app
        self._run = _flower.new_run()
        self._contexts = {
            client + 2: Context(
                run_id=self._run.run_id,
                node_id=client + 2,
                node_config={"partition-id": client, "num-partitions": num_clients},
                state=RecordDict(),
                run_config=dict(run_config),
            )
            for client in range(num_clients)
        }
        self._pending: dict[str, Message] = {}

    @property
    def run(self) -> Any:
        """Flower's record of this run."""
        return self._run

    def set_run(self, run: Any) -> None:
        """Flower's record of this run."""
        self._run = run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Deprecated in Flower; kept since ``Grid`` asks for it."""
        return Message(content, dst_node_id=dst_node_id, message_type=message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """All clients, always connected."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take messages; nothing is computed yet."""
        ids = []
        for message in messages:
            message_id = _flower.identify(message)
            self._pending[message_id] = _flower.copy_of(message)
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Handle the next pending message among ``message_ids`` and return its reply: one a call, so the server stays live."""
        for message_id in message_ids:
            if message_id in self._pending:
                return [self._handle(self._pending.pop(message_id))]
        return []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push, and pull all replies; nothing here can time out."""
        ids = list(self.push_messages(messages))
        return [reply for message_id in ids for reply in self.pull_messages([message_id])]

    def _handle(self, message: Message) -> Message:
        context = self._contexts[message.metadata.dst_node_id]
        try:
            reply = self._client_app(message=message, context=context)
        except Exception as error:  # as Flower's own engines do: a failing client is an error reply
            reply = _flower.error_reply(message, error)
        _flower.identify(reply)
        return reply


def run_inline(server_app: ServerApp, client_app: ClientApp, *, num_clients: int, run_config: dict[str, str]) -> None:
    """Run a federation in this process; what the ServerApp raises reaches the caller."""
    grid = InlineGrid(client_app, num_clients=num_clients, run_config=run_config)
    context = Context(
        run_id=grid.run.run_id, node_id=_flower.SERVER_NODE_ID, node_config={}, state=RecordDict(), run_config=dict(run_config)
    )
    with _flower.one_run_a_process():
        server_app(grid=grid, context=context)
