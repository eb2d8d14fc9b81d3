"""Who answers the prompts: a site's own choice, which never travels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, Literal, Protocol

from fedzo.errors import FedzoError
from fedzo.registry import PluginConfig, Registry


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True)
class Request:
    """One call.

    Attributes:
        messages: The chat so far.
        model: Which of the backend's models answers.
        temperature: 0 = the likeliest token each time.
        seed: Of the sampling; told only where ``temperature`` is above 0.
        max_tokens: Most tokens of the answer.
        schema: JSON schema that the answer should have; a backend may ignore it, so nothing relies on it.
    """

    messages: tuple[Message, ...]
    model: str
    temperature: float
    seed: int
    max_tokens: int
    schema: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """An answer.

    Attributes:
        text: As it came.
        truncated: Whether it ended for another reason than that it was complete.
        model: What the answer says that it is from.
        prompt_tokens: Counted by the backend.
        completion_tokens: Counted by the backend.
    """

    text: str
    truncated: bool
    model: str
    prompt_tokens: int
    completion_tokens: int


class RowReason(StrEnum):
    """Why a single call gave no answer."""

    malformed = "malformed"
    refused = "refused"
    timeout = "timeout"
    unavailable = "unavailable"


class RowFault(FedzoError):
    """A call failed for a reason that may be its row's own: that row keeps its text.

    Attributes:
        reason: Its kind.
    """

    def __init__(self, reason: RowReason, details: str = "") -> None:
        super().__init__(f"{reason}: {details}" if details else str(reason))
        self.reason = reason


class BusyError(FedzoError):
    """The endpoint asks for patience (429, or 503 with ``Retry-After``).

    Attributes:
        retry_after_s: What it asks for; None where it does not say.
    """

    def __init__(self, retry_after_s: float | None) -> None:
        super().__init__("the endpoint is busy")
        self.retry_after_s = retry_after_s


class EndpointError(FedzoError):
    """No call can succeed (no connection, 401, 403, 404), or none may be made any more (a budget is spent).

    It stops the stage; what is done is kept.
    """


class Backend(Protocol):
    """Answers requests. ``complete`` may be called by several threads at once."""

    @property
    def batch_size(self) -> int:
        """How many requests ``complete`` should be given at once where that many wait."""
        ...

    def count_tokens(self, messages: Sequence[Message]) -> int:
        """Tokens of a prompt, exactly or as an estimate."""
        ...

    def complete(self, requests: Sequence[Request]) -> list[Completion | RowFault]:
        """Answers in the order of the requests.

        Raises:
            BusyError: It asks for patience; none of the requests was answered.
            EndpointError: It cannot be used.
        """
        ...


@dataclass(kw_only=True, slots=True)
class RewriterConfig(PluginConfig):
    """Who rewrites and judges at this site, and how much of it there may be."""

    paths: ClassVar[tuple[str, ...]] = ("examples", "store")
    """Keys that name files or folders of the site."""

    examples: str | None = None
    """File of accepted rewrites (``fedzo rephrase bootstrap``) that the prompts show. None = no examples."""
    store: str | None = None
    """Folder where answers and results are kept. None = ``rephrase`` in the site's folder, or in the working folder."""
    context_tokens: int = 4096
    """Most tokens of a prompt and its answer together."""
    max_tokens: int = 512
    """Most tokens of an answer."""
    most_calls: int = 0
    """Most calls of one command or run. 0 = no limit."""
    most_tokens: int = 0
    """Most tokens of prompts and answers of one command or run. 0 = no limit."""
    most_cost: float = 0.0
    """Most that one command or run may cost, in the currency of the prices. 0 = no limit."""
    price_prompt: float = 0.0
    """Price of a million tokens of prompts."""
    price_answer: float = 0.0
    """Price of a million tokens of answers."""


@dataclass(kw_only=True, slots=True)
class NoRewriterConfig(RewriterConfig):
    """This site rewrites nothing: it refuses a run that asks for it."""


REWRITERS: Registry[Backend] = Registry("rewriter", base=RewriterConfig)
"""Factories ``(config) -> Backend``."""


@REWRITERS.register("none", NoRewriterConfig)
def _none(config: NoRewriterConfig) -> Backend:
    raise EndpointError(
        "rewriter must name who rewrites the text at this site, got none. Set rewriter=openai_compatible with "
        "rewriter.base_url, or rewriter=transformers with rewriter.model."
    )
