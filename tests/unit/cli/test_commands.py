"""The commands beside ``train``: arguments, output, messages and exit codes."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from fedzo.cli import main, make_parser
from fedzo.errors import ConfigError, ProtocolError

Calls = list[tuple[object, ...]]
ELSEWHERE = {
    "stop": "fedzo.commands.status",
    "report": "fedzo.report.html",
    "list": "fedzo.config.plugins",
    "bench": "fedzo.bench.step",
}
"""Where the code of a command is that has no module of its name in ``fedzo.commands``."""


@pytest.mark.parametrize(
    ("arguments", "call", "printed"),
    [
        (["resume", "."], ("resume", Path(), {"rounds": None}), ""),
        (["resume", ".", "fl.rounds=500"], ("resume", Path(), {"rounds": 500}), ""),
        (["replay", "."], ("replay", Path(), {"rounds": None}), '"digest": "ab"'),
        (["replay", ".", "--rounds", "2"], ("replay", Path(), {"rounds": 2}), '"rounds": 3'),
        (
            ["replay", ".", "--client", "3", "--round", "0"],
            ("replay client", Path(), {"client": 3, "round": 0, "out": None}),
            "one\ntwo\n",
        ),
        (
            ["replay", ".", "--client", "0", "--round", "7", "--out", "x"],
            ("replay client", Path(), {"client": 0, "round": 7, "out": Path("x")}),
            "one\ntwo\n",
        ),
        (["evaluate", "."], ("evaluate", Path(), {"split": "test", "rounds": None}), '"value": 0.75'),
        (
            ["evaluate", ".", "--split", "dev", "--rounds", "3"],
            ("evaluate", Path(), {"split": "dev", "rounds": 3}),
            '"value": 0.75',
        ),
        (["generate", ".", "a", "b"], ("generate", Path(), ["a", "b"], {"max_new_tokens": 32}), "one\ntwo\n"),
        (
            ["generate", ".", "a", "--max-new-tokens", "5"],
            ("generate", Path(), ["a"], {"max_new_tokens": 5}),
            "one\ntwo\n",
        ),
        (["export", ".", "out"], ("export", Path(), Path("out"), {"rounds": None, "form": "model"}), "out\n"),
        (
            ["export", ".", "out", "--rounds", "0", "--tables"],
            ("export", Path(), Path("out"), {"rounds": 0, "form": "tables"}),
            "out\n",
        ),
        (["report", "."], ("report", Path(), {"out_dir": None}), "report.html\n"),
        (["report", ".", "--out", "x"], ("report", Path(), {"out_dir": Path("x")}), "report.html\n"),
    ],
)
def test_a_command_calls_its_service(
    arguments: list[str], call: object, printed: str, calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(arguments)

    assert code == 0
    assert calls == [call]
    assert printed in capsys.readouterr().out


def test_a_resumed_run_logs_where_its_first_part_did(
    calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def warn(folder: Path, *, rounds: int | None) -> None:
        logging.getLogger("fedzo.somewhere").warning("client 3 is gone")
        logging.getLogger("flwr").info("a line of Flower")

    monkeypatch.setattr(sys.modules["fedzo.commands.resume"], "resume_run", warn)
    (tmp_path / "fedzo.log").write_text("before\n")

    assert main(["resume", "."]) == 0

    logged = (tmp_path / "fedzo.log").read_text().splitlines()
    assert [line.rpartition("]")[2].strip() for line in logged] == ["before", "client 3 is gone", "a line of Flower"]
    assert capsys.readouterr().err == "WARNING: client 3 is gone\n"


def test_a_sweep_that_has_not_begun_has_no_report(
    calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.modules["fedzo.report.sweep"], "write_sweep_report", lambda folder, out_dir: None)
    (tmp_path / "multirun.yaml").touch()

    assert main(["report", "."]) == 1
    assert capsys.readouterr().err == ("fedzo: .: no job of this sweep has begun. Start it, or give another folder.\n")


def test_runs_are_compared_on_one_page_in_a_folder_of_its_own(
    calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()

    assert main(["report", "a", "b", "--together", "both"]) == 0
    assert calls == [("comparison", [Path("a"), Path("b")], Path("both"), {})]
    assert main(["report", "a", "b", "--together", "both", "--out", "c"]) == 2
    assert "--together DIR must be given without --out" in capsys.readouterr().err


def test_report_knows_a_sweep_by_its_multirun_file(calls: Calls, tmp_path: Path) -> None:
    for name in ("run", "sweep"):
        (tmp_path / name).mkdir()
    (tmp_path / "sweep" / "multirun.yaml").touch()

    assert main(["report", "run", "sweep"]) == 0

    assert calls == [("report", Path("run"), {"out_dir": None}), ("sweep report", Path("sweep"), {"out_dir": None})]


def test_mask_composes_the_config_of_a_run(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["mask", "model=gpt2", "--out", "mask.safetensors", "trainer.density=0.5"])

    assert code == 0
    ((name, config, out, _),) = calls
    assert (name, out) == ("mask", Path("mask.safetensors"))
    assert (config.model.name, config.trainer.density) == ("gpt2", 0.5)  # type: ignore[attr-defined]
    assert json.loads(capsys.readouterr().out) == {"size": 7}


def test_mask_refuses_bad_settings_before_any_work(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mask", "--out", "x", "trainer.density=2"]) == 2

    assert calls == []
    assert "fedzo: trainer.density must be > 0 and <= 1, got 2.0." in capsys.readouterr().err


def test_doctor_fails_when_a_check_failed(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 1

    assert capsys.readouterr().out == "ok   python: 3.11\nBAD  directions: differs\n"


def test_doctor_shows_what_it_has_found_while_it_goes_on(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model on a slow disk takes minutes, and a kernel that is out of memory asks nobody."""

    def folder_checks(path: Path) -> Iterator[tuple[str, bool, str]]:
        yield "secrets", True, "only this user reads them"
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["fedzo.commands.doctor"], "folder_checks", folder_checks, raising=False)

    assert main(["doctor", "site"]) == 130
    said = capsys.readouterr().out
    assert said == "ok   python: 3.11\nBAD  directions: differs\nok   secrets: only this user reads them\n"


@pytest.mark.parametrize("command", ["resume", "replay", "evaluate", "report"])
def test_a_folder_that_is_not_there_is_named(command: str, calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "no/such"]) == 2

    assert calls == []
    assert "fedzo: RUN must be a folder that `fedzo train` made, found none at 'no/such'." in capsys.readouterr().err


@pytest.mark.parametrize(("error", "code"), [(ProtocolError("hash differs."), 1), (ConfigError("rounds is bad."), 2)])
def test_an_error_of_a_service_is_one_line_and_an_exit_code(
    error: Exception, code: int, calls: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(sys.modules["fedzo.commands.replay"], "replay_run", fail)

    assert main(["replay", "."]) == code
    assert capsys.readouterr().err == f"fedzo: {error}\n"


def test_an_error_keeps_its_lines_and_shows_no_escapes(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may name a column, or the target of a link, of a folder that came from somebody else."""

    def fail(*arguments: object, **options: object) -> None:
        raise ConfigError("2 problems in the configuration:\n  - a\x1b]52;c;ZWNobw==\x07\n  - b")

    monkeypatch.setattr(sys.modules["fedzo.commands.replay"], "replay_run", fail)

    assert main(["replay", "."]) == 2
    assert capsys.readouterr().err == "fedzo: 2 problems in the configuration:\n  - a ]52;c;ZWNobw== \n  - b\n"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "MemoryError"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried\n2.00 GiB."), "CUDA out of memory. Tried 2.00 GiB"),
    ],
)
def test_memory_that_does_not_suffice_is_one_line(
    error: Exception, said: str, calls: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(sys.modules["fedzo.commands.replay"], "replay_run", fail)

    assert main(["replay", "."]) == 1
    remedy = "Free some, write a small model.tokens_per_batch, such as 1024, or model.dtype=bfloat16."
    assert capsys.readouterr().err == f"fedzo replay: out of memory ({said}). {remedy}\n"


def test_an_import_that_fails_for_a_package_of_another_version_names_the_package(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise ImportError("cannot import name 'New' from 'transformers'")

    monkeypatch.setattr(sys.modules["fedzo.commands.replay"], "replay_run", fail)
    monkeypatch.setattr("fedzo.cli.package_problems", lambda: {"transformers": "it must be newer"})
    assert main(["replay", "."]) == 2
    told = "fedzo replay: cannot import name 'New' from 'transformers'\ntransformers: it must be newer\n"
    assert capsys.readouterr().err == told

    monkeypatch.setattr("fedzo.cli.package_problems", dict)
    with pytest.raises(ImportError, match="New"):  # a fault of fedzo's own
        main(["replay", "."])


@pytest.mark.parametrize(
    ("command", "run", "hint"),
    [
        ("resume", ".", " Continue with: fedzo resume ."),
        ("resume", "a b", " Continue with: fedzo resume 'a b'"),
        ("replay", ".", ""),
    ],
)
def test_ctrl_c_says_how_to_go_on(
    command: str, run: str, hint: str, calls: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(run).mkdir(exist_ok=True)

    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules[f"fedzo.commands.{command}"], f"{command}_run", stop)

    assert main([command, run]) == 130
    assert capsys.readouterr().err == f"\nfedzo: interrupted.{hint}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resume", ".", "x"], "only fl.rounds=N can be given, to make it longer, got 'x'"),
        (["resume", ".", "fl.rounds=5", "x"], "fedzo resume: unknown argument 'x'"),
        (["resume", ".", "fl.rounds=many"], "must be a whole number >= 1, got 'many'"),
        (["mask", "--out", "x", "--bogus"], "fedzo mask: unknown option '--bogus'"),
        (["mask"], "the following arguments are required: --out"),
        (["replay", ".", "--rounds", "-1"], "must be a whole number >= 0, got '-1'"),
        (["replay", ".", "--client", "x"], "--client: must be a whole number >= 0, got 'x'"),
        (["replay", ".", "--round", "1_0"], "--round: must be a whole number >= 0, got '1_0'"),
        (["replay", ".", "--rounds", "+5"], "--rounds: must be a whole number >= 0, got '+5'"),
        (["replay", ".", "--rounds", "9" * 5000], "--rounds: must be a whole number >= 0, got '999"),
        (["generate", ".", "a", "--max-new-tokens", "0"], "must be a whole number >= 1, got '0'"),
        (["evaluate", ".", "--split", "train"], "invalid choice: 'train'"),
        (["nothing"], "invalid choice: 'nothing'"),
    ],
)
def test_a_bad_command_line_exits_with_2(
    arguments: list[str], message: str, calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)

    assert stopped.value.code == 2
    assert calls == []
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--round", "2"], "Add --client K."),
        (["--out", "x"], "Add --client K."),
        (["--client", "2"], "Write --round R."),
        (["--client", "2", "--round", "1", "--rounds", "1"], "Write --round R."),
    ],
)
def test_options_of_replay_that_do_not_go_together_are_refused(
    arguments: list[str], message: str, calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", ".", *arguments]) == 2

    assert calls == []
    assert message in capsys.readouterr().err


def test_without_a_command_the_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2

    printed = capsys.readouterr().out
    names = [
        "train",
        "mask",
        "perplexity",
        "evaluate",
        "generate",
        "export",
        "resume",
        "replay",
        "report",
        "list",
        "doctor",
    ]
    assert {*names} <= {line.split()[0] for line in printed.splitlines() if re.match(r" {4}\S", line)}
    assert printed == make_parser().format_help()


def test_the_code_of_each_command_is_in_the_module_of_its_name() -> None:
    commands = re.findall(r"^ {4}(\S+)", make_parser().format_help(), re.MULTILINE)

    assert {name for name in commands if find_spec(f"fedzo.commands.{name}") is None} == {*ELSEWHERE}
    assert [module for module in ELSEWHERE.values() if find_spec(module) is None] == []


def test_the_usage_of_generate_names_all_that_belongs_to_a_model_of_ones_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "--help"])

    usage, summary, *_ = capsys.readouterr().out.split("\n\n")
    assert re.findall(r"--[a-z-]+", usage) == ["--model", "--prompts", "--tables", "--dtype", "--chat"]
    assert "sketch" not in summary


def test_list_prints_every_group_with_a_line_per_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0

    lines = capsys.readouterr().out.splitlines()
    groups = [line for line in lines if not line.startswith(" ")]
    assert groups == sorted(groups)
    assert {"model", "task", "data", "partition", "trainer", "runtime", "strategy", "experiment"} <= set(groups)
    assert "  mezo       MeZO: all weights are trained (arXiv 2305.17333)." in lines
    assert not any("_schema" in line for line in lines)


def test_list_of_one_group(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "strategy"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "strategy"
    assert main(["list", "nope"]) == 2
    assert "GROUP must be one of data, " in capsys.readouterr().err


def test_the_parser_needs_neither_torch_nor_hydra() -> None:
    heavy = "{'torch', 'hydra', 'flwr', 'numpy'}"
    code = f"import sys, fedzo.cli as cli; cli.make_parser(); print(sorted({heavy} & set(sys.modules)))"

    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert result.stdout.strip() == "[]"


def test_windows_is_told_where_fedzo_runs_before_anything_is_imported_that_it_lacks() -> None:
    code = (
        "import sys; sys.modules['fcntl'] = None\n"
        "import types, fedzo.cli as cli\n"
        "cli.os = types.SimpleNamespace(name='nt')\n"
        "sys.exit(cli.main(['list']))\n"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "fedzo: it must run on a POSIX system, got Windows. Install it in WSL2.\n"


def test_a_user_who_can_keep_no_compiled_kernels_is_told_where_to_have_them_kept() -> None:
    """As where site-packages is read-only and the user has no home; here Numba is to keep them in an archive."""
    own = {**os.environ, "NUMBA_CACHE_LOCATOR_CLASSES": "ZipCacheLocator"}
    command = [sys.executable, "-m", "fedzo", "doctor"]

    done = subprocess.run(command, env=own, capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    told = done.stderr.splitlines()[-1]
    assert told.startswith("fedzo doctor: compiled kernels must be kept somewhere")
    assert told.endswith("Set NUMBA_CACHE_DIR to one.")


def test_settings_are_read_checked_and_listed_without_the_libraries_that_only_a_model_or_its_rows_need() -> None:
    code = (
        "import sys\n"
        "from fedzo.cli import main\n"
        "assert main(['list']) == 0\n"
        "assert main(['train', 'trainer.lr=-1']) != 0\n"
        "late = {'transformers', 'peft', 'datasets', 'flwr_datasets', 'pandas', 'matplotlib', 'ray', 'sympy'}\n"
        "print(sorted(late & set(sys.modules)))\n"
        "import fedzo.commands.train\n"
        "print('peft' in sys.modules)\n"  # a run takes it for an adapter alone
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.splitlines()[-2:] == ["[]", "False"]
    assert "trainer.lr must be" in done.stderr
