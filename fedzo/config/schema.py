"""The whole configuration of a run, assembled from its owners' dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from fedzo.data.config import DataConfig, TaskConfig
from fedzo.data.partition import PartitionConfig
from fedzo.data.partition.by_label import DirichletEqualConfig
from fedzo.data.preprocess.config import StageConfig
from fedzo.fl.config import EvaluationConfig, FaultsConfig, FlConfig, StrategyConfig
from fedzo.fl.server.step_policy.baselines import NoStepPolicyConfig
from fedzo.fl.server.step_policy.plan import StepPolicyConfig
from fedzo.models.config import ModelConfig
from fedzo.report.config import ReportConfig
from fedzo.runtime.config import InlineConfig, RuntimeConfig
from fedzo.trainers.base import TrainerConfig
from fedzo.trainers.meerkat import MeerkatConfig
from fedzo.zo.estimator import EstimatorConfig, TwoPointConfig, ZerothOrderConfig
from fedzo.zo.server_optimizer import ServerOptimizerConfig, SgdConfig


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """One run. The site-local keys (device, threads, paths, runtime, report) do not enter its hash."""

    seed: int = 0
    """The run seed (unsigned 64 bit): directions, data order and client sampling follow from it."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``."""
    threads: int = 0
    """CPU threads of torch and Numba. 0 = OMP_NUM_THREADS, or else all CPUs. The number of threads changes the last
    bits of losses."""
    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    data: DataConfig = field(default_factory=DataConfig)
    partition: PartitionConfig = field(default_factory=DirichletEqualConfig)
    trainer: TrainerConfig = field(default_factory=MeerkatConfig)
    preprocess: dict[str, StageConfig] = field(default_factory=dict)
    estimator: EstimatorConfig = field(default_factory=TwoPointConfig)
    server_optimizer: ServerOptimizerConfig = field(default_factory=SgdConfig)
    fl: FlConfig = field(default_factory=FlConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    step_policy: StepPolicyConfig = field(default_factory=NoStepPolicyConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    runtime: RuntimeConfig = field(default_factory=InlineConfig)
    report: ReportConfig = field(default_factory=ReportConfig)


def filled(config: RunConfig) -> RunConfig:
    """The config with the numbers that were left to the trainer: ``server_optimizer.lr`` and ``estimator.eps``."""
    trainer, optimizer, estimator = config.trainer, config.server_optimizer, config.estimator
    if isinstance(estimator, ZerothOrderConfig):
        estimator = replace(estimator, eps=trainer.eps if estimator.eps is None else estimator.eps)
    optimizer = replace(optimizer, lr=trainer.lr if optimizer.lr is None else optimizer.lr)
    return replace(config, server_optimizer=optimizer, estimator=estimator)
