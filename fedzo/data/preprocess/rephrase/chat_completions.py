"""Calls of ``POST {base_url}/chat/completions``: one a request, no redirects, bounded in bytes and time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from typing import Any

import httpx

from fedzo.data.preprocess.backend import (
    BusyError,
    Completion,
    EndpointError,
    Request,
    RowFault,
    RowReason,
)
from fedzo.data.preprocess.rephrase.answers import (
    MAX_ANSWER_BYTES,
    MalformedError,
    error_words,
    read_answer,
    retry_after,
)
from fedzo.data.preprocess.rephrase.openai_compatible import OpenAICompatibleConfig
from fedzo.errors import printable

CONNECT_S = 30.0
"""Longest time for a connection: a host that does not answer is an outage, not a slow row."""
BUSY = (429, 503, 529)
OF_THE_ROW = {400: RowReason.refused, 413: RowReason.refused, 422: RowReason.refused, 408: RowReason.timeout}
MIN_HIDDEN_KEY = 12
"""A shorter key is a placeholder for servers that want any (``EMPTY``), and may well be a word of the text."""


class ChatCompletions:
    """The backend of ``openai_compatible``.

    One thread has an event loop with all connections, for only there can a call be given a time as a whole: a server
    that sends a byte now and then is never late for a socket.
    """

    batch_size = 1

    def __init__(self, config: OpenAICompatibleConfig, *, key: str | None) -> None:
        self.concurrency = config.concurrency
        self._config = config
        self._url = config.base_url.rstrip("/") + "/chat/completions"
        self._key = key
        self._loop = asyncio.new_event_loop()
        self._client = httpx.AsyncClient(
            headers={"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {}),
            follow_redirects=False,
            trust_env=config.trust_env,
            timeout=httpx.Timeout(None, connect=min(CONNECT_S, config.timeout_s / 2)),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=config.concurrency),
        )
        self._thread = threading.Thread(target=self._loop.run_forever, name="fedzo-chat", daemon=True)
        self._thread.start()

    def fingerprint(self, model: str) -> str:
        return model

    def room(self, model: str) -> int | None:
        return None

    def count_tokens(self, request: Request) -> int:
        """A token a three bytes, and ten a message: more than tokenizers need, but for digits and rare scripts."""
        return sum(10 + -(-len(message.content.encode("utf-8", "replace")) // 3) for message in request.messages)

    def complete(self, requests: Sequence[Request]) -> list[Completion | RowFault]:
        return [self._answer(request) for request in requests]

    def close(self) -> None:
        if not self._loop.is_closed():
            self._run(self._end())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _answer(self, request: Request) -> Completion | RowFault:
        try:
            status, headers, body = self._run(self._post(self._body(request)))
            return self._read(request, status, headers, body)
        except RowFault as fault:
            return fault
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise EndpointError(
                f"rewriter.base_url: no connection to {self._config.base_url} "
                f"({printable(str(error) or type(error).__name__)}). Start the server, or correct the URL; "
                "what is done is kept."
            ) from error
        except UnicodeEncodeError:
            return RowFault(RowReason.refused, "the prompt holds half of a UTF-16 pair, which no request can carry")
        except TimeoutError:
            return RowFault(RowReason.timeout, f"no whole answer within {self._config.timeout_s:g} s")
        except httpx.HTTPError as error:
            return RowFault(RowReason.unavailable, printable(self._without_key(f"{type(error).__name__}: {error}")))

    def _body(self, request: Request) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": request.model,
            "messages": [{"role": message.role, "content": message.content} for message in request.messages],
            "temperature": request.temperature,
            "max_tokens": request.max_tokens,
            "stream": False,
        }
        if request.temperature > 0:
            body["seed"] = request.seed
        if request.schema is not None and self._config.json_schema:
            schema = {"name": "answer", "strict": True, "schema": dict(request.schema)}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return body

    async def _end(self) -> None:
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()  # a call that nobody waits for any more
        await self._client.aclose()

    async def _post(self, body: dict[str, Any]) -> tuple[int, httpx.Headers, bytes]:
        async with (
            asyncio.timeout(self._config.timeout_s),
            self._client.stream("POST", self._url, json=body) as response,
        ):
            if response.headers.get("content-encoding", "identity") != "identity":
                raise MalformedError("the answer is packed, though that was not asked for")
            parts, size = [], 0
            async for part in response.aiter_raw():
                parts.append(part)
                size += len(part)
                if size > MAX_ANSWER_BYTES:
                    raise MalformedError(f"the answer is longer than {MAX_ANSWER_BYTES >> 20} MiB")
            return response.status_code, response.headers, b"".join(parts)

    def _read(self, request: Request, status: int, headers: httpx.Headers, body: bytes) -> Completion:
        """The answer that came with a status; every other status is the row's fault, or asks for patience, or ends."""
        if self._key and len(self._key) >= MIN_HIDDEN_KEY:
            body = body.replace(self._key.encode(), b"***")  # it is written down and shown
        if status == 200:
            return read_answer(body, prompt_tokens=self.count_tokens(request), completion_tokens=request.max_tokens)
        if status in BUSY:
            raise BusyError(retry_after(headers.get("retry-after")))
        words = error_words(body[:4000])
        said = f"{status} {words}".strip()
        if status in (400, 422) and request.schema is not None and self._config.json_schema:
            said += " (if it means response_format: rewriter.json_schema=false sends none)"
        if status in OF_THE_ROW:
            raise RowFault(OF_THE_ROW[status], said)
        if 500 <= status <= 599:
            raise RowFault(RowReason.unavailable, said)
        if 200 <= status <= 299:
            raise MalformedError(f"status {said} instead of 200")
        remedy = self._remedy(status, headers)
        if status == 403 and request.where:  # so some providers answer to a text that they object to
            remedy += f" If it refuses the text, leave {request.where} out of the data."
        raise EndpointError(f"{self._url} answered {said}. {remedy} What is done is kept.")

    def _remedy(self, status: int, headers: httpx.Headers) -> str:
        name = self._config.key_variable
        if status in (401, 403) and not name:
            return "It may want a key: put it into an environment variable, and its name into rewriter.key_variable."
        if status in (401, 403):
            return f"Put a key that may use this model into the environment variable {name} (rewriter.key_variable)."
        if status == 404:
            return "Correct rewriter.base_url (it often ends with /v1) or rewriter.model."
        if 300 <= status <= 399:
            where = printable(self._without_key(headers.get("location", "")), most=200)
            return f'It leads to "{where}", and redirects are not followed. Write the final rewriter.base_url.'
        return "Correct rewriter.base_url, or ask who runs the endpoint."

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text
