"""``rewriter=openai_compatible``: a server that answers ``POST {base_url}/chat/completions``, local or remote."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from fedzo.data.preprocess.backend import REWRITERS, Backend, RewriterConfig
from fedzo.errors import ConfigError, Problem, at_least, positive, problem

if TYPE_CHECKING:
    from fedzo.config.schema import RunSettings

MAX_CONCURRENCY = 256
_VARIABLE = re.compile("[A-Z_][A-Z0-9_]{0,99}")  # no small letters: a key put here by mistake often has some


@dataclass(kw_only=True, slots=True)
class OpenAICompatibleConfig(RewriterConfig):
    """A server that answers ``POST {base_url}/chat/completions``: vLLM, llama.cpp, Ollama, or a provider."""

    base_url: str = ""
    """Such as ``http://127.0.0.1:8080/v1``. Hosts other than this machine need https."""
    key_variable: str = ""
    """Name of the environment variable that holds the key. Empty = no key is sent. The key is stored nowhere."""
    concurrency: int = 4
    """Most calls at once. While the endpoint says that it is busy, fewer are made."""
    timeout_s: float = 120.0
    """Longest time for one call, from connection to the last byte, in seconds."""
    trust_env: bool = False
    """Whether proxies and certificates named by environment variables (``HTTPS_PROXY``, ``SSL_CERT_FILE``) count."""
    json_schema: bool = True
    """Whether the judge's answer is asked for by a JSON schema (``response_format``), which some endpoints refuse."""

    def problems(self, run: RunSettings) -> Iterator[Problem]:
        if (rule := _broken_url(self.base_url)) is not None:
            shown = re.sub("//[^/]*@", "//***@", self.base_url)  # a key may stand there
            yield problem("rewriter.base_url", rule, shown, "Write it such as http://127.0.0.1:8080/v1.")
        if not 1 <= len(self.model) <= 200:
            yield problem("rewriter.model", "name a model of the endpoint", self.model, "Ask GET {base_url}/models.")
        if self.key_variable and not _VARIABLE.fullmatch(self.key_variable):
            yield Problem(
                "rewriter.key_variable",  # what stands there may be the key itself: it is not shown
                "rewriter.key_variable must be the name of an environment variable, in capital letters, got something "
                "else (not shown: it may be a key). Write the name, and put the key into the variable.",
            )
        yield from at_least("rewriter.concurrency", self.concurrency, 1, "Write 1 for one call after the other.")
        if self.concurrency > MAX_CONCURRENCY:
            yield problem("rewriter.concurrency", f"be <= {MAX_CONCURRENCY}", self.concurrency, "Lower it.")
        yield from positive("rewriter.timeout_s", self.timeout_s, "Write seconds.")


def _broken_url(url: str) -> str | None:
    """The rule that a base URL breaks."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return "be a URL"
    if parts.scheme not in ("http", "https") or not host or not url.isascii() or not url.isprintable() or " " in url:
        return "be a URL that begins with https:// or http://"
    if parts.username is not None or parts.password is not None:
        return "hold no user and no key"
    if parts.query or parts.fragment:
        return "end with its path, without ? and #"
    if parts.scheme == "http" and not _is_loopback(host):
        return (
            "begin with https:// for a host other than this machine (clients' text and the key would travel unhidden)"
        )
    return None


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def key_of(config: OpenAICompatibleConfig) -> str | None:
    """The key, out of its environment variable; None where none is asked for.

    Raises:
        ConfigError: The variable is not set, or holds what no header can. The text never shows it.
    """
    name = config.key_variable
    if not name:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        raise ConfigError(
            f"rewriter.key_variable: the environment variable {name} must hold the endpoint's key, but is not set or "
            f"empty. Set it (export {name}=...), or leave rewriter.key_variable empty for an endpoint without keys."
        )
    if not key.isascii() or not key.isprintable() or " " in key or len(key) > 10_000:
        raise ConfigError(
            f"rewriter.key_variable: the environment variable {name} must hold a key of visible ASCII characters, got "
            "others. Copy the key into it again."
        )
    return key


@REWRITERS.register("openai_compatible", OpenAICompatibleConfig)
def _openai_compatible(config: OpenAICompatibleConfig) -> Backend:
    from fedzo.data.preprocess.rephrase.chat_completions import ChatCompletions  # httpx takes long to import

    return ChatCompletions(config, key=key_of(config))
