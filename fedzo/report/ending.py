"""What a run says last: a summary record as lines of text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedzo.report.format import bytes_text

Record = Mapping[str, Any]


def ending(summary: Record) -> list[str]:
    """The lines: test scores where there are any, the worst client, whom a step policy flagged, and bytes."""
    before, after, rows = summary["before"], summary["after"], []
    head = f"after {summary['rounds']} rounds:"
    if before and after:
        head = f"test, before -> after (best dev round {summary['best_round']} of {summary['rounds']}):"
        for name, title in (
            ("value", before["metric"]),
            ("best_threshold_accuracy", "accuracy at the best threshold"),
            ("auc", "AUC"),
        ):
            if before.get(name) is not None and after.get(name) is not None:
                rows.append((title, f"{before[name]:.3f} -> {after[name]:.3f}"))
    if worst := summary.get("worst_client"):
        where = f"client {worst['client']}, on its own rows after round {worst['round']}"
        rows.append((f"worst client's {worst['metric']}", f"{worst['value']:.3f} ({where})"))
    if step_policy := summary.get("step_policy"):
        rows.append(("flagged clients", _flagged(step_policy)))
    payload = summary["payload_up_bytes"] + summary["payload_down_bytes"]
    messages = summary["message_up_bytes"] + summary["message_down_bytes"]
    sent = f"{bytes_text(payload)} ({bytes_text(messages)} as messages)"
    return [head, *(f"  {title:<32} {text}" for title, text in [*rows, ("scalars, all clients, both ways", sent)])]


def _flagged(step_policy: Record) -> str:
    """Those of the last decision with their local steps a round, T_k."""
    if step_policy["fallback"]:
        return f"{', '.join(str(row['client']) for row in step_policy['flagged'])}; too many to be stopped early"
    return ", ".join(f"{row['client']} (T_k = {row['steps']})" for row in step_policy["flagged"]) or "none"
