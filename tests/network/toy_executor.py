"""The warm executor with the toy ClientApp; started by tests as a program."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit" / "runtime"))

from toy_federation import client_app

from fedzo.runtime.net.executor import main

if __name__ == "__main__":
    main(app=client_app)
