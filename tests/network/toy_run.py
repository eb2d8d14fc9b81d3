"""A local federation of the toy apps: ``toy_run.py RUN_DIR CLIENTS``; started by tests to be stopped."""

from __future__ import annotations

import sys
from pathlib import Path

from fedzo.runtime.config import LocalConfig
from fedzo.runtime.local import run_local

HERE = Path(__file__).parent
SERVE = [sys.executable, str(HERE / "toy_serve.py")]
EXECUTOR = [sys.executable, str(HERE / "toy_executor.py")]

if __name__ == "__main__":
    run_local(
        num_clients=int(sys.argv[2]), run_dir=Path(sys.argv[1]), config=LocalConfig(), serve=SERVE, executor=EXECUTOR
    )
