"""The local steps of each client in a panel of its own, from even to one-sided labels: extreme clients go quiet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, quantiles

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fedzo.report.format import number_text, percent_text
from fedzo.report.records import ClientVerdict
from fedzo.report.run_data import RunData
from fedzo.report.series import label_shares, running_mean
from fedzo.report.style import BLUE, GRID, INK, MUTED, SKEW, Picture, panel_grid

MAX_PANELS = 16
MAX_POINTS = 150  # of a line; a page must stay small
MAX_TITLE = 24  # letters that fit above a panel
Line = tuple[list[float], list[float]]


@dataclass(frozen=True, slots=True)
class _Trace:
    """A client's local steps; ``at`` numbers those of the federation, so that panels agree on when a step was."""

    at: list[int] = field(default_factory=list)
    abs_g: list[float | None] = field(default_factory=list)
    grad_ip: list[float | None] = field(default_factory=list)


def shows_everyone(run: RunData) -> bool:
    """Whether the figure has a panel for every client that has taken a step."""
    return 0 < len(_traces(run)) <= MAX_PANELS


def draw_local_steps(run: RunData) -> Picture | None:
    """|GradIP| and |g| of every client, or of ``MAX_PANELS`` spread evenly over the label skew; call in house style."""
    traces, shares = _traces(run), label_shares(run)
    if not traces:
        return None
    clients = sorted(traces, key=lambda client: (-shares.get(client, (0.0, ""))[0], client))
    if len(clients) > MAX_PANELS:
        clients = [clients[i * (len(clients) - 1) // (MAX_PANELS - 1)] for i in range(MAX_PANELS)]
    end = max(trace.at[-1] + 1 for trace in traces.values())
    window, unit, norm = max(1, min(25, end // 8)), _unit(traces), _colours(run)
    verdicts = {verdict.client: verdict for verdict in run.selection.clients} if run.selection else {}
    windows = run.selection.windows if run.selection else {}
    figure, grid = panel_grid(len(clients), head=1.2, height=1.6 if verdicts else 1.4)
    peaks: list[float] = []
    for axes, client in zip(grid, clients, strict=True):
        trace, (share, label) = traces[client], shares.get(client, (0.0, ""))
        colour = SKEW(norm(share)) if norm else BLUE
        thin = _thinned(trace.at, [v if v is None else v / unit for v in trace.grad_ip] if unit else trace.abs_g)
        means = running_mean(trace.abs_g, window=window)
        thick = _thinned(
            trace.at, [mean if g is not None else None for mean, g in zip(means, trace.abs_g, strict=True)]
        )
        axes.plot(*thin, color=colour, alpha=0.45, linewidth=0.7)
        axes.plot(*thick, color=colour, linewidth=1.9)
        peaks += [_usual_peak(thin[1]), max((mean for mean in means if mean is not None), default=0.0)]
        labels = f": {percent_text(share, digits=0)} {run.class_name(label)}" if label else ""
        axes.set_title(_shortened(f"client {client}{labels}"), color=INK, pad=3, fontsize=8)
        if client in verdicts and verdicts[client].flagged:
            _mark(axes, verdicts[client], early=_stops_early(run, verdicts[client]))
    for axes in grid:
        axes.set_xlim(0, end)
        axes.set_ylim(0, 1.1 * max(peaks) or 1.0)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10], prune="upper"))  # panels touch
        axes.yaxis.set_major_locator(MaxNLocator(3))
        _shade(axes, windows)
    figure.supxlabel("local steps, rounds one after another", color=MUTED, fontsize=9)
    figure.supylabel("|g|, loss per unit step", color=MUTED, fontsize=9)
    lines = [Line2D([], [], color=INK, linewidth=1.9), Line2D([], [], color=INK, alpha=0.5, linewidth=0.8)]
    names = [f"|g|, mean of the last {window}", f"|GradIP|, divided by {number_text(unit)}" if unit else "|g|"]
    figure.legend(lines, names, loc="outside upper left", ncols=2)
    if norm:
        _scale(figure, grid, norm)
    caption = _caption(run, drawn=len(clients), total=len(traces), unit=unit)
    return Picture("local_steps", "Local steps per client", caption, figure)


def _traces(run: RunData) -> dict[int, _Trace]:
    """The steps of every client that has any; a round is as long as its longest client."""
    traces: dict[int, _Trace] = {}
    start = 0
    for record in run.rounds:
        longest = 0
        for client in record.clients:
            if client.signals is None:
                continue
            steps = len(client.signals.abs_g)
            longest = max(longest, steps)
            trace = traces.setdefault(client.client, _Trace())
            trace.at.extend(range(start, start + steps))
            trace.abs_g.extend(client.signals.abs_g)
            trace.grad_ip.extend(None if value is None else abs(value) for value in client.signals.grad_ip)
        for absent in set(record.absent) & set(traces):
            traces[absent].at.append(start)
            traces[absent].abs_g.append(None)
            traces[absent].grad_ip.append(None)
        start += longest
    return traces


def _unit(traces: dict[int, _Trace]) -> float:
    """Mean |GradIP| over mean |g|, by which GradIP is divided to share the axis; 0 where no GradIP is known."""
    pairs = [pair for trace in traces.values() for pair in zip(trace.grad_ip, trace.abs_g, strict=True)]
    known = [(grad_ip, g) for grad_ip, g in pairs if grad_ip is not None and g is not None]
    total = sum(g for _, g in known)
    return sum(grad_ip for grad_ip, _ in known) / total if total else 0.0


def _thinned(at: Sequence[int], values: Sequence[float | None]) -> Line:
    """At most ``MAX_POINTS`` points, each the mean of neighbouring steps; nan where none of them is known."""
    size = -(-len(at) // MAX_POINTS)
    parts = [slice(low, low + size) for low in range(0, len(at), size)]
    known = [[value for value in values[part] if value is not None] for part in parts]
    return [fmean(at[part]) for part in parts], [fmean(some) if some else float("nan") for some in known]


def _usual_peak(values: Sequence[float]) -> float:
    """The height that all but one value in fifty stay below."""
    known = [value for value in values if value == value]
    return quantiles(known, n=50, method="inclusive")[-1] if len(known) > 1 else max(known, default=0.0)


def _colours(run: RunData) -> BoundaryNorm | None:
    """Five steps from labels in equal shares to a single label; None where labels say nothing."""
    labels = {label for client in run.setup.clients for label in client.label_counts} if run.setup else set()
    if len(labels) < 2:
        return None
    least = 1 / len(labels)
    return BoundaryNorm([least + (1 - least) * step / 5 for step in range(5)] + [1.0 + 1e-9], SKEW.N)


def _scale(figure: Figure, grid: Sequence[Axes], norm: BoundaryNorm) -> None:
    bar = figure.colorbar(ScalarMappable(norm, SKEW), ax=grid, location="top", pad=0.02, shrink=0.6, aspect=50)
    bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda share, _: percent_text(share, digits=0)))
    bar.set_label("rows with the client's commonest label", color=MUTED)
    bar.outline.set_visible(False)


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_TITLE else text[: MAX_TITLE - 1].rstrip() + "…"


def _stops_early(run: RunData, verdict: ClientVerdict) -> bool:
    """Whether the client takes fewer steps than the others; with T = 1 and with too many flagged it does not."""
    most = run.setting("fl", "local_steps")
    fallback = run.selection is not None and run.selection.fallback
    return not fallback and (most is None or verdict.steps < most)


def _mark(axes: Axes, verdict: ClientVerdict, *, early: bool) -> None:
    """A frame, the statistics in the title, and what follows from them where a quiet client leaves room."""
    known = [f"{name} {value:.3g}" for name, value in verdict.statistics.items() if value is not None]
    pairs = [", ".join(known[low : low + 2]) for low in range(0, len(known), 2)]
    axes.set_title("\n".join([axes.get_title(loc="left"), *pairs]), color=INK, pad=3, fontsize=8, fontweight="bold")
    for spine in axes.spines.values():
        spine.set(visible=True, color=INK, linewidth=1.2)
    text = f"{'stopped early' if early else 'flagged'}:\nT_k = {verdict.steps}"
    axes.annotate(text, (0.97, 0.94), xycoords="axes fraction", ha="right", va="top", color=INK, fontsize=8)


def _shade(axes: Axes, windows: Mapping[str, tuple[int, int]]) -> None:
    """The phases that the selection compared, in steps of the first round."""
    for first, end in windows.values():
        axes.axvspan(first, end, color=GRID, linewidth=0, zorder=0)


def _caption(run: RunData, *, drawn: int, total: int, unit: float) -> str:
    parts = ["Every local step that a client took, most one-sided labels first; all panels share their axes."]
    if unit:
        parts.append(
            "GradIP is g times a number that depends on the seed alone: the same course with more noise, its highest "
            "spikes cut."
        )
    parts.append(
        "A line that falls to nothing is a client whose loss hardly changes any more, such as one that has learned its "
        "only label."
    )
    if run.selection and run.selection.windows:
        windows = " and ".join(f"{name} ({first} to {end})" for name, (first, end) in run.selection.windows.items())
        parts.append(f"Grey: the steps that were compared, {windows}.")
    flagged = [verdict.client for verdict in run.selection.clients if verdict.flagged] if run.selection else []
    if flagged:
        parts.append(f"Flagged (framed): {', '.join(map(str, flagged))}.")
    if run.selection and run.selection.fallback:
        parts.append("They are more than may be stopped early, so all clients take fewer steps.")
    if drawn < total:
        parts.append(f"{drawn} of {total} clients are drawn, evenly over the skew.")
    return " ".join(parts)
