"""Rounds of Flower as it comes, for ``run.py``: its SuperLink, SuperNodes and processes, without TLS and keys."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from fedzo.runtime._flower import ENVIRONMENT
from fedzo.runtime.net.addresses import accepts, free_ports

APP = Path(__file__).parent / "stock-app"
TIMEOUT_S = 600.0


def stock_rounds(folder: Path, *, clients: int, rounds: int) -> list[float]:
    """Seconds of each round of ``stock-app``, in which a client computes two forwards of the embedded model.

    Raises:
        SystemExit: The run did not end within ten minutes.
    """
    link, *nodes = free_ports(1 + clients)
    address, out = f"127.0.0.1:{link}", folder / "seconds.json"
    (folder / "config.toml").write_text(f'[superlink.here]\naddress = "{address}"\ninsecure = true\n')
    environment = {**os.environ, **ENVIRONMENT, "FLWR_HOME": str(folder), "HF_HUB_OFFLINE": "1"}
    with ExitStack() as running, (folder / "flower.log").open("w") as log:

        def start(*command: str) -> subprocess.Popen[bytes]:
            process = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)
            running.callback(process.wait)
            running.callback(process.terminate)
            return process

        start("flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(link))
        wait_for(lambda: accepts(address), folder)
        for port in nodes:
            start("flower-supernode", "--insecure", "--superlink", address, "--port", str(port))
        settings = f'out="{out}" clients={clients} rounds={rounds}'
        if start("flwr", "run", str(APP), "here", "--run-config", settings).wait():
            raise failed(folder)
        wait_for(out.exists, folder)
    found: list[float] = json.loads(out.read_text())
    return found


def wait_for(ready: Callable[[], bool], folder: Path) -> None:
    ends = time.monotonic() + TIMEOUT_S
    while not ready():
        if time.monotonic() > ends:
            raise failed(folder)
        time.sleep(0.1)


def failed(folder: Path) -> SystemExit:
    return SystemExit("\n".join(["stock Flower did not come to an end:", (folder / "flower.log").read_text()]))
