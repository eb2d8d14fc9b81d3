"""What a client answers while a stage works on its rows: greetings at once, requests of a round by a refusal."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict

from fedzo.config.load import load
from fedzo.config.travel import to_json
from fedzo.data.preprocess import STAGES, IdentityConfig, OnProgress
from fedzo.errors import ConfigError, PluginError, ProtocolError, problem
from fedzo.fl.client.worker import part
from fedzo.fl.messages import EvaluateRequest, Hello, Refusal, TrainRequest, encode
from fedzo.fl.site_limits import SiteError
from fedzo.run import apps, staging
from fedzo.run.process import Process, forget_process, load_ahead, open_process, this_process
from fedzo.run.start import open_run
from fedzo.system import SITE_ARTIFACTS_ENV, SITE_ENV, SITE_LOG_ENV

Overrides = Callable[..., list[str]]
DATED = len("2026-01-01 00:00:00,000 ")


class Gated:
    """Marks a row as often as it is let."""

    column: str | None = "text"

    def __init__(self) -> None:
        self.mark = "!"
        self.fails = ""
        self.let = threading.Semaphore(0)
        self.calls: list[int] = []
        self.told = threading.Semaphore(0)

    def apply(self, rows: list[dict[str, Any]], *, client: int, on_progress: OnProgress) -> list[dict[str, Any]]:
        self.calls.append(client)
        if self.fails:
            raise RuntimeError(self.fails)
        for number in range(len(rows)):
            self.let.acquire()
            on_progress(number + 1, len(rows))
            self.told.release()
        return [{**row, "text": row["text"] + self.mark} for row in rows]

    def summary(self, client: int) -> Mapping[str, float]:
        return {"marked": 3, "share": 0.5}

    def advance(self, rows: int) -> None:
        """Let so many rows be done, and wait until they are."""
        for _ in range(rows):
            self.let.release()
            assert self.told.acquire(timeout=20)


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gated]:
    made = Gated()
    monkeypatch.setattr(STAGES, "build", lambda config, context: made)
    monkeypatch.setattr(staging, "PATIENCE_S", 0.05)
    yield made
    for _ in range(1000):
        made.let.release()


@pytest.fixture
def start(overrides: Overrides, tmp_path: Path) -> Callable[[], Process]:
    """A client's process, started again each time on the same folder."""

    def make() -> Process:
        process = open_run(load(overrides("preprocess=[identity]")), tmp_path)
        process.asked_again = True
        return process

    return make


def greet(process: Process, client: int = 0, *, begun: bool = False) -> Any:
    return process.client.worker.hello(Hello(client=client, begun=begun))


def until_ready(process: Process, *, begun: bool = False) -> Any:
    """Greet until its rows are ready."""
    ends = time.monotonic() + 20
    while (reply := greet(process, begun=begun)).preparing:
        assert time.monotonic() < ends
        time.sleep(0.01)
    return reply


def requests(process: Process) -> Iterator[Callable[[], object]]:
    worker, config_hash = process.client.worker, process.identity.config_hash
    yield lambda: worker.train(TrainRequest(client=0, config_hash=config_hash))
    yield lambda: worker.evaluate(EvaluateRequest(client=0, config_hash=config_hash))


def test_a_greeting_is_answered_by_how_far_the_stages_are(start: Callable[[], Process], stage: Gated) -> None:
    process = start()
    first = greet(process)
    rows = first.preparing
    stage.advance(3)

    later = greet(process)

    assert rows > 3
    assert (first.prepared, first.refusal, first.rows_digest) == (0, Refusal.none, "")
    assert first.base_digest == process.identity.base_digest  # another model is found before hours are spent
    assert (later.prepared, later.preparing) == (3, rows)
    assert stage.calls == [0]


def test_a_request_of_a_round_is_refused_at_once_while_the_stages_work(
    start: Callable[[], Process], stage: Gated, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = start()
    rows = greet(process).preparing
    stage.advance(3)
    monkeypatch.setattr(staging, "PATIENCE_S", 60.0)  # a first greeting may wait so long, a round may not
    began = time.monotonic()

    for ask in requests(process):
        with pytest.raises(SiteError) as refused:
            ask()
        assert refused.value.refusal is Refusal.preparing

    assert time.monotonic() - began < 30.0
    stage.advance(rows - 3)
    assert until_ready(process).num_train == rows
    assert stage.calls == [0]  # which went on as if nobody had asked


def test_a_client_whose_stages_are_done_registers_what_they_made_and_takes_part(
    start: Callable[[], Process], stage: Gated
) -> None:
    process = start()
    rows = greet(process).preparing
    stage.advance(rows)

    reply = until_ready(process)

    assert (reply.num_train, reply.prepared) == (rows, 0)
    assert json.loads(reply.stages) == {"identity.marked": 3.0, "identity.share": 0.5}
    assert {row["text"][-1] for row in process.client.staging.rows(0).train} == {"!"}
    assert greet(process) == reply
    assert stage.calls == [0]
    for ask in requests(process):
        with pytest.raises(ProtocolError, match="artifact"):  # it goes on to what the request lacks
            ask()


def test_clients_of_one_process_are_staged_one_after_another(start: Callable[[], Process], stage: Gated) -> None:
    process = start()
    rows = greet(process, 0).preparing
    assert greet(process, 1).preparing
    stage.advance(rows - 1)
    assert stage.calls == [0]

    stage.advance(2)

    assert until_ready(process).num_train == rows
    assert greet(process, 1).prepared == 1


def test_what_fails_is_told_once_and_begun_again_at_the_next_greeting(
    start: Callable[[], Process], stage: Gated, caplog: pytest.LogCaptureFixture
) -> None:
    process, stage.fails = start(), "the key of the endpoint is secret-7"

    reply = greet(process)

    assert reply.refusal is Refusal.rows
    assert "secret-7" in caplog.text
    assert "secret-7" not in repr(reply)
    stage.fails = ""
    assert (greet(process).preparing > 0, stage.calls) == (True, [0, 0])


def test_a_process_that_was_started_again_must_find_the_result_with_which_the_run_began(
    start: Callable[[], Process], stage: Gated, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(500):
        stage.let.release()
    begun = until_ready(start())
    same, other = start(), start()
    assert until_ready(same, begun=True) == begun
    stage.mark = "?"

    reply = until_ready(other, begun=True)

    assert reply.refusal is Refusal.changed
    assert "rows of client 0 after preprocess=identity: they must be the" in caplog.text
    assert "A stage gave other text" in caplog.text
    within_a_round = start()
    asks = [*requests(within_a_round)]
    assert until_ready(within_a_round, begun=True).refusal is Refusal.changed  # its stage is done
    for ask in asks:
        with pytest.raises(SiteError, match="refusal 2, its rows are not those that it began the run with"):
            ask()


def test_a_process_that_was_started_again_trains_on_no_other_rows(overrides: Overrides, tmp_path: Path) -> None:
    """Nobody greets it, and its step's rows are drawn by their number."""
    config = load(overrides())
    greet(open_run(config, tmp_path))
    same, other = open_run(config, tmp_path), open_run(config, tmp_path)
    fewer = other.source.rows_for(0)[1:]
    other.source = SimpleNamespace(rows_for=lambda client: fewer, partition_digest=other.source.partition_digest)

    for ask in requests(same):
        with pytest.raises(ProtocolError, match="artifact"):  # it goes on to what the request lacks
            ask()
    for ask in (*requests(other), *requests(other)):
        with pytest.raises(SiteError, match="refusal 2, its rows are not those that it began the run with"):
            ask()


def test_rows_that_are_forgotten_are_read_and_compared_anew(start: Callable[[], Process], stage: Gated) -> None:
    """After a greeting was refused; what the stage has spent stays spent."""
    for _ in range(500):
        stage.let.release()
    process = start()
    begun = until_ready(process)
    assert stage.calls == [0]

    process.client.forget_rows()
    assert until_ready(process) == begun
    assert stage.calls == [0, 0]
    process.client.forget_rows()
    fewer = process.source.rows_for(0)[1:]
    process.source = SimpleNamespace(rows_for=lambda client: fewer)

    for ask in requests(process):
        with pytest.raises(SiteError, match="refusal 2, its rows are not those that it began the run with"):
            ask()


@pytest.mark.parametrize("forgets", [False, True])
def test_rows_that_change_while_stages_work_are_not_those_of_the_run(
    start: Callable[[], Process], stage: Gated, forgets: bool
) -> None:
    """It goes on with what the stages were given, and so does a process that is started again, once that is back."""
    process = start()
    rows = greet(process).preparing
    stage.advance(1)
    fewer = process.source.rows_for(0)[1:]
    process.source = SimpleNamespace(rows_for=lambda client: fewer)  # of which the stages know nothing

    if forgets:  # as where another client of this process was refused
        process.client.forget_rows()
    assert greet(process).prepared == 1
    stage.advance(rows - 1)
    begun = until_ready(process)

    assert begun.num_train == rows
    for _ in range(500):
        stage.let.release()
    assert until_ready(start(), begun=True) == begun


def test_rows_that_change_before_a_node_comes_back_are_not_those_of_the_run(
    overrides: Overrides, tmp_path: Path
) -> None:
    """The process holds the rows that it was greeted with first, and trains on them."""
    config = load(overrides())
    process = open_run(config, tmp_path)
    first = greet(process)
    fewer = process.source.rows_for(0)[1:]
    process.source = SimpleNamespace(rows_for=lambda client: fewer)

    assert greet(process) == first

    assert greet(open_run(config, tmp_path), begun=True) == first


@pytest.mark.usefixtures("flower_task")
def test_a_site_whose_memory_is_short_when_it_is_greeted_may_be_asked_again(
    start: Callable[[], Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    def worker(context: Any) -> Any:
        raise ConfigError("model.name: the memory does not hold it") from MemoryError()

    monkeypatch.setattr(apps, "_worker", worker)
    message = Message(encode(Hello(client=0)), dst_node_id=1, message_type="query.hello")

    with pytest.raises(SiteError) as refused:
        apps.client_app(message, Context(1, 1, {}, RecordDict(), {}))

    assert refused.value.refusal is Refusal.memory


def test_a_greeting_that_is_not_asked_again_waits_until_the_rows_are_ready(
    start: Callable[[], Process], stage: Gated
) -> None:
    process = start()
    process.asked_again = False
    threading.Timer(0.5, lambda: [stage.let.release() for _ in range(500)]).start()

    assert greet(process).num_train > 0


def test_a_run_that_is_let_go_stops_its_stages(start: Callable[[], Process], stage: Gated) -> None:
    process = start()
    greet(process)
    (job,) = process.client.staging._jobs.values()

    process.stop()
    stage.let.release()

    with pytest.raises(staging.StoppedError):
        job.result(20)


def test_a_stage_that_ends_its_thread_does_not_end_whoever_asks() -> None:
    with pytest.raises(PluginError, match=r"a preprocess stage must return or raise, got SystemExit\(1\)"):
        staging.StagingJob(lambda told: sys.exit(1)).result(20)


@pytest.fixture
def site_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The log that a site's process writes; the loggers are left as they were."""
    monkeypatch.setenv(SITE_LOG_ENV, str(tmp_path / "site.log"))
    monkeypatch.delenv(SITE_ENV, raising=False)
    monkeypatch.setattr(logging.getLogger("fedzo"), "handlers", [])
    load_ahead()
    yield tmp_path / "site.log"
    part.setLevel(logging.CRITICAL)
    for handler in logging.getLogger("fedzo").handlers:
        handler.close()


def test_a_site_writes_into_its_log_once_that_it_takes_part_and_why_it_does_not(
    overrides: Overrides, tmp_path: Path, site_log: Path
) -> None:
    process = open_run(load(overrides()), tmp_path)
    worker, config_hash = process.client.worker, process.identity.config_hash
    refused = "node 7 is refused: client 0: its tokenizer must be the server's\n\x1b[2J"

    for why in ("", refused, refused):
        worker.hello(Hello(client=0, why=why))
    for _ in range(2):
        with pytest.raises(ProtocolError, match="artifact"):
            worker.train(TrainRequest(client=0, config_hash=config_hash))
    worker.hello(Hello(client=0, why="no reply since round 7"))

    lines = site_log.read_text().splitlines()
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ", line[:DATED]) for line in lines)
    assert [line[DATED:] for line in lines] == [
        "registering as client 0",
        "not registered as client 0: node 7 is refused: client 0: its tokenizer must be the server's  [2J",
        "registered as client 0",
        "not registered as client 0: no reply since round 7",
    ]


def test_a_site_goes_on_with_its_log_where_the_file_is_renamed(site_log: Path) -> None:
    """As by logrotate, if nothing else is asked of it."""
    log = logging.getLogger("fedzo.somewhere")
    log.error("before")

    site_log.rename(site_log.with_name("site.log.1"))
    log.error("after")

    assert [line[DATED:] for line in site_log.read_text().splitlines()] == ["after"]
    assert [line[DATED:] for line in site_log.with_name("site.log.1").read_text().splitlines()] == ["before"]


def test_a_site_keeps_what_it_takes_part_in_before_any_row_is_read(
    overrides: Overrides, tmp_path: Path, site_log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name of the run is the begin of a SHA-256 of what its peers agreed on, as if it had one round."""
    config, run_dir, site = load(overrides("fl.rounds=7")), tmp_path / "run", tmp_path / "site"
    for folder in (run_dir, site):
        folder.mkdir()
        (folder / "site.json").write_text(to_json(config.site()))
    open_run(config, run_dir)
    text = (run_dir / "run.json").read_text()
    agreed = json.loads(text)
    agreed["fl"]["rounds"] = 1
    canonical = json.dumps(agreed, sort_keys=True, separators=(",", ":"))
    kept = site / "runs" / f"{hashlib.sha256(canonical.encode()).hexdigest()[:16]}.json"

    for folder in (run_dir, site):  # a client of a simulation, and a site
        monkeypatch.setenv(SITE_ENV, str(folder / "site.json"))
        forget_process()
        this_process(text)

    (line,) = site_log.read_text().splitlines()
    told = f"run {kept.stem}: task {agreed['task']['name']}, trainer meerkat, 7 rounds; its settings are in {kept}"
    assert line[DATED:] == told
    assert kept.read_text() == text
    assert stat.S_IMODE(kept.parent.stat().st_mode) == 0o700
    assert not (run_dir / "runs").exists()
    assert not (site / "rows").exists()
    forget_process()
    shutil.rmtree(site / "runs")
    (site / "runs").touch()
    with pytest.raises(ConfigError, match=r"the settings of the run must be kept there, got 'File exists'\. Make"):
        this_process(text)


def test_what_a_site_writes_as_root_belongs_to_the_owner_of_its_folder(
    overrides: Overrides,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    site_log: Path,
    monkeypatch: pytest.MonkeyPatch,
    given_by_root: Callable[[], set[Path]],
) -> None:
    """After ``sudo fedzo client up`` the service could not keep what it must of any run."""
    config, run_dir = load(overrides()), tmp_path_factory.mktemp("run")
    open_run(config, run_dir)
    file = tmp_path / "site.json"
    file.write_text(to_json(config.site()))
    monkeypatch.setenv(SITE_ENV, str(file))
    monkeypatch.delenv(SITE_ARTIFACTS_ENV, raising=False)
    forget_process()

    greet(this_process((run_dir / "run.json").read_text()))

    forget_process()
    written = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*")}
    assert written == {"site.json", "site.log", "runs", "rows"}
    assert given_by_root() == {*tmp_path.rglob("*")} - {file}


def test_a_log_of_a_site_that_is_a_link_leads_on_to_its_file(site_log: Path) -> None:
    site_log.symlink_to(site_log.with_name("elsewhere.log"))

    logging.getLogger("fedzo.somewhere").error("told")

    assert [line[DATED:] for line in site_log.with_name("elsewhere.log").read_text().splitlines()] == ["told"]


def test_a_site_that_lacks_what_a_stage_needs_refuses_before_it_loads_its_model(
    start: Callable[[], Process], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server plays no clients and is not asked."""
    peer = start().peer
    lacks = problem("rewriter", "name who rewrites", "none", "Set rewriter=<option>.")
    monkeypatch.setattr(IdentityConfig, "site_problems", lambda self, rewriter: iter([lacks]))

    def load(site: object, max_length: int) -> Any:
        raise AssertionError("it loads")

    with pytest.raises(SiteError) as refused:
        open_process(peer.config, peer.site, site_folder=tmp_path, artifacts=tmp_path, plays_clients=True, load=load)
    assert (refused.value.refusal, refused.value.details) == (Refusal.stage, lacks.text)
    assert "rewriter" not in str(refused.value)
    with pytest.raises(AssertionError, match="it loads"):
        open_process(peer.config, peer.site, site_folder=tmp_path, artifacts=tmp_path, load=load)
