"""A real server on loopback that answers as a test tells it, and a backend without one."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from fedzo.data.preprocess.backend import Completion, Message, Request, RowFault
from fedzo.data.preprocess.rephrase.chat_completions import ChatCompletions
from fedzo.data.preprocess.rephrase.openai_compatible import OpenAICompatibleConfig

Reply = Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]
Script = Callable[[Request], str | Completion | RowFault]


@dataclass
class Endpoint:
    """A running server, and the bodies and headers of the requests that it got."""

    url: str
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)


def send(handler: BaseHTTPRequestHandler, status: int, body: bytes, **headers: str) -> None:
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def chat_body(text: str | None, *, finish_reason: str | None = "stop", **more: Any) -> bytes:
    message = {"role": "assistant", "content": text}
    return json.dumps({"choices": [{"message": message, "finish_reason": finish_reason}], **more}).encode()


@pytest.fixture
def sent() -> Callable[..., None]:
    """Sends an answer of a status, a body and headers."""
    return send


@pytest.fixture
def chat() -> Callable[..., bytes]:
    """The body of a good answer."""
    return chat_body


@pytest.fixture
def serve() -> Iterator[Callable[[Reply], Endpoint]]:
    """Starts servers that answer each POST by ``reply(handler, body of the request)``."""
    servers = []

    def start(reply: Reply) -> Endpoint:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.bodies.append(body)
                endpoint.headers.append(dict(self.headers))
                try:
                    reply(self, body)
                except (BrokenPipeError, ConnectionResetError):  # a client that waits no longer
                    self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a test broke the connection
        endpoint = Endpoint(f"http://127.0.0.1:{server.server_port}/v1")
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
        return endpoint

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def ask() -> Callable[..., Request]:
    """A request of one user's message."""

    def make(text: str = "Hello", **changes: Any) -> Request:
        given = {"model": "m", "temperature": 0.0, "seed": 0, "max_tokens": 16} | changes
        return Request(messages=(Message("user", text),), **given)

    return make


@pytest.fixture
def client() -> Iterator[Callable[..., ChatCompletions]]:
    """Makes backends that talk to a URL, and closes them."""
    made = []

    def make(url: str, *, key: str | None = None, **settings: Any) -> ChatCompletions:
        config = OpenAICompatibleConfig(base_url=url, model="m", **({"timeout_s": 20.0} | settings))
        made.append(ChatCompletions(config, key=key))
        return made[-1]

    yield make
    for backend in made:
        backend.close()


@dataclass
class Scripted:
    """Answers by a function of the request, and counts what it was asked."""

    reply: Script
    asked: list[Request] = field(default_factory=list)
    batch_size: int = 1
    concurrency: int = 1

    def close(self) -> None:
        """Nothing to let go."""

    def fingerprint(self, model: str) -> str:
        return model

    def room(self, model: str) -> int | None:
        return None

    def count_tokens(self, request: Request) -> int:
        return sum(len(message.content) for message in request.messages) // 4

    def complete(self, requests: Sequence[Request]) -> list[Completion | RowFault]:
        self.asked += requests
        return [self._completion(self.reply(request)) for request in requests]

    def _completion(self, reply: str | Completion | RowFault) -> Completion | RowFault:
        if not isinstance(reply, str):
            return reply
        return Completion(reply, truncated=False, model="scripted", prompt_tokens=10, completion_tokens=5)


@pytest.fixture
def scripted() -> type[Scripted]:
    return Scripted
