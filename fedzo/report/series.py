"""Numbers behind the figures: running means, and how one-sided a client's labels are."""

from __future__ import annotations

from collections.abc import Sequence

from fedzo.report.run_data import RunData


def running_mean(values: Sequence[float | None], *, window: int) -> list[float | None]:
    """Mean of the last ``window`` values that are there, at each position (None where there is none)."""
    means: list[float | None] = []
    for end in range(1, len(values) + 1):
        recent = [value for value in values[max(0, end - window) : end] if value is not None]
        means.append(sum(recent) / len(recent) if recent else None)
    return means


def gaps(values: Sequence[float | None]) -> list[float]:
    """What is missing as nan, which matplotlib leaves out."""
    return [float("nan") if value is None else value for value in values]


def label_skew(run: RunData) -> dict[int, float]:
    """Per client, total variation distance of its labels from the federation's: 0 = alike, towards 1 = one-sided."""
    clients = run.setup.clients if run.setup else ()
    totals: dict[str, int] = {}
    for client in clients:
        for label, count in client.label_counts.items():
            totals[label] = totals.get(label, 0) + count
    whole = sum(totals.values())
    skew = {}
    for client in clients:
        own = sum(client.label_counts.values())
        if own and whole:
            counts = client.label_counts
            skew[client.client] = sum(abs(counts.get(k, 0) / own - n / whole) for k, n in totals.items()) / 2
    return skew


def label_shares(run: RunData) -> dict[int, tuple[float, str]]:
    """Per client, the share of its commonest label and that label; clients without labels are left out."""
    shares = {}
    for client in run.setup.clients if run.setup else ():
        if own := sum(client.label_counts.values()):
            label = max(client.label_counts, key=lambda label: (client.label_counts[label], label))
            shares[client.client] = (client.label_counts[label] / own, label)
    return shares
