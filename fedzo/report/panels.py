"""A panel a client over its local steps, from one-sided to even labels: what the figures of local steps share."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from statistics import fmean, quantiles
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.typing import ColorType

from fedzo.records.metrics import Round
from fedzo.report.format import percent_text, shortened
from fedzo.report.run_data import RunData
from fedzo.report.style import BLUE, INK, MUTED, SKEW, lone, mean_of_known, panel_grid, whole_numbers, window_of

MAX_PANELS = 16
MAX_POINTS = 150  # of a line; a page must stay small
MAX_TITLE = 24  # letters that fit above a panel


class Means(NamedTuple):
    """What the points of all panels' lines are means of: on shared axes, lines of other sizes differ in noise alone.

    A client that sits rounds out, or stops early, has fewer steps in a block.

    Attributes:
        size: Neighbouring steps of the federation, for a point of a thin line.
        window: A client's last steps, for a point of a thick one.
    """

    size: int
    window: int

    @classmethod
    def of(cls, run: RunData) -> Means:
        """So that no line has more points than ``MAX_POINTS``, and the thick one stays the smoother."""
        steps = num_steps(run)
        size = max(1, -(-steps // MAX_POINTS))
        return cls(size, window_of(steps) if size == 1 else max(window_of(steps), 3 * size))

    @property
    def of_thin(self) -> str:
        """What the name of a thin line ends with; empty where each step has its point."""
        return f", mean of up to {self.size:,} steps" if self.size > 1 else ""


@dataclass(frozen=True, slots=True)
class Trace:
    """A client's local steps; ``at`` numbers those of the federation, so that panels agree on when a step was."""

    at: list[int] = field(default_factory=list)
    abs_g: list[float | None] = field(default_factory=list)
    grad_ip: list[float | None] = field(default_factory=list)
    loss: list[float | None] = field(default_factory=list)


def client_panels(run: RunData, clients: Collection[int], *, height: float) -> tuple[Figure, dict[int, Axes]]:
    """A panel a client, in their order."""
    figure, grid = panel_grid(len(clients), height=height)
    shares, end = label_shares(run), num_steps(run)
    for axes, client in zip(grid, clients, strict=True):
        share, label = shares.get(client, (0.0, ""))
        labels = f": {percent_text(share, digits=0)} {run.class_name(label)}" if label else ""
        axes.set_title(shortened(f"client {client}{labels}", MAX_TITLE), color=INK, pad=3, fontsize=8)
        axes.set_xlim(0, end)
        axes.xaxis.set_major_locator(whole_numbers(4, prune="upper"))  # panels touch
        axes.yaxis.set_major_locator(MaxNLocator(3))
    return figure, dict(zip(clients, grid, strict=True))


def draw_client(
    axes: Axes,
    at: Sequence[int],
    thin: Sequence[float | None],
    values: Sequence[float | None],
    *,
    colour: ColorType,
    means: Means,
) -> list[float]:
    """A thin line, and a thick one of the running mean of ``values``; returns how high each usually is."""
    points: list[tuple[float, float]] = []
    thick: list[tuple[float, float]] = []
    for _, block in groupby(range(len(at)), key=lambda place: at[place] // means.size):
        places = list(block)
        points.append((fmean(at[place] for place in places), mean_of_known(thin[place] for place in places)))
        end = next((place for place in reversed(places) if values[place] is not None), places[-1])
        recent = values[max(0, end + 1 - means.window) : end + 1]
        thick.append((at[end], mean_of_known(recent) if values[end] is not None else math.nan))
    dot = lone(points)
    axes.plot(*zip(*points, strict=True), color=colour, alpha=0.45, linewidth=0.7, marker=dot, clip_on=not dot)
    axes.plot(*zip(*thick, strict=True), color=colour, linewidth=1.9, marker=dot, clip_on=not dot)
    return [_usual_peak([y for _, y in points]), max((y for _, y in thick if not math.isnan(y)), default=0.0)]


def label_panels(
    run: RunData,
    figure: Figure,
    grid: Mapping[int, Axes],
    *,
    top: float,
    least: float = 0.0,
    unit: str,
    names: Sequence[str],
) -> None:
    """Axes' names, the legend of the thick and the thin line (one where both are the same), the scale of colours."""
    low, high = 1.1 * min(least, 0.0), 1.1 * max(top, 0.0)
    next(iter(grid.values())).set_ylim(low, high if high > low else 1.0)  # the panels share it
    figure.supxlabel("local steps, rounds one after another", color=MUTED, fontsize=9)
    figure.supylabel(unit, color=MUTED, fontsize=9)
    lines = [Line2D([], [], color=INK, linewidth=1.9), Line2D([], [], color=INK, alpha=0.5, linewidth=0.8)]
    told = dict(zip(names, lines, strict=True)) if len({*names}) > 1 else {names[0]: lines[0]}
    figure.legend([*told.values()], [*told], loc="outside upper left", ncols=2)
    colour_scale(run, figure, list(grid.values()))


def num_steps(run: RunData) -> int:
    """Steps of the federation; a round is as long as its longest client."""
    return sum(_longest(record) for record in run.rounds)


def client_traces(run: RunData, clients: Collection[int] | None = None) -> dict[int, Trace]:
    """The steps of those of some clients (None: all) that have any; those of all do not fit in memory."""
    traces: dict[int, Trace] = {}
    starts = round_starts(run)
    for record, measured in run.with_signals(clients):
        start = starts[record.round]
        for client in measured:
            trace = traces.setdefault(client.client, Trace())
            trace.at.extend(range(start, start + client.steps))
            trace.abs_g.extend(client.signals.abs_g)
            trace.grad_ip.extend(None if value is None else abs(value) for value in client.signals.grad_ip)
            trace.loss.extend(client.signals.loss)
        for absent in set(record.absent) & set(traces):
            traces[absent].at.append(start)
            traces[absent].abs_g.append(None)
            traces[absent].grad_ip.append(None)
            traces[absent].loss.append(None)
    return traces


def round_starts(run: RunData) -> dict[int, int]:
    """The federation's step with which each round begins."""
    starts, start = {}, 0
    for record in run.rounds:
        starts[record.round] = start
        start += _longest(record)
    return starts


def _longest(record: Round) -> int:
    return max((client.steps for client in record.clients), default=0)


def chosen_clients(run: RunData, clients: Collection[int], *, most: int) -> list[int]:
    """At most so many of them, the most one-sided first: the flagged clients, and others evenly."""
    shares, flagged = label_shares(run), run.flagged
    ordered = sorted(clients, key=lambda client: (-shares.get(client, (0.0, ""))[0], client))
    if len(ordered) <= most:
        return ordered
    chosen = [client for client in ordered if client in flagged][:most]
    others, room = [client for client in ordered if client not in chosen], most - len(chosen)
    evenly = {others[i * (len(others) - 1) // max(room - 1, 1)] for i in range(room)}
    return [client for client in ordered if client in chosen or client in evenly]


def _usual_peak(values: Sequence[float]) -> float:
    """The height that all but one value in fifty stay below."""
    known = [value for value in values if not math.isnan(value)]
    return quantiles(known, n=50, method="inclusive")[-1] if len(known) > 1 else max(known, default=0.0)


def label_shares(run: RunData) -> dict[int, tuple[float, str]]:
    """Per client, the share of its commonest label and that label; clients without labels are left out."""
    shares = {}
    for client in run.clients:
        if own := sum(client.label_counts.values()):
            label = max(client.label_counts, key=lambda label: (client.label_counts[label], label))
            shares[client.client] = (client.label_counts[label] / own, label)
    return shares


def client_colours(run: RunData, clients: Collection[int]) -> dict[int, ColorType]:
    """How one-sided the labels of each of these clients are; all of one colour where labels say nothing."""
    if (norm := _label_norm(run)) is None:
        return dict.fromkeys(clients, BLUE)
    shares = label_shares(run)
    return {client: SKEW(norm(shares.get(client, (0.0, ""))[0])) for client in clients}


def _label_norm(run: RunData) -> BoundaryNorm | None:
    """Five steps from labels in equal shares to a single label; None where labels say nothing."""
    labels = {label for client in run.clients for label in client.label_counts}
    if len(labels) < 2:
        return None
    least = 1 / len(labels)
    return BoundaryNorm([least + (1 - least) * step / 5 for step in range(5)] + [1.0 + 1e-9], SKEW.N)


def colour_scale(run: RunData, figure: Figure, grid: Sequence[Axes]) -> None:
    """The legend of ``client_colours``, above the panels; none where labels say nothing."""
    if (norm := _label_norm(run)) is None:
        return
    bar = figure.colorbar(ScalarMappable(norm, SKEW), ax=grid, location="top", pad=0.02, shrink=0.6, aspect=50)
    bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda share, _: percent_text(share, digits=0)))
    bar.set_label("share of the client's commonest label", color=MUTED)
    bar.outline.set_visible(False)
