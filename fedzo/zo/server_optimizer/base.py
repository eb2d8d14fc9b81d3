"""Server optimizers: how a round of the log moves the trained values, at the server and at clients that replay it.

Legend: theta float32 [n]; u = sum of c z over the round's (step, probe, owner), float32 [n]; lr of the record; lambda
the weight decay. Before the step of any optimizer, theta <- theta * float32(1 - lr lambda), once a round.

An optimizer is a pure function of (theta, state, record). Its arithmetic is the correctly rounded IEEE float32 sum,
product, quotient and square root, one operation after another in numpy on the CPU, whatever holds theta: the same bits
on every machine. Numbers that all coordinates share (1 - beta^t) are evaluated in float64 products and rounded to
float32 once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
import torch

from fedzo.errors import ConfigError, Problem, not_negative, problem
from fedzo.registry import PluginConfig, Registry
from fedzo.zo.directions import add_direction
from fedzo.zo.log import LogRecord, ScalarRecord, VectorRecord
from fedzo.zo.spaces.base import Space, Values
from fedzo.zo.steps import Drift, scalars_and_keys

if TYPE_CHECKING:
    from fedzo.config.schema import RunSettings

_SMALLEST_DECAY = 2.0**-20  # float32(1 - lr * decay) is a multiple of 2^-24: from here on the decay is 3 % off at most


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptimizerTraits:
    """What the rules on other parts of a run must know of a server optimizer.

    Attributes:
        keeps_moments: Whether it keeps float32 vectors of the trained values' size between rounds (``num_moments``).
        walks_clients: Whether it walks every client's local steps, and so needs each client's own scalars along shared
            directions (``ControlVariates``).
        takes_vectors: Whether it can also move theta by the vectors of clients that compute gradients
            (``VectorOptimizer``).
    """

    keeps_moments: bool = False
    walks_clients: bool = False
    takes_vectors: bool = False


class Schedule(StrEnum):
    """Course of the learning rate after its warm-up."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"


@dataclass(kw_only=True, slots=True)
class ServerOptimizerConfig(PluginConfig):
    """How aggregated projected gradients move the trained values."""

    lr: float | None = None
    """Learning rate; null = ``trainer.lr``."""
    schedule: Schedule = Schedule.constant
    final_lr_share: float = 0.1
    """Share of ``lr`` in the last round, where the schedule is linear or cosine. With 0, the last round does not
    move the model."""
    warmup_rounds: int = 0
    """Rounds of linear warm-up of the learning rate."""
    weight_decay: float = 0.0
    """Decoupled: the trained values are multiplied by 1 - lr * weight_decay once a round."""

    @property
    def traits(self) -> ServerOptimizerTraits:
        """What other parts of a run must know of this server optimizer."""
        return ServerOptimizerTraits()

    @property
    def base_lr(self) -> float:
        """``lr`` of a loaded configuration: the learning rate before its schedule."""
        if self.lr is None:
            raise ConfigError("server_optimizer.lr must be a number once the configuration is loaded, got None.")
        return self.lr

    @property
    def decay_share(self) -> float:
        """Share of ``lr`` at which decay must still count: the last round's, or 1 where that is 0 and ends it, too."""
        ends_low = self.schedule is not Schedule.constant and self.final_lr_share > 0
        return self.final_lr_share if ends_low else 1.0

    def lr_in(self, run: RunSettings) -> float:
        """The learning rate before its schedule, also where it is left to the trainer."""
        return run.trainer.lr if self.lr is None else self.lr

    def problems(self, run: RunSettings) -> Iterator[Problem]:
        lr = self.lr_in(run)
        trainer_tells = self.lr is None and any(not_negative("trainer.lr", lr, ""))
        if not 0 <= lr < 2.0**128 and not trainer_tells:  # it travels and is logged as a float32
            yield problem("server_optimizer.lr", "be >= 0 and finite in float32", lr, "0 trains nothing.")
        if not 0 <= self.final_lr_share <= 1:
            remedy = "The value is the share of server_optimizer.lr in the last round."
            yield problem("server_optimizer.final_lr_share", "be between 0 and 1", self.final_lr_share, remedy)
        if not 0 <= self.warmup_rounds < max(run.fl.rounds, 1):
            rule = f"be >= 0 and below fl.rounds ({run.fl.rounds})"
            yield problem("server_optimizer.warmup_rounds", rule, self.warmup_rounds, "Lower it, or train longer.")
        yield from not_negative("server_optimizer.weight_decay", self.weight_decay, "0 switches it off.")
        yield from self.decay_problems("server_optimizer.weight_decay", self.weight_decay, run)

    def decay_problems(self, key: str, weight_decay: float, run: RunSettings) -> Iterator[Problem]:
        """Of a decay by 1 - lr * weight_decay that goes with this learning rate and schedule."""
        lr, share = self.lr_in(run), self.decay_share
        shrink = lr * weight_decay
        if shrink >= 1:
            yield problem(key, "make server_optimizer.lr * weight_decay less than 1", weight_decay, "Lower it.")
        elif shrink > 0 and share * shrink < _SMALLEST_DECAY:
            rule = (
                f"make lr * weight_decay 0, or at least 1e-6 up to the last round, whose lr is {share * lr:g}: float32 "
                "holds 1 - lr * weight_decay in steps of 6e-8"
            )
            yield problem(key, rule, weight_decay, f"Write 0, or at least {1e-6 / lr / share:.3g}.")


def learning_rate(config: ServerOptimizerConfig, *, round: int, rounds: int) -> float:
    """The learning rate of a round, evaluated in float64 and rounded to float32 once.

    Round ``warmup_rounds`` is the first with the full lr; the last round has ``final_lr_share`` of it where the
    schedule is not constant. Only the server evaluates this: the request and the log's record carry the result.

    Args:
        config: Settings of the server optimizer.
        round: From 0.
        rounds: Rounds of the run.

    Returns:
        A float32 value.

    Example:
        >>> from fedzo.zo.server_optimizer import ServerOptimizerConfig
        >>> config = ServerOptimizerConfig(lr=1.0, schedule=Schedule.linear, final_lr_share=0.0, warmup_rounds=1)
        >>> [learning_rate(config, round=r, rounds=6) for r in range(6)]
        [0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if round < config.warmup_rounds:
        share = (round + 1) / (config.warmup_rounds + 1)
    elif config.schedule is Schedule.constant:
        share = 1.0
    else:
        progress = (round - config.warmup_rounds) / max(1, rounds - 1 - config.warmup_rounds)
        falling = 1 - progress if config.schedule is Schedule.linear else (1 + math.cos(math.pi * progress)) / 2
        share = config.final_lr_share + (1 - config.final_lr_share) * falling
    return float(np.float32(config.base_lr * share))


class ServerOptimizer(Protocol):
    """Moves a space along the log, one round a call."""

    def num_moments(self, num_clients: int) -> int:
        """Numbers that the optimizer remembers for each trained value, in a run of so many clients."""
        ...

    def apply(self, space: Space, moments: Values, record: ScalarRecord, *, run_seed: int) -> None:
        """Move theta, and ``moments`` in place, by one round.

        Args:
            space: At the state before the round.
            moments: float32 [num_moments, n]; zero before the first round.
            record: The round.
            run_seed: Seed of the run's directions.
        """
        ...


@runtime_checkable
class ControlVariates(ServerOptimizer, Protocol):
    """Corrects each client's local steps by what it remembers; its records keep every client's own scalars."""

    def drift(self, start: Values, moments: Values, client: int, *, lr: float) -> Drift:
        """The correction of a client's local steps in the coming round, whose learning rate is ``lr``.

        ``start`` is theta now, float32 [n].
        """
        ...


@runtime_checkable
class VectorOptimizer(ServerOptimizer, Protocol):
    """Also moves theta by a vector, where clients compute gradients."""

    def displace(self, space: Space, moments: Values, record: VectorRecord) -> None:
        """Move theta, and ``moments`` in place, by one round; arguments as in ``apply``."""
        ...


SERVER_OPTIMIZERS: Registry[ServerOptimizer] = Registry("server_optimizer", base=ServerOptimizerConfig)
"""Factories ``(config, *, local_steps) -> ServerOptimizer``; ``local_steps`` is T of the run."""


def build_server_optimizer(config: ServerOptimizerConfig, *, local_steps: int) -> ServerOptimizer:
    """The server optimizer of a configuration.

    Raises:
        ConfigError: It is not what its config's traits say, by which the rest of the run was judged.
    """
    optimizer = SERVER_OPTIMIZERS.build(config, local_steps=local_steps)
    for trait, kind in (("walks_clients", ControlVariates), ("takes_vectors", VectorOptimizer)):
        if getattr(config.traits, trait) != (is_one := isinstance(optimizer, kind)):
            raise ConfigError(
                f"server_optimizer: {type(config).__name__}.traits.{trait} must be {is_one}, as its optimizer is "
                f"{'one' if is_one else 'none'} of {kind.__name__}, got {not is_one}. Mend the plugin."
            )
    if config.traits.keeps_moments != (keeps := (count := optimizer.num_moments(1)) > 0):
        raise ConfigError(
            f"server_optimizer: {type(config).__name__}.traits.keeps_moments must be {keeps}, as its optimizer's "
            f"num_moments(1) is {count}, got {not keeps}. Mend the plugin."
        )
    return optimizer


def round_direction(space: Space, record: ScalarRecord, *, run_seed: int) -> Values:
    """U of a round: float32 [n], one rounded product and one rounded sum for each scalar in the log's order."""
    u = torch.zeros(space.size)
    for c, key in scalars_and_keys(record, run_seed=run_seed):
        if c != 0:  # a dropped probe
            add_direction(u, key, scale=float(c), out=u, distribution=space.distribution)
    return u.numpy()


def step_along(space: Space, along: Values, record: ScalarRecord) -> None:
    """theta <- theta - lr * along: one rounded product, one rounded difference."""
    space.load(space.values() - np.float32(record.lr) * along)


def norm(vector: Values) -> float:
    """The Euclidean norm, the same bits on every machine, which numpy's own sums do not promise.

    A product of two float32 numbers is exact in float64, and their sum is rounded once, so that no order matters.

    Args:
        vector: float32 [n].

    Example:
        >>> norm(np.array([3, -4], np.float32))
        5.0
    """
    wide = vector.astype(np.float64)
    return math.sqrt(math.fsum(wide * wide))


def decay(space: Space, record: LogRecord, weight_decay: float) -> None:
    """theta <- theta * float32(1 - lr * weight_decay); a factor of 1 touches nothing."""
    factor = np.float32(1 - record.lr * weight_decay)
    if factor != 1:
        space.scale_by(float(factor))
