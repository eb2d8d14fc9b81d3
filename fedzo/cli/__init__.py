"""The command ``fedzo``. What needs torch, Flower or Hydra is imported by the command that uses it."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fedzo
from fedzo.cli import commands
from fedzo.cli.arguments import add_overrides, add_rounds, add_run, total_rounds, whole_number
from fedzo.cli.rephrase import SUMMARY as REPHRASE_SUMMARY
from fedzo.cli.rephrase import USAGE as REPHRASE_USAGE
from fedzo.cli.rephrase import add_rephrase, rephrase
from fedzo.cli.sites import add_client, add_server
from fedzo.errors import ConfigError, FedzoError, printable
from fedzo.system import keep_loopback_direct, quiet_libraries

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
            return int(arguments.handler(arguments))
    except FedzoError as error:
        print(f"fedzo: {error}", file=sys.stderr)
        return BAD_INPUT if isinstance(error, ConfigError) else RUN_FAILED
    except (MemoryError, RuntimeError) as error:
        from fedzo.models.memory import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        said = printable(str(error) or type(error).__name__, most=200).rstrip(".")
        remedy = "Free some, lower model.tokens_per_batch, or write model.dtype=bfloat16."
        print(f"fedzo {arguments.command}: the memory does not suffice ({said}). {remedy}", file=sys.stderr)
        return RUN_FAILED
    except KeyboardInterrupt as stop:
        run = getattr(arguments, "run", None)
        command = stop.args[0] if stop.args else f"fedzo resume {run}" if run else ""
        hint = f" Continue with: {command}" if arguments.resumable and command else ""
        print(f"\nfedzo: interrupted.{hint}", file=sys.stderr)
        return INTERRUPTED


class Output:
    """Standard output that no command fails for: what a terminal cannot show is replaced, what nobody reads is lost.

    A run goes on when its output ends in a pipe that was closed (``| head``). Other failures, such as a full disk, are
    told once, and the command ends with 1.
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
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())
        if not isinstance(error, BrokenPipeError):
            self.lost = True
            print(f"fedzo: standard output must be writable, got {error.strerror}. Write elsewhere.", file=sys.stderr)


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
    count, positive = whole_number(0), whole_number(1)

    def command(
        name: str, handler: commands.Handler, summary: str, *, usage: str | None = None
    ) -> argparse.ArgumentParser:
        own = subparsers.add_parser(
            name, help=summary, description=summary, usage=usage, allow_abbrev=False, add_help=name != "train"
        )
        own.set_defaults(handler=handler)
        return own

    own = command(
        "train", commands.train, "run a federation, or with -m a sweep: fedzo train [overrides] [-m] [--help]"
    )
    own.set_defaults(takes_overrides=True, takes_flags=True, resumable=True)

    own = command("resume", commands.resume, "continue a run that was stopped, or make it longer")
    add_run(own)
    more = "go on to this many rounds, more than the run was begun with; no other setting of a run can change"
    own.add_argument("rounds", metavar="fl.rounds=N", nargs="?", type=total_rounds, help=more)
    own.set_defaults(resumable=True)

    own = command("replay", commands.replay, "verify the log of a run: rebuild its model and compare every hash")
    add_run(own)
    add_rounds(own, "rounds to replay (default: all)")
    own.add_argument("--client", type=count, help="rebuild this client's local steps of --round instead")
    own.add_argument("--round", type=count, help="round of --client, from 0")
    own.add_argument("--out", metavar="FILE", help="with --client: write the values after each step (safetensors)")

    own = command("evaluate", commands.evaluate, "score a run's model on its test or dev rows")
    add_run(own)
    own.add_argument("--split", choices=("test", "dev"), default="test", help="which rows (default: test)")

    usage = "fedzo generate RUN PROMPT... | fedzo generate --model MODEL --prompts FILE [--tables FILE,FILE,...]"
    own = command("generate", commands.generate, "continue prompts with a run's model, or with a sketch", usage=usage)
    own.add_argument("run", metavar="RUN", nargs="?", help="run folder")
    own.add_argument("prompts", metavar="PROMPT", nargs="*", help="text to continue")
    own.add_argument("--model", metavar="MODEL", help="a model folder or hub name instead of a run")
    own.add_argument(
        "--prompts", dest="rows", metavar="FILE", help="rows with a column prompt, and tables of their own"
    )
    own.add_argument("--tables", metavar="FILE,...", help="of a sketch: files of fedzo export --tables, one a user")
    dtypes = ("float32", "bfloat16", "float16")
    own.add_argument("--dtype", choices=dtypes, help="with --model: of its weights (default: float32)")
    own.add_argument("--max-new-tokens", type=positive, default=32, help="longest continuation (default: 32)")

    own = command("export", commands.export, "write a run's model as a Hugging Face folder")
    add_run(own)
    own.add_argument("out", metavar="OUT", help="new folder, or new file for --tables")
    add_rounds(own, "rounds to apply (default: up to the best round)")
    form = own.add_mutually_exclusive_group()
    form.set_defaults(form="model")
    form.add_argument(
        "--tables", dest="form", action="store_const", const="tables", help="of a sketch: its trained tables alone"
    )
    form.add_argument(
        "--dense", dest="form", action="store_const", const="dense", help="of a sketch: an ordinary model of it"
    )

    own = command("report", commands.report, "write report.html again, of runs or sweeps")
    own.add_argument("runs", metavar="RUN", nargs="+", help="run or sweep folder")
    own.add_argument("--out", metavar="DIR", help="write into this folder instead (default: RUN)")
    own.add_argument("--together", metavar="DIR", help="write one page that compares these runs, into this folder")

    usage = "fedzo mask [overrides] --out FILE [--config-dir DIR]"
    own = command(
        "mask", commands.mask, "choose the weights that trainer=meerkat trains, once for many runs", usage=usage
    )
    own.add_argument("--out", metavar="FILE", required=True, help="safetensors file to write; use as inputs.artifact")
    add_overrides(own)

    usage = "fedzo sketch [overrides] --out DIR --calibration FILE [--bits B] [more options]"
    summary = "write a model as lookup tables and codes of 2 to 4 bits, for trainer=tables"
    own = command("sketch", commands.sketch, summary, usage=usage)
    own.add_argument("--out", metavar="DIR", help="new model folder; use as model=DIR")
    text = "text without labels: a .txt file, or a table with a column text"
    own.add_argument("--calibration", metavar="FILE", help=text)
    own.add_argument("--bits", type=int, metavar="B", help="bits of a code: 2, 3 or 4 (default: 4)")
    own.add_argument("--groups-per-row", type=positive, metavar="G", help="tables a row (default: 1)")
    own.add_argument("--windows", type=positive, metavar="N", help="most windows of text (default: 128)")
    own.add_argument("--tokens", type=positive, metavar="N", help="tokens of a window (default: 512)")
    own.add_argument(
        "--skip", action="append", metavar="NAME", help="end of a layer's name that stays dense; repeatable"
    )
    own.add_argument(
        "--text", metavar="FILE", help="text for the perplexity before and after (default: the calibration)"
    )
    own.add_argument("--importance-power", type=float, metavar="P", help="weight of outliers in a table (default: 4)")
    own.add_argument(
        "--damping", type=float, metavar="SHARE", help="share added to a Hessian's diagonal (default: 0.1)"
    )
    layout = "codes in LeanQuant's layout (safetensors)"
    own.add_argument("--import", dest="import_from", metavar="FILE", help=f"build it of the dense model and {layout}")
    own.add_argument(
        "--export", dest="export_to", metavar="FILE", help=f"write the sketch model=DIR as tables and {layout}"
    )
    add_overrides(own)

    add_rephrase(command("rephrase", rephrase, REPHRASE_SUMMARY, usage=REPHRASE_USAGE))

    usage = "fedzo perplexity [overrides] --text FILE [--windows N] [--tokens N] [--config-dir DIR]"
    own = command("perplexity", commands.perplexity, "how well a model predicts a text", usage=usage)
    text = "a .txt file, or a table (.jsonl, .json, .csv, .tsv, .parquet) with a column text, whose texts are joined"
    own.add_argument("--text", metavar="FILE", required=True, help=text)
    own.add_argument("--windows", type=positive, metavar="N", help="windows from the start (default: all)")
    own.add_argument("--tokens", type=positive, metavar="N", default=512, help="tokens of a window (default: 512)")
    add_overrides(own)

    usage = "fedzo bench step [overrides] [--shape SHAPE] [--rows N] [--tokens N] [--repeats N] [--out FILE]"
    own = command("bench", commands.bench, "time a step and the forwards that it consists of", usage=usage)
    own.add_argument("what", choices=("step",), help="what to measure")
    own.add_argument("--shape", metavar="SHAPE", help="random weights of a published shape, such as opt-1.3b")
    own.add_argument("--rows", type=positive, default=16, help="rows of a batch (default: 16)")
    own.add_argument("--tokens", type=positive, default=32, help="tokens of a row (default: 32)")
    own.add_argument("--repeats", type=positive, default=15, help="timed repeats (default: 15)")
    own.add_argument("--out", metavar="FILE", help="also write the results as JSON")
    own.add_argument("--no-memory", action="store_true", help="do not measure peak memory, which needs more processes")
    own.add_argument("--peak-of", help=argparse.SUPPRESS)
    add_overrides(own)

    own = command("list", commands.list_options, "list the config groups and their options")
    own.add_argument("group", metavar="GROUP", nargs="?", help="only this group")

    own = command("doctor", commands.doctor, "check this machine, or a server's or a site's folder")
    own.add_argument("dir", metavar="DIR", nargs="?", help="server or client folder to check, too")

    add_server(command("server", commands.server, "the server of a federation of sites: its folder and its SuperLink"))
    add_client(command("client", commands.client, "a site of a federation: its folder and its processes"))
    own = command("status", commands.status, "a server, its clients and its run, or one run")
    own.add_argument("dir", metavar="DIR", nargs="?", default=".", help="server or run folder (default: this folder)")
    own = command("stop", commands.stop, "end a run that is going on, between two rounds")
    add_run(own)
    return parser
