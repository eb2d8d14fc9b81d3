"""The first-order upper bound: fedzo's loss, torch's gradient, and it learns."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from fedzo.config.load import load
from fedzo.errors import ConfigError
from fedzo.models.scoring import mean_loss

Overrides = Callable[..., list[str]]
PATH = Path(__file__).parents[2] / "experiments" / "meerkat" / "first_order.py"


@pytest.fixture(scope="module")
def first_order() -> ModuleType:
    spec = importlib.util.spec_from_file_location("first_order", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("loss", ["candidates", "lm"])
def test_its_loss_is_fedzo_s_and_its_gradient_is_torch_s_at_the_mask(
    first_order: ModuleType, overrides: Overrides, tmp_path: Path, loss: str
) -> None:
    from fedzo.masks.mask_file import load_mask

    config = load(overrides(f"task.loss={loss}"))
    process, space, gradient = first_order.open_space(config, tmp_path)
    rows = process.client.data(0).train[:3]

    g = gradient(rows)

    written = first_order.batch_loss(
        process.peer.loaded.model, rows, loss=config.task.loss, device=process.peer.loaded.device
    )
    assert written.item() == pytest.approx(
        mean_loss(process.peer.loaded, rows, loss=config.task.loss, tokens_per_batch=4096), rel=1e-5
    )
    dense = process.peer.loaded.model.double().requires_grad_(True)
    dense.zero_grad()
    values = []
    for example in rows:  # one sequence at a time, without padding
        scores = []
        for answer in example.candidates:
            logp = dense(input_ids=torch.tensor([[*example.prompt, *answer]])).logits[0].log_softmax(-1)
            start = len(example.prompt) - 1
            scores.append(torch.stack([logp[start + i, token] for i, token in enumerate(answer)]).mean())
        right = scores[example.label]
        values.append(-right if loss == "lm" else -(right - torch.logsumexp(torch.stack(scores), 0)))
    torch.stack(values).mean().backward()
    named = dict(dense.named_parameters())
    indices = load_mask(tmp_path / "mask.safetensors").indices
    expected = torch.cat([named[name].grad.view(-1)[flat] for name, flat in indices.items()])  # type: ignore[union-attr]
    assert g == pytest.approx(expected.numpy(), rel=1e-3, abs=1e-6)
    assert np.abs(g).max() > 1e-3
    assert g.shape == (space.size,)


@pytest.mark.parametrize(
    ("extra", "adam", "share"),
    [
        (("server_optimizer.lr=0.1",), False, 0.93),
        (("server_optimizer.lr=0.01",), True, 0.6),
        (("trainer=lora", "trainer.rank=4", "server_optimizer.lr=0.2", "strategy.clients_per_round=3"), False, 0.85),
    ],
    ids=["mask sgd", "mask adam", "lora sgd"],
)
def test_it_learns_and_reports_as_a_run_does(
    first_order: ModuleType, overrides: Overrides, tmp_path: Path, extra: tuple[str, ...], adam: bool, share: float
) -> None:
    settings = ("fl.rounds=16", "fl.local_steps=4", "fl.batch_size=8", "evaluation.every_rounds=4")
    config = load(overrides(*settings, *extra))

    results = first_order.run(config, tmp_path, adam=adam)

    summary, scores = results["summary"], results["scores"]
    assert summary["after"]["loss"] < share * summary["before"]["loss"]
    assert summary["before"]["round"] == 0
    assert (summary["after"]["split"], summary["after"]["round"]) == ("test", summary["best_round"])
    assert [line["round"] for line in scores if line["split"] == "dev"] == [0, 4, 8, 12, 16]
    clients = 3 if "strategy.clients_per_round=3" in extra else 4
    assert len(results["clients"]) == 4
    assert summary["worst_client"]["value"] == min(client["value"] for client in results["clients"])
    assert summary["payload_up_bytes"] == summary["payload_down_bytes"] == 4 * summary["space_size"] * clients * 16


def test_its_command_line_writes_what_the_run_found(
    first_order: ModuleType, overrides: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "results.json"
    monkeypatch.setattr(sys, "argv", ["first_order.py", *overrides("fl.rounds=1"), "--out", str(out)])

    first_order.main()

    results = json.loads(out.read_text())
    assert (results["overrides"][-1], results["local_optimizer"]) == ("fl.rounds=1", "sgd")
    assert results["lr"] == load(overrides()).server_optimizer.lr
    assert {"before", "after", "best_round", "payload_up_bytes", "payload_down_bytes"} <= set(results["summary"])


def test_its_results_are_a_row_of_the_study(
    first_order: ModuleType, overrides: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fields of a run that sends scalars: the same tables are made of both."""
    monkeypatch.syspath_prepend(str(PATH.parent))
    collect = importlib.import_module("collect")
    monkeypatch.setattr(collect, "RESULTS", tmp_path / "results")
    settings = ("fl.rounds=2", "evaluation.every_rounds=1", "server_optimizer.lr=0.1", "partition.holdout=0.2")
    results = first_order.run(load(overrides(*settings)), tmp_path)
    words = ["experiment=study", "+cell=sst2-meerkat", "+budget=T10", "seed=2", "trainer.lr=0.1"]
    (tmp_path / "sweep" / "run").mkdir(parents=True)
    written = tmp_path / "sweep" / "run" / collect.FIRST_ORDER
    written.write_text(json.dumps({**results, "overrides": words, "lr": 0.1}))

    (row,) = collect.keep("first_order", tmp_path / "sweep")

    (core, *_) = json.loads((PATH.parent / "results" / "core.json").read_text())
    assert set(row) == set(core)
    assert row["name"] == "+budget=T10 +cell=sst2-meerkat seed=2 trainer.lr=0.1"
    assert (row["task"], row["method"], row["budget"], row["seed"], row["lr"]) == ("sst2", "meerkat", "T10", 2, 0.1)
    assert row["after"]["value"] == results["summary"]["after"]["value"]
    assert [round_ for round_, _, _ in row["dev"]] == [0, 1, 2]
    assert row["federated"]["worst_client"] == min(client["value"] for client in results["clients"])


@pytest.mark.parametrize(
    ("settings", "out", "words"),
    [
        (["fl.foo=3"], "results.json", "fl.foo"),
        (["trainer=mezo"], "results.json", "trainer must be meerkat or lora"),
        ([], "nowhere/results.json", "--out must be a file in an existing folder"),
    ],
)
def test_its_command_line_says_what_is_wrong_before_it_trains(
    first_order: ModuleType,
    overrides: Overrides,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    settings: list[str],
    out: str,
    words: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["first_order.py", *overrides(*settings), "--out", str(tmp_path / out)])
    monkeypatch.setattr(first_order, "learning_rate", lambda *a, **k: pytest.fail("it trains"))

    with pytest.raises(SystemExit) as end:
        first_order.main()
    assert words in f"{end.value.code} {capsys.readouterr().err}"


def test_one_client_with_one_step_is_gradient_descent(
    first_order: ModuleType, overrides: Overrides, tmp_path: Path
) -> None:
    config = load(overrides("fl.rounds=1", "fl.num_clients=1", "server_optimizer.lr=0.25", "fl.batch_size=3"))
    process, space, gradient = first_order.open_space(config, tmp_path / "a")
    from fedzo.data.order import batch_rows

    train = process.client.data(0).train
    rows = [train[i] for i in batch_rows(run_seed=0, client=0, used=0, batch_size=3, num_rows=len(train))]
    space.load(space.values() - np.float32(0.25) * gradient(rows))

    results = first_order.run(config, tmp_path / "b")

    assert results["summary"]["final_digest"] == space.digest()


def test_two_clients_are_averaged_by_their_rows(first_order: ModuleType, overrides: Overrides, tmp_path: Path) -> None:
    from fedzo.data.order import batch_rows

    settings = ("fl.rounds=1", "fl.num_clients=2", "partition=dirichlet", "partition.alpha=0.5", "strategy=size")
    config = load(overrides(*settings, "strategy.size_cap=0", "server_optimizer.lr=0.25"))
    process, space, gradient = first_order.open_space(config, tmp_path / "a")
    start, ends, sizes = space.values(), [], []
    for client in range(2):
        train = process.client.data(client).train
        rows = batch_rows(run_seed=0, client=client, used=0, batch_size=2, num_rows=len(train))
        space.load(start)
        ends.append((start - np.float32(0.25) * gradient([train[i] for i in rows])).astype(np.float64))
        sizes.append(len(train))
    assert sizes[0] != sizes[1]
    space.load((sizes[0] / sum(sizes) * ends[0] + sizes[1] / sum(sizes) * ends[1]).astype(np.float32))

    results = first_order.run(config, tmp_path / "b")

    assert results["summary"]["final_digest"] == space.digest()


@pytest.mark.parametrize(
    ("extra", "match"),
    [
        ("trainer=mezo", "trainer must be meerkat or lora"),
        ("server_optimizer=adam", "optimizer must be sgd without decay"),
        ("model.dtype=bfloat16", r"model\.dtype must be float32"),
        ("step_policy=cusum", "step_policy must be none"),
        ("strategy=median", r"strategy\.aggregation must be mean"),
        ("faults.absent=['1@1']", r"faults\.absent must be empty"),
        ("data.num_test=0", r"data\.num_dev and data\.num_test must be above 0"),
    ],
)
def test_what_it_would_leave_out_is_refused(
    first_order: ModuleType, overrides: Overrides, tmp_path: Path, extra: str, match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        first_order.run(load(overrides(extra)), tmp_path)
