"""The reverse proxy that `fedzo server init` writes: nginx itself, between a SuperLink and a site."""

from __future__ import annotations

import getpass
import shutil
import ssl
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from fedzo.commands.replay import replay_run
from fedzo.commands.server import SERVICES, fill
from fedzo.runtime.net.addresses import accepts, free_ports, split_address
from fedzo.runtime.net.gate import HOLD_S

pytestmark = [pytest.mark.net, pytest.mark.timeout(240)]


def test_a_site_passes_the_proxy_and_nothing_else_does(federation: Callable[..., Any], tmp_path: Path) -> None:
    nginx = shutil.which("nginx")
    if nginx is None:
        pytest.skip("needs nginx, which is not installed here")
    (port,) = free_ports(1)
    at = federation(1, gateway=port)
    fill(at.server.path, SERVICES, port=split_address(at.server.listening.listen)[1], public_port=port)

    with _running(nginx, tmp_path / "nginx", at.server.path / "nginx.conf"):
        at.wait_for(lambda: accepts(f"127.0.0.1:{port}"))
        at.sites[0].start()
        at.wait_for(lambda: "connected as node" in at.sites[0].said("supernode"))

        context = ssl.create_default_context(cafile=str(at.server.path / "ca.crt"))
        with httpx.Client(verify=context, base_url=f"https://127.0.0.1:{port}") as client:
            for path in ("/v1/control/list-runs", "/v1/runtime/acquire-task", "/v1/fleet/../control/list-runs", "/"):
                assert client.post(path).status_code == 404, path
            assert client.post("/v1/fleet/pull-messages", content=b"0" * (17 << 20)).status_code == 413

        # --- messages and their parts pass: a run trains; a question for work is held as long as without a proxy
        training = at.train("run", "fl.num_clients=1", "fl.rounds=1000", "strategy.deadline_s=30")
        at.wait_for_round("run", 4)
        assert {"activate-node", "pull-messages", "pull-object", "push-messages"} <= set(passed(tmp_path / "nginx"))
        assert at.fedzo("stop", str(at.folder / "run"), output="stop").wait(120) == 0
        assert training.wait(120) == 130
        assert replay_run(at.folder / "run")["rounds"] == len(at.rounds("run"))
        at.wait_for(lambda: max(passed(tmp_path / "nginx").get("pull-messages", [0.0])) > HOLD_S - 1)
        assert [line["attendance"] for line in at.rounds("run")] == [[0]] * len(at.rounds("run"))


def passed(nginx: Path) -> dict[str, list[float]]:
    """The calls of nodes that went through the proxy and were answered well: how many seconds each took."""
    calls: dict[str, list[float]] = {}
    for line in (nginx / "access.log").read_text().splitlines():
        path, status, seconds = line.split()
        if status == "200":
            calls.setdefault(path.removeprefix("/v1/fleet/"), []).append(float(seconds))
    return calls


@contextmanager
def _running(nginx: str, folder: Path, site: Path) -> Iterator[None]:
    folder.mkdir()
    main = folder / "main.conf"
    main.write_text(
        f"user {getpass.getuser()}; daemon off; pid {folder}/pid; events {{}}\n"
        f"http {{ log_format short '$uri $status $request_time'; access_log {folder}/access.log short; "
        f"client_body_temp_path {folder}; include {site}; }}\n"
    )
    process = subprocess.Popen([nginx, "-p", str(folder), "-c", str(main), "-e", str(folder / "errors.log")])
    try:
        yield
    finally:
        process.terminate()
        process.wait(10)
