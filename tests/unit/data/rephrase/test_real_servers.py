"""Two real servers with the embedded model, which fail differently: one obeys a JSON schema, the other ignores it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from fedzo.data.preprocess.backend import Completion, RewriterConfig, RowFault
from fedzo.data.preprocess.rephrase.caller import Caller
from fedzo.data.preprocess.rephrase.store import Store

pytestmark = pytest.mark.slow
Make = Callable[..., Any]

LLAMA = """
import sys, time
from xllamacpp import CommonParams, Server

params = CommonParams()
params.model.path, params.port = sys.argv[1], int(sys.argv[2])
params.n_ctx, params.cpuparams.n_threads = 1024, 1
server = Server(params)
while True:
    time.sleep(1)
"""
SCHEMA = {
    "type": "object",
    "properties": {"verdict": {"type": "string", "enum": ["same", "different"]}},
    "required": ["verdict"],
    "additionalProperties": False,
}


def _command(server: str, port: int) -> list[str]:
    if server == "xllamacpp":
        if find_spec("xllamacpp") is None:
            pytest.skip("xllamacpp is not installed (pip install xllamacpp)")
        from fedzo.data.embedded import package_dir
        from fedzo.models.source import EMBEDDED_FILE, EMBEDDED_PACKAGE

        return [sys.executable, "-c", LLAMA, str(package_dir(EMBEDDED_PACKAGE) / EMBEDDED_FILE), str(port)]
    if find_spec("openai") is None:
        pytest.skip("the server of transformers needs openai (pip install 'transformers[serving]')")
    where = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    return [sys.executable, "-m", "transformers.cli.transformers", "serve", _folder(), *where]


def _folder() -> str:
    from fedzo.models.source import embedded_folder

    return str(embedded_folder())


@pytest.fixture(scope="module", params=["xllamacpp", "transformers"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, str]]:
    """A running server: its kind, its URL, and the name of its model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as output:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(_command(request.param, port), stdout=output, stderr=output, env=environment)
    end = time.monotonic() + 240
    while True:
        assert process.poll() is None, log.read_text()[-2000:]
        assert time.monotonic() < end, log.read_text()[-2000:]
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            break
        except OSError:
            time.sleep(0.2)
    yield request.param, f"http://127.0.0.1:{port}/v1", _folder() if request.param == "transformers" else "any"
    process.kill()
    process.wait()


def test_both_lead_to_answers_of_one_shape(
    server: tuple[str, str, str], client: Make, ask: Make, tmp_path: Path
) -> None:
    kind, url, model = server
    given = {"model": model, "max_tokens": 12}
    requests = [
        ask("Say hello.", **given),
        ask("Say hello.", **given),
        ask("Do these mean the same? A dog ran. A dog was running.", schema=SCHEMA, **(given | {"max_tokens": 24})),
        ask("Write a long story.", temperature=1.0, seed=1, **given),
    ]
    if kind == "xllamacpp":  # the other takes any length, and minutes
        requests.append(ask("word " * 1500, **given))

    with Store(tmp_path) as store:
        backend = client(url, timeout_s=200.0, concurrency=1)
        caller = Caller(backend, store, RewriterConfig())
        answers = caller.answer(requests)

    hello, again, verdict, story, *beyond = answers
    assert isinstance(hello, Completion)
    assert hello == again
    assert hello.text
    assert 0 < hello.completion_tokens <= 12
    assert 5 < hello.prompt_tokens < 60
    assert isinstance(verdict, Completion)
    assert isinstance(story, Completion)
    assert story.truncated
    assert caller.totals.calls - caller.totals.faults == 3
    assert len(store) == sum(answer.whole for answer in (hello, verdict, story))  # what is cut off is no answer
    if kind == "xllamacpp":
        assert json.loads(verdict.text)["verdict"] in ("same", "different")
        assert isinstance(beyond[0], RowFault)
        assert beyond[0].reason == "refused"
    else:
        with pytest.raises(ValueError):
            json.loads(verdict.text)  # the schema is ignored without a word


def test_an_unknown_model_is_a_fault_or_is_not_noticed(server: tuple[str, str, str], client: Make, ask: Make) -> None:
    kind, url, _ = server

    (answer,) = client(url, timeout_s=200.0).complete([ask("Say hello.", model="no-such-model", max_tokens=4)])

    if kind == "xllamacpp":
        assert isinstance(answer, Completion)
    else:
        assert isinstance(answer, RowFault)
        assert answer.reason == "refused"
