"""The server of a toy federation as a process of its own: ``toy_serve.py SERVER_DIR RUN_DIR PARENT_PID``.

Its configuration is ``toy.json`` of the run folder, and its app that of ``toy_federation``, or of the module that the
variable ``TOY_SERVER`` names.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from pathlib import Path

from fedzo.runtime.net.processes import watch_parent
from fedzo.runtime.net.serve import serve
from fedzo.runtime.net.server_folder import ServerFolder
from fedzo.runtime.net.server_process import INTERRUPTED, write_outcome

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "unit" / "runtime"), str(Path(__file__).parent)]


def main() -> int:
    """Serve; how it ended is left in the run folder."""
    server_dir, run_dir, parent_pid = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    os.environ["TOY_ROOT"] = parent_pid
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    watch_parent(int(parent_pid))
    app = importlib.import_module(os.environ.get("TOY_SERVER", "toy_federation")).server_app
    run_config = {"config": (run_dir / "toy.json").read_text(), "run-dir": str(run_dir)}
    try:
        serve(app, folder=ServerFolder(server_dir), run_config=run_config)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        return write_outcome(run_dir, error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
