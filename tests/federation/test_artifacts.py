"""What a space needs beside the model reaches a client's process once, and the server's own never."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedzo.commands.resume import resume_run
from fedzo.fl.client.worker import ClientWorker
from fedzo.fl.messages import ArtifactPiece, ArtifactReply, EvaluateRequest, Status
from fedzo.run import apps
from fedzo.run.process import forget_process, open_process, this_process
from fedzo.system import SITE_ARTIFACTS_ENV, SITE_ENV
from fedzo.trainers import artifacts
from fedzo.zo.log import EMPTY_CHAIN

Run = Callable[..., Path]
Lines = Callable[[Path, str], list[dict[str, Any]]]
LOGS = ("public.jsonl", "audit.jsonl")


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> list[ArtifactPiece]:
    """Pieces that clients receive."""
    received: list[ArtifactPiece] = []
    original = ClientWorker.receive

    def receive(self: ClientWorker, piece: ArtifactPiece) -> ArtifactReply:
        received.append(piece)
        return original(self, piece)

    monkeypatch.setattr(ClientWorker, "receive", receive)
    return received


@pytest.fixture
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Clients have a model and a store of their own, as in another process; the folders of the stores."""
    opened: dict[str, Any] = {}

    def worker(context: Any) -> ClientWorker:
        config_json = str(context.run_config["config"])
        if config_json not in opened:
            peer = this_process(config_json).peer
            site = tmp_path / f"site{len(folders)}"
            folders.append(site / "artifacts")
            opened[config_json] = open_process(peer.config, peer.site, site_folder=site, artifacts=folders[-1]).client
        return opened[config_json].worker

    folders: list[Path] = []
    monkeypatch.setattr(apps, "_worker", worker)
    return folders


def test_nothing_is_sent_where_the_servers_process_plays_the_clients(
    run: Run, lines: Lines, pieces: list[ArtifactPiece], monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []
    original = artifacts.file_digest
    monkeypatch.setattr(artifacts, "file_digest", lambda path: hashed.append(path) or original(path))

    folder = run()

    (kept,) = (folder / "artifacts").iterdir()
    assert lines(folder, "metrics.jsonl")[0]["setup_down_bytes"] == kept.stat().st_size > 0
    assert pieces == []
    assert hashed == [kept]  # once, by the clients


@pytest.mark.parametrize("trainer", ["meerkat", "lora"])
def test_a_client_of_another_process_receives_it_once_a_run(
    run: Run, lines: Lines, pieces: list[ArtifactPiece], apart: list[Path], trainer: str
) -> None:
    settings = (f"trainer={trainer}", "fl.num_clients=1", "fl.rounds=4", "evaluation.federated_every_rounds=2")

    folder = run(*settings)

    (kept,), (store,) = (folder / "artifacts").iterdir(), apart
    assert (store / kept.name).read_bytes() == kept.read_bytes()
    assert [piece.data for piece in pieces] == [b"", kept.read_bytes()]  # asked, and sent
    rounds = [line for line in lines(folder, "metrics.jsonl") if line["kind"] == "round"]
    assert rounds[0]["message_down_bytes"] - rounds[1]["message_down_bytes"] > kept.stat().st_size


def test_a_run_is_the_same_whether_its_artifact_travels_or_not(
    run: Run, pieces: list[ArtifactPiece], request: pytest.FixtureRequest
) -> None:
    settings = ("fl.rounds=2", "fl.local_steps=2", "server_optimizer.lr=0.02")
    together = run(*settings)
    request.getfixturevalue("apart")

    apart = run(*settings)

    assert any(piece.data for piece in pieces)
    for name in LOGS:
        assert (apart / name).read_bytes() == (together / name).read_bytes()


def test_a_damaged_file_in_the_run_folder_is_replaced_when_the_run_goes_on(finished: Run) -> None:
    folder = finished()
    (kept,) = (folder / "artifacts").iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-1])

    resume_run(folder)

    assert kept.read_bytes() == whole


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], ClientWorker]]:
    """Start a site's process, which takes the place of the one before, for the run of a folder."""

    def start_at(folder: Path) -> ClientWorker:
        forget_process()
        monkeypatch.setenv(SITE_ENV, str(folder / "site.json"))
        worker: ClientWorker = this_process((folder / "run.json").read_text()).client.worker
        return worker

    monkeypatch.setenv(SITE_ARTIFACTS_ENV, str(tmp_path / "site" / "artifacts"))
    yield start_at
    forget_process()


def test_a_site_that_is_started_again_has_the_artifact_of_its_run_until_another_run_begins(
    run: Run, start: Callable[[Path], ClientWorker], tmp_path: Path
) -> None:
    """However the process before it ended."""
    first, other = run("fl.rounds=1"), run("fl.rounds=1", "trainer.density=0.1")
    (kept,) = (first / "artifacts").iterdir()
    data, digest = kept.read_bytes(), kept.name

    def asked(site: ClientWorker) -> Status:
        state = {"config_hash": site.config_hash, "space_id": digest, "chain": EMPTY_CHAIN.hex()}
        return site.evaluate(EvaluateRequest(client=0, **state)).status

    site = start(first)
    assert asked(site) is Status.bare
    site.receive(ArtifactPiece(client=0, digest=digest, size=len(data), data=data, piece_digest=digest))
    assert asked(site) is asked(start(first)) is Status.mismatch  # of a check that the request does not know

    start(other)
    assert [*(tmp_path / "site" / "artifacts").iterdir()] == []
