"""Reads a run folder into typed records. Everything that the report shows comes through here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from fedzo.data.config import Loss
from fedzo.errors import RunFolderError
from fedzo.fl.log_store import belongs
from fedzo.records.decode import decode
from fedzo.records.folder import CONFIG_YAML, ENVIRONMENT, METRICS, PUBLIC, raised_as
from fedzo.records.lines import LogLines
from fedzo.records.log import decode_public
from fedzo.records.metrics import (
    METRIC_KINDS,
    CentralScore,
    ClientRound,
    ClientSetup,
    ClientVerdict,
    Extension,
    FederatedScore,
    MetricRecord,
    Round,
    Setup,
    StepDecision,
    StepSignals,
    Summary,
    decode_metric,
)
from fedzo.records.scores import PartialScore, lowered
from fedzo.records.texts import of_environment, of_yaml, read_mapping

_DECISIVE = ("fedzo", "python", "device", "threads", "cpu_capability", "float32_matmul_precision")
_Line = tuple[Any, dict[str, Any]]  # a line's plain values, and what an error about them says


@dataclass(frozen=True, slots=True)
class Scored:
    """What one evaluator found, by round.

    Attributes:
        evaluator: Its name.
        central: Scores of the server's dev and test rows.
        federated: Scores of the clients' own held-out rows.
        best_round: After which the test rows were scored for the last time; None in an unfinished run.
    """

    evaluator: str
    central: tuple[CentralScore, ...] = ()
    federated: tuple[FederatedScore, ...] = ()
    best_round: int | None = None

    @property
    def dev(self) -> tuple[CentralScore, ...]:
        """Of the dev rows."""
        return tuple(score for score in self.central if score.split == "dev")

    @property
    def test(self) -> tuple[CentralScore | None, CentralScore | None]:
        """Of the test rows before training and after it (None for what is not measured yet)."""
        test = {score.round: score for score in self.central if score.split == "test"}
        if self.best_round is not None:
            return test.get(0), test.get(self.best_round)
        return test.get(0), next((test[done] for done in reversed(test) if done > 0), None)


@dataclass(frozen=True, slots=True)
class RunData:
    """A run folder in memory. ``notes`` says what was missing or damaged; ``summary`` is None for an unfinished run.

    ``scored`` has the evaluators in the run's order: by the first of them the best round is chosen.

    ``decision`` is the newest on who stops early, None where there was none; ``flagged_from`` has the round from which
    each client has been flagged.

    ``rounds`` are without the signals of single steps, which would fill the memory: ``with_signals`` reads them from
    ``lines``, in which ``places`` has the number of each round's line.
    """

    run_dir: Path
    config: dict[str, Any]
    config_text: str
    environment: dict[str, Any]
    setup: Setup | None
    rounds: tuple[Round, ...]
    lines: LogLines[_Line]
    places: dict[int, int]
    scored: tuple[Scored, ...]
    decision: StepDecision | None
    flagged_from: dict[int, int]
    summary: Summary | None
    extensions: tuple[Extension, ...]
    notes: tuple[str, ...]

    def setting(self, *path: str) -> Any:
        """The configuration's value at ``path``, or None where it has no such key."""
        node: Any = self.config
        for key in path:
            node = node.get(key) if isinstance(node, dict) else None
        return node

    @property
    def clients(self) -> tuple[ClientSetup, ...]:
        """What is known of each client before the first round; empty where the run did not come that far."""
        return self.setup.clients if self.setup else ()

    @property
    def verdicts(self) -> dict[int, ClientVerdict]:
        """The newest decision by client; empty where there was none."""
        return {verdict.client: verdict for verdict in self.decision.clients} if self.decision else {}

    @property
    def flagged(self) -> list[int]:
        """Clients that the newest decision flagged."""
        return [client for client, verdict in self.verdicts.items() if verdict.flagged]

    @property
    def seconds(self) -> float:
        """Seconds from the start of the run to its last record."""
        return self.summary.seconds if self.summary else max((r.seconds for r in self.rounds), default=0.0)

    @property
    def round_seconds(self) -> float:
        """Seconds of the rounds alone: without scores, and without the server's own move of the model after each."""
        return sum(record.round_seconds for record in self.rounds)

    @property
    def trained(self) -> tuple[Round, ...]:
        """The rounds that moved the model: the losses of a calibration are of paths that were given up."""
        return tuple(record for record in self.rounds if not record.calibration)

    @property
    def loss_unit(self) -> str:
        """What the losses of steps are measured in: nats, or the value that is trained (``task.loss=score``)."""
        if self.setting("task", "loss") != Loss.score:
            return "nats"
        scores: list[PartialScore] = [*self.first.central, *self.first.federated]
        return lowered(scores[0].metric, lower_is_better=scores[0].lower_is_better) if scores else "score"

    @property
    def first(self) -> Scored:
        """The first evaluator, which chooses the best round; one that found nothing where there is none."""
        return self.scored[0] if self.scored else Scored("")

    def num_bytes(self, kind: str) -> dict[int, int]:
        """Bytes of a kind, such as ``message_up_bytes``, by rounds done: of a round and of clients' scores after it."""
        counts = Counter({record.round + 1: getattr(record, kind) or 0 for record in self.rounds})
        for score in (score for scored in self.scored for score in scored.federated):
            counts[score.round] += getattr(score, kind, 0)  # a score has bytes of messages only
        return dict(sorted(counts.items()))

    def with_signals(self, clients: Collection[int] | None = None) -> Iterator[tuple[Round, list[ClientRound]]]:
        """Each round, and what some clients (None: all) measured in it, with the signals of their steps."""
        for record in self.rounds:
            value, where = self.lines[self.places[record.round]]
            wanted = (each for each in value["clients"] if clients is None or each["client"] in clients)
            yield record, [decode(ClientRound, each, **where) for each in wanted]

    def class_name(self, label: str | int) -> str:
        """The answer text of a label where the task names one, else the label itself."""
        label, candidates = str(label), self.setting("task", "candidates")
        if isinstance(candidates, list) and label.isdecimal() and int(label) < len(candidates):
            text = str(candidates[int(label)]).strip()
            if text and "{" not in text:
                return text
        return label


def load_run(run_dir: Path) -> RunData:
    """Read ``metrics.jsonl``, ``config.yaml`` and ``environment.json``; a torn last line is dropped and noted.

    What a killed run measured in a round that was never committed is left out, as ``fedzo resume`` drops it.

    Raises:
        RunFolderError: the folder is no run folder or a file in it is damaged.
    """
    lines, found, notes = _read_metrics(run_dir)
    records = [*found.values()]
    if (run_dir / PUBLIC).exists():
        done = len(LogLines(run_dir, PUBLIC, decode_public))
        records = [record for record in records if belongs(record, done)]
    config_text, config, config_notes = read_mapping(run_dir / CONFIG_YAML, of_yaml)
    _, environment, environment_notes = read_mapping(run_dir / ENVIRONMENT, of_environment)
    rounds = {record.round: record for record in records if isinstance(record, Round)}
    setups = [record for record in records if isinstance(record, Setup)]
    decisions = [record for record in records if isinstance(record, StepDecision)]
    summaries = [record for record in records if isinstance(record, Summary)]
    extensions = tuple(record for record in records if isinstance(record, Extension))
    total = max([max(rounds, default=-1) + 1, *(longer.rounds for longer in extensions)])
    ended = summaries[-1] if summaries and total <= summaries[-1].rounds else None
    return RunData(
        run_dir=run_dir,
        config=config,
        config_text=config_text,
        environment=environment,
        setup=setups[-1] if setups else None,
        rounds=tuple(rounds[index] for index in sorted(rounds)),
        lines=lines,
        places={record.round: number for number, record in found.items() if isinstance(record, Round)},
        scored=_scored(records, config, best_round=ended.best_round if ended else None),
        decision=decisions[-1] if decisions else None,
        flagged_from={
            verdict.client: decision.round
            for decision in reversed(decisions)
            for verdict in decision.clients
            if verdict.flagged
        },
        summary=ended,
        extensions=extensions,
        notes=(*notes, *config_notes, *environment_notes),
    )


def computed_with(environment: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What of an environment the numbers of a run depend on, each by its name: at its begin, and after each change."""
    now = {**{name: environment.get(name) for name in _DECISIVE}, **environment.get("packages", {})}
    yield now
    for later in environment.get("later", []):
        now = {**now, **{name: value for name, value in later.items() if name != "round"}}
        yield now


def _scored(records: list[MetricRecord], config: dict[str, Any], *, best_round: int | None) -> tuple[Scored, ...]:
    """The scores of each evaluator, in the order in which the configuration names these."""
    central = {(r.evaluator, r.round, r.split): r for r in records if isinstance(r, CentralScore)}
    federated = {(r.evaluator, r.round): r for r in records if isinstance(r, FederatedScore)}
    told = {score.evaluator for score in central.values()} | {score.evaluator for score in federated.values()}
    entries = config.get("evaluators")
    plugins = [entry.get("plugin") for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    chosen = dict.fromkeys(name for name in plugins if isinstance(name, str) and name in told)
    return tuple(
        Scored(
            name,
            tuple(sorted((r for r in central.values() if r.evaluator == name), key=lambda score: score.round)),
            tuple(sorted((r for r in federated.values() if r.evaluator == name), key=lambda score: score.round)),
            best_round,
        )
        for name in [*chosen, *sorted(told.difference(chosen))]
    )


def _read_metrics(run_dir: Path) -> tuple[LogLines[_Line], dict[int, MetricRecord], list[str]]:
    """The lines, the record of each by its number, and what was left out."""
    path, remedy = run_dir / METRICS, "Give the folder that fedzo train printed."
    with raised_as(RunFolderError, f"{path}: a run folder must hold a readable {METRICS}", remedy):
        size = path.stat().st_size  # before its lines are counted: a run may go on
    lines = LogLines(run_dir, METRICS, _line)
    records = {number: record for number, line in enumerate(lines) if (record := _without_signals(*line)) is not None}
    if not records:
        raise RunFolderError(
            f"{path}: must hold at least one record, got none. The run stopped before it began; start it again."
        )
    torn = f"The last line of {METRICS} is incomplete (interrupted write) and left out."
    return lines, records, [torn] if size > lines.num_bytes else []


def _line(value: Any, **where: Any) -> _Line:
    return value, where


def _without_signals(value: Any, where: dict[str, Any]) -> MetricRecord | None:
    """A record without the signals of single steps; None for a kind of a later version."""
    if isinstance(value, dict) and isinstance(value.get("kind"), str) and value["kind"] not in METRIC_KINDS:
        return None
    record = decode_metric(value, **where)
    if not isinstance(record, Round):
        return record
    return replace(record, clients=tuple(replace(each, signals=_unread(each.steps)) for each in record.clients))


@cache
def _unread(steps: int) -> StepSignals:
    """Stands for the signals of so many steps."""
    unknown = (None,) * steps
    return StepSignals(
        grad_ip=unknown, abs_g=unknown, loss=unknown, cosine=unknown, mean_abs_grad_ip=None, mean_abs_g=None
    )
