"""One look for all figures, and their way into files and pages.

Figures are drawn in the light palette below. For a page, each palette colour becomes a CSS variable, so that the same
SVG follows the page's light or dark mode.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import Bbox

from fedzo.errors import RunFolderError
from fedzo.records.folder import make_folder, raised_as, replace_file
from fedzo.report.format import bytes_text

INK, MUTED, GRID, PAPER = "#1f2430", "#6b7280", "#e2e5ea", "#ffffff"
# Okabe and Ito's colours: apart for all common kinds of colour blindness. The yellow is left out (too light on white).
BLUE, ORANGE, GREEN, PURPLE, SKY, AMBER = "#0072b2", "#d55e00", "#009e73", "#b5659a", "#56b4e9", "#e69f00"
GAP_PX = 1.5  # between two labels
DARK = "#4d4d4d"
SERIES = (BLUE, ORANGE, GREEN, PURPLE, SKY, AMBER, "#8c8c8c", DARK)
TEXT = {ORANGE: "#bf5400", GREEN: "#008560"}  # words of these colours would have less than 4.5 : 1 on white
# Five steps from even (blue) to one-sided (vermilion) for the share of a client's commonest label.
SKEW = ListedColormap([BLUE, "#4a94a8", "#a3a07a", "#d98f3f", ORANGE], name="skew")

_CSS_NAMES = {
    INK: "ink",
    MUTED: "muted",
    GRID: "grid",
    PAPER: "paper",
    BLUE: "c1",
    ORANGE: "c2",
    GREEN: "c3",
    PURPLE: "c4",
    DARK: "c8",
    TEXT[ORANGE]: "t2",
    TEXT[GREEN]: "t3",
}
_RC: dict[str, Any] = {
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"],  # equal widths, so labels fit without the first
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # a task or class name may hold a dollar sign
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "figure.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
}


@dataclass(frozen=True, slots=True)
class Picture:
    """A drawn figure with the line that says what to see in it."""

    name: str
    title: str
    caption: str
    figure: Figure


@contextmanager
def house_style() -> Iterator[None]:
    """The house settings of matplotlib while figures are drawn or written."""
    with matplotlib.rc_context(_RC):  # type: ignore[arg-type]  # it wants a Literal of every key
        yield


def new_axes(width: float = 7.2, height: float = 2.9) -> tuple[Figure, Axes]:
    """One figure (inches) with one pair of axes; call inside ``house_style``."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def panel_grid(count: int, *, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` small panels, four a row and ``height`` inches high, that share their axes."""
    columns = min(4, count)
    rows = -(-count // columns)
    figure, first = new_axes(height=1.2 + height * rows)
    figure.delaxes(first)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    flat = [axes for row in grid for axes in row]
    for place, axes in enumerate(flat[count:], start=count):
        axes.set_visible(False)
        flat[place - columns].xaxis.set_tick_params(labelbottom=True)
    return figure, flat[:count]


def whole_numbers(most: int, *, prune: Literal["upper"] | None = None) -> MaxNLocator:
    """At most so many marks, at whole numbers only: an axis of rounds, steps or rows has no others."""
    return MaxNLocator(most, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10], prune=prune)


def lone(points: Sequence[object]) -> str:
    """The marker of a line: one of a single point would not be seen without."""
    return "o" if len(points) == 1 else ""


def bytes_axis(axis: Axis) -> None:
    """Write an axis in bytes with units."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: bytes_text(value).replace(".0 ", " ")))


def running_mean(values: Sequence[float | None], *, window: int) -> list[float | None]:
    """Mean of the last ``window`` values that are there, at each position (None where there is none)."""
    means: list[float | None] = []
    for end in range(1, len(values) + 1):
        recent = [value for value in values[max(0, end - window) : end] if value is not None]
        means.append(sum(recent) / len(recent) if recent else None)
    return means


def window_of(count: int) -> int:
    """Values of a running mean over so many."""
    return max(1, min(25, count // 8))


def mean_of_known(values: Iterable[float | None]) -> float:
    """Mean of what is there; nan, which matplotlib leaves out, where nothing is."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else math.nan


def gaps(values: Sequence[float | None]) -> list[float]:
    """What is missing as nan, which matplotlib leaves out."""
    return [float("nan") if value is None else value for value in values]


def percent_axis(axes: Axes, metric: str) -> None:
    """Write the y axis in percent where the metric is accuracy."""
    if metric == "accuracy":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))


def label_at(axes: Axes, x: float, y: float, text: str, **how: Any) -> Annotation:
    """A label beside a point of the data, also outside the axes; by default to its right."""
    places: dict[str, Any] = {"xytext": (7, 0), "textcoords": "offset points", "va": "center", "color": INK} | how
    places["color"] = TEXT.get(places["color"], places["color"])
    return axes.annotate(text, (x, y), **places, annotation_clip=False)


def keep_apart(figure: Figure, labels: Sequence[Annotation]) -> None:
    """Move labels up, the lowest first, until none covers another, as measured on the drawn figure."""
    for _ in range(2):  # where labels leave the axes, the layout gives them room and changes the places
        figure.canvas.draw()
        placed: list[Bbox] = []
        for label in sorted(labels, key=lambda label: label.get_window_extent().y0):
            box = label.get_window_extent()
            for other in placed:  # from the lowest up
                if box.x0 < other.x1 and other.x0 < box.x1 and box.y0 < other.y1 + GAP_PX and other.y0 < box.y1:
                    up = other.y1 + GAP_PX - box.y0
                    box = box.translated(0, up)
                    x, y = label.xyann
                    label.xyann = (x, y + up * 72 / figure.dpi)
            placed.append(box)
            placed.sort(key=lambda box: box.y0)


def page_svg(picture: Picture) -> str:
    """The figure as an ``<svg>`` element for a page: no header, no outside names, colours as CSS variables."""
    text = _render(picture, "svg").decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # matplotlib numbers groups alike in every figure; ids must be unique
    for colour, name in _CSS_NAMES.items():
        text = re.sub(rf"(?<=[:\s]){colour}\b", f"var(--{name}, {colour})", text)
    head, body = text.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)  # the page's width decides; viewBox keeps the proportions
    return f'{head} role="img" aria-label="{html.escape(picture.title)}">{body}'


def save_pictures(pictures: Sequence[Picture], folder: Path) -> None:
    """Write each picture as PNG (144 dpi) and SVG on white.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    with writing_report(folder):
        make_folder(folder)
        for picture in pictures:
            for kind in ("png", "svg"):
                replace_file(folder / f"{picture.name}.{kind}", _render(picture, kind, facecolor=PAPER))


def writing_report(path: Path) -> AbstractContextManager[None]:
    """Tells of a report that cannot be written at ``path``, and what to do."""
    remedy = "Free disk space, change the folder's permissions, or choose another: fedzo report RUN --out DIR."
    return raised_as(RunFolderError, f"{path}: the report must be writable here", remedy)


def _render(picture: Picture, kind: str, *, facecolor: str = "none") -> bytes:
    buffer = io.BytesIO()
    empty = dict.fromkeys(("Date", "Creator", "Format", "Type")) if kind == "svg" else {"Software": None}
    with house_style(), matplotlib.rc_context({"svg.hashsalt": picture.name}):
        picture.figure.savefig(buffer, format=kind, dpi=144, facecolor=facecolor, metadata=empty)
    return buffer.getvalue()
