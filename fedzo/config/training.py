"""Rules on ``trainer``, ``estimator`` and ``server_optimizer``: what is trained, and by what steps."""

from __future__ import annotations

from collections.abc import Iterator

from fedzo.config.aggregation import drift_problems
from fedzo.config.plugins import plugin_name
from fedzo.config.problem import (
    Problem,
    at_least,
    not_negative,
    positive,
    positive_float32,
    problem,
    share_below_1,
)
from fedzo.config.schema import RunConfig
from fedzo.trainers.config import (
    Calibration,
    LoraTrainerConfig,
    MeerkatConfig,
    MezoConfig,
    PrefixTrainerConfig,
    PromptTrainerConfig,
)
from fedzo.zo.config import (
    AdamConfig,
    Baseline,
    FedDynConfig,
    FzooConfig,
    MomentumConfig,
    OneSidedConfig,
    ScaffoldConfig,
)

_SMALLEST_DECAY = 2.0**-24  # a smaller one leaves 1 - lr * decay at 1 in float32


def trainer_problems(config: RunConfig) -> Iterator[Problem]:
    """What the trained values and their step size must be."""
    trainer = config.trainer
    yield from not_negative("trainer.lr", trainer.lr, "0 trains nothing.")
    yield from positive("trainer.eps", trainer.eps, "1e-3 is usual.")
    match trainer:
        case MeerkatConfig():
            yield from _meerkat(trainer)
        case LoraTrainerConfig():
            yield from at_least("trainer.rank", trainer.rank, 1, "8 is usual.")
            yield from at_least("trainer.alpha", trainer.alpha, 1, "Twice the rank is usual.")
        case PrefixTrainerConfig() | PromptTrainerConfig():
            yield from at_least("trainer.num_virtual_tokens", trainer.num_virtual_tokens, 1, "5 is usual.")
            yield from not_negative("trainer.init_std", trainer.init_std, "0.02 is usual.")


def _meerkat(trainer: MeerkatConfig) -> Iterator[Problem]:
    if not 0 < trainer.density <= 1:
        yield problem("trainer.density", "be > 0 and <= 1", trainer.density, "0.001 trains one weight in a thousand.")
    yield from at_least("trainer.calibration_docs", trainer.calibration_docs, 1, "It counts documents.")
    yield from at_least("trainer.calibration_tokens", trainer.calibration_tokens, 1, "Number of tokens of a document.")
    if trainer.calibration is Calibration.file and trainer.calibration_path is None:
        remedy = "Write trainer.calibration_path=<text file>, or choose another trainer.calibration."
        yield problem("trainer.calibration_path", "be given for trainer.calibration=file", None, remedy)


def estimator_problems(config: RunConfig) -> Iterator[Problem]:
    """What an estimate of the slope needs."""
    estimator = config.estimator
    yield from positive_float32("estimator.eps", estimator.eps, "1e-3 is usual.")
    least, remedy = 1, "A step needs a direction."
    match estimator:
        case FzooConfig():
            least, remedy = 2, "One loss has no standard deviation."
        case OneSidedConfig(baseline=Baseline.mean | Baseline.leave_one_out):
            least, remedy = 2, "One loss has no other loss for comparison. Or write estimator.baseline=center."
    yield from at_least("estimator.num_probes", estimator.num_probes, least, remedy)


def server_optimizer_problems(config: RunConfig) -> Iterator[Problem]:
    """What a rule of the update can do, and for whom."""
    server_optimizer = config.server_optimizer
    if not 0 <= server_optimizer.lr < 2.0**128:  # it travels and is logged as a float32
        yield problem("server_optimizer.lr", "be >= 0 and finite in float32", server_optimizer.lr, "0 trains nothing.")
    if not 0 <= server_optimizer.final_lr_share <= 1:
        remedy = "The value is the share of server_optimizer.lr in the last round."
        yield problem("server_optimizer.final_lr_share", "be between 0 and 1", server_optimizer.final_lr_share, remedy)
    if not 0 <= server_optimizer.warmup_rounds < max(config.fl.rounds, 1):
        rule = f"be >= 0 and below fl.rounds ({config.fl.rounds})"
        yield problem(
            "server_optimizer.warmup_rounds", rule, server_optimizer.warmup_rounds, "Lower it, or train longer."
        )
    yield from not_negative("server_optimizer.weight_decay", server_optimizer.weight_decay, "0 switches it off.")
    shrink = server_optimizer.lr * server_optimizer.weight_decay
    if shrink > 0 and not _SMALLEST_DECAY <= shrink < 1:
        rule = "make server_optimizer.lr * weight_decay 0, or at least 6e-8 (float32's smallest change) and below 1"
        yield problem("server_optimizer.weight_decay", rule, server_optimizer.weight_decay, "Change it, or write 0.")
    match server_optimizer:
        case MomentumConfig():
            yield from share_below_1("server_optimizer.momentum", server_optimizer.momentum, "0.9 is usual.")
        case AdamConfig():
            yield from share_below_1("server_optimizer.beta1", server_optimizer.beta1, "0.9 is usual.")
            yield from share_below_1("server_optimizer.beta2", server_optimizer.beta2, "0.999 is usual.")
            yield from positive_float32("server_optimizer.eps", server_optimizer.eps, "1e-8 is usual.")
        case ScaffoldConfig() | FedDynConfig():
            yield from drift_problems(config, server_optimizer)
        case _:
            return
    if isinstance(config.trainer, MezoConfig):
        remedy = "Write server_optimizer=sgd, or train fewer values, as trainer=meerkat does."
        rule = "be sgd for trainer=mezo: the others keep float32 numbers for every weight of the model on every peer"
        yield problem("server_optimizer", rule, plugin_name("server_optimizer", server_optimizer), remedy)
