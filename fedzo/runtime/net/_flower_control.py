"""Private names of Flower's Control API: who registers SuperNodes, and who starts and stops runs.

The open distribution of Flower asks nobody who he is there, so fedzo's SuperLinks answer it on loopback only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import Status
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.supercore.constant import NodeStatus
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.error import FlowerError
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from fedzo.errors import ProtocolError
from fedzo.runtime.net.credentials import Endpoint

__all__ = ["Control", "Node", "build_fab_from_files", "control"]


@dataclass(frozen=True, slots=True)
class Node:
    """A SuperNode as the SuperLink knows it.

    Attributes:
        node_id: Flower's number.
        public_key: PEM.
        online: Whether it is connected.
        online_until: Seconds since 1970 (UTC) at which it counts as gone if it is not heard of; 0 if it never was.
    """

    node_id: int
    public_key: bytes
    online: bool
    online_until: float


class Control:
    """What fedzo asks of the Control API."""

    def __init__(self, client: ControlHttpClient) -> None:
        self._client = client

    def nodes(self) -> list[Node]:
        """All SuperNodes whose keys are registered."""
        found = self._client.ListNodes(ListNodesRequest()).nodes_info
        return [
            Node(node.node_id, node.public_key, node.status == NodeStatus.ONLINE, node.online_until)
            for node in found
            if node.status != NodeStatus.UNREGISTERED
        ]

    def register(self, public_key: bytes, name: str) -> None:
        """Let the SuperNode with a key (PEM) in.

        Raises:
            ProtocolError: Flower does not take the key, for example since it was revoked before.
        """
        with _told(f"client {name}: the SuperLink must register its key"):
            self._client.RegisterNode(RegisterNodeRequest(public_key=public_key, name=name))

    def unregister(self, node_id: int) -> None:
        """Let a SuperNode in no more."""
        with _told(f"node {node_id}: the SuperLink must forget its key"):
            self._client.UnregisterNode(UnregisterNodeRequest(node_id=node_id))

    def start_run(self, bundle: bytes, run_config: Mapping[str, str]) -> int:
        """Submit a run; returns Flower's number of it."""
        with _told("the SuperLink must accept the run"):
            request = StartRunRequest(
                fab=fab_to_proto(Fab(hashlib.sha256(bundle).hexdigest(), bundle, {})),
                override_config=user_config_to_proto(dict(run_config)),
            )
            response = self._client.StartRun(request)
        if not response.HasField("run_id"):
            raise ProtocolError("the SuperLink must accept the run, but gave it no number.")
        return int(response.run_id)

    def stop_run(self, run_id: int) -> None:
        """End a run that nobody serves any more; one that is over, or unknown, is left alone."""
        try:
            self._client.StopRun(StopRunRequest(run_id=run_id))
        except (FlowerError, httpx.HTTPStatusError):
            return

    def running(self) -> list[int]:
        """Numbers of the runs that are not over."""
        runs = self._client.ListRuns(ListRunsRequest()).run_dict
        return [run_id for run_id, run in runs.items() if run.status.status != Status.FINISHED]


@contextmanager
def control(server: Endpoint) -> Iterator[Control]:
    """The Control API of a SuperLink on this machine.

    Raises:
        httpx.HTTPError: By its methods, where the SuperLink does not answer.
    """
    client = ControlHttpClient.from_server_address(
        server_address=server.address,
        insecure=False,
        root_certificates=server.authority.read_bytes(),
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
    )
    try:
        yield Control(client)
    finally:
        client.close()


@contextmanager
def _told(what: str) -> Iterator[None]:
    try:
        yield
    except httpx.HTTPStatusError as error:
        if error.response.is_server_error:  # as where its database is locked: it has not said no
            raise
        said = FlowerError.from_json(error.response.text)
        reason = said.message if said else f"status {error.response.status_code}"
        raise ProtocolError(f"{what}, but says: {reason}.") from error
