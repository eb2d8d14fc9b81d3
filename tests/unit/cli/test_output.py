"""Output that nobody reads, that has no room, or whose terminal lacks a character."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest

from fedzo.cli import main, serve
from fedzo.cli.output import forgiving_output
from fedzo.records.metrics import Setup
from fedzo.report.sinks import ProgressSink
from fedzo.runtime.net import server_process
from fedzo.runtime.remote import _show


@pytest.fixture
def unread() -> Iterator[TextIO]:
    """A pipe whose reader is gone; every write reaches it. A test makes it standard output, or pytest's comes back."""
    reader, writer = os.pipe()
    os.close(reader)
    with io.TextIOWrapper(os.fdopen(writer, "wb", buffering=0), encoding="utf-8", write_through=True) as stream:
        yield stream


@pytest.fixture
def full() -> Iterator[tuple[TextIO, TextIO]]:
    """Two ways to one full disk; every write reaches it."""
    if not (disk := Path("/dev/full")).exists():
        pytest.skip("needs /dev/full")
    with disk.open("wb", buffering=0) as out, disk.open("wb", buffering=0) as err:
        yield (
            io.TextIOWrapper(out, encoding="utf-8", write_through=True),
            io.TextIOWrapper(err, encoding="utf-8", write_through=True),
        )


@pytest.mark.parametrize("command", [["list"], ["list", "task"], ["--help"], ["train", "--cfg", "all"]])
def test_a_command_ends_well_whose_output_nobody_reads(
    command: list[str], unread: TextIO, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", unread)
    with pytest.raises(BrokenPipeError):
        print("nobody")
    try:
        code = main(command)
    except SystemExit as end:
        code = int(end.code or 0)

    assert (code, capsys.readouterr().err) == (0, "")


def test_a_server_goes_on_though_nobody_reads_the_output_that_it_inherits(
    unread: TextIO, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def serve_run(run_dir: Path, server_dir: Path) -> None:
        with ProgressSink(1).phase("a phase"):
            print("a line")

    monkeypatch.setattr(sys, "stdout", unread)
    monkeypatch.setattr(sys, "argv", ["serve", str(tmp_path / "server"), str(tmp_path), "0"])
    monkeypatch.setattr(serve.signal, "signal", lambda *_: None)  # the test's own stay
    monkeypatch.setattr(serve, "log_to", lambda run_dir: None)
    monkeypatch.setattr("fedzo.commands.train.serve_run", serve_run)

    assert serve.main() == 0


def test_a_command_that_fails_says_so_though_nobody_reads_its_output(
    unread: TextIO, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", unread)

    assert main(["list", "nothing"]) == 2
    assert "GROUP must be one of" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_without_room_is_an_error_told_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)

        assert main(["list"]) == 1
    assert capsys.readouterr().err.count("fedzo: standard output must be writable, got No space left on device") == 1


def test_a_command_goes_on_that_cannot_even_tell_of_it(
    full: tuple[TextIO, TextIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", full[0])
    monkeypatch.setattr(sys, "stderr", full[1])

    assert main(["list"]) == 1


def test_a_run_goes_on_whose_command_can_show_nothing_of_it(
    full: tuple[TextIO, TextIO], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shown: list[io.StringIO] = []
    monkeypatch.setattr(sys, "stdout", full[0])
    monkeypatch.setattr(sys, "stderr", full[1])
    monkeypatch.setattr(server_process, "SERVE", ["sh", "-c", "sleep 0.5"])

    def show() -> None:
        shown.append(io.StringIO("a line of the run's server\n"))
        _show(shown[-1])

    with forgiving_output():
        server_process.ServerProcess(tmp_path, tmp_path).wait(show)

    assert shown


def test_a_command_goes_on_whose_terminal_is_gone(tmp_path: Path) -> None:
    """In a process of its own, both of whose streams are the terminal."""
    code = (
        "import sys; from pathlib import Path; from fedzo.cli.output import forgiving_output\n"
        "with forgiving_output() as output:\n"
        "    sys.stdin.readline()\n"
        "    print('nobody', flush=True); print('nobody', flush=True)\n"
        "Path(sys.argv[1]).write_text(f'went on, lost: {output.lost}')"
    )
    told = tmp_path / "told"
    terminal, end = os.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(told)], stdin=subprocess.PIPE, stdout=end, stderr=end, start_new_session=True
    )
    os.close(end)
    os.close(terminal)
    child.communicate(b"\n", timeout=60)

    assert (child.returncode, told.read_text()) == (0, "went on, lost: False")


def test_output_that_was_closed_before_the_start_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)

    assert main(["list"]) == 0


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_what_a_terminal_cannot_show_is_replaced(
    encoding: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "multirun.yaml").touch()
    shown = io.BytesIO()
    stream = io.TextIOWrapper(shown, encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr("fedzo.report.sweep.write_sweep_report", lambda folder, out_dir: "a \u2192 \u00e9 \udc80 page")

    assert main(["report", str(tmp_path)]) == 0
    stream.flush()

    whole = "a \u2192 \u00e9 \udc80 page\n"
    assert shown.getvalue() == whole.encode(encoding, errors="replace")
    assert stream.errors == "strict"


def test_progress_takes_names_for_no_markup_and_shows_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="cp1252", errors="replace"))
    sink = ProgressSink(1)
    setup = {"seconds": 0.0, "num_params": 9, "space_size": 3, "setup_down_bytes": 0, "estimate": None, "clients": ()}

    sink.write(Setup(trainer="[/red] \u2192 :smile:", **setup))  # type: ignore[arg-type]
    with sink.phase("scoring [/b]"):
        pass
    sink.close()
    sys.stdout.flush()

    assert b"[/red] ? :smile:: 3 of 9 weights" in shown.getvalue()
    assert b"scoring [/b] ..." in shown.getvalue()


def test_the_log_of_a_run_takes_every_character(tmp_path: Path) -> None:
    """In a process of its own: what tests log is sent on as UTF-8, which a lone surrogate is not."""
    code = (
        "import logging, sys; from pathlib import Path; from fedzo.cli.train import log_to; log_to(Path(sys.argv[1]));"
        "logging.getLogger('fedzo.somewhere').warning('caf\\u00e9 \\u2192 %s', '\\udc80')"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True)

    assert "caf\u00e9 \u2192 \\udc80" in (tmp_path / "fedzo.log").read_text(encoding="utf-8")
