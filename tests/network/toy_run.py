"""A local federation of the toy apps: ``toy_run.py RUN_DIR CONFIG_JSON``; started by tests to be stopped."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit" / "runtime"))

from toy_federation import server_app

from fedzo.runtime.config import LocalConfig
from fedzo.runtime.local import run_local

if __name__ == "__main__":
    run_config = {"run-dir": sys.argv[1], "config": sys.argv[2]}
    executor = [sys.executable, str(Path(__file__).with_name("toy_executor.py"))]
    run_local(server_app, num_clients=2, run_config=run_config, config=LocalConfig(), executor=executor)
