"""A local federation of the toy apps: ``toy_run.py RUN_DIR CLIENTS``; started by tests to be stopped."""

from __future__ import annotations

import sys
from pathlib import Path

from fedzo.runtime.config import LocalConfig
from fedzo.runtime.local import run_local
from fedzo.runtime.net import launch, server_process

HERE = Path(__file__).parent

if __name__ == "__main__":
    server_process.SERVE = [sys.executable, str(HERE / "toy_serve.py")]
    launch.EXECUTOR = [sys.executable, str(HERE / "toy_executor.py")]
    run_local(num_clients=int(sys.argv[2]), run_dir=Path(sys.argv[1]), config=LocalConfig())
