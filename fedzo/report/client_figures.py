"""The figures of a run that tell its clients apart: labels, slopes, scores."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedzo.report.format import percent_text, score_text
from fedzo.report.run_data import RunData
from fedzo.report.series import gaps, label_skew, running_mean
from fedzo.report.style import (
    BLUE,
    GREEN,
    GRID,
    INK,
    MUTED,
    ORANGE,
    PAPER,
    SERIES,
    SKEW,
    Picture,
    new_axes,
    panel_grid,
    percent_axis,
)

MAX_PANELS = 12
MAX_LINES = 60
MAX_POINTS = 400  # of a running mean; a page must stay small
MAX_CLASSES = len(SERIES)


def draw_labels(run: RunData) -> Picture | None:
    """Who holds which labels."""
    clients = run.setup.clients if run.setup else ()
    if not clients:
        return None
    totals: dict[str, int] = {}
    for client in clients:
        for label, count in client.label_counts.items():
            totals[label] = totals.get(label, 0) + count
    ranked = sorted(totals, key=lambda label: (-totals[label], label))
    shown = sorted(ranked if len(ranked) <= MAX_CLASSES else ranked[: MAX_CLASSES - 1])
    many = len(clients) > 40
    figure, axes = new_axes(height=2.9 if many else max(1.7, 0.75 + 0.24 * len(clients)))
    axes.grid(visible=True, axis="y" if many else "x")
    axes.grid(visible=False, axis="x" if many else "y")
    order = sorted(clients, key=lambda client: -client.num_train) if many else list(clients)
    places, base = list(range(len(order))), [0] * len(order)
    series = [(run.class_name(label), [c.label_counts.get(label, 0) for c in order]) for label in shown]
    if len(ranked) > len(shown):
        rest = [sum(n for label, n in c.label_counts.items() if label not in shown) for c in order]
        series.append((f"{len(ranked) - len(shown)} others", rest))
    if not series:
        series = [("rows", [c.num_train for c in order])]
    for (name, counts), colour in zip(series, SERIES, strict=False):
        draw = axes.bar if many else axes.barh
        draw(places, counts, 1.0 if many else 0.7, base, color=colour, label=name)
        base = [low + count for low, count in zip(base, counts, strict=True)]
    (axes.set_ylabel if many else axes.set_xlabel)("training rows")
    if many:
        axes.set_xlabel(f"{len(order)} clients, largest first")
        axes.set_xticks([])
    else:
        axes.set_yticks(places, [f"client {c.client}" for c in order])
        axes.invert_yaxis()
    if len(series) > 1:
        figure.legend(loc="outside upper left", ncols=min(len(series), 5), handlelength=1, handleheight=1)
    skew = label_skew(run)
    sizes = [client.num_train for client in clients]
    caption = f"Rows per client and label: {min(sizes):,} to {max(sizes):,} rows a client."
    if len(ranked) > 1 and skew:
        worst = max(skew, key=lambda client: skew[client])
        caption += f" Client {worst} differs most from all rows together; uneven colours make a federation non-IID."
    return Picture("labels", "Who holds which labels", caption, figure)


def draw_abs_g(run: RunData) -> Picture | None:
    """|g| of each client over the rounds, coloured by label skew."""
    ids = sorted({client.client for record in run.rounds for client in record.clients if client.abs_g is not None})
    if not ids:
        return None
    rounds = [record.round + 1 for record in run.rounds]
    tables = [{client.client: client.abs_g for client in record.clients} for record in run.rounds]
    skew = label_skew(run)
    one_label = max(skew.values(), default=0.0) == 0
    window, thin = max(1, min(25, len(rounds) // 8)), 1 + len(rounds) // MAX_POINTS
    top = max(skew.values(), default=0.0) or 1.0
    norm = BoundaryNorm([top * step / 5 for step in range(6)], SKEW.N)
    ids.sort(key=lambda client: skew.get(client, 0.0))
    panels = len(ids) <= MAX_PANELS
    lines = ids if len(ids) <= MAX_LINES else [ids[i * (len(ids) - 1) // (MAX_LINES - 1)] for i in range(MAX_LINES)]
    figure, grid = panel_grid(len(ids)) if panels else _one_panel()
    drawn: list[float] = []
    for index, client in enumerate(lines):
        values = [table.get(client) for table in tables]
        means = running_mean(values, window=window)
        axes, colour = grid[index if panels else 0], BLUE if one_label else SKEW(norm(skew.get(client, 0.0)))
        if panels:
            axes.plot(rounds[::thin], gaps(values[::thin]), color=colour, alpha=0.25, linewidth=0.8)
            axes.set_title(f"client {client}", color=INK, pad=3)
        axes.plot(rounds[::thin], gaps(means[::thin]), color=colour, linewidth=1.6 if panels else 0.8)
        drawn += [value for value in (values if panels else means) if value is not None]
    for axes in grid:
        axes.set_xlim(0, max(rounds[-1], 1))
        axes.set_ylim(0, 1.05 * max(drawn, default=0.0) or 1.0)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(4))
    figure.supxlabel("rounds", color=MUTED, fontsize=9)
    figure.supylabel("|g|, loss per unit step", color=MUTED, fontsize=9)
    if not one_label:
        bar = figure.colorbar(ScalarMappable(norm, SKEW), ax=grid, pad=0.02, shrink=0.9, aspect=25, format="%.2f")
        bar.set_label("label skew of the client", color=MUTED)
        bar.outline.set_visible(False)
    caption = (
        "Size of each client's measured slope along its directions (thick: running mean). "
        + ("" if one_label else "Clients are ordered and coloured by label skew. ")
        + ("A client far above the others pulls the mean hardest." if len(lines) == len(ids) else "")
        + ("" if len(lines) == len(ids) else f"{MAX_LINES} of {len(ids)} clients are drawn, evenly over the skew.")
    )
    return Picture("abs_g", "Projected gradient per client", caption, figure)


def _one_panel() -> tuple[Figure, list[Axes]]:
    figure, axes = new_axes(height=3.2)
    return figure, [axes]


def draw_federated(run: RunData) -> Picture | None:
    """Each client's score on its own held-out rows."""
    if not run.federated or not run.federated[-1].clients:
        return None
    first, last = run.federated[0], run.federated[-1]
    earlier = {client.client: client.value for client in first.clients} if first.round < last.round else {}
    scored = sorted((c for c in last.clients if c.value is not None), key=lambda c: c.value or 0.0)
    if not scored:
        return None
    figure, axes = new_axes(height=2.7)
    places = list(range(len(scored)))
    few = len(scored) <= 40
    colours = [ORANGE] + [BLUE] * (len(scored) - 1)
    axes.bar(places, [c.value or 0.0 for c in scored], 0.66 if few else 1.0, color=colours)
    if earlier:
        marks = [(place, earlier.get(c.client)) for place, c in zip(places, scored, strict=True)]
        axes.plot(
            [place for place, _ in marks],
            gaps([value for _, value in marks]),
            color=INK,
            linestyle="none",
            marker="_",
            markersize=14 if few else 3,
            markeredgewidth=2,
            label=f"after {first.round} rounds" if first.round else "before training",
        )
        axes.legend(loc="upper left", bbox_to_anchor=(0, 1.13), handletextpad=0.4)
    axes.axhline(last.value, color=GREEN, linewidth=1.2, linestyle="--")
    axes.annotate(
        f"all rows {score_text(last.metric, last.value)}",
        (1, last.value),
        xycoords=("axes fraction", "data"),
        xytext=(6, 0),
        textcoords="offset points",
        color=GREEN,
        va="center",
        annotation_clip=False,
    )
    if few:
        axes.set_xticks(places, [str(c.client) for c in scored])
        for place, client in zip(places, scored, strict=True) if len(scored) <= 16 else ():
            axes.annotate(
                percent_text(client.value, digits=0) if last.metric == "accuracy" else f"{client.value:.2f}",
                (place, 0),
                xytext=(0, 5),
                textcoords="offset points",
                ha="center",
                va="bottom",
                color=PAPER,
            )
    else:
        axes.set_xticks([])
    axes.set_xlabel("client, worst first")
    axes.set_ylabel(f"{last.metric} on own held-out rows")
    axes.set_ylim(0, 1.0)
    axes.tick_params(axis="x", length=0)
    axes.spines["bottom"].set_color(GRID)
    percent_axis(axes, last.metric)
    rows = [client.num_examples for client in scored]
    caption = (
        f"After {last.round} rounds, each client on rows it never trained on ({min(rows)} to {max(rows)} rows: "
        f"small numbers, wide error). Worst: client {scored[0].client} with "
        f"{score_text(last.metric, scored[0].value)} (orange)."
    )
    return Picture("federated", f"{last.metric.capitalize()} per client", caption, figure)
