"""A backend whose answers a test decides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from fedzo.data.preprocess.rephrase.backend import Completion, Request, RowFault

Reply = Callable[[Request], str | Completion | RowFault]


@dataclass
class Scripted:
    """Answers by a function of the request, and counts what it was asked."""

    reply: Reply
    asked: list[Request] = field(default_factory=list)
    batch_size: int = 1
    concurrency: int = 1

    def fingerprint(self, model: str) -> str:
        return model

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
