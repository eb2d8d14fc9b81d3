"""The command ``fedzo``. What needs torch, Flower or Hydra is imported by the command that uses it."""

from __future__ import annotations

import argparse
import errno
import io
import os
import signal
import stat
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fedzo
from fedzo.cli.arguments import Handler
from fedzo.cli.commands import add_machine_commands, add_run_commands
from fedzo.cli.models import add_model_commands
from fedzo.cli.sites import add_site_commands
from fedzo.errors import ConfigError, FedzoError, printable, shell, without_escapes
from fedzo.system import keep_loopback_direct, package_problems, quiet_libraries

RUN_FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 failed, 2 bad input (nothing was started), 130 interrupted."""
    if os.name == "nt":
        print("fedzo: it must run on a POSIX system, got Windows. Install it in WSL2.", file=sys.stderr)
        return BAD_INPUT
    with forgiving_output() as output:
        code = _run(argv)
    return code or (RUN_FAILED if output.lost else 0)


def _run(argv: Sequence[str] | None) -> int:
    parser = make_parser()
    arguments, rest = parser.parse_known_args(argv)
    flags = [text for text in rest if text.startswith("-")]
    if arguments.command is None:
        parser.print_help()
        return BAD_INPUT
    if rest and not arguments.takes_overrides:
        parser.error(f"fedzo {arguments.command}: unknown argument {rest[0]!r}")
    if flags and not arguments.takes_flags:
        parser.error(f"fedzo {arguments.command}: unknown option {flags[0]!r}")
    arguments.overrides = rest
    quiet_libraries()
    keep_loopback_direct(os.environ)
    try:
        with stopped_by_signals():
            return int(arguments.handler(arguments) or 0)
    except FedzoError as error:
        print(f"fedzo: {without_escapes(error)}", file=sys.stderr)
        return BAD_INPUT if isinstance(error, ConfigError) else RUN_FAILED
    except ImportError as error:
        problems = [f"{name}: {told}" for name, told in package_problems().items()]
        if not problems:
            raise
        print("\n".join([f"fedzo {arguments.command}: {error}", *problems]), file=sys.stderr)
        return BAD_INPUT
    except (MemoryError, RuntimeError) as error:
        from fedzo.system import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        said = printable(str(error) or type(error).__name__, most=200).rstrip(".")
        remedy = "Free some, lower model.tokens_per_batch, or write model.dtype=bfloat16."
        print(f"fedzo {arguments.command}: out of memory ({said}). {remedy}", file=sys.stderr)
        return RUN_FAILED
    except KeyboardInterrupt as stop:
        run = getattr(arguments, "run", None)
        command = stop.args[0] if stop.args else shell("fedzo resume", run) if run else ""
        hint = f" Continue with: {command}" if arguments.resumable and command else ""
        print(f"\nfedzo: interrupted.{hint}", file=sys.stderr)
        return INTERRUPTED


class Output:
    """Standard output that no command fails for: what a terminal cannot show is replaced, what nobody reads is lost.

    A run goes on when its output ends in a pipe that was closed (``| head``) or at a terminal that is gone. Other
    failures, such as a full disk, are told once, and the command ends with 1.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.lost = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As a stream's."""
        try:
            self._stream.write(text)
        except OSError as error:
            self._drop(error)
        return len(text)

    def flush(self) -> None:
        """As a stream's."""
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        opened = self._stream.fileno()
        hung_up = error.errno == errno.EIO and stat.S_ISCHR(os.fstat(opened).st_mode)
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), opened)
        if not (hung_up or isinstance(error, BrokenPipeError)):
            self.lost = True
            told = f"fedzo: standard output must be writable, got {error.strerror}. Write elsewhere."
            with suppress(OSError):  # it may lead to the same place
                print(told, file=sys.stderr)


@contextmanager
def forgiving_output() -> Iterator[Output]:
    """Let ``Output`` stand for standard output."""
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        given = sys.stdout
        stream: Any = given or nowhere  # None where it was closed before the start
        output, before = Output(stream), getattr(stream, "errors", None)
        strict = before in {"strict", "surrogateescape"} and isinstance(stream, io.TextIOWrapper)
        if strict:
            stream.reconfigure(errors="replace")
        sys.stdout = output
        try:
            yield output
        finally:
            output.flush()
            sys.stdout = given
            if strict:
                stream.reconfigure(errors=before)


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP do what Ctrl-C does, unless whoever started the process made it deaf to them (``nohup``)."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may change how signals are taken
        return
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    ours = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    for number in ours:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; overrides are what it does not know."""
    parser = argparse.ArgumentParser(
        prog="fedzo",
        description=fedzo.__doc__,
        epilog="Exit codes: 0 done, 1 failed, 2 bad input (nothing was started), 130 interrupted.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fedzo {fedzo.__version__}")
    parser.set_defaults(takes_overrides=False, takes_flags=False, resumable=False)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")

    def add(name: str, handler: Handler, summary: str, *, usage: str | None = None) -> argparse.ArgumentParser:
        own = subparsers.add_parser(
            name, help=summary, description=summary, usage=usage, allow_abbrev=False, add_help=name != "train"
        )
        own.set_defaults(handler=handler)
        return own

    for add_commands in (add_run_commands, add_model_commands, add_machine_commands, add_site_commands):
        add_commands(add)
    return parser
