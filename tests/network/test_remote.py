"""A federation of sites as its people run it: all commands of a server and of two sites, and who does not belong."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.control_pb2 import ListRunsRequest
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
    UnregisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

import fedzo
from fedzo.commands.replay import replay_run
from fedzo.runtime.net import launch
from fedzo.runtime.net.addresses import free_ports
from fedzo.runtime.net.client_folder import KEY, ClientFolder
from fedzo.runtime.net.credentials import fingerprint, pem_of
from fedzo.runtime.net.server_folder import ServerFolder
from fedzo.testing.tiny_models import save_tiny_model

pytestmark = [pytest.mark.net, pytest.mark.timeout(900)]
FEDZO = [sys.executable, "-m", "fedzo"]


class Machine:
    """What people type, in one folder; services are ended when it is left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.services: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *command: str) -> None:
        listens = partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)  # the tests may have been started with nohup
        with (self.folder / f"{name}.txt").open("wb") as out:
            self.services[name] = subprocess.Popen(
                [*FEDZO, *command], cwd=self.folder, stdout=out, stderr=subprocess.STDOUT, preexec_fn=listens
            )

    def said(self, name: str) -> str:
        return (self.folder / f"{name}.txt").read_text()

    def end(self, *names: str) -> list[int]:
        """Tell all of these to end; their exit codes."""
        for name in names:
            self.services[name].terminate()
        return [self.services[name].wait(120) for name in names]

    def end_all(self) -> None:
        """End what is still there; what does not end is killed, so that it disturbs no other test."""
        for service in self.services.values():
            service.terminate()
        stuck = []
        for name, service in self.services.items():
            try:
                service.wait(120)
            except subprocess.TimeoutExpired:
                service.kill()
                stuck.append(name)
        assert not stuck, "these did not end within 120 s of being told to"

    def call(self, *command: str, status: int = 0) -> str:
        done = subprocess.run(
            [*FEDZO, *command], cwd=self.folder, capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path)
    try:
        yield made
    finally:
        made.end_all()


def test_a_server_and_two_sites_train_stop_resume_and_let_nobody_in(
    machine: Machine, wait_for: Callable[..., None]
) -> None:
    public, control = (str(port) for port in free_ports(2))
    save_tiny_model(machine.folder / "model", "llama")

    # --- the server's and the sites' folders; a command that is repeated does no harm
    init = ["server", "init", "server", "--host", "localhost", "--port", public, "--control-port", control]
    first = machine.call(*init)
    assert "certificate for localhost, 127.0.0.1, valid for 365 days" in first
    assert machine.call(*init) == first
    add = ["server", "add-client", "hospital", "--index", "0", "--dir", "server"]
    assert machine.call(*add) == machine.call(*add)
    machine.call("client", "init", "hospital", "--invitation", "server/invitations/hospital.json")
    for name in ("clinic", "stranger"):
        machine.call("client", "init", name, "--server", f"localhost:{public}", "--ca", "server/ca.crt")
    machine.call("server", "add-client", "clinic", "--index", "1", "--key", "clinic/key.pub", "--dir", "server")
    second = ["server", "add-client", "x", "--index", "1", "--key", "stranger/key.pub", "--dir", "server"]
    taken = machine.call(*second, status=2)
    assert "client x: its index must be its own, but client clinic has it (index 1)" in taken
    for site, count in (("hospital", 12), ("clinic", 9), ("stranger", 9)):
        write_site(machine.folder / site, count)

    # --- before the SuperLink is up, a run is refused at once
    settings = [
        "experiment=[tiny,sites]", "runtime=remote", "runtime.server=server", "model=./model", "task=custom",
        "task.template='Text: {text} Verdict:'", "task.candidates=[' bad',' good']", "fl.batch_size=2",
        "trainer.calibration_docs=4", "trainer.calibration_tokens=16", "trainer.density=0.05", "report=default",
        "fl.rounds=100000", "strategy.deadline_s=60",
    ]  # fmt: skip
    down = machine.call("train", *settings, "hydra.run.dir=early", status=2)
    assert f"its SuperLink must be up, but nobody listens at 127.0.0.1:{control}" in down

    # --- up; those who do not belong are named and nothing happens to them
    machine.start("up", "server", "up", "server")
    wait_for(lambda: "2 clients are registered" in machine.said("up"))
    outsiders_reach_nothing(machine.folder / "server", machine.folder / "clinic", int(public), int(control))
    for site in ("hospital", "clinic", "stranger"):
        machine.start(site, "client", "up", site)
    wait_for(lambda: all("connected to" in machine.said(site) for site in ("hospital", "clinic")))
    key = fingerprint(pem_of(ClientFolder(machine.folder / "stranger").public_key))
    unknown = f"a node with the key {key} at 127.0.0.1: its key is not registered here"
    wait_for(lambda: unknown in machine.said("up"))
    for folder in ("server", "hospital"):
        assert "BAD" not in machine.call("doctor", folder)
    assert "connected to" not in machine.said("stranger")
    shutil.copytree(machine.folder / "clinic", machine.folder / "twin")
    machine.start("twin", "client", "up", "twin")
    twice = "client clinic at 127.0.0.1: another node with its key is connected"
    wait_for(lambda: twice in machine.said("up"))
    for site in ("stranger", "twin"):
        wait_for(lambda site=site: "the server refused" in machine.said(site))
    assert machine.end("stranger", "twin") == [0, 0]

    # --- a run goes on when its terminal closes, is seen from outside, and is ended between two rounds
    machine.start("train", "train", *settings, "hydra.run.dir=run")
    log = machine.folder / "run" / "public.jsonl"

    def rounds() -> list[dict[str, Any]]:
        text = log.read_text() if log.exists() else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    wait_for(lambda: len(rounds()) >= 3)
    machine.services["train"].send_signal(signal.SIGHUP)
    assert machine.services["train"].wait(120) == 0
    status = machine.call("status", "server")
    assert re.search(r"run \S*/run: \d+ of 100000 rounds, .*, running", status)
    ready = r"0 +hospital +ready \(model loaded\) +\S+ s ago +\d+ +"
    assert re.search(ready + re.escape(fedzo.__version__), status)
    assert "one run at a time" in machine.call("train", *settings, "hydra.run.dir=other", status=2)
    assert "Continue with: fedzo resume run" in machine.call("stop", "run")
    stopped = len(rounds())
    assert "There is nothing to stop" in machine.call("stop", "run", status=1)

    # --- while it goes on, the certificate is renewed and the SuperLink killed: both sites stay in it
    machine.start("resume", "resume", "run")
    machine.call("server", "renew", "--dir", "server", "--days", "30")
    wait_for(lambda: days_of_certificate(machine.folder / "server", int(public)) <= 30)
    wait_for(lambda: len(rounds()) > stopped)
    (superlink,) = pids("daemons superlink", machine)
    os.kill(superlink, signal.SIGKILL)
    killed = len(rounds())
    wait_for(lambda: len(rounds()) > killed + 2)
    assert [line["attendance"] for line in rounds()[killed:]] == [[0, 1]] * len(rounds()[killed:])

    # --- who does not belong comes again in the middle of it, is named again, and costs nobody a round
    told, came = machine.said("up"), len(rounds())
    for site in ("stranger", "twin"):
        machine.start(site, "client", "up", site)
    for words in (unknown, twice):
        wait_for(lambda words=words: machine.said("up").count(words) > told.count(words))
    for site in ("stranger", "twin"):
        wait_for(lambda site=site: "the server refused" in machine.said(site))
        assert "connected to" not in machine.said(site)
    wait_for(lambda: len(rounds()) > came + 3)
    assert machine.end("stranger", "twin") == [0, 0]
    assert [line["attendance"] for line in rounds()[came:]] == [[0, 1]] * len(rounds()[came:])

    # --- a key is revoked: its site is out, and the run goes on without it until it is stopped
    machine.call("server", "remove-client", "clinic", "--dir", "server")
    wait_for(lambda: rounds()[-1]["attendance"] == [0])
    alone = len(rounds())
    wait_for(lambda: len(rounds()) > alone + 2)
    assert "Continue with: fedzo resume run" in machine.call("stop", "run")
    assert machine.services["resume"].wait(120) == 130
    assert [line["attendance"] for line in rounds()[alone:]] == [[0]] * len(rounds()[alone:])
    assert "client clinic" not in machine.said("up").split("revoked")[-1]
    assert machine.end("hospital", "clinic") == [0, 0]
    assert machine.end("up") == [0]
    assert replay_run(machine.folder / "run")["rounds"] == len(rounds())


def write_site(folder: Path, count: int) -> None:
    rows = [{"text": f"{folder.name} item {i} is {['bad', 'good'][i % 2]}", "label": i % 2} for i in range(count)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    site = {"device": "cpu", "threads": 1, "model": {"name": "../model"}, "data": {"path": "./rows.jsonl"}}
    (folder / "site.yaml").write_text(json.dumps(site))


def outsiders_reach_nothing(server: Path, clinic: Path, port: int, control: int) -> None:
    """Whoever reaches the port for sites, even with the certificate authority, gets no task, log, run or control."""
    context = ssl.create_default_context(cafile=str(server / "ca.crt"))
    requests: Mapping[str, bytes] = {
        "/v1/runtime/acquire-task": AcquireTaskRequest(supported_task_types=["flwr-serverapp"]).SerializeToString(),
        "/v1/control/list-runs": ListRunsRequest().SerializeToString(),
        "/v1/control/stream-logs": b"",
        "/v1/control/start-run": b"",
        "/v1/control/register-node": b"",
        "/docs": b"",
        "/health": b"",
    }
    # from another address than the site that is to be named: the gate tells of few strangers of an address a minute
    transport = httpx.HTTPTransport(verify=context, local_address="127.0.0.2")
    with httpx.Client(transport=transport, base_url=f"https://localhost:{port}") as client:
        for path, body in requests.items():
            assert client.post(path, content=body).status_code == 404, path
        no_node_gets_anything(client, ServerFolder(server), ClientFolder(clinic))
    headers = {"content-type": "application/protobuf"}
    with httpx.Client(verify=context) as client:  # nor does a local user without the server's secret get a task
        task = f"https://localhost:{control}/v1/runtime/acquire-task"
        assert client.post(task, content=requests["/v1/runtime/acquire-task"], headers=headers).status_code == 401
    for each in (port, control):
        with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):  # without TLS nobody answers: it hangs up
            httpx.get(f"http://localhost:{each}/")
    with pytest.raises(httpx.ConnectError, match="certificate verify failed"):  # its authority is no public one
        httpx.get(f"https://localhost:{port}/")


def no_node_gets_anything(client: httpx.Client, server: ServerFolder, clinic: ClientFolder) -> None:
    """Who names no key, an unknown one, a client's that he cannot sign with, or his own and another client's node."""
    key, registered = ec.generate_private_key(ec.SECP384R1()), server.registry.by_key()
    with launch.control(server.endpoint) as flower:
        nodes = {registered[node.public_key].name: node for node in flower.nodes()}
    hospital, unknown = nodes["hospital"], signed(key)
    forged = unknown | {FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(hospital.public_key).decode("ascii")}
    neighbour = signed(serialization.load_ssh_private_key(clinic.file(KEY).read_bytes(), None))

    def ask(path: str, request: Any, named: Mapping[str, str]) -> httpx.Response:
        headers = {"content-type": "application/protobuf", **named}
        return client.post(f"/v1/fleet/{path}", content=request.SerializeToString(), headers=headers)

    for path, request in fleet_requests(hospital.node_id, hospital.public_key).items():
        for named in ({}, forged, neighbour):
            answer = ask(path, request, named)
            assert answer.status_code == 401, (path, named, answer.text)
    for path, request in fleet_requests(1, public_key_to_bytes(key.public_key())).items():
        answer, expected = ask(path, request, unknown), 412 if path in ("activate-node", "register-node") else 401
        assert answer.status_code == expected, (path, answer.text)
    own = PullMessagesRequest(node=Node(node_id=nodes["clinic"].node_id))
    assert ask("pull-messages", own, neighbour).status_code == 200  # its key is sound: the node was another's


def fleet_requests(node_id: int, public_key: bytes) -> dict[str, Any]:
    """All that a node can ask a SuperLink for, by path."""
    node, some = Node(node_id=node_id), "0" * 64
    return {
        "activate-node": ActivateNodeRequest(public_key=public_key),
        "register-node": RegisterNodeFleetRequest(public_key=public_key),
        "deactivate-node": DeactivateNodeRequest(node_id=node_id),
        "unregister-node": UnregisterNodeFleetRequest(node_id=node_id),
        "send-node-heartbeat": SendNodeHeartbeatRequest(node=node),
        "pull-messages": PullMessagesRequest(node=node),
        "push-messages": PushMessagesRequest(node=node),
        "pull-object": PullObjectRequest(node=node, run_id=1, object_id=some),  # what artifacts come by
        "push-object": PushObjectRequest(node=node, run_id=1, object_id=some, object_content=b"0"),
        "confirm-message-received": ConfirmMessageReceivedRequest(node=node, run_id=1, message_object_id=some),
        "get-run": GetRunRequest(node=node, run_id=1),
        "get-fab": GetFabRequest(node=node, run_id=1, hash_str=some),
    }


def signed(key: ec.EllipticCurvePrivateKey) -> dict[str, str]:
    """The headers by which a node says who it is."""
    request: Any = SimpleNamespace(request=httpx.Request("POST", "https://localhost/"))
    NodeAuthHttpInterceptor(key, key.public_key()).intercept(request, lambda _: httpx.Response(200))
    return {name: value for name, value in request.request.headers.items() if name.startswith("flwr-")}


def days_of_certificate(server: Path, port: int) -> float:
    context = ssl.create_default_context(cafile=str(server / "ca.crt"))
    raw = socket.create_connection(("localhost", port))
    with context.wrap_socket(raw, server_hostname="localhost") as secured:
        certificate = secured.getpeercert()
    assert certificate
    return (ssl.cert_time_to_seconds(str(certificate["notAfter"])) - time.time()) / 86400


def pids(words: str, machine: Machine) -> list[int]:
    children = psutil.Process(machine.services["up"].pid).children(recursive=True)
    return [child.pid for child in children if words in " ".join(child.cmdline())]
