"""The server of a run as a process of its own: ``python -m fedzo.cli.serve SERVER_DIR RUN_DIR PARENT_PID``.

``fedzo train`` and ``fedzo resume`` start it where clients are reached over a network. With a parent it ends with it;
with 0 instead it goes on when whoever started it has ended.
"""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path

from fedzo.cli import INTERRUPTED
from fedzo.cli.output import forgiving_output
from fedzo.cli.train import log_to
from fedzo.errors import FedzoError, shell
from fedzo.system import quiet_libraries

log = logging.getLogger(__name__)


def main() -> int:
    """Serve the run; how it ended is left in its folder. SIGTERM and SIGINT end it as Ctrl-C does."""
    server_dir, run_dir, parent_pid = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    from fedzo.runtime.net.processes import watch_parent
    from fedzo.runtime.net.server_process import write_outcome

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are deaf to it
    if parent_pid:
        watch_parent(parent_pid)
    quiet_libraries()
    with forgiving_output():  # which may be the pipe or the full disk of whoever started it
        log_to(run_dir)
        try:
            from fedzo.commands.train import serve_run

            serve_run(run_dir, server_dir)
        except KeyboardInterrupt:
            log.info("interrupted. Continue with: %s", shell("fedzo resume", run_dir))
            return INTERRUPTED
        except FedzoError as error:
            return write_outcome(run_dir, error)
        except Exception as error:
            log.exception("the server failed")
            return write_outcome(run_dir, error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
