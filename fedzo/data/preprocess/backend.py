"""Who answers the prompts: a site's own choice, which never travels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from fedzo.errors import ConfigError, FedzoError, Problem, at_least, not_negative, problem
from fedzo.registry import PluginConfig, Registry

if TYPE_CHECKING:
    from fedzo.config.schema import RunSettings


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
        where: What its row is called in an error; it is not sent.
    """

    messages: tuple[Message, ...]
    model: str
    temperature: float
    seed: int
    max_tokens: int
    schema: Mapping[str, Any] | None = None
    where: str = ""


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

    @property
    def whole(self) -> bool:
        """Whether it is an answer at all: neither cut off nor blank. What is not, is never kept as one."""
        return not self.truncated and bool(self.text.strip())


class RowReason(StrEnum):
    """Why a single call gave no answer."""

    malformed = "malformed"
    refused = "refused"
    timeout = "timeout"
    unavailable = "unavailable"
    cut_off = "cut_off"
    """A verdict that ended early, or is blank; of a rewrite the checks say so."""


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


class RecipeError(ConfigError):
    """This site lacks what a run's recipe names: its prompts, or imported rewrites."""


class Backend(Protocol):
    """Answers requests. ``complete`` may be called by several threads at once."""

    @property
    def batch_size(self) -> int:
        """How many requests ``complete`` should be given at once where that many wait."""
        ...

    @property
    def concurrency(self) -> int:
        """Most calls of ``complete`` at once."""
        ...

    def fingerprint(self, model: str) -> str:
        """What ``Request.model`` stands for: answers of the same are kept and used again.

        Raises:
            ConfigError: There is no such model.
        """
        ...

    def count_tokens(self, request: Request) -> int:
        """Tokens of a request's prompt, exactly or as an estimate that is rather too high."""
        ...

    def room(self, model: str) -> int | None:
        """Most tokens of a prompt and its answer that a model can take; None where nobody but the site's file knows."""
        ...

    def complete(self, requests: Sequence[Request]) -> list[Completion | RowFault]:
        """Answers in the order of the requests.

        Raises:
            BusyError: It asks for patience; none of the requests was answered.
            EndpointError: It cannot be used.
        """
        ...

    def close(self) -> None:
        """Let go of connections, or of a model; calls in flight are given up."""
        ...


USUAL_TOKENS = 512
"""``max_tokens`` of a rewriter that does not think before it answers."""


@dataclass(kw_only=True, slots=True)
class RewriterConfig(PluginConfig):
    """The models that rewrite and judge at this site, and their limits."""

    paths: ClassVar[tuple[str, ...]] = ("examples", "store")
    """Keys that name files or folders of the site."""

    model: str = ""
    """The model that rewrites, by the name that its endpoint knows; ``rewriter=transformers``: a folder."""
    judge_model: str = ""
    """The model that judges. Empty = ``model``."""
    examples: str | None = None
    """File of accepted rewrites (``fedzo rephrase bootstrap``) that the prompts show. None = no examples."""
    store: str | None = None
    """Folder where answers and results are kept. None = ``rephrase`` in the site's folder, or in the working folder."""
    context_tokens: int = 4096
    """Most tokens of a prompt and its answer together."""
    max_tokens: int = USUAL_TOKENS
    """Most tokens of an answer. Verdicts have 128, or this number if it is above 512: room for a model that reasons
    first."""
    budget_calls: int = 0
    """Most calls of one command or run. Each process counts for itself, from its start: with ``runtime=ray`` or
    ``local``, a run has several. 0 = no limit."""
    budget_tokens: int = 0
    """Most tokens of prompts and answers of one command or run, counted as ``budget_calls``. 0 = no limit."""
    budget_cost: float = 0.0
    """Most that one command or run may cost, in the currency of the prices, counted as ``budget_calls``. 0 = no
    limit."""
    price_prompt: float = 0.0
    """Price of a million tokens of prompts."""
    price_answer: float = 0.0
    """Price of a million tokens of answers."""

    @property
    def judge(self) -> str:
        """The model that judges."""
        return self.judge_model or self.model

    def cost(self, prompt_tokens: int, answer_tokens: int) -> float:
        """What tokens cost by the prices, in their currency."""
        return (prompt_tokens * self.price_prompt + answer_tokens * self.price_answer) / 1e6

    def problems(self, run: RunSettings) -> Iterator[Problem]:
        yield from at_least("rewriter.max_tokens", self.max_tokens, 1, "Raise it.")
        if self.context_tokens <= self.max_tokens:
            rule = f"be > rewriter.max_tokens ({self.max_tokens})"
            yield problem("rewriter.context_tokens", rule, self.context_tokens, "Raise it, or lower max_tokens.")
        yield from at_least("rewriter.budget_calls", self.budget_calls, 0, "Write 0 for no limit.")
        yield from at_least("rewriter.budget_tokens", self.budget_tokens, 0, "Write 0 for no limit.")
        for name in ("budget_cost", "price_prompt", "price_answer"):
            yield from not_negative(f"rewriter.{name}", getattr(self, name), "Write 0 for none.")
        if self.budget_cost > 0 and self.price_prompt == self.price_answer == 0:
            rule = "be 0 where no price is set"
            remedy = "Set rewriter.price_prompt and rewriter.price_answer too, or no budget_cost."
            yield problem("rewriter.budget_cost", rule, self.budget_cost, remedy)

    def missing(self) -> Iterator[Problem]:
        """What is named and not on this machine: asked where work begins, not where a run's folder is read."""
        if self.examples is not None and not Path(self.examples).expanduser().exists():
            remedy = "Make it with `fedzo rephrase bootstrap`."
            yield problem("rewriter.examples", "name something that exists", self.examples, remedy)


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
