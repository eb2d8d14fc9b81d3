"""Whole federations in one process, against hand-made loops and identities."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from fedzo.commands.evaluate import evaluate_run
from fedzo.commands.replay import replay_run
from fedzo.commands.run_folder import rebuild
from fedzo.commands.train import start_run
from fedzo.config.load import load
from fedzo.errors import ConfigError, ProtocolError
from fedzo.fl.server.rounds import FederationError
from fedzo.masks.mask import Mask
from fedzo.masks.mask_file import load_mask, save_mask
from fedzo.models.memory import ForwardSeconds
from fedzo.records.scores import Score
from fedzo.run.start import open_run
from fedzo.testing.tiny_models import byte_tokenizer, tiny_model
from fedzo.zo.directions import SHARED, direction, stream_key
from fedzo.zo.estimator import TwoPoint

Run = Callable[..., Path]
Lines = Callable[[Path, str], list[dict[str, Any]]]
Overrides = Callable[..., list[str]]


def coefficients(lines: list[dict[str, Any]]) -> np.ndarray:
    return np.array([line["c"] for line in lines], np.float32)


def one_row_each(folder: Path, num_sites: int) -> Path:
    """A data folder whose sites all hold the same two rows."""
    folder.mkdir()
    pair = [{"text": "the same bad thing", "label": 0}, {"text": "another good one", "label": 1}]
    train = [{**row, "site": f"s{site}"} for site in range(num_sites) for row in pair]
    other = [{"text": f"other {i}", "label": i % 2, "site": "s0"} for i in range(8)]
    for name, rows in (("train", train), ("dev", other[:4]), ("test", other[4:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_scalars_equal_those_of_a_plain_loop_over_a_dense_model(
    run: Run, lines: Lines, overrides: Overrides, tmp_path: Path
) -> None:
    folder = run("fl.rounds=2", "server_optimizer.lr=0.05")
    process = open_run(load(overrides("fl.rounds=2", "server_optimizer.lr=0.05")), tmp_path)
    model = process.peer.loaded.model.double()
    mask = load_mask(folder / "mask.safetensors")
    parameters = dict(model.named_parameters())
    theta = {name: parameters[name].data.view(-1)[flat].clone() for name, flat in mask.indices.items()}
    sizes = [flat.numel() for flat in mask.indices.values()]

    def put(z: np.ndarray, scale: float) -> None:
        for (name, flat), part in zip(mask.indices.items(), torch.from_numpy(z).double().split(sizes), strict=True):
            parameters[name].data.view(-1)[flat] = theta[name] + scale * part

    def loss(examples: list[Any]) -> float:
        values = []
        for example in examples:
            scores = []
            for candidate in example.candidates:
                ids = torch.tensor([[*example.prompt, *candidate]])
                with torch.no_grad():
                    logp = model(input_ids=ids).logits[0].log_softmax(-1)
                start = len(example.prompt) - 1
                scores.append(torch.stack([logp[start + i, token] for i, token in enumerate(candidate)]).mean())
            values.append(
                torch.nn.functional.cross_entropy(torch.stack(scores)[None], torch.tensor([example.label])).item()
            )
        return float(np.mean(values))

    from fedzo.data.rows import batch_rows

    data = [process.client.data(client).train for client in range(4)]
    expected = []
    for r in range(2):
        z = direction(stream_key(0, round=r), mask.size)
        gs = []
        for client, train in enumerate(data):
            picked = batch_rows(run_seed=0, client=client, used=r, batch_size=2, num_rows=len(train))
            batch = [train[row] for row in picked]
            put(z, 1e-3)
            plus = loss(batch)
            put(z, -1e-3)
            gs.append((plus - loss(batch)) / 2e-3)
        expected.append(np.mean(gs))
        for (name, _), part in zip(mask.indices.items(), torch.from_numpy(z).double().split(sizes), strict=True):
            theta[name] -= 0.05 * expected[-1] * part

    # float32 losses differ from float64 ones by about 1e-7, g by that over 2 eps
    assert np.allclose(coefficients(lines(folder, "public.jsonl")).ravel(), expected, atol=1e-3)


def test_identical_clients_equal_one_client_bit_for_bit(run: Run, lines: Lines, tmp_path: Path) -> None:
    settings = ("partition=natural", "partition.column=site", "partition.holdout=0", "fl.local_steps=2")
    small = ("trainer.calibration_docs=2",)
    five = run(f"data.path={one_row_each(tmp_path / 'five', 5)}", "fl.num_clients=5", *settings, *small)
    same_mask = f"inputs.artifact={five / 'mask.safetensors'}"
    one = run(f"data.path={one_row_each(tmp_path / 'one', 1)}", "fl.num_clients=1", *settings, *small, same_mask)

    assert np.array_equal(coefficients(lines(five, "public.jsonl")), coefficients(lines(one, "public.jsonl")))


def test_k_clients_with_one_probe_equal_one_client_with_the_joint_batch(
    finished: Run, lines: Lines, overrides: Overrides, tmp_path: Path
) -> None:
    folder = finished("fl.rounds=1")
    process = open_run(load(overrides("fl.rounds=1")), tmp_path)
    from fedzo.data.rows import batch_rows
    from fedzo.models.scoring import mean_loss
    from fedzo.trainers import TrainerContext
    from fedzo.zo.estimator import ZerothOrderConfig, build_estimator

    context = TrainerContext(folder=folder, seed=0, texts=list)
    peer = process.peer
    space = peer.workspace(peer.trainer.prepare(peer.loaded, context).artifact).replica.space
    joint = []
    for client in range(4):
        train = process.client.data(client).train
        picked = batch_rows(run_seed=0, client=client, used=0, batch_size=2, num_rows=len(train))
        joint += [train[row] for row in picked]

    estimator = build_estimator(cast(ZerothOrderConfig, peer.config.estimator))
    (projection,) = estimator.estimate(
        space,
        lambda: mean_loss(peer.loaded, joint, loss=peer.config.task.loss, tokens_per_batch=4096),
        [stream_key(0, round=0)],
    )

    assert np.allclose(coefficients(lines(folder, "public.jsonl")).ravel(), [projection.g], atol=2e-3)


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("fl.local_steps=3",),
        ("fl.local_steps=3", "estimator.num_probes=2", "fl.directions=per_client"),
        ("fl.transport=values",),
        ("strategy=size", "partition=dirichlet", "partition.alpha=1.0"),
        ("strategy.clients_per_round=2", "fl.rounds=6"),
        ("estimator.distribution=rademacher",),
        ("trainer=mezo", "server_optimizer.lr=1e-4"),
        ("trainer=mezo", "fl.local_steps=2", "server_optimizer.lr=1e-4"),
        ("trainer=mezo", "model.dtype=bfloat16", "server_optimizer.lr=1e-2"),
        ("trainer=mezo", "model.dtype=bfloat16", "trainer.rounding=stochastic", "server_optimizer.lr=1e-6"),
        ("trainer=mezo", "model.dtype=float16", "trainer.rounding=stochastic", "fl.local_steps=2"),
        ("model.dtype=bfloat16", "fl.local_steps=2"),
        ("model.dtype=float16",),
        ("trainer=tables", "server_optimizer.lr=1e-3"),
        ("trainer=tables", "fl.local_steps=3", "estimator.num_probes=2", "model.dtype=bfloat16"),
        ("trainer=tables", "fl.local_steps=2", "server_optimizer=scaffold"),
        ("strategy=median", "fl.local_steps=2"),
        ("strategy=trimmed_mean", "strategy.trim_share=0.25"),
        ("strategy=majority_sign", "fl.local_steps=2", "estimator.num_probes=3", "server_optimizer.lr=1e-3"),
    ],
    ids=" ".join,
)
def test_replaying_the_log_from_the_base_gives_the_live_state(
    run: Run, lines: Lines, settings: tuple[str, ...]
) -> None:
    folder = run(*settings)

    result = replay_run(folder)

    last = lines(folder, "public.jsonl")[-1]
    assert result["digest"] == last["digest"]
    assert np.abs(coefficients(lines(folder, "public.jsonl"))[0]).max() > 0


def test_the_model_moves_and_lr_0_does_not(run: Run, lines: Lines) -> None:
    moving, still = run("server_optimizer.lr=0.01"), run("server_optimizer.lr=0")

    checks = [line["check"] for line in lines(moving, "public.jsonl")]
    assert len(set(checks)) == 3
    assert len({line["check"] for line in lines(still, "public.jsonl")}) == 1
    assert (rebuild(still, rounds=0).replica.space.digest()) == lines(still, "public.jsonl")[-1]["digest"]


def test_the_order_of_replies_changes_nothing(run: Run, finished: Run, lines: Lines) -> None:
    plain, shuffled = finished("fl.local_steps=2"), run("fl.local_steps=2", "faults.shuffle_replies=true")

    assert [line["c"] for line in lines(plain, "public.jsonl")] == [
        line["c"] for line in lines(shuffled, "public.jsonl")
    ]


def test_an_absent_client_is_named_keeps_its_rows_and_catches_up(run: Run, lines: Lines) -> None:
    folder = run("fl.rounds=4", "faults.absent=['2@1','2@2']")

    public, metrics = lines(folder, "public.jsonl"), lines(folder, "metrics.jsonl")
    used = {
        (line["round"], entry["client"]): entry["used"]
        for line in lines(folder, "audit.jsonl")
        for entry in line["clients"]
    }
    assert [line["attendance"] for line in public] == [[0, 1, 2, 3], [0, 1, 3], [0, 1, 3], [0, 1, 2, 3]]
    assert (used[0, 2], used[3, 2]) == (0, 1)
    assert (used[0, 1], used[3, 1]) == (0, 3)
    absent = [line for line in metrics if line["kind"] == "round" and line["absent"]]
    assert [(line["round"], line["absent"]) for line in absent] == [(1, [2]), (2, [2])]
    assert "faults.absent" in absent[0]["reasons"]["2"]


def test_too_few_replies_end_the_run_with_the_reason_and_keep_the_log(run: Run, tmp_path: Path, lines: Lines) -> None:
    with pytest.raises(FederationError, match=r"round 1: strategy\.min_replies = 4 usable replies.*got 3.*client 2"):
        run("strategy.min_replies=4", "faults.absent=['2@1']")

    assert len(lines(tmp_path / "run0", "public.jsonl")) == 1


def test_a_second_run_with_the_same_configuration_gives_the_same_log(run: Run, finished: Run) -> None:
    first, second = finished("fl.local_steps=2"), run("fl.local_steps=2")

    assert (first / "public.jsonl").read_bytes() == (second / "public.jsonl").read_bytes()
    assert (first / "audit.jsonl").read_bytes() == (second / "audit.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("directions", "owners", "count"), [("shared", ["shared"], 3 * 2), ("per_client", [0, 1, 2, 3], 3 * 4 * 2)]
)
def test_clients_probe_along_the_directions_of_the_logs_owners_which_are_distinct(
    run: Run, lines: Lines, monkeypatch: pytest.MonkeyPatch, directions: str, owners: list[Any], count: int
) -> None:
    probed: list[int] = []
    estimate = TwoPoint.estimate

    def recorded(self: TwoPoint, space: Any, loss_fn: Any, keys: Sequence[int]) -> Any:
        probed.extend(keys)
        return estimate(self, space, loss_fn, keys)

    monkeypatch.setattr(TwoPoint, "estimate", recorded)

    folder = run(f"fl.directions={directions}", "fl.local_steps=2")

    log = lines(folder, "public.jsonl")
    assert [(line["owners"], line["attendance"]) for line in log] == [(owners, [0, 1, 2, 3])] * 3
    assert probed == [
        stream_key(0, round=line["round"], step=step, owner=SHARED if directions == "shared" else client)
        for line in log
        for client in line["attendance"]
        for step in range(2)
    ]
    assert len(set(probed)) == count


def test_the_number_of_losses_is_the_budget_and_not_one_more(
    overrides: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedzo.fl.client import scalar_update
    from fedzo.fl.messages import TrainRequest
    from fedzo.trainers import TrainerContext
    from fedzo.zo.log import EMPTY_CHAIN

    process = open_run(load(overrides("fl.local_steps=3", "trainer.lr=0.1")), tmp_path)
    context = TrainerContext(folder=tmp_path, seed=0, texts=list)
    peer, worker = process.peer, process.client.worker
    artifact = peer.trainer.prepare(peer.loaded, context).artifact
    replica = peer.workspace(artifact).replica
    before = replica.space.digest()
    original, asked = scalar_update.example_losses, []
    monkeypatch.setattr(scalar_update, "example_losses", lambda *a, **k: asked.append(a) or original(*a, **k))

    worker.train(
        TrainRequest(
            client=0,
            config_hash=worker.config_hash,
            space_id=artifact.digest,
            chain=EMPTY_CHAIN.hex(),
            check=replica.space.check(),
            steps=3,
            lr=float(np.float32(0.1)),
        )
    )

    assert len(asked) == 2 * 3
    assert peer.workspace(artifact).replica is replica
    assert replica.space.digest() == before


def test_a_client_does_nothing_that_its_run_did_not_announce(overrides: Overrides, tmp_path: Path) -> None:
    from fedzo.fl.messages import ArtifactPiece, EvaluateRequest, Hello, TrainRequest
    from fedzo.zo.log import EMPTY_CHAIN

    process = open_run(load(overrides("fl.local_steps=2", "trainer.lr=0.1")), tmp_path)
    worker = process.client.worker
    sound = {
        "client": 3,
        "config_hash": worker.config_hash,
        "space_id": process.peer.config.artifact,
        "chain": EMPTY_CHAIN.hex(),
    }

    for request, told in (
        (TrainRequest(**sound, steps=3, lr=0.1), "steps must be 1 to 2 in this run, got 3"),
        (TrainRequest(**sound, steps=2, lr=0.2), "lr must be 0 to 0.1 in this run, got 0.2"),
        (TrainRequest(**sound, steps=2, used=1), "used must be 0 to 0 in this run, got 1"),
        (TrainRequest(**{**sound, "space_id": "0" * 64}, steps=2), "artifact: it must be the run's"),
        (TrainRequest(**{**sound, "client": 4}, steps=2), "client must be 0 to 3 in this run, got 4"),
    ):
        with pytest.raises(ProtocolError, match=told):
            worker.train(request)
    with pytest.raises(ProtocolError, match="round must be 0 to 3 in this run, got 4"):
        worker.evaluate(EvaluateRequest(**sound, round=4))
    with pytest.raises(ProtocolError, match="artifact: it must be the run's"):
        worker.receive(ArtifactPiece(client=0, digest="0" * 64, size=1 << 20))
    for work, request in (
        (worker.hello, Hello(client=4)),
        (worker.evaluate, EvaluateRequest(**{**sound, "client": 4})),
        (worker.receive, ArtifactPiece(client=4, digest=process.peer.config.artifact)),
    ):
        with pytest.raises(ProtocolError, match="client must be 0 to 3 in this run, got 4"):
            work(request)


def test_every_local_step_is_compared_with_the_masks_gradient(run: Run, lines: Lines) -> None:
    """GradIP from whole vectors: the direction split over the weights, the gradient as the mask file holds it."""
    folder = run("fl.local_steps=2", "estimator.num_probes=2")
    mask = load_mask(folder / "mask.safetensors")
    assert mask.gradient is not None
    sizes = [flat.numel() for flat in mask.indices.values()]
    audit = lines(folder, "audit.jsonl")
    metrics = [line for line in lines(folder, "metrics.jsonl") if line["kind"] == "round"]
    seen: dict[int, list[float]] = {}

    for audited, measured in zip(audit, metrics, strict=True):
        for entry, client in zip(audited["clients"], measured["clients"], strict=True):
            expected = []
            for t, g in enumerate(entry["g"]):
                inner = 0.0
                for p, scalar in enumerate(g):
                    z = torch.from_numpy(direction(stream_key(0, round=audited["round"], step=t, probe=p), mask.size))
                    parts = dict(zip(mask.indices, z.double().split(sizes), strict=True))
                    inner += sum(
                        scalar * float(mask.gradient[name].double() @ part) / 2 for name, part in parts.items()
                    )
                expected.append(inner)
            seen.setdefault(client["client"], []).extend(map(abs, expected))
            assert client["signals"]["grad_ip"] == pytest.approx(expected, rel=1e-5)
            assert client["signals"]["mean_abs_grad_ip"] == pytest.approx(np.mean(seen[client["client"]]), rel=1e-5)


def test_a_trainer_without_a_gradient_has_no_grad_ip(run: Run, lines: Lines) -> None:
    folder = run("trainer=mezo", "fl.rounds=1", "fl.local_steps=2")

    (line,) = lines(folder, "audit.jsonl")
    (measured,) = (line for line in lines(folder, "metrics.jsonl") if line["kind"] == "round")
    signals = measured["clients"][0]["signals"]
    assert line["xi"] is signals["mean_abs_grad_ip"] is None
    assert signals["grad_ip"] == signals["cosine"] == [None, None]
    assert signals["abs_g"] == pytest.approx([abs(g) for (g,) in line["clients"][0]["g"]], rel=1e-5)


def test_the_test_split_is_touched_once_before_and_once_at_the_best_dev_round(run: Run, lines: Lines) -> None:
    folder = run("fl.rounds=5", "server_optimizer.lr=0.05")

    scores = [line for line in lines(folder, "metrics.jsonl") if line["kind"] == "score"]
    summary = lines(folder, "metrics.jsonl")[-1]
    dev = {line["round"]: line["loss"] for line in scores if line["split"] == "dev"}
    assert sorted(dev) == [0, 2, 4, 5]
    assert dev[summary["best_round"]] == min(dev.values())
    assert {line["round"] for line in scores if line["split"] == "test"} == {0, summary["best_round"]}


def test_a_run_ends_with_the_dev_score_of_its_best_round_and_not_of_its_last(
    run: Run, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([0.5, 0.2, 0.4])  # after 0, 2 and 3 rounds
    monkeypatch.setattr("fedzo.run.scores.evaluate", lambda *_, **__: Score("accuracy", 0.5, next(losses), 8))

    summary = lines(run("evaluation.test=false"), "metrics.jsonl")[-1]

    assert (summary["best_round"], summary["after"]) == (2, None)
    assert [summary["dev"][name] for name in ("split", "round", "loss")] == ["dev", 2, 0.2]


def test_a_run_that_chooses_settings_scores_no_test_row_and_has_the_dev_rows_of_the_runs_to_come(
    run: Run, lines: Lines, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where one file holds all rows. A token takes a second in the estimate, however busy this machine is."""
    monkeypatch.setattr("fedzo.run.costs.time_forwards", lambda loaded, num_tokens: ForwardSeconds(0.0, 1.0))
    settings = [f"data.path={data_dir / 'train.jsonl'}", "split.num_test=8", "split.num_dev=6"]

    chosen, tested = run("evaluation.test=false", *settings), run(*settings)

    scores, others = (
        [line for line in lines(folder, "metrics.jsonl") if line["kind"] == "score"] for folder in (chosen, tested)
    )
    assert {line["split"] for line in scores} == {"dev"}
    assert [line["loss"] for line in scores] == [line["loss"] for line in others if line["split"] == "dev"]
    assert lines(chosen, "metrics.jsonl")[-1]["after"] is None
    assert (
        lines(chosen, "metrics.jsonl")[0]["estimate"]["seconds"]
        < lines(tested, "metrics.jsonl")[0]["estimate"]["seconds"]
    )
    assert evaluate_run(chosen, split="test") == evaluate_run(tested, split="test")


def test_a_split_without_rows_is_not_scored(run: Run, lines: Lines) -> None:
    folder = run("split.num_dev=0", "split.num_test=0")

    records = lines(folder, "metrics.jsonl")
    assert [line for line in records if line["kind"] == "score"] == []
    assert records[-1]["kind"] == "summary"
    assert records[-1]["after"] is None


def test_federated_scores_are_counts_of_the_clients_own_held_out_rows(run: Run, lines: Lines) -> None:
    folder = run("partition.holdout=0.25")

    (score,) = [line for line in lines(folder, "metrics.jsonl") if line["kind"] == "federated_score"]
    setup = lines(folder, "metrics.jsonl")[0]
    assert [entry["num_examples"] for entry in score["clients"]] == [c["num_heldout"] for c in setup["clients"]]
    assert sum(c["num_train"] + c["num_heldout"] for c in setup["clients"]) == 64
    assert score["num_examples"] == 16
    total_right = sum(right for right, _ in score["per_class"].values())
    assert score["value"] == pytest.approx(total_right / 16)
    assert score["worst_client"] == min(entry["value"] for entry in score["clients"])


def test_bytes_are_the_formula(run: Run, lines: Lines) -> None:
    folder = run("fl.local_steps=3", "estimator.num_probes=2")

    rounds = [line for line in lines(folder, "metrics.jsonl") if line["kind"] == "round"]
    assert len(rounds) == 3
    for line in rounds:
        assert line["payload_up_bytes"] == 4 * 3 * 2 * 4
        assert line["payload_down_bytes"] == 4 * 3 * 2 * 4
        assert line["message_up_bytes"] > line["payload_up_bytes"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_drops_the_probe_is_counted_and_never_averaged(
    run: Run, finished: Run, lines: Lines, monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    from fedzo.fl.client import scalar_update

    healthy = finished("fl.rounds=1")
    calls = iter(range(10**6))
    original = scalar_update.example_losses
    # the first two losses are client 0's two sides
    monkeypatch.setattr(
        scalar_update, "example_losses", lambda *a, **k: np.full(2, bad) if next(calls) == 1 else original(*a, **k)
    )
    folder = run("fl.rounds=1")

    (audit,) = lines(folder, "audit.jsonl")
    (metrics,) = [line for line in lines(folder, "metrics.jsonl") if line["kind"] == "round"]
    g = {entry["client"]: entry["g"][0][0] for entry in audit["clients"]}
    wanted = {entry["client"]: entry["g"][0][0] for entry in lines(healthy, "audit.jsonl")[0]["clients"]}
    assert [entry["dropped"] for entry in audit["clients"]] == [[[True]], [[False]], [[False]], [[False]]]
    assert g == {**wanted, 0: 0.0}
    assert coefficients(lines(folder, "public.jsonl")).item() == pytest.approx(sum(g.values()) / 4)
    assert metrics["dropped_probes"] == 1
    assert np.isfinite(metrics["loss"])


def test_a_probe_that_overflows_float16_is_dropped_and_counted_and_the_round_goes_on(
    run: Run, lines: Lines, tmp_path: Path
) -> None:
    """One weight is the largest number of float16, where the spacing is 32: raised by 16 it is infinite."""
    largest, eps = torch.finfo(torch.float16).max, 24.0
    model = tiny_model("llama")
    mlp, name = model.model.layers[0].mlp, "model.layers.0.mlp.down_proj.weight"
    mlp.up_proj.weight[0] *= 2**-13  # makes what the weight multiplies small, so that the model itself is finite
    mlp.down_proj.weight[0, 0] = largest
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    shapes = {name: tuple(mlp.down_proj.weight.shape)}
    mask = Mask({name: torch.tensor([0, 1])}, shapes, gradient=None, manifest={})  # that weight, and an ordinary one
    save_mask(mask, tmp_path / "mask.safetensors")

    def overflows(round: int, client: int) -> bool:
        moved = eps * torch.from_numpy(direction(stream_key(0, round=round, owner=client), 2))[0]
        return bool(torch.stack([largest + moved, largest - moved]).half().isinf().any())

    folder = run(
        f"model={tmp_path / 'model'}", f"inputs.artifact={tmp_path / 'mask.safetensors'}", "model.dtype=float16",
        f"estimator.eps={eps}", "fl.directions=per_client", "strategy.clip_factor=0",
    )  # fmt: skip

    lost = np.array([[overflows(round, client) for client in range(4)] for round in range(3)])
    assert {*lost.ravel().tolist()} == {True, False}
    public, audit = lines(folder, "public.jsonl"), lines(folder, "audit.jsonl")
    assert [line["attendance"] for line in public] == [[0, 1, 2, 3]] * 3
    assert [[entry["dropped"] == [[True]] for entry in line["clients"]] for line in audit] == lost.tolist()
    c = coefficients(public).reshape(3, 4)
    assert not c[lost].any()
    assert c[~lost].any()
    rounds = [line for line in lines(folder, "metrics.jsonl") if line["kind"] == "round"]
    assert [line["dropped_probes"] for line in rounds] == lost.sum(1).tolist()
    assert replay_run(folder)["digest"] == public[-1]["digest"]


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("trainer", ["meerkat", "mezo"])
def test_a_client_whose_memory_is_too_small_for_a_step_says_so_and_the_run_goes_on(
    run: Run,
    lines: Lines,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    trainer: str,
    steps: int,
) -> None:
    """On a GPU, or on this machine, within a probe: the weights are what they were, so the next round is sound."""
    from fedzo.fl.client import scalar_update

    settings = [f"trainer={trainer}", "fl.rounds=3", f"fl.local_steps={steps}"]
    calls, original = iter(range(10**6)), scalar_update.example_losses
    # four clients' two sides a step: the second side of client 1's last step in round 0, and of client 2's in round 1
    last = 4 * steps - 1

    def scarce(*args: Any, **kwargs: Any) -> Any:
        call = next(calls)
        if call == last:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        if call == 8 * steps + 3 * 2 * steps - 1:
            torch.empty(1 << 50)
        return original(*args, **kwargs)

    monkeypatch.setattr(scalar_update, "example_losses", scarce)
    folder = run(*settings)

    rounds = [line for line in lines(folder, "metrics.jsonl") if line["kind"] == "round"]
    assert [line["absent"] for line in rounds] == [[1], [2], []]
    why = "refusal 38, its memory is too small for the request. Its own log says why"
    assert why in rounds[0]["reasons"]["1"]
    assert why in rounds[1]["reasons"]["2"]
    told = [record.getMessage() for record in caplog.records]
    said = [text for text in told if "Write a small model.tokens_per_batch" in text]
    assert len(said) == 2
    assert "Tried to allocate 2.00 GiB" in said[0]
    assert "DefaultCPUAllocator" in said[1]
    assert replay_run(folder)["rounds"] == 3  # what the clients hold was checked by hash in each later round


def a_score(**changes: object) -> str:
    """A reply that could be a client's, but for the changes."""
    sound = {"metric": "accuracy", "value": 0.5, "loss": 0.7, "num_examples": 2, "per_class": {"0": [1, 2]}}
    return json.dumps({"answers": {**sound, **changes}})


@pytest.mark.parametrize(
    "bad",
    ["not json", a_score(value=1.5), a_score(loss=500.0)],
    ids=["no JSON", "out of its measure", "far beyond what the other clients measured"],
)
def test_a_score_that_cannot_be_used_is_left_out_and_ends_nothing(
    run: Run, lines: Lines, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, bad: str
) -> None:
    from fedzo.fl.client.worker import ClientWorker
    from fedzo.fl.messages import EvaluateReply

    honest = ClientWorker.evaluate

    def evaluate(self: ClientWorker, request: Any) -> EvaluateReply:
        reply = honest(self, request)
        return EvaluateReply(position=reply.position, scores=bad) if request.client == 0 else reply

    monkeypatch.setattr(ClientWorker, "evaluate", evaluate)

    folder = run("fl.rounds=1")

    (score,) = [line for line in lines(folder, "metrics.jsonl") if line["kind"] == "federated_score"]
    assert [entry["client"] for entry in score["clients"]] == [1, 2, 3]
    assert "client 0 was not scored" in caplog.text


@pytest.mark.parametrize(
    ("settings", "told", "is_kept"),
    [
        ([], 4, True),
        ([], 5, False),
        (["evaluation.federated_max_rows=3"], 3, True),
        (["evaluation.federated_max_rows=3"], 4, False),
    ],
)
def test_no_client_weighs_more_than_the_rows_that_it_was_asked_to_score(
    run: Run, lines: Lines, monkeypatch: pytest.MonkeyPatch, settings: list[str], told: int, is_kept: bool
) -> None:
    """Each holds out four."""
    from fedzo.fl.client.worker import ClientWorker

    honest = ClientWorker.evaluate

    def evaluate(self: ClientWorker, request: Any) -> Any:
        reply = honest(self, request)
        return replace(reply, scores=a_score(num_examples=told)) if request.client == 0 else reply

    monkeypatch.setattr(ClientWorker, "evaluate", evaluate)

    folder = run("fl.rounds=1", "partition.holdout=0.25", "evaluation.central=false", *settings)

    (score,) = [line for line in lines(folder, "metrics.jsonl") if line["kind"] == "federated_score"]
    others = dict.fromkeys((1, 2, 3), 3 if settings else 4)
    assert {row["client"]: row["num_examples"] for row in score["clients"]} == ({0: told} if is_kept else {}) | others


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        (["fl.num_clients=65"], "fl.num_clients must be between 1 and the number of training rows"),
        (["partition=natural", "partition.column=site", "fl.num_clients=5"], "has 4 values and fl.num_clients is 5"),
    ],
)
def test_rows_that_cannot_be_dealt_are_refused_before_any_client_is_asked(
    run: Run, settings: list[str], rule: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError, match=rule):
        run(*settings)
    assert "failed" not in caplog.text


def test_a_slow_machine_loses_no_client_where_one_process_plays_them_all(
    overrides: Overrides, tmp_path: Path, lines: Lines
) -> None:
    config, folder = load(overrides("fl.rounds=2")), tmp_path / "run"
    config.strategy.deadline_s = 0.001  # as a preset may have it, for other runtimes

    start_run(config, folder, overrides=[])

    assert [line["attendance"] for line in lines(folder, "public.jsonl")] == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize(("trainer", "few"), [("meerkat", 2), ("mezo", 1)])
def test_batches_are_split_where_the_padding_costs_more_than_a_forward(
    overrides: Overrides, tmp_path: Path, trainer: str, few: int
) -> None:
    """40 tokens of padding are worth a forward of 32 tokens, but not one that perturbs all weights; 4,480 are."""
    from fedzo.models.plan import plan_batches
    from fedzo.trainers import TrainerContext

    process = open_run(load(overrides(f"trainer={trainer}", "device=cpu")), tmp_path)
    context = TrainerContext(folder=tmp_path, seed=0, texts=list)
    peer = process.peer
    cost = peer.workspace(peer.trainer.prepare(peer.loaded, context).artifact).forward_cost_tokens

    num_batches = [
        len(plan_batches(lengths, tokens_per_batch=10_000, forward_cost_tokens=cost))
        for lengths in ([60, 20], [300, *[20] * 16])
    ]

    assert num_batches == [few, 2]
