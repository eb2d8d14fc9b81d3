"""Private names of Flower: what fedzo takes for granted about them. Fails loudly when the pinned Flower changes."""

from __future__ import annotations

import ast
import contextlib
import datetime
import email.utils
import importlib
import inspect
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import flwr
import httpx
import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.common import constant
from flwr.common.constant import HEARTBEAT_CALL_TIMEOUT, HEARTBEAT_MIN_INTERVAL, HEARTBEAT_PATIENCE
from flwr.supercore import constant as supercore_constant

from fedzo.errors import ConfigError
from fedzo.fl.messages import Hello, encode
from fedzo.runtime import _flower
from fedzo.runtime.net.daemons import NODE_LEASE_S
from fedzo.runtime.net.gate import HOLD_S, MAX_WAIT_S, POLL, REPLY, SEND, URGENCY


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]


def test_flower_is_the_version_whose_private_names_were_read() -> None:
    assert flwr.__version__.startswith(("1.41.", "1.42."))


@pytest.mark.parametrize("version", ["1.40.9", "1.43.0", "1.410.0", "2.0"])
def test_another_flower_is_refused_with_the_command_that_installs_the_right_one(version: str) -> None:
    with pytest.raises(ConfigError, match=rf"1\.41\.\* or 1\.42\.\*, got {version}.*pip install 'flwr>=1\.41,<1\.43'"):
        _flower.check_version(version)


def test_another_flower_is_refused_before_its_private_names_are_missed(tmp_path: Path) -> None:
    (tmp_path / "flwr").mkdir()
    (tmp_path / "flwr" / "__init__.py").write_text('__version__ = "1.43.0"\n')

    done = subprocess.run(
        [sys.executable, "-c", "import fedzo.runtime._flower"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert "ConfigError: flwr: fedzo's runtimes need version 1.41.* or 1.42.*, got 1.43.0" in done.stderr


def test_message_takes_run_and_sender_from_the_identity_of_the_process() -> None:
    with _flower.one_federation(run_id=77):
        message = Message(RecordDict(), dst_node_id=5, message_type="query")

    assert (message.metadata.run_id, message.metadata.src_node_id) == (77, _flower.SUPERLINK_NODE_ID)


def test_message_can_be_numbered_and_its_reply_refers_to_the_number() -> None:
    with _flower.one_federation(run_id=77):
        message = Message(RecordDict(), dst_node_id=5, message_type="query")
        _flower.set_message_id(message, "abc")

    assert message.metadata.message_id == "abc"
    assert Message(RecordDict(), reply_to=message).metadata.reply_to_message_id == "abc"


def test_flower_says_nothing_to_the_outside() -> None:
    from flwr.supercore import telemetry

    assert telemetry.FLWR_TELEMETRY_ENABLED == "0"
    assert 'FLWR_TELEMETRY_ENABLED == "1"' in inspect.getsource(telemetry)


@pytest.mark.slow
def test_supernode_pauses_by_the_name_that_is_replaced() -> None:
    from flwr.supernode import start_client_internal

    tree = ast.parse(inspect.getsource(start_client_internal))
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "time"
    }
    assert used == {"sleep"}


@pytest.fixture
def flower_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is changed in Flower for a SuperNode is as it was at the end of a test."""
    from flwr.supercore.retry import http_retry
    from flwr.supernode import fleet_http_connection, node_auth_http_interceptor, start_client_internal

    for owner, name in (
        (node_auth_http_interceptor.NodeAuthHttpInterceptor, "intercept"),
        (start_client_internal, "time"),
        (start_client_internal, "_pull_and_store_message"),
        (fleet_http_connection, "HEARTBEAT_DEFAULT_INTERVAL"),
        (fleet_http_connection, "HeartbeatSender"),
        (fleet_http_connection, "make_simple_http_retry_invoker"),
        (http_retry, "_RETRYABLE_TRANSPORT_ERRORS"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))


@pytest.mark.slow
@pytest.mark.usefixtures("flower_is_put_back")
def test_supernode_pauses_shorter_once_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.supercore import heartbeat
    from flwr.supernode import fleet_http_connection, start_client_internal

    from fedzo.runtime.net import _flower_daemons

    slept: list[float] = []
    assert fleet_http_connection.HEARTBEAT_DEFAULT_INTERVAL == 30
    assert "HEARTBEAT_DEFAULT_INTERVAL" in inspect.getsource(fleet_http_connection)
    monkeypatch.setattr(_flower_daemons.time, "sleep", slept.append)

    _flower_daemons.quicken(0.1, lease_s=NODE_LEASE_S)
    for asked_s in (3, 0.5, 0.05):
        start_client_internal.time.sleep(asked_s)

    assert slept == [0.1, 0.1, 0.05]
    pauses = re.findall(r"time\.sleep\(([\d.]+)\)", inspect.getsource(start_client_internal))
    assert sorted(pauses) == ["0.5", "0.5", "3"]
    assert fleet_http_connection.HEARTBEAT_DEFAULT_INTERVAL * HEARTBEAT_PATIENCE == NODE_LEASE_S
    assert fleet_http_connection.HEARTBEAT_DEFAULT_INTERVAL >= HEARTBEAT_MIN_INTERVAL
    sender = inspect.getsource(heartbeat.HeartbeatSender._run)  # how long it pauses, at most
    assert "HEARTBEAT_DEFAULT_INTERVAL - HEARTBEAT_CALL_TIMEOUT" in sender
    longest = (heartbeat.HEARTBEAT_DEFAULT_INTERVAL - HEARTBEAT_CALL_TIMEOUT) * (0.8 + 0.1)
    assert 2 * longest < NODE_LEASE_S  # one may be late


UNREGISTERED = "the server refused: the key of this site is not registered there, or was revoked"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "ahead_s", "path", "date", "said"),
    [
        (401, 3600, "activate-node", "", ["the server refused: this machine's clock is 3600 s ahead of the server's"]),
        (401, -3600, "pull-messages", "", ["the server refused: this machine's clock is 3600 s behind the server's"]),
        (401, 0, "activate-node", "", [UNREGISTERED]),
        (401, 3600, "activate-node", "a proxy's own words", [UNREGISTERED]),
        (401, 0, "pull-messages", "", ["the server refused: it has started anew, or has revoked the key of this site"]),
        (200, 3600, "activate-node", "", []),
        (408, 0, "push-object", "", ["the server refused: a part of a reply took too long to arrive"]),
    ],
)
def test_a_supernode_that_is_not_let_in_says_why(
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    ahead_s: int,
    path: str,
    date: str,
    said: list[str],
) -> None:
    """Flower itself ends it without a word; what it signs is the time that the server looks at."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from flwr.supercore.retry import http_retry
    from flwr.supernode import node_auth_http_interceptor
    from flwr.supernode.fleet_http_client import FleetHttpClient

    from fedzo.runtime.net import _flower_daemons

    assert f'path="{_flower_daemons.ACTIVATE}"' in inspect.getsource(FleetHttpClient.ActivateNode)
    assert "codes.UNAUTHORIZED" in inspect.getsource(http_retry)
    right, key = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC), ec.generate_private_key(ec.SECP384R1())
    monkeypatch.setattr(node_auth_http_interceptor, "now", lambda: right + datetime.timedelta(seconds=ahead_s))
    signing = node_auth_http_interceptor.NodeAuthHttpInterceptor
    context: Any = SimpleNamespace(request=httpx.Request("POST", f"https://server/v1/fleet/{path}"))
    answer = httpx.Response(status, headers={"date": date or email.utils.format_datetime(right, usegmt=True)})

    told = _flower_daemons._telling(signing.intercept)(signing(key, key.public_key()), context, lambda _: answer)

    assert told is answer
    assert [record.getMessage().rpartition(". ")[0] for record in caplog.records] == said
    of_clocks = sum("clock is" in line for line in said)
    assert caplog.text.count("One of the two clocks is wrong: set that one.") == of_clocks


@pytest.mark.slow
def test_a_server_that_is_silent_is_told_of_once_and_again_when_it_answers(caplog: pytest.LogCaptureFixture) -> None:
    from fedzo.runtime.net import _flower_daemons

    refused, busy, good = httpx.ConnectError("[Errno 111] Connection refused"), httpx.Response(503), httpx.Response(200)
    answers = iter([refused, busy, refused, refused, httpx.Response(502), refused, good, good])  # 502: a proxy's own

    def intercept(self: object, context: object, call_next: object) -> httpx.Response:
        if isinstance(answer := next(answers), httpx.ConnectError):
            raise answer
        return answer

    telling = _flower_daemons._telling(intercept)
    for _ in range(8):
        with contextlib.suppress(httpx.ConnectError):
            telling(None, None, None)

    assert [record.getMessage() for record in caplog.records] == [
        "the server does not answer ([Errno 111] Connection refused)",
        "the server answers again",
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("flower_is_put_back")
def test_a_reply_that_a_proxy_does_not_pass_on_is_sent_again() -> None:
    from flwr.supercore.retry import http_retry

    from fedzo.runtime.net import _flower_daemons

    sent: list[str] = []

    def send() -> str:
        sent.append("a reply")
        if len(sent) < 3:
            raise httpx.ProxyError("503 Service Unavailable")
        return "taken"

    assert httpx.ProxyError not in http_retry._RETRYABLE_TRANSPORT_ERRORS  # which is added
    _flower_daemons.quicken(0.1, lease_s=NODE_LEASE_S)
    invoker = http_retry.make_simple_http_retry_invoker()
    invoker.wait_function = lambda seconds: None

    assert invoker.invoke(send) == "taken"
    assert len(sent) == 3


EXPIRED = "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: certificate has expired (_ssl.c:1006)"


@pytest.mark.slow
@pytest.mark.usefixtures("flower_is_put_back")
@pytest.mark.parametrize("answers", [False, True], ids=["silent", "hangs up"])
def test_what_a_handshake_lost_is_sent_again_and_what_no_certificate_vouches_for_is_not(answers: bool) -> None:
    """Flower gives all of it up, by a word that Python puts into the text of either error."""
    from flwr.supercore.retry import http_retry
    from flwr.supernode import fleet_http_connection, start_client_internal

    from fedzo.runtime.net import _flower_daemons

    def hang_up() -> None:
        line, _ = listener.accept()
        with line:
            line.recv(1 << 16)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"https://127.0.0.1:{listener.getsockname()[1]}"
        server = threading.Thread(target=hang_up, daemon=True)
        if answers:
            server.start()
        with pytest.raises(httpx.ConnectError if answers else httpx.ConnectTimeout) as met:
            httpx.get(url, timeout=10.0 if answers else 0.3, trust_env=False)
    lost, wrong = met.value, httpx.ConnectError(EXPIRED)
    judged = http_retry.make_simple_http_retry_invoker().should_giveup
    assert judged is not None
    assert judged(lost)
    assert judged(wrong)
    assert "= make_simple_http_retry_invoker()" in inspect.getsource(fleet_http_connection)
    told = inspect.getsource(start_client_internal)
    assert '"Failed to send message %s: %s"' in told  # which `fedzo client up` looks for
    assert '"Failed to receive message %s: %s"' in told

    _flower_daemons.quicken(0.1, lease_s=NODE_LEASE_S)
    patient = fleet_http_connection.make_simple_http_retry_invoker()
    errors, sent = [lost, httpx.WriteError("EOF occurred in violation of protocol (_ssl.c:2427)")], list[Exception]()

    def send() -> str:
        if errors:
            sent.append(errors.pop())
            raise sent[-1]
        return "taken"

    patient.wait_function = lambda seconds: None
    assert patient.invoke(send) == "taken"
    assert len(sent) == 2
    errors.append(wrong)
    with pytest.raises(httpx.ConnectError, match="certificate has expired"):
        patient.invoke(send)
    assert not errors  # it was tried once


def refusal(code: int) -> httpx.HTTPStatusError:
    request = httpx.Request("POST", "https://server/v1/fleet/send-node-heartbeat")
    return httpx.HTTPStatusError(f"status {code}", request=request, response=httpx.Response(code, request=request))


@pytest.mark.slow
@pytest.mark.usefixtures("flower_is_put_back")
@pytest.mark.parametrize(
    "failure",
    [refusal(429), refusal(500), RuntimeError("not recognized"), ValueError("Invalid protobuf response payload")],
    ids=["too many requests", "an error", "a node that is not known", "a page that is no answer"],
)
def test_a_node_says_again_that_it_lives_whatever_was_answered(failure: Exception) -> None:
    """Flower's own sender then says nothing more, and the node goes on asking for work that it never gets."""
    from flwr.supernode import fleet_http_connection

    from fedzo.runtime.net import _flower_daemons

    def beat() -> bool:
        beats.append("a beat")
        if len(beats) == 1:
            raise failure
        again.set()
        return True

    def refused() -> bool:
        raise refusal(401)

    assert "HeartbeatSender(send_node_heartbeat)" in inspect.getsource(fleet_http_connection)
    beats, again = list[str](), threading.Event()
    _flower_daemons.quicken(0.1, lease_s=NODE_LEASE_S)
    sender = fleet_http_connection.HeartbeatSender(beat)
    sender._retry_invoker.wait_function = lambda seconds: None

    sender.start()
    try:
        assert again.wait(10.0)
    finally:
        if sender.is_running:
            sender.stop()
    with pytest.raises(httpx.HTTPStatusError):  # Flower has asked the node to end
        _flower_daemons._persistent(refused)()


@pytest.mark.slow
def test_parts_under_way_are_asked_for_soon_and_a_message_of_a_run_that_ended_leaves_nothing() -> None:
    from flwr.supercore.inflatable import inflatable_utils
    from flwr.supercore.run import RunNotRunningException
    from flwr.supernode import start_client_internal

    from fedzo.runtime.net import _flower_daemons, _flower_http

    for pull in (inflatable_utils.pull_objects, inflatable_utils.pull_and_inflate_object_from_tree):
        defaults = {name: each.default for name, each in inspect.signature(pull).parameters.items()}
        assert _flower_http.PULL_PAUSES.items() <= defaults.items()
    assert {"state", "object_store", "receive"} <= set(parameters(start_client_internal._pull_and_store_message))
    assert not issubclass(RunNotRunningException, Exception)  # so Flower's own clean-up passes it by
    store, done = _Store(), SimpleNamespace(metadata=SimpleNamespace(message_id="done"))
    settings = {"state": store, "object_store": store, "receive": lambda: (done, None)}

    assert _flower_daemons._without_remains(lambda **given: given["receive"]() and None, **settings) is None
    assert _flower_daemons._without_remains(lambda **given: given["receive"]() and 7, **settings) == 7

    assert store.deleted == ["done", "done"]  # once the message, once its parts, and nothing of the second


class _Store:
    def __init__(self) -> None:
        self.deleted: list[str] = []
        self.lock_task_store, self.task_store = threading.Lock(), dict[int, Any]()

    def delete_messages(self, *, message_ids: list[str]) -> None:
        self.deleted += message_ids

    def delete(self, object_id: str) -> None:
        self.deleted.append(object_id)


@pytest.mark.slow
def test_a_supernode_keeps_no_task_that_is_over() -> None:
    """Flower keeps one a message for ever, and looks at all of them whenever its executor asks for work."""
    from flwr.common.constant import SubStatus
    from flwr.supercore.constant import TaskType
    from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState

    from fedzo.runtime.net import _flower_daemons

    state: Any = InMemoryNodeState(cast(Any, None))
    settings = {"state": state, "object_store": None, "receive": lambda: None}
    waiting, working = (state.create_task(TaskType.CLIENT_APP, run_id=7) for _ in range(2))
    token = state.claim_task(working)

    for sub_status in (SubStatus.COMPLETED, SubStatus.FAILED) * 10:
        done = state.create_task(TaskType.CLIENT_APP, run_id=7)
        assert state.claim_task(done)
        assert state.activate_task(done)
        assert state.finish_task(done, sub_status, "")
        assert _flower_daemons._without_remains(lambda **given: given["receive"](), **settings) is None

    assert set(state.task_store) == {waiting, working}
    assert state.get_task_by_token(token).task_id == working
    assert state.activate_task(working)
    assert not state.finish_task(done, SubStatus.FAILED, "")  # as of one that is over


@pytest.mark.slow
def test_names_of_the_network_parts_have_the_shape_that_is_used() -> None:
    from flwr.simulation import run_simulation
    from flwr.supercore.retry import make_simple_http_retry_invoker
    from flwr.supercore.superexec import run_superexec
    from flwr.superlink.cli.flower_superlink import flower_superlink
    from flwr.superlink.grid import HttpGrid
    from flwr.supernode.cli.flower_supernode import flower_supernode

    from fedzo.runtime.net import _flower_http
    from fedzo.runtime.net._flower_grid import ServerGrid
    from fedzo.runtime.net.serve import KeyedGrid

    assert {_flower_http._ACQUIRE} == run_superexec._SUPEREXEC_AUTH_METHODS
    assert parameters(_flower_http.pull_task_input) == ["client"]
    assert parameters(_flower_http.push_message) == ["client", "message", "context"]
    assert parameters(_flower_http.push_task_output) == ["client", "context", "sub_status", "details"]
    assert parameters(HttpGrid)[:3] == ["runtime_api_address", "insecure", "root_certificates"]
    assert isinstance(inspect.getattr_static(HttpGrid, "_runtime_client"), property)
    grid = ServerGrid("127.0.0.1:1", root_certificates=b"", token="x")
    assert {"node", "_run"} <= vars(grid).keys()
    assert {"max_time", "wait_function"} <= vars(grid._retry_invoker).keys()
    assert vars(make_simple_http_retry_invoker()).keys() == vars(grid._retry_invoker).keys()
    assert {"start", "stop", "is_running"} <= set(dir(_flower_http.HeartbeatSender))
    assert {"server_app", "client_app", "num_supernodes", "backend_config"} <= set(parameters(run_simulation))
    assert parameters(flower_superlink) == parameters(flower_supernode) == []
    assert "get_nodes" in dir(HttpGrid)
    defined = {name for kind in (ServerGrid, KeyedGrid) for name in vars(kind) if not name.startswith(("__", "_abc_"))}
    assert defined & set(dir(HttpGrid)) == {"get_node_ids", "push_messages", "pull_messages"}
    assert set(KeyedGrid.__init__.__code__.co_names) & vars(grid).keys() == set()  # nor what it sets


@pytest.mark.slow
def test_that_a_question_is_lost_or_its_node_gone_counts_as_the_superlinks_word_alone() -> None:
    """A client may put any error into its reply, and cannot send one in the name of the SuperLink."""
    from flwr.server.superlink.linkstate import utils
    from flwr.server.utils.validator import validate_message

    from fedzo.runtime.net.serve import KeyedGrid

    with _flower.one_federation(run_id=77):
        asked = Message(RecordDict(), dst_node_id=5, message_type="train")
        _flower.set_message_id(asked, "abc")
    lost = utils.create_message_error_unavailable_ins_message("abc", 77)
    gone = utils.create_message_error_unavailable_res_message(asked.metadata, "node_unavail")
    forged = [Message(Error(each.error.code, each.error.reason), reply_to=asked) for each in (lost, gone)]
    grid = cast(KeyedGrid, None)  # which these do not ask

    told = [(KeyedGrid.lost(grid, each), KeyedGrid.unreachable(grid, each)) for each in (lost, gone, *forged)]

    assert told == [(True, False), (False, True), (False, False), (False, False)]
    forged[0].metadata.__dict__["_src_node_id"] = _flower.SUPERLINK_NODE_ID
    assert any("src_node_id" in problem for problem in validate_message(forged[0], is_reply_message=True))


@pytest.mark.slow
def test_a_superlink_believes_whoever_is_first_to_say_what_a_part_is_made_of() -> None:
    """So nobody may know a part of fedzo's messages before it is sent: not even what all its fields say is enough."""
    from flwr.proto.message_pb2 import ObjectTree
    from flwr.supercore.inflatable.inflatable_object import get_object_tree
    from flwr.supercore.object_store.sql_object_store import SqlObjectStore

    store = SqlObjectStore(":memory:")
    store.initialize()
    told = encode(Hello(client=1)).config_records["fedzo"]
    known = ConfigRecord({name: value for name, value in told.items() if name != "salt"})
    store.preregister(77, ObjectTree(object_id=known.object_id, children=[ObjectTree(object_id="f" * 64)]))

    with pytest.raises(ValueError, match="was preregistered with different children"):
        store.preregister(77, get_object_tree(RecordDict({"fedzo": known})))
    assert len(store.preregister(77, get_object_tree(encode(Hello(client=1))))) == 2  # the record, and what holds it


@pytest.mark.slow
def test_superlink_serves_its_app_by_the_name_that_is_replaced() -> None:
    module = importlib.import_module("flwr.superlink.cli.flower_superlink")

    calls = [
        node
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "uvicorn"
    ]
    assert [call.attr for call in calls] == ["run"]
    source = inspect.getsource(module._run_superlink_http_api)
    assert all(f"{name}=" in source for name in ("app", "ssl_keyfile", "ssl_certfile", "log_config"))


@pytest.mark.slow
def test_names_of_the_control_api_have_the_shape_that_is_used() -> None:
    from flwr.proto.node_pb2 import NodeInfo
    from flwr.superlink.routers.fleet import router

    from fedzo.runtime.net import _flower_control
    from fedzo.runtime.net.gate import CLOCK_AHEAD_S, CLOCK_BEHIND_S
    from fedzo.runtime.net.gate_http import FLEET

    used = {"ListNodes", "ListRuns", "RegisterNode", "StartRun", "StopRun", "UnregisterNode"}
    assert used <= set(dir(_flower_control.ControlHttpClient))
    assert {"node_id", "public_key", "status", "online_until"} <= set(NodeInfo.DESCRIPTOR.fields_by_name)
    assert router.router.prefix + "/" == FLEET
    assert (constant.SYSTEM_TIME_TOLERANCE, constant.TIMESTAMP_TOLERANCE + constant.SYSTEM_TIME_TOLERANCE) == (
        CLOCK_AHEAD_S,
        CLOCK_BEHIND_S,
    )
    assert constant.TIMESTAMP_HEADER == "flwr-timestamp"
    assert supercore_constant.FLEET_HTTP_PUBLIC_KEY_HEADER == "flwr-public-key"


@pytest.mark.slow
def test_a_superlink_looks_for_tasks_that_ended_once_a_second_and_checks_each_token_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
    from flwr.supercore.corestate.sql_corestate import SqlCoreState

    from fedzo.runtime.net import _flower_daemons

    assert "_cleanup_expired_task_tokens" in vars(SqlCoreState)
    assert "_cleanup_expired_task_tokens" not in vars(SqlLinkState)  # it inherits what is replaced
    assert "active_until < current" in inspect.getsource(SqlCoreState.get_task_by_token)
    now, looks = [50.0], []
    monkeypatch.setattr(_flower_daemons.time, "monotonic", lambda: now[0])
    clean_up = _flower_daemons._sparing(looks.append)
    for after_s in (0.0, 0.5, 0.4, 0.2, 0.1, 5.0):
        now[0] += after_s
        clean_up(now[0])
    assert looks == pytest.approx([50.0, 51.1, 56.2])


@pytest.mark.slow
def test_flower_asks_again_after_503_and_gives_up_after_500() -> None:
    from flwr.supercore import heartbeat
    from flwr.supercore.retry import http_retry
    from flwr.supernode import fleet_http_connection

    again = {502, 503, 504}
    assert {int(code) for code in http_retry._RETRYABLE_STATUS_CODES} == again
    assert "status_code in (502, 503, 504)" in inspect.getsource(fleet_http_connection)
    assert "SERVICE_UNAVAILABLE,  # 503" in inspect.getsource(heartbeat.make_task_heartbeat_fn_http)


@pytest.mark.slow
def test_flower_interrupts_a_process_whose_token_is_refused_unless_an_interceptor_speaks_first() -> None:
    from flwr.supercore.retry import http_retry
    from flwr.supercore.runtime import RuntimeHttpClient

    from fedzo.runtime.net import _flower_http

    source = inspect.getsource(http_retry)
    assert "if status_code == httpx.codes.UNAUTHORIZED:" in source
    assert "os.kill(os.getpid(), signal.SIGINT)" in source
    client = RuntimeHttpClient("http://127.0.0.1:1")
    assert client._interceptors == ()
    assert parameters(_flower_http.TaskOver().intercept) == ["context", "call_next"]


@pytest.mark.slow
def test_a_task_that_ended_between_a_beats_check_and_its_record_interrupts_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from flwr.proto.runtime_pb2 import SendTaskHeartbeatResponse
    from flwr.supercore import heartbeat

    from fedzo.runtime.net import _flower_http

    def answer(request: object) -> SendTaskHeartbeatResponse:
        asked.set()
        return SendTaskHeartbeatResponse(success=False)

    asked, interrupts = threading.Event(), list[int]()
    monkeypatch.setattr(heartbeat.signal, "raise_signal", interrupts.append)
    client = SimpleNamespace(SendTaskHeartbeat=answer, close=lambda: None)

    heartbeat.make_task_heartbeat_fn_http(cast(Any, client))()
    asked.clear()
    assert interrupts == [signal.SIGINT]  # what Flower does
    with _flower_http.kept_alive(cast(Any, client)):
        assert asked.wait(10.0)

    assert interrupts == [signal.SIGINT]


@pytest.mark.slow
def test_gate_sees_where_messages_come_from_and_go_to() -> None:
    from flwr.proto.fleet_pb2 import PullMessagesResponse
    from flwr.supercore.protobuf.client import ProtobufClient
    from flwr.supercore.runtime import RuntimeHttpClient
    from flwr.superlink.servicer.fleet import fleet_handlers
    from flwr.supernode.fleet_http_client import FleetHttpClient

    timeout_s = inspect.signature(ProtobufClient.__init__).parameters["timeout"].default
    assert timeout_s > HOLD_S + MAX_WAIT_S
    assert f'path="{POLL}"' in inspect.getsource(FleetHttpClient.PullMessages)
    assert f'path="{REPLY}"' in inspect.getsource(FleetHttpClient.PushMessages)
    assert f'path="{SEND}"' in inspect.getsource(RuntimeHttpClient.PushMessages)
    beat = inspect.getsource(FleetHttpClient.SendNodeHeartbeat)
    assert [path for path, urgency in URGENCY.items() if urgency == 0 and f'path="{path}"' in beat]
    assert PullMessagesResponse().SerializeToString() == b""  # there was nothing
    assert "limit=1" in inspect.getsource(fleet_handlers.pull_messages)  # more may be there
