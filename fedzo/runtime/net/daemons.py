"""Flower's SuperLink or SuperNode as a child of fedzo: ``python -m fedzo.runtime.net.daemons KIND PARENT_PID ...``.

The programs are Flower's own. Added is that they end with their parent, that a SuperNode asks for work sooner, and
that a SuperLink listens twice: for this machine with all APIs, and for sites behind the gate.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedzo.runtime.net.addresses import bound, split_address
from fedzo.runtime.net.processes import watch_parent
from fedzo.runtime.net.server_folder import ServerFolder

if TYPE_CHECKING:
    import uvicorn

SUPERNODE_POLL_S = 0.05
NODE_LEASE_S = 40.0
"""How long after its last word a SuperNode counts as connected. Half as long, and the words of 200 nodes alone would
keep a SuperLink half busy."""
STARTED, CONNECTED, REFUSED = "this SuperNode has just started", "connected as node", "the server refused"
SILENT, HEARD = "the server does not answer", "the server answers again"
"""With what a SuperNode's log tells that it is a new one, that it was let in, or not, and that the server is silent, or
is not any more; `fedzo client up` and `fedzo status` look for it."""
LATE = "a part of a reply took too long to arrive"
"""What the server may refuse of a site that stays connected."""
LOOK_S = 2.0
"""How often a SuperLink looks whether its certificate was renewed."""
log = logging.getLogger("fedzo.runtime.net.daemons")  # run by -m it is `__main__`, and no child of fedzo's


def main() -> None:
    """Become the daemon that the command line names."""
    kind, parent_pid, *arguments = sys.argv[1:]
    watch_parent(int(parent_pid))
    os.umask(0o077)  # Flower's database holds tokens
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger("fedzo").addHandler(handler)
    if kind == "superlink":
        _superlink(ServerFolder(Path(arguments[0])))
    else:
        log.warning(STARTED)  # the first, so that one that ends at once is seen, too
        from flwr.supernode.cli.flower_supernode import flower_supernode

        from fedzo.runtime.net._flower_daemons import quicken

        quicken(SUPERNODE_POLL_S, NODE_LEASE_S)
        sys.argv = ["flower-supernode", *arguments]
        flower_supernode()


def _superlink(folder: ServerFolder) -> None:
    from fedzo.runtime.net._flower_daemons import superlink

    host, port = split_address(folder.listening.control)
    sys.argv = [
        "flower-superlink",
        *("--host", host, "--port", str(port), "--database", str(folder.file("superlink.db"))),
        *("--ssl-ca-certfile", str(folder.file("ca.crt")), "--ssl-certfile", str(folder.file("server.crt"))),
        *("--ssl-keyfile", str(folder.file("server.key")), "--enable-supernode-auth"),
        *("--isolation", "process", "--superexec-auth-secret-file", str(folder.file("secret"))),
    ]
    superlink(lambda app, **settings: _serve(folder, app, **settings))


def _serve(folder: ServerFolder, app: Any, **settings: Any) -> None:
    """Serve Flower's app on both addresses, which is what Flower's own call would do on one."""
    import uvicorn

    from fedzo.runtime.net.gate import Gate

    listening = folder.listening
    _, public_port = split_address(listening.listen)
    gate = Gate(app, public_port=public_port, folder=folder)

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            gate.end()
            await super().shutdown(sockets)

    config = web_config(gate, **settings)
    config.load()
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # a stranger's malformed requests would fill the disk
    watch = threading.Thread(target=_renew, args=(folder, config), name="renew-certificate", daemon=True)
    watch.start()
    sockets = [bound(listening.control), bound(listening.listen)]
    Server(config).run(sockets=sockets)


def web_config(app: Any, *, ssl_certfile: Any, ssl_keyfile: Any, log_config: Any, **_: Any) -> uvicorn.Config:
    """How requests are served, with these of Flower's settings."""
    import uvicorn

    return uvicorn.Config(
        app,
        ssl_certfile=ssl_certfile,
        ssl_keyfile=ssl_keyfile,
        log_config=log_config,
        access_log=False,
        proxy_headers=False,  # who asks is who connected: a header would let him choose his address
        ws="none",
        server_header=False,
        workers=1,
    )


def _renew(folder: ServerFolder, config: Any) -> None:
    """Take a renewed certificate up, for the connections that begin from then on."""
    files: Sequence[Path] = [folder.file("server.crt"), folder.file("server.key")]
    before = [file.stat().st_mtime_ns for file in files]
    while True:
        time.sleep(LOOK_S)
        try:
            now = [file.stat().st_mtime_ns for file in files]
            if now != before:
                config.ssl.load_cert_chain(*files)
                before = now
                log.warning("the certificate was renewed")
        except OSError as error:  # the certificate is written after its key: the next look finds both
            log.warning("the certificate cannot be renewed yet: %s", error)


if __name__ == "__main__":
    main()
