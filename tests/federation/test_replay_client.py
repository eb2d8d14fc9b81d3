"""Virtual paths: another process rebuilds every client's values after every local step from the logs alone, bit by bit.

The clients' process writes a hash of its values after each step that it takes. This process holds the base model and
the run folder, nothing else.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedzo.cli import main
from fedzo.commands.replay import replay_client, vector_file
from fedzo.commands.run_folder import read_run, rebuild
from fedzo.errors import ConfigError, ProtocolError, RunFolderError
from fedzo.fl.config import directions_of
from fedzo.fl.log_store import RunStore
from fedzo.testing.vector_space import VectorSpace
from fedzo.zo.directions import direction, stream_key
from fedzo.zo.keys import step_keys
from fedzo.zo.steps import local_step, probe_shares

Overrides = Callable[..., list[str]]
Lines = Callable[[Path, str], list[dict[str, Any]]]
Hashes = dict[str, list[str]]
pytestmark = pytest.mark.slow  # a process is started for each
ROOM = "task.max_length=256"  # the tiny model has 512 positions
FALLING = "server_optimizer.schedule=linear"

TRAIN = """
import hashlib, json, sys
from pathlib import Path
from fedzo.config.load import load
from fedzo.fl.client.scalar_update import ScalarUpdate
from fedzo.fl.server.step_policy.plan import Plan
from fedzo.fl.server.rounds import Server
from fedzo.commands.train import start_run
from fedzo.zo.spaces.base import MasterSpace

folder, steps, overrides = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:]
hashes = {}

def local_step(self, space, request, g, *, step, drift, original=ScalarUpdate.take):
    original(self, space, request, g, step=step, drift=drift)
    if type(space) is MasterSpace:
        return  # where joint forwards of later steps are to be: not yet the client's own step
    digest = hashlib.sha256(space.values().tobytes()).hexdigest()
    hashes.setdefault(f"{request.client}@{request.round}", []).append(digest)

class Script:  # the steps of each round, for all clients or for each
    def plan(self, audit, labels):
        wanted = steps[len(audit) % len(steps)]
        return Plan(dict(enumerate(wanted if isinstance(wanted, list) else [wanted] * 4)))

def run_round(self, original=Server.run_round):
    self.step_policy = Script()
    return original(self)

ScalarUpdate.take, Server.run_round = local_step, run_round
start_run(load(overrides), folder, overrides=[])
Path(f"{folder}.hashes").write_text(json.dumps(hashes))
"""


def rebuild_all(folder: Path) -> Hashes:
    """Every client's hashes of every round, from the run folder and the base model."""
    config = read_run(folder)
    with RunStore(folder) as store:
        audit, records = list(store.audit), list(store.records)
    replica, hashes = rebuild(folder, rounds=0).replica, {}
    space = replica.space
    for line in audit:
        for entry in line.clients:
            space.mark()
            client, drift = entry.client, replica.drift(entry.client, lr=line.lr)
            digests = hashes[f"{client}@{line.round}"] = list[str]()
            own = {"round": line.round, "owner": client, "directions": directions_of(config.fl)}
            for step, scalars in enumerate(entry.g):
                keys = step_keys(config.seed, step=step, probes=len(scalars), **own)
                local_step(space, lr=line.lr, c=probe_shares(scalars), keys=keys, drift=drift)
                digests.append(hashlib.sha256(space.values().tobytes()).hexdigest())
            assert entry.end_check == (space.check() if len(entry.g) > 1 else 0)
            space.rewind()
        replica.advance([records[line.round]])
    return hashes


@pytest.fixture
def train(
    tmp_path: Path, overrides: Overrides, data_dir: Path, forked: Callable[..., tuple[int, str]]
) -> Callable[..., tuple[Path, Hashes]]:
    """Run a federation in a process of its own; returns its folder and the clients' hashes. Its data is gone then."""

    def start(*settings: str, steps: list[int | list[int]]) -> tuple[Path, Hashes]:
        data, folder = tmp_path / "data", tmp_path / "run"
        shutil.copytree(data_dir, data)
        most = max(max(each) if isinstance(each, list) else each for each in steps)  # clients take no more
        settings = (f"fl.local_steps={most}", *settings, f"data.path={data}")
        code, said = forked(TRAIN, str(folder), json.dumps(steps), *overrides(*settings))
        assert code == 0, said[-3000:]
        shutil.rmtree(data)
        return folder, json.loads(Path(f"{folder}.hashes").read_text())

    return start


def test_a_thousand_local_steps_are_rebuilt_by_another_process(train: Any, lines: Lines) -> None:
    """A thousand of one client; clients are absent, and the steps differ between rounds and between clients."""
    absent = "faults.absent=['2@4','1@1','3@10','0@23']"
    steps: list[int | list[int]] = [[60, 6, 6, 6], 1, [45, 5, 5, 5], [100, 6, 10, 10], 25, [60, 6, 6, 6]]
    folder, taken = train(absent, "fl.rounds=24", "fl.batch_size=1", "server_optimizer.lr=0.001", steps=steps)
    own = [
        {digest for name, digests in taken.items() if name.startswith(f"{client}@") for digest in digests}
        for client in range(4)
    ]
    assert len(own[0]) >= 1000
    assert all(len(each) >= 150 for each in own)
    assert not {"2@4", "3@10"} & set(taken)

    rebuilt = rebuild_all(folder)

    alone = {f"{client}@{line['round']}": line for line in lines(folder, "audit.jsonl") for client in range(4)}
    assert set(taken) < set(rebuilt)
    assert {name: digests for name, digests in rebuilt.items() if len(digests) > 1} == taken
    assert all(alone[name]["round"] % 6 == 1 for name in set(rebuilt) - set(taken))  # T = 1: no local step is applied


@pytest.mark.parametrize(
    "settings",
    [
        ("fl.directions=per_client", "estimator.num_probes=3", "server_optimizer=adam", "server_optimizer.lr=0.001"),
        ("model.dtype=bfloat16", "fl.transport=values", "server_optimizer=momentum", "server_optimizer.lr=0.01"),
        ("trainer=lora", ROOM, "server_optimizer.lr=0.01", "estimator.num_probes=2"),
        ("trainer=tables", "server_optimizer.lr=0.001", "estimator.num_probes=2"),
        ("trainer=mezo", "server_optimizer.lr=0.001", "strategy.clip_factor=1.01"),
        ("trainer=mezo", "server_optimizer.lr=0.001", "model.dtype=bfloat16", "trainer.rounding=stochastic"),
        ("server_optimizer=scaffold", "server_optimizer.lr=0.01"),
        ("server_optimizer=feddyn", "server_optimizer.lr=0.001", FALLING, "estimator.num_probes=2"),
        ("fl.directions=pool", "fl.pool_size=5", "server_optimizer.lr=0.01"),
        ("strategy.aggregation=majority_sign", "server_optimizer.lr=0.01"),
        ("runtime=inline_batched", "server_optimizer.lr=0.01"),
    ],
    ids=" ".join,
)
def test_every_kind_of_space_and_run(train: Any, settings: tuple[str, ...]) -> None:
    folder, taken = train(*settings, "fl.rounds=2", "evaluation.central=false", steps=[3, 2])

    rebuilt = rebuild_all(folder)

    assert rebuilt == taken
    assert [len(digests) for digests in taken.values()] == [3] * 4 + [2] * 4
    assert replay_client(folder, client=3, round=1).checked  # the command's own walk ends where the client's did


def test_the_command_writes_the_values_after_each_step(
    train: Any, tmp_path: Path, lines: Lines, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, taken = train("fl.rounds=3", "faults.absent=['1@1']", "server_optimizer.lr=0.01", steps=[3, 1, 2])
    audit, out = lines(folder, "audit.jsonl"), tmp_path / "path.safetensors"

    def replay(*options: str) -> int:
        return main(["replay", str(folder), *options])

    assert replay("--client", "1", "--round", "2", "--out", str(out)) == 0
    printed = capsys.readouterr().out.splitlines()
    written = load_file(out)
    assert list(written) == ["step_0001", "step_0002"]
    assert [hashlib.sha256(values.tobytes()).hexdigest() for values in written.values()] == taken["1@2"]
    entry = next(entry for entry in audit[2]["clients"] if entry["client"] == 1)
    assert printed[0] == "client 1, round 2: T = 2, lr = 0.01"
    assert [line.split()[-1] for line in printed[2:4]] == [f"{g:.6g}" for (g,) in entry["g"]]
    assert printed[3].split()[1] == f"{entry['end_check']:08x}" == printed[4].split()[1].rstrip(",")
    assert "the checksum that the client sent" in printed[4]

    # T = 1: the step that the client left to the log, c z of its own scalar
    assert replay("--client", "0", "--round", "1", "--out", str(out)) == 0
    assert "one step, checked by the public scalars" in capsys.readouterr().out.splitlines()[-1]
    (written,) = load_file(out).values()
    start = rebuild(folder, rounds=1).replica.space.values()
    moved = np.float32(0.01) * np.float32(audit[1]["clients"][0]["g"][0][0])
    assert np.array_equal(written, start - moved * direction(stream_key(0, round=1), len(start)))
    before = sorted(path.name for path in tmp_path.iterdir())

    for options, message in (
        (("--client", "1", "--round", "1"), "but client 1 sent nothing usable, or rested"),
        (("--client", "9", "--round", "1"), "(clients 0, 2, 3), but client 9 was not asked"),
        (("--client", "0", "--round", "3"), "--round must be below 3, the number of rounds in the log, got 3"),
        (
            ("--client", "0", "--round", "0", "--out", str(tmp_path / "no" / "x")),
            "must be a file in an existing folder",
        ),
        (("--client", "0", "--round", "0", "--out", str(tmp_path)), "must be a file in an existing folder"),
    ):
        assert replay(*options) == 2
        assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_steps_that_are_not_those_of_the_client_are_found_and_nothing_is_written(
    train: Any, tmp_path: Path, lines: Lines
) -> None:
    folder, taken = train("fl.rounds=1", "server_optimizer.lr=0.01", steps=[[3, 2, 3, 3]])
    (line,) = lines(folder, "audit.jsonl")
    out, (whole, _, torn, _) = tmp_path / "x", line["clients"]

    # a client that stops early sends less, and the check of its end
    assert len(replay_client(folder, client=1, round=0, out=out).checks) == 2
    assert [hashlib.sha256(values.tobytes()).hexdigest() for values in load_file(out).values()] == taken["1@0"]
    out.unlink()

    whole["end_check"] ^= 1
    (folder / "audit.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(ProtocolError, match="client 0, round 0: its local steps must lead to the check"):
        replay_client(folder, client=0, round=0, out=out)
    assert not list(tmp_path.glob("*x*"))

    torn["g"].pop()
    (folder / "audit.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(RunFolderError, match=r"line 1: clients\[2\] must hold g, loss and dropped of steps = 3 rows"):
        replay_client(folder, client=2, round=0, out=out)


def test_a_client_that_took_no_part_is_refused_before_the_model_is_loaded(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = train("fl.rounds=1", "faults.absent=['1@0']", steps=[2])
    monkeypatch.setattr("fedzo.commands.replay.rebuild", lambda *a, **k: pytest.fail("the model was loaded"))

    with pytest.raises(ConfigError, match="Choose another client or round"):
        replay_client(folder, client=1, round=0)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        (["strategy.weighting=size"], 1),
        (["strategy=median"], 1),
        (["step_policy=oracle", "step_policy.normalise=true"], [4, 1, 4, 2]),
        ([], 3),  # client 1's own check is still that of its own steps
        (["server_optimizer=scaffold"], 2),
    ],
    ids=str,
)
def test_a_changed_scalar_of_another_state_of_the_log_is_found_by_the_public_log(
    train: Any, lines: Lines, settings: list[str], steps: int | list[int]
) -> None:
    folder, _ = train(*settings, "fl.rounds=2", steps=[steps])
    replay_client(folder, client=1, round=1)
    first, second = lines(folder, "audit.jsonl")
    for other in (0, 2, 3):
        second["clients"][other]["g"][0][0] += 1000

    (folder / "audit.jsonl").write_text(json.dumps(first) + "\n" + json.dumps(second) + "\n")

    assert replay_client(folder, client=1, round=0).checked == (len(first["clients"][1]["g"]) > 1)
    with pytest.raises(ProtocolError, match="round 1: the clients' scalars of the audit log must give those"):
        replay_client(folder, client=1, round=1)


def test_a_step_too_many_of_another_client_is_found_by_the_public_log(train: Any, lines: Lines) -> None:
    folder, _ = train("fl.rounds=1", steps=[1])
    (line,) = lines(folder, "audit.jsonl")
    for name in ("g", "loss", "dropped"):
        line["clients"][0][name] *= 2
    line["clients"][0]["steps"], line["xi"] = 2, None

    (folder / "audit.jsonl").write_text(json.dumps(line) + "\n")

    with pytest.raises(ProtocolError, match="round 0: the clients' scalars of the audit log must give those"):
        replay_client(folder, client=1, round=0)


def test_a_log_that_lacks_a_round_is_refused(train: Any, lines: Lines) -> None:
    folder, _ = train("fl.rounds=3", steps=[1])
    whole = (folder / "audit.jsonl").read_text().splitlines(keepends=True)
    (folder / "audit.jsonl").write_text("".join([whole[0], whole[2]]))

    with pytest.raises(RunFolderError, match="must hold every one of the 3 committed rounds, got 2"):
        replay_client(folder, client=0, round=1)


def test_a_mask_that_is_gone_is_not_chosen_again_without_the_texts_that_it_was_chosen_on(train: Any) -> None:
    folder, _ = train("fl.rounds=1", "trainer.calibration=train", "trainer.calibration_tokens=8", steps=[1])
    (folder / "mask.safetensors").unlink()
    replay_client(folder, client=0, round=0)  # the artifact holds it, too
    shutil.rmtree(folder / "artifacts")

    with pytest.raises(RunFolderError, match=r"mask\.safetensors\) must be there"):
        replay_client(folder, client=0, round=0)


def test_the_file_is_written_vector_by_vector(tmp_path: Path) -> None:
    """40 steps of a megabyte each take a few megabytes of memory."""
    size, out = 250_000, tmp_path / "path"
    space = VectorSpace(np.zeros(size, np.float32))
    space.step(1.0, 0)  # compiles
    tracemalloc.start()
    (tmp_path / ".path.1.part").write_text("of another process, which writes the same file")
    with vector_file(out, steps=40, size=size, about={}) as write:
        for step in range(40):
            space.step(1e-3, step)
            write(space)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < 5 * 4 * size
    assert out.stat().st_size > 40 * 4 * size
    assert np.array_equal(load_file(out)["step_0040"], space.theta)
    assert sorted(file.name for file in tmp_path.iterdir()) == [".path.1.part", "path"]
