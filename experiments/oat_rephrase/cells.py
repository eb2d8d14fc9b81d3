"""The study's measurements, each a cell of one file: what is there is not measured again."""

from __future__ import annotations

import fcntl
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arms import TrainSet
from safetensors.torch import load_file, save_file

from fedzo.bench.claims import kept_results
from fedzo.commands.mask import make_mask
from fedzo.commands.train import launch
from fedzo.config.load import load
from fedzo.config.schema import LaunchConfig
from fedzo.data.config import Loss
from fedzo.data.encode import Example, encode
from fedzo.data.files import Row, read_rows
from fedzo.fl.log_store import RunStore
from fedzo.models.arithmetic import DIFFERENTIABLE
from fedzo.models.config import ModelConfig
from fedzo.models.forwards import Planning
from fedzo.models.load import load_model
from fedzo.models.loaded import LoadedModel
from fedzo.models.scoring import candidate_scores, choice_losses, example_losses, mean_loss
from fedzo.records.folder import replace_file
from fedzo.run.process import forget_process
from fedzo.run.start import open_run
from fedzo.system import environment, use_threads

STEPS = {"copa": 170, "cb": 110}
SEEDS = {"copa": range(6), "cb": range(4)}
METHODS = {"mezo": (4e-6, 1.6e-5, 6.4e-5), "meerkat": (1e-4, 4e-4, 1.6e-3)}
TUNING_SEED = 100
BATCH_ROWS = 10  # of a gradient
TOKENS = 4096
Cell = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Cells:
    """The file of results, which two processes may share, and what computes those that are measured now."""

    path: Path
    device: str = "cpu"

    @property
    def settings(self) -> dict[str, Any]:
        """What all cells have in common, whatever their names say."""
        return {"device": self.device, "steps": STEPS, "words": _SETTINGS}

    def all(self) -> dict[str, Cell]:
        """Every cell by its name."""
        return kept_results(self.path, {})

    def measure(self, name: str, make: Callable[[], Cell]) -> Cell:
        """A cell that is there, or made now and kept, with the CPU seconds that it took."""
        if name in (known := self.all()):
            return known[name]
        started = time.process_time()
        cell = make() | {"cpu_s": round(time.process_time() - started, 1)}
        cell["environment"] = {**environment(), "settings": self.settings}
        lock = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in (self.all() | {name: cell}).items()]
            replace_file(self.path, "{\n" + ",\n".join(lines) + "\n}\n")
        finally:
            os.close(lock)
        print(f"{name}: {cell['cpu_s']} s", flush=True)
        return cell


@dataclass(frozen=True, slots=True)
class Place:
    """Where rows are, where what need not be kept is made, and what computes: ``cpu``, by one thread, or ``cuda``."""

    data: Path
    rewrites: Path
    work: Path
    device: str = "cpu"

    def base_model(self) -> LoadedModel:
        """The embedded model."""
        use_threads(1)
        return load_model(ModelConfig(), device=self.device)

    def rows(self, task: str, split: str) -> list[Row]:
        """Original rows of ``dev`` or ``test``."""
        return read_rows((self.rewrites if split == "dev" else self.data) / task / f"{split}.jsonl")

    def mask(self) -> Path:
        """Meerkat's mask on C4."""
        file = self.work / "mask.safetensors"
        if not file.exists():
            text = f"inputs.calibration={self.data / 'c4' / 'train.jsonl'}"
            words = ["trainer=meerkat", "trainer.calibration=file", text, "threads=1", f"device={self.device}"]
            make_mask(load(words), file)
        return file


# --- gradients --------------------------------------------------------------------------------------------------------


def gradients(cells: Cells, place: Place, task: str, sets: Sequence[TrainSet]) -> None:
    """Every set's batches: the product with the gradient of dev and test rows, and the squared norm."""
    names = {(each.name, at): gradient_name(task, each, at) for each in sets for at in range(num_batches(each))}
    if not names.values() - cells.all().keys():
        return
    loaded = place.base_model()
    direction, squared = _direction(cells, place, task, loaded)
    cells.measure(f"gradient/{task}/dev", lambda: {"squared": squared})
    for at in range(num_batches(sets[0])):
        known: dict[str, Cell] = {}
        for each in sets:
            rows = each.rows[BATCH_ROWS * at : BATCH_ROWS * (at + 1)]
            text = json.dumps(rows)  # rows that are no other text have no other gradient

            def make(rows: list[Row] = rows, text: str = text, known: dict[str, Cell] = known) -> Cell:
                if text not in known:
                    _gradient(loaded, examples_of(loaded, task, rows))
                    grads = [parameter.grad for parameter in loaded.model.parameters()]
                    products = [_dot(grad, other) for grad, other in zip(grads, direction, strict=True)]
                    known[text] = {"along": sum(products), "squared": sum(_dot(grad, grad) for grad in grads)}
                return known[text]

            known[text] = cells.measure(names[each.name, at], make)


def gradient_name(task: str, each: TrainSet, batch: int) -> str:
    """Of a batch's cell."""
    return f"gradient/{task}/{each.name}-{each.digest}/{batch}"


def num_batches(each: TrainSet) -> int:
    """Batches of a set's gradients."""
    return len(each.rows) // BATCH_ROWS


def check_gradient(loaded: LoadedModel, examples: Sequence[Example]) -> float:
    """The slope of the loss along its gradient by central differences, over the gradient's norm: 1 if it is right."""
    _gradient(loaded, examples)
    grads = [parameter.grad for parameter in loaded.model.parameters()]
    norm = math.sqrt(sum(_dot(grad, grad) for grad in grads))
    size, losses = 1e-2 / norm, []
    with torch.no_grad():
        for move in (size, -2 * size, size):
            for parameter in loaded.model.parameters():
                parameter.add_(_there(parameter.grad), alpha=move / norm)
            losses.append(mean_loss(loaded, examples, loss=Loss.candidates, tokens_per_batch=TOKENS))
    return (losses[0] - losses[1]) / (2 * size * norm)


def _direction(cells: Cells, place: Place, task: str, loaded: LoadedModel) -> tuple[list[torch.Tensor], float]:
    """The gradient on dev and test rows; kept in a file, since it takes minutes."""
    file = place.work / f"gradient-{task}.safetensors"
    if not file.exists():
        examples = examples_of(loaded, task, [*place.rows(task, "dev"), *place.rows(task, "test")])
        slope = check_gradient(loaded, examples[:4])
        if abs(slope - 1) > 0.02:
            raise SystemExit(f"the gradient must be that of finite differences, got {slope:.3f} of it")
        cells.measure("gradient/slope by finite differences over norm", lambda: {"value": slope})
        loaded = place.base_model()  # to the bit: the check has moved the weights and back
        _gradient(loaded, examples, parts=BATCH_ROWS)
        save_file({name: _there(parameter.grad) for name, parameter in loaded.model.named_parameters()}, file)
    kept = load_file(file)
    direction = [kept[name].to(place.device) for name, _ in loaded.model.named_parameters()]
    return direction, sum(_dot(each, each) for each in direction)


def _gradient(loaded: LoadedModel, examples: Sequence[Example], *, parts: int | None = None) -> None:
    """Leave the mean loss's gradient at the parameters."""
    step, planning = parts or len(examples), Planning(TOKENS, arithmetic=DIFFERENTIABLE)
    for parameter in loaded.model.parameters():
        parameter.requires_grad_(True)
        parameter.grad = None
    for start in range(0, len(examples), step):
        part = examples[start : start + step]
        loss = example_losses(loaded, part, planning, loss=Loss.candidates).mean()
        (loss * (len(part) / len(examples))).backward()  # type: ignore[no-untyped-call]


def _dot(left: torch.Tensor | None, right: torch.Tensor | None) -> float:
    return float(torch.dot(_there(left).flatten(), _there(right).flatten()))


def _there(grad: torch.Tensor | None) -> torch.Tensor:
    if grad is None:
        raise SystemExit("every parameter must have a gradient")
    return grad


# --- training ---------------------------------------------------------------------------------------------------------


def base_losses(cells: Cells, place: Place, task: str) -> None:
    """The untrained model's losses."""
    cells.measure(f"untrained/{task}", lambda: _losses(place.base_model(), place, task, ["dev", "test"]))


def train(
    cells: Cells, place: Place, task: str, method: str, sets: Sequence[TrainSet], *, seeds: Sequence[int]
) -> None:
    """Choose an arm's learning rate on its first set, then train on every seed, each with its own draw."""

    def make(each: TrainSet, seed: int, lr: float, splits: Sequence[str]) -> Callable[[], Cell]:
        return lambda: _train(place, task, method, each, seed=seed, lr=lr, splits=splits) | {"lr": lr}

    for lr in METHODS[method]:
        cells.measure(tuning_name(task, method, sets[0], lr), make(sets[0], TUNING_SEED, lr, ["dev"]))
    chosen = tuned(cells.all(), task, method, sets[0])
    for seed in seeds:
        each = sets[seed % len(sets)]
        cells.measure(run_name(task, method, each, chosen, seed), make(each, seed, chosen, ["dev", "test"]))


def tuning_name(task: str, method: str, each: TrainSet, lr: float) -> str:
    """Of a tuning run's cell."""
    return f"tune/{task}/{method}/{each.name}-{each.digest}/{lr:g}"


def run_name(task: str, method: str, each: TrainSet, lr: float, seed: int) -> str:
    """Of a run's cell."""
    return f"train/{task}/{method}/{each.name}-{each.digest}/{lr:g}/{seed}"


def tuned(known: Mapping[str, Cell], task: str, method: str, each: TrainSet) -> float:
    """The rate of the least mean dev loss."""
    losses = {lr: float(np.mean(known[tuning_name(task, method, each, lr)]["dev"])) for lr in METHODS[method]}
    return min(losses, key=losses.__getitem__)


def _train(
    place: Place, task: str, method: str, each: TrainSet, *, seed: int, lr: float, splits: Sequence[str]
) -> Cell:
    here = [f"device={place.device}", *([f"inputs.artifact={place.mask()}"] if method == "meerkat" else [])]
    with tempfile.TemporaryDirectory() as kept:
        folder = Path(kept)
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each.rows))
        words = [f"task={task}", f"trainer={method}", f"trainer.lr={lr:g}", f"seed={seed}", *here]
        loaded = run_here(load([*words, *_SETTINGS, f"data.path={folder}", *_rounds(task)]), folder / "run")
        return _losses(loaded, place, task, splits)


def run_here(config: LaunchConfig, run_dir: Path) -> LoadedModel:
    """A run in this process; its model as the last round left it, since there is no dev row to choose another by."""
    with RunStore(run_dir) as store:
        process = open_run(config, run_dir, store)
        launch(config, process, run_dir)
        forget_process()
    return process.peer.loaded


_SETTINGS = [
    "model=smollm2",
    "data=files",
    "threads=1",
    "split.num_dev=0",
    "split.num_test=0",
    "partition=iid",
    "partition.holdout=0",
    "fl.num_clients=1",
    "fl.batch_size=4",
    "evaluation.federated_every_rounds=-1",
    "report=none",
    "trackers=[]",
]


def _rounds(task: str) -> list[str]:
    return [f"fl.rounds={STEPS[task]}", f"fl.hash_every={STEPS[task]}"]


def examples_of(loaded: LoadedModel, task: str, rows: Sequence[Row]) -> list[Example]:
    """The rows in the task's own template."""
    config = load([f"task={task}", "data=files", "data.path=."]).task
    return encode(rows, config, tokenizer=loaded.tokenizer, max_length=config.max_length)


def _losses(loaded: LoadedModel, place: Place, task: str, splits: Sequence[str]) -> Cell:
    """Loss over candidates of every row to five digits, and how many test rows are right."""
    cell: Cell = {}
    for split in splits:
        examples = examples_of(loaded, task, place.rows(task, split))
        labels = [example.label for example in examples]
        scores = candidate_scores(loaded, examples, tokens_per_batch=TOKENS)
        cell[split] = [round(float(loss), 5) for loss in choice_losses(scores, labels)]
        if split == "test":
            cell["right"] = int((scores.argmax(1) == labels).sum())
    return cell
