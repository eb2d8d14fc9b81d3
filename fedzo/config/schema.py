"""The three configurations, assembled from their owners' dataclasses.

What all peers of a run agree on (``RunConfig``), what is one machine's own (``SiteConfig``; with limits, in a file of
its own, ``SiteFile``), and what a command line gives: both, and how the run is started and shown (``LaunchConfig``).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TypeVar

from fedzo.data.config import DataConfig, Loss, SplitConfig, TaskConfig
from fedzo.data.partition import PartitionConfig
from fedzo.data.partition.by_label import DirichletEqualConfig
from fedzo.data.preprocess import StageConfig
from fedzo.data.preprocess.backend import NoRewriterConfig, RewriterConfig
from fedzo.evaluate import AnswersConfig, EvaluatorConfig
from fedzo.fl.config import BestBy, EvaluationConfig, FaultsConfig, FlConfig, SiteLimitsConfig, StrategyConfig
from fedzo.fl.server.step_policy.baselines import NoStepPolicyConfig
from fedzo.fl.server.step_policy.plan import StepPolicyConfig
from fedzo.models.config import BaseConfig, ModelConfig
from fedzo.report import ReportConfig
from fedzo.report.trackers import TensorBoardConfig, TrackerConfig
from fedzo.runtime.config import InlineConfig, RuntimeConfig
from fedzo.trainers.artifacts import MAX_BYTES
from fedzo.trainers.base import InputsConfig, TrainerConfig
from fedzo.trainers.meerkat import MeerkatConfig
from fedzo.zo.estimator import EstimatorConfig, TwoPointConfig, ZerothOrderConfig
from fedzo.zo.server_optimizer import ServerOptimizerConfig, SgdConfig


@dataclass(kw_only=True)
class RunSettings:
    """All settings that define a run, without paths, devices or credentials of a machine."""

    seed: int = 0
    """The run seed (unsigned 64 bit): directions, data order and client sampling follow from it."""
    task: TaskConfig = field(default_factory=TaskConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    partition: PartitionConfig = field(default_factory=DirichletEqualConfig)
    trainer: TrainerConfig = field(default_factory=MeerkatConfig)
    preprocess: dict[str, StageConfig] = field(default_factory=dict)
    estimator: EstimatorConfig = field(default_factory=TwoPointConfig)
    server_optimizer: ServerOptimizerConfig = field(default_factory=SgdConfig)
    fl: FlConfig = field(default_factory=FlConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    step_policy: StepPolicyConfig = field(default_factory=NoStepPolicyConfig)
    evaluators: dict[str, EvaluatorConfig] = field(default_factory=lambda: {"answers": AnswersConfig()})
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)

    @property
    def first_evaluator(self) -> str | None:
        """The evaluator whose dev score chooses the best round; None where nothing is scored."""
        return next(iter(self.evaluators), None)


@dataclass(kw_only=True)
class RunConfig(RunSettings):
    """What all peers of a run agree on: the settings, the base model and the trainer's artifact by digest.

    It travels, and its hash is in every message.
    """

    base: BaseConfig
    artifact: str
    """SHA-256 of what the space needs beside the model; ``trainer`` is its recipe."""


@dataclass(kw_only=True)
class SiteConfig:
    """Settings of one machine: never sent, and in no hash."""

    device: str = "auto"
    """``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``."""
    threads: int = 0
    """CPU threads of torch and Numba. 0 = OMP_NUM_THREADS, or else the CPUs that the process may use. The number of
    threads changes the last bits of losses."""
    artifact_max_bytes: int = MAX_BYTES
    """Size of the largest artifact that a client of this machine takes from a server."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rewriter: RewriterConfig = field(default_factory=NoRewriterConfig)


@dataclass(kw_only=True)
class SiteFile(SiteConfig):
    """A site's own file: its machine, and what it refuses whoever asks. Only the site writes it."""

    limits: SiteLimitsConfig = field(default_factory=SiteLimitsConfig)


@dataclass(kw_only=True)
class LaunchConfig(RunSettings, SiteConfig):
    """One command line: a run's settings, this machine, and how the run is started and shown."""

    inputs: InputsConfig = field(default_factory=InputsConfig)
    runtime: RuntimeConfig = field(default_factory=InlineConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    trackers: dict[str, TrackerConfig] = field(default_factory=lambda: {"tensorboard": TensorBoardConfig()})

    def run(self, base: BaseConfig, artifact: str) -> RunConfig:
        """What the peers agree on, now that the base and the artifact are known."""
        settings = {each.name: getattr(self, each.name) for each in fields(RunSettings)}
        return RunConfig(**settings, base=base, artifact=artifact)

    def site(self) -> SiteFile:
        """This machine's part. A simulation has no limits against itself."""
        machine = {each.name: getattr(self, each.name) for each in fields(SiteConfig)}
        return SiteFile(**machine, limits=SiteLimitsConfig(several_clients=True, vectors=True))


def uncompiled(site: SiteFile) -> SiteFile:
    """The site with ``model.compile`` off, for work that does not repay a compiler's minutes."""
    return replace(site, model=replace(site.model, compile=False))


Settings = TypeVar("Settings", bound=RunSettings)


def with_rounds(config: Settings, rounds: int) -> Settings:
    """The config with another ``fl.rounds``."""
    return replace(config, fl=replace(config.fl, rounds=rounds))


def filled(config: Settings) -> Settings:
    """The config with what was left to other parts.

    These are ``server_optimizer.lr`` and ``estimator.eps``, keys of stages, and ``evaluation.best_by`` of
    ``task.loss=score``.
    """
    trainer, optimizer, estimator = config.trainer, config.server_optimizer, config.estimator
    if isinstance(estimator, ZerothOrderConfig):
        estimator = replace(estimator, eps=trainer.eps if estimator.eps is None else estimator.eps)
    optimizer = replace(optimizer, lr=optimizer.lr_in(config))
    evaluation = config.evaluation
    if config.task.loss is Loss.score:
        evaluation = replace(evaluation, best_by=BestBy.value)
    stages = {name: stage.filled(config.task) for name, stage in config.preprocess.items()}
    return replace(config, server_optimizer=optimizer, estimator=estimator, evaluation=evaluation, preprocess=stages)
