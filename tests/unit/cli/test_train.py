"""``fedzo train``: single runs and real multiruns, with the work itself replaced."""

from __future__ import annotations

import errno
import json
import logging
import os
import shlex
import subprocess
import sys
import textwrap
import weakref
from argparse import Action, ArgumentParser
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest

from fedzo.cli import main
from fedzo.config.schema import LaunchConfig
from fedzo.errors import NumericsError, RunFolderError
from fedzo.records.folder import LOCK
from fedzo.system import warn_once

Calls = list[tuple[Any, ...]]
DIVERGES, INTERRUPTED, BUG, REFUSED = 5, 6, 7, 8
"""Run seeds with which the stand-in of ``start_run`` fails (conftest)."""


def test_a_run_gets_its_config_folder_and_overrides(calls: Calls, tmp_path: Path) -> None:
    code = main(["train", "trainer=mezo", "model=org/opt", "fl.rounds=3"])

    assert code == 0
    ((_, config, folder, overrides),) = calls
    assert (type(config.trainer).__name__, config.model.name, config.fl.rounds) == ("MezoConfig", "org/opt", 3)
    assert overrides == ["trainer=mezo", "model=hf", "model.name='org/opt'", "fl.rounds=3"]
    assert folder.parent == tmp_path / "runs"
    assert folder.name.endswith("-rotten_tomatoes-mezo")
    assert "a line of the run" in (folder / "fedzo.log").read_text(encoding="utf-8")


def test_two_runs_have_two_folders(calls: Calls) -> None:
    assert main(["train"]) == main(["train"]) == 0

    assert calls[0][2] != calls[1][2]


def test_the_run_folder_can_be_chosen(calls: Calls, tmp_path: Path) -> None:
    assert main(["train", "hydra.run.dir=mine"]) == 0

    assert calls[0][2] == tmp_path / "mine"


def test_bad_settings_start_nothing(calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["train", "fl.rounds=0", "trainer=nope", "+bogus=1"])

    assert code == 2
    assert calls == []
    assert list(tmp_path.iterdir()) == []
    error = capsys.readouterr().err
    assert error.startswith("fedzo: 3 problems in the configuration:\n")
    assert "Traceback" not in error


def test_a_run_that_fails_is_one_line_and_exit_code_1(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", f"seed={DIVERGES}"]) == 1

    assert capsys.readouterr().err == "fedzo: round 3: the loss must be finite, got nan. Lower trainer.lr.\n"


def test_a_bug_keeps_its_traceback(calls: Calls) -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        main(["train", f"seed={BUG}"])


@pytest.mark.parametrize("folder", ["mine", "First Last/mine"])
def test_ctrl_c_names_the_run_to_resume(
    folder: str, calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", f"seed={INTERRUPTED}", f"hydra.run.dir='{folder}'"]) == 130

    told, _, command = capsys.readouterr().err.rpartition(": ")
    assert told == "\nfedzo: interrupted. Continue with"
    assert shlex.split(command) == ["fedzo", "resume", str(tmp_path / folder)]


def test_a_run_folder_that_cannot_be_made_is_named(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").touch()

    for flags, key in ([], "hydra.run.dir"), (["-m"], "hydra.sweep.dir"):
        assert main(["train", *flags, f"{key}=file/run"]) == 1
        error = capsys.readouterr().err
        assert error.startswith("fedzo: run folder file")
        assert error.endswith(f"it must be writable, got 'Not a directory'. Choose another with {key}=<folder>.\n")
    assert calls == []
    assert issubclass(RunFolderError, OSError)


def test_a_multirun_has_one_folder_a_job_and_a_report_over_all(calls: Calls, tmp_path: Path) -> None:
    code = main(["train", "-m", "trainer=meerkat,mezo", "fl.local_steps=1,10", "hydra.sweep.dir=all"])

    assert code == 0
    jobs, (report, folder, _) = calls[:-1], calls[-1]
    assert [(type(config.trainer).__name__, config.fl.local_steps) for _, config, _, _ in jobs] == [
        ("MeerkatConfig", 1),
        ("MeerkatConfig", 10),
        ("MezoConfig", 1),
        ("MezoConfig", 10),
    ]
    assert [path.relative_to(tmp_path / "all").as_posix() for _, _, path, _ in jobs] == [
        "fl.local_steps-1_trainer-meerkat",
        "fl.local_steps-10_trainer-meerkat",
        "fl.local_steps-1_trainer-mezo",
        "fl.local_steps-10_trainer-mezo",
    ]
    assert (report, folder) == ("sweep report", Path("all"))
    assert (tmp_path / "all" / "multirun.yaml").is_file()


def test_a_job_keeps_its_folder_when_the_grid_grows(calls: Calls) -> None:
    def folders(*grid: str) -> dict[tuple[int, int], Path]:
        calls.clear()
        assert main(["train", "-m", "hydra.sweep.dir=all", *grid]) == 0
        return {(config.fl.rounds, config.seed): folder for _, config, folder, _ in calls[:-1]}

    first = folders("fl.rounds=3,4", "seed=1")
    grown = folders("fl.rounds=2,3,4", "seed=1")
    turned = folders("seed=0,1", "fl.rounds=4,3")

    assert len({*first.values()}) == 2
    for later, size in (grown, 3), (turned, 4):
        assert len({*later.values()}) == size
        assert {job: later[job] for job in first} == first


def test_a_multirun_over_model_names(calls: Calls) -> None:
    assert main(["train", "-m", "model=gpt2,org/opt"]) == 0

    assert [call[1].model.name for call in calls[:-1]] == ["gpt2", "org/opt"]


def test_one_bad_job_stops_the_sweep_before_any_work(
    calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "-m", "seed=1,2", "fl.rounds=1,0"]) == 2

    assert calls == []
    assert list(tmp_path.iterdir()) == []
    expected = "fedzo: job 1 (seed=1 fl.rounds=0) and 1 more: fl.rounds must be >= 1, got 0. A run needs a round.\n"
    assert capsys.readouterr().err == expected


def test_a_failed_job_lets_the_others_run_and_fails_the_sweep(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "-m", f"seed=1,{DIVERGES},3"]) == 1

    assert [call[0] for call in calls] == ["start", "start", "start", "sweep report"]
    error = capsys.readouterr().err
    assert error.endswith("fedzo: round 3: the loss must be finite, got nan. Lower trainer.lr.\n")
    assert "/seed-5: round 3: the loss must be finite" in error
    assert "Traceback" not in error


def test_a_job_that_failed_leaves_a_note_in_its_folder(calls: Calls, tmp_path: Path) -> None:
    assert main(["train", "-m", f"seed=1,{DIVERGES}", "fl.rounds=3", "hydra.sweep.dir=all"]) == 1

    (note,) = (tmp_path / "all").glob("*/failed.json")
    assert json.loads(note.read_text(encoding="utf-8")) == {
        "overrides": [f"seed={DIVERGES}", "fl.rounds=3"],
        "text": "round 3: the loss must be finite, got nan. Lower trainer.lr.",
    }
    assert note.parent == calls[1][2]
    assert main(["train", f"seed={DIVERGES}", "hydra.run.dir=one"]) == 1  # a single run says it itself
    assert not (tmp_path / "one" / "failed.json").exists()


class Weights:
    """What a job holds in memory."""


def test_a_job_that_failed_holds_nothing_in_memory_while_the_others_run(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hydra keeps the errors of all jobs until the last has run."""
    held: list[weakref.ref[Weights]] = []
    seen: list[list[bool]] = []

    def compute() -> None:
        weights = Weights()
        held.append(weakref.ref(weights))
        raise ArithmeticError("not finite")

    def start(config: LaunchConfig, run_dir: Path, *, overrides: list[str]) -> None:
        seen.append([weights() is not None for weights in held])
        try:
            compute()
        except ArithmeticError as error:
            if config.seed == 1:
                raise NumericsError("a cause") from error
            if config.seed == 2:
                raise NumericsError("a context") from None
            if config.seed == 3:
                raise

    monkeypatch.setattr(sys.modules["fedzo.commands.resume"], "start_or_resume_run", start)

    assert main(["train", "-m", "seed=1,2,3,4", "hydra.sweep.dir=all"]) == 1
    assert seen == [[], [False], [False, False], [False, False, False]]


@pytest.mark.parametrize(("seeds", "code"), [("1,2", 0), (f"1,{DIVERGES}", 1)])
def test_a_sweep_ends_with_its_folder_and_its_report(
    seeds: str, code: int, calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "-m", f"seed={seeds}", "hydra.sweep.dir=all"]) == code

    assert capsys.readouterr().out.endswith("sweep folder: all\nreport:       report.html\n")


def test_a_crash_of_a_later_job_is_told(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    """Hydra raises what the first job that failed raised."""
    assert main(["train", "-m", f"seed={DIVERGES},{BUG},3", "hydra.sweep.dir=all"]) == 1

    assert [call[0] for call in calls] == ["start", "start", "start", "sweep report"]
    error = capsys.readouterr().err
    assert "/seed-7: the job failed" in error
    assert "RuntimeError: a bug" in error


def test_a_sweep_with_a_refused_job_has_started_something(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "-m", f"seed={REFUSED},1"]) == 1

    assert [call[0] for call in calls] == ["start", "start", "sweep report"]
    assert capsys.readouterr().err.endswith("fedzo: the model must fit the task, but does not.\n")


@pytest.mark.parametrize("name", ["multirun.yaml", LOCK])
def test_a_sweep_folder_that_cannot_be_written_is_named(
    name: str, calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("all", name).mkdir(parents=True)

    assert main(["train", "-m", "seed=1,2", "hydra.sweep.dir=all"]) == 1

    assert f"all/{name}: it must be writable" in capsys.readouterr().err
    assert calls == []


@pytest.mark.parametrize(
    ("in_the_way", "folder", "reason"),
    [("seed-1", "seed-1", "File exists"), ("seed-1/fedzo.log/file", "seed-1/fedzo.log", "Is a directory")],
)
def test_a_jobs_folder_that_cannot_be_written_is_named(
    in_the_way: str, folder: str, reason: str, calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    file = Path("all", in_the_way)
    file.parent.mkdir(parents=True)
    file.touch()

    assert main(["train", "-m", "seed=1,2", "hydra.sweep.dir=all"]) == 1

    error = capsys.readouterr().err
    remedy = "Choose another with hydra.sweep.dir=<folder>."
    assert error.endswith(f"all/{folder}: it must be writable, got {reason!r}. {remedy}\n")
    assert "Traceback" not in error


def test_what_a_job_says_of_a_file_elsewhere_is_not_told_as_of_its_folder(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(config: LaunchConfig, run_dir: Path, *, overrides: list[str]) -> None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/no/such/model")

    monkeypatch.setattr(sys.modules["fedzo.commands.resume"], "start_or_resume_run", start)

    with pytest.raises(FileNotFoundError):
        main(["train", "-m", "seed=1", "hydra.sweep.dir=all"])


def test_a_worker_that_is_ended_from_outside_is_told_in_a_line(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def killed(*_: object) -> None:
        raise BrokenProcessPool("A worker process managed by the executor was unexpectedly terminated.")

    monkeypatch.setattr("fedzo.cli.train._hydra", killed)

    assert main(["train", "-m", "seed=1,2", "hydra.sweep.dir=all"]) == 1

    said = capsys.readouterr()
    assert "fedzo: sweep all: the process of a job was ended from outside, perhaps for lack of memory." in said.err
    assert said.out.startswith("sweep folder: all\n")  # with what the other jobs found


@pytest.mark.parametrize("kind", ["UncompletedJobError", "FailedSubmissionError"])
def test_a_job_of_slurm_that_gives_no_result_is_told_in_a_line(
    kind: str, calls: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its launcher waits for no other job then: what they do goes on."""
    failure = getattr(pytest.importorskip("submitit.core.utils"), kind)

    def killed(*_: object) -> None:
        raise failure("Job 7_1 (task: 0)\nhas not produced any output (state: OUT_OF_MEMORY)")

    monkeypatch.setattr("fedzo.cli.train._hydra", killed)

    assert main(["train", "-m", "seed=1,2", "hydra.sweep.dir=all"]) == 1

    said = capsys.readouterr()
    assert said.err.endswith(
        "fedzo: sweep all: a job gave no result. Others may still run: wait for them, and repeat the command with "
        "hydra.sweep.dir=all. Submitit says: Job 7_1 (task: 0) has not produced any output (state: OUT_OF_MEMORY)\n"
    )
    assert "Traceback" not in said.err
    assert said.out.startswith("sweep folder: all\n")


def test_each_job_of_a_sweep_has_in_its_log_what_a_process_is_told_once(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(config: LaunchConfig, run_dir: Path, *, overrides: list[str]) -> None:
        for _ in range(2):
            warn_once(logging.getLogger("fedzo.somewhere"), "no answer can match")

    monkeypatch.setattr(sys.modules["fedzo.commands.resume"], "start_or_resume_run", start)

    assert main(["train", "-m", "seed=1,2", "hydra.sweep.dir=all"]) == 0

    logs = [Path("all", name, "fedzo.log").read_text(encoding="utf-8") for name in ("seed-1", "seed-2")]
    assert [text.count("no answer can match") for text in logs] == [1, 1]


def test_a_file_may_name_the_folders_of_runs_and_of_sweeps(calls: Calls, tmp_path: Path) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    text = "# @package _global_\nhydra:\n  run:\n    dir: one\n  sweep:\n    dir: all\n"
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(text, encoding="utf-8")

    for flags in [], ["-m"]:
        assert main(["train", *flags, "--config-dir", "conf", "experiment=mine"]) == 0

    first, second, _ = calls
    assert (first[2], second[2].parent) == (tmp_path / "one", tmp_path / "all")


@pytest.mark.parametrize("word", ["experiment=both", "++hydra.mode=MULTIRUN"])
def test_a_file_or_an_added_key_can_ask_for_a_sweep(calls: Calls, tmp_path: Path, word: str) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    text = "# @package _global_\nhydra:\n  mode: MULTIRUN\n"
    (tmp_path / "conf" / "experiment" / "both.yaml").write_text(text, encoding="utf-8")

    for flags in [], ["--run"]:
        calls.clear()
        assert main(["train", *flags, "--config-dir", "conf", word, "seed=1,2", "hydra.sweep.dir=all"]) == 0
        assert [call[0] for call in calls] == ["start", "start", "sweep report"]


@pytest.mark.parametrize(
    ("folder", "shown"),
    [("all", "hydra.sweep.dir=all"), ("First, Last/all", "\"hydra.sweep.dir='First, Last/all'\"")],
)
def test_ctrl_c_in_a_multirun_says_how_the_sweep_goes_on(
    folder: str, shown: str, calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "-m", f"seed=1,{INTERRUPTED},3", f'hydra.sweep.dir="{folder}"']) == 130

    assert [call[0] for call in calls] == ["start", "start"]
    _, _, again = capsys.readouterr().err.rpartition("Continue with: the same command with ")
    assert again == f"{shown}\n"
    assert main(["train", "-m", "seed=3", *shlex.split(again)]) == 0
    assert [call[2].parent for call in calls if call[0] == "start"] == [tmp_path / folder] * 3


def test_a_users_own_yaml_is_used_by_runs_and_sweeps(calls: Calls, tmp_path: Path) -> None:
    (tmp_path / "conf" / "strategy").mkdir(parents=True)
    text = "defaults: [strategy_schema, _self_]\nmin_replies: 4\n"
    (tmp_path / "conf" / "strategy" / "strict.yaml").write_text(text, encoding="utf-8")

    assert main(["train", "--config-dir", "conf", "strategy=strict"]) == 0
    assert main(["train", "-m", "-cd", "conf", "strategy=strict,mean"]) == 0

    assert [call[1].strategy.min_replies for call in calls if call[0] == "start"] == [4, 4, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config-name", "x"], "--config-name is not supported. Use --config-dir DIR and experiment=<name>."),
        (["--config-path", "x"], "--config-path is not supported."),
        (["--config-dir", "no/such"], "--config-dir must name a folder of YAML files, got 'no/such'."),
        (["--cfg", "job", "fl.nope=1"], "Key 'nope' not in 'FlConfig'."),
        (["--cfg", "job", "hydra.searchpath=3"], "hydra.searchpath must be a list of folders: "),
        (["--resolve"], "--resolve must be given with --cfg or --help"),
        (["--package", "fl"], "--package must be given with --cfg"),
        (["-m", "--cfg", "job"], "at most one of"),
        (["-m", "-r"], "got --run --multirun."),
        (["hydra.job.chdir=true"], "hydra.job.chdir must be false, got True."),
        (["-m", "seed=1,2", "hydra.job.chdir=true"], "hydra.job.chdir must be false, got True."),
        (
            ["-m", "seed=1,2", "hydra.run.dir=runs/a"],
            "hydra.run.dir must be left out of a sweep (-m), got hydra.run.dir=runs/a. Write hydra.sweep.dir=runs/a.",
        ),
        (
            ["++hydra.sweep.dir=a"],
            "hydra.sweep.dir must be left out of a single run (without -m), got ++hydra.sweep.dir=a. "
            "Write hydra.run.dir=a.",
        ),
    ],
)
def test_flags_that_cannot_be_used_are_refused(
    arguments: list[str], message: str, calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *arguments]) == 2

    assert message in capsys.readouterr().err
    assert calls == []


def test_an_unknown_flag_is_refused(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--bogus"])

    assert stopped.value.code == 2
    assert "fedzo train: error: unrecognized arguments: --bogus" in capsys.readouterr().err


def test_the_composed_config_can_be_shown_without_a_run(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--cfg", "job", "model=gpt2"]) == 0

    assert "\n  name: gpt2\n" in capsys.readouterr().out
    assert calls == []


def test_flags_are_read_also_where_argparse_looks_at_each_help_text_at_once(
    calls: Calls, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from Python 3.14 on, by a method of this name; one of Hydra's help texts is no text."""
    add_argument = ArgumentParser.add_argument

    def check_help(self: ArgumentParser, action: Action) -> None:
        if action.help and not isinstance(action.help, str):
            raise ValueError("badly formed help string")

    def add(self: Any, *names: str, **options: Any) -> Action:
        action = add_argument(self, *names, **options)
        self._check_help(action)
        return action

    monkeypatch.setattr(ArgumentParser, "_check_help", check_help, raising=False)
    monkeypatch.setattr(ArgumentParser, "add_argument", add)

    assert main(["train", "--cfg", "job"]) == 0
    assert "num_clients: 8" in capsys.readouterr().out


def test_help_shows_groups_and_keys(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--help"])

    printed = capsys.readouterr().out
    assert stopped.value.code == 0
    assert printed.startswith("fedzo train [overrides] [-m]")
    assert "num_clients: 8" in printed
    assert calls == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "seeds", "code", "run"),
    [
        (["joblib", "hydra.launcher.n_jobs=2"], "1,13", 1, [1, 13]),
        (["joblib", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=2"], "choice(4)", 0, [4, 4]),  # equal trials
        (["submitit_local"], "1,2", 0, [1, 2]),  # Slurm's launcher, with processes in place of Slurm
    ],
)
def test_launchers_run_the_jobs_in_processes_of_their_own(
    launcher: list[str], seeds: str, code: int, run: list[int], tmp_path: Path
) -> None:
    pytest.importorskip(f"hydra_plugins.hydra_{launcher[0].partition('_')[0]}_launcher")
    stand_in = """
        import json, os, sys, types
        names = ("fedzo.commands.train", "fedzo.commands.resume", "fedzo.report.sweep")
        starts, goes_on, sweep = made = [types.ModuleType(name) for name in names]
        def start_run(config, run_dir, *, overrides):
            (run_dir / "run.json").write_text(json.dumps([config.seed, os.getppid(), os.getpid()]))
            if config.seed == 13:
                from fedzo.errors import NumericsError
                raise NumericsError("not finite.")
        starts.start_run = goes_on.start_or_resume_run = start_run
        goes_on.dev_objective = lambda folder: 0.5
        sweep.write_sweep_report = lambda folder: (folder / "table.txt").touch()
        sweep.unfinished_jobs = lambda folder: []
        sys.modules.update(zip(names, made))
    """
    (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(stand_in), encoding="utf-8")  # also in the workers
    source = Path(__file__).resolve().parents[3]
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH"), str(source)])])
    command = [sys.executable, "-m", "fedzo", "train", "-m", f"hydra/launcher={launcher[0]}", *launcher[1:]]

    result = subprocess.run(
        [*command, f"seed={seeds}", "hydra.sweep.dir=all"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )

    assert result.returncode == code, result.stderr
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(tmp_path.glob("all/*/run.json"))]
    assert [seed for seed, _, _ in found] == run
    assert all(os.getpid() != parent for _, parent, _ in found)
    assert (tmp_path / "all" / "table.txt").is_file()
    assert "Traceback" not in result.stderr
