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

from fedzo.commands.server import SERVICES, fill
from fedzo.runtime.net.processes import accepts, free_ports
from fedzo.runtime.net.server_folder import split_address

pytestmark = [pytest.mark.net, pytest.mark.timeout(120)]


def test_a_site_passes_the_proxy_and_nothing_else_does(federation: Callable[..., Any], tmp_path: Path) -> None:
    nginx = shutil.which("nginx")
    if nginx is None:
        pytest.skip("needs nginx, which is not installed here")
    (port,) = free_ports(1)
    at = federation(1, gateway=port)
    fill(at.server.path, SERVICES, port=split_address(at.server.listening.listen)[1], public_port=port)

    with _running(nginx, tmp_path / "nginx", at.server.path / "nginx.conf"):
        at.wait_for(lambda: accepts(f"127.0.0.1:{port}"))
        at.sites[0].start(answers=False)
        at.wait_for(lambda: "connected as node" in at.sites[0].said("supernode"))

        context = ssl.create_default_context(cafile=str(at.server.path / "ca.crt"))
        with httpx.Client(verify=context, base_url=f"https://127.0.0.1:{port}") as client:
            for path in ("/v1/control/list-runs", "/v1/runtime/acquire-task", "/v1/fleet/../control/list-runs", "/"):
                assert client.post(path).status_code == 404, path
            assert client.post("/v1/fleet/pull-messages", content=b"0" * (17 << 20)).status_code == 413


@contextmanager
def _running(nginx: str, folder: Path, site: Path) -> Iterator[None]:
    folder.mkdir()
    main = folder / "main.conf"
    main.write_text(
        f"user {getpass.getuser()}; daemon off; pid {folder}/pid; events {{}}\n"
        f"http {{ access_log off; client_body_temp_path {folder}; include {site}; }}\n"
    )
    process = subprocess.Popen([nginx, "-p", str(folder), "-c", str(main), "-e", str(folder / "errors.log")])
    try:
        yield
    finally:
        process.terminate()
        process.wait(10)
