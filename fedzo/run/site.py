"""What one process needs to take part in a run: model, rows, worker. Built from the configuration, once a process."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numba
import torch

from fedzo.config.schema import RunConfig
from fedzo.config.travel import config_hash, from_json
from fedzo.data.config import TaskKind
from fedzo.data.encode import encode, task_digest
from fedzo.data.example import Example
from fedzo.data.partition import holdout, partition
from fedzo.data.sources import Row, Splits, load_splits
from fedzo.data.tasks import render
from fedzo.fl.client.local_update import LocalSteps
from fedzo.fl.client.worker import ClientData, ClientWorker, Identity, parse_absent
from fedzo.fl.config import Aggregation
from fedzo.fl.replica import Replica
from fedzo.fl.server.step_policy import STEP_POLICIES, StepPolicy, most_steps
from fedzo.models.config import DType
from fedzo.models.fidelity import NUM_DIRECTIONS, choose_dtype, coarseness_warning, try_out
from fedzo.models.load import LoadedModel, load_model, resolve_device
from fedzo.models.plan import FEW_FORWARDS, forward_cost
from fedzo.models.products import choose_product
from fedzo.models.scoring import mean_loss
from fedzo.models.virtual_tokens import longest_sequence
from fedzo.run.estimate import fitting_tokens_per_batch, is_full
from fedzo.system import default_threads
from fedzo.trainers import TRAINERS, Built, Trainer
from fedzo.zo.directions import stream_key
from fedzo.zo.estimator import Estimator, LossFn
from fedzo.zo.frozen_routing import build_estimator
from fedzo.zo.server_optimizer import SERVER_OPTIMIZERS

log = logging.getLogger(__name__)


@dataclass
class Site:
    """One process's part of a run.

    Attributes:
        config: The run's configuration.
        loaded: The model on this site's device.
        built: The trainer's part on that model, once ``worker.build`` has made it.
        undecided: Whether the dtype is still to be chosen, when the trainer's part is built.
    """

    config: RunConfig
    loaded: LoadedModel
    built: Built | None = None
    undecided: bool = False

    @cached_property
    def splits(self) -> Splits:
        """Train, dev and test rows."""
        return load_splits(self.config.data, self.config.task)

    @cached_property
    def deal(self) -> list[list[int]]:
        """Row numbers of the training split for each client."""
        return partition(
            self.splits.train,
            self.config.partition,
            num_clients=self.config.fl.num_clients,
            seed=self.config.seed,
            task=self.config.task,
        )

    @cached_property
    def trainer(self) -> Trainer:
        """The run's trainer plugin."""
        return TRAINERS.build(self.config.trainer)

    @cached_property
    def estimator(self) -> Estimator:
        """The run's estimator plugin."""
        return build_estimator(self.config.estimator)

    @cached_property
    def step_policy(self) -> StepPolicy:
        """The run's step_policy plugin."""
        fl = self.config.fl
        return STEP_POLICIES.build(
            self.config.step_policy, num_clients=fl.num_clients, local_steps=fl.local_steps, run_seed=self.config.seed
        )

    @cached_property
    def worker(self) -> ClientWorker:
        """Answers for the clients that this process plays."""
        config, data_of = self.config, lru_cache(maxsize=None)(self.client_data)
        identity = Identity(
            config_hash=config_hash(config),
            base_digest=self.loaded.base_digest,
            tokenizer_digest=self.loaded.tokenizer_digest,
            task_digest=task_digest(config.task),
        )
        steps = LocalSteps(
            self.loaded,
            run_seed=config.seed,
            task=config.task,
            fl=config.fl,
            estimator=self.estimator,
            num_probes=config.estimator.num_probes,
            tokens_per_batch=config.model.tokens_per_batch,
            forward_cost_tokens=FEW_FORWARDS,
            train_rows=lambda client: data_of(client).train,
            signs=config.strategy.aggregation is Aggregation.majority_sign,
        )
        return ClientWorker(
            identity,
            steps,
            task=config.task,
            data_of=data_of,
            build=self._replica,
            absent=parse_absent(config.faults.absent),
        )

    def encode(self, rows: list[Row]) -> list[Example]:
        """Rows as token ids."""
        return encode(rows, self.config.task, tokenizer=self.loaded.tokenizer, max_length=self.config.model.max_length)

    def train_prompts(self) -> list[str]:
        """The prompts of all training rows, for a trainer that must look at text."""
        return [render(row, self.config.task).prompt for row in self.splits.train]

    def client_data(self, client: int) -> ClientData:
        """A client's rows, its held-out ones apart."""
        train, heldout = holdout(self.deal[client], self.config.partition.holdout, seed=self.config.seed, client=client)
        examples = self.encode([self.splits.train[row] for row in train])
        counts: dict[str, int] = {}
        if self.config.task.kind is TaskKind.candidates:
            for example in examples:
                counts[str(example.label)] = counts.get(str(example.label), 0) + 1
        return ClientData(
            train=examples,
            heldout=self.encode([self.splits.train[row] for row in heldout]),
            label_counts=dict(sorted(counts.items())),
        )

    def _replica(self, artifact: bytes) -> Replica:
        built = self._build(self.loaded, artifact)
        if self.undecided:
            built, self.undecided = self._choose_dtype(built, artifact), False
        self.built = built
        rule, num_clients = SERVER_OPTIMIZERS.build(self.config.server_optimizer), self.config.fl.num_clients
        self.worker.steps.tokens_per_batch = fitting_tokens_per_batch(
            self.loaded,
            built.space,
            wanted=self.config.model.tokens_per_batch,
            longest=longest_sequence(self.loaded.model, self.config.model.max_length),
            local_steps=most_steps(self.config.step_policy, self.config.fl),
            num_moments=rule.num_moments(num_clients),
        )
        full = is_full(self.loaded, built.space)
        self.worker.steps.forward_cost_tokens = forward_cost(self.loaded.device, perturbs_weights=full)
        if full and (warning := coarseness_warning(self.loaded.model, self.config.estimator.eps)):
            log.warning(warning)
        return Replica(built.space, rule=rule, reset=built.reset, run_seed=self.config.seed, num_clients=num_clients)

    def _build(self, loaded: LoadedModel, artifact: bytes) -> Built:
        return self.trainer.build(loaded, artifact, distribution=self.config.estimator.distribution)

    def _choose_dtype(self, wide: Built, artifact: bytes) -> Built:
        """Take a bfloat16 model in the place of the float32 one if it measures the same scalars in less time.

        The trained values start from float32's in both, so peers agree however each of them decides.
        """
        config = self.config
        loaded = load_model(replace(config.model, dtype=DType.bfloat16), device=config.device)
        narrow, base = self._build(loaded, artifact), wide.space.values()
        narrow.space.load(base)
        rows = self.encode(self.splits.train[: config.fl.batch_size])
        keys = [stream_key(config.seed, round=0, probe=probe) for probe in range(NUM_DIRECTIONS)]

        def loss_fn_of(loaded: LoadedModel) -> LossFn:
            return lambda: mean_loss(
                loaded, rows, loss=config.task.loss, tokens_per_batch=config.model.tokens_per_batch
            )

        choice = choose_dtype(
            wide=try_out(wide.space, self.estimator, loss_fn_of(self.loaded), keys),
            narrow=try_out(narrow.space, self.estimator, loss_fn_of(loaded), keys),
        )
        log.warning("%s", choice)  # no less, or the command line would not show it
        if choice.dtype is DType.float32:
            return wide
        self.loaded = self.worker.steps.loaded = loaded
        return replace(narrow, reset=lambda: narrow.space.load(base))


def open_site(config: RunConfig) -> Site:
    """Set this process up for the run and load the model."""
    set_up_process(config.threads, config.device)
    loaded = load_model(config.model, device=config.device)
    return Site(config, loaded, undecided=config.model.dtype is DType.auto)


def set_up_process(threads: int, device: str) -> None:
    """What the speed and the last bits of a forward depend on: threads (0: as many as fit), and who multiplies."""
    threads = threads or default_threads()
    torch.set_num_threads(threads)
    numba.set_num_threads(min(threads, int(getattr(numba.config, "NUMBA_NUM_THREADS", threads))))
    choose_product(resolve_device(device))


_process_site: list[tuple[str, Site]] = []


def process_site(config_json: str) -> Site:
    """The site of this process: one model however many clients it plays and however many messages come."""
    if not _process_site or _process_site[0][0] != config_json:
        _process_site.clear()  # let the old model go before a new one is loaded
        _process_site.append((config_json, open_site(from_json(config_json))))
    return _process_site[0][1]


def forget_site() -> None:
    """Let the process's model go, for example between the jobs of a sweep."""
    _process_site.clear()
