"""A run killed at seeded instants and resumed each time ends as if it had never been killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedzo.commands.replay import replay_run
from fedzo.commands.resume import resume_run, start_or_resume_run
from fedzo.config.load import load
from fedzo.errors import RunFolderError
from fedzo.fl.server.client_registry import ClientRegistry
from fedzo.records.folder import FAILED, STOP
from fedzo.report.html import write_report
from fedzo.run.scores import Scores

ROUNDS = 12

# Runs a command of the CLI in a process that kills itself at one instant of one round: SIGKILL, no clean-up of any
# kind.
CHILD = """
import json, os, signal, sys
point, at_round = sys.argv[1], int(sys.argv[2])
from fedzo.fl import log_files as files, log_store as store
from fedzo.fl import replica
from fedzo.fl.client import scalar_update
from fedzo.fl.server import rounds as server
from fedzo.zo import log as path

def is_public(line):
    return isinstance(line, store.ScalarLine)

def die_before(owner, name, when):
    original = getattr(owner, name)
    def wrapped(*args, **kwargs):
        if when(*args, **kwargs):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    setattr(owner, name, wrapped)

if point == "between the metrics and the log":
    die_before(store.RunStore, "commit", lambda self, record, **kw: record.round == at_round)
elif point == "between audit and public line":
    die_before(files.OpenLog, "append", lambda self, line, durable: is_public(line) and line.round == at_round)
elif point == "in a half written public line":
    def torn(self, line, *, durable, original=files.OpenLog.append):
        if is_public(line) and line.round == at_round:
            self._file.write(files.to_json(line).encode()[:20]); os.fsync(self._file.fileno())
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, line, durable=durable)
    files.OpenLog.append = torn
elif point == "in a probe":
    die_before(scalar_update, "example_losses", lambda *a, **kw: at_round == len(server_rounds()))
elif point == "before the metrics":
    die_before(server, "round_metrics", lambda record, *a, **kw: record.round == at_round)
elif point == "before a dev score":
    from fedzo.run import scores
    die_before(scores, "evaluate", lambda *a, **kw: at_round == len(server_rounds()))

def server_rounds():
    folder = [word.split("=", 1)[1] for word in sys.argv if word.startswith("hydra.run.dir=")] or [sys.argv[-1]]
    try:
        return open(os.path.join(folder[0], "public.jsonl")).readlines()
    except OSError:
        return []

from fedzo.cli import main
sys.exit(main(sys.argv[3:]))
"""
POINTS = [
    "between the metrics and the log",
    "between audit and public line",
    "in a half written public line",
    "in a probe",
    "before the metrics",
    "before a dev score",
]


def instants() -> list[tuple[str, int]]:
    """Seeded (point, round) pairs in the order of rounds, each point once."""
    draw = random.Random(20261121)
    points = draw.sample(POINTS, k=len(POINTS))
    chosen = sorted(draw.sample(range(1, ROUNDS), k=len(POINTS)))
    return [
        (point, round + round % 2 if point == "before a dev score" else round)
        for point, round in zip(points, chosen, strict=True)
    ]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("runtime", "count"), [("inline", 6), ("inline_batched", 2)])
def test_a_run_killed_again_and_again_ends_with_the_hash_of_an_unbroken_one(
    runtime: str,
    count: int,
    overrides: Callable[..., list[str]],
    tmp_path: Path,
    run: Callable[..., Path],
    lines: Callable[..., list[dict[str, Any]]],
    forked: Callable[..., tuple[int, str]],
    forked_fedzo: Callable[..., tuple[int, str]],
) -> None:
    faults = "faults.absent=['1@3','2@7']"
    settings = (f"runtime={runtime}", f"fl.rounds={ROUNDS}", "fl.local_steps=2", faults, "server_optimizer.lr=0.02")
    unbroken = run(*settings)
    broken = tmp_path / "broken"
    command = ["train", *overrides(*settings), f"hydra.run.dir={broken}"]

    kills = 0
    for point, round in instants()[:count]:
        code, said = forked(CHILD, point, str(round), *command)
        assert code in (0, -signal.SIGKILL), said[-3000:]
        kills += code == -signal.SIGKILL
        command = ["resume", str(broken)]
    if runtime == "inline":  # in a process that imports everything itself
        done = subprocess.run([sys.executable, "-m", "fedzo", *command], capture_output=True, text=True, timeout=300)
        code, said = done.returncode, done.stderr
    else:
        code, said = forked_fedzo(*command)
    assert code == 0, said[-3000:]

    assert kills == count
    assert (broken / "public.jsonl").read_bytes() == (unbroken / "public.jsonl").read_bytes()
    assert (broken / "audit.jsonl").read_bytes() == (unbroken / "audit.jsonl").read_bytes()
    summaries = [lines(folder, "metrics.jsonl")[-1] for folder in (broken, unbroken)]
    sums = ("dropped_probes", "payload_up_bytes", "payload_down_bytes", "message_up_bytes", "message_down_bytes")
    same = ("final_digest", "best_round", "rounds", *sums)
    assert [summaries[0][name] for name in same] == [summaries[1][name] for name in same]
    assert summaries[0]["after"]["value"] == summaries[1]["after"]["value"]
    dev = [
        [(x["round"], x["value"]) for x in lines(f, "metrics.jsonl") if x.get("split") == "dev"]
        for f in (broken, unbroken)
    ]
    assert dev[0] == dev[1]
    clients = [
        {x["round"]: x["clients"] for x in lines(f, "metrics.jsonl") if x["kind"] == "round"}
        for f in (broken, unbroken)
    ]
    assert len(clients[0]) == ROUNDS
    assert clients[0] == clients[1]  # running means of all steps among them


def test_resuming_a_finished_run_changes_nothing_and_says_how_it_is_made_longer(
    finished: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = finished()
    before = (folder / "public.jsonl").read_bytes()

    resume_run(folder)

    assert "rounds are done, and only verified. `fedzo resume" in caplog.text
    assert (folder / "public.jsonl").read_bytes() == before
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["kind"] == "summary"


def test_a_run_without_its_metrics_is_not_resumed_since_they_hold_its_scores_and_what_it_began_with(
    finished: Callable[..., Path],
) -> None:
    """It would compare no rows, forget who had registered, and take the best of the new scores for the run's best."""
    folder = finished("fl.rounds=2")
    rows = {file.name: file.read_bytes() for file in (folder / "rows").iterdir()}
    (folder / "metrics.jsonl").unlink()

    with pytest.raises(RunFolderError, match=r"metrics\.jsonl: it must hold what the run began with"):
        resume_run(folder, rounds=3)

    assert {file.name: file.read_bytes() for file in (folder / "rows").iterdir()} == rows
    assert json.loads((folder / "run.json").read_text())["fl"]["rounds"] == 2


def test_a_page_that_was_made_on_demand_is_not_left_behind_by_a_longer_run(run: Callable[..., Path]) -> None:
    folder = run("fl.rounds=2", "report=none")
    assert not (folder / "report.html").exists()
    before = write_report(folder).read_text()

    resume_run(folder, rounds=3)

    after = (folder / "report.html").read_text()
    assert before != after


def test_a_changed_log_is_found_out_by_replay(finished: Callable[..., Path]) -> None:
    from fedzo.errors import ProtocolError

    folder = finished()
    lines = [json.loads(line) for line in (folder / "public.jsonl").read_text().splitlines()]
    lines[1]["c"][0][0][0] += 1e-3
    (folder / "public.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    with pytest.raises(ProtocolError, match="log, round 1: chain must be"):
        replay_run(folder)


def _hears() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may have been started with nohup


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("runtime", "number"),
    [
        ("inline", signal.SIGTERM),
        ("inline", signal.SIGHUP),
        pytest.param("local", signal.SIGTERM, marks=pytest.mark.net),
        pytest.param("ray", signal.SIGTERM, marks=pytest.mark.sim),
    ],
)
def test_a_run_that_is_told_to_end_says_how_it_goes_on(
    runtime: str, number: signal.Signals, overrides: Callable[..., list[str]], tmp_path: Path
) -> None:
    few = [f"runtime={runtime}", "fl.num_clients=2", "fl.rounds=100000"]
    words = overrides(*few, f"hydra.run.dir={tmp_path / 'run'}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "fedzo", "train", *words],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_hears,
    ) as run:
        ends = time.monotonic() + 200
        while not (tmp_path / "run" / "public.jsonl").exists() or not (tmp_path / "run" / "public.jsonl").read_bytes():
            assert time.monotonic() < ends
            time.sleep(0.05)
        started = psutil.Process(run.pid).children(recursive=True)
        run.send_signal(number)
        assert run.stderr is not None
        said = run.stderr.read()
        assert run.wait(60) == 130

    _, left = psutil.wait_procs(started, timeout=15)
    assert (left, bool(started)) == ([], runtime != "inline")
    assert "Traceback" not in said
    assert f"fedzo: interrupted. Continue with: fedzo resume {tmp_path / 'run'}" in said
    assert replay_run(tmp_path / "run")["rounds"] > 0


def test_a_process_that_is_deaf_to_a_hang_up_stays_so() -> None:
    program = "import signal; from fedzo.cli import stopped_by_signals\nwith stopped_by_signals(): "
    program += (
        "print([signal.getsignal(each) is signal.default_int_handler for each in (signal.SIGHUP, signal.SIGTERM)])"
    )
    deaf = subprocess.run(
        [sys.executable, "-c", program],
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
        capture_output=True,
        text=True,
    )

    assert deaf.stdout.strip() == "[False, True]"


def test_an_interrupted_sweep_goes_on_and_leaves_finished_runs_alone(
    overrides: Callable[..., list[str]], tmp_path: Path, forked_fedzo: Callable[..., tuple[int, str]]
) -> None:
    def sweep(*extra: str) -> tuple[int, str]:
        words = overrides(f"hydra.sweep.dir={tmp_path}", "hydra.sweep.subdir=job${hydra:job.num}", *extra)
        words = [*(word for word in words if not word.startswith("seed=")), "seed=0,1"]
        return forked_fedzo("train", "-m", *words)

    code, said = sweep()
    assert code == 0, said
    first, second = sorted(path.parent for path in tmp_path.glob("*/public.jsonl"))
    whole = (second / "public.jsonl").read_bytes()
    for name in ("public.jsonl", "audit.jsonl"):
        (second / name).write_bytes((second / name).read_bytes().splitlines(keepends=True)[0])
    told = (second / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    ends = next(number for number, line in enumerate(told) if b'"kind":"round"' in line and b'"round":1,' in line)
    (second / "metrics.jsonl").write_bytes(b"".join(told[: ends + 1]))
    finished = (first / "metrics.jsonl").stat().st_mtime_ns

    code, said = sweep()
    assert code == 0, said
    assert (second / "public.jsonl").read_bytes() == whole
    assert (first / "metrics.jsonl").stat().st_mtime_ns == finished
    code, said = sweep("fl.batch_size=3")
    assert code == 1
    assert "holds a run of other settings" in said


@pytest.fixture
def stopped(run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A run that was asked to stop while it started."""
    folder, taken = tmp_path / "run0", Scores.take

    def take_and_stop(scores: Scores, split: Any, *, rounds: int) -> None:
        (folder / STOP).touch()
        taken(scores, split, rounds=rounds)

    with monkeypatch.context() as patch:
        patch.setattr(Scores, "take", take_and_stop)
        with pytest.raises(KeyboardInterrupt):
            run()
    return folder


def test_an_interrupted_job_goes_on_where_the_repeated_command_says(
    stopped: Path, overrides: Callable[..., list[str]], lines: Callable[..., list[dict[str, Any]]]
) -> None:
    folder = stopped
    (folder / FAILED).touch()  # as an earlier start would leave it
    begun = json.loads((folder / "config.json").read_text())
    begun["rewriter"]["store"] = "/of/the/first/command"
    (folder / "config.json").write_text(json.dumps(begun))
    names = ("config.json", "config.yaml", "overrides.yaml")
    before = [(folder / name).read_bytes() for name in names]
    other, words = overrides("threads=2", "fl.batch_size=3"), overrides("threads=2")

    with pytest.raises(RunFolderError, match="it holds a run of other settings"):
        start_or_resume_run(load(other), folder, overrides=other)
    assert [(folder / name).read_bytes() for name in names] == before
    start_or_resume_run(load(words), folder, overrides=words)

    for name in ("config.json", "site.json"):
        told = json.loads((folder / name).read_text())
        assert told["threads"] == 2
        assert told["rewriter"]["store"] == "/of/the/first/command"  # which has the rewrites, if there are any
    assert '"threads=2"' in (folder / "overrides.yaml").read_text()
    assert not (folder / FAILED).exists()
    assert lines(folder, "metrics.jsonl")[-1]["kind"] == "summary"


def test_a_run_that_is_asked_to_stop_while_it_starts_stops_before_its_next_round_and_goes_on(stopped: Path) -> None:
    folder = stopped

    assert (folder / "public.jsonl").read_bytes() == b""
    assert not (folder / STOP).exists()
    (folder / STOP).touch()  # as a process that was killed would leave it
    resume_run(folder)
    assert replay_run(folder)["rounds"] == 3


def test_a_run_that_waits_for_its_clients_is_stopped_too(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "run0"
    monkeypatch.setattr(ClientRegistry, "refresh", lambda registry, grid: (folder / STOP).touch())

    with pytest.raises(KeyboardInterrupt):
        run("runtime=inline", "strategy.startup_s=600")

    assert not (folder / STOP).exists()
