"""The table of a sweep's jobs: as people read it, and as plain numbers for ``sweep.csv``."""

from __future__ import annotations

from collections.abc import Sequence

from fedzo.records.metrics import Flagged, Summary
from fedzo.report.format import bytes_text, flagged_text, score_text, seconds_text
from fedzo.report.jobs import Job
from fedzo.report.run_data import RunData

_SUMS = (
    *("payload_up_bytes", "payload_down_bytes", "message_up_bytes", "message_down_bytes"),
    *("wire_up_bytes", "wire_down_bytes"),
)
"""Of a run's summary: over rounds and clients."""
_COLUMNS = (
    *("best_round", "dev_loss", "dev", "test_before", "test_after", "worst_client_last_round", "flagged", "fallback"),
    *("worst_client_rows", "metric", "test_loss", "test_auc_before", "test_auc"),
    *("test_best_threshold_accuracy_before", "test_best_threshold_accuracy", "num_test", "trained_values"),
    *("setup_down_bytes_per_client", "bytes_per_client", *_SUMS),
    *("forwards", "prepare_seconds", "round_seconds", "seconds"),
)


def job_table(jobs: Sequence[Job], keys: Sequence[str]) -> list[list[str]]:
    """A header and a row for each job, in words."""
    header = [
        *("job", *keys, "state", "best round", "dev loss", "dev", "test before", "test after"),
        *("worst client (last round)", "flagged", "set-up a client", "payload a client, both ways"),
        *("time of rounds", "time, with scores"),
    ]
    rows = [header]
    for job in jobs:
        row = [job.name, *(job.settings.get(key, "") for key in keys), job.state]
        if job.run and (summary := job.summary):
            dev, test, worst = job.scores("dev"), job.scores("test"), summary.worst_client
            decision, cost = summary.step_policy, job.cost
            row += [
                "" if dev is None else str(summary.best_round),
                "" if dev is None or dev[1].loss is None else f"{dev[1].loss:.3f}",
                "" if dev is None else score_text(dev[1].metric, dev[1].value),
                *([score_text(score.metric, score.value) for score in test] if test else ("", "")),
                "" if worst is None else score_text(worst.metric, worst.value),
                flagged_text(_flagged(decision), fallback=decision.fallback) if decision else "",
                bytes_text(cost.setup_bytes),
                bytes_text(cost.payload_bytes),
                seconds_text(cost.seconds),
                seconds_text(job.run.seconds),
            ]
        rows.append(row + [""] * (len(header) - len(row)))
    return rows


def job_numbers(jobs: Sequence[Job], keys: Sequence[str]) -> list[list[object]]:
    """A header and a row for each job, in numbers as they were measured; None for what is not known.

    What the first evaluator reports beside its value, on the test rows at the best round, has a column a name at the
    end, and so has the value of each other evaluator. If there is a column of this name already, the number stands in
    it where it is empty otherwise.
    """
    tested = [_beside(job) for job in jobs]
    columns = [*dict.fromkeys((*_COLUMNS, *(f"test_{name}" for numbers in tested for name in numbers)))]
    rows: list[list[object]] = [["job", *keys, "state", *columns]]
    for job, beside in zip(jobs, tested, strict=True):
        row: list[object] = [job.name, *(job.settings.get(key, "") for key in keys), job.state]
        if job.run and (summary := job.summary):
            own = {name: value for name, value in _numbers(job, job.run, summary).items() if value is not None}
            numbers = {f"test_{name}": value for name, value in beside.items()} | own
            row += [numbers.get(name) for name in columns]
        rows.append(row)
    return rows


def _beside(job: Job) -> dict[str, float]:
    """What evaluators found on the test rows of a finished job at its best round, beside the value of the first."""
    if job.run is None or job.summary is None:
        return {}
    found = {scored.evaluator: after.value for scored in job.run.scored[1:] if (after := scored.test[1])}
    return found | (scores[1].numbers if (scores := job.scores("test")) else {})


def _numbers(job: Job, run: RunData, summary: Summary) -> dict[str, object]:
    """The columns of a finished job, by name."""
    _, dev = job.scores("dev") or (None, None)
    before, after = job.scores("test") or (None, None)
    setup, cost, worst, decision = run.setup, job.cost, summary.worst_client, summary.step_policy
    measured = after or dev
    return {
        "best_round": summary.best_round if dev else None,
        "dev_loss": dev.loss if dev else None,
        "dev": dev.value if dev else None,
        "test_before": before.value if before else None,
        "test_after": after.value if after else None,
        "worst_client_last_round": worst.value if worst else None,
        "worst_client_rows": worst.num_examples if worst else None,
        "flagged": (" ".join(map(str, _flagged(decision))) or "none") if decision else None,
        "fallback": decision.fallback if decision else None,
        "metric": measured.metric if measured else None,
        "test_loss": after.loss if after else None,
        "test_auc_before": before.auc if before else None,
        "test_auc": after.auc if after else None,
        "test_best_threshold_accuracy_before": before.best_threshold_accuracy if before else None,
        "test_best_threshold_accuracy": after.best_threshold_accuracy if after else None,
        "num_test": after.num_examples if after else None,
        "trained_values": setup.space_size if setup else None,
        "setup_down_bytes_per_client": setup.setup_down_bytes if setup else None,
        "bytes_per_client": cost.bytes_per_client,
        **{name: getattr(summary, name) for name in _SUMS},
        "forwards": cost.forwards,
        "prepare_seconds": setup.prepare_seconds if setup else None,
        "round_seconds": cost.seconds,
        "seconds": run.seconds,
    }


def _flagged(decision: Flagged) -> list[int]:
    """The clients of the last decision on who stops early."""
    return [row.client for row in decision.flagged]
