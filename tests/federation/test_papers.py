"""Other papers' methods as settings of a federation, against what their papers write down."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedzo.commands.replay import replay_run
from fedzo.commands.run_folder import rebuild
from fedzo.config.load import load
from fedzo.errors import ConfigError
from fedzo.fl.log_store import RunStore
from fedzo.zo.directions import stream_key
from fedzo.zo.server_optimizer import SERVER_OPTIMIZERS, FedDyn, FedDynConfig
from fedzo.zo.server_optimizer.control_variates import end_models

Run = Callable[..., Path]
Lines = Callable[[Path, str], list[dict[str, Any]]]


def test_feedsign_sends_bits_and_its_local_steps_can_be_replayed_from_the_audit_log(run: Run, lines: Lines) -> None:
    folder = run("strategy=majority_sign", "fl.local_steps=3", "estimator.num_probes=2", "server_optimizer.lr=1e-3")

    audit, metrics = lines(folder, "audit.jsonl"), lines(folder, "metrics.jsonl")
    g = np.array([[entry["g"] for entry in line["clients"]] for line in audit])  # [R, K, T, P]
    assert set(np.unique(g)) <= {-1.0, 0.0, 1.0}
    assert {line["payload_up_bytes"] for line in metrics if line["kind"] == "round"} == {4 * 1}  # six bits a client
    c = np.array([line["c"] for line in lines(folder, "public.jsonl")])[..., 0]
    assert np.array_equal(c, np.sign(g.sum(axis=1)) / 2)

    for line in audit:
        replica = rebuild(folder, rounds=line["round"]).replica
        start = replica.space.values()
        for entry in line["clients"]:
            replica.space.load(start)
            for t, row in enumerate(entry["g"]):
                for p, sign in enumerate(row):
                    key = stream_key(0, round=line["round"], step=t, probe=p)
                    replica.space.step(float(np.float32(np.float32(1e-3) * np.float32(sign / 2))), key)
            assert replica.space.check() == entry["end_check"]


# --- rules that correct drift -----------------------------------------------------------------------------------------

DRIFT = {
    "scaffold": ("server_optimizer=scaffold", "server_optimizer.lr=0.01"),
    "feddyn": ("server_optimizer=feddyn", "server_optimizer.lr=0.01", "server_optimizer.alpha=5"),
}
UNEVEN = ("fl.rounds=4", "fl.local_steps=3", "faults.absent=['1@1','2@2']", "strategy.clients_per_round=3")


@pytest.mark.parametrize("rule", list(DRIFT))
def test_each_client_s_end_is_what_the_public_log_says(run: Run, lines: Lines, rule: str) -> None:
    folder = run(*DRIFT[rule], *UNEVEN, "estimator.num_probes=2")

    assert replay_run(folder)["rounds"] == 4
    audit, public = lines(folder, "audit.jsonl"), lines(folder, "public.jsonl")
    corrected = 0
    with RunStore(folder) as store:
        records = store.records
    for line, record in zip(audit, records, strict=True):
        built = rebuild(folder, rounds=record.round)
        replica = built.replica
        corrected += bool(replica.moments.any())
        server_optimizer = SERVER_OPTIMIZERS.build(built.process.peer.config.server_optimizer, local_steps=3)
        checks = {
            client: zlib.crc32(end.data)
            for client, end in end_models(server_optimizer, replica.space, replica.moments, record, run_seed=0)
        }
        assert checks == {entry["client"]: entry["end_check"] for entry in line["clients"]}
    assert corrected == 3
    assert [line["owners"] for line in public] == [line["attendance"] for line in public]
    assert {line["directions"] for line in public} == {"shared"}


def test_rules_that_correct_drift_refuse_what_does_not_go_with_them(overrides: Callable[..., list[str]]) -> None:
    with pytest.raises(ConfigError) as raised:
        load(
            overrides(
                "server_optimizer=scaffold",
                "fl.directions=per_client",
                "strategy=size",
                "server_optimizer.weight_decay=10",
            )
        )

    for part in (
        "fl.directions must be shared for server_optimizer=scaffold, whose log keeps each client's own scalars",
        "strategy.weighting must be uniform for server_optimizer=scaffold",
        "server_optimizer.weight_decay must be 0 for server_optimizer=scaffold",
    ):
        assert part in str(raised.value)
    with pytest.raises(ConfigError, match=r"strategy\.aggregation must be mean for server_optimizer=feddyn"):
        load(overrides("server_optimizer=feddyn", "strategy=median"))
    with pytest.raises(
        ConfigError,
        match=r"server_optimizer\.alpha must be >= 0 and make server_optimizer\.lr \* alpha less",
    ):
        load(overrides("server_optimizer=feddyn", "server_optimizer.lr=0.1", "server_optimizer.alpha=10"))
    with pytest.raises(ConfigError, match="server_optimizer must be sgd for trainer=mezo"):
        load(overrides("server_optimizer=feddyn", "trainer=mezo"))


def test_feddyn_s_default_goes_by_the_round_s_lr_and_local_steps(
    overrides: Callable[..., list[str]],
) -> None:
    config = load(overrides("server_optimizer=feddyn", "server_optimizer.lr=0.002", "fl.local_steps=10"))

    assert isinstance(config.server_optimizer, FedDynConfig)
    rule = SERVER_OPTIMIZERS.build(config.server_optimizer, local_steps=config.fl.local_steps)
    assert isinstance(rule, FedDyn)
    assert [rule.pull(0.002), rule.pull(0.0002)] == pytest.approx([25, 250])
    assert [FedDyn(alpha=5, local_steps=10).pull(lr) for lr in (0.002, 0.0002, 0.0)] == [5, 5, 5]


# --- a pool of directions ---------------------------------------------------------------------------------------------


def test_a_pool_of_directions_replays_and_holds_no_more_than_its_size(run: Run, lines: Lines) -> None:
    from fedzo.zo.steps import scalars_and_keys

    folder = run(
        "fl.directions=pool", "fl.pool_size=5", "fl.local_steps=3", "estimator.num_probes=2", "server_optimizer.lr=0.01"
    )

    result, public = replay_run(folder), lines(folder, "public.jsonl")
    assert result["digest"] == public[-1]["digest"]
    with RunStore(folder) as store:
        records = store.records
    keys = [key for record in records for _, key in scalars_and_keys(record, run_seed=0)]
    assert len(keys) == 3 * 3 * 2 * 4
    assert len(set(keys)) == 5
    assert {line["directions"] for line in public} == {5}
    rounds = [line for line in lines(folder, "metrics.jsonl") if line["kind"] == "round"]
    assert {line["payload_down_bytes"] for line in rounds} == {4 * (3 * 2 * 4) * 4}


def test_clients_that_draw_from_a_pool_cannot_share_forwards(overrides: Callable[..., list[str]]) -> None:
    with pytest.raises(ConfigError, match=r"runtime\.batch_clients must be false for fl\.directions=pool"):
        load(overrides("runtime.batch_clients=true", "fl.directions=pool"))
    with pytest.raises(ConfigError, match=r"fl\.pool_size must be between 2"):
        load(overrides("fl.directions=pool", "fl.pool_size=1"))


# --- presets ----------------------------------------------------------------------------------------------------------


def test_a_round_of_decomfl_is_its_algorithm_written_out(
    run: Run, lines: Lines, overrides: Callable[..., list[str]], tmp_path: Path
) -> None:
    """Algorithms 3 and 4 of arXiv 2405.15861 in plain torch: K local steps, P forward differences, scalars averaged."""
    import torch

    from fedzo.data.rows import batch_rows
    from fedzo.run.start import open_run
    from fedzo.zo.directions import direction

    eps, lr, steps, probes = 1e-2, 1e-3, 2, 3
    settings = ("experiment=decomfl", "fl.rounds=1", f"fl.local_steps={steps}", f"estimator.num_probes={probes}")
    settings = (
        *settings,
        f"estimator.eps={eps}",
        f"server_optimizer.lr={lr}",
        "trainer=mezo",
        "strategy.clients_per_round=2",
    )
    folder = run(*settings)
    (public,), (audit,) = lines(folder, "public.jsonl"), lines(folder, "audit.jsonl")

    process = open_run(load(overrides(*settings)), tmp_path)
    model = process.peer.loaded.model.double()
    x0 = torch.nn.utils.parameters_to_vector(model.parameters()).detach()

    def loss(x: torch.Tensor, examples: list[Any]) -> float:
        torch.nn.utils.vector_to_parameters(x, model.parameters())
        values = []
        for example in examples:
            scores = []
            for answer in example.candidates:
                with torch.no_grad():
                    logp = model(input_ids=torch.tensor([[*example.prompt, *answer]])).logits[0].log_softmax(-1)
                start = len(example.prompt) - 1
                scores.append(torch.stack([logp[start + i, token] for i, token in enumerate(answer)]).mean())
            values.append(float(torch.logsumexp(torch.stack(scores), 0) - scores[example.label]))
        return float(np.mean(values))

    def z(k: int, p: int) -> torch.Tensor:
        return torch.from_numpy(direction(stream_key(0, round=0, step=k, probe=p), len(x0))).double()

    answers = {}
    for client in public["attendance"]:
        x, train = x0.clone(), process.client.data(client).train
        g = np.zeros((steps, probes))
        for k in range(steps):
            batch = [train[i] for i in batch_rows(run_seed=0, client=client, used=k, batch_size=2, num_rows=len(train))]
            here = loss(x, batch)
            g[k] = [(loss(x + eps * z(k, p), batch) - here) / eps for p in range(probes)]
            x = x - lr / probes * sum(g[k, p] * z(k, p) for p in range(probes))
        answers[client] = g
    mean = np.mean(list(answers.values()), axis=0)
    end = x0 - lr / probes * sum(mean[k, p] * z(k, p) for k in range(steps) for p in range(probes))

    # float32 losses are right to about 2e-7, g to that over eps
    assert len(public["attendance"]) == 2
    for entry in audit["clients"]:
        assert np.array(entry["g"]) == pytest.approx(answers[entry["client"]], abs=2e-4)
    assert np.array(public["c"])[:, :, 0] * probes == pytest.approx(mean, abs=2e-4)
    assert np.abs(mean).max() > 0.02
    assert rebuild(folder, rounds=1).replica.space.values() == pytest.approx(end.numpy(), abs=2e-6)


@pytest.mark.parametrize("experiment", ["decomfl", "fedkseed", "feedsign"])
def test_a_preset_of_another_paper_runs_and_replays(run: Run, experiment: str) -> None:
    folder = run(f"experiment={experiment}", "trainer=mezo", "fl.rounds=2", "fl.local_steps=2")

    assert replay_run(folder)["rounds"] == 2
