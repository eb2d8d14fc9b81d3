"""What a user can say about where a federation runs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class RuntimeConfig:
    """Where clients run. At most the last bits of a result change, by ``batch_clients`` or where ``threads`` is 0."""


@dataclass(kw_only=True, slots=True)
class InlineConfig(RuntimeConfig):
    """All clients in this process, one after another, on one copy of the model."""

    batch_clients: bool = False
    """Evaluate all clients of a round in joint forwards; without a mask only their first steps. Last bits differ."""


@dataclass(kw_only=True, slots=True)
class RayConfig(RuntimeConfig):
    """Flower's simulation engine on Ray: one model per actor."""

    num_cpus_per_client: float = 1.0
    """CPUs that Ray reserves for an actor."""
    num_gpus_per_client: float = 0.0
    """GPUs that Ray reserves for an actor; 0.5 puts two on one."""
    num_actors: int = 2
    """Actors (processes) that share the clients."""


@dataclass(kw_only=True, slots=True)
class LocalConfig(RuntimeConfig):
    """A real SuperLink and one SuperNode a client on this machine, loopback only."""

    startup_s: float = 120.0
    """How long to wait for SuperLink and SuperNodes to be ready."""
    step_limit_s: float = 3600.0
    """A client that works longer on one message (loading the model included) is stopped and started again."""
