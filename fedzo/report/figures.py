"""The figures of one run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import accumulate

from matplotlib.axes import Axes
from matplotlib.text import Annotation

from fedzo.records.metrics import CentralScore
from fedzo.report.client_figures import draw_abs_g, draw_federated, draw_labels
from fedzo.report.format import bytes_text, change_text, counted, first, last, number_text, score_text
from fedzo.report.local_steps import draw_local_losses, draw_local_steps, local_traces, shows_everyone
from fedzo.report.run_data import RunData, Scored
from fedzo.report.style import (
    BLUE,
    GREEN,
    ORANGE,
    PAPER,
    Picture,
    bytes_axis,
    gaps,
    house_style,
    keep_apart,
    label_at,
    lone,
    new_axes,
    percent_axis,
    running_mean,
    whole_numbers,
    window_of,
)


def draw_figures(run: RunData) -> list[Picture]:
    """Draw every figure that the run's records allow, in the order of the page."""
    with house_style():
        slopes, traces = None if shows_everyone(run) else draw_abs_g(run), local_traces(run)
        drawn = [
            _scores(run, run.first, name="score"),
            _loss(run),
            _bytes(run),
            draw_labels(run),
            draw_local_steps(run, traces),
            draw_local_losses(run, traces),
            slopes,
            draw_federated(run.first, name="federated", num_clients=len(run.clients)),
        ]
        for other in run.scored[1:]:
            drawn.append(_scores(run, other, name=f"score-{other.evaluator}"))
            drawn.append(draw_federated(other, name=f"federated-{other.evaluator}", num_clients=len(run.clients)))
    return [picture for picture in drawn if picture is not None]


def _rounds_axis(axes: Axes, num_rounds: int) -> None:
    axes.set_xlim(-0.02 * num_rounds, max(num_rounds, 1))
    axes.set_xlabel("rounds")
    axes.xaxis.set_major_locator(whole_numbers(8))


def _loss(run: RunData) -> Picture | None:
    losses = [record.loss for record in run.trained]
    measured = [loss for loss in losses if loss is not None]
    if not measured:
        return None
    window = window_of(len(losses))
    rounds, means = [record.round + 1 for record in run.trained], running_mean(losses, window=window)
    figure, axes = new_axes()
    if window > 1:
        axes.plot(rounds, gaps(losses), color=BLUE, alpha=0.3, linewidth=1, label="each round")
        axes.plot(rounds, gaps(means), color=BLUE, label=f"mean of {last(window)}")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0)  # above the lines
    else:
        axes.plot(rounds, gaps(losses), color=BLUE, marker="o", markersize=4, clip_on=False)
    axes.set_ylabel(f"training loss ({run.loss_unit})")
    _rounds_axis(axes, rounds[-1])
    head, tail = statistics.fmean(measured[:window]), statistics.fmean(measured[-window:])
    caption = (
        f"Mean loss of the clients' batches before each step: {number_text(head)} over {first(window, 'round')}, "
        f"{number_text(tail)} over {last(window)}. Single rounds are noisy."
    )
    if window > 1:
        caption += " The thick line shows the trend."
    if len(run.trained) < len(run.rounds):
        caption += " The calibration round is left out, because it did not move the model."
    return Picture("loss", "Training loss", caption, figure)


def _scores(run: RunData, scored: Scored, *, name: str) -> Picture | None:
    dev, (before, after) = scored.dev, scored.test
    if (known := dev[0] if dev else before) is None:
        return None
    metric = known.metric
    figure, axes = new_axes()
    labels = []
    if dev:
        axes.plot([s.round for s in dev], [s.value for s in dev], color=BLUE, marker="o", markersize=4, clip_on=False)
        labels.append(label_at(axes, dev[-1].round, dev[-1].value, "dev", color=BLUE))
    end = max([record.round + 1 for record in run.rounds] + [s.round for s in dev], default=0)
    _rounds_axis(axes, end)
    values = [s.value for s in dev] + [s.value for s in (before, after) if s]
    margin = max(0.06 * (max(values) - min(values)), 0.02)
    low, high = min(values) - 2 * margin, max(values) + 2 * margin
    share = min(values) >= 0 and max(values) <= 1
    axes.set_ylim(max(0.0, low) if share else low, min(1.0, high) if share else high)
    if before:
        labels.append(_diamond(axes, 0, before, "before", dev=dev, end=end))
    if after:
        best = run.summary.best_round if run.summary else None
        labels.append(_diamond(axes, after.round if best is None else best, after, "after", dev=dev, end=end))
    axes.set_ylabel(metric)
    percent_axis(axes, metric)
    keep_apart(figure, labels)
    return Picture(name, f"{metric.capitalize()} over rounds", _scores_caption(run, scored, metric), figure)


def _diamond(
    axes: Axes, place: int, score: CentralScore, when: str, *, dev: Sequence[CentralScore], end: int
) -> Annotation:
    """Mark a score of the test rows, filled ``after`` training; returns its label, away from the line of ``dev``."""
    filled = when == "after"
    axes.plot(
        place,
        score.value,
        marker="D",
        markersize=8,
        linestyle="none",
        clip_on=False,
        zorder=5,
        color=ORANGE,
        markerfacecolor=ORANGE if filled else PAPER,
        markeredgewidth=1.8,
    )
    left = filled and place > 0.5 * end
    below = any(s.value > score.value for s in dev if abs(s.round - place) < 0.2 * max(end, 1))
    floor, top = axes.get_ylim()
    below = below and score.value > floor + 0.12 * (top - floor)  # the axis has its own labels below
    return label_at(
        axes,
        place,
        score.value,
        f"test {when}  {score_text(score.metric, score.value)}",
        xytext=(-12 if left else 12, -3 if below else 3),
        color=ORANGE,
        ha="right" if left else "left",
        va="top" if below else "bottom",
        fontweight="bold",
    )


def _scores_caption(run: RunData, scored: Scored, metric: str) -> str:
    dev, (before, after) = scored.dev, scored.test
    caption = "The test rows were scored only at the diamonds." if before else "No test rows were scored."
    if dev:
        best_value = f"{'lowest' if dev[0].lower_is_better else 'highest'} dev {metric}"
        best_loss = "lowest dev loss" if any(s.loss is not None for s in dev) else best_value  # as ``best_dev_score``
        by = {"loss": best_loss, "value": best_value}.get(run.setting("evaluation", "best_by"))
        chosen = f"; the {by} chose the best round" if by and scored == run.first else ""
        caption = f"The line is dev {metric}{chosen}. {caption}"
    if before and after:
        caption = f"{caption} Test: {change_text(metric, before.value, after.value)}."
    return caption


def _bytes(run: RunData) -> Picture | None:
    if not run.rounds:
        return None
    rounds = [*run.num_bytes("payload_up_bytes")]
    num_clients = max(len(run.clients), 1)
    lines = [
        ("wire down", "wire_down_bytes", GREEN, "--"),
        ("wire up", "wire_up_bytes", GREEN, "-"),
        ("messages down", "message_down_bytes", ORANGE, "--"),
        ("messages up", "message_up_bytes", ORANGE, "-"),
        ("payload down", "payload_down_bytes", BLUE, "--"),
        ("payload up", "payload_up_bytes", BLUE, "-"),
    ]
    figure, axes = new_axes()
    ends = []
    for name, kind, colour, dash in lines:
        totals = list(accumulate(amount / num_clients for amount in run.num_bytes(kind).values()))
        if totals[-1] > 0:
            axes.plot(rounds, totals, color=colour, linestyle=dash, marker=lone(rounds), clip_on=len(rounds) > 1)
            ends.append((rounds[-1], totals[-1], f"{name} {bytes_text(totals[-1])}", colour))
    if not ends:
        return None
    low, high = min(end[1] for end in ends), max(end[1] for end in ends)
    axes.set_ylim(bottom=0)
    if high > 20 * low:
        axes.set_yscale("log")
        axes.set_ylim(max(low / max(len(rounds), 10) / 1.6, 0.5), 2 * high)
        axes.minorticks_off()
    bytes_axis(axes.yaxis)
    axes.set_ylabel("total bytes per client" + (" (log scale)" if high > 20 * low else ""))
    _rounds_axis(axes, rounds[-1])
    keep_apart(figure, [label_at(axes, x, y, text, color=colour) for x, y, text, colour in ends])
    up = sum(run.num_bytes("payload_up_bytes").values()) / num_clients
    caption = (
        f"A client sent {bytes_text(up)} of payload in {counted(len(run.rounds), 'round')} "
        f"(mean over {counted(num_clients, 'client')}). "
        "Payload: the bytes of the algorithm's numbers. Messages: payload and set-up in Flower's message format."
    )
    if any(scored.federated for scored in run.scored):
        caption += " Clients' scores count as messages."
    has_wire = any(record.wire_up_bytes for record in run.rounds)
    if has_wire:
        caption += " The wire adds HTTP and the polling of clients for work."
    return Picture("bytes", "Bytes on the wire, per client" if has_wire else "Bytes per client", caption, figure)
