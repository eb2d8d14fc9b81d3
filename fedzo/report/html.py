"""One self-contained HTML page a run: what came out, how it went, what it cost, and with which settings."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from fedzo.records.folder import REPORT, replace_file
from fedzo.records.metrics import CentralScore, Round
from fedzo.report.figures import draw_figures
from fedzo.report.format import (
    MISSING,
    bytes_text,
    change_text,
    count_text,
    counted,
    cut_text,
    flagged_text,
    number_text,
    score_text,
    seconds_text,
    share_text,
)
from fedzo.report.run_data import RunData, load_run
from fedzo.report.style import Picture, page_svg, save_pictures, writing_report


class Table(NamedTuple):
    """A table of a page; with ``has_head``, its first row names the columns."""

    title: str
    rows: list[list[str]]
    has_head: bool = False


def write_report(run_dir: Path, *, out_dir: Path | None = None) -> Path:
    """Write ``report.html`` and the folder ``figures`` into the run folder, or into another folder.

    An unfinished run is shown as far as it went.

    Raises:
        RunFolderError: The folder is no run folder, a file in it is damaged, or it cannot be written.
    """
    run = load_run(run_dir)
    pictures = draw_figures(run)
    save_pictures(pictures, (out_dir or run_dir) / "figures")
    split, before, after = _ends(run)
    text = render_page(
        title=f"{run.setting('trainer', 'plugin') or 'a run'} on {run.setting('task', 'name') or 'its task'}",
        subtitle=f"{run.setting('model', 'name')}, {_num_clients(run)}, folder {run_dir.name}",
        headline=_from_to(before.metric, before.value, after.value) if before and after else "",
        headline_note=_headline_note(split, before, after) if before and after else "",
        notes=_notes(run),
        tables=[t for t in (_numbers(run), _evaluators(run), _classes(run), _own_classes(run), _lost(run)) if t.rows],
        long_tables=[table for table in (_stages(run), _clients(run)) if table.rows],
        pictures=pictures,
        details=[
            ("Configuration", run.config_text),
            ("Environment", json.dumps(run.environment, indent=2)),
        ],
    )
    return write_page((out_dir or run_dir) / REPORT, text)


def render_page(
    *,
    title: str,
    subtitle: str,
    headline: str = "",
    headline_note: str = "",
    notes: Sequence[str] = (),
    tables: Sequence[Table],
    long_tables: Sequence[Table] = (),
    pictures: Sequence[Picture] = (),
    details: Sequence[tuple[str, str]] = (),
) -> str:
    """The page's text; everything but the figures is escaped."""
    environment = Environment(
        loader=PackageLoader("fedzo.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    drawn = [{"title": p.title, "caption": p.caption, "svg": page_svg(p)} for p in pictures]
    return environment.get_template("page.html.j2").render(
        title=title,
        subtitle=subtitle,
        headline=headline,
        headline_note=headline_note,
        notes=notes,
        tables=tables,
        long_tables=long_tables,
        pictures=drawn,
        details=details,
    )


def write_page(path: Path, text: str, *, mode: int = 0o666) -> Path:
    """Write a page, for whom ``mode`` says; ``RunFolderError`` if it cannot be."""
    with writing_report(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, text.encode(errors="replace"), mode=mode)  # a folder may have bytes for a name
    return path


def _num_clients(run: RunData) -> str:
    number = run.setting("fl", "num_clients")
    return counted(number, "client") if isinstance(number, int) else f"{number} clients"


def _ends(run: RunData) -> tuple[str, CentralScore | None, CentralScore | None]:
    """The first evaluator's scores before training and at the best round: of the test rows, or else of the dev rows."""
    before, after = run.first.test
    if (before and after) or not run.summary:
        return "test", before, after
    dev = {score.round: score for score in run.first.dev}
    return "dev", dev.get(0), dev.get(run.summary.best_round)


def _headline_note(split: str, before: CentralScore, after: CentralScore) -> str:
    when = "before and after training" if split == "test" else "before training and at the best round, which they chose"
    parts = [f"{before.metric} on {count_text(after.num_examples)} {split} rows, {when}"]
    if before.best_threshold_accuracy is not None and after.best_threshold_accuracy is not None:
        shift = _from_to("accuracy", before.best_threshold_accuracy, after.best_threshold_accuracy)
        parts.append(f"at the best threshold for these rows {shift}: the rest of the gain is a shift of the threshold")
    if before.auc is not None and after.auc is not None:
        parts.append(f"AUC {before.auc:.3f} to {after.auc:.3f}")
    return "; ".join(parts) + "."


def _from_to(metric: str, before: float | None, after: float | None) -> str:
    return f"{score_text(metric, before)} to {score_text(metric, after)} ({change_text(metric, before, after)})"


def _notes(run: RunData) -> list[str]:
    notes = list(run.notes)
    if run.setup and (cut := cut_text(run.setup.cut_rows, run.setting("task", "max_length"))):
        notes.append(cut)
    for longer in run.extensions:
        notes.append(
            f"The run was made longer after round {longer.round}: from {longer.before} to {longer.rounds} rounds."
        )
    if run.summary is None:
        shown = f"{counted(len(run.rounds), 'round')} {'is' if len(run.rounds) == 1 else 'are'} shown"
        notes.insert(0, f"This run is not finished: {shown}. `fedzo resume` continues it.")
        return notes
    if run.first.test[1]:
        again = " of each total" if run.extensions else ""
        when = "at the best round" if run.first.dev else "after the last round"
        notes.append(f"The test rows were scored once before training and once {when}{again}.")
        notes[-1] += " No choice of this run used the test rows."
    notes.append("Message bytes are contents as Flower counts them, without HTTP and TLS.")
    if any(line.wire_up_bytes for line in run.rounds):
        notes.append(
            "Bytes on the wire are all HTTP bytes inside TLS until the last round's replies, the polling of waiting "
            "clients included."
        )
    return notes


def _numbers(run: RunData) -> Table:
    clients = max(len(run.clients), 1)
    rows = [["rounds", str(len(run.rounds))]]
    if run.setup and run.setup.prepare_seconds is not None:
        rows.append(["time to prepare the trainer", seconds_text(run.setup.prepare_seconds)])
    rows += [["time of rounds", seconds_text(run.round_seconds)], ["time with scores", seconds_text(run.seconds)]]
    for best in (score for score in run.first.dev if run.summary and score.round == run.summary.best_round):
        found = f"{best.metric} {score_text(best.metric, best.value)}"
        if best.loss is not None:
            found = f"loss {number_text(best.loss)}, {found}"
        rows.append(["best dev round", f"{best.round} ({found})"])
    if run.setup:
        trained = f"{count_text(run.setup.space_size)} of {count_text(run.setup.num_params)}"
        rows.append(["trained weights", f"{trained} ({share_text(run.setup.space_size, run.setup.num_params)})"])
        rows.append(["set-up per client", bytes_text(run.setup.setup_down_bytes)])
        if forwards := run.setup.forwards:
            most = f"up to {count_text(forwards.tokens_per_batch)} tokens at once"
            rows.append(["forwards at the server", f"{forwards.products or forwards.dtype}, {most}"])
    for what, up, down in (
        ("payload a client, whole run", "payload_up_bytes", "payload_down_bytes"),
        ("messages a client, whole run, with set-up", "message_up_bytes", "message_down_bytes"),
        ("on the wire a client, whole run, with set-up", "wire_up_bytes", "wire_down_bytes"),
    ):
        totals = [sum(run.num_bytes(name).values()) / clients for name in (up, down)]
        if up == "wire_up_bytes" and not sum(totals):
            continue
        rows.append([what, f"{bytes_text(totals[0])} up, {bytes_text(totals[1])} down"])
    if run.trained:
        ends = [number_text(line.loss) for line in (run.trained[0], run.trained[-1])]
        loss = "loss" if run.loss_unit == "nats" else f"loss ({run.loss_unit})"
        rows.append([f"{loss}, first and last round", ", ".join(ends)])
        if spreads := [spread for line in run.trained if (spread := _spread(line)) is not None]:
            typical, largest = number_text(statistics.median(spreads)), number_text(max(spreads))
            rows.append(["loss spread (max - min) over a round's clients", f"{typical} (median), {largest} (largest)"])
    if run.decision:
        rows.append(["flagged clients", flagged_text(run.flagged, fallback=run.decision.fallback)])
    for last in (scored.federated[-1] for scored in run.scored if scored.federated):
        told = {last.metric: last.num_told("value")}
        if run.loss_unit == "nats":  # else the value is the loss
            told["loss"] = last.num_told("loss")
        if min(told.values()) < clients:
            counts = f"{' and '.join(map(str, told.values()))} of {counted(clients, 'client')}"
            rows.append([f"own held-out rows: {' and '.join(told)} reported by", counts])
    if run.summary:
        rows.append(["SHA-256 of the trained values", run.summary.final_digest or MISSING])
    return Table("Numbers", rows)


def _spread(line: Round) -> float | None:
    """How far apart the losses of a round's clients are: their rows, and on mixed sites their devices and dtypes."""
    losses = [client.loss for client in line.clients if client.loss is not None]
    return max(losses) - min(losses) if len(losses) > 1 else None


def _evaluators(run: RunData) -> Table:
    """What each evaluator found; nothing where the headline and the figures say it all."""
    rows = [["evaluator", "measure", "test before", "test after", "held-out (last round)", "worst client (last round)"]]
    for scored in run.scored:
        (before, after), own = scored.test, scored.federated[-1] if scored.federated else None
        if not (score := after or before or own):
            continue
        ends = [None if found is None else found.value for found in (before, after, own)]
        worst = own.worst_client if own else None
        rows.append([scored.evaluator, score.metric, *(score_text(score.metric, value) for value in (*ends, worst))])
        for name in score.numbers:
            values = [None if found is None else found.numbers.get(name) for found in (before, after, own)]
            rows.append(["", name, *map(number_text, values), ""])
    return Table("Scores by evaluator", rows if len(rows) > 2 else [], has_head=True)


def _classes(run: RunData) -> Table:
    title, (before, after) = "Correct test rows by class", run.first.test
    if not before or not after or not after.per_class:
        return Table(title, [])
    rows = [["class", "rows", "before", "after"]]
    for label, (right, total) in sorted(after.per_class.items()):
        was = before.per_class.get(label, (0, 0))[0]
        rows.append([run.class_name(label), str(total), str(was), str(right)])
    return Table(title, rows, has_head=True)


def _own_classes(run: RunData) -> Table:
    told = run.first.federated
    scored = told[:1] + told[1:][-1:]  # the first and the last, which may be one, or of other clients
    rows = [["class", *(f"after round {score.round}" for score in scored)]]
    for label in sorted({label for score in scored for label in score.per_class}):
        counts = [score.per_class.get(label) for score in scored]
        cells = [f"{count[0]} of {count[1]}" if count else MISSING for count in counts]
        rows.append([run.class_name(label), *cells])
    return Table("Correct held-out rows by class", rows if len(rows) > 1 else [], has_head=True)


def _stages(run: RunData) -> Table:
    """What the stages of each client tell of its training rows; a client that keeps a number back has none."""
    names = dict.fromkeys(name for client in run.clients for name in client.stages)
    rows = [["client", *names]]
    for client in run.clients:
        told = [client.stages.get(name) for name in names]
        cells = [MISSING if x is None else count_text(int(x)) if x.is_integer() else number_text(x) for x in told]
        rows.append([str(client.client), *cells])
    return Table("Preprocess stages", rows if names else [], has_head=True)


def _clients(run: RunData) -> Table:
    if not run.setup:
        return Table("Clients", [])
    last = run.first.federated[-1] if run.first.federated else None
    scores = {entry.client: entry for entry in last.clients} if last else {}
    verdicts = run.verdicts
    selected = ["local steps a round"] if verdicts else []
    rows = [["client", "training rows", "labels", *selected, "own held-out rows", "of these scored", "score"]]
    for client in run.clients:
        labels = ", ".join(f"{run.class_name(label)} {count}" for label, count in client.label_counts.items())
        score = scores.get(client.client)
        value = score_text(last.metric, score.value) if last and score else MISSING
        verdict = verdicts.get(client.client)
        steps = f"{verdict.steps}{' (flagged)' if verdict.flagged else ''}" if verdict else MISSING
        taken = [steps] if verdicts else []
        own = [count_text(client.num_heldout), count_text(score.num_examples if score else None)]
        rows.append([str(client.client), count_text(client.num_train), labels, *taken, *own, value])
    if last:
        for name, whole in (("all scored rows", last.value), ("worst", last.worst_client)):
            rows.append([name, *[""] * (len(rows[0]) - 2), score_text(last.metric, whole)])
    return Table("Clients", rows, has_head=True)


def _lost(run: RunData) -> Table:
    dropped = sum(line.dropped_probes for line in run.rounds)
    absent: dict[int, int] = {}
    reasons: dict[int, str] = {}
    for line in run.rounds:
        for client in line.absent:
            absent[client] = absent.get(client, 0) + 1
        reasons.update(line.reasons)
    rows = [["probes dropped (loss not finite)", str(dropped)]] if dropped else []
    for client, count in sorted(absent.items()):
        last = f"; last: {reasons[client]}" if client in reasons else ""
        rows.append([f"client {client} without a usable reply", f"{counted(count, 'round')}{last}"])
    return Table("Dropped and absent", rows)
