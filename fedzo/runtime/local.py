"""A federation on this machine as it is deployed: a real SuperLink and a SuperNode a client, loopback only.

The server runs in the caller's process, where it takes the run's ServerApp task from the SuperLink: its errors arrive
with their type, progress shows, Ctrl-C works. A client is two processes, a SuperNode and its warm executor.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import httpx
from flwr.serverapp import Grid, ServerApp

import fedzo
from fedzo.errors import ProtocolError
from fedzo.run.apps import CONFIG_KEY, RUN_DIR_KEY
from fedzo.runtime._flower import ENVIRONMENT, GuardedGrid, RegisteredGrid, in_order, one_federation, quiet_flower
from fedzo.runtime.config import LocalConfig
from fedzo.runtime.net._flower_http import RunNotRunningException, RuntimeApi, TaskType, server_task
from fedzo.runtime.net.processes import Processes, accepts, free_ports
from fedzo.system import usable_cpus

PYTHON = (sys.executable, "-P")  # -P: no module is taken from the folder that the user happens to be in
EXECUTOR = (*PYTHON, "-m", "fedzo.runtime.net.executor")
RESTARTS = 3
CLIENT_SHIM = '''"""Flower ClientApp entry point."""

from fedzo.run.apps import make_client_app

app = make_client_app()
'''
SERVER_SHIM = '''"""Flower ServerApp entry point."""

from fedzo.run.apps import make_server_app

app = make_server_app()
'''
FILES = {
    "clients/__init__.py": '"""What Flower loads on a client site."""\n',
    "clients/app.py": CLIENT_SHIM,
    "server/__init__.py": '"""What Flower loads on the server."""\n',
    "server/app.py": SERVER_SHIM,
}
"""What ``flwr run`` ships beside a project file: two shims, nothing of the library. A site runs the fedzo that it
installed itself. ``clients/app.py`` and ``server/app.py`` of the repository hold the same text."""


def run_local(
    server_app: ServerApp,
    *,
    num_clients: int,
    run_config: Mapping[str, str],
    config: LocalConfig,
    executor: Sequence[str] = EXECUTOR,
) -> None:
    """Run a federation over the network of this machine; what the server raises, this raises.

    Args:
        server_app: Runs in this process.
        num_clients: Number of clients, indexed from 0.
        run_config: Given to both apps; ``run-dir`` is also where ``logs/`` goes.
        config: Time limits.
        executor: Program that serves a SuperNode; only tests give another.

    Raises:
        ConfigError: Another federation runs in this process.
        ProtocolError: A process did not start, or ended too often; with the end of its log.
    """
    with (
        one_federation(),
        quiet_flower(),
        tempfile.TemporaryDirectory(prefix="fedzo-") as temporary,
        Processes(
            Path(run_config["run-dir"]) / "logs", environment=_environment(Path(temporary), num_clients)
        ) as processes,
    ):
        folder = Path(temporary)
        superlink, *nodes = [f"127.0.0.1:{port}" for port in free_ports(1 + num_clients)]
        secret_file = folder / "secret"
        secret_file.write_text(secrets.token_hex(32), encoding="ascii")  # in a folder that only this user can enter
        _start(processes, superlink, nodes, secret_file=secret_file, config=config, executor=executor)
        travels = {key: value for key, value in run_config.items() if key != RUN_DIR_KEY}
        _submit(processes, folder, superlink, travels, timeout_s=config.startup_s)
        with RuntimeApi(superlink, secret_file.read_bytes()).tasks(TaskType.SERVER_APP) as take:
            token = take()
        if token is None:
            raise ProtocolError(f"SuperLink: it must have a task for the submitted run.\n{processes.tail('superlink')}")
        try:
            with server_task(superlink, token) as (grid, context):
                processes.wait_until(
                    lambda: len(list(grid.get_node_ids())) >= num_clients,
                    what=f"{num_clients} SuperNodes connected",
                    timeout_s=config.startup_s,
                    log_of="supernode-0",
                )
                context.run_config = dict(run_config)
                guarded = cast(Grid, GuardedGrid(grid, processes.check))
                registered = RegisteredGrid(guarded, in_order(guarded, num_clients))
                server_app(grid=cast(Grid, registered), context=context)
        except httpx.HTTPError as error:
            processes.check()
            raise ProtocolError(f"SuperLink: it must answer, but: {error}.\n{processes.tail('superlink')}") from error
        except RunNotRunningException as error:
            raise ProtocolError("SuperLink: the run must be running, but somebody has stopped it.") from error


def _start(
    processes: Processes,
    superlink: str,
    nodes: list[str],
    *,
    secret_file: Path,
    config: LocalConfig,
    executor: Sequence[str],
) -> None:
    """Start the executors, which take longest, then the SuperLink, and when that listens, the SuperNodes."""
    parent = str(os.getpid())
    isolated = ["--insecure", "--isolation", "process", "--superexec-auth-secret-file", str(secret_file)]
    processes.start("superlink", [*_daemon("superlink"), *isolated, *_listen(superlink)], ends_last=True)
    for client, node in enumerate(nodes):
        command = [*executor, "--runtime-api-address", node, "--secret-file", str(secret_file), "--parent-pid", parent]
        processes.start(f"executor-{client}", [*command, "--step-limit-s", str(config.step_limit_s)], restarts=RESTARTS)
    processes.wait_until(
        lambda: accepts(superlink), what="the SuperLink listening", timeout_s=config.startup_s, log_of="superlink"
    )
    for client, node in enumerate(nodes):
        place = ["--superlink", superlink, "--node-config", f"partition-id={client} num-partitions={len(nodes)}"]
        command = [*_daemon("supernode"), *isolated, *_listen(node), *place]
        processes.start(f"supernode-{client}", command, restarts=RESTARTS)


def _submit(
    processes: Processes, folder: Path, superlink: str, run_config: Mapping[str, str], *, timeout_s: float
) -> None:
    """Send the bundle and the run's configuration with Flower's own command, as a user of a real deployment does."""
    bundle, overrides = folder / "fedzo", folder / "run.toml"
    write_bundle(bundle)
    # a JSON string is a TOML string as long as no character is escaped as a pair of surrogates
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in run_config.items()]
    overrides.write_text("".join(lines), encoding="utf-8")
    flwr = [*PYTHON, "-c", "from flwr.cli.app import app; app()", "run", str(bundle), "fedzo"]
    connection = f'[superlink]\ndefault = "fedzo"\n\n[superlink.fedzo]\naddress = "{superlink}"\ninsecure = true\n'
    home = folder / "flwr"
    home.mkdir(exist_ok=True)
    (home / "config.toml").write_text(connection, encoding="utf-8")
    try:
        done = subprocess.run(
            [*flwr, "--run-config", str(overrides), "--format", "json"],
            env=_environment(folder, num_clients=1),
            capture_output=True,
            encoding="utf-8",
            timeout=timeout_s,
            check=False,
        )
        said, accepted = done.stdout + done.stderr, '"success": true' in done.stdout
    except subprocess.TimeoutExpired as error:
        said, accepted = str(error), False
    processes.log_path("flwr-run").write_text(said, encoding="utf-8")
    if not accepted:
        processes.check()
        raise ProtocolError(f"flwr run: the SuperLink must accept the run, but did not:\n{processes.tail('flwr-run')}")


def _environment(folder: Path, num_clients: int) -> dict[str, str]:
    """This process's environment, with a Flower home of the run's own and this very fedzo first on the path.

    Clients, who work at the same time, share the CPUs among them.
    """
    share = {"OMP_NUM_THREADS": str(max(1, usable_cpus() // num_clients))}
    package = str(Path(fedzo.__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")]))
    return {**share, **os.environ, **ENVIRONMENT, "FLWR_HOME": str(folder / "flwr"), "PYTHONPATH": path}


def _daemon(kind: str) -> list[str]:
    return [*PYTHON, "-m", "fedzo.runtime.net.daemons", kind, str(os.getpid())]


def _listen(address: str) -> list[str]:
    host, port = address.rsplit(":", 1)
    return ["--host", host, "--port", port]


def write_bundle(folder: Path) -> None:
    """Write the bundle's source tree into a new folder, ready for ``flwr run``."""
    project = (
        f'[project]\nname = "fedzo"\nversion = "{fedzo.__version__}"\n'
        'description = "Entry points of fedzo for Flower"\nlicense = "Apache-2.0"\ndependencies = []\n\n'
        '[tool.flwr.app]\npublisher = "fedzo"\n\n'
        '[tool.flwr.app.components]\nserverapp = "server.app:app"\nclientapp = "clients.app:app"\n\n'
        f'[tool.flwr.app.config]\n{CONFIG_KEY} = ""\n'  # Flower takes only declared keys
    )
    for name, text in {**FILES, "pyproject.toml": project}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
