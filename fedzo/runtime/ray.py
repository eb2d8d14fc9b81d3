"""A federation on Flower's simulation engine: clients share a few Ray actors, each with its own copy of the model.

The one adapter around ``flwr.simulation.run_simulation``, whose Python entry point is deprecated. The engine wants to
run the server in a thread of its own, where errors and Ctrl-C get lost; so the engine gets a thread, its ServerApp only
hands over the grid, and the real server runs in the caller's thread.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import psutil
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedzo.errors import ConfigError, ProtocolError
from fedzo.run.apps import CONFIG_ENV, CONFIG_KEY, RUN_DIR_ENV, RUN_DIR_KEY
from fedzo.runtime._flower import ENVIRONMENT, OnThisMachine, one_federation, quiet_flower
from fedzo.runtime.config import RayConfig

STRAGGLER_S, END_S = 3.0, 10.0
PASSED_ON = ("HF_HUB_OFFLINE", "HF_HOME", "OMP_NUM_THREADS", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO")
"""Variables that actors on other nodes get, too, beside fedzo's and Flower's."""


def run_ray(
    server_app: ServerApp,
    load_client_app: Callable[[], ClientApp],
    *,
    num_clients: int,
    run_config: Mapping[str, str],
    config: RayConfig,
) -> None:
    """Run a federation on Ray, on this machine or on a cluster; what the server raises, this raises.

    Args:
        server_app: Runs in this process and thread.
        load_client_app: A function of an importable module that gives an actor its ClientApp. Only its name travels: an
            app sent by value would lose its process's model with every message.
        num_clients: Number of clients, indexed from 0.
        run_config: Given to the server; Flower gives clients none here, so they read ``config`` and ``run-dir`` from
            the environment variables ``FEDZO_CONFIG`` and ``FEDZO_RUN_DIR``.
        config: Actors and their share of the machine.

    Raises:
        ConfigError: Ray's cluster cannot be reached, or another federation runs in this process.
        ProtocolError: Ray did not start, or the engine ended before the server.
    """
    import ray

    on_sigterm = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL
    engine = _Engine(load_client_app, num_clients=num_clients, config=config, on_sigterm=on_sigterm)
    with one_federation(), quiet_flower(), _quiet_ray(), _environment(run_config):
        try:
            with _sigterm_kept_for(on_sigterm):
                _start_ray(config)
            grid, context = engine.start()
            context.run_config = dict(run_config)
            guarded = RayGrid(grid, num_clients=num_clients, check=engine.check)
            server_app(grid=cast(Grid, guarded), context=context)
        finally:
            daemons = _daemons()
            engine.end(daemons)
            ray.shutdown()
            _take_sigterm_back(on_sigterm)
            for daemon in daemons:  # Ray has ended them but waits for none
                daemon.wait(END_S)


class _Engine:
    """Flower's engine in its thread. The server that it runs hands over its grid and waits until the end."""

    def __init__(
        self, load_client_app: Callable[[], ClientApp], *, num_clients: int, config: RayConfig, on_sigterm: Any
    ) -> None:
        self._client_app = cast(ClientApp, ClientByName(load_client_app))
        self._num_clients = num_clients
        self._config = config
        self._on_sigterm = on_sigterm
        self._done = threading.Event()
        self._grids: queue.Queue[tuple[Grid, Context]] = queue.Queue()
        self._crash: BaseException | None = None
        self._thread = threading.Thread(target=self._simulate, name="flower-simulation", daemon=True)

    def start(self) -> tuple[Grid, Context]:
        """Start the engine, on a Ray that is up; returns what it gives its server."""
        self._thread.start()
        while True:
            try:
                return self._grids.get(timeout=0.1)
            except queue.Empty:
                self.check()

    def check(self) -> None:
        """What must come before each use of the grid; raises where the engine has ended."""
        _take_sigterm_back(self._on_sigterm)
        if not self._thread.is_alive():
            raise ProtocolError(
                f"runtime=ray: the engine must outlive the server, but it ended early ({_root(self._crash)!r}). "
                "Look for a lack of memory or lower runtime.num_actors."
            ) from self._crash

    def end(self, daemons: list[subprocess.Popen[bytes]]) -> None:
        """End the engine, if it was started, and the actors of Ray's daemons that still work after a while."""
        self._done.set()
        if self._thread.is_alive():
            self._thread.join(STRAGGLER_S)
        ends = time.monotonic() + END_S
        while self._thread.is_alive() and time.monotonic() < ends:  # it waits for such actors, for nobody
            _kill_actors(daemons)  # again and again, since Ray starts them again
            self._thread.join(0.5)

    def _simulate(self) -> None:
        from flwr.simulation import run_simulation

        stand_in = ServerApp()

        @stand_in.main()
        def hand_over(grid: Grid, context: Context) -> None:
            self._grids.put((grid, context))
            self._done.wait()

        try:
            run_simulation(
                stand_in,
                self._client_app,
                num_supernodes=self._num_clients,
                backend_config=_backend_config(self._config),
            )
        except BaseException as error:  # ``check`` tells it
            self._crash = error


class RayGrid(OnThisMachine):
    """Flower's grid of a simulation, whose server knows which client each node is (``fedzo.fl.exchange.Grid``).

    Nodes are all alike and registered nowhere. One keeps the index that it got when it was first asked about. Free
    indices go to nodes by ascending node id; one that takes the place of a node that has left gets that one's.

    Args:
        grid: Flower's grid.
        num_clients: Number of clients.
        check: Called before each use of Flower's grid; it raises where the engine has ended, so that no server waits
            for the dead.
    """

    def __init__(self, grid: Grid, *, num_clients: int, check: Callable[[], None]) -> None:
        self._grid = grid
        self._num_clients = num_clients
        self._check = check
        self._clients: dict[int, int] = {}

    def __getattr__(self, name: str) -> Any:
        self._check()
        return getattr(self._grid, name)

    def client_of(self, node: int) -> int | None:
        """Index of the client that a node plays; None for a node that is not there, or one too many."""
        if node not in self._clients:
            nodes = sorted(self.get_node_ids())
            for gone in set(self._clients) - set(nodes):
                del self._clients[gone]
            free = sorted(set(range(self._num_clients)) - set(self._clients.values()))
            self._clients.update(zip([new for new in nodes if new not in self._clients], free, strict=False))
        return self._clients.get(node)


class ClientByName:
    """A ClientApp that travels to actors as the name of the function that loads it."""

    def __init__(self, load: Callable[[], ClientApp]) -> None:
        self._load = load

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer with the actor's own ClientApp."""
        return self._load()(message=message, context=context)


def _take_sigterm_back(handler: Any) -> None:
    """Let this process's own handler have SIGTERM: Ray's Python takes its place, and Ray's core comes before it.

    The one exits with the signal's number, the other aborts the process after 3 seconds.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


@contextmanager
def _sigterm_kept_for(handler: Any) -> Iterator[None]:
    """Let this process's own handler have a SIGTERM, too, that comes while Ray starts: Ray's would only exit."""
    try:
        yield
    except SystemExit:
        _take_sigterm_back(handler)
        os.kill(os.getpid(), signal.SIGTERM)
        raise
    _take_sigterm_back(handler)


def _root(error: BaseException | None) -> BaseException | None:
    """What an error began with: the engine's own says only that there was one."""
    while error is not None and error.__cause__ is not None:
        error = error.__cause__
    return error


def _start_ray(config: RayConfig) -> None:
    """Start a Ray for the run, or join a cluster, before the engine would: so what fails is told as it is.

    Actors on a cluster's nodes get this process's environment by name; those of this machine inherit it.

    Raises:
        ConfigError: There is no cluster at the address.
        ProtocolError: Ray of this machine did not start.
    """
    import ray

    environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    quiet: Any = {"log_to_driver": False, "logging_level": logging.ERROR}
    if config.address:
        names = (*PASSED_ON, *ENVIRONMENT, *(name for name in os.environ if name.startswith("FEDZO_")))
        environment |= {name: os.environ[name] for name in names if name in os.environ}
        try:
            ray.init(config.address, runtime_env={"env_vars": environment}, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"runtime.address: a Ray cluster must be up at {config.address!r}, but: {error}. "
                "Start it with `ray start --head`."
            ) from error
        return
    quiet["include_dashboard"] = False
    num_cpus, num_gpus = _machine(config)
    try:  # "local": another's that is up is left alone
        ray.init("local", runtime_env={"env_vars": environment}, num_cpus=num_cpus, num_gpus=num_gpus, **quiet)
    except Exception as error:  # Ray raises bare ones
        remedy = (
            "It gives its processes 30 s: look for what else keeps the machine busy, or for a lack of memory, and "
            "start the run again."
        )
        if "AF_UNIX path length" in str(error):
            remedy = "Its sockets need a shorter path: set RAY_TMPDIR to a folder such as /tmp."
        raise ProtocolError(
            f"runtime=ray: Ray must start on this machine, but did not ({error!r}). {remedy}"
        ) from error


def _machine(config: RayConfig) -> tuple[int, int]:
    """CPUs and GPUs of a run's own Ray: as many actors are made as fit, so it has no more than they need."""
    shares = (config.num_cpus_per_client, config.num_gpus_per_client)
    num_cpus, num_gpus = (math.ceil(config.num_actors * share) for share in shares)
    return num_cpus, num_gpus


def _backend_config(config: RayConfig) -> Any:
    """The share of an actor, for the engine."""
    num_cpus = config.num_cpus_per_client
    if not config.address:
        num_cpus = math.floor(_machine(config)[0] / config.num_actors * 1e4) / 1e4  # Ray counts in 1/10,000
    # what a client does is a function of its message: it may be asked again while its actor is started again
    share = {"num_cpus": num_cpus, "num_gpus": config.num_gpus_per_client}
    return {"client_resources": {**share, "max_restarts": -1, "max_task_retries": 1}}


def _daemons() -> list[subprocess.Popen[bytes]]:
    """Ray's own processes of this machine, by a private name of the one version that Flower allows."""
    from ray._private import worker

    node = worker._global_node
    return [info.process for infos in node.all_processes.values() for info in infos] if node else []


def _kill_actors(daemons: list[subprocess.Popen[bytes]]) -> None:
    """End actors by their pids: the engine learns that they died, while after a shutdown it would wait for ever."""
    logging.getLogger("flwr").setLevel(logging.CRITICAL)  # until the end of the run: it would report them as crashes
    with contextlib.suppress(psutil.Error):
        for daemon in daemons:
            for process in psutil.Process(daemon.pid).children(recursive=True):
                if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::ClientAppActor"):
                    process.kill()


@contextmanager
def _quiet_ray() -> Iterator[None]:
    """Ray leaves files open for Python to close, which Python may be told to complain about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()


@contextmanager
def _environment(run_config: Mapping[str, str]) -> Iterator[None]:
    """What actors inherit; put back afterwards, together with Flower's change of PYTHONPATH."""
    before = dict(os.environ)
    os.environ[CONFIG_ENV], os.environ[RUN_DIR_ENV] = run_config[CONFIG_KEY], run_config[RUN_DIR_KEY]
    # Ray hides the GPUs from actors with num_gpus=0: clients would compute on another kind of device than the server.
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)
