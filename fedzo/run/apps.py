"""The Flower apps of fedzo: the same ServerApp and ClientApp on every runtime.

The composed configuration travels as one JSON string: in the run configuration where Flower gives it to both sides, in
the environment where it does not (Ray's clients).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from flwr.app import Context, Message, MessageType
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedzo.errors import ConfigError
from fedzo.fl.client.worker import log_failure
from fedzo.fl.messages import (
    ArtifactPiece,
    EvaluateRequest,
    Hello,
    HelloReply,
    Refusal,
    TrainRequest,
    decode,
    encode,
)
from fedzo.fl.site_limits import SiteError, as_site_error
from fedzo.system import is_out_of_memory
from fedzo.trainers.artifacts import ARTIFACTS

CONFIG_KEY, RUN_DIR_KEY = "config", "run-dir"
CONFIG_ENV, RUN_DIR_ENV = "FEDZO_CONFIG", "FEDZO_RUN_DIR"
R = TypeVar("R")


def run_config(run_json: str, run_dir: Path) -> dict[str, str]:
    """The run configuration of Flower's that the apps read: what the peers agreed on, and the server's run folder."""
    return {CONFIG_KEY: run_json, RUN_DIR_KEY: str(run_dir)}


def make_client_app() -> ClientApp:
    """The ClientApp: registers, trains, evaluates. One model a process, however many clients it plays."""
    app = ClientApp()

    @app.query("hello")
    def hello(message: Message, context: Context) -> Message:
        with _asked(Hello, message) as request:
            from fedzo.run.process import leave_other, read_anew  # slow to import

            try:
                if not request.begun:
                    leave_other(context.run_id)
                    if request.why:  # the server does not take what this process holds, which may be mended by now
                        read_anew()
                answer = _worker(context).hello(request)
            except (ConfigError, SiteError) as error:  # of its limits, its model, its files
                if is_out_of_memory(error):
                    raise  # there may be room when it is asked again
                log_failure(request.client, error)
                refusal = error.refusal if isinstance(error, SiteError) else Refusal.site
                answer = HelloReply(config_hash=request.config_hash, refusal=refusal)
            if answer.refusal is not Refusal.none and not request.begun:
                read_anew()  # what was refused may be mended before it is asked again
            return _reply(message, answer)

    @app.query("artifact")
    def artifact(message: Message, context: Context) -> Message:
        with _asked(ArtifactPiece, message) as piece:
            return _reply(message, _worker(context).receive(piece))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        with _asked(TrainRequest, message) as request:
            return _reply(message, _worker(context).train(request))

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        with _asked(EvaluateRequest, message) as request:
            return _reply(message, _worker(context).evaluate(request))

    return app


@contextmanager
def _asked(kind: type[R], message: Message) -> Iterator[R]:
    """A request. What fails is told at the site in full, and to the server as a number and a sentence (``Refusal``)."""
    client = None
    try:
        request: Any = decode(kind, message.content)
        client = request.client
        yield request
    except Exception as error:
        refused = as_site_error(error)
        if refused.details or error is not refused:
            log_failure(client, error)
            if refused.refusal is Refusal.memory:  # whose details say what to do
                log_failure(client, refused)
        raise refused from None


def look_ahead(messages: list[tuple[Message, Context]]) -> None:
    """Let this process's worker take the steps of all clients that are asked to train together."""
    requests = [
        decode(TrainRequest, message.content)
        for message, _ in messages
        if message.metadata.message_type == MessageType.TRAIN
    ]
    if requests:
        _worker(messages[0][1]).look_ahead({request.client: request for request in requests})


def make_server_app() -> ServerApp:
    """The ServerApp: runs the whole federation of the configuration in its run folder."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        from fedzo.run.federation import run_federation

        run_federation(
            grid, _setting(context, CONFIG_KEY, CONFIG_ENV), Path(_setting(context, RUN_DIR_KEY, RUN_DIR_ENV))
        )

    return app


def _worker(context: Context) -> Any:
    from fedzo.run.process import this_process

    # only Ray's actors, which work on the server's machine, find the run folder in the environment
    run_dir = os.environ.get(RUN_DIR_ENV)
    artifacts = Path(run_dir) / ARTIFACTS if run_dir else None
    run_json = _setting(context, CONFIG_KEY, CONFIG_ENV)
    return this_process(run_json, flower_run=context.run_id, artifacts=artifacts).client.worker


def _reply(message: Message, answer: object) -> Message:
    return Message(encode(answer), reply_to=message)


def _setting(context: Context, key: str, variable: str) -> str:
    value = str(context.run_config.get(key) or os.environ.get(variable, ""))
    if not value:
        raise ConfigError(f"run configuration: {key!r} must be set. Start runs with `fedzo train`.")
    return value


client_app = make_client_app()
server_app = make_server_app()
