"""Numbers as people read them, and a mean over seeds with its interval; one wording for terminal, page and tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

MISSING = "n/a"
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % points of Student's t by degrees of freedom, from 1; beyond 9 the last, which is a little wide."""


def bytes_text(num_bytes: float | None) -> str:
    """Bytes in decimal units: ``512 B``, ``1.2 kB``, ``34 MB``."""
    if num_bytes is None:
        return MISSING
    if abs(num_bytes) < 999.5:
        return f"{num_bytes:.0f} B"
    value = float(num_bytes)
    for unit in ("kB", "MB", "GB", "TB"):
        value /= 1000
        if abs(value) < 999.5 or unit == "TB":
            break
    return f"{value:.1f} {unit}" if abs(value) < 9.95 else f"{value:.0f} {unit}"


def seconds_text(seconds: float | None) -> str:
    """A duration: ``0.4 s``, ``12 s``, ``3 min 05 s``, ``1 h 02 min``."""
    if seconds is None:
        return MISSING
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def count_text(number: int | None) -> str:
    """A whole number with thousands separators."""
    return MISSING if number is None else f"{number:,}"


def number_text(value: float | None) -> str:
    """A measured number with three significant digits."""
    if value is None:
        return MISSING
    return f"{value:#.3g}".removesuffix(".") if abs(value) < 999.5 else f"{value:,.0f}"


def percent_text(share: float | None, *, digits: int = 1) -> str:
    """A share of 1 as a percentage: ``77.1 %``."""
    return MISSING if share is None else f"{100 * share:.{digits}f} %"


def share_text(part: int, whole: int) -> str:
    """A small share of a whole with two significant digits.

    Example:
        >>> share_text(1, 1000), share_text(27, 28), share_text(999, 1000), share_text(4, 4)
        ('0.10 %', '96 %', '99 %', '100 %')
    """
    if whole <= 0:
        return MISSING
    percent = 100 * part / whole
    return f"{percent:#.2g} %" if percent < 9.95 else f"{int(percent) if percent > 99 else percent:.0f} %"


def counted(number: int, what: str) -> str:
    """A count with its noun: ``1 round``, ``2 rounds``."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def span(numbers: Sequence[int], what: str) -> str:
    """From the least to the most: ``3 to 9 rows``, or one of them where they are equal."""
    low, high = min(numbers), max(numbers)
    return counted(low, what) if low == high else f"{low:,} to {counted(high, what)}"


def first(number: int, what: str = "") -> str:
    """``the first 5 rounds``, ``the first round``."""
    return _some("the first", number, what)


def last(number: int, what: str = "") -> str:
    """``the last 5 rounds``, ``the last round``; without a noun ``the last one``."""
    return _some("the last", number, what)


def shortened(text: str, most: int, *, tail: int = 0) -> str:
    """At most so many letters of a text, with the last ``tail`` of them from its end.

    Example:
        >>> shortened("a fair review", 9), shortened("/data/reviews/v2", 9, tail=4), shortened("fair", 9)
        ('a fair r…', '/dat…s/v2', 'fair')
    """
    return text if len(text) <= most else f"{text[: most - tail - 1].rstrip()}…{text[len(text) - tail :]}"


def _some(which: str, number: int, what: str) -> str:
    if number == 1:
        return f"{which} {what or 'one'}"
    return f"{which} {counted(number, what) if what else f'{number:,}'}"


def cut_text(cut_rows: Mapping[str, tuple[int, int]], max_length: object) -> str:
    """Which share of each split's rows is cut; empty where no row is."""
    if not any(cut for cut, _ in cut_rows.values()):
        return ""
    parts = [
        f"{split} {cut:,} of {whole:,} ({share_text(cut, whole)})" for split, (cut, whole) in cut_rows.items() if cut
    ]
    return (
        f"task.max_length={max_length} truncates rows (the start of the prompt or the end of the answer is lost): "
        f"{', '.join(parts)}. Raise task.max_length to keep them whole."
    )


def score_text(metric: str, value: float | None) -> str:
    """A score in the metric's own habit: accuracy in percent, F1 and ROUGE-L as a number of [0, 1]."""
    if value is None:
        return MISSING
    return percent_text(value) if metric == "accuracy" else f"{value:.3f}"


def change_text(metric: str, before: float | None, after: float | None) -> str:
    """The signed change of a score: ``+22.3 points`` for accuracy, ``+0.113`` for others."""
    if before is None or after is None:
        return MISSING
    return f"{100 * (after - before):+.1f} points" if metric == "accuracy" else f"{after - before:+.3f}"


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean over run seeds, and the half width of its 95 % interval by Student's t; nan for one seed."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    error = statistics.stdev(values) / math.sqrt(len(values))
    return mean, _STUDENT[min(len(values) - 2, len(_STUDENT) - 1)] * error


def mean_text(metric: str, mean: float, half: float) -> str:
    """A mean score over seeds with the half width of its interval, if it has one.

    Example:
        >>> mean_text("accuracy", 0.765, 0.032), mean_text("token_f1", 0.5, 0.0341), mean_text("rouge_l", 0.5, math.nan)
        ('76.5 % +- 3.2 points', '0.500 +- 0.034', '0.500')
    """
    text = score_text(metric, mean)
    if math.isnan(half):
        return text
    return f"{text} +- {100 * half:.1f} points" if metric == "accuracy" else f"{text} +- {half:.3f}"


def gain_text(metric: str, mean: float, half: float) -> str:
    """A mean difference of scores over seeds with the half width of its interval.

    Example:
        >>> gain_text("accuracy", 0.0104, 0.0027), gain_text("token_f1", -0.5, 0.0341)
        ('+1.0 points +- 0.3', '-0.500 +- 0.034')
    """
    return f"{change_text(metric, 0.0, mean)} +- " + (f"{100 * half:.1f}" if metric == "accuracy" else f"{half:.3f}")


def flagged_text(clients: Sequence[int], *, fallback: bool) -> str:
    """Whom a decision on who stops early flagged.

    Example:
        >>> flagged_text([1, 3], fallback=False), flagged_text([], fallback=False), flagged_text([1, 3], fallback=True)
        ('1, 3', 'none', '1, 3 (too many: none stopped)')
    """
    return (", ".join(map(str, clients)) or "none") + (" (too many: none stopped)" if fallback else "")
