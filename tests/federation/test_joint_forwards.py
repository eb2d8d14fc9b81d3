"""``runtime.batch_clients``: clients that share forwards measure what they measure alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedzo.commands.replay import replay_run
from fedzo.config.load import load
from fedzo.errors import ConfigError
from fedzo.fl.client import scalar_update
from fedzo.fl.client.local_update import Batches
from fedzo.fl.client.worker import ClientWorker
from fedzo.run import process
from fedzo.testing.tiny_models import save_tiny_model
from fedzo.zo.spaces import own_weights
from fedzo.zo.spaces.own_weights import OwnWeights

Run = Callable[..., Path]
Lines = Callable[[Path, str], list[dict[str, Any]]]
Overrides = Callable[..., list[str]]
TOGETHER = "runtime.batch_clients=true"
FIVE_STEPS = ["fl.num_clients=4", "fl.local_steps=5", TOGETHER]


def scalars(audit: list[dict[str, Any]], client: int) -> np.ndarray:
    return np.array([entry["g"] for line in audit for entry in line["clients"] if entry["client"] == client])


@pytest.mark.parametrize(
    "settings",
    [
        ["fl.local_steps=1"],
        ["fl.local_steps=3"],
        ["fl.local_steps=3", "server_optimizer=scaffold"],
        ["fl.local_steps=3", "step_policy=random", "step_policy.num_flagged=1", "task.candidates=[b,g]"],
        ["fl.local_steps=2", "task.loss=lm", "strategy.aggregation=majority_sign", "trainer.lr=1e-4"],
        ["fl.local_steps=3", "trainer=mezo", "trainer.lr=1e-4"],
        ["fl.local_steps=1", "trainer=tables"],
        ["fl.local_steps=3", "trainer=tables"],
        ["estimator=one_sided", "estimator.num_probes=2", "faults.absent=[1@1]"],
        ["estimator=fzoo", "estimator.num_probes=3", "trainer.lr=1e-5", "strategy.clip_factor=2"],
        ["estimator.freeze_routing=true", "fl.local_steps=2"],
        ["fl.local_steps=3", "task.common_shift=0.3"],
    ],
    ids=[
        "T=1",
        "T=3",
        "T=3 scaffold",
        "T=3 and 1",
        "T=2 signs",
        "T=3 mezo",
        "T=1 tables",
        "T=3 tables",
        "one-sided",
        "fzoo",
        "frozen",
        "T=3 common shift",
    ],
)
def test_joint_scalars_equal_separate_ones_but_for_rounding(run: Run, lines: Lines, settings: list[str]) -> None:
    """Losses are float32 numbers near 0.7: an error of 2e-7 each is 2e-4 in g at eps = 1e-3; ten times that is let by.

    FZOO divides by a spread of about eps |gradient| and so enlarges the same error.
    """
    alone = run("fl.rounds=3", "fl.num_clients=4", *settings)
    together = run("fl.rounds=3", "fl.num_clients=4", TOGETHER, *settings)

    for client in range(4):
        separate, joint = (scalars(lines(folder, "audit.jsonl"), client) for folder in (alone, together))
        assert joint.shape == separate.shape
        assert np.abs(separate).max() > 0.05
        np.testing.assert_allclose(joint, separate, atol=2e-3 if "estimator=fzoo" not in settings else 2e-2)
    assert replay_run(together)["rounds"] == 3


@pytest.mark.parametrize("server_optimizer", ["sgd", "scaffold"])
def test_places_that_are_walked_anew_give_the_same_bytes(
    run: Run, finished: Run, monkeypatch: pytest.MonkeyPatch, server_optimizer: str
) -> None:
    """Where there is no memory to keep a client's place on its local path."""
    settings = [*FIVE_STEPS, f"server_optimizer={server_optimizer}"]
    kept = finished(*settings)
    monkeypatch.setattr(scalar_update, "_KEPT_BYTES", 0)
    anew = run(*settings)

    assert (anew / "audit.jsonl").read_bytes() == (kept / "audit.jsonl").read_bytes()


@pytest.mark.parametrize("server_optimizer", ["sgd", "scaffold"])
def test_a_gpus_products_agree_with_those_of_a_cpu(
    run: Run, finished: Run, lines: Lines, monkeypatch: pytest.MonkeyPatch, server_optimizer: str
) -> None:
    settings = [*FIVE_STEPS, f"server_optimizer={server_optimizer}"]
    host = finished(*settings)
    monkeypatch.setattr(own_weights, "_HostProducts", own_weights._DeviceProducts)
    device = run(*settings)

    for client in range(4):
        expected, found = (scalars(lines(folder, "audit.jsonl"), client) for folder in (host, device))
        assert expected.size == 15
        np.testing.assert_allclose(found, expected, atol=2e-3)


@pytest.mark.gpu
def test_on_a_gpu_clients_share_later_steps_and_the_log_comes_out_alike(run: Run, lines: Lines) -> None:
    settings = ["fl.num_clients=4", "fl.local_steps=3", TOGETHER]
    host, device, again = (run(*settings, f"device={where}") for where in ("cpu", "cuda", "cuda"))

    assert (again / "audit.jsonl").read_bytes() == (device / "audit.jsonl").read_bytes()
    for client in range(4):
        expected, found = (scalars(lines(folder, "audit.jsonl"), client) for folder in (host, device))
        np.testing.assert_allclose(found, expected, atol=2e-3)


@pytest.mark.parametrize(
    ("settings", "forwards"),
    [
        (["trainer=mezo"], 2),
        (["trainer=meerkat", "trainer.lr=1e-3", "fl.local_steps=3"], 12),  # in two batches of like length
    ],
    ids=["T=1 mezo", "T=3 meerkat"],
)
def test_one_round_of_many_clients_takes_as_many_forwards_as_its_tokens_need(
    run: Run, monkeypatch: pytest.MonkeyPatch, settings: list[str], forwards: int
) -> None:
    spent: list[int] = []
    ahead, train = ClientWorker.look_ahead, ClientWorker.train

    def counter() -> Any:
        return process._open.process.peer.loaded.counter

    def counting_ahead(self: ClientWorker, requests: Any) -> None:
        before = counter().num_forwards
        ahead(self, requests)
        spent.append(counter().num_forwards - before)

    def counting_train(self: ClientWorker, request: Any) -> Any:
        before = counter().num_forwards
        reply = train(self, request)
        assert counter().num_forwards == before  # everything was there already
        return reply

    monkeypatch.setattr(ClientWorker, "look_ahead", counting_ahead)
    monkeypatch.setattr(ClientWorker, "train", counting_train)
    run("fl.rounds=1", "fl.num_clients=6", TOGETHER, *settings)

    assert spent == [forwards]


def test_clients_with_directions_of_their_own_are_refused(overrides: Overrides) -> None:
    with pytest.raises(ConfigError, match=r"runtime\.batch_clients must be false for fl\.directions=per_client"):
        load(overrides(TOGETHER, "fl.directions=per_client"))


def test_a_model_that_multiplies_otherwise_shares_the_first_step_alone(
    run: Run, lines: Lines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """GPT-2 is known to; of others it shows in the first forward of a later step."""
    gpt2 = save_tiny_model(tmp_path / "gpt2", "gpt2")
    known = run("fl.local_steps=2", "task.max_length=128", f"model.name={gpt2}", TOGETHER)
    assert "cannot share" not in caplog.text
    monkeypatch.setattr(OwnWeights, "supports", lambda places, model: True)
    found = run("fl.local_steps=2", "task.max_length=128", f"model.name={gpt2}", TOGETHER)

    np.testing.assert_array_equal(*(scalars(lines(folder, "audit.jsonl"), 0) for folder in (known, found)))
    told = [record.message for record in caplog.records if "cannot share" in record.message]
    assert len(told) == 1
    assert told[0].startswith("clients cannot share the forwards of later local steps with this model")


def test_where_memory_runs_out_in_a_later_step_clients_share_the_first_alone_from_then_on(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings, asked = ["fl.num_clients=4", "fl.local_steps=3", TOGETHER], list[int]()
    with monkeypatch.context() as patch:
        patch.setattr(OwnWeights, "supports", lambda places, model: False)
        known = run(*settings)

    def follow(self: OwnWeights, offsets: Any, index: np.ndarray) -> None:
        asked.append(len(index))
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")

    monkeypatch.setattr(OwnWeights, "follow", follow)
    found = run(*settings)

    assert (found / "audit.jsonl").read_bytes() == (known / "audit.jsonl").read_bytes()
    assert len(asked) == 1
    told = [record.message for record in caplog.records if "cannot share" in record.message]
    assert len(told) == 1
    assert told[0].endswith("CUDA out of memory. Tried to allocate 2.00 GiB")
    assert "joint forwards failed" not in caplog.text


@pytest.mark.parametrize("steps", [1, 2])
def test_where_memory_runs_out_in_a_first_step_no_client_shares_a_forward_from_then_on(
    run: Run, lines: Lines, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, steps: int
) -> None:
    settings, asked = ["fl.num_clients=4", f"fl.local_steps={steps}"], list[int]()
    alone, original = run(*settings), scalar_update.example_losses

    def scarce(loaded: Any, rows: list[Any], *args: Any, **kwargs: Any) -> Any:
        if len(rows) > 2:  # those of a client's step
            asked.append(len(rows))
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")
        return original(loaded, rows, *args, **kwargs)

    monkeypatch.setattr(scalar_update, "example_losses", scarce)
    found = run(*settings, TOGETHER)

    mine, theirs = ([line["clients"] for line in lines(folder, "audit.jsonl")] for folder in (found, alone))
    assert mine == theirs
    assert asked == [8]  # in three rounds
    told = [record for record in caplog.records if "cannot share" in record.getMessage()]
    assert [record.getMessage() for record in told] == [
        "clients cannot share the forwards of a round with this model on this device: CUDA out of memory. Tried to "
        "allocate 2.00 GiB"
    ]
    assert told[0].exc_info is None
    assert "joint forwards failed" not in caplog.text


def test_one_client_at_fault_fails_alone(run: Run, lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batches.of

    def broken(self: Batches, request: Any, *, step: int) -> Any:
        if request.client == 2:
            raise ValueError("rows that cannot be read")
        return batch(self, request, step=step)

    monkeypatch.setattr(Batches, "of", broken)
    folder = run("fl.rounds=2", "fl.num_clients=4", TOGETHER)

    assert [sorted(e["client"] for e in line["clients"]) for line in lines(folder, "audit.jsonl")] == [[0, 1, 3]] * 2
    assert [line["refused"] for line in lines(folder, "audit.jsonl")] == [[2]] * 2


@pytest.mark.parametrize("settings", [[], [TOGETHER], ["estimator=backprop", "trainer.lr=1e-3"]])
def test_a_common_shift_enters_the_loss_that_is_trained_on(run: Run, lines: Lines, settings: list[str]) -> None:
    plain = run("fl.rounds=2", "fl.num_clients=4", *settings)
    damped = run("fl.rounds=2", "fl.num_clients=4", "task.common_shift=0.3", *settings)

    for a, b in zip(lines(plain, "metrics.jsonl"), lines(damped, "metrics.jsonl"), strict=True):
        if a["kind"] == "round":
            assert abs(a["loss"] - b["loss"]) > 1e-5
        elif a["kind"] == "score" and a["round"] == 0:
            assert a["loss"] == b["loss"]  # what is scored is the same
