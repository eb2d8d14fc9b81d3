"""One federation from first score to last: what the ServerApp runs, on every runtime."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fedzo.config.plugins import plugin_name
from fedzo.config.schema import RunConfig
from fedzo.data.example import Example
from fedzo.errors import ProtocolError
from fedzo.estimate import Estimate, estimate_run
from fedzo.fl.config import StrategyConfig
from fedzo.fl.roster import Roster
from fedzo.fl.selection import check_selection, most_steps
from fedzo.fl.server import Server, Sink
from fedzo.fl.store import RunStore, best_round
from fedzo.models.evaluate import Score, evaluate, merge_scores, metric_of
from fedzo.report.sinks import ProgressSink, TensorBoardSink
from fedzo.site import Site, process_site
from fedzo.trainers import Workplace

Record = dict[str, Any]
log = logging.getLogger(__name__)


class Sinks:
    """Several sinks as one."""

    def __init__(self, sinks: list[Sink]) -> None:
        self._sinks = sinks

    def write(self, record: Record) -> None:
        """Give the record to every sink."""
        for sink in self._sinks:
            sink.write(record)

    def close(self) -> None:
        """Close them all."""
        for sink in self._sinks:
            sink.close()


def run_federation(grid: Any, config_json: str, run_dir: Path) -> None:
    """Run, or go on with, the federation of a configuration; everything it leaves is in ``run_dir``."""
    site = process_site(config_json)
    with ExitStack() as stack:
        store = stack.enter_context(RunStore(run_dir))
        Federation(grid, site, store, stack).run()
    if site.config.report.html:
        from fedzo.report.html import write_report

        write_report(run_dir)


class Federation:
    """The course of one run at the server."""

    def __init__(self, grid: Any, site: Site, store: RunStore, stack: ExitStack) -> None:
        config = site.config
        self._site = site
        self._config = config
        self._store = store
        self._encoded: dict[str, list[Example]] = {}
        started, before = time.monotonic(), max((line["seconds"] for line in store.metrics), default=0.0)
        self._elapsed: Callable[[], float] = lambda: before + time.monotonic() - started
        done = [line for line in store.metrics if line["kind"] == "round"]
        self._progress = ProgressSink(
            config.fl.rounds,
            completed=len(store.records),
            sent_bytes=(sum(r["message_up_bytes"] for r in done), sum(r["message_down_bytes"] for r in done)),
            enabled=config.report.progress,
        )
        sinks: list[Sink] = [self._progress]
        if config.report.tensorboard:
            sinks.append(TensorBoardSink(store.folder, completed=len(store.records)))
        self._sinks = Sinks([store, *sinks])
        for sink in sinks:
            stack.callback(sink.close)
        self._server = self._make_server(grid)

    def run(self) -> None:
        """Scores before, rounds, scores after."""
        config, server = self._config, self._server
        server.roster.wait(server.grid, timeout_s=config.strategy.startup_s)
        server.catch_up()
        self._write_setup()
        if server.round == 0:
            self._score("test", rounds=0)
            self._score("dev", rounds=0)
        else:
            self._scores_due()  # those that a killed run still owed
        while server.round < config.fl.rounds:
            server.run_round()
            self._scores_due()
        server.tell_selection()
        best = best_round(self._store, by=config.evaluation.best_by)
        server.replica.goto(best, self._store.records)
        self._score("test", rounds=best)
        self._write_summary(best)

    # --- beginning

    def _make_server(self, grid: Any) -> Server:
        config, site = self._config, self._site
        _ = site.deal  # rows that cannot be dealt to the clients are refused here, before any of them fails for it
        with self._progress.phase(f"preparing {plugin_name('trainer', config.trainer)}") as advance:
            prepared = site.trainer.prepare(
                site.loaded,
                Workplace(folder=self._store.folder, seed=config.seed, texts=site.train_prompts, advance=advance),
            )
        check_selection(config.selection, config.fl, has_gradient=prepared.gradient is not None)
        replica = site.worker.build(prepared.artifact)
        replica.reset()
        return Server(
            grid=grid,
            roster=Roster(num_clients=config.fl.num_clients, identity=site.worker.identity),
            replica=replica,
            store=self._store,
            artifact=prepared.artifact,
            gradient=prepared.gradient,
            run_seed=config.seed,
            fl=config.fl,
            strategy=_strategy(config),
            optimizer=config.optimizer,
            num_probes=config.estimator.num_probes,
            selection=site.selection,
            sink=self._sinks,
            elapsed=self._elapsed,
            shuffle_replies=config.faults.shuffle_replies,
        )

    def _write_setup(self) -> None:
        if any(line["kind"] == "setup" for line in self._store.metrics):
            return
        server = self._server
        self._sinks.write(
            {
                "kind": "setup",
                "seconds": self._elapsed(),
                "trainer": plugin_name("trainer", self._config.trainer),
                "num_params": sum(p.numel() for p in self._site.loaded.model.parameters()),
                "space_size": server.replica.space.size,
                "setup_down_bytes": len(server.artifact),
                "estimate": asdict(self._estimate()),
                "clients": [
                    {
                        "client": client,
                        "num_train": hello.num_train,
                        "num_heldout": hello.num_heldout,
                        "label_counts": server.roster.label_counts(client),
                    }
                    for client, hello in sorted(server.roster.hellos.items())
                ],
            }
        )

    def _estimate(self) -> Estimate:
        """Memory of a step and seconds of the whole run, if one process did all its forwards."""
        config, site, evaluation = self._config, self._site, self._config.evaluation
        central = (
            [("dev", _times(evaluation.every_rounds, config.fl.rounds) + 1), ("test", 2)] if evaluation.central else []
        )
        clients = config.strategy.clients_per_round or config.fl.num_clients
        plan = site.selection.plan([], {})
        first = sum(plan.steps.values()) if plan.calibration else config.fl.local_steps * clients
        return estimate_run(
            site.loaded,
            self._server.replica.space,
            train=site.encode(site.splits.train[:256]),
            scored=[(times, self._examples(split)) for split, times in central],
            rows_per_step=config.fl.batch_size,
            steps=(config.fl.rounds - 1) * config.fl.local_steps * clients + first,
            forwards_per_step=site.estimator.forwards_per_step(config.estimator.num_probes),
            local_steps=most_steps(config.selection, config.fl),
            tokens_per_batch=site.worker.steps.tokens_per_batch,
            num_moments=len(self._server.replica.moments),
        )

    # --- scores

    def _examples(self, split: str) -> list[Example]:
        if split not in self._encoded:
            self._encoded[split] = self._site.encode(getattr(self._site.splits, split))
        return self._encoded[split]

    def _score(self, split: str, *, rounds: int) -> None:
        """Score the replica, which must be at ``rounds``, unless that was done before the run was resumed."""
        if not self._config.evaluation.central or self._find(split, rounds):
            return
        if not (examples := self._examples(split)):
            return  # data.num_dev = 0, or data.num_test = 0
        with self._progress.phase(f"scoring {split}", len(examples)) as advance:
            score = evaluate(
                self._site.loaded,
                examples,
                self._config.task,
                tokens_per_batch=self._site.worker.steps.tokens_per_batch,
                on_batch=advance,
            )
        head = {"kind": "score", "seconds": self._elapsed(), "split": split, "round": rounds}
        self._sinks.write({**head, **score.to_record()})

    def _scores_due(self) -> None:
        done, total, evaluation = self._server.round, self._config.fl.rounds, self._config.evaluation
        if _due(done, evaluation.every_rounds, total):
            self._score("dev", rounds=done)
        if evaluation.federated_every_rounds >= 0 and _due(done, evaluation.federated_every_rounds, total):
            self._federated_score()

    def _federated_score(self) -> None:
        evaluation, metric = self._config.evaluation, metric_of(self._config.task.kind)
        if any(
            line["kind"] == "federated_score" and line["round"] == self._server.round for line in self._store.metrics
        ):
            return
        replies = self._server.federated_scores(max_rows=evaluation.federated_max_rows)
        scored: dict[int, Score] = {}
        for client, reply in replies.items():
            try:
                score = Score.from_json(reply.score, metric=metric, most_examples=evaluation.federated_max_rows)
            except ProtocolError as error:  # a bad reply never ends a run
                log.warning("client %d was not scored: %s", client, error)
                continue
            if score is not None:
                scored[client] = score
        if not scored:
            return
        head = {"kind": "federated_score", "seconds": self._elapsed(), "round": self._server.round}
        clients = [{"client": client, **scored[client].to_record()} for client in sorted(scored)]
        worst = min(score.value for score in scored.values())
        merged = merge_scores(list(scored.values())).to_record()
        self._sinks.write({**head, **merged, "worst_client": worst, "clients": clients})

    def _find(self, split: str, rounds: int) -> Record | None:
        for line in self._store.metrics:
            if line["kind"] == "score" and line["split"] == split and line["round"] == rounds:
                return line
        return None

    # --- end

    def _write_summary(self, best: int) -> None:
        if any(line["kind"] == "summary" for line in self._store.metrics):
            return  # resumed after its end
        rounds = [line for line in self._store.metrics if line["kind"] == "round"]
        totals = {
            name: sum(line[name] for line in rounds)
            for name in ("payload_up_bytes", "payload_down_bytes", "message_up_bytes", "message_down_bytes")
        }
        self._sinks.write(
            {
                "kind": "summary",
                "seconds": self._elapsed(),
                "rounds": self._server.round,
                "best_round": best,
                "before": self._find("test", 0),
                "after": self._find("test", best),
                "worst_client": self._worst_client(),
                "selection": self._selection(),
                "final_digest": self._store.rounds[-1]["digest"],
                "dropped_probes": sum(line["dropped_probes"] for line in rounds),
                **totals,
            }
        )

    def _worst_client(self) -> Record | None:
        """The client with the lowest score on its own held-out rows, when they were scored last."""
        scored = [line for line in self._store.metrics if line["kind"] == "federated_score"]
        if not scored:
            return None
        worst = min(scored[-1]["clients"], key=lambda entry: entry["value"])
        return {name: worst[name] for name in ("client", "metric", "value")} | {"round": scored[-1]["round"]}

    def _selection(self) -> Record | None:
        """Whom the last decision flagged; None without a selection."""
        told = [line for line in self._store.metrics if line["kind"] == "selection"]
        if not told:
            return None
        flagged = [{"client": row["client"], "steps": row["steps"]} for row in told[-1]["clients"] if row["flagged"]]
        return {"flagged": flagged, "fallback": told[-1]["fallback"]}


def _strategy(config: RunConfig) -> StrategyConfig:
    """Where one process plays all clients one after another, how long that takes is not theirs: no deadline."""
    inline = plugin_name("runtime", config.runtime) == "inline"
    return replace(config.strategy, deadline_s=math.inf) if inline else config.strategy


def _times(every: int, rounds: int) -> int:
    return sum(_due(done, every, rounds) for done in range(1, rounds + 1))


def _due(done: int, every: int, rounds: int) -> bool:
    return done == rounds or (every > 0 and done % every == 0)
