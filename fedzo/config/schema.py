"""The whole configuration of a run, assembled from its owners' dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedzo.data.config import DataConfig, IidConfig, PartitionConfig, TaskConfig
from fedzo.data.preprocess.config import StageConfig
from fedzo.fl.config import EvaluationConfig, FaultsConfig, FlConfig, StrategyConfig
from fedzo.fl.server.step_policy.config import NoStepPolicyConfig, StepPolicyConfig
from fedzo.models.config import ModelConfig
from fedzo.report.config import ReportConfig
from fedzo.runtime.config import InlineConfig, RuntimeConfig
from fedzo.trainers.config import MeerkatConfig, TrainerConfig
from fedzo.zo.config import EstimatorConfig, ServerOptimizerConfig, SgdConfig, TwoPointConfig


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
    partition: PartitionConfig = field(default_factory=IidConfig)
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
