"""The logs on disk: what is committed survives, what is half written is dropped."""

from __future__ import annotations

import errno
import gc
import io
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedzo.config.schema import RunSettings
from fedzo.errors import RunFolderError
from fedzo.evaluate import AnswersConfig
from fedzo.fl import log_store
from fedzo.fl.config import BestBy, EvaluationConfig
from fedzo.fl.log_store import RunLog, RunStore, best_round
from fedzo.records.decode import encode, to_json
from fedzo.records.folder import AUDIT, METRICS, PUBLIC
from fedzo.records.log import AuditLine, Proof, ScalarAudit, ScalarAuditLine, decode_audit
from fedzo.records.metrics import (
    CentralScore,
    ClientRound,
    ClientScore,
    ClientVerdict,
    Extension,
    FederatedScore,
    MetricRecord,
    Round,
    Setup,
    StepDecision,
    StepSignals,
    Summary,
)
from fedzo.testing.logs import audit_line
from fedzo.zo.directions import SHARED
from fedzo.zo.log import ScalarRecord, VectorRecord


def record(round: int) -> ScalarRecord:
    c = np.full((1, 1, 1), 0.1 * (round + 1), np.float32)
    return ScalarRecord(round=round, lr=0.5, owners=(SHARED,), coefficients=c)


def audit(round: int) -> ScalarAuditLine:
    return audit_line({0: [[0.5]]}, round=round)


def told(round: int, *, loss: float | None = 1.0) -> Round:
    signals = StepSignals(
        grad_ip=(None,), abs_g=(0.5,), loss=(1.0,), cosine=(None,), mean_abs_grad_ip=None, mean_abs_g=0.5
    )
    return Round(
        seconds=1.0,
        round=round,
        calibration=False,
        loss=loss,
        mean_abs_g=0.5,
        payload_up_bytes=4,
        payload_down_bytes=4,
        message_up_bytes=90,
        message_down_bytes=90,
        round_seconds=0.5,
        dropped_probes=0,
        clip_bound=None,
        clipped=0,
        absent=(1,),
        reasons={1: "no reply"},
        clients=(ClientRound(client=0, loss=loss, abs_g=0.5, steps=1, signals=signals),),
    )


def scored(round: int, value: float, loss: float | None, *, split: str = "dev") -> CentralScore:
    return CentralScore("accuracy", value, loss, 9, seconds=1.0, evaluator="answers", split=split, round=round)


def ended(rounds: int) -> Summary:
    nothing = dict.fromkeys(("before", "after", "worst_client", "step_policy", "final_digest"))
    sums = ("dropped_probes", "payload_up_bytes", "payload_down_bytes", "message_up_bytes", "message_down_bytes")
    return Summary(seconds=1.0, rounds=rounds, best_round=rounds, **nothing, **dict.fromkeys(sums, 0))


def decided(round: int) -> StepDecision:
    return StepDecision(seconds=1.0, round=round, windows=None, clients=(), fallback=False)


EXTENSION = Extension(seconds=1.0, round=2, before=2, rounds=4)


def commit(store: RunStore, round: int) -> None:
    proof = Proof(chain="0" * 64, check=round, digest=None)
    store.commit(record(round), attendance=[0], proof=proof, audit=audit(round))


def opened(folder: Path) -> RunStore:
    """The folder as it is read; the files are closed again."""
    with RunStore(folder) as store:
        return store


def open_with(folder: Path, rounds: int) -> RunStore:
    store = RunStore(folder)
    for round in range(rounds):
        commit(store, round)
        store.write(told(round))
    return store


def test_what_is_committed_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    open_with(tmp_path, 3).close()

    again = opened(tmp_path)

    assert [r.to_bytes() for r in again.records] == [record(i).to_bytes() for i in range(3)]
    assert [line.check for line in again.public] == [0, 1, 2]
    assert [line.round for line in again.metrics] == [0, 1, 2]


def test_a_run_is_kept_also_where_the_file_system_knows_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(opened: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refused)

    open_with(tmp_path, 2).close()

    assert len(opened(tmp_path).records) == 2


SETUP = Setup(seconds=1.0, trainer="mezo", num_params=9, space_size=9, setup_down_bytes=0, estimate=None, clients=())


@pytest.mark.parametrize(
    ("line", "synced"),
    [
        (SETUP, True),
        (EXTENSION, True),
        (decided(0), True),
        (scored(0, 0.5, 1.0), True),
        (ended(0), True),
        (told(0), False),
    ],
    ids=["setup", "extension", "step policy", "score", "summary", "round"],
)
def test_what_a_resumed_run_depends_on_is_on_the_disk_before_the_next_thing(
    tmp_path: Path, line: MetricRecord, synced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_disk: list[bytes] = []
    monkeypatch.setattr("os.fsync", lambda number: on_disk.append((tmp_path / METRICS).read_bytes()))

    with RunStore(tmp_path) as store:
        on_disk.clear()
        store.write(line)

        assert on_disk == ([to_json(line).encode() + b"\n"] if synced else [])


@pytest.mark.parametrize("torn", ['{"round":3,"c', '{"round":3', "x"])
def test_a_half_written_line_is_dropped(tmp_path: Path, torn: str) -> None:
    open_with(tmp_path, 3).close()
    with (tmp_path / PUBLIC).open("a") as file:
        file.write(torn)

    store = RunStore(tmp_path)
    commit(store, 3)
    store.close()

    assert len(opened(tmp_path).records) == 4


def test_the_writer_says_what_it_cuts_and_the_reader_cuts_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    open_with(tmp_path, 3).close()
    with (tmp_path / PUBLIC).open("a") as file:
        file.write('{"round":3')
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    assert len(RunLog(tmp_path).records) == 3
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert caplog.messages == []
    opened(tmp_path)

    assert caplog.messages == [f"{tmp_path / PUBLIC}: its last line was unfinished; 10 bytes are cut off"]
    assert (tmp_path / PUBLIC).read_bytes() == before[PUBLIC][:-10]


def test_a_whole_last_line_counts_without_its_newline(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    open_with(tmp_path, 3).close()
    whole = {name: (tmp_path / name).read_bytes() for name in (PUBLIC, AUDIT, METRICS)}
    for name, data in whole.items():
        (tmp_path / name).write_bytes(data.removesuffix(b"\n"))

    log = RunLog(tmp_path)
    assert (len(log.records), len(log.audit), len(log.metrics)) == (3, 3, 3)
    opened(tmp_path)

    assert {name: (tmp_path / name).read_bytes() for name in whole} == whole
    assert [message.rpartition(": ")[2] for message in caplog.messages] == [
        "its last line had no newline; it is added"
    ] * 3


def test_a_log_that_is_a_link_a_pipe_or_another_folders_too_is_refused(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "run"
    open_with(folder, 2).close()
    (folder / PUBLIC).rename(outside)
    outside.write_bytes(outside.read_bytes() + b"torn")
    held = outside.read_bytes()

    (folder / PUBLIC).symlink_to(outside)
    for reader in (RunLog, RunStore):
        with pytest.raises(RunFolderError, match=r"public\.jsonl: it must lie in its folder itself, got a link to"):
            reader(folder)
    (folder / PUBLIC).unlink()
    os.mkfifo(folder / PUBLIC)
    for reader in (RunLog, RunStore):
        with pytest.raises(RunFolderError, match=r"public\.jsonl: it must be a regular file"):
            reader(folder)
    (folder / PUBLIC).unlink()
    os.link(outside, folder / PUBLIC)
    assert len(RunLog(folder).records) == 2
    with pytest.raises(RunFolderError, match="hard links"):
        RunStore(folder)
    assert outside.read_bytes() == held


def test_audit_and_metrics_of_a_round_that_was_not_committed_are_dropped(tmp_path: Path) -> None:
    open_with(tmp_path, 2).close()
    with (tmp_path / AUDIT).open("a") as file:
        file.write(to_json(audit(2)) + "\n")
    with (tmp_path / METRICS).open("a") as file:
        for line in (scored(2, 0.5, 1.0), told(2), scored(3, 0.5, 1.0), ended(3)):
            file.write(to_json(line) + "\n")

    store = opened(tmp_path)

    assert [line.round for line in store.audit] == [0, 1]
    assert [(line.kind, line.round) for line in store.metrics] == [("round", 0), ("round", 1), ("score", 2)]
    assert opened(tmp_path).metrics == store.metrics


def test_two_processes_cannot_use_one_folder(tmp_path: Path) -> None:
    store = RunStore(tmp_path)

    with pytest.raises(RunFolderError, match="another process is using it"):
        RunStore(tmp_path)
    store.close()
    opened(tmp_path)


def test_a_line_that_another_process_is_writing_is_left_alone(tmp_path: Path) -> None:
    store = open_with(tmp_path, 2)
    with (tmp_path / PUBLIC).open("a") as file:
        file.write('{"round":2,"c')  # half of what the process that holds the folder is about to complete
    before = (tmp_path / PUBLIC).read_bytes()

    with pytest.raises(RunFolderError, match="another process is using it"):
        RunStore(tmp_path)

    assert (tmp_path / PUBLIC).read_bytes() == before
    store.close()


@pytest.mark.parametrize(
    ("lines", "takes_back"),
    [
        ([told(2)], False),
        ([told(2), scored(3, 0.5, 1.0), ended(3), EXTENSION, decided(3)], False),
        ([EXTENSION, decided(2), scored(2, 0.5, 1.0)], True),
    ],
    ids=["a round was not committed", "the public log is a copy", "a longer run was refused"],
)
def test_a_kill_at_any_byte_of_a_cut_loses_no_line_that_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[MetricRecord], takes_back: bool
) -> None:
    folder, killed, states = tmp_path / "run", tmp_path / "killed", list[dict[str, bytes]]()
    open_with(folder, 2).close()
    kept = (folder / METRICS).read_bytes()
    for name, added in ((AUDIT, [audit(2)]), (METRICS, lines)):
        with (folder / name).open("a") as file:
            file.writelines(to_json(line) + "\n" for line in added)

    class Watched(io.FileIO):
        """Takes a byte at a time, and keeps what a kill after it, or after a cut, would leave of the folder."""

        def write(self, data: Any) -> int:
            written = super().write(bytes(data[:1]))
            states.append({path.name: path.read_bytes() for path in folder.iterdir()})
            return written

        def truncate(self, size: int | None = None) -> int:
            cut = super().truncate(size)
            states.append({path.name: path.read_bytes() for path in folder.iterdir()})
            return cut

    fdopen = os.fdopen

    def watched(number: int, mode: str, **how: Any) -> Any:
        return Watched(number, mode) if "a" in mode else fdopen(number, mode, **how)

    with monkeypatch.context() as patch:
        patch.setattr("os.fdopen", watched)
        with RunStore(folder) as store:
            if takes_back:
                store.take_back(EXTENSION)
    after = (folder / METRICS).read_bytes()

    assert states
    killed.mkdir()
    for state in states:
        for name, data in state.items():
            (killed / name).write_bytes(data)
        again = opened(killed)
        assert [line.round for line in again.audit] == [0, 1]
        assert (killed / METRICS).read_bytes().startswith(after)
    assert after == kept


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device that is always full")
def test_a_full_disk_says_what_to_do_and_keeps_what_was_committed(tmp_path: Path) -> None:
    store = open_with(tmp_path, 2)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, store._public.fileno())  # every later write fails with the kernel's own ENOSPC

    with pytest.raises(RunFolderError, match=r"No space left on device.*fedzo resume"):
        commit(store, 2)
    os.close(full)
    store.close()

    assert len(opened(tmp_path).records) == 2


def test_a_folder_that_cannot_be_made_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")

    with pytest.raises(RunFolderError, match=r"run: it must be writable, got 'Not a directory'\. .*hydra\.run\.dir"):
        RunStore(tmp_path / "file" / "run")


def test_a_damaged_log_is_named(tmp_path: Path) -> None:
    (tmp_path / PUBLIC).write_text("not json\n")

    with pytest.raises(RunFolderError, match=r"public\.jsonl, line 1: must be JSON, got Expecting value.*Restore"):
        RunStore(tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (PUBLIC, {"round": -1}, r"public\.jsonl, line 2: round must be a whole number of 0 to 4294967295, got -1"),
        (PUBLIC, {"owners": ["all"]}, r"line 2: owners\[0\] must be a whole number .* or 'shared', got 'all'"),
        (PUBLIC, {"owners": [0, 1]}, "line 2: must hold a column of c for each of 2 owners, not 1, got {'attendance'"),
        (PUBLIC, {"chain": "0" * 63}, "line 2: chain must be 64 hexadecimal digits, got '000"),
        (
            AUDIT,
            {"surprise": 1},
            r"audit\.jsonl, line 2: surprise must be left out: ScalarAuditLine has no such field, got 1",
        ),
        (AUDIT, {"lr": True}, "line 2: lr must be a float of 0 to .*, got True"),
        (AUDIT, {"xi": [[["x"]]]}, "line 2: xi must be 3 levels of lists, .* or null, got"),
        (AUDIT, {"xi": [[[1.0], [1.0]]]}, "line 2: must hold xi of 1 steps or more, 1 probes and"),
        (METRICS, {"absent": [0.5]}, r"metrics\.jsonl, line 2: absent\[0\] must be a whole number of .*, got 0\.5"),
        (METRICS, {"kind": "rounds"}, "line 2: kind must be one of setup, extension, round, .*, got 'rounds'"),
        (METRICS, {"clients": [{"client": 0}]}, r"line 2: clients\[0\]\.loss must be a float .* or null, got nothing"),
    ],
)
def test_a_line_that_no_run_writes_is_refused_by_file_line_and_field(
    tmp_path: Path, name: str, change: dict[str, object], message: str
) -> None:
    open_with(tmp_path, 2 if name == AUDIT else 3).close()  # earlier lines of that log are the server's to read
    lines = (tmp_path / name).read_text().splitlines()
    lines[1] = json.dumps({**json.loads(lines[1]), **change})
    (tmp_path / name).write_text("".join(line + "\n" for line in lines))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    with pytest.raises(RunFolderError, match=message) as caught:
        RunStore(tmp_path)

    assert "Restore the file from a copy" in str(caught.value)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


@pytest.mark.parametrize("owners", [("shared",), (0, 7)])
def test_every_kind_of_line_comes_back_as_it_was_written(tmp_path: Path, owners: tuple[int | str, ...]) -> None:
    lines = [audit_line({0: [[0.5], [-1.0]], 7: [[2.0]]}, dropped={7: [[True]]}, xi=[[[1.0]], [[np.nan]]])]
    with RunStore(tmp_path) as store:
        numbers = tuple(SHARED if owner == "shared" else owner for owner in owners)
        c = np.arange(2 * len(owners), dtype=np.float32).reshape(1, 2, len(owners)) / 3
        written = ScalarRecord(round=0, lr=0.1, owners=numbers, coefficients=c, directions=5)
        proof = Proof(chain="ab" * 32, check=3, digest="cd" * 32)
        store.commit(written, attendance=[0, 7], proof=proof, audit=lines[0])
        public, kept = store.public[0], store.audit[0]

    with RunStore(tmp_path) as again:
        assert encode(again.public[0]) == encode(public)
        assert again.records[0].to_bytes() == written.to_bytes()
        line = again.public[0]
        assert (line.chain, line.check, line.digest) == (proof.chain, proof.check, proof.digest)
        assert encode(again.audit[0]) == encode(kept)
        (first, second) = again.audit[0].clients
    assert (first.g.dtype, first.dropped.dtype, first.g.tolist()) == (np.float32, bool, [[0.5], [-1.0]])
    assert np.isnan(second.loss).all()


def test_nan_becomes_null(tmp_path: Path) -> None:
    store = RunStore(tmp_path)

    store.write(told(0, loss=float("nan")))
    store.close()

    line = json.loads((tmp_path / METRICS).read_text())
    assert line["loss"] is None
    assert line["clients"][0]["loss"] is None


@pytest.mark.parametrize(
    ("by", "losses", "best"),
    [
        (BestBy.value, [0.1, 0.5, 0.4, 0.4, 0.1], 2),
        (BestBy.value, [0.1, None, 0.4, 0.4, 0.1], 2),
        (BestBy.loss, [0.3, 0.2, 0.1, 0.1, 0.1], 2),  # of equal losses the highest value, then the earliest
        (BestBy.loss, [None, 0.2, 0.3, 0.3, 0.1], 4),
    ],
)
def test_the_best_round_is_that_of_the_best_dev_score(
    tmp_path: Path, by: BestBy, losses: list[float | None], best: int
) -> None:
    def chosen(*evaluators: str) -> int:
        named = dict.fromkeys(evaluators, AnswersConfig())
        return best_round(store, RunSettings(evaluators=named, evaluation=EvaluationConfig(best_by=by)))

    store = open_with(tmp_path, 4)
    assert chosen("answers", "errors") == 4

    for round, (value, loss) in enumerate(zip([0.5, 0.7, 0.7, 0.7, 0.6], losses, strict=True)):
        store.write(scored(round, value, loss))
    store.write(scored(3, 0.9, 0.0, split="test"))
    for round, value in enumerate([9.0, 7.0, 5.0, 3.0, 3.0]):
        store.write(replace(scored(round, value, None), evaluator="errors", metric="errors", lower_is_better=True))

    assert chosen("answers", "errors") == best
    assert chosen("errors", "answers") == 3
    assert chosen() == 4  # nothing is scored
    store.close()


def test_what_a_round_says_of_each_client_is_kept_in_the_file_and_not_in_memory(tmp_path: Path) -> None:
    written, light = told(0), replace(told(0), clients=(), reasons={})
    verdict = ClientVerdict(client=0, flagged=False, steps=1, statistics={"cusum": 0.5})
    others = StepDecision(seconds=1.0, round=0, windows={"later": (1, 2)}, clients=(verdict,), fallback=False)
    with RunStore(tmp_path) as store:
        commit(store, 0)
        for record in (written, others):
            store.write(record)
        assert store.metrics == [light, others]

    with RunStore(tmp_path) as again:
        assert again.metrics == [light, others]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [encode(written), encode(others)]


def test_of_scores_of_clients_memory_keeps_the_worst_that_the_summary_names(tmp_path: Path) -> None:
    def scored_by_clients(*values: float | None, lower_is_better: bool = False) -> FederatedScore:
        rows = [ClientScore("m", value, 1.0, 4 + client, client=client) for client, value in enumerate(values)]
        own = {"worst_client": None, "clients": tuple(rows)}
        return FederatedScore("m", 0.5, 1.0, 99, seconds=1.0, round=0, lower_is_better=lower_is_better, **own)

    written = [
        scored_by_clients(0.4, 0.2, None, 0.3),
        scored_by_clients(0.4, 0.2, None, lower_is_better=True),
        scored_by_clients(None, None),
    ]
    with RunStore(tmp_path) as store:
        for record in written:
            store.write(record)
        kept = store.metrics_of(FederatedScore)
    with RunStore(tmp_path) as again:
        read = again.metrics_of(FederatedScore)

    assert [[(row.client, row.num_examples) for row in record.clients] for record in kept] == [[(1, 5)], [(0, 4)], []]
    assert [record.worst_first[:1] for record in kept] == [record.worst_first[:1] for record in written]
    assert read == kept
    lines = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert lines == [encode(record) for record in written]


def test_lines_of_the_audit_log_stay_in_the_file_and_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    """Of 10,000 rounds, 200 clients and 50 steps they would take gigabytes."""

    def held() -> int:
        return sum(type(each) is ScalarAuditLine for each in gc.get_objects())

    gc.collect()  # what other tests have left
    before = held()
    with open_with(tmp_path, 5) as store:
        assert held() == before
        assert [encode(line) for line in store.audit] == [encode(audit(round)) for round in range(5)]
        assert [store.audit[-1].round, *(line.round for line in store.audit[1:3])] == [4, 1, 2]
        assert held() == before
    with RunStore(tmp_path) as again:
        commit(again, 5)
        assert held() == before
        assert [line.round for line in again.audit] == [*range(6)]
        assert [line.check for line in again.public] == [*range(6)]
    log = RunLog(tmp_path)
    assert (len(log.audit), held()) == (6, before)


@pytest.mark.parametrize("reader", [RunLog, RunStore])
@pytest.mark.parametrize(
    ("order", "found"), [([0, 2], "2"), ([1, 2, 0], "3 in another order"), ([0, 0, 1], "3 in another order")]
)
def test_an_audit_log_without_the_rounds_in_their_places_is_refused(
    tmp_path: Path, reader: type[RunLog], order: list[int], found: str
) -> None:
    open_with(tmp_path, 3).close()
    lines = (tmp_path / AUDIT).read_text().splitlines(keepends=True)
    (tmp_path / AUDIT).write_text("".join(lines[number] for number in order))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    with pytest.raises(RunFolderError, match=rf"must hold every one of the 3 committed rounds, got {found}\. Restore"):
        _ = reader(tmp_path).audit

    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_run_that_goes_on_has_its_audit_log_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the server: of many rounds and clients one reading takes minutes."""
    open_with(tmp_path, 9).close()
    read: list[int] = []

    def decode(value: dict[str, int], **told: Any) -> AuditLine:
        read.append(value["round"])
        return decode_audit(value, **told)

    monkeypatch.setattr(log_store, "decode_audit", decode)

    with RunStore(tmp_path) as store:
        assert read == [8]
        assert [line.round for line in store.audit] == [*range(9)]
    assert read == [8, *range(9)]


def test_what_rounds_say_of_their_clients_is_let_go_line_by_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all rounds and clients together it would fill the memory when a run goes on."""
    open_with(tmp_path, 3).close()
    original, held = log_store._without_clients, list[int]()

    def heavy() -> int:
        return sum(type(each) is Round and len(each.clients) > 0 for each in gc.get_objects())

    def counted(record: MetricRecord) -> MetricRecord:
        held.append(heavy())
        return original(record)

    gc.collect()  # what other tests have left
    before = heavy()
    monkeypatch.setattr(log_store, "_without_clients", counted)

    opened(tmp_path)
    assert len(RunLog(tmp_path).metrics) == 3

    assert held == [before + 1] * 3 + [before] * 3  # a reader does not even make them


def test_a_reader_makes_nothing_of_clients_that_it_is_not_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many rounds and clients that takes minutes."""
    open_with(tmp_path, 5).close()
    light = opened(tmp_path).metrics
    made: list[type[object]] = []

    def counting(of: type[object]) -> None:
        check = vars(of)["__post_init__"]

        def counted(record: object) -> None:
            made.append(of)
            check(record)

        monkeypatch.setattr(of, "__post_init__", counted)

    counting(ClientRound)
    counting(ScalarAudit)

    log = RunLog(tmp_path)
    assert (log.metrics, len(log.audit)) == (light, 5)
    assert made == []
    assert encode(log.audit[3]) == encode(audit(3))
    assert made.count(ScalarAudit) == 2  # of this line, and of the one that it is compared with


def test_the_vector_of_a_round_that_a_kill_prevented_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The same round may have another one when the run goes on."""

    def commit_vector(store: RunStore, round: int) -> Path:
        vector = VectorRecord.of(np.full(3, round + 0.5, np.float32), round=round, lr=0.5)
        proof = Proof(chain="0" * 64, check=round, digest=None)
        store.commit(vector, attendance=[0], proof=proof, audit=audit(round))
        return tmp_path / "vectors" / vector.digest

    def killed(line: object, *, durable: bool) -> None:
        raise KeyboardInterrupt

    with RunStore(tmp_path) as store:
        kept = {commit_vector(store, round) for round in range(2)}
        monkeypatch.setattr(store._public, "append", killed)
        with pytest.raises(KeyboardInterrupt):
            commit_vector(store, 2)
    (stray,) = {*(tmp_path / "vectors").iterdir()} - kept

    assert len(RunLog(tmp_path).records) == 2
    assert stray.exists()  # a reader changes nothing
    assert len(opened(tmp_path).records) == 2
    assert {*(tmp_path / "vectors").iterdir()} == kept
    assert f"{stray}: the vector of a round that was not committed is dropped" in caplog.messages

    for name in ("a" * 64, "b" * 64):  # as where somebody has put the logs back by some rounds
        (tmp_path / "vectors" / name).touch()
    opened(tmp_path)
    assert len([*(tmp_path / "vectors").iterdir()]) == 4


def test_an_extension_is_taken_back_with_what_its_start_told_and_no_line_before_is_written_anew(
    tmp_path: Path,
) -> None:
    """In memory they are without what they say of each client."""
    with open_with(tmp_path, 2) as store:
        before = (tmp_path / METRICS).read_bytes()
        for line in (EXTENSION, decided(2), scored(2, 0.5, 1.0)):
            store.write(line)

        store.take_back(EXTENSION)

        assert (tmp_path / METRICS).read_bytes() == before
        assert [(line.kind, line.round) for line in store.metrics] == [("round", 0), ("round", 1)]
        store.write(scored(2, 0.7, 1.0))
        assert (tmp_path / METRICS).read_bytes() == before + to_json(scored(2, 0.7, 1.0)).encode() + b"\n"
    assert opened(tmp_path).metrics == store.metrics
