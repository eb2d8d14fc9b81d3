"""The figures of a run that tell its clients apart: labels, slopes, scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from matplotlib.axes import Axes

from fedzo.records.metrics import FederatedScore
from fedzo.report.format import counted, last, percent_text, score_text, shortened, span
from fedzo.report.panels import chosen_clients, client_colours, colour_scale, label_shares
from fedzo.report.run_data import RunData, Scored
from fedzo.report.style import (
    BLUE,
    GREEN,
    GRID,
    INK,
    ORANGE,
    PAPER,
    SERIES,
    TEXT,
    Picture,
    gaps,
    lone,
    mean_of_known,
    new_axes,
    percent_axis,
    running_mean,
    whole_numbers,
    window_of,
)

MAX_LINES = 60
MAX_POINTS = 400  # of a running mean; a page must stay small
MAX_BARS = 250  # side by side; a page must stay small
MAX_CLASSES = len(SERIES)
MAX_CLASS_NAME = 32  # letters
MAX_LEGEND_LETTERS = 80  # of a row
MAX_TICK_LETTERS = 70  # that fit below an axis


def draw_labels(run: RunData) -> Picture | None:
    """Who holds which labels."""
    clients = run.clients
    if not clients:
        return None
    totals = _label_totals(run)
    ranked = sorted(totals, key=lambda label: (-totals[label], label))
    shown = sorted(ranked if len(ranked) <= MAX_CLASSES else ranked[: MAX_CLASSES - 1])
    many = len(clients) > 40
    figure, axes = new_axes(height=2.9 if many else max(1.7, 0.75 + 0.24 * len(clients)))
    axes.grid(visible=True, axis="y" if many else "x")
    axes.grid(visible=False, axis="x" if many else "y")
    order = sorted(clients, key=lambda client: -client.num_train) if many else list(clients)
    edges = _edges(len(order))
    base = [0.0] * (len(edges) - 1)
    series = [
        (shortened(run.class_name(label), MAX_CLASS_NAME), [c.label_counts.get(label, 0) for c in order])
        for label in shown
    ]
    if len(ranked) > len(shown):
        rest = [sum(n for label, n in c.label_counts.items() if label not in shown) for c in order]
        series.append((f"{len(ranked) - len(shown)} others", rest))
    if not series:
        series = [("rows", [c.num_train for c in order])]
    for (name, counts), colour in zip(series, SERIES, strict=False):
        means = _means(counts, edges)
        tops = [low + mean for low, mean in zip(base, means, strict=True)]
        if many:
            axes.stairs(tops, edges, baseline=base, fill=True, color=colour, label=name)
        else:
            axes.barh(edges[:-1], means, 0.7, base, color=colour, label=name)
        base = tops
    (axes.set_ylabel if many else axes.set_xlabel)("training rows")
    (axes.yaxis if many else axes.xaxis).set_major_locator(whole_numbers(8))
    if many:
        merged = f", means of {edges[1]}" if edges[1] > 1 else ""
        axes.set_xlabel(f"{len(order):,} clients, largest first{merged}")
        axes.set_xticks([])
    else:
        axes.set_yticks(edges[:-1], [f"client {c.client}" for c in order])
        axes.invert_yaxis()
    if len(series) > 1:
        columns = MAX_LEGEND_LETTERS // (3 + max(len(name) for name, _ in series))
        figure.legend(
            loc="outside upper left", ncols=max(1, min(len(series), 5, columns)), handlelength=1, handleheight=1
        )
    sizes, shares = [client.num_train for client in clients], label_shares(run)
    caption = f"Rows per client and label: {span(sizes, 'row')} a client."
    if len(set(shares.values())) > 1:
        worst = max(shares, key=lambda client: shares[client][0])
        most = percent_text(shares[worst][0], digits=0)
        caption += f" Up to {most} of a client's rows have the same label (client {worst})."
        caption += " Unequal mixes mean non-IID clients."
    return Picture("labels", "Labels of each client", caption, figure)


def draw_abs_g(run: RunData) -> Picture | None:
    """Mean |g| of each client's local steps, a line a client: where there are more clients than panels."""
    records = run.trained
    ids = {client.client for record in records for client in record.clients if client.abs_g is not None}
    if not ids:
        return None
    rounds = [record.round + 1 for record in records]
    lines, flagged = chosen_clients(run, ids, most=MAX_LINES), run.flagged
    drawn = set(lines)
    tables = [{each.client: each.abs_g for each in record.clients if each.client in drawn} for record in records]
    window, thin = window_of(len(rounds)), 1 + len(rounds) // MAX_POINTS
    colours = client_colours(run, lines)
    figure, axes = new_axes(height=3.2)
    for client in lines:
        means = running_mean([table.get(client) for table in tables], window=window)
        colour, width = (INK, 1.4) if client in flagged else (colours[client], 0.8)
        axes.plot(rounds[::thin], gaps(means[::thin]), color=colour, linewidth=width, marker=lone(rounds))
    axes.set_xlim(0, rounds[-1])
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(whole_numbers(8))
    axes.set_xlabel("rounds")
    axes.set_ylabel("|g|, loss per unit step")
    colour_scale(run, figure, [axes])
    caption = "g is the scalar of a step: the slope of the client's loss along the step's direction. "
    caption += f"A line is a client's mean |g| over its local steps in {last(window, 'round')}. "
    caption += "A client far above the others moves the mean most. A client with fewer steps has a noisier mean."
    if set(flagged) & {*lines}:
        caption += " Flagged clients are dark."
    if len(lines) < len(ids):
        caption += f" {MAX_LINES} of {len(ids)} clients are shown: the flagged clients first, then others evenly."
    return Picture("abs_g", "Projected gradient per client", caption, figure)


def draw_federated(found: Scored, *, name: str, num_clients: int) -> Picture | None:
    """The score of each of ``num_clients`` clients on its own held-out rows by one evaluator, where it is told."""
    told = [score for score in found.federated if score.worst_first]
    if not told:
        return None
    first, final = told[0], told[-1]
    scored, whole = final.worst_first, final.value
    assert whole is not None  # the mean of what clients tell
    figure, axes = new_axes(height=2.7)
    few = len(scored) <= 40
    edges = [0, *(1 + edge for edge in _edges(len(scored) - 1))]  # the worst client has a bar of its own
    places = [(low + high - 1) / 2 for low, high in pairwise(edges)]
    merged = [high - low for low, high in pairwise(edges)]
    colours = [ORANGE] + [BLUE] * (len(places) - 1)
    axes.bar(places, _means([value for _, value in scored], edges), 0.66 if few else merged, color=colours)
    if first.round < final.round:
        earlier = dict(first.worst_first)
        axes.plot(
            places,
            _means([earlier.get(client) for client, _ in scored], edges),
            color=INK,
            linestyle="none",
            marker="_",
            markersize=14 if few else 3,
            markeredgewidth=2,
            label=f"after {counted(first.round, 'round')}" if first.round else "before training",
        )
        axes.legend(loc="upper left", bbox_to_anchor=(0, 1.13), handletextpad=0.4)
    axes.axhline(whole, color=GREEN, linewidth=1.2, linestyle="--")
    axes.annotate(
        f"scored rows {score_text(final.metric, whole)}",
        (1, whole),
        xycoords=("axes fraction", "data"),
        xytext=(6, 0),
        textcoords="offset points",
        color=TEXT[GREEN],
        va="center",
        annotation_clip=False,
    )
    if few:
        names = [str(client) for client, _ in scored]
        fits = sum(len(name) + 1 for name in names) <= MAX_TICK_LETTERS
        axes.set_xticks(places, names if fits else [""] * len(names))
    else:
        axes.set_xticks([])
    axes.set_xlabel("client, worst first" + (f", others as means of {max(merged)}" if max(merged) > 1 else ""))
    axes.set_ylabel(f"{final.metric} on own held-out rows")
    values = [value for score in (first, final) for _, value in score.worst_first]
    if min(values) >= 0 and max(values) <= 1:
        axes.set_ylim(0, 1.0)
    axes.tick_params(axis="x", length=0)
    axes.spines["bottom"].set_color(GRID)
    percent_axis(axes, final.metric)
    if len(scored) <= 16:
        _label_bars(axes, final.metric, [value for _, value in scored])
    return Picture(name, f"{final.metric.capitalize()} per client", _federated_caption(final, num_clients), figure)


def _federated_caption(final: FederatedScore, num_clients: int) -> str:
    rows = [client.num_examples for client in final.clients if client.value is not None]
    (worst, value), told = final.worst_first[0], len(final.worst_first)
    caption = (
        f"After {counted(final.round, 'round')}, on each client's held-out rows ({span(rows, 'row')}: few, so scores "
        f"are noisy). Worst: client {worst} with {score_text(final.metric, value)} (orange)."
    )
    if num_clients > told:
        caption += f" {told} of {num_clients} clients report {final.metric}."
    return caption


def _label_bars(axes: Axes, metric: str, values: Sequence[float]) -> None:
    """Each bar's value at its foot, or above it where the bar is too short to hold it."""
    low, high = axes.get_ylim()
    for place, value in enumerate(values):
        short = value < low + 0.12 * (high - low)
        axes.annotate(
            percent_text(value, digits=0) if metric == "accuracy" else f"{value:.2f}",
            (place, max(value, low) if short else low),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            va="bottom",
            color=INK if short else PAPER,
        )


def _edges(count: int) -> list[int]:
    """Where the bars of so many clients begin, and where the last ends: at most ``MAX_BARS``, each of neighbours."""
    return [*range(0, count, max(1, -(-count // MAX_BARS))), count]


def _means(values: Sequence[float | None], edges: Sequence[int]) -> list[float]:
    """Of what is known between any two edges."""
    return [mean_of_known(values[low:high]) for low, high in pairwise(edges)]


def _label_totals(run: RunData) -> Counter[str]:
    """Training rows of all clients by label."""
    totals: Counter[str] = Counter()
    for client in run.clients:
        totals.update(client.label_counts)
    return totals
