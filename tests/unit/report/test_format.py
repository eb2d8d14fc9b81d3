"""How numbers are written: against texts written by hand, and intervals against Student's table."""

from __future__ import annotations

import pytest

from fedzo.report.format import bytes_text, change_text, interval, number_text, score_text, seconds_text, share_text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.7, "1.0 kB"),
        (1234, "1.2 kB"),
        (9_960, "10 kB"),
        (999_600, "1.0 MB"),
        (34_000_000, "34 MB"),
        (5e15, "5000 TB"),
        (None, "n/a"),
    ],
)
def test_bytes_are_decimal_and_change_unit_before_four_digits(num_bytes: float | None, text: str) -> None:
    assert bytes_text(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.44, "0.4 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.8, "1 h 00 min"),
        (7380, "2 h 03 min"),
    ],
)
def test_durations_round_without_a_sixtieth_second_or_minute(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


def test_only_accuracy_is_written_in_percent() -> None:
    assert (score_text("accuracy", 0.7715), score_text("f1", 0.7715), score_text("f1", None)) == (
        "77.1 %",
        "0.771",
        "n/a",
    )
    assert change_text("accuracy", 0.5, 0.45) == "-5.0 points"
    assert change_text("rouge_l", 0.1, 0.25) == "+0.150"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0.5, "0.500"), (12.34, "12.3"), (123.4, "123"), (999.4, "999"), (999.6, "1,000"), (-123.4, "-123")),
        *((1234567.0, "1,234,567"), (1.5e-7, "1.50e-07"), (0.0, "0.00"), (None, "n/a")),
    ],
)
def test_a_number_has_three_digits(value: float | None, text: str) -> None:
    assert number_text(value) == text


def test_a_share_of_everything_is_plain() -> None:
    assert (share_text(134_392, 134_515_008), share_text(7, 7), share_text(1, 0)) == ("0.10 %", "100 %", "n/a")


@pytest.mark.parametrize(
    ("values", "mean", "half"),
    [
        ([1.0, 3.0], 2.0, 12.706),  # the standard deviation is sqrt(2), so the error of the mean is 1
        ([1.0, 2.0, 3.0], 2.0, 4.303 / 3**0.5),
        ([0.0, 1.0] * 20, 0.5, 2.262 * (10 / 39) ** 0.5 / 40**0.5),  # beyond the table: a little wide
    ],
)
def test_an_interval_is_students(values: list[float], mean: float, half: float) -> None:
    assert interval(values) == (pytest.approx(mean), pytest.approx(half))
