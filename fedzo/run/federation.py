"""One federation from first score to last: what the ServerApp runs, on every runtime."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from fedzo.config.plugins import plugin_name
from fedzo.config.schema import RunConfig
from fedzo.config.travel import to_json
from fedzo.data.config import Loss, TaskKind
from fedzo.data.tasks import num_labels
from fedzo.errors import ConfigError, RunFolderError
from fedzo.evaluate.base import loss_name
from fedzo.fl.log_store import RunStore, best_dev_score, best_round
from fedzo.fl.server.aggregator import Aggregator
from fedzo.fl.server.client_registry import ClientRegistry
from fedzo.fl.server.rounds import Server, Sink
from fedzo.fl.server.scalar_aggregator import ScalarAggregator
from fedzo.fl.server.vector_aggregator import VectorAggregator
from fedzo.models.memory import gradient_bytes, num_weights
from fedzo.records.folder import METRICS, REPORT, STOP
from fedzo.records.lines import RESTORE
from fedzo.records.metrics import (
    Estimate,
    FederatedScore,
    Flagged,
    FlaggedClient,
    MetricRecord,
    Round,
    Setup,
    StepDecision,
    Summary,
)
from fedzo.records.presence import PresenceFile
from fedzo.report.format import cut_text
from fedzo.report.sinks import ProgressSink
from fedzo.report.trackers import TRACKERS, TrackerSink
from fedzo.run.costs import estimate_run
from fedzo.run.process import Process, this_process
from fedzo.run.scores import Scores
from fedzo.run.server_context import Launched
from fedzo.trainers.artifacts import ARTIFACTS

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sinks:
    """Several sinks as one."""

    sinks: list[Sink]

    def write(self, record: MetricRecord) -> None:
        """Give the record to every sink."""
        for sink in self.sinks:
            sink.write(record)


def run_federation(grid: Any, run_json: str, run_dir: Path) -> None:
    """Run, or go on with, the federation of a configuration; everything it leaves is in ``run_dir``."""
    process = this_process(run_json, artifacts=run_dir / ARTIFACTS)
    launched = process.launched
    if launched is None or launched.store is None:
        raise ConfigError("run: its launcher must have opened it and its logs, but has not. Use `fedzo train`.")
    with ExitStack() as stack:
        Federation(grid, process, launched, launched.store, stack).run()
    if launched.config.report.html or (run_dir / REPORT).exists():  # `fedzo report` has made one, which would be stale
        from fedzo.report.html import write_report

        write_report(run_dir)


class Federation:
    """The course of one run at the server."""

    def __init__(self, grid: Any, process: Process, launched: Launched, store: RunStore, stack: ExitStack) -> None:
        context, config = process.server, process.peer.config
        self._context = context
        self._launched = launched
        self._config = config
        self._store = store
        self._presence = PresenceFile(store.folder)
        started, before = time.monotonic(), max((line.seconds for line in store.metrics), default=0.0)
        self._elapsed: Callable[[], float] = lambda: before + time.monotonic() - started
        self._progress = ProgressSink(
            config.fl.rounds,
            completed=len(store.records),
            sent_bytes=(_total(store, "message_up_bytes"), _total(store, "message_down_bytes")),
            evaluator=config.first_evaluator,
            loss=loss_name(config.task, context.peer.evaluators),
            payload="vectors" if config.estimator.sends_vectors else "scalars",
            enabled=launched.config.report.progress,
        )
        sinks: list[ProgressSink | TrackerSink] = [self._progress, *self._trackers()]
        self._sinks = Sinks([store, *sinks])
        for sink in sinks:
            stack.callback(sink.close)
        self._workspace = context.peer.workspace(launched.prepared.artifact, trial_rows=context.trial_rows)
        self._scores = Scores(context, self._workspace, store, self._sinks, self._progress, self._elapsed)
        self._server = self._make_server(grid)
        stack.callback(vars(self).pop, "_server")  # which holds this in its turn, and all that the run has taken

    def run(self) -> None:
        """Scores before, rounds, scores after."""
        config, server, scores = self._config, self._server, self._scores
        setup = self._setup()
        if self._store.records and setup is None:
            began = "what the run began with, its scores among them"
            raise RunFolderError(f"{self._store.folder / METRICS}: it must hold {began}, got nothing. {RESTORE}")
        if setup:
            server.client_registry.recall(setup.clients)
        self._context.check_rows(begun=setup is not None)
        # where one process plays all clients, one that is missing was lost on this very machine
        fewest = config.strategy.min_replies if setup and not self._launched.runtime.takes_turns else None
        waits = math.inf if config.preprocess and not self._context.process.asked_again else config.strategy.startup_s
        # sites outlive a start, and may still work on a round that the one before has lost
        busy_s = config.strategy.deadline_s if self._launched.runtime.has_sites else 0.0
        server.client_registry.wait(
            server.grid, timeout_s=waits, fewest=fewest, busy_s=busy_s, beside=self._while_waiting
        )
        server.warn_of_cut_sizes()
        with self._progress.replay(server.round, start=server.replica.position) as advance:
            server.catch_up(advance)
        self._write_setup()
        self._show_presence()
        if server.round == 0:
            scores.take("test", rounds=0)
            scores.take("dev", rounds=0)
        else:
            scores.take_due(server)  # those that a killed run still owed
        while server.round < config.fl.rounds:
            self._heed_stop()
            with self._progress.round():
                server.run_round()
            self._show_presence(at_once=True)  # scores take long, and nobody is asked any more
            scores.take_due(server)
        server.report_step_policy()
        best = best_round(self._store, config)
        with self._progress.replay(best, start=server.round) as advance:
            server.replica.goto(best, self._store.records, advance)
        scores.take("test", rounds=best)
        self._write_summary(best)

    def _heed_stop(self) -> None:
        """End the run as Ctrl-C does, if somebody asked for it."""
        if (self._store.folder / STOP).exists():
            (self._store.folder / STOP).unlink()
            raise KeyboardInterrupt

    def _while_waiting(self) -> None:
        self._show_presence()
        self._heed_stop()

    # --- beginning

    def _trackers(self) -> list[TrackerSink]:
        """The trackers that the command line named, each with what it lacks of the run so far."""
        folder, completed = self._store.folder, len(self._store.records)
        return [
            TrackerSink(
                name,
                partial(TRACKERS.build, config, folder=folder, completed=completed),
                settings=json.loads(to_json(self._config)),
                told=self._store.metrics,
            )
            for name, config in self._launched.config.trackers.items()
        ]

    def _make_server(self, grid: Any) -> Server:
        config, context, artifact = self._config, self._context, self._launched.prepared.artifact
        return Server(
            grid=grid,
            client_registry=ClientRegistry(
                num_clients=config.fl.num_clients,
                identity=context.process.identity,
                num_labels=num_labels(config.task) if config.fl.label_counts else 0,
                artifact_bytes=artifact.size,
            ),
            replica=self._workspace.replica,
            store=self._store,
            artifact=artifact,
            config=self._server_config(),
            aggregator=self._aggregator(),
            step_policy=context.step_policy,
            label_counts=context.label_counts,
            sink=self._sinks,
            elapsed=self._elapsed,
            beside=self._show_presence,
            while_waiting=self._while_waiting,
        )

    def _server_config(self) -> RunConfig:
        """Where one process plays all clients one after another, how long that takes is not theirs: no deadline."""
        config = self._config
        endless = replace(config.strategy, deadline_s=math.inf)
        return replace(config, strategy=endless) if self._launched.runtime.takes_turns else config

    def _aggregator(self) -> Aggregator[Any]:
        config, space = self._config, self._workspace.replica.space
        if config.estimator.sends_vectors:
            return VectorAggregator(space.size, config)
        return ScalarAggregator(space.distribution, config, self._launched.prepared.gradient)

    def _write_setup(self) -> None:
        if self._setup():
            return
        server, cut_rows, counts = self._server, self._cut_rows(), self._server.known_label_counts
        if text := cut_text(cut_rows, self._config.task.max_length):
            log.warning("%s", text)
        self._sinks.write(
            Setup(
                seconds=self._elapsed(),
                trainer=str(plugin_name("trainer", self._config.trainer)),
                num_params=num_weights(self._workspace.loaded.model),
                space_size=server.replica.space.size,
                setup_down_bytes=server.artifact.size,
                forwards_per_step=self._context.peer.forwards_per_step,
                prepare_seconds=self._launched.prepare_seconds,
                forwards=self._workspace.forwards,
                estimate=self._estimate(),
                clients=tuple(
                    replace(row, label_counts=dict(counts[client]))
                    for client, row in sorted(server.client_registry.clients.items())
                ),
                cut_rows=cut_rows,
            )
        )

    def _cut_rows(self) -> dict[str, tuple[int, int]]:
        """By split, the rows that are cut at ``task.max_length``, and all rows; as clients tell of theirs."""
        hellos, rows = self._server.client_registry.hellos.values(), {}
        for split in ("train", "heldout"):
            counts = [(getattr(hello, f"num_{split}_cut"), getattr(hello, f"num_{split}")) for hello in hellos]
            rows[split] = sum(min(cut, whole) for cut, whole in counts), sum(whole for _, whole in counts)
        if self._config.evaluation.central:
            for split in ("dev", "test"):
                examples = self._context.examples(split)
                rows[split] = sum(example.scored_cut for example in examples), len(examples)
        return {split: (cut, whole) for split, (cut, whole) in rows.items() if whole}

    def _setup(self) -> Setup | None:
        """What was written before the first round, in a run that is resumed."""
        return next(iter(self._store.metrics_of(Setup)), None)

    def _estimate(self) -> Estimate | None:
        """Memory of a step and seconds of the whole run, if one process did all its forwards: of a simulation only."""
        config, context, workspace = self._config, self._context, self._workspace
        if context.simulation is None:
            return None
        clients = config.strategy.clients_per_round or config.fl.num_clients
        plan = self._server.coming_plan()
        first = sum(plan.steps.values()) if plan.calibration else config.fl.local_steps * clients
        steps = (config.fl.rounds - 1) * config.fl.local_steps * clients + first
        forwards = context.peer.forwards_per_step
        train, scored = context.peer.encode(context.simulation.splits.train[:256]), self._scores.planned()
        if config.task.loss is Loss.score:  # a step takes so many scores of its rows instead
            rows = train[: config.fl.batch_size]
            scored.append((steps * forwards * config.fl.batch_size // len(rows), rows))
            forwards = 0
        return estimate_run(
            workspace,
            train=train,
            scored=scored,
            rows_per_step=config.fl.batch_size,
            steps=steps,
            forwards_per_step=forwards,
            num_rows=len(context.simulation.splits.train),
            local_steps=config.step_policy.max_steps(config.fl),
            new_tokens=0 if config.task.kind is TaskKind.candidates else config.task.max_new_tokens,
            gradient_bytes=self._gradient_bytes(),
        )

    def _gradient_bytes(self) -> int:
        if not self._config.estimator.sends_vectors:
            return 0
        trains_base_weights = self._config.trainer.traits.trains_base_weights
        size = self._workspace.replica.space.size
        return gradient_bytes(self._workspace.loaded.model, size, trains_base_weights=trains_base_weights)

    def _show_presence(self, *, at_once: bool = False) -> None:
        """For ``fedzo status``, where clients come and go."""
        if not self._launched.runtime.takes_turns:
            self._presence.write(self._server.presence, at_once=at_once)

    # --- end

    def _write_summary(self, best: int) -> None:
        if any(summary.rounds == self._server.round for summary in self._store.metrics_of(Summary)):
            return  # resumed after its end
        first = self._config.first_evaluator
        self._sinks.write(
            Summary(
                seconds=self._elapsed(),
                rounds=self._server.round,
                best_round=best,
                before=self._scores.find("test", 0, evaluator=first),
                after=self._scores.find("test", best, evaluator=first),
                worst_client=self._scores.worst_client(evaluator=first),
                step_policy=self._flagged(),
                final_digest=self._store.public[-1].digest,
                dropped_probes=_total(self._store, "dropped_probes"),
                payload_up_bytes=_total(self._store, "payload_up_bytes"),
                payload_down_bytes=_total(self._store, "payload_down_bytes"),
                message_up_bytes=_total(self._store, "message_up_bytes"),
                message_down_bytes=_total(self._store, "message_down_bytes"),
                wire_up_bytes=_total(self._store, "wire_up_bytes") or None,
                wire_down_bytes=_total(self._store, "wire_down_bytes") or None,
                dev=best_dev_score(self._store, self._config),
            )
        )

    def _flagged(self) -> Flagged | None:
        """Whom the last decision flagged; None without a step policy."""
        decisions = self._store.metrics_of(StepDecision)
        if not decisions:
            return None
        flagged = (FlaggedClient(client=row.client, steps=row.steps) for row in decisions[-1].clients if row.flagged)
        return Flagged(flagged=tuple(flagged), fallback=decisions[-1].fallback)


def _total(store: RunStore, name: str) -> int:
    """Over the rounds, and over the scores of clients where these have such a number."""
    counted = [record for record in store.metrics if isinstance(record, Round | FederatedScore)]
    return sum(getattr(record, name, None) or 0 for record in counted)
