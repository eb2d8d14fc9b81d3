"""FedAvg with backpropagation on the values that a fedzo run trains: the upper bound of its accuracy.

    python experiments/meerkat/first_order.py fl.rounds=160 fl.local_steps=10 server_optimizer.lr=1e-2 --out out.json

Takes a run's own settings (trainer=meerkat or lora) and uses its data, partition, order of rows, loss, sampling of
clients, learning-rate schedule and scores. A client takes T steps of SGD (``--local-optimizer adam``: Adam, whose
moments it keeps from round to round) from the round's model; the server averages the clients' trained values. Where it
differs from the run: gradients are exact, and n float32 values travel each way, a client and round. It cannot be
resumed, and the model is held in float32.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fedzo.config.load import load
from fedzo.config.overrides import with_config_dir
from fedzo.config.schema import RunConfig
from fedzo.config.travel import config_hash
from fedzo.data.config import Loss
from fedzo.data.example import Example
from fedzo.data.order import batch_rows
from fedzo.errors import ConfigError, FedzoError
from fedzo.evaluate.answers import evaluate
from fedzo.fl.config import Aggregation, BestBy
from fedzo.fl.server.aggregate import client_weights, sampling_order
from fedzo.fl.server.step_policy.baselines import NoStepPolicyConfig
from fedzo.masks.mask_file import decode_mask
from fedzo.models.config import DType
from fedzo.records.decode import encode
from fedzo.run.process import Process, open_process
from fedzo.system import environment
from fedzo.trainers import Workplace
from fedzo.trainers.adapters import LoraTrainerConfig
from fedzo.trainers.meerkat import MeerkatConfig
from fedzo.zo.server_optimizer import SgdConfig, learning_rate
from fedzo.zo.spaces.base import Space

Record = dict[str, Any]
Gradient = Callable[[Sequence[Example]], np.ndarray]


class Adam:
    """One client's Adam (arXiv 1412.6980) over its own steps; ``lr`` is given with each."""

    def __init__(self, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> None:
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
        self.m: Any = 0.0
        self.v: Any = 0.0
        self.t = 0

    def along(self, gradient: np.ndarray) -> np.ndarray:
        self.t += 1
        self.m = self.beta1 * self.m + (1 - self.beta1) * gradient
        self.v = self.beta2 * self.v + (1 - self.beta2) * gradient**2
        mhat, vhat = self.m / (1 - self.beta1**self.t), self.v / (1 - self.beta2**self.t)
        return np.asarray(mhat / (np.sqrt(vhat) + self.eps), np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="settings as of `fedzo train`")
    parser.add_argument("--config-dir", help="as of `fedzo train`")
    parser.add_argument("--out", type=Path, required=True, help="where the results go (JSON)")
    parser.add_argument("--local-optimizer", choices=["sgd", "adam"], default="sgd")
    given = parser.parse_args()
    if given.out.is_dir() or not given.out.parent.is_dir():
        parser.error(f"--out must be a file in an existing folder, got {str(given.out)!r}. Choose another.")
    try:
        config = load(with_config_dir(given.overrides, given.config_dir))
        with tempfile.TemporaryDirectory() as folder:
            results = run(config, Path(folder), adam=given.local_optimizer == "adam")
    except FedzoError as error:
        sys.exit(str(error))
    results |= {
        "overrides": given.overrides,
        "local_optimizer": given.local_optimizer,
        "lr": config.server_optimizer.lr,
    }
    part = given.out.with_name(given.out.name + ".part")  # one rename, so that what is there is whole
    part.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    part.replace(given.out)
    after = results["summary"]["after"]
    print(f"{after['metric']} {results['summary']['before']['value']:.4f} -> {after['value']:.4f}")


def run(config: RunConfig, folder: Path, *, adam: bool = False) -> Record:
    """The whole run: scores before, rounds, the best round's test score."""
    check(config)
    started = time.monotonic()
    process, space, gradient = open_space(config, folder)
    scores: list[Record] = []

    def score(split: str, rounds: int) -> Record:
        rows = process.server.examples(split)
        found = evaluate(process.peer.loaded, rows, config.task, tokens_per_batch=config.model.tokens_per_batch)
        scores.append(
            {"kind": "score", "seconds": time.monotonic() - started, "split": split, "round": rounds, **encode(found)}
        )
        return scores[-1]

    before, first = score("test", 0), score("dev", 0)
    best, best_values = first, space.values()
    data = {client: process.client.data(client).train for client in range(config.fl.num_clients)}
    rows_of = {client: len(rows) for client, rows in data.items()}
    weights = client_weights(rows_of, config.strategy.weighting, size_cap=config.strategy.size_cap)
    used = dict.fromkeys(data, 0)
    adams = {client: Adam() for client in data} if adam else {}
    sent = 0
    for number in range(config.fl.rounds):
        lr = learning_rate(config.server_optimizer, round=number, rounds=config.fl.rounds)
        order = sampling_order(run_seed=config.seed, round=number, num_clients=config.fl.num_clients, connected=data)
        sampled = sorted(order[: config.strategy.clients_per_round or None])
        share = sum(weights[client] for client in sampled)
        start, total = space.values(), np.zeros(space.size)
        for client in sampled:
            space.load(start)
            for _ in range(config.fl.local_steps):
                rows = batch_rows(
                    run_seed=config.seed,
                    client=client,
                    used=used[client],
                    batch_size=config.fl.batch_size,
                    num_rows=len(data[client]),
                )
                used[client] += 1
                g = gradient([data[client][row] for row in rows])
                space.load(space.values() - np.float32(lr) * (adams[client].along(g) if adam else g))
            total += weights[client] / share * space.values().astype(np.float64)
        space.load(total.astype(np.float32))
        sent += 4 * space.size * len(sampled)
        if is_due(number + 1, config):
            latest = score("dev", number + 1)
            print(f"round {number + 1}: dev {latest['value']:.4f}, loss {latest['loss']:.4f}", flush=True)
            if is_better(latest, best, config.evaluation.best_by):
                best, best_values = latest, space.values()
    digest, clients = space.digest(), score_clients(process, config)
    space.load(best_values)
    summary = {
        "kind": "summary",
        "seconds": time.monotonic() - started,
        "rounds": config.fl.rounds,
        "best_round": best["round"],
        "before": before,
        "after": score("test", best["round"]) if best["round"] else before,
        "best_dev": best,
        "worst_client": min(clients, key=lambda client: client["value"], default=None),
        "final_digest": digest,
        "space_size": space.size,
        "payload_up_bytes": sent,
        "payload_down_bytes": sent,
    }
    return {
        "summary": summary,
        "scores": scores,
        "clients": clients,
        "config_hash": config_hash(config),
        "environment": environment(),
    }


def score_clients(process: Process, config: RunConfig) -> list[Record]:
    """The last round's model on each client's own held-out rows, as in a run."""
    found = []
    for client in range(config.fl.num_clients):
        if rows := process.client.data(client).heldout[: config.evaluation.federated_max_rows]:
            score = evaluate(process.peer.loaded, rows, config.task, tokens_per_batch=config.model.tokens_per_batch)
            found.append({"client": client, "round": config.fl.rounds, **encode(score)})
    return found


def check(config: RunConfig) -> None:
    """Refuse what this upper bound would silently leave out."""
    if not isinstance(config.trainer, MeerkatConfig | LoraTrainerConfig):
        raise ConfigError("first_order: trainer must be meerkat or lora. Other spaces are not written here.")
    if config.model.dtype is not DType.float32:
        raise ConfigError("first_order: model.dtype must be float32. Write model.dtype=float32.")
    if not isinstance(config.server_optimizer, SgdConfig) or config.server_optimizer.weight_decay != 0:
        raise ConfigError(
            "first_order: optimizer must be sgd without decay; --local-optimizer chooses the clients' own."
        )
    if not isinstance(config.step_policy, NoStepPolicyConfig):
        raise ConfigError("first_order: step_policy must be none. Its clients send no scalars to select by.")
    if config.strategy.aggregation is not Aggregation.mean:
        raise ConfigError("first_order: strategy.aggregation must be mean. Write strategy=mean.")
    if config.faults.absent:
        raise ConfigError("first_order: faults.absent must be empty. All its clients take part.")
    if min(config.data.num_dev, config.data.num_test) == 0:
        raise ConfigError("first_order: data.num_dev and data.num_test must be above 0. Both are scored.")
    if not config.evaluation.central:
        raise ConfigError("first_order: evaluation.central must be true. It scores at the server only.")


def open_space(config: RunConfig, folder: Path) -> tuple[Process, Space, Gradient]:
    """The process, the run's space at its base values, and the gradient of a batch's mean loss in wire order."""
    process = open_process(config)
    peer = process.peer
    workplace = Workplace(
        folder=folder, seed=config.seed, texts=process.server.training_prompts, advance=lambda done, total: None
    )
    artifact = peer.trainer.prepare(peer.loaded, workplace).artifact
    space = peer.workspace(artifact).replica.space
    model = peer.loaded.model
    if isinstance(config.trainer, MeerkatConfig):
        named = dict(model.named_parameters())
        slots = [
            (named[name], flat.to(peer.loaded.device)) for name, flat in decode_mask(artifact.read()).indices.items()
        ]
    else:
        adapter = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
        slots = [(parameter, torch.arange(parameter.numel(), device=peer.loaded.device)) for parameter in adapter]
    now = torch.cat([parameter.detach().reshape(-1)[flat] for parameter, flat in slots]).cpu().numpy()
    assert now.tobytes() == space.values().tobytes(), "the values are not in the space's order"
    for parameter, _ in slots:
        parameter.requires_grad_(True)

    def gradient(examples: Sequence[Example]) -> np.ndarray:
        loss = batch_loss(model, examples, loss=config.task.loss, device=peer.loaded.device)
        grads = torch.autograd.grad(loss, [parameter for parameter, _ in slots])
        flat = [grad.reshape(-1)[where] for grad, (_, where) in zip(grads, slots, strict=True)]
        return torch.cat(flat).cpu().numpy()

    return process, space, gradient


def batch_loss(model: nn.Module, examples: Sequence[Example], *, loss: Loss, device: torch.device) -> torch.Tensor:
    """fedzo's loss, written once more so that it can be differentiated: one padded batch, all logits."""
    cells = [
        (example.prompt, answer)
        for example in examples
        for answer in (example.candidates if loss is Loss.candidates else [example.candidates[example.label]])
    ]
    width = max(len(prompt) + len(answer) for prompt, answer in cells)
    ids = torch.zeros(len(cells), width, dtype=torch.int64)
    there = torch.zeros_like(ids)
    for row, (prompt, answer) in enumerate(cells):
        ids[row, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
        there[row, : len(prompt) + len(answer)] = 1
    logits = model(input_ids=ids.to(device), attention_mask=there.to(device), use_cache=False).logits.float()
    scores = []
    for row, (prompt, answer) in enumerate(cells):
        at = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
        scores.append(-F.cross_entropy(logits[row, at], torch.tensor(answer, device=device)))
    if loss is Loss.lm:
        return -torch.stack(scores).mean()
    losses, first = [], 0
    for example in examples:
        own = torch.stack(scores[first : first + len(example.candidates)])
        first += len(example.candidates)
        losses.append(F.cross_entropy(own[None], torch.tensor([example.label], device=device)))
    return torch.stack(losses).mean()


def is_due(done: int, config: RunConfig) -> bool:
    """Whether the dev rows are scored after so many rounds, as in a run."""
    every = config.evaluation.every_rounds
    return done == config.fl.rounds or (every > 0 and done % every == 0)


def is_better(score: Record, best: Record, by: BestBy) -> bool:
    """As a run chooses its best round; of equal ones the earlier stays."""

    def rank(each: Record) -> tuple[float, float]:
        value, loss = each["value"] or 0.0, float("inf") if each["loss"] is None else each["loss"]
        return (value, -loss) if by is BestBy.value else (-loss, value)

    return rank(score) > rank(best)


if __name__ == "__main__":
    main()
