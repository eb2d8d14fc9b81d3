"""The logs on disk: what is committed survives, what is half written is dropped."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from fedzo.errors import RunFolderError
from fedzo.fl.config import BestBy
from fedzo.fl.log_store import AUDIT, METRICS, PUBLIC, RunStore, best_round
from fedzo.zo.directions import SHARED
from fedzo.zo.log import RoundRecord


def record(round: int) -> RoundRecord:
    c = np.full((1, 1, 1), 0.1 * (round + 1), np.float32)
    return RoundRecord(round=round, lr=0.5, owners=(SHARED,), coefficients=c)


def commit(store: RunStore, round: int) -> None:
    store.commit(record(round), proof={"check": round}, audit={"round": round, "clients": []})


def opened(folder: Path) -> RunStore:
    """The folder as it is read; the files are closed again."""
    with RunStore(folder) as store:
        return store


def open_with(folder: Path, rounds: int) -> RunStore:
    store = RunStore(folder)
    for round in range(rounds):
        commit(store, round)
        store.write({"kind": "round", "round": round})
    return store


def test_what_is_committed_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    open_with(tmp_path, 3).close()

    again = opened(tmp_path)

    assert [r.to_bytes() for r in again.records] == [record(i).to_bytes() for i in range(3)]
    assert [line["check"] for line in again.rounds] == [0, 1, 2]
    assert [line["round"] for line in again.metrics] == [0, 1, 2]


@pytest.mark.parametrize("torn", ['{"round":3,"c', '{"round":3', "x"])
def test_a_half_written_line_is_dropped(tmp_path: Path, torn: str) -> None:
    open_with(tmp_path, 3).close()
    with (tmp_path / PUBLIC).open("a") as file:
        file.write(torn)

    store = RunStore(tmp_path)
    commit(store, 3)
    store.close()

    assert len(opened(tmp_path).records) == 4


def test_audit_and_metrics_of_a_round_that_was_not_committed_are_dropped(tmp_path: Path) -> None:
    open_with(tmp_path, 2).close()
    with (tmp_path / AUDIT).open("a") as file:
        file.write(json.dumps({"round": 2, "clients": []}) + "\n")
    with (tmp_path / METRICS).open("a") as file:
        file.write(json.dumps({"kind": "round", "round": 2}) + "\n")
        file.write(json.dumps({"kind": "score", "split": "dev", "round": 2}) + "\n")
        file.write(json.dumps({"kind": "score", "split": "dev", "round": 3}) + "\n")
        file.write(json.dumps({"kind": "summary", "rounds": 3}) + "\n")

    store = opened(tmp_path)

    assert [line["round"] for line in store.audit] == [0, 1]
    assert [(line["kind"], line["round"]) for line in store.metrics] == [("round", 0), ("round", 1), ("score", 2)]


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


def test_a_kill_while_an_uncommitted_round_is_dropped_loses_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies before it has written anything: what it had to keep must not depend on that."""
    store = open_with(tmp_path, 3)
    store._audit.append({"round": 3, "clients": []}, durable=True)
    store.write({"kind": "round", "round": 3})
    store.close()

    def killed(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fedzo.fl.log_store._Lines.append", killed)
        RunStore(tmp_path).close()

    again = opened(tmp_path)
    assert [line["round"] for line in again.audit] == [0, 1, 2]
    assert [line["round"] for line in again.metrics] == [0, 1, 2]


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

    with pytest.raises(RunFolderError, match=r"cannot write.*hydra\.run\.dir"):
        RunStore(tmp_path / "file" / "run")


def test_a_damaged_log_is_named(tmp_path: Path) -> None:
    (tmp_path / PUBLIC).write_text("not json\n")

    with pytest.raises(RunFolderError, match=r"public\.jsonl: not a log of JSON lines"):
        RunStore(tmp_path)


def test_nan_becomes_null(tmp_path: Path) -> None:
    store = RunStore(tmp_path)

    store.write({"kind": "round", "round": 0, "loss": float("nan"), "clients": [{"loss": float("inf")}]})
    store.close()

    line = json.loads((tmp_path / METRICS).read_text())
    assert line["loss"] is None
    assert line["clients"] == [{"loss": None}]


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
    store = open_with(tmp_path, 4)
    assert best_round(store, by=by) == 4

    for round, (value, loss) in enumerate(zip([0.5, 0.7, 0.7, 0.7, 0.6], losses, strict=True)):
        store.write({"kind": "score", "split": "dev", "round": round, "value": value, "loss": loss})
    store.write({"kind": "score", "split": "test", "round": 3, "value": 0.9, "loss": 0.0})

    assert best_round(store, by=by) == best
    store.close()


def test_what_a_round_says_of_each_client_is_kept_in_the_file_and_not_in_memory(tmp_path: Path) -> None:
    written = {"kind": "round", "round": 0, "loss": 1.0, "clients": [{"client": 0, "loss": 1.0}]}
    others = {"kind": "step_policy", "round": 0, "clients": [{"client": 0, "flagged": False}]}
    light = {"kind": "round", "round": 0, "loss": 1.0}
    with RunStore(tmp_path) as store:
        commit(store, 0)
        for record in (written, others):
            store.write(record)
        assert store.metrics == [light, others]

    with RunStore(tmp_path) as again:
        assert again.metrics == [light, others]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [written, others]
