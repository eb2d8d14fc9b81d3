"""What server and client have alike: the model of a run on this machine, and the space that the run trains on it."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import torch

from fedzo.config.plugins import plugin_name
from fedzo.config.schema import RunConfig, RunSettings, SiteConfig, SiteFile, with_rounds
from fedzo.config.trait_rules import format_problems
from fedzo.config.travel import config_hash
from fedzo.data.config import Loss, TaskKind
from fedzo.data.encode import Example, encode, row_name
from fedzo.data.files import Row
from fedzo.data.tasks import render
from fedzo.errors import ConfigError, refuse
from fedzo.evaluate import EVALUATORS, Evaluator
from fedzo.fl.replica import Replica, Workspace
from fedzo.models.auto_dtype import NUM_DIRECTIONS, Trial, choose_dtype, coarseness_warning, try_out
from fedzo.models.available import available_memory_bytes
from fedzo.models.captured import NUM_EAGER, can_capture, capture
from fedzo.models.checks import check_ids
from fedzo.models.config import DType, ModelConfig
from fedzo.models.forwards import Planning, lower_layers_of
from fedzo.models.kept_rows import RowStates
from fedzo.models.load import load_model, resolve_device
from fedzo.models.loaded import LoadedModel
from fedzo.models.lower_layers import LowerLayers
from fedzo.models.memory import most_tokens, state_bytes, weights_bytes
from fedzo.models.plan import forward_cost
from fedzo.models.products import RoundedProducts, choose_product, rounded_products, use_products
from fedzo.models.scoring import example_losses
from fedzo.models.virtual_tokens import check_answer_length, longest_sequence
from fedzo.registry import returned
from fedzo.run.costs import fitting_tokens_per_batch, head_share
from fedzo.sketch import tables_of
from fedzo.system import use_threads
from fedzo.trainers import TRAINERS, Built, Trainer
from fedzo.trainers.artifacts import Artifact
from fedzo.zo.config import Distribution
from fedzo.zo.directions import stream_key
from fedzo.zo.estimator import EstimatorConfig, ZerothOrderConfig, build_estimator
from fedzo.zo.server_optimizer import build_server_optimizer
from fedzo.zo.spaces.base import DifferentiableSpace, Space

log = logging.getLogger(__name__)
T = TypeVar("T")
TrialRows = Callable[[], list[Row]]
"""Some training rows of this machine, on which ``model.dtype=auto`` measures."""
_MEMORY_SHARE = 0.9  # of what is free, for a second model: allocators keep some


@dataclass
class Peer:
    """The model of one process, and the space on it. One a process, also where it plays server and clients.

    Attributes:
        config: What all peers agree on.
        site: This machine's own configuration.
        loaded: The model on this machine's device.
        built: The trainer's part on that model, once ``workspace`` has made it: the dtype is chosen by then.
        products: How steps multiply, where ``model.dtype=auto`` chose rounded products.
    """

    config: RunConfig
    site: SiteFile
    loaded: LoadedModel
    built: Built | None = None
    products: RoundedProducts | None = None
    _workspace: Workspace | None = None

    @cached_property
    def trainer(self) -> Trainer:
        """The run's trainer plugin."""
        return TRAINERS.build(self.config.trainer)

    @property
    def forwards_per_step(self) -> int:
        """What a local step costs, in forwards; the two products of a layer's backward pass count as two.

        With ``task.loss=score`` in scores of its rows.
        """
        estimator = self.config.estimator
        if not isinstance(estimator, ZerothOrderConfig):
            return 3
        return build_estimator(estimator).forwards_per_step(estimator.num_probes)

    @cached_property
    def evaluators(self) -> dict[str, Evaluator]:
        """The run's evaluator plugins by name, in their order."""
        return {name: EVALUATORS.build(evaluator) for name, evaluator in self.config.evaluators.items()}

    @cached_property
    def run_id(self) -> str:
        """Names the run at each of its machines: the begin of a hash that holds however long the run becomes."""
        return config_hash(with_rounds(self.config, 1))[:16]

    def encode(self, rows: list[Row]) -> list[Example]:
        """Rows as token ids."""
        examples = self._tokenized(rows)
        for number, (row, example) in enumerate(zip(rows, examples, strict=True)):
            where = row_name(number, render(row, self.config.task).prompt)
            for ids in (example.prompt, example.generation_prompt, *example.candidates):
                check_ids(self.loaded.model, ids, where=where)
        return examples

    def _tokenized(self, rows: list[Row]) -> list[Example]:
        task = self.config.task
        return encode(rows, task, tokenizer=self.loaded.tokenizer, max_length=task.max_length)

    def workspace(self, artifact: Artifact, *, trial_rows: TrialRows | None = None) -> Workspace:
        """The model with the space that the run's artifact describes; made once, for server and clients alike.

        A run has one artifact, which whoever calls has compared with ``config.artifact``.

        Args:
            artifact: What the trainer prepared at the server.
            trial_rows: What ``model.dtype=auto`` is decided on, and whose answers tell what the LM head takes; without
                any the model stays in float32.
        """
        if self._workspace is None:
            self._workspace = self._make_workspace(artifact, trial_rows)
        return self._workspace

    def reset(self) -> None:
        """Give the model its base weights back, and take what the trainer added to it out of it."""
        if self._workspace is not None:
            self._workspace.replica.reset()
        if "peft" in sys.modules:  # else nobody has made an adapter
            from fedzo.models.adapters import remove  # slow to import

            remove(self.loaded.model)
        self.loaded.model.requires_grad_(False)

    def _make_workspace(self, artifact: Artifact, trial_rows: TrialRows | None) -> Workspace:
        config, num_clients = self.config, self.config.fl.num_clients
        trial = None if trial_rows is None else trial_rows()
        if self.built is None:  # else memory was too small for the rest before: what was chosen and built then holds
            self.built = self._build_as_chosen(artifact, trial)
        built = self.built
        self._warn_if_coarse(built)
        site = self.site.model
        if config.task.loss is Loss.score:  # its steps keep nothing of the lower blocks
            site = replace(site, reuse_lower_layers=False)
        loaded, lower = faster_forwards(
            self.loaded, built.space, site, config.estimator, longest=config.task.max_length
        )
        if lower is not None and lower.rows is not None:  # scores keep their own: they have no rounded products
            rows = RowStates(lower.rows.max_bytes, lower.rows.num_nones, lower.rows.reads_alone)
            loaded = replace(loaded, kept=replace(lower, rows=rows))
        longest = longest_sequence(self.loaded.model, config.task.max_length)
        if config.task.kind is not TaskKind.candidates:
            check_answer_length(self.loaded.model, config.task.max_length, config.task.max_new_tokens)
        tokens, token_bytes = config.fl.batch_size * longest, state_bytes(self.loaded.model)
        optimizer = build_server_optimizer(config.server_optimizer, local_steps=config.fl.local_steps)
        return Workspace(
            loaded=loaded,
            replica=Replica(
                built.space,
                server_optimizer=optimizer,
                reset=built.reset,
                run_seed=config.seed,
                num_clients=num_clients,
            ),
            tokens_per_batch=fitting_tokens_per_batch(
                loaded,
                built.space,
                wanted=most_tokens(self.site.model.tokens_per_batch, loaded.device, longest=longest),
                longest=longest,
                local_steps=config.step_policy.max_steps(config.fl),
                num_moments=optimizer.num_moments(num_clients),
                kept_bytes=lower.kept_bytes(tokens, token_bytes=token_bytes) if lower else 0,
                head_share=0.0 if trial is None else head_share(self._tokenized(trial)),
            ),
            forward_cost_tokens=forward_cost(self.loaded.device, perturbs_weights=built.space.perturbs_weights),
            lower=lower,
            products=self.products,
        )

    def _build_as_chosen(self, artifact: Artifact, trial: list[Row] | None) -> Built:
        """The trainer's part on the model, in the dtype that is chosen where ``model.dtype=auto`` leaves it open."""
        config, estimator = self.config, self.config.estimator
        built = self._build(self.loaded, artifact)
        if isinstance(estimator, ZerothOrderConfig):
            if self.site.model.dtype is DType.auto and trial is not None:
                built = self._choose_dtype(built, artifact, trial, estimator)
                gc.collect()  # what was not chosen may be in reference cycles, and memory is measured next
        elif not isinstance(built.space, DifferentiableSpace):
            trainer, name = plugin_name("trainer", config.trainer), plugin_name("estimator", estimator)
            raise ConfigError(
                f"trainer={trainer}: its space must have a method gradient for estimator={name}, but has none. "
                "Choose another trainer, or an estimator that needs forwards only."
            )
        return built

    def _warn_if_coarse(self, built: Built) -> None:
        estimator = self.config.estimator
        if not isinstance(estimator, ZerothOrderConfig):
            return
        if warning := coarseness_warning(self.loaded.model, built.space, estimator.float32_eps):
            log.warning(warning)

    def _build(self, loaded: LoadedModel, artifact: Artifact) -> Built:
        estimator = self.config.estimator  # without directions their law says nothing
        law = estimator.distribution if isinstance(estimator, ZerothOrderConfig) else Distribution.gaussian
        built = self.trainer.build(loaded, artifact, distribution=law)
        return returned(built, Built, by=self.trainer, method="build")

    def _choose_dtype(self, wide: Built, artifact: Artifact, rows: list[Row], settings: ZerothOrderConfig) -> Built:
        """Take bfloat16, or rounded products, in the place of float32 if they measure its scalars in less time.

        The trained values start from float32's in all of them, so peers agree however each of them decides. What cannot
        be tried, for want of memory or of a kernel, is not chosen.
        """
        second = _tried(DType.bfloat16, lambda: self._in_bfloat16(artifact, wide.space))
        rounded = rounded_products(self.loaded.device)
        if second is None and rounded is None:
            return wide
        task, estimator, examples = self.config.task, build_estimator(settings), self.encode(rows)
        probes = settings.num_probes
        keys = [stream_key(self.config.seed, round=0, probe=probe) for probe in range(max(NUM_DIRECTIONS, probes))]
        longest, site = task.max_length, replace(self.site.model, reuse_lower_layers=False)
        planning = Planning(most_tokens(site.tokens_per_batch, self.loaded.device, longest=longest))

        def trial(name: str, loaded: LoadedModel, built: Built) -> Trial | None:
            def timed() -> Trial:
                # as graphs, where the run has them: an eager forward may take the start of its kernels, in any dtype
                ours, _ = faster_forwards(loaded, built.space, site, settings, longest=task.max_length)

                def loss_fn() -> float:
                    losses = example_losses(ours, examples, planning, loss=task.loss, common_shift=task.common_shift)
                    return float(losses.mean())

                warm_ups = 1 if ours is loaded else NUM_EAGER
                return try_out(built.space, estimator, loss_fn, keys, warm_ups, probes)

            return _tried(name, timed)

        if (float32 := trial(DType.float32, self.loaded, wide)) is None:
            return wide
        others: dict[str, Trial] = {}
        if second is not None and (found := trial(DType.bfloat16, *second)):
            others[DType.bfloat16] = found
        if rounded:
            with use_products(rounded):
                found = trial(rounded.name, self.loaded, wide)
            if found:
                others[rounded.name] = found
        if not others:
            return wide
        choice = choose_dtype(float32, others)
        log.warning("%s", choice)  # no less, or the command line would not show it
        if second is not None and choice.name == DType.bfloat16:
            self.loaded, built = second
            return built
        if rounded and choice.name == rounded.name:
            self.products = rounded
        return wide

    def _in_bfloat16(self, artifact: Artifact, space: Space) -> tuple[LoadedModel, Built] | None:
        """A second model, in bfloat16, that starts from the trained values of ``space``; None where it has no room."""
        model, free = self.loaded.model, available_memory_bytes(self.loaded.device)
        tables = {id(each) for each in tables_of(model).values()}  # which stay float32, as codes stay codes
        halved = (each for each in model.parameters() if each.dtype is torch.float32 and id(each) not in tables)
        needed = weights_bytes(model) - sum(each.nbytes // 2 for each in halved)
        if needed > _MEMORY_SHARE * free:
            log.warning(
                "model.dtype=auto: bfloat16 is not tried, since its %.0f MiB of weights must fit in memory beside "
                "float32's, and %.0f MiB are free. Write model.dtype=bfloat16 to hold it alone, or float32.",
                needed / 2**20,
                free / 2**20,
            )
            return None
        narrower = replace(self.site.model, dtype=DType.bfloat16)
        loaded = load_model(narrower, device=self.site.device, max_length=self.config.task.max_length)
        narrow = self._build(loaded, artifact)
        narrow.space.load(space.values())
        return loaded, Built.of(narrow.space, narrow.save)


def _tried(name: str, work: Callable[[], T]) -> T | None:
    """What ``work`` gives; None, and a warning, where it fails."""
    try:
        return work()
    except (ConfigError, RuntimeError, MemoryError) as error:
        log.warning("model.dtype=auto: %s cannot be tried: %s", name, " ".join(str(error).split())[:400])
        return None


def faster_forwards(
    loaded: LoadedModel, space: Space, site: ModelConfig, estimator: EstimatorConfig, *, longest: int
) -> tuple[LoadedModel, LowerLayers | None]:
    """The model and the blocks that a step runs once, if there are any; as CUDA graphs, where these can be made.

    Args:
        loaded: The model, with all that is trained in it.
        space: What is trained in it.
        site: Whether such blocks, and graphs, are wanted.
        estimator: One that sends vectors, or freezes routing, has neither.
        longest: Tokens of the longest text.
    """
    if estimator.sends_vectors or estimator.freezes_routing:
        return loaded, None
    lower = lower_layers_of(loaded, space, cache_mb=site.lower_layers_cache_mb) if site.reuse_lower_layers else None
    if site.cuda_graphs and can_capture(loaded.device) and loaded.decoder is None:
        return capture(loaded, lower, longest=longest)
    return loaded, lower


def check_format(config: RunSettings, loaded: LoadedModel) -> None:
    """Refuse a model in whose format the run's trainer has nothing to train, or would train something else.

    Raises:
        ConfigError: A sketch or packed weights where dense ones are trained, or dense ones where tables are.
    """
    packed_as, name = loaded.packed_as, loaded.source
    refuse(format_problems(config, is_sketch=loaded.is_sketch, packed_as=packed_as, name=name))


def open_model(site: SiteConfig, max_length: int) -> LoadedModel:
    """Set this process up as its site says and load the site's model, for texts of at most ``max_length`` tokens."""
    set_up_process(site.threads, site.device)
    return load_model(site.model, device=site.device, max_length=max_length)


def set_up_process(threads: int, device: str) -> None:
    """What the speed and the last bits of a forward depend on: threads (0: as many as fit), and whose kernels run."""
    use_threads(threads)
    choose_product(resolve_device(device))
