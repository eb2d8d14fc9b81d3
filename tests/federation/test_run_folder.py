"""What a run folder says is of the run that ran: reading changes nothing, and one process at a time writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedzo.cli import main
from fedzo.commands import resume, run_folder, train
from fedzo.commands.replay import replay_run
from fedzo.commands.resume import resume_run, start_or_resume_run
from fedzo.commands.run_folder import read_run, rebuild
from fedzo.commands.train import start_run
from fedzo.config.load import load
from fedzo.errors import ConfigError, FolderInUseError, RunFolderError
from fedzo.fl.log_store import RunStore
from fedzo.runtime.config import LocalConfig, RemoteConfig, RuntimeConfig

Run = Callable[..., Path]
Overrides = Callable[..., list[str]]
Lines = Callable[[Path, str], list[dict[str, Any]]]
LOGS = ("public.jsonl", "audit.jsonl")
VECTORS = ("estimator=backprop", "trainer=meerkat")


def snapshot(folder: Path) -> dict[str, object]:
    """Everything below a folder; the times of folders show files that came and went."""
    return {
        str(path.relative_to(folder)): (
            path.lstat().st_ino,
            path.lstat().st_mtime_ns,
            path.lstat().st_ctime_ns,
            path.lstat().st_size,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in [folder, *folder.rglob("*")]
    }


def read_all(folder: Path, out: Path, *, report: bool = True) -> list[int]:
    """Every command that reads a run, `report` if told so; their exit codes."""
    name = str(folder)
    commands = [
        ["replay", name],
        ["replay", name, "--rounds", "1"],
        ["evaluate", name],
        ["evaluate", name, "--split", "dev"],
        ["generate", name, "Text: a thing", "--max-new-tokens", "2"],
        ["export", name, str(out / "model")],
    ]
    if report:
        commands.append(["report", name, "--out", str(out / "report")])
    if not list(folder.glob("vectors")):
        commands.append(["replay", name, "--client", "0", "--round", "1", "--out", str(out / "path.safetensors")])
    return [main(command) for command in commands]


def test_the_run_folder_holds_what_made_the_run(run: Run) -> None:
    folder = run("seed=7")

    environment = json.loads((folder / "environment.json").read_text())
    assert read_run(folder).seed == 7
    assert (folder / "overrides.yaml").read_text() == '- "seed=7"\n'
    assert environment["packages"]["flwr"].startswith("1.41.")
    assert (environment["device"], environment["threads"]) == ("cpu", 1)
    assert len(environment["config_hash"]) == 64
    assert (folder / "rows" / f"client-0-{environment['run_id']}.json").exists()  # as a site names what it keeps


def test_a_folder_with_a_run_is_not_overwritten_and_one_without_is_named(
    finished: Run, overrides: Callable[..., list[str]], tmp_path: Path
) -> None:
    folder = finished()

    with pytest.raises(RunFolderError, match="it holds a run"):
        start_run(load(overrides()), folder, overrides=[])
    with pytest.raises(RunFolderError, match="not a run folder"):
        rebuild(tmp_path)
    with pytest.raises(ConfigError, match="--rounds must be 0 to 3, the rounds done, got 4"):
        rebuild(folder, rounds=4)


@pytest.mark.parametrize(
    ("artifacts", "settings"),
    [
        *(("there", each) for each in ((), ("trainer=lora",), ("trainer=mezo",), ("trainer=tables",), VECTORS)),
        *(("gone", each) for each in ((), ("trainer=lora",), VECTORS)),  # the other two make none
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_reading_a_run_changes_nothing_in_its_folder(
    finished: Run, tmp_path: Path, settings: tuple[str, ...], artifacts: str
) -> None:
    folder = finished(*settings, "server_optimizer.lr=0.01")
    reports = settings in ((), VECTORS)  # it reads the logs alone, of which there are these two kinds
    if artifacts == "gone":
        shutil.rmtree(folder / "artifacts")
    for name in (*LOGS, "metrics.jsonl"):  # an editor took the last newline
        (folder / name).write_bytes((folder / name).read_bytes().rstrip(b"\n"))
    before = snapshot(folder)

    codes = read_all(folder, tmp_path, report=reports)

    assert set(codes) == {0}
    assert snapshot(folder) == before
    assert replay_run(folder)["rounds"] == 3
    if reports:
        assert (tmp_path / "report" / "report.html").is_file()
        assert list((tmp_path / "report" / "figures").iterdir())


def test_reading_a_run_that_goes_on_leaves_its_unfinished_line_alone(finished: Run, tmp_path: Path) -> None:
    folder = finished()
    for name in (*LOGS, "metrics.jsonl"):
        with (folder / name).open("ab") as file:
            file.write(b'{"round":3,"l')
    before = snapshot(folder)

    assert set(read_all(folder, tmp_path)) == {0}

    assert snapshot(folder) == before


def test_a_log_is_missed_only_where_it_is_needed(finished: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder = finished()
    for name in ("audit.jsonl", "metrics.jsonl"):
        (folder / name).unlink()
    before = snapshot(folder)

    assert main(["replay", str(folder)]) == 0
    for command in (["evaluate", str(folder)], ["report", str(folder)]):
        assert main(command) == 1
        assert "metrics.jsonl" in capsys.readouterr().err
    assert main(["replay", str(folder), "--client", "0", "--round", "0"]) == 1
    assert "audit.jsonl: it must be there and readable, got 'No such file" in capsys.readouterr().err
    (folder / "public.jsonl").unlink()
    assert main(["replay", str(folder)]) == 1
    assert "public.jsonl: it must be there" in capsys.readouterr().err
    assert set(before) - set(snapshot(folder)) == {"public.jsonl"}


@pytest.mark.parametrize(
    "name", ["config.json", "run.json", "public.jsonl", "audit.jsonl", "metrics.jsonl", "artifacts", "artifacts/*"]
)
def test_no_command_follows_a_link_out_of_a_run_folder(
    finished: Run, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, outside = finished(), tmp_path / "outside"
    (linked,) = folder.glob(name)
    shutil.move(linked, outside)
    if outside.is_file() and name.endswith(".jsonl"):
        outside.write_bytes(outside.read_bytes() + b"torn")
    linked.symlink_to(outside)
    before, there = snapshot(folder), snapshot(outside) if outside.is_dir() else outside.read_bytes()

    client = ["--client", "0", "--round", "0"] if name == "audit.jsonl" else []
    reader = ["evaluate", str(folder)] if name == "metrics.jsonl" else ["replay", str(folder), *client]
    for command in (reader, ["resume", str(folder)]):
        code = main(command)
        error = capsys.readouterr().err
        if command[0] == "resume" and name == "artifacts/*":
            continue  # put in its place anew, which leaves the file outside alone
        assert code == 1
        assert f"{linked}: it must lie in its folder itself, got a link to {outside}" in error
        assert snapshot(folder) == before

    assert (snapshot(outside) if outside.is_dir() else outside.read_bytes()) == there


def test_a_report_replaces_a_link_and_leaves_the_file_behind_it(finished: Run, tmp_path: Path) -> None:
    folder = finished()
    (tmp_path / "precious").write_text("mine")
    (folder / "report.html").symlink_to(tmp_path / "precious")

    assert main(["report", str(folder)]) == 0

    assert (tmp_path / "precious").read_text() == "mine"
    assert "<html" in (folder / "report.html").read_text()


def test_the_second_process_leaves_nothing_in_a_folder(finished: Run, overrides: Overrides, tmp_path: Path) -> None:
    folder, empty = finished("fl.rounds=2"), tmp_path / "empty"
    for taken in (folder, empty):
        with train.alone(taken):
            pass  # who has begun it is gone, and its server goes on
        with RunStore(taken):
            before = snapshot(taken)

            for rounds in (2, 5):
                config = load(overrides(f"fl.rounds={rounds}"))
                with pytest.raises(FolderInUseError, match="another process is using it"):
                    start_run(config, taken, overrides=[])
            if taken == folder:
                with pytest.raises(FolderInUseError):
                    resume_run(taken)
                with pytest.raises(FolderInUseError):
                    resume_run(taken, rounds=9)

            assert snapshot(taken) == before


def test_a_run_whose_server_is_another_process_is_not_begun_twice(
    run: Run, overrides: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who starts it has let go of the logs, and the server has not taken them up yet."""
    folder, seen = tmp_path / "run", []

    def deploy(config: object, run_dir: Path) -> None:
        before = snapshot(run_dir)
        with pytest.raises(FolderInUseError, match="another process is using it"):
            start_run(load(overrides("fl.rounds=9")), run_dir, overrides=[])
        with pytest.raises(FolderInUseError):
            resume_run(run_dir)
        seen.append(snapshot(run_dir) == before)

    for module in (train, resume):
        monkeypatch.setattr(module, "deploy", deploy)

    start_run(load(overrides("runtime=local")), folder, overrides=[])
    resume_run(folder)

    assert seen == [True, True]


@pytest.mark.parametrize(("runtime", "models"), [(LocalConfig(), [4]), (RemoteConfig(server="server"), [])])
def test_the_models_of_this_machines_processes_are_counted(
    runtime: RuntimeConfig, models: list[int], overrides: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = []

    def warn(model: object, *, device: str, num_copies: int, are_written: bool) -> None:
        counted.append(num_copies)

    monkeypatch.setattr(train, "warn_of_copies", warn)
    monkeypatch.setattr(train.RUNTIMES, "build", lambda *args, **kwargs: None)

    start_run(replace(load(overrides("fl.num_clients=3")), runtime=runtime), tmp_path / "run", overrides=[])

    assert counted == models


def test_a_finished_job_of_a_sweep_is_only_read(finished: Run, overrides: Overrides) -> None:
    folder = finished("fl.rounds=2")
    (folder / "metrics.jsonl").write_bytes((folder / "metrics.jsonl").read_bytes().rstrip(b"\n"))
    before = snapshot(folder)

    start_or_resume_run(load(overrides("fl.rounds=2")), folder, overrides=[])

    assert snapshot(folder) == before


def test_the_settings_of_a_run_cannot_be_edited(finished: Run) -> None:
    folder = finished("fl.rounds=2")
    config = json.loads((folder / "config.json").read_text())
    config["server_optimizer"]["lr"] = 0.5
    (folder / "config.json").write_text(json.dumps(config))

    with pytest.raises(ConfigError, match=r"config\.json must have the settings .* differs in server_optimizer\."):
        resume_run(folder)


def test_the_dtype_of_trained_weights_cannot_be_edited(run: Run) -> None:
    folder = run("trainer=mezo", "fl.rounds=2")
    config = json.loads((folder / "config.json").read_text())
    config["model"]["dtype"] = "bfloat16"
    (folder / "config.json").write_text(json.dumps(config))

    with pytest.raises(ConfigError, match=r"model\.dtype must be float32, in which the run's trained values are"):
        resume_run(folder)


def test_an_audit_log_without_its_public_log_is_not_emptied(finished: Run) -> None:
    folder = finished("fl.rounds=2")
    whole = (folder / "public.jsonl").read_bytes()
    for left in (None, b"", whole.splitlines(keepends=True)[0][:-9]):
        (folder / "public.jsonl").unlink()
        if left is not None:
            (folder / "public.jsonl").write_bytes(left)
        before = snapshot(folder)

        with pytest.raises(RunFolderError, match=r"public\.jsonl: it must hold the rounds that the other logs tell of"):
            resume_run(folder)

        after = snapshot(folder)
        assert before == after
        (folder / "public.jsonl").write_bytes(whole)


# --- a run that is made longer


@pytest.mark.parametrize(
    "rule",
    [
        ("server_optimizer.lr=0.02", "server_optimizer.warmup_rounds=1", "strategy.clients_per_round=2"),
        ("server_optimizer=adam", "server_optimizer.lr=0.01", "fl.local_steps=2"),
        (*VECTORS, "server_optimizer.lr=0.02"),
        ("step_policy=cusum", "fl.local_steps=2", "strategy.clip_factor=1.5", "server_optimizer.lr=0.02"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("stopped", [False, True], ids=["finished", "stopped"])
def test_a_run_that_is_made_longer_is_the_run_that_was_begun_so_long(
    run: Run, lines: Lines, monkeypatch: pytest.MonkeyPatch, rule: tuple[str, ...], stopped: bool
) -> None:
    settings = (*rule, "fl.hash_every=2", "evaluation.every_rounds=2")
    long = run(*settings, "fl.rounds=6")
    if stopped:
        dies(monkeypatch, at_round=2)
        with pytest.raises(KeyboardInterrupt):
            run(*settings, "fl.rounds=4")
        monkeypatch.undo()
        folder = long.with_name("run1")
    else:
        folder = run(*settings, "fl.rounds=4")

    resume_run(folder, rounds=6)

    for name in LOGS:
        assert (folder / name).read_bytes() == (long / name).read_bytes()
    mine, other = replay_run(folder), replay_run(long)
    assert {**mine, "extended": None} == {**other, "extended": None}
    done = 2 if stopped else 4
    assert mine["extended"] == [{"round": done, "before": 4, "rounds": 6}]
    kept = [
        [(line["round"], line["split"], line["value"]) for line in lines(each, "metrics.jsonl") if "split" in line]
        for each in (folder, long)
    ]
    assert set(kept[1]) <= set(kept[0])
    totals = [line["rounds"] for line in lines(folder, "metrics.jsonl") if line["kind"] == "summary"]
    assert totals == ([6] if stopped else [4, 6])
    for name in ("run.json", "config.json", "config.yaml"):
        assert (folder / name).read_text() == (long / name).read_text()
    assert '"fl.rounds=6"' in (folder / "overrides.yaml").read_text()
    before = (folder / "metrics.jsonl").read_bytes()
    resume_run(folder, rounds=6)  # the same command again
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_a_run_that_goes_on_with_other_versions_says_so_once_and_keeps_both(
    finished: Run, caplog: pytest.LogCaptureFixture
) -> None:
    folder = finished("fl.rounds=2")
    told = json.loads((folder / "environment.json").read_text())
    packages = {**told["packages"], "torch": "1.0"}
    begun = {**told, "fedzo": "0.1.0+0123456789ab", "threads": 7, "platform": "an older kernel", "packages": packages}
    (folder / "environment.json").write_text(json.dumps(begun))

    resume_run(folder)  # which computes nothing more
    assert json.loads((folder / "environment.json").read_text()) == begun
    for rounds in (3, 4):
        resume_run(folder, rounds=rounds)

    changed = {"round": 2, "fedzo": told["fedzo"], "threads": 1, "torch": told["packages"]["torch"]}
    assert json.loads((folder / "environment.json").read_text()) == {**begun, "later": [changed]}
    (warned,) = [record.getMessage() for record in caplog.records if "is computed with" in record.getMessage()]
    assert f"from round 2 on, the run is computed with fedzo {told['fedzo']} (before 0.1.0+0123456789ab)" in warned
    assert "threads 1 (before 7)" in warned
    assert f"torch {told['packages']['torch']} (before 1.0)" in warned


def test_a_spoilt_environment_is_refused_before_a_model_is_loaded_and_one_that_was_deleted_is_written_anew(
    finished: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = finished("fl.rounds=2")
    file = folder / "environment.json"

    with monkeypatch.context() as patch:
        patch.setattr(train, "open_run", None)
        for spoilt in ("[]", '{"packages": null}', '{"later": null}', '{"later": [1]}'):
            file.write_text(spoilt)
            before = snapshot(folder)
            with pytest.raises(RunFolderError, match=r"/environment\.json: must hold .* or delete it to go on without"):
                resume_run(folder, rounds=3)
            assert snapshot(folder) == before
    file.unlink()
    resume_run(folder, rounds=3)

    told = json.loads(file.read_text())
    assert told["threads"] == 1
    assert "later" not in told


def test_a_kill_while_a_run_is_made_longer_is_made_up_for(
    finished: Run, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = finished("fl.rounds=2")
    written: list[str] = []
    original = resume.write_whole

    def killed(file: Path, text: str) -> None:
        written.append(file.name)
        if len(written) > 1:
            raise KeyboardInterrupt
        original(file, text)

    for module in (resume, run_folder):
        monkeypatch.setattr(module, "write_whole", killed)
    with pytest.raises(KeyboardInterrupt):
        resume_run(folder, rounds=3)
    monkeypatch.undo()
    assert replay_run(folder)["rounds"] == 2  # it can be read at any time

    resume_run(folder)

    assert len(lines(folder, "public.jsonl")) == 3
    assert json.loads((folder / "config.json").read_text())["fl"]["rounds"] == 3
    assert len([line for line in lines(folder, "metrics.jsonl") if line["kind"] == "extension"]) == 1


@pytest.mark.parametrize(
    ("settings", "rounds", "message"),
    [
        (("server_optimizer.schedule=linear",), 9, r"server_optimizer\.schedule must be constant .* got 'linear'"),
        (("server_optimizer.schedule=cosine",), 9, r"server_optimizer\.schedule must be constant .* got 'cosine'"),
        ((), 1, r"fl\.rounds must be at least 2, the run's present total, got 1"),
        ((), 1 << 40, r"fl\.rounds must be"),
    ],
)
def test_a_run_that_cannot_be_made_longer_says_why_and_is_left_alone(
    finished: Run, settings: tuple[str, ...], rounds: int, message: str
) -> None:
    folder = finished("fl.rounds=2", *settings)
    before = snapshot(folder)

    with pytest.raises(ConfigError, match=message):
        resume_run(folder, rounds=rounds)

    assert snapshot(folder) == before


def test_a_run_that_is_refused_when_it_is_made_longer_is_as_long_as_before(
    run: Run, data_dir: Path, tmp_path: Path
) -> None:
    mine = shutil.copytree(data_dir, tmp_path / "mine")
    folder = run("fl.rounds=2", f"data.path={mine}")

    def contents() -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    before = contents()
    mine.rename(tmp_path / "elsewhere")

    with pytest.raises(ConfigError, match="there is no such file or folder"):
        resume_run(folder, rounds=4)

    assert contents() == before
    (tmp_path / "elsewhere").rename(mine)
    resume_run(folder, rounds=3)
    assert replay_run(folder)["rounds"] == 3


@pytest.mark.parametrize("writes", range(5))
def test_a_kill_while_a_refused_extension_is_taken_back_is_made_up_for(
    run: Run, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    mine = shutil.copytree(data_dir, tmp_path / "mine")
    folder = run("fl.rounds=2", f"data.path={mine}")
    mine.rename(tmp_path / "elsewhere")
    original, left = resume.write_whole, writes

    def killed(file: Path, text: str) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        original(file, text)

    def refused(*_: object) -> None:
        monkeypatch.setattr(resume, "write_whole", killed)
        raise ConfigError("refused")

    monkeypatch.setattr(resume, "run_here", refused)
    with pytest.raises(KeyboardInterrupt if writes < 4 else ConfigError):
        resume_run(folder, rounds=4)
    monkeypatch.undo()
    (tmp_path / "elsewhere").rename(mine)

    resume_run(folder)

    assert replay_run(folder)["rounds"] == (4 if writes < 4 else 2)  # whichever it is, it is one of them


def test_a_report_knows_which_rounds_belong_to_which_total(finished: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedzo.report.run_data import load_run

    folder = finished("fl.rounds=2")
    dies(monkeypatch, at_round=3)
    with pytest.raises(KeyboardInterrupt):
        resume_run(folder, rounds=4)
    monkeypatch.undo()

    assert load_run(folder).summary is None
    resume_run(folder)
    told = load_run(folder)
    assert told.summary is not None
    assert (told.summary.rounds, [(each.round, each.before, each.rounds) for each in told.extensions]) == (
        4,
        [(2, 2, 4)],
    )
    assert main(["report", str(folder)]) == 0
    text = (folder / "report.html").read_text()
    assert "The run was made longer after round 2: from 2 to 4 rounds." in text


def dies(monkeypatch: pytest.MonkeyPatch, *, at_round: int) -> None:
    """Stop before this round is committed."""
    original = RunStore.commit

    def stop(self: RunStore, record: Any, **rest: Any) -> None:
        if record.round == at_round:
            raise KeyboardInterrupt
        original(self, record, **rest)

    monkeypatch.setattr(RunStore, "commit", stop)
