"""The server of a run as a process of its own, and how it tells whoever started it how it ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from fedzo import errors
from fedzo.errors import FedzoError, ProtocolError, RunFolderError, shell
from fedzo.records.decode import read_record, to_json
from fedzo.records.folder import make_folder, open_file, replace_file
from fedzo.records.presence import OUTCOME, Outcome
from fedzo.runtime.net.launch import environment
from fedzo.runtime.net.processes import python, told_status
from fedzo.system import COMMAND_ENV, command

SERVE = python("fedzo.cli.serve")
SERVER_LOG = "logs/server.log"
FAILED, UNWRITABLE, INTERRUPTED = 1, os.EX_IOERR, 130
"""Exit statuses of a server; with the second it could not even leave word, as on a full disk."""
POLL_S, CLOSE_S = 0.1, 60.0
"""How often to look whether it ended, and how long it may take to close its files when it is interrupted."""
_KINDS = {
    kind.__name__: kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, FedzoError)
}


def write_outcome(run_dir: Path, error: BaseException) -> int:
    """Leave word of an error for whoever started this process; returns the status to exit with."""
    kinds = [kind.__name__ for kind in type(error).__mro__]
    known = next((name for name in kinds if name in _KINDS), kinds[0])  # the nearest that the other process knows
    outcome = Outcome(error=known, text=str(error)[: 1 << 20])
    try:
        replace_file(run_dir / OUTCOME, to_json(outcome))
    except OSError:
        return UNWRITABLE
    return FAILED


class ServerProcess:
    """A run's server that this process has started.

    Args:
        run_dir: The run folder, which says what the run is.
        server_dir: The server's folder.
        detached: Let it go on when this process ends, with its output in a file of the run folder.

    Raises:
        RunFolderError: That file, or its folder, is a link.
    """

    def __init__(self, run_dir: Path, server_dir: Path, *, detached: bool = False) -> None:
        self._run_dir = run_dir
        make_folder(run_dir / "logs")
        (run_dir / OUTCOME).unlink(missing_ok=True)
        arguments = [*SERVE, str(server_dir), str(run_dir), "0" if detached else str(os.getpid())]
        output = open_file(run_dir, SERVER_LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT) if detached else None
        try:
            self._process = subprocess.Popen(
                arguments,
                env={**environment(), COMMAND_ENV: json.dumps(command())},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=None if output is None else subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in a terminal reaches this process alone, which passes it on
            )
        finally:
            if output is not None:
                os.close(output)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def wait(self, meanwhile: Callable[[], None]) -> None:
        """Wait until it ends; what it raises, this raises.

        Args:
            meanwhile: Called again and again; what it raises ends the server, too.

        Raises:
            SystemExit: By ``meanwhile`` or a signal's handler; the server goes on.
            KeyboardInterrupt: This process, or the server, was interrupted; the server has closed its files.
        """
        try:
            while self._process.poll() is None:
                meanwhile()
                time.sleep(POLL_S)
        except SystemExit:  # this process is to end, and not the run
            raise
        except BaseException:
            self.interrupt()
            raise
        code = self._process.returncode
        if code == INTERRUPTED or -code in (signal.SIGINT, signal.SIGTERM):
            raise KeyboardInterrupt
        if code != 0:
            raise self._error(code)

    def interrupt(self) -> None:
        """Have it end as by Ctrl-C; by force if it does not."""
        if self._process.poll() is None:
            self._process.terminate()  # which it takes as Ctrl-C; a shell's background jobs are deaf to that itself
        try:
            self._process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _error(self, code: int) -> FedzoError:
        again = shell("fedzo resume", self._run_dir)
        if code == UNWRITABLE:
            return RunFolderError(
                f"run folder {self._run_dir}: it must be writable, but the run's server could not write. Is its disk "
                f"full? Make room, and continue with `{again}`."
            )
        outcome = read_record(Outcome, self._run_dir, OUTCOME, error=ProtocolError)
        if outcome is None:
            return ProtocolError(
                f"the run's server ended with status {told_status(code)} without a message. See "
                f"{self._run_dir / 'fedzo.log'}, then `{again}`."
            )
        return _KINDS.get(outcome.error, ProtocolError)(outcome.text)
