"""Every fault of an endpoint, by a real server on loopback."""

from __future__ import annotations

import json
import re
import socket
import struct
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from fedzo.config.schema import LaunchConfig
from fedzo.data.preprocess.backend import REWRITERS, BusyError, Completion, EndpointError, RowFault
from fedzo.data.preprocess.rephrase.openai_compatible import OpenAICompatibleConfig
from fedzo.errors import ConfigError
from fedzo.registry import broken_rules

Make = Callable[..., Any]
KEY = "sk-0123456789abcdef"


def test_what_is_sent_and_what_comes_back(serve: Make, client: Make, ask: Make, sent: Make, chat: Make) -> None:
    usage = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9, "odd": None}
    endpoint = serve(lambda handler, body: sent(handler, 200, chat("Hi", model="m-1", usage=usage, id=3)))
    schema = {"type": "object"}

    backend = client(endpoint.url + "/", key=KEY)
    answers = backend.complete([ask(), ask(temperature=0.5, seed=9, schema=schema)])

    assert answers == [Completion("Hi", False, "m-1", 7, 2)] * 2
    plain = {
        "model": "m",
        "messages": [{"role": "user", "content": "Hello"}],
        "temperature": 0.0,
        "max_tokens": 16,
        "stream": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
    assert endpoint.bodies == [plain, plain | {"temperature": 0.5, "seed": 9, "response_format": form}]
    assert {headers["Authorization"] for headers in endpoint.headers} == {f"Bearer {KEY}"}


@pytest.mark.parametrize("reason", ["length", "content_filter", None])
def test_an_answer_that_did_not_stop_by_itself_is_truncated(
    reason: str | None, serve: Make, client: Make, ask: Make, sent: Make, chat: Make
) -> None:
    endpoint = serve(lambda handler, body: sent(handler, 200, chat("Hi", finish_reason=reason)))

    (answer,) = client(endpoint.url).complete([ask("x" * 30)])

    assert answer == Completion("Hi", True, "", 20, 16)  # without counts: 10 a message, a token three bytes; the most


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no json",
        b"\xff\xfe\x00",
        b"[]",
        b"{}",
        b'{"choices": []}',
        b'{"choices": {"0": 1}}',
        b'{"choices": [null]}',
        b'{"choices": [{"message": "Hi"}]}',
        b'{"choices": [{"message": {"content": null}, "finish_reason": "stop"}]}',
        b'{"choices": [{"message": {"content": ["Hi"]}, "finish_reason": "stop"}]}',
        b'{"choices": [{"message": {"content": "\\ud800"}, "finish_reason": "stop"}]}',
        b'{"choices": [{"message": {"content": "Hi"}, "finish_reason": 1}]}',
        b'{"choices": [{"message": {"content": "Hi"}}], "usage": {"prompt_tokens": -1}}',
        b'{"choices": [{"message": {"content": "Hi"}}], "usage": {"completion_tokens": 1e999}}',
        b'{"choices": [{"message": {"content": "Hi"}}], "usage": 3}',
        b'{"choices": [{"message": {"content": "Hi"}}], "model": 3}',
        b'{"error": {"message": "out of order"}}',
        b"[" * 100_000,
        b"9" * 100_000,
        json.dumps({"choices": [{"message": {"content": "x" * ((1 << 18) + 1)}}]}).encode(),
    ],
    ids=lambda body: body[:40].decode("latin-1") + str(len(body)),
)
def test_an_answer_of_another_shape_is_the_rows_fault(
    body: bytes, serve: Make, client: Make, ask: Make, sent: Make
) -> None:
    endpoint = serve(lambda handler, _: sent(handler, 200, body))

    (fault,) = client(endpoint.url).complete([ask()])

    assert isinstance(fault, RowFault)
    assert fault.reason == "malformed"
    assert len(str(fault)) < 1000


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (400, "refused"),
        (413, "refused"),
        (422, "refused"),
        (408, "timeout"),
        (500, "unavailable"),
        (502, "unavailable"),
        (504, "unavailable"),
        (204, "malformed"),
    ],
)
def test_a_status_that_may_be_the_rows_fault(
    status: int, reason: str, serve: Make, client: Make, ask: Make, sent: Make
) -> None:
    endpoint = serve(lambda handler, _: sent(handler, status, b'{"error": {"message": "too\\u001b[2J long"}}'))

    (fault,) = client(endpoint.url).complete([ask()])

    assert isinstance(fault, RowFault)
    assert fault.reason == reason
    assert "\x1b" not in str(fault)
    assert status == 204 or '"too [2J long"' in str(fault)


@pytest.mark.parametrize("status", [401, 403, 404, 402, 405])
def test_a_status_that_no_row_can_mend_stops(status: int, serve: Make, client: Make, ask: Make, sent: Make) -> None:
    endpoint = serve(lambda handler, _: sent(handler, status, f"no, {KEY} is wrong".encode()))

    with pytest.raises(EndpointError, match=f'answered {status} "no, \\*\\*\\* is wrong"') as stop:
        client(endpoint.url, key=KEY, key_variable="MY_KEY").complete([ask()])

    assert ("MY_KEY" in str(stop.value)) == (status in (401, 403))
    assert ("/v1" in str(stop.value).partition("answered")[2]) == (status == 404)


def test_an_answer_that_ended_in_thoughts_kept_apart_is_cut_off(
    serve: Make, client: Make, ask: Make, sent: Make, chat: Make
) -> None:
    """As vLLM's with a reasoning parser: no text at all, and its counts hold."""
    usage = {"prompt_tokens": 9, "completion_tokens": 16}
    body = chat(None, finish_reason="length", model="m-1", usage=usage)
    endpoint = serve(lambda handler, _: sent(handler, 200, body))

    (answer,) = client(endpoint.url).complete([ask()])

    assert answer == Completion("", True, "m-1", 9, 16)


def test_an_error_in_place_of_an_answer_is_shown(serve: Make, client: Make, ask: Make, sent: Make) -> None:
    body = b'{"error": {"message": "no\\u001b[2J credit", "code": 502}}'
    endpoint = serve(lambda handler, _: sent(handler, 200, body))

    (fault,) = client(endpoint.url).complete([ask()])

    assert str(fault) == 'malformed: an error in place of an answer: "no [2J credit"'


def test_an_endpoint_that_refuses_a_schema_can_judge_without(
    serve: Make, client: Make, ask: Make, sent: Make, chat: Make
) -> None:
    def reply(handler: Any, body: dict[str, Any]) -> None:
        refused = b'{"error": {"message": "This response_format type is unavailable now"}}'
        sent(handler, *((400, refused) if "response_format" in body else (200, chat("same"))))

    endpoint = serve(reply)
    judge, rewriter = ask(schema={"type": "object"}), ask()

    fault, answer = client(endpoint.url).complete([judge, rewriter])
    assert "unavailable now" in str(fault)
    assert "rewriter.json_schema=false" in str(fault)
    assert answer.text == "same"
    assert client(endpoint.url, json_schema=False).complete([judge])[0] == answer
    assert endpoint.bodies[-1] == endpoint.bodies[-2]


@pytest.mark.parametrize("schema", [None, {"type": "object"}])
def test_a_refusal_that_no_schema_can_have_caused_does_not_name_its_key(
    schema: dict[str, Any] | None, serve: Make, client: Make, ask: Make, sent: Make
) -> None:
    endpoint = serve(lambda handler, _: sent(handler, 400, b"too long"))

    (fault,) = client(endpoint.url, json_schema=schema is None).complete([ask(schema=schema)])

    assert str(fault) == 'refused: 400 "too long"'


@pytest.mark.parametrize("status", [401, 403])
def test_a_text_that_may_not_be_sent_is_named_by_its_row(
    status: int, serve: Make, client: Make, ask: Make, sent: Make
) -> None:
    endpoint = serve(lambda handler, _: sent(handler, status, b"your input was flagged"))

    with pytest.raises(EndpointError, match=f'answered {status} "your input was flagged"') as stop:
        client(endpoint.url).complete([ask(where="row 17312")])

    assert ("leave row 17312 out of the data" in str(stop.value)) == (status == 403)
    assert "rewriter.key_variable" in str(stop.value)


def test_the_key_stands_in_no_answer(serve: Make, client: Make, ask: Make, sent: Make, chat: Make) -> None:
    endpoint = serve(lambda handler, _: sent(handler, 200, chat(f"You sent {handler.headers['Authorization']}")))

    assert client(endpoint.url, key=KEY).complete([ask()])[0].text == "You sent Bearer ***"


def test_a_redirect_is_not_followed(serve: Make, client: Make, ask: Make, sent: Make, chat: Make) -> None:
    elsewhere = serve(lambda handler, _: sent(handler, 200, chat("Hi")))
    location = elsewhere.url + "/chat/completions"
    for status in (301, 302, 303, 307, 308):
        endpoint = serve(lambda handler, _, status=status: sent(handler, status, b"", Location=location))

        with pytest.raises(EndpointError, match=f'{status}.*leads to "http.*redirects are not followed'):
            client(endpoint.url, key=KEY).complete([ask()])

    assert elsewhere.bodies == []


@pytest.mark.parametrize("status", [429, 503, 529])
def test_a_busy_endpoint_says_how_long(status: int, serve: Make, client: Make, ask: Make, sent: Make) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=3600), usegmt=True)
    said = iter([{"Retry_After": "7"}, {"Retry_After": date}, {"Retry_After": "soon"}, {}, {"Retry_After": "-3"}])
    backend = client(serve(lambda handler, _: sent(handler, status, b"", **next(said))).url)

    waits = []
    for _ in range(5):
        with pytest.raises(BusyError) as busy:
            backend.complete([ask()])
        waits.append(busy.value.retry_after_s)

    assert waits[0] == 7
    assert 3500 < waits[1] <= 3600
    assert waits[2:] == [None, None, 0]


def test_an_endless_answer_is_left(serve: Make, client: Make, ask: Make) -> None:
    num_sent = []

    def pour(handler: Any, _: object) -> None:
        handler.send_response(200)
        handler.send_header("Connection", "close")
        handler.end_headers()
        for _ in range(1000):
            handler.wfile.write(b" " * (1 << 20))
            num_sent.append(1)

    (fault,) = client(serve(pour).url).complete([ask()])

    assert str(fault) == "malformed: the answer is longer than 4 MiB"
    assert len(num_sent) < 100


def test_a_packed_answer_is_refused(serve: Make, client: Make, ask: Make, sent: Make) -> None:
    endpoint = serve(lambda handler, _: sent(handler, 200, b"x", Content_Encoding="gzip"))

    assert client(endpoint.url).complete([ask()])[0].reason == "malformed"
    assert endpoint.headers[0]["Accept-Encoding"] == "identity"


@pytest.mark.slow
@pytest.mark.parametrize("where", ["nothing", "headers", "body"])
def test_a_slow_answer_is_left_when_its_time_is_over(where: str, serve: Make, client: Make, ask: Make) -> None:
    def drip(handler: Any, _: object) -> None:
        if where == "body":
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        if where == "headers":
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
        for _ in range(50):
            time.sleep(0.1)
            if where != "nothing":
                handler.wfile.write(b"x")

    begun = time.monotonic()
    (fault,) = client(serve(drip).url, timeout_s=1.0).complete([ask()])

    assert str(fault) == "timeout: no whole answer within 1 s"
    assert time.monotonic() - begun < 4


@pytest.mark.parametrize("sent_first", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{", b"SSH-2.0\r\n\r\n"])
def test_a_connection_that_breaks_is_the_rows_fault(sent_first: bytes, serve: Make, client: Make, ask: Make) -> None:
    def reset(handler: Any, _: object) -> None:
        handler.wfile.write(sent_first)
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.close_connection = True
        handler.rfile.close()
        handler.connection.close()

    (fault,) = client(serve(reset).url).complete([ask()])

    assert isinstance(fault, RowFault)
    assert fault.reason == "unavailable"


def test_no_connection_stops(serve: Make, client: Make, ask: Make) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but nobody listens
        closed = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        plain = serve(lambda *_: None).url.replace("http://", "https://")
        for url in (closed, plain, "https://nowhere.invalid/v1"):
            with pytest.raises(EndpointError, match=f"no connection to {url} .*what is done is kept"):
                client(url).complete([ask()])


def test_half_a_pair_of_utf_16_is_not_sent(serve: Make, client: Make, ask: Make) -> None:
    endpoint = serve(lambda *_: None)

    assert client(endpoint.url).complete([ask("\ud800")])[0].reason == "refused"
    assert endpoint.bodies == []


def test_proxies_of_the_environment_count_only_if_asked_for(
    serve: Make, client: Make, ask: Make, sent: Make, chat: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct = serve(lambda handler, _: sent(handler, 200, chat("direct")))
    proxy = serve(lambda handler, _: sent(handler, 200, chat("proxy")))
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, proxy.url.removesuffix("/v1"))

    assert client(direct.url).complete([ask()])[0].text == "direct"
    assert client(direct.url, trust_env=True).complete([ask()])[0].text == "proxy"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"base_url": "http://example.org/v1"},
            "rewriter.base_url must begin with https:// for a host other than this",
        ),
        ({"base_url": "http://127.0.0.1.example.org/v1"}, "must begin with https://"),
        (
            {"base_url": "https://me:secret@example.org/v1"},
            r"must hold no user and no key, got 'https://\*\*\*@example",
        ),
        ({"base_url": "https://example.org/v1?key=1"}, r"without \? and #"),
        ({"base_url": "ftp://example.org"}, "must be a URL that begins with"),
        ({"base_url": "http://[::1"}, "must be a URL, got"),
        ({"base_url": "http://127.0.0.1:99999/v1"}, "must be a URL, got"),
        ({"model": ""}, "rewriter.model must name a model"),
        (
            {"key_variable": "sk-1234"},
            r"must be the name of an environment variable, .* got something else \(not shown",
        ),
        ({"key_variable": "hf_" + "a" * 34}, r"must be the name of an environment variable, in capital letters, got"),
        ({"concurrency": 0}, "rewriter.concurrency must be >= 1"),
        ({"concurrency": 1000}, "rewriter.concurrency must be <= 256"),
        ({"timeout_s": 0.0}, "rewriter.timeout_s must be > 0"),
        ({"budget_cost": 1.0}, "rewriter.budget_cost must be 0 where no price is set"),
        ({"context_tokens": 512}, r"rewriter.context_tokens must be > rewriter.max_tokens \(512\)"),
    ],
)
def test_settings_that_cannot_be_used(changes: dict[str, Any], match: str) -> None:
    config = OpenAICompatibleConfig(**({"base_url": "http://127.0.0.1:1/v1", "model": "m"} | changes))

    (found,) = broken_rules(config, LaunchConfig())

    assert re.search(match, found.text)
    assert not any(secret in found.text for secret in ("secret", "sk-1234", "hf_" + "a" * 34))


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("NOT_SET_HERE", "the environment variable NOT_SET_HERE must hold the endpoint's key"),
        ("ODD", "ODD must hold a key of visible ASCII characters, got others"),
    ],
)
def test_keys_that_cannot_be_used(name: str, match: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ODD", "sk-12\n34")
    config = OpenAICompatibleConfig(base_url="http://127.0.0.1:1/v1", model="m", key_variable=name)

    with pytest.raises(ConfigError, match=match) as refused:
        REWRITERS.build(config)

    assert "sk-12" not in str(refused.value)


@pytest.mark.parametrize("url", ["http://localhost:1/v1", "http://[::1]:1/v1", "http://127.9.9.9/v1", "https://a.b/v1"])
def test_urls_that_can_be_used(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)

    REWRITERS.build(OpenAICompatibleConfig(base_url=url, model="m", key_variable="MY_KEY")).close()
