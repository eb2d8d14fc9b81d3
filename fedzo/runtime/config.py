"""Where a federation runs: what a user can say about it, and how it is started."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from fedzo.errors import Problem, at_least, not_negative, positive, problem
from fedzo.fl.config import Directions
from fedzo.registry import PluginConfig, Registry
from fedzo.system import package_version

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp

    from fedzo.config.schema import RunSettings

STARTUP_S = 120.0
"""How long to wait for a SuperLink, where nobody has said otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeTraits:
    """What other parts of a run must know of a runtime.

    Attributes:
        takes_turns: Whether clients work one after another, so that a round takes long by no fault of theirs and no
            deadline applies.
        joins_forwards: Whether the clients of a round share forwards.
        server_process: Whether the server is a process of its own, which opens the run, and not this one.
        own_processes: Whether each client has a process of its own, which answers while stages work on its rows.
        has_sites: Whether clients are sites of their own, so that this machine needs no rows.
        startup_s: How long a server in a process of its own waits for its SuperLink.
    """

    takes_turns: bool = False
    server_process: bool = False
    own_processes: bool = False
    has_sites: bool = False
    joins_forwards: bool = False
    startup_s: float = STARTUP_S


@dataclass(kw_only=True, slots=True)
class RuntimeConfig(PluginConfig):
    """Where clients run. Only the last bits of results may change, with ``batch_clients`` or ``threads=0``."""

    paths: ClassVar[tuple[str, ...]] = ()
    """Its keys that name files or folders."""

    @property
    def traits(self) -> RuntimeTraits:
        """What other parts of a run must know of this runtime."""
        return RuntimeTraits()

    def missing(self) -> Iterator[Problem]:
        """What it needs and this machine lacks: asked where work begins, not where a run's folder is read."""
        return iter(())


RUNTIMES: Registry[None] = Registry("runtime", base=RuntimeConfig)
"""Factories ``(config, *, num_clients, run_dir: Path, run_json: str)`` that return when the federation has ended; each
imports what it needs only then. ``run_json`` is what the peers agreed on. Where the server is a process of its own,
which opens the run, there is none yet, and only the others are given."""


@dataclass(kw_only=True, slots=True)
class InlineConfig(RuntimeConfig):
    """All clients in this process, one after another, on one copy of the model."""

    batch_clients: bool = False
    """Evaluate all clients of a round in joint forwards. After the first local step, only with a mask in linear layers
    (in float32 on a CPU, in any dtype on CUDA), or with the tables of a sketch. Last bits differ."""

    @property
    def traits(self) -> RuntimeTraits:
        return RuntimeTraits(takes_turns=True, joins_forwards=self.batch_clients)

    def problems(self, run: RunSettings) -> Iterator[Problem]:
        if self.batch_clients and run.fl.directions is not Directions.shared:
            remedy = "Clients with directions of their own cannot share a forward."
            yield problem("runtime.batch_clients", f"be false for fl.directions={run.fl.directions}", True, remedy)


@RUNTIMES.register("inline", InlineConfig)
def _inline(config: InlineConfig, *, num_clients: int, run_dir: Path, run_json: str) -> None:
    from fedzo.run.apps import client_app, look_ahead, run_config, server_app
    from fedzo.runtime.inline import run_inline

    settings, ahead = run_config(run_json, run_dir), look_ahead if config.batch_clients else None
    run_inline(server_app, client_app, num_clients=num_clients, run_config=settings, look_ahead=ahead)


@dataclass(kw_only=True, slots=True)
class RayConfig(RuntimeConfig):
    """Flower's simulation engine on Ray: one model per actor. An actor that dies is started again."""

    address: str = ""
    """A Ray cluster that is up, as ``host:port``, or ``auto`` for that of this machine. All nodes must see the run
    folder, the model and the rows under the same paths. Empty = Ray is started on this machine for the run."""
    num_cpus_per_client: float = 1.0
    """CPUs that Ray reserves for an actor."""
    num_gpus_per_client: float = 0.0
    """GPUs that Ray reserves for an actor; 0.5 puts two on one."""
    num_actors: int = 2
    """Actors (processes) that share the clients. On a cluster (``address``) as many are started as fit."""

    def problems(self, run: RunSettings) -> Iterator[Problem]:
        yield from positive("runtime.num_cpus_per_client", self.num_cpus_per_client, "1 is usual.")
        yield from not_negative("runtime.num_gpus_per_client", self.num_gpus_per_client, "0 reserves no GPU.")
        yield from at_least("runtime.num_actors", self.num_actors, 1, "It counts processes.")

    def missing(self) -> Iterator[Problem]:
        if package_version("ray") is None:
            remedy = "Install it with: pip install 'fedzo[ray]'"
            yield Problem("runtime", f"runtime=ray: Ray must be installed, but is not. {remedy}")


@RUNTIMES.register("ray", RayConfig)
def _ray(config: RayConfig, *, num_clients: int, run_dir: Path, run_json: str) -> None:
    from fedzo.run.apps import run_config, server_app
    from fedzo.runtime.ray import run_ray

    settings = run_config(run_json, run_dir)
    run_ray(server_app, _installed_client_app, num_clients=num_clients, run_config=settings, config=config)


def _installed_client_app() -> ClientApp:
    from fedzo.run.apps import client_app

    return client_app


@dataclass(kw_only=True, slots=True)
class LocalConfig(RuntimeConfig):
    """A SuperLink and one SuperNode a client on this machine, with TLS. The server and each client hold a model."""

    startup_s: float = STARTUP_S
    """How long to wait for SuperLink and SuperNodes to be ready."""
    step_limit_s: float = 3600.0
    """A client that works longer on one message (loading the model included) is stopped and started again."""

    @property
    def traits(self) -> RuntimeTraits:
        return RuntimeTraits(server_process=True, own_processes=True, startup_s=self.startup_s)

    def problems(self, run: RunSettings) -> Iterator[Problem]:
        yield from positive("runtime.startup_s", self.startup_s, "Write seconds.")
        yield from positive("runtime.step_limit_s", self.step_limit_s, "Write seconds.")


@RUNTIMES.register("local", LocalConfig)
def _local(config: LocalConfig, *, num_clients: int, run_dir: Path) -> None:
    from fedzo.runtime.local import run_local

    run_local(num_clients=num_clients, run_dir=run_dir, config=config)


@dataclass(kw_only=True, slots=True)
class RemoteConfig(RuntimeConfig):
    """Sites on machines of their own, through the SuperLink that ``fedzo server up`` runs here."""

    paths: ClassVar[tuple[str, ...]] = ("server",)

    server: str = ""
    """The server's folder, which ``fedzo server init`` makes."""

    @property
    def traits(self) -> RuntimeTraits:
        return RuntimeTraits(server_process=True, own_processes=True, has_sites=True)

    def problems(self, run: RunSettings) -> Iterator[Problem]:
        if not self.server:
            remedy = "Write runtime.server=DIR, the folder that `fedzo server init DIR` made."
            yield problem("runtime.server", "be given for runtime=remote", self.server, remedy)
        if not run.partition.traits.own_rows:
            rule = "be own for runtime=remote: each site has rows of its own, and the server has none"
            yield problem("partition", rule, type(run.partition).__name__, "Write experiment=sites.")


@RUNTIMES.register("remote", RemoteConfig)
def _remote(config: RemoteConfig, *, num_clients: int, run_dir: Path) -> None:
    from fedzo.runtime.remote import run_remote

    run_remote(num_clients=num_clients, run_dir=run_dir, config=config)
