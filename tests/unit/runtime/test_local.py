"""What ``runtime=local`` gives its parts; the parts themselves are tested over the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedzo.runtime import local
from fedzo.runtime.config import LocalConfig
from fedzo.runtime.net import launch


def test_no_two_parts_get_the_same_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel may give a port again that was let go, so all are taken at once."""
    ports = []

    class Server:
        def __init__(self, *_: object, **__: object) -> None: ...
        def interrupt(self) -> None: ...

    def site(_: object, site: Any) -> None:
        ports.append(site.port)

    def superlink(_: object, folder: Any, **__: object) -> None:
        ports.extend(int(address.rsplit(":", 1)[1]) for address in (folder.listening.listen, folder.listening.control))

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for module in (local, launch):
        monkeypatch.setattr(module, "free_ports", lambda count: [*range(5000, 5000 + count)])
    monkeypatch.setattr(local, "ServerProcess", Server)
    monkeypatch.setattr(local, "start_superlink", superlink)
    monkeypatch.setattr(local, "start_executor", site)
    monkeypatch.setattr(local, "wait_for_superlink", stop)

    with pytest.raises(KeyboardInterrupt):
        local.run_local(num_clients=5, run_dir=tmp_path, config=LocalConfig())

    assert sorted(ports) == [*range(5000, 5007)]
