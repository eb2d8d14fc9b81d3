"""The command ``fedzo``. What needs torch, Flower or Hydra is imported by the command that uses it."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import fedzo
from fedzo.cli.arguments import Handler
from fedzo.cli.models import add_model_commands
from fedzo.cli.output import forgiving_output
from fedzo.cli.runs import add_machine_commands, add_run_commands
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

        if "no locator available" in str(error):  # Numba's words, at the import of what uses it
            told = "compiled kernels must be kept somewhere, but there is no folder that this user can write into"
            print(f"fedzo {arguments.command}: {told}. Set NUMBA_CACHE_DIR to one.", file=sys.stderr)
            return BAD_INPUT
        if not is_out_of_memory(error):
            raise
        said = printable(str(error) or type(error).__name__, most=200).rstrip(".")
        remedy = "Free some, write a small model.tokens_per_batch, such as 1024, or model.dtype=bfloat16."
        print(f"fedzo {arguments.command}: out of memory ({said}). {remedy}", file=sys.stderr)
        return RUN_FAILED
    except KeyboardInterrupt as stop:
        run = getattr(arguments, "run", None)
        command = stop.args[0] if stop.args else shell("fedzo resume", run) if run else ""
        hint = f" Continue with: {command}" if arguments.resumable and command else ""
        print(f"\nfedzo: interrupted.{hint}", file=sys.stderr)
        return INTERRUPTED


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
