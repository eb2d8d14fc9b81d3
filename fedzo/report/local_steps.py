"""The local steps of each client in a panel of its own, from even to one-sided labels: extreme clients go quiet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from matplotlib.axes import Axes

from fedzo.records.metrics import ClientVerdict
from fedzo.report.format import last, number_text
from fedzo.report.panels import (
    MAX_PANELS,
    Means,
    Trace,
    chosen_clients,
    client_colours,
    client_panels,
    client_traces,
    draw_client,
    label_panels,
    round_starts,
)
from fedzo.report.run_data import RunData
from fedzo.report.style import GRID, INK, Picture


def shows_everyone(run: RunData) -> bool:
    """Whether the figure has a panel for every client that has taken a step."""
    return 0 < len(_clients(run, "steps")) <= MAX_PANELS


def local_traces(run: RunData) -> dict[int, Trace]:
    """The steps of the clients that these figures draw: one reading of a file that may be long."""
    return client_traces(run, {*_drawn(run, "steps"), *_drawn(run, "loss")})


def draw_local_steps(run: RunData, traces: Mapping[int, Trace]) -> Picture | None:
    """|GradIP| and |g| of every client, or of ``MAX_PANELS``, the flagged among them; call in house style.

    Args:
        run: The run.
        traces: Its ``local_traces``.
    """
    traces = {client: traces[client] for client in _drawn(run, "steps")}
    if all(value is None for trace in traces.values() for value in trace.abs_g):
        return None  # clients that send vectors measure no g
    verdicts = run.verdicts
    windows = (run.decision.windows if run.decision else None) or {}
    starts, unit = round_starts(run), _unit(traces)
    figure, grid = client_panels(run, traces, height=1.6 if verdicts else 1.4)
    colours, means, peaks = client_colours(run, grid), Means.of(run), list[float]()
    for client, axes in grid.items():
        trace = traces[client]
        thin = [v if v is None else v / unit for v in trace.grad_ip] if unit else trace.abs_g
        peaks += draw_client(axes, trace.at, thin, trace.abs_g, colour=colours[client], means=means)
        if verdict := verdicts.get(client):
            _tell(axes, verdict)
            if verdict.flagged:
                _mark(axes, verdict, early=_stops_early(run, verdict))
                since = 0 if windows else starts.get(run.flagged_from[client], 0)
                if since:
                    axes.axvline(since, color=INK, linewidth=1, linestyle="--")
        _shade(axes, windows)
    thin_name = f"|GradIP|, divided by {number_text(unit)}" if unit else "|g|"
    names = [f"|g|, mean of {last(means.window)}" if means.window > 1 else "|g|", thin_name + means.of_thin]
    label_panels(run, figure, grid, top=max(peaks), unit="|g|, loss per unit step", names=names)
    caption = _caption(run, drawn=len(grid), total=len(_clients(run, "steps")), unit=unit)
    return Picture("local_steps", "Local steps per client", caption, figure)


def draw_local_losses(run: RunData, traces: Mapping[int, Trace]) -> Picture | None:
    """The loss of every client's batches before each local step, in the same panels; arguments as above."""
    traces = {client: traces[client] for client in _drawn(run, "loss")}
    traces = {client: trace for client, trace in traces.items() if any(value is not None for value in trace.loss)}
    if not traces:
        return None
    figure, grid = client_panels(run, traces, height=1.2)
    colours, means, peaks = client_colours(run, grid), Means.of(run), list[float]()
    for client, axes in grid.items():
        trace = traces[client]
        peaks += draw_client(axes, trace.at, trace.loss, trace.loss, colour=colours[client], means=means)
    thick_name = f"mean of {last(means.window)}" if means.window > 1 else "loss of a batch"
    names = [thick_name, f"loss of a batch{means.of_thin}"]
    least = min(value for trace in traces.values() for value in trace.loss if value is not None)
    unit = run.loss_unit
    label_panels(run, figure, grid, top=max(peaks), least=least, unit=f"loss ({unit})", names=names)
    zero = "A loss near 0 means that the client has learned its rows. " if unit == "nats" else ""
    caption = (
        f"The loss of each client's batch before every local step. {zero}A rising loss means that the steps of other "
        "clients hurt this client."
    )
    return Picture("local_losses", "Loss per client", caption, figure)


def _drawn(run: RunData, number: Literal["steps", "loss"]) -> list[int]:
    """The clients that get a panel for a number."""
    return chosen_clients(run, _clients(run, number), most=MAX_PANELS)


def _clients(run: RunData, number: Literal["steps", "loss"]) -> set[int]:
    """The clients that have a number in any round."""
    told = (client for record in run.rounds for client in record.clients)
    return {client.client for client in told if getattr(client, number) is not None}


def _unit(traces: dict[int, Trace]) -> float:
    """Mean |GradIP| over mean |g|, by which GradIP is divided to share the axis; 0 where no GradIP is known."""
    pairs = [pair for trace in traces.values() for pair in zip(trace.grad_ip, trace.abs_g, strict=True)]
    known = [(grad_ip, g) for grad_ip, g in pairs if grad_ip is not None and g is not None]
    total = sum(g for _, g in known)
    return sum(grad_ip for grad_ip, _ in known) / total if total else 0.0


def _stops_early(run: RunData, verdict: ClientVerdict) -> bool:
    """Whether the client takes fewer steps than the others; with T = 1 and with too many flagged it does not."""
    most = run.setting("fl", "local_steps")
    fallback = run.decision is not None and run.decision.fallback
    return not fallback and (most is None or verdict.steps < most)


def _tell(axes: Axes, verdict: ClientVerdict) -> None:
    """The statistics in the title."""
    known = [f"{name} {value:.3g}" for name, value in verdict.statistics.items() if value is not None]
    pairs = [", ".join(known[low : low + 2]) for low in range(0, len(known), 2)]
    weight = "bold" if verdict.flagged else "normal"
    axes.set_title("\n".join([axes.get_title(loc="left"), *pairs]), color=INK, pad=3, fontsize=8, fontweight=weight)


def _mark(axes: Axes, verdict: ClientVerdict, *, early: bool) -> None:
    """A frame, and what follows from the verdict where a quiet client leaves room."""
    for spine in axes.spines.values():
        spine.set(visible=True, color=INK, linewidth=1.2)
    text = f"{'stopped early' if early else 'flagged'}:\nT_k = {verdict.steps}"
    axes.annotate(text, (0.97, 0.94), xycoords="axes fraction", ha="right", va="top", color=INK, fontsize=8)


def _shade(axes: Axes, windows: Mapping[str, tuple[int, int]]) -> None:
    """The phases that the step policy compared, in steps of the first round."""
    for first, end in windows.values():
        axes.axvspan(first, end, color=GRID, linewidth=0, zorder=0)


def _caption(run: RunData, *, drawn: int, total: int, unit: float) -> str:
    parts = [
        "All local steps of each client, most one-sided labels first; all panels share their axes.",
        "g is the scalar of a step: the slope of the client's loss along the step's direction.",
    ]
    if unit:
        parts.append(
            "GradIP is the inner product of a step's estimated gradient and the gradient by which the mask was chosen. "
            "With one probe a step, GradIP is g times a number that depends only on the seed: the same curve with "
            "more noise. The axis cuts spikes."
        )
    parts.append(
        "A line that falls to 0: the client's loss hardly changes any more, for example because it has learned its "
        "only label."
    )
    if run.decision and run.decision.windows:
        windows = " and ".join(f"{name} ({first} to {end})" for name, (first, end) in run.decision.windows.items())
        parts.append(f"Grey: the steps that were compared, {windows}.")
    if flagged := run.flagged:
        where = "framed" if len(flagged) <= MAX_PANELS else "framed where shown"
        sequential = run.decision and not run.decision.windows and any(run.flagged_from.values())
        when = ", from the dashed line on" if sequential else ""
        parts.append(f"Flagged ({where}{when}): {', '.join(map(str, flagged))}.")
    if run.decision and run.decision.fallback:
        parts.append("Too many to stop any of them early.")
    if drawn < total:
        parts.append(f"{drawn} of {total} clients are shown: the flagged ones, and others evenly over the skew.")
    return " ".join(parts)
