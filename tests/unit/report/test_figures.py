"""A run's figures: their curves against the metrics' numbers, and what a reader sees against the drawn boxes."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgb, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle, StepPatch
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from fedzo.errors import RunFolderError
from fedzo.report.client_figures import MAX_BARS, draw_abs_g, draw_federated, draw_labels
from fedzo.report.figures import draw_figures
from fedzo.report.panels import label_shares
from fedzo.report.run_data import load_run
from fedzo.report.style import (
    BLUE,
    INK,
    PAPER,
    Picture,
    house_style,
    keep_apart,
    label_at,
    new_axes,
    page_svg,
    running_mean,
    save_pictures,
)

MakeRun = Callable[..., Path]
Lines = list[dict[str, Any]]


def picture(pictures: list[Picture], name: str) -> Picture:
    return next(picture for picture in pictures if picture.name == name)


def slopes(folder: Path) -> Picture:
    """The figure that stands for the panels where there are too many clients for these."""
    with house_style():
        drawn = draw_abs_g(load_run(folder))
    assert drawn is not None
    return drawn


def curves(figure: Figure) -> list[list[float]]:
    return [[float(y) for y in line.get_ydata()] for line in figure.axes[0].lines]


def test_the_running_mean_skips_what_is_missing() -> None:
    assert running_mean([None, 2.0, None, 4.0, 9.0], window=2) == [None, 2.0, 2.0, 4.0, 6.5]


def test_the_share_of_the_commonest_label(make_run: MakeRun) -> None:
    assert label_shares(load_run(make_run())) == {0: (39 / 40, "0"), 1: (0.5, "1"), 2: (1.0, "1")}


def test_a_finished_run_has_every_figure_with_the_numbers_of_its_metrics(make_run: MakeRun) -> None:
    pictures = draw_figures(load_run(make_run()))

    assert [picture.name for picture in pictures] == [
        "score",
        "loss",
        "bytes",
        "labels",
        "local_steps",
        "local_losses",
        "federated",
    ]
    raw = curves(picture(pictures, "loss").figure)[0]
    assert raw[:4] == pytest.approx([0.8, 0.77, 0.74, 0.71])
    assert raw[4] != raw[4]  # the round whose loss is missing is a gap, not a zero
    totals = sorted(curve[-1] for curve in curves(picture(pictures, "bytes").figure))
    # sums of ten rounds and of the scores after them, per client
    assert totals == pytest.approx([120 / 3, 120 / 3, 2700 / 3, 9900 / 3])
    assert "scored rows 70.0 %" in [text.get_text() for text in picture(pictures, "federated").figure.axes[0].texts]
    bars = picture(pictures, "federated").figure.axes[0].patches
    assert [bar.get_height() for bar in bars] == pytest.approx([0.5, 0.6, 0.7])


@pytest.mark.parametrize(("wire", "title"), [(None, "Bytes per client"), (900, "Bytes on the wire, per client")])
def test_bytes_are_said_to_be_of_the_wire_where_something_went_over_one(
    make_run: MakeRun, wire: int | None, title: str, lines: Lines
) -> None:
    lines = [{**line, "wire_up_bytes": wire} if line["kind"] == "round" else line for line in lines]

    assert picture(draw_figures(load_run(make_run("run", lines=lines))), "bytes").title == title


@pytest.mark.parametrize(
    ("by", "text"),
    [
        ("loss", "The line is dev accuracy; the lowest dev loss chose the best round. The test rows"),
        ("value", "The line is dev accuracy; the highest dev accuracy chose the best round. The test rows"),
        (None, "The line is dev accuracy. The test rows"),
    ],
)
def test_what_chose_the_round_is_what_the_run_was_told(make_run: MakeRun, by: str | None, text: str) -> None:
    run = load_run(make_run())
    run.config["evaluation"] = {"best_by": by}

    assert picture(draw_figures(run), "score").caption.startswith(text)


def test_the_value_chose_the_round_where_no_dev_score_has_a_loss(make_run: MakeRun, lines: Lines) -> None:
    lines = [{**line, "loss": None} if line["kind"] == "score" else line for line in lines]
    run = load_run(make_run("run", lines=lines))
    run.config["evaluation"] = {"best_by": "loss"}

    text = "The line is dev accuracy; the highest dev accuracy chose the best round. The test rows"
    assert picture(draw_figures(run), "score").caption.startswith(text)


def test_without_dev_rows_nothing_chose_a_round(make_run: MakeRun, lines: Lines) -> None:
    lines = [line for line in lines if line.get("split") != "dev"]

    assert picture(draw_figures(load_run(make_run("run", lines=lines))), "score").caption.startswith("The test rows")


def test_the_losses_of_a_calibration_are_no_training_losses(make_run: MakeRun, lines: Lines) -> None:
    next(line for line in lines if line["kind"] == "round")["calibration"] = True

    drawn = picture(draw_figures(load_run(make_run("run", lines=lines))), "loss")

    line = drawn.figure.axes[0].lines[0]
    assert [float(x) for x in line.get_xdata()] == list(range(2, 11))
    assert float(line.get_ydata()[0]) == pytest.approx(0.77)
    assert "calibration round is left out" in drawn.caption


def test_the_slopes_of_all_clients_leave_a_calibration_out_and_show_who_is_flagged(
    make_run: MakeRun, lines: Lines
) -> None:
    next(line for line in lines if line["kind"] == "round")["calibration"] = True
    verdicts = [{"client": c, "flagged": c == 1, "steps": 1, "statistics": {}} for c in range(3)]
    told = {"kind": "step_policy", "seconds": 7.0, "round": 1, "windows": None, "fallback": False, "clients": verdicts}

    drawn = slopes(make_run("run", lines=[*lines, told]))

    axes = drawn.figure.axes[0]
    heights = {float(line.get_ydata()[-1]): line.get_color() for line in axes.lines}
    assert sorted(heights) == [9.0, 10.0, 11.0]  # |g| of client 1 is 10
    assert [height for height, colour in heights.items() if colour == INK] == [10.0]
    assert all(float(line.get_xdata()[0]) == 2 for line in axes.lines)
    assert axes.get_ylim()[1] >= 11.0
    assert "Flagged clients are dark." in drawn.caption


def test_equal_clients_are_not_called_unlike(make_run: MakeRun, lines: Lines) -> None:
    lines[0]["clients"] = [{**client, "label_counts": {"0": 10, "1": 10}} for client in lines[0]["clients"]]

    alike = picture(draw_figures(load_run(make_run("run", lines=lines))), "labels").caption
    unlike = picture(draw_figures(load_run(make_run("unlike"))), "labels").caption
    assert alike == "Rows per client and label: 20 to 40 rows a client."
    assert unlike == (
        "Rows per client and label: 20 to 40 rows a client. Up to 100 % of a client's rows have the same label (client "
        "2). Unequal mixes mean non-IID clients."
    )


def test_of_a_single_round_there_are_points(make_run: MakeRun, lines: Lines) -> None:
    lines = [line for line in lines if line["kind"] == "setup" or line.get("round") == 0]

    folder = make_run("short", lines=lines)
    pictures = [*draw_figures(load_run(folder)), slopes(folder)]

    for name in ("loss", "bytes", "abs_g"):
        assert any(drawn.get_marker() == "o" for drawn in picture(pictures, name).figure.axes[0].lines), name


def test_a_run_without_rounds_draws_only_what_it_knows(make_run: MakeRun, lines: Lines) -> None:
    lines = [line for line in lines if line["kind"] == "setup"]

    assert [p.name for p in draw_figures(load_run(make_run("short", lines=lines)))] == ["labels"]


def test_a_page_figure_is_well_formed_and_keeps_hostile_text_as_text(make_run: MakeRun) -> None:
    with house_style():
        figure, axes = new_axes()
        axes.set_xlabel("<script>$x$")
    svg = page_svg(Picture("x", r'a "title" \g<9>', "", figure))

    root = ElementTree.fromstring(svg)

    assert root.get("aria-label") == r'a "title" \g<9>'
    assert root.get("width") is None
    assert "<script>$x$" in [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "var(--muted, #6b7280)" in svg


def test_figures_that_cannot_be_written_say_where(make_run: MakeRun, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file, where the folder of figures should be")

    with pytest.raises(RunFolderError, match=r"taken: the report must be writable here, got 'File exists'\."):
        save_pictures([], tmp_path / "taken")


def texts_on(figure: Figure) -> list[tuple[str, Bbox]]:
    """Every text that is drawn, with the box that it takes; marks beyond the ends of an axis are not drawn."""
    figure.canvas.draw()
    hidden: set[int] = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            slack = 1e-6 * (high - low)
            for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
                if not (axes.get_visible() and low - slack <= tick.get_loc() <= high + slack):
                    hidden |= {id(tick.label1), id(tick.label2)}
    drawn = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    return [(text.get_text(), text.get_window_extent()) for text in drawn if id(text) not in hidden]


def collisions(figure: Figure) -> list[tuple[str, str]]:
    """Texts that cover one another, and texts that leave the figure."""
    boxes = texts_on(figure)
    found = [
        (one, other)
        for (one, a), (other, b) in combinations(boxes, 2)
        if min(a.x1, b.x1) - max(a.x0, b.x0) > 0.5 and min(a.y1, b.y1) - max(a.y0, b.y0) > 0.5
    ]
    edge = figure.bbox
    found += [
        (text, "the edge")
        for text, box in boxes
        if box.x0 < -1 or box.y0 < -1 or box.x1 > edge.x1 + 1 or box.y1 > edge.y1 + 1
    ]
    return found


def short_run(
    make_run: MakeRun, whole: Lines, *, rounds: int, best: int, scores: tuple[float, float], dev: float
) -> Path:
    """A run of so few rounds, whose best round may be that before training, and whose scores may be alike."""
    lines = [line for line in whole if line["kind"] != "score" and line.get("round", 0) < rounds]
    for line in lines:
        if line["kind"] == "summary":
            line.update(rounds=rounds, best_round=best)
    template = next(line for line in whole if line["kind"] == "score")
    for split, at, value in [
        ("test", 0, scores[0]),
        *(("dev", at, dev) for at in range(rounds + 1)),
        *([("test", best, scores[1])] if best else []),
    ]:
        lines.insert(-1, {**template, "split": split, "round": at, "value": value})
    federated = next(line for line in whole if line["kind"] == "federated_score")
    lines.insert(-1, {**federated, "round": rounds})
    return make_run(f"short-{rounds}-{best}-{scores}-{dev}", lines=lines)


@pytest.mark.parametrize("rounds", [1, 2, 8])
@pytest.mark.parametrize("best", [0, 1])
@pytest.mark.parametrize("scores", [(0.5, 0.505), (0.0, 1.0)])
def test_no_label_of_a_short_run_covers_another(
    make_run: MakeRun, rounds: int, best: int, scores: tuple[float, float], lines: Lines
) -> None:
    run = load_run(short_run(make_run, lines, rounds=rounds, best=best, scores=scores, dev=scores[1]))

    for drawn in draw_figures(run):
        assert (drawn.name, collisions(drawn.figure)) == (drawn.name, [])


@pytest.mark.parametrize("rounds", [1, 2, 3, 10])
def test_axes_of_rounds_steps_and_rows_are_marked_at_whole_numbers(
    make_run: MakeRun, rounds: int, lines: Lines
) -> None:
    run = load_run(short_run(make_run, lines, rounds=rounds, best=1, scores=(0.5, 0.6), dev=0.5))
    pictures = [*draw_figures(run), *([drawn] if (drawn := draw_abs_g(run)) else [])]

    seen = set()
    for drawn in pictures:
        for axes in drawn.figure.axes:
            name = axes.get_xlabel() or (drawn.figure._supxlabel.get_text() if drawn.figure._supxlabel else "")
            if name in {"rounds", "training rows", "local steps, rounds one after another"} and axes.get_subplotspec():
                seen.add(name)
                marks = [float(mark) for mark in axes.xaxis.get_majorticklocs()]
                assert marks == [round(mark) for mark in marks], (drawn.name, marks)
    assert len(seen) == 3


@pytest.mark.parametrize("count", [3, 16, 17, 27, 40])
def test_many_clients_that_are_nearly_equal_have_labels_apart(make_run: MakeRun, count: int, lines: Lines) -> None:
    federated = next(line for line in lines if line["kind"] == "federated_score")
    federated["clients"] = [
        {"client": 100 + c, "metric": "accuracy", "value": 0.02 + c / 1000, "loss": 0.5, "num_examples": 3}
        | {"per_class": {}}
        for c in range(count)
    ]
    lines[0]["clients"] = [{**lines[0]["clients"][0], "client": 100 + c} for c in range(count)]

    pictures = draw_figures(load_run(make_run("many", lines=lines)))

    for name in ("federated", "labels"):
        assert (name, collisions(picture(pictures, name).figure)) == (name, [])


def test_long_names_of_classes_stay_within_the_figure(make_run: MakeRun, lines: Lines) -> None:
    lines[0]["clients"] = [{**c, "label_counts": {str(label): 10 for label in range(4)}} for c in lines[0]["clients"]]
    run = load_run(make_run("run", lines=lines))
    names = [f"the customer asks for the delivery of a card that is late, {label}" for label in range(4)]
    run.config["task"]["candidates"] = names

    drawn = picture(draw_figures(run), "labels").figure

    assert collisions(drawn) == []
    legend = drawn.legends[0].get_window_extent()
    assert drawn.bbox.x0 <= legend.x0
    assert legend.x1 <= drawn.bbox.x1
    shown = [text.get_text() for text in drawn.legends[0].get_texts()]
    assert shown == [f"{names[0][:31]}…"] * 4


def test_the_bars_of_many_clients_are_one_shape_a_label_and_keep_all_rows(make_run: MakeRun, lines: Lines) -> None:
    counts = [{str(label): 1 + (k * (label + 3)) % 11 for label in range(8)} for k in range(1003)]
    lines[0]["clients"] = [
        {"client": k, "num_train": sum(own.values()), "num_heldout": 3, "label_counts": own}
        for k, own in enumerate(counts)
    ]
    with house_style():
        drawn = draw_labels(load_run(make_run("run", lines=lines)))

    assert drawn is not None
    axes = drawn.figure.axes[0]
    shapes = [patch.get_data() for patch in axes.patches if isinstance(patch, StepPatch)]
    rows = [float(np.sum((np.asarray(top) - np.asarray(base)) * np.diff(edges))) for top, edges, base in shapes]
    assert rows == pytest.approx([sum(own[str(label)] for own in counts) for label in range(8)])
    assert all(len(top) <= MAX_BARS for top, _, _ in shapes)
    assert axes.get_xlabel() == "1,003 clients, largest first, means of 5"
    svg = page_svg(drawn)
    assert len(svg) < 400_000
    assert "var(--c8, #4d4d4d)" in svg  # of the eighth label


def test_the_worst_of_many_clients_has_a_bar_of_its_own(make_run: MakeRun, lines: Lines) -> None:
    federated = next(line for line in lines if line["kind"] == "federated_score")
    values = [0.25 + k / 2048 for k in range(1003)]
    told = {"metric": "accuracy", "loss": 0.5, "num_examples": 3, "per_class": {}}
    federated["clients"] = [{**told, "client": k, "value": value} for k, value in enumerate(values)]
    run = load_run(make_run("run", lines=lines))
    with house_style():
        drawn = draw_federated(run.first, name="federated", num_clients=1003)

    assert drawn is not None
    worst, *others = (bar for bar in drawn.figure.axes[0].patches if isinstance(bar, Rectangle))
    assert (worst.get_x(), worst.get_width(), worst.get_height()) == (-0.5, 1.0, 0.25)
    assert len(others) <= MAX_BARS
    assert {bar.get_facecolor() for bar in others} == {to_rgba(BLUE)}
    assert sum(bar.get_width() * bar.get_height() for bar in others) == pytest.approx(sum(values[1:]))
    assert others[-1].get_x() + others[-1].get_width() == pytest.approx(1002.5)
    assert drawn.figure.axes[0].get_xlabel() == "client, worst first, others as means of 5"


def test_words_of_a_figure_have_contrast_on_white(make_run: MakeRun) -> None:
    """Of 4.5 : 1, by WCAG 2."""
    for drawn in draw_figures(load_run(make_run())):
        for text in drawn.figure.findobj(Text):
            if text.get_text().strip() and to_hex(text.get_color()) != PAPER:  # as on bars
                parts = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in to_rgb(text.get_color())]
                assert 1.05 / (float(np.dot([0.2126, 0.7152, 0.0722], parts)) + 0.05) >= 4.5, text.get_text()


def test_labels_of_one_place_are_stacked() -> None:
    with house_style():
        figure, axes = new_axes()
        axes.plot([0, 1], [0, 1])
        labels = [label_at(axes, 1, 1, f"line {number}") for number in range(8)]
        keep_apart(figure, labels)

    assert collisions(figure) == []
    assert len({round(label.get_window_extent().x0) for label in labels}) == 1


def test_a_count_of_one_has_a_singular(make_run: MakeRun, lines: Lines) -> None:
    run = load_run(short_run(make_run, lines, rounds=1, best=1, scores=(0.5, 0.6), dev=0.5))

    captions = " ".join(drawn.caption for drawn in draw_figures(run))

    assert "over the first round, " in captions
    assert "in 1 round (mean over 3 clients)" in captions
    assert "After 1 round, on each client" in captions
    assert not re.search(r"\b1 (rounds|rows|clients)\b", captions)
