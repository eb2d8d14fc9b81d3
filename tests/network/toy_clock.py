"""A module of fedzo on a machine whose clock is wrong: ``toy_clock.py SECONDS python -P -m MODULE ...``."""

from __future__ import annotations

import datetime
import runpy
import sys
from typing import Any

from flwr.supernode import node_auth_http_interceptor


def main() -> None:
    """Run the module; what its SuperNode signs is so many seconds ahead."""
    seconds, module, arguments = float(sys.argv[1]), sys.argv[5], sys.argv[6:]
    signing: Any = node_auth_http_interceptor
    right = signing.now
    signing.now = lambda: right() + datetime.timedelta(seconds=seconds)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
